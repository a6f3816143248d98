"""Cell types for an AnnData or a file of any size: `scfoundation_hf.annotate` and `scfoundation annotate`.

Types come from a fine-tuned classifier, or from the nearest cells of a labelled reference. Either gives each cell a row
(`Annotator.compute`); what is said of all cells is made of the rows at the end, block by block.
"""
# C cell types, K genes kept of each cell's explanation

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForCellClassification
from scfoundation_hf.modeling_scfoundation.pooling import PoolingMode
from scfoundation_hf.tokenization.data_collator import EncodedCells
from scfoundation_hf.tokenization.prepared_cells import OnEmptyCell, Values

from .calibration import CALIBRATION_FILE, Calibration
from .cell_job import TOKENS_PER_BATCH, CellJob, check_at_least_one, check_data, packed_on
from .embedding import embed_batch
from .gene_attribution import AttributionMethod, attribute_genes, check_method, strongest_genes
from .loading import LoadedModel, ModelSource, cell_types_of, evaluating, load_classifier, load_encoder
from .many_processes import ALONE, Processes
from .reference_index import NUM_NEIGHBORS, ReferenceIndex
from .writer import CellResults, NamedColumns, StoredRows, check_output, row_blocks

UNASSIGNED = "unassigned"
GENES_KEPT = 50  # of each cell, to find the top genes of its type
GENES_NAMED_PER_CELL = 10
GENES_NAMED_PER_TYPE = 20
BACKWARD_SHARE = 4  # a batch of this share of the usual size is explained at once: its activations are kept


@dataclass(frozen=True)
class Annotator:
    """What names cell types, and what its rows hold.

    Args:
        cell_types: the C types.
        compute: tokens of some cells -> rows, float32 `(cells, row_size)`: C probabilities; with a reference then the
            distance to it; with an explanation then K gene ids and K attributions.
        row_size: numbers a cell.
        settings: what else the rows depend on, JSON-able.
        lowest_confidence: confidence below which a cell is unassigned; `None`: by no confidence.
        largest_distance: distance above which it is; `None`: by no distance.
    """

    loaded: LoadedModel[Any]
    cell_types: list[str]
    compute: Callable[[EncodedCells], np.ndarray]
    row_size: int
    settings: dict[str, Any]
    lowest_confidence: float | None = None
    largest_distance: float | None = None
    has_distance: bool = False
    explains: bool = False


