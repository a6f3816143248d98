"""Cells clustered from enhanced expression and from embeddings at growing T. Also `scfoundation benchmark clustering`.

The paper's Fig. 2c and 2d in small: expression goes through scanpy's tutorial (variable genes, PCA), embeddings as they
are; both then through 15 neighbours and Leiden, at the resolution that gives as many clusters as there are cell types.
"""
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

from scfoundation_hf.inference.embedding import embed
from scfoundation_hf.inference.loading import load_with_decoder

from .cell_sets import CellFile, CellSet, read_cells
from .denoisers import DENOISERS, fit_scvi, plain_values
from .graph_clustering import components_of_expression, leiden, neighbor_graph, umap
from .methods import Setup, Weights, check_methods, check_packages, describe_model, save_random_weights, what_changes
from .panels import draw_clustering, draw_maps
from .reports import clustering_tables
from .stored_parts import Remeasure, StoredParts

FOLDS = (1, 2, 3, 4, 5)
SETTINGS = (
    "methods",
    "folds",
    "expression_fold",
    "max_cells",
    "min_cells_per_label",
    "num_repeats",
    "scvi_epochs",
    "seed",
)
MIN_CELLS_PER_LABEL = 10
NUM_REPEATS = 5


@dataclass(frozen=True)
class Representation:
    """A space to cluster in.

    Attributes:
        title: its name in tables and figures; "{fold:g}" in it is T / S.
        places: the cells -> `(C, dimensions)`.
        package: what must be installed for it.
        weights: which weights of our network it computes with, if it does.
        is_folded: whether it is measured at every fold.
    """

    title: str
    places: Callable[[AnnData, Setup], np.ndarray]
    package: str | None = None
    weights: Weights | None = None
    is_folded: bool = False


def expression_of(method: str) -> Callable[[AnnData, Setup], np.ndarray]:
    """Principal components of a method's expression."""
    denoiser = DENOISERS[method]

    def places(cells: AnnData, setup: Setup) -> np.ndarray:
        predicted = denoiser.predict(cells, setup)
        return components_of_expression(plain_values(denoiser, predicted), seed=setup.seed)

    return places


def embedding_of(cells: AnnData, model: Path, *, depth_fold: float, device: str | None) -> np.ndarray:
    """Our embedding, `(C, 4 * hidden_size)`."""
    copy = AnnData(cells.X, obs=cells.obs[[]], var=cells.var)
    embed(copy, model, depth_fold=depth_fold, device=device, progress=False)
    return np.asarray(copy.obsm["X_scfoundation"])


def _ours(cells: AnnData, setup: Setup) -> np.ndarray:
    return embedding_of(cells, setup.model, depth_fold=setup.depth_fold, device=setup.device)


def _random_weights(cells: AnnData, setup: Setup) -> np.ndarray:
    return embedding_of(cells, setup.random_weights, depth_fold=1, device=setup.device)


def _scvi_latent(cells: AnnData, setup: Setup) -> np.ndarray:
    return np.asarray(fit_scvi(cells, setup).get_latent_representation())


REPRESENTATIONS: dict[str, Representation] = {
    "counts": Representation("counts as measured", expression_of("down-sampled")),
    "knn-smoothing": Representation("kNN smoothing", expression_of("knn-smoothing"), package="sklearn"),
    "magic": Representation("MAGIC", expression_of("magic"), package="magic"),
    "scvi": Representation("scVI", expression_of("scvi"), package="scvi"),
    "scvi-latent": Representation("scVI latent space", _scvi_latent, package="scvi"),
    "random-weights": Representation("random weights", _random_weights, weights="random"),
    "scfoundation-expression": Representation(
        "scFoundation expression", expression_of("scfoundation"), weights="trained"
    ),
    "scfoundation": Representation("scFoundation, T/S = {fold:g}", _ours, weights="trained", is_folded=True),
}


