"""Labelled cells to compare others with: the nearest of a reference of any size, and how far is too far.

`scfoundation index` makes the folder, `annotate(..., reference=)` reads it. Neighbours are found by USearch, whose
graph answers for a million cells at once and is read from its file where it lies.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationModel
from scfoundation_hf.modeling_scfoundation.pooling import PoolingMode
from scfoundation_hf.tokenization.prepared_cells import OnEmptyCell, Values

from .calibration import MAX_SHARE_LOST
from .cell_job import check_at_least_one, check_data
from .embedding import check_pooling, embedding_job
from .loading import LoadedModel, ModelSource, evaluating, load_encoder
from .many_processes import ALONE, Processes
from .writer import StoredRows, check_free, check_parent, row_blocks

NUM_NEIGHBORS = 15
MAX_NEIGHBORS = 50
MAX_EXACT_CELLS = 20_000  # in a larger reference, the neighbours are found through the graph
MAX_THRESHOLD_CELLS = 10_000  # of the reference, drawn to learn its own distances
CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = 32, 128, 128  # recall 0.998 (docs/annotation.md)
MIN_DISTANCE = 1e-6  # what a cell that is itself in the reference counts as

GRAPH_FILE, TENSORS_FILE, RECORD_FILE = "embeddings.usearch", "reference.safetensors", "reference.json"


@dataclass(frozen=True, eq=False)
class ReferenceIndex:
    """Embeddings and types of labelled cells, ready to be searched.

    Embeddings are centred and scaled by the reference's own mean and standard deviation, number by number, and compared
    by cosine distance (0 to 2), so that neither a few large numbers nor a cell's depth decide.

    Args:
        cell_types: the types, sorted.
        labels: `(cells,)` int32, the type of each cell.
        graph: USearch index of the scaled embeddings, stored in float16.
        mean, scale: `(P,)` float32.
        own_distances: `(up to 10,000, up to 50)` float32, from reference cells to their nearest other ones, rising.
        record: model, settings and size, JSON-able.
    """

    cell_types: list[str]
    labels: np.ndarray
    graph: Any
    mean: np.ndarray
    scale: np.ndarray
    own_distances: np.ndarray
    record: Mapping[str, Any]

    @classmethod
    def build(
        cls,
        embeddings: np.ndarray | StoredRows,
        labels: Sequence[str] | np.ndarray,
        *,
        record: Mapping[str, Any] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> "ReferenceIndex":
        """Index embeddings that are there already, such as `adata.obsm["X_scfoundation"]`.

        Args:
            embeddings: `(cells, P)`; rows of NaN are left out.
            labels: `(cells,)` the type of each cell.
            record: what to note of their origin.
            seed: of the draw of cells from which the reference's own distances are learned.
        Raises: ValueError: for shapes that do not fit, labels that are missing, fewer than 3 cells, or fewer than two
            types.
        """
        names = np.asarray(labels, dtype=object)
        if len(embeddings.shape) != 2 or names.shape != embeddings.shape[:1]:
            raise ValueError(f"{names.shape} labels do not fit embeddings of shape {tuple(embeddings.shape)}.")
        is_kept, mean, scale = _describe(embeddings)
        is_missing = np.array([name is None or name != name for name in names]) & is_kept
        if is_missing.any():
            raise ValueError(f"{is_missing.sum():,} of the cells have no label; take the labelled cells only.")
        cell_types, numbers = np.unique(names[is_kept].astype(str), return_inverse=True)
        _check_enough(num_cells=len(numbers), num_types=len(cell_types))
        graph = _new_graph(len(mean))
        blocks = (_scaled(block[is_kept[where]], mean, scale) for where, block in row_blocks(embeddings))
        _fill(graph, blocks, num_cells=len(numbers), progress=progress)
        return cls(
            cell_types=cell_types.tolist(),
            labels=numbers.astype(np.int32),
            graph=graph,
            mean=mean,
            scale=scale,
            own_distances=_own_distances(graph, seed=seed),
            record={**(record or {}), "num_cells": len(numbers), "scfoundation_hf_version": version("scfoundation-hf")},
        )

    def __len__(self) -> int:
        """Number of cells."""
        return len(self.labels)

    def __repr__(self) -> str:
        """Cells, types and width."""
        return f"<ReferenceIndex: {len(self):,} cells of {len(self.cell_types)} types, {len(self.mean)} numbers each>"

    def neighbors(self, embeddings: np.ndarray, *, num_neighbors: int = NUM_NEIGHBORS) -> tuple[np.ndarray, np.ndarray]:
        """The nearest reference cells, nearest first: their rows and cosine distances, each `(cells, neighbours)`.

        Exact in a reference of up to 20,000 cells; the answer for a cell does not depend on the others asked for.

        Raises: ValueError: for more neighbours than there are, or embeddings of another width.
        """
        self.check_num_neighbors(num_neighbors)
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.mean):
            raise ValueError(
                f"The embeddings have shape {embeddings.shape}, those of the reference {len(self.mean)} numbers a "
                "cell: make both with the same model and pooling."
            )
        return _search(self.graph, _scaled(embeddings, self.mean, self.scale), num_neighbors)

    def call(self, embeddings: np.ndarray, *, num_neighbors: int = NUM_NEIGHBORS) -> tuple[np.ndarray, np.ndarray]:
        """Each type's share of the neighbours, weighted by 1 / distance, and the mean distance to them.

        Returns: float32 `(cells, types)` and `(cells,)`.
        Raises: as `neighbors`.
        """
        rows, distances = self.neighbors(embeddings, num_neighbors=num_neighbors)
        votes = np.zeros((len(rows), len(self.cell_types)))
        np.add.at(votes, (np.arange(len(rows))[:, None], self.labels[rows]), 1 / np.maximum(distances, MIN_DISTANCE))
        return (votes / votes.sum(axis=1, keepdims=True)).astype(np.float32), distances.mean(axis=1)

    def unassigned_above(self, num_neighbors: int = NUM_NEIGHBORS) -> float:
        """The mean distance beyond which 5 % of the reference's own cells lie, each compared with all others."""
        self.check_num_neighbors(num_neighbors)
        return float(np.quantile(self.own_distances[:, :num_neighbors].mean(axis=1), 1 - MAX_SHARE_LOST))

    def check_num_neighbors(self, num_neighbors: int) -> None:
        """Refuse more neighbours than a cell of the reference has.

        Raises: ValueError.
        """
        most = self.own_distances.shape[1]
        if not 1 <= num_neighbors <= most:
            raise ValueError(
                f"num_neighbors is {num_neighbors}; with a reference of {len(self):,} cells it may be 1 to {most}."
            )

    def sha256(self) -> str:
        """The same for the same reference, wherever it lies."""
        digest = hashlib.sha256(json.dumps(self.cell_types).encode())
        for array in (self.labels, self.mean, self.scale, self.own_distances):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def save(self, folder: str | PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the folder, which appears when it is complete; returns it.

        Raises: FileExistsError: if it exists and `overwrite` is not set, or it is something else.
        """
        target = Path(folder)
        _check_folder(target, overwrite=overwrite)
        unfinished = target.with_name(f".{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        self.graph.save(str(unfinished / GRAPH_FILE))
        tensors = {name: getattr(self, name) for name in ("labels", "mean", "scale", "own_distances")}
        save_file(tensors, unfinished / TENSORS_FILE)
        record = {"cell_types": self.cell_types, **self.record}
        (unfinished / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        return unfinished.replace(target)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> "ReferenceIndex":
        """Open a folder that `save` wrote; the graph stays on disk and is read as it is needed.

        Raises: FileNotFoundError: if there is none; ValueError: if it is damaged.
        """
        path = Path(folder)
        if not (path / RECORD_FILE).is_file():
            raise FileNotFoundError(
                f"There is no reference index {folder} (no {RECORD_FILE}). `scfoundation index` makes one of labelled "
                "cells."
            )
        try:
            record = json.loads((path / RECORD_FILE).read_text(encoding="utf-8"))
            tensors = load_file(path / TENSORS_FILE)
            graph = _usearch().restore(str(path / GRAPH_FILE), view=True)
            graph.expansion_search = EXPANSION_SEARCH
            index = cls(
                cell_types=record.pop("cell_types"),
                labels=tensors["labels"],
                graph=graph,
                mean=tensors["mean"],
                scale=tensors["scale"],
                own_distances=tensors["own_distances"],
                record=record,
            )
        except (OSError, KeyError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
            raise ValueError(f"The reference index {folder} is damaged ({error!r}); make it again.") from error
        if (len(graph), graph.ndim) != (len(index), len(index.mean)):
            raise ValueError(
                f"The reference index {folder} is damaged: {GRAPH_FILE} has {len(graph):,} cells, {TENSORS_FILE} "
                f"{len(index):,}; make it again."
            )
        return index

    def check_model(self, loaded: LoadedModel[ScFoundationModel]) -> None:
        """Refuse a model other than the one whose embeddings are in the index.

        Raises: ValueError.
        """
        made_with = self.record.get("model")
        if made_with and made_with["weights_sha256"] != loaded.weights_sha256():
            raise ValueError(
                f"The reference index was made with {made_with['name']} in {made_with['dtype']}, and {loaded.name} in "
                f"{loaded.model.dtype} is another encoder: embeddings of two models do not compare. Pass that model, "
                "or index the reference again."
            )


def index_reference(
    data: AnnData | str | PathLike[str],
    model: ModelSource,
    *,
    label: str,
    output: str | PathLike[str] | None = None,
    pooling: PoolingMode = "all",
    layer: str | None = None,
    gene_column: str | None = None,
    values: Values = "counts",
    total_counts: np.ndarray | str | None = None,
    min_genes: int | None = None,
    on_empty_cell: OnEmptyCell = "error",
    tokens_per_batch: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ReferenceIndex | Path:
    """Embed labelled cells and index them, for `annotate(..., reference=)`.

    Args:
        data: an AnnData, or a path, read in chunks whatever its size.
        model: folder, Hub id or loaded scFoundation model; the same is needed to annotate.
        label: column of `obs` with the types; every cell needs one.
        output: for a path only, and then required: the folder to write. A run that was killed resumes when the same
            call is made again, and several processes share the embedding (docs/many-devices.md).
        pooling: "all", or "max", a quarter as large.
        layer, gene_column, values, total_counts, min_genes, on_empty_cell, tokens_per_batch, device, dtype, overwrite,
            progress: as in `embed`; cells left out are not in the reference.
    Returns: the index, or the written folder.
    Raises: ValueError, KeyError: for input that cannot be right, saying which cell, gene or column and what to do;
        OSError: for files that are missing, broken or in the way.
    """
    if isinstance(data, AnnData) and output is not None:
        raise ValueError("output= is for files: an AnnData gives a ReferenceIndex, which has save(folder).")
    source, target = check_data(data, output, verb="index_reference")
    processes = ALONE if source is None else Processes.from_environment()
    with processes.speaking_once():
        if target is not None:
            _check_folder(target, overwrite=overwrite)
        check_at_least_one(tokens_per_batch=tokens_per_batch)
        check_pooling(pooling)
        _usearch()
        loaded = load_encoder(model, device=device, dtype=dtype, processes=processes)
        prepared = loaded.tokenizer.prepare(
            data,
            layer=layer,
            gene_column=gene_column,
            values=values,
            total_counts=total_counts,
            min_genes=min_genes,
            on_empty_cell=on_empty_cell,
        )
        with prepared, evaluating(loaded.model):
            cell_types, numbers = prepared.class_labels(label)
            _check_enough(num_cells=int(prepared.is_kept.sum()), num_types=len(cell_types))
            job = embedding_job(
                loaded, prepared, pooling, tokens_per_batch=tokens_per_batch, progress=progress, processes=processes
            )

            def build(rows: np.ndarray | StoredRows) -> ReferenceIndex:
                origin = json.loads(job.record())
                origin["model"]["weights_sha256"] = loaded.weights_sha256()
                origin["label"] = label
                labels = np.array([*cell_types, ""], dtype=object)[numbers]  # the last: of cells left out
                return ReferenceIndex.build(rows, labels, record=origin, progress=progress)

            job.announce()
            if source is None or target is None:
                return build(job.gather())

            def finish(rows: StoredRows, _folder: Path) -> None:
                build(rows).save(target, overwrite=overwrite)

            job.write(source, target, finish=finish)
            return target


def _check_folder(target: Path, *, overwrite: bool) -> None:
    """Refuse a folder where an index can not, or must not, be written.

    Raises: FileExistsError, FileNotFoundError.
    """
    check_parent(target)
    check_free(target, overwrite=overwrite)
    if target.exists() and not (target / RECORD_FILE).is_file():
        raise FileExistsError(f"{target} exists and is no reference index; choose another name.")


def _check_enough(*, num_cells: int, num_types: int) -> None:
    if num_types < 2 or num_cells < 3:
        raise ValueError(
            f"The reference has {num_cells:,} cells of {num_types} type(s); naming types takes at least 3 cells of 2."
        )


def _usearch() -> Any:
    """The class of USearch's indices."""
    try:
        from usearch.index import Index
    except ImportError as error:
        raise ImportError("A reference index needs USearch: pip install usearch.") from error
    return Index


def _new_graph(num_dimensions: int) -> Any:
    return _usearch()(
        ndim=num_dimensions,
        metric="cos",
        dtype="f16",
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
        expansion_search=EXPANSION_SEARCH,
    )


def _describe(embeddings: np.ndarray | StoredRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rows there are, `(cells,)`, and mean and standard deviation of their numbers, each `(P,)` float32."""
    is_kept = np.zeros(len(embeddings), dtype=bool)
    total, squares = np.zeros(embeddings.shape[1]), np.zeros(embeddings.shape[1])
    for where, block in row_blocks(embeddings):
        is_kept[where] = np.isfinite(block).all(axis=1)
        total += block[is_kept[where]].sum(axis=0, dtype=np.float64)
    mean = total / max(1, is_kept.sum())
    for where, block in row_blocks(embeddings):
        squares += ((block[is_kept[where]] - mean) ** 2).sum(axis=0)
    deviation = np.sqrt(squares / max(1, is_kept.sum()))
    scale = np.where(deviation > 1e-6, deviation, 1)  # numbers that are the same in all cells
    return is_kept, mean.astype(np.float32), scale.astype(np.float32)


def _scaled(embeddings: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return ((embeddings - mean) / scale).astype(np.float32)


def _fill(graph: Any, blocks: Iterator[np.ndarray], *, num_cells: int, progress: bool) -> None:
    # On several threads, which cells a graph links depends on timing; exact answers do not use the links.
    with tqdm(total=num_cells, unit=" cells", desc="Indexing", disable=not progress) as bar:
        for block in blocks:
            start = len(graph)
            graph.add(np.arange(start, start + len(block)), block, threads=torch.get_num_threads())
            bar.update(len(block))


def _search(graph: Any, queries: np.ndarray, num_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    found = graph.search(queries, num_neighbors, exact=len(graph) <= MAX_EXACT_CELLS, threads=torch.get_num_threads())
    keys, distances = (np.asarray(part).reshape(len(queries), -1) for part in (found.keys, found.distances))
    return keys.astype(np.int64), np.maximum(distances, 0).astype(np.float32)


def _own_distances(graph: Any, *, seed: int) -> np.ndarray:
    """From cells of the graph to their nearest others, `(cells drawn, neighbours)`, rising."""
    num_cells = len(graph)
    drawn = np.arange(num_cells)
    if num_cells > MAX_THRESHOLD_CELLS:
        drawn = np.sort(np.random.default_rng(seed).choice(num_cells, MAX_THRESHOLD_CELLS, replace=False))
    num_neighbors = min(MAX_NEIGHBORS, num_cells - 1)
    keys, distances = _search(graph, np.stack(graph.get(drawn, dtype="f32")), num_neighbors + 1)
    is_self = keys == drawn[:, None]
    is_self[~is_self.any(axis=1), -1] = True  # crowded out by cells that are the same
    return distances[~is_self].reshape(len(drawn), num_neighbors)