def annotate(
    data: AnnData | str | PathLike[str],
    model: ModelSource,
    *,
    output: str | PathLike[str] | None = None,
    reference: ReferenceIndex | str | PathLike[str] | None = None,
    key_added: str = "scfoundation",
    num_neighbors: int = NUM_NEIGHBORS,
    unassigned: bool = True,
    explain: AttributionMethod | None = None,
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
) -> AnnData | Path:
    """Name the type of every cell, with probabilities and the verdict "unassigned" for what the model does not know.

    Adds, for `key_added` "scfoundation":

    - `obs["scfoundation_cell_type"]`, categorical: the type, or "unassigned"; missing for cells left out;
    - `obs["scfoundation_best_cell_type"]`, categorical: the most probable type, whatever the verdict;
    - `obs["scfoundation_confidence"]`, float32: its probability, with a reference the share of the neighbours' votes;
    - `obs["scfoundation_distance"]`, float32, only with a reference: mean cosine distance to the neighbours;
    - `obsm["scfoundation_probabilities"]`, a float32 data frame, one column a type in the model's order ("/" in a
      type's name is "_" there, since it would nest the column in a file);
    - `obs["scfoundation_counts_kept"]` and `uns["scfoundation"]["scfoundation"]` as `embed` does;
    - with `explain`: `obs["scfoundation_top_genes"]`, the ten genes that spoke most for the type, and
      `uns["scfoundation"]["scfoundation_top_genes"]`, JSON: for each type the twenty with the largest mean attribution.

    What an earlier call with the same `key_added` left is replaced or removed.

    A fine-tuned model's folder holds its calibration: temperature and the confidence below which a cell is
    "unassigned". Without one, probabilities are the plain softmax and no cell is unassigned, which a warning says. With
    a reference a cell is "unassigned" if it is farther from it than 95 % of the reference's own cells are.

    Args:
        data: an AnnData, written in place, or a .h5ad or .zarr path, read in chunks whatever its size. Genes that the
            training data lacked are used all the same, those that `data` lacks count as not expressed.
        model: folder, Hub id or loaded model: with a classification head, or, with `reference`, the one that embedded
            the reference.
        output: for a path only, and then required: the file to write, a copy of the input with the results added. A
            run that was killed resumes when the same call is made again. Several processes share the work
            (docs/many-devices.md).
        reference: labelled cells to compare with, instead of a classification head: a `ReferenceIndex` or its folder.
        key_added: what the names of all results begin with.
        num_neighbors: of the reference, for each cell.
        unassigned: whether to give the verdict; else every cell gets its most probable type.
        explain: "gradient_x_input" (about three times the time) or "integrated_gradients" (about a hundred times;
            needs captum): which genes drove each call. Not with `reference`.
        layer, gene_column, values, total_counts, min_genes, on_empty_cell, tokens_per_batch, device, dtype, overwrite,
            progress: as in `embed`.
    Returns: the same AnnData, or the written path.
    Raises: ValueError: for input that cannot be right, saying which cell, gene or column and what to do, a model
        without classification head or names of types, or a reference of another model; OSError: for files that are
        missing, broken or in the way; ImportError: for a package that a choice needs.
    Source: gradient x input and integrated gradients as in `gene_attribution.py`; calibration as in `calibration.py`.
    """
    source, target = check_data(data, output, verb="annotate")
    processes = ALONE if source is None else Processes.from_environment()
    with processes.speaking_once():
        if source is not None and target is not None and source.exists():  # the reader words a missing one better
            check_output(source, target, overwrite=overwrite)
        check_at_least_one(tokens_per_batch=tokens_per_batch)
        if explain is not None:
            if reference is not None:
                raise ValueError("explain= asks a classification head; with reference= there is none. Leave one out.")
            check_method(explain)
        if reference is None:
            classifier = load_classifier(model, device=device, dtype=dtype, processes=processes)
            annotator = _by_classifier(classifier, model, unassigned=unassigned, explain=explain)
        else:
            encoder = load_encoder(model, device=device, dtype=dtype, processes=processes)
            annotator = _by_neighbors(encoder, reference, num_neighbors=num_neighbors, unassigned=unassigned)
        column_names(annotator.cell_types)
        loaded = annotator.loaded
        if explain is not None and tokens_per_batch is None:
            by_device = TOKENS_PER_BATCH.get(loaded.model.device.type, TOKENS_PER_BATCH["cuda"])
            tokens_per_batch = by_device // BACKWARD_SHARE
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
            job = CellJob(
                loaded,
                prepared,
                compute=annotator.compute,
                row_shape=(annotator.row_size,),
                dtype=np.dtype(np.float32),
                settings=annotator.settings,
                tokens_per_batch=tokens_per_batch,
                cells_per_batch=None,
                verb="Annotating",
                past="annotated",
                show_progress=progress,
                processes=processes,
            )
            return job.add_results(
                data,
                lambda rows: _results(rows, annotator, job, key_added=key_added),
                source=source,
                target=target,
                overwrite=overwrite,
            )