def benchmark_clustering(
    data: Mapping[str, CellFile],
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    methods: Sequence[str] = tuple(REPRESENTATIONS),
    folds: Sequence[float] = FOLDS,
    expression_fold: float = 5,
    max_cells: int | None = 2000,
    min_cells_per_label: int = MIN_CELLS_PER_LABEL,
    num_repeats: int = NUM_REPEATS,
    scvi_epochs: int | None = None,
    seed: int = 0,
    device: str | None = None,
    remeasure: Remeasure = "nothing",
    progress: bool = True,
) -> Path:
    """Measure how well the clusters of several representations agree with cell types.

    Every (data set, method, fold, seed) is a file in `parts/` as soon as it is measured; the same call goes on with
    what is missing.

    Args:
        data: data sets by name, each with a `label`.
        model: model folder or Hub id.
        output: folder to make: `results.json`, `tables.md`, `clustering.svg`, `umap.svg`, and both as `.png`.
        methods: of `REPRESENTATIONS`.
        folds: T / S of our embeddings, at least 1.
        expression_fold: T / S of our expression.
        max_cells: of each data set; `None`: all.
        min_cells_per_label: cells of rarer types are left out.
        num_repeats: runs of Leiden with seeds of their own; scores are their means.
        scvi_epochs: `None`: scVI's own number.
        seed: of methods that draw.
        device: `None`: a GPU if there is one.
        remeasure: of what `output` has: nothing, what was measured with another model, or everything.
        progress: show a progress bar.
    Returns: `output`.
    Raises: ValueError: for unknown methods, folds below 1, a data set without label, or parts of other settings;
        ImportError: for a method whose package is missing; FileExistsError, FileNotFoundError, KeyError: as the names
        say.
    """
    check_methods(methods, REPRESENTATIONS, extra="enhancement-benchmark")
    check_packages({"Clustering": "scanpy", "Scoring": "evaluate"}, extra="enhancement-benchmark")
    if not min(*folds, expression_fold) >= 1:
        raise ValueError(f"T / S must be at least 1, got {min(*folds, expression_fold)!r}.")
    for name, file in data.items():
        if file.label is None:
            raise ValueError(f"Data set {name!r} names no label, the obs column of the cell types.")
    loaded = load_with_decoder(str(model), device=device)
    about_the_model, vocabulary = describe_model(loaded), loaded.tokenizer.vocabulary
    del loaded
    parts = StoredParts(Path(output), depends_on={"repeats": num_repeats}, remeasure=remeasure)
    runs = [(method, fold) for method in methods for fold in (folds if REPRESENTATIONS[method].is_folded else (None,))]
    results: dict[str, Any] = {
        "model": about_the_model,
        "settings": {
            "expression_fold": expression_fold,
            "max_cells": max_cells,
            "min_cells_per_label": min_cells_per_label,
            "num_repeats": num_repeats,
            "scvi_epochs": scvi_epochs,
            "seed": seed,
        },
        "data": {},
    }
    maps: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(total=len(data) * len(runs), unit=" parts", disable=not progress) as bar,
    ):
        control = Path(temporary) / "random-weights"
        if "random-weights" in methods:
            save_random_weights(Path(model), control, seed=seed)
        for name, file in data.items():
            cells = read_cells(
                name, file, vocabulary, max_cells=max_cells, min_cells_per_label=min_cells_per_label, seed=seed
            )
            scvi_models: dict[str | None, tuple[Any, float]] = {}
            found: dict[str, Any] = {}
            maps[name] = {}
            for method, fold in runs:
                bar.set_description(f"{name}, {method}")
                representation = REPRESENTATIONS[method]
                setup = Setup(
                    Path(model), control, fold or expression_fold, seed, scvi_epochs, device, scvi_models=scvi_models
                )
                part = parts.get(
                    {"data": name, "method": method, "fold": "all" if fold is None else f"{fold:g}", "seed": seed},
                    partial(measure, cells, representation, setup, num_repeats=num_repeats),
                    depends_on=what_changes(
                        cells, representation, about_the_model=about_the_model, scvi_epochs=scvi_epochs
                    )
                    | ({"fold": setup.depth_fold} if representation.weights else {}),
                )
                title = representation.title.format(fold=fold)
                found[title] = part["scores"] | {"fold": fold, "seconds": part["seconds"]}
                if fold in (None, folds[0], folds[-1]):
                    maps[name][title] = (np.array(part["umap"]), cells.labels)
                bar.update()
            results["data"][name] = {
                "num_cells": cells.adata.n_obs,
                "num_labels": len(np.unique(cells.labels)),
                "methods": found,
            }
    parts.write_results(results, clustering_tables(results))
    draw_clustering(results, parts.folder / "clustering")
    draw_maps(maps, parts.folder / "umap")
    return parts.folder


def measure(cells: CellSet, representation: Representation, setup: Setup, *, num_repeats: int) -> dict[str, Any]:
    """Mean scores over runs of Leiden with their standard deviations, a UMAP, and the seconds that the places took.

    They include the training of a model that an earlier method of the same cells has trained.
    """
    from scfoundation_hf.evaluation.metrics.clustering.clustering import clustering_scores

    trained_before = dict(setup.scvi_models or {}) if representation.package == "scvi" else {}
    start = perf_counter()
    places = representation.places(cells.adata, setup)
    seconds = perf_counter() - start + sum(seconds for _, seconds in trained_before.values())
    graph = neighbor_graph(places, seed=setup.seed)
    num_labels = len(np.unique(cells.labels))
    runs = [leiden(graph, num_labels, seed=setup.seed + repeat) for repeat in range(num_repeats)]
    of_space = clustering_scores(runs[0].of_cell, cells.labels, embeddings=places)
    scores = {key: of_space[key] for key in ("silhouette", "calinski_harabasz")}
    of_runs = [clustering_scores(run.of_cell, cells.labels) for run in runs]
    for key in ("nmi", "ari"):
        values = [found[key] for found in of_runs]
        scores |= {key: float(np.mean(values)), f"{key}_sd": float(np.std(values))}
    scores["num_clusters"] = float(np.mean([run.number for run in runs]))
    return {"seconds": seconds, "scores": scores, "umap": np.round(umap(graph, seed=setup.seed), 3)}
