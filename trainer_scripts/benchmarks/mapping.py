"""Cells of several batches brought into one space, scored as scIB does. Also `scfoundation benchmark mapping`."""
# C cells, G genes

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from anndata import AnnData
from tqdm.auto import tqdm

from scfoundation_hf.inference.integration import IntegrationMethod, integrate
from scfoundation_hf.inference.loading import load_with_decoder

from .cell_sets import CellFile, CellSet, read_cells
from .clustering import embedding_of
from .denoisers import fit_scvi, log1p_values
from .graph_clustering import (
    components_of_expression,
    connectivity_of_labels,
    leiden,
    neighbor_graph,
    umap,
    variable_genes,
)
from .methods import Setup, Weights, check_methods, check_packages, describe_model, save_random_weights, what_changes
from .panels import draw_integration, draw_maps
from .reports import mapping_tables
from .stored_parts import Remeasure, StoredParts

SETTINGS = ("methods", "max_cells", "min_cells_per_label", "scvi_epochs", "seed")
MIN_CELLS_PER_LABEL = 10
EXTRAS = "mapping,enhancement-benchmark"


@dataclass(frozen=True)
class Mapper:
    """A way to place the cells of all batches.

    Attributes:
        title: its name in tables and figures.
        places: the cells -> `(C, dimensions)`.
        then: what `integrate` does with the places.
        package: what must be installed for it.
        weights: which weights of our network it computes with, if it does.
    """

    title: str
    places: Callable[[AnnData, Setup], np.ndarray]
    then: IntegrationMethod | None = None
    package: str | None = None
    weights: Weights | None = None


def _raw(cells: AnnData, setup: Setup) -> np.ndarray:
    return variable_genes(log1p_values(cells.X))


def _pca(cells: AnnData, setup: Setup) -> np.ndarray:
    return components_of_expression(log1p_values(cells.X), seed=setup.seed)


def _scvi(cells: AnnData, setup: Setup) -> np.ndarray:
    return np.asarray(fit_scvi(cells, setup, batch="batch").get_latent_representation())


def _ours(cells: AnnData, setup: Setup) -> np.ndarray:
    return embedding_of(cells, setup.model, depth_fold=setup.depth_fold, device=setup.device)


def _random_weights(cells: AnnData, setup: Setup) -> np.ndarray:
    return embedding_of(cells, setup.random_weights, depth_fold=setup.depth_fold, device=setup.device)


MAPPERS: dict[str, Mapper] = {
    "raw": Mapper("raw", _raw),
    "pca": Mapper("PCA", _pca),
    "pca-harmony": Mapper("PCA + Harmony", _pca, "harmony", package="harmonypy"),
    "pca-bbknn": Mapper("PCA + BBKNN", _pca, "bbknn", package="bbknn"),
    "scvi": Mapper("scVI", _scvi, package="scvi"),
    "random-weights": Mapper("random weights", _random_weights, weights="random"),
    "random-weights-harmony": Mapper(
        "random weights + Harmony", _random_weights, "harmony", package="harmonypy", weights="random"
    ),
    "scfoundation": Mapper("scFoundation", _ours, weights="trained"),
    "scfoundation-harmony": Mapper("scFoundation + Harmony", _ours, "harmony", package="harmonypy", weights="trained"),
    "scfoundation-bbknn": Mapper("scFoundation + BBKNN", _ours, "bbknn", package="bbknn", weights="trained"),
}