def _by_classifier(
    loaded: LoadedModel[ScFoundationForCellClassification],
    source: ModelSource,
    *,
    unassigned: bool,
    explain: AttributionMethod | None,
) -> Annotator:
    network = loaded.model
    calibration = Calibration.load(source)
    if calibration is None and unassigned:
        warnings.warn(
            f"{loaded.name} has no {CALIBRATION_FILE}, which fine-tuning leaves there: probabilities are not "
            "calibrated, and no cell is called unassigned (unassigned=False says that this is meant).",
            UserWarning,
            stacklevel=3,
        )
    applied = calibration or Calibration(temperature=1.0, unassigned_below=0.0)

    def compute(cells: EncodedCells) -> np.ndarray:
        if explain is None:
            return applied.probabilities(_classify(network, cells)).cpu().numpy()
        logits, attributions = attribute_genes(network, cells, method=explain)
        explanation = strongest_genes(cells, attributions, num_genes=GENES_KEPT)
        return np.hstack([applied.probabilities(logits).cpu().numpy(), *explanation]).astype(np.float32)

    cell_types = cell_types_of(network)
    return Annotator(
        loaded,
        cell_types,
        compute=compute,
        row_size=len(cell_types) + (0 if explain is None else 2 * GENES_KEPT),
        settings={
            "cell_types": cell_types,
            "calibration": None if calibration is None else asdict(calibration),
            "unassigned": unassigned,
            "explain": explain,
        },
        lowest_confidence=applied.unassigned_below if unassigned else None,
        explains=explain is not None,
    )


@torch.inference_mode()
def _classify(model: ScFoundationForCellClassification, cells: EncodedCells) -> torch.Tensor:
    return model(**packed_on(model.device, cells)).logits


def _by_neighbors(
    loaded: LoadedModel[Any],
    reference: ReferenceIndex | str | PathLike[str],
    *,
    num_neighbors: int,
    unassigned: bool,
) -> Annotator:
    if isinstance(reference, AnnData):
        raise TypeError("reference= takes a ReferenceIndex or its folder: index_reference(adata, model, label=...).")
    index = reference if isinstance(reference, ReferenceIndex) else ReferenceIndex.load(reference)
    index.check_model(loaded)
    index.check_num_neighbors(num_neighbors)
    pooling = _pooling_of(index, hidden_size=loaded.model.config.hidden_size)
    largest_distance = index.unassigned_above(num_neighbors)

    def compute(cells: EncodedCells) -> np.ndarray:
        votes, distances = index.call(embed_batch(loaded.model, cells, pooling), num_neighbors=num_neighbors)
        return np.hstack([votes, distances[:, None]])

    return Annotator(
        loaded,
        index.cell_types,
        compute=compute,
        row_size=len(index.cell_types) + 1,
        settings={
            "cell_types": index.cell_types,
            "num_neighbors": num_neighbors,
            "unassigned_above": largest_distance,
            "unassigned": unassigned,
            "reference": {"label": index.record.get("label"), "num_cells": len(index), "sha256": index.sha256()},
        },
        largest_distance=largest_distance if unassigned else None,
        has_distance=True,
    )


def _pooling_of(index: ReferenceIndex, *, hidden_size: int) -> PoolingMode:
    poolings: dict[int, PoolingMode] = {4 * hidden_size: "all", hidden_size: "max"}
    if len(index.mean) not in poolings:
        raise ValueError(
            f"The reference holds {len(index.mean)} numbers a cell, but this model's embeddings have {4 * hidden_size} "
            f"(pooling 'all') or {hidden_size} ('max'): index the reference with this model."
        )
    return poolings[len(index.mean)]


def column_names(cell_types: Sequence[str]) -> list[str]:
    """Names of the probabilities' columns: those of the types, "_" for "/", which would nest them in a file.

    Raises: ValueError: if two types get the same.
    """
    names = [name.replace("/", "_") for name in cell_types]
    again = [name for number, name in enumerate(names) if name in names[:number]]
    if again:
        raise ValueError(f"Two cell types would share the column {again[0]!r} ('/' is written '_'): rename one.")
    return names


def _results(rows: np.ndarray | StoredRows, annotator: Annotator, job: CellJob, *, key_added: str) -> CellResults:
    num_types, num_cells = len(annotator.cell_types), len(rows)
    best = np.full(num_cells, -1)
    confidence = np.full(num_cells, np.nan, dtype=np.float32)
    distance = confidence.copy()
    explanations = _Explanations(num_types, job.loaded.tokenizer.vocabulary.symbols) if annotator.explains else None
    for where, block in row_blocks(rows):
        is_kept = job.prepared.is_kept[where]
        probabilities = block[:, :num_types]
        best[where] = np.where(is_kept, probabilities.argmax(axis=1), -1)
        confidence[where] = probabilities.max(axis=1)
        if annotator.has_distance:
            distance[where] = block[:, num_types]
        if explanations is not None:
            explanations.add(best[where], *np.hsplit(block[:, num_types:], 2))

    is_unassigned = np.zeros(num_cells, dtype=bool)
    if annotator.lowest_confidence is not None:
        is_unassigned = confidence < annotator.lowest_confidence
    if annotator.largest_distance is not None:
        is_unassigned = distance > annotator.largest_distance
    names = list(dict.fromkeys([*annotator.cell_types, UNASSIGNED]))
    verdicts = np.where(is_unassigned, names.index(UNASSIGNED), best)
    obs: dict[str, np.ndarray | pd.Categorical] = {
        "cell_type": _categorical(verdicts, names),
        "best_cell_type": _categorical(best, annotator.cell_types),
        "confidence": confidence,
    }
    uns = {key_added: job.record()}
    if annotator.has_distance:
        obs["distance"] = distance
    if explanations is not None:
        obs["top_genes"] = np.array(explanations.genes_of_cells, dtype=object)
        uns[f"{key_added}_top_genes"] = json.dumps(explanations.genes_of_types(annotator.cell_types))
    obs["counts_kept"] = job.prepared.counts_kept_per_cell
    named_rows = NamedColumns(rows, column_names(annotator.cell_types), index=job.prepared.cell_names)
    return CellResults(
        obsm={f"{key_added}_probabilities": named_rows},
        obs={f"{key_added}_{name}": column for name, column in obs.items()},
        uns=uns,
        replaced=[f"{key_added}_{name}" for name in ("distance", "top_genes")],
    )


def _categorical(codes: Any, names: Any) -> pd.Categorical:
    """`(cells,)` places in `names`, -1 for none."""
    return pd.Categorical.from_codes(codes, categories=names)


class _Explanations:
    """The genes that drove single calls, gathered for all cells and for the types.

    Attributes:
        genes_of_cells: for each cell so far its genes, strongest first, joined by ", ".
    """

    def __init__(self, num_types: int, symbols: Sequence[str]) -> None:
        self.genes_of_cells: list[str] = []
        self._symbols = np.array([*symbols, ""], dtype=object)  # the last: no gene, id -1
        self._totals = np.zeros((num_types, len(symbols)))
        self._num_cells = np.zeros(num_types, dtype=np.int64)

    def add(self, types: np.ndarray, genes: np.ndarray, attributions: np.ndarray) -> None:
        """The next cells: their types `(cells,)`, -1 for those left out; genes and attributions `(cells, K)`."""
        is_called = types >= 0
        ids = np.where(is_called[:, None], genes, -1).astype(np.int64)
        named = self._symbols[ids[:, :GENES_NAMED_PER_CELL]]
        self.genes_of_cells += [", ".join(filter(None, symbols)) for symbols in named]
        cells, slots = np.nonzero(ids >= 0)
        np.add.at(self._totals, (types[cells], ids[cells, slots]), attributions[cells, slots])
        self._num_cells += np.bincount(types[is_called], minlength=len(self._num_cells))

    def genes_of_types(self, cell_types: Sequence[str]) -> dict[str, dict[str, float]]:
        """For each type that was called, the genes with the largest mean attribution over its cells."""
        tables = {}
        for name, totals, num_cells in zip(cell_types, self._totals, self._num_cells, strict=True):
            order = np.argsort(-totals, kind="stable")[:GENES_NAMED_PER_TYPE]
            if num_cells:
                tables[name] = {self._symbols[gene]: totals[gene] / num_cells for gene in order if totals[gene] > 0}
        return tables