def benchmark_mapping(
    data: Mapping[str, CellFile],
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    methods: Sequence[str] = tuple(MAPPERS),
    max_cells: int | None = 2000,
    min_cells_per_label: int = MIN_CELLS_PER_LABEL,
    scvi_epochs: int | None = None,
    seed: int = 0,
    device: str | None = None,
    remeasure: Remeasure = "nothing",
    progress: bool = True,
) -> Path:
    """Score how well methods keep cell types apart and bring batches together.

    Every (data set, method, seed) is a file in `parts/` as soon as it is measured; the same call goes on with what is
    missing. Spaces get the scores of `evaluation/metrics/integration`; all, BBKNN's graphs too, those of a neighbour
    graph: Leiden at as many clusters as there are cell types, and the connectivity of the types.

    Args:
        data: data sets by name, each with `label` and `batch`.
        model: model folder or Hub id.
        output: folder to make: `results.json`, `tables.md`, `mapping.svg`, `umap_cell_type.svg`, `umap_batch.svg`, and
            these as `.png`.
        methods: of `MAPPERS`.
        max_cells: of each data set; `None`: all.
        min_cells_per_label: cells of rarer types are left out.
        scvi_epochs: `None`: scVI's own number.
        seed: of methods that draw.
        device: `None`: a GPU if there is one.
        remeasure: of what `output` has: nothing, what was measured with another model, or everything.
        progress: show a progress bar.
    Returns: `output`.
    Raises: ValueError: for unknown methods, a data set without label or batch, or parts of other settings; ImportError:
        for a method whose package, or scib-metrics, is missing; FileExistsError, FileNotFoundError, KeyError: as the
        names say.
    """
    check_methods(methods, MAPPERS, extra=EXTRAS)
    check_packages({"Clustering": "scanpy", "Scoring": "scib_metrics", "Metrics": "evaluate"}, extra=EXTRAS)
    for name, file in data.items():
        if file.label is None or file.batch is None:
            raise ValueError(f"Data set {name!r} must name label and batch, the obs columns of cell type and batch.")
    loaded = load_with_decoder(str(model), device=device)
    about_the_model, vocabulary = describe_model(loaded), loaded.tokenizer.vocabulary
    del loaded
    parts = StoredParts(Path(output), depends_on={}, remeasure=remeasure)
    results: dict[str, Any] = {
        "model": about_the_model,
        "settings": {
            "max_cells": max_cells,
            "min_cells_per_label": min_cells_per_label,
            "scvi_epochs": scvi_epochs,
            "seed": seed,
        },
        "data": {},
    }
    maps: dict[str, dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]] = {"cell_type": {}, "batch": {}}
    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(total=len(data) * len(methods), unit=" parts", disable=not progress) as bar,
    ):
        control = Path(temporary) / "random-weights"
        if any(method.startswith("random-weights") for method in methods):
            save_random_weights(Path(model), control, seed=seed)
        setup = Setup(Path(model), control, 1, seed, scvi_epochs, device)
        for name, file in data.items():
            cells = read_cells(
                name, file, vocabulary, max_cells=max_cells, min_cells_per_label=min_cells_per_label, seed=seed
            )
            found: dict[str, Any] = {}
            spaces: dict[Callable[..., Any], tuple[np.ndarray, float]] = {}
            for of_kind in maps.values():
                of_kind[name] = {}
            for method in methods:
                bar.set_description(f"{name}, {method}")
                mapper = MAPPERS[method]
                part = parts.get(
                    {"data": name, "method": method, "seed": seed},
                    partial(measure, cells, mapper, setup, spaces=spaces),
                    depends_on=what_changes(cells, mapper, about_the_model=about_the_model, scvi_epochs=scvi_epochs),
                )
                found[mapper.title] = part["scores"] | {"seconds": part["seconds"]}
                places = np.array(part["umap"])
                maps["cell_type"][name][mapper.title] = (places, cells.labels)
                maps["batch"][name][mapper.title] = (places, cells.batches)
                bar.update()
            results["data"][name] = {
                "num_cells": cells.adata.n_obs,
                "num_labels": len(np.unique(cells.labels)),
                "num_batches": len(np.unique(cells.batches)),
                "methods": found,
            }
    parts.write_results(results, mapping_tables(results))
    draw_integration(results, parts.folder / "mapping")
    for kind, of_kind in maps.items():
        draw_maps(of_kind, parts.folder / f"umap_{kind}")
    return parts.folder


def measure(
    cells: CellSet, mapper: Mapper, setup: Setup, *, spaces: dict[Callable[..., Any], tuple[np.ndarray, float]]
) -> dict[str, Any]:
    """The scores of a method, and a UMAP.

    Args:
        spaces: places of these cells that are known, with the seconds that they took; this method's are added, so that
            Harmony and BBKNN on the same embedding compute it once.
    """
    from scfoundation_hf.evaluation.metrics.clustering.clustering import clustering_scores
    from scfoundation_hf.evaluation.metrics.integration.integration import integration_scores

    start = perf_counter()
    if mapper.places not in spaces:
        places = mapper.places(cells.adata, setup)
        spaces[mapper.places] = (places, perf_counter() - start)
    places, seconds_of_places = spaces[mapper.places]
    start = perf_counter()
    adata = AnnData(obs=cells.adata.obs, obsm={"X": places})
    if mapper.then is not None:
        integrate(adata, batch="batch", method=mapper.then, use_rep="X", key_added="integrated", seed=setup.seed)
    seconds = seconds_of_places + perf_counter() - start
    scores: dict[str, float] = {}
    if mapper.then == "bbknn":
        graph, key, connectivities = adata, "integrated", adata.obsp["integrated_connectivities"]
    else:
        places = adata.obsm["integrated"] if mapper.then == "harmony" else places
        graph, key = neighbor_graph(places, seed=setup.seed), None
        connectivities = graph.obsp["connectivities"]
        scores = integration_scores(
            places,
            cells.labels,
            cells.batches,
            unintegrated=components_of_expression(log1p_values(cells.adata.X), seed=setup.seed),
        )
    clusters = leiden(graph, len(np.unique(cells.labels)), seed=setup.seed, neighbors_key=key)
    of_clusters = clustering_scores(clusters.of_cell, cells.labels)
    scores |= {
        "nmi_leiden": of_clusters["nmi"],
        "ari_leiden": of_clusters["ari"],
        "graph_connectivity_of_graph": connectivity_of_labels(connectivities, cells.labels),
    }
    coordinates = umap(graph, seed=setup.seed, neighbors_key=key)
    return {"seconds": seconds, "scores": scores, "umap": np.round(coordinates, 3)}
