"""Predicted expression at a chosen read depth: `scfoundation_hf.enhance` and `scfoundation enhance`."""

import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pandas as pd
import torch
import zarr
from anndata import AnnData
from anndata.io import read_elem
from scipy.sparse import vstack

from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.data_collator import EncodedCells
from scfoundation_hf.tokenization.gene_vocabulary import AlignmentReport, GeneVocabulary
from scfoundation_hf.tokenization.prepared_cells import OnEmptyCell, PreparedCells, Values

from .cell_job import CellJob, check_at_least_one, check_data, packed_on
from .enhanced_file import enhanced_anndata, with_exact_zeros, write_enhanced
from .loading import ModelSource, ValuesDtype, evaluating, load_with_decoder
from .many_processes import ALONE, Processes
from .writer import FORMATS, StoredRows, check_place

KEY = "enhanced"
CELLS_PER_BATCH = {
    "cpu": 8,
    "cuda": 32,
    "mps": 8,
}  # a cell takes the decoder's 19,266 positions, however few it expresses
LARGEST_TARGET_DEPTH = 1e9
LARGEST_USUAL_TARGET_DEPTH = 1e7
_NAMES_SHOWN = 5


def enhance(
    data: AnnData | str | PathLike[str],
    model: ModelSource,
    *,
    output: str | PathLike[str] | None = None,
    genes: Sequence[str] | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    values: Values = "counts",
    total_counts: np.ndarray | str | None = None,
    target_depth: float | None = None,
    depth_fold: float | None = None,
    min_genes: int | None = None,
    on_empty_cell: OnEmptyCell = "error",
    values_dtype: ValuesDtype = "float32",
    min_value: float | None = None,
    cells_per_batch: int | None = None,
    tokens_per_batch: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> AnnData | Path:
    """Predict what a deeper sequencing run would have read: a new AnnData over the model's genes.

    `X` `(cells, genes)` is the predicted log1p(counts per 10,000), as the model gives it, which may be slightly below
    0; `layers["counts_at_target_depth"]`, float32, the same as counts of a cell of T counts,
    `max(0, expm1(X)) / 10_000 * T`. `obs` is the input's, with `enhanced_counts_kept`, the share of each cell's counts
    that the vocabulary holds, and `enhanced_target_depth`, T as a total count. `var` holds `ensembl_id` ("" where there
    is none) and `in_input`, whether the input has the gene; `uns["scfoundation"]["enhanced"]` settings, model and
    alignment report as one JSON string.

    Args:
        data: an AnnData, or a path, read in chunks whatever its size.
        model: folder, Hub id or loaded `ScFoundationForPreTraining`.
        output: for a path only, and then required: the .h5ad or .zarr to write, in bounded memory. A run that was
            killed resumes when the same call is made again; until the end it takes 4 (float16: 2) bytes a value beside
            the output. Several processes share the work (docs/many-devices.md).
        genes: symbols or Ensembl ids to predict, in this order; `None`: all 19,264.
        layer, gene_column, values, total_counts, min_genes: as in `embed`.
        target_depth: T as a total count, not below any cell's own.
        depth_fold: T as a multiple of the cell's own total. Neither: T = S, which only fills in.
        on_empty_cell: a cell without counts is an "error", or gets a "nan" row.
        values_dtype: what `X` is stored as; float16 for dense matrices only.
        min_value: predictions below this become exact zeros, in `X` and the counts, and both are CSR matrices.
        cells_per_batch, tokens_per_batch: bound what is computed at once. `None`: by device.
        device: `None`: a GPU if there is one.
        dtype: to compute in; `None`: float32.
        overwrite: replace an existing output.
        progress: show a progress bar with cells/s.
    Returns: the new AnnData, or the written path.
    Raises: ValueError: for input that cannot be right, saying which cell, gene or column and what to do; also for a T
        below a cell's own depth or above 1e9 counts, and genes that the vocabulary does not hold; OSError: for files
        that are missing, broken or in the way.
    Source: paper, "Read-depth enhancement"; `model/get_embedding.py` of the original, output_type "gene_expression".
    """
    source, target = check_data(data, output, verb="enhance")
    processes = ALONE if source is None else Processes.from_environment()
    with processes.speaking_once():
        if source is not None and target is not None:
            _check_output(source, target, overwrite=overwrite)
        check_at_least_one(cells_per_batch=cells_per_batch, tokens_per_batch=tokens_per_batch)
        if values_dtype not in get_args(ValuesDtype):
            raise ValueError(f"values_dtype must be 'float32' or 'float16', got {values_dtype!r}.")
        if min_value is not None and not (np.isfinite(min_value) and min_value >= 0):
            raise ValueError(f"min_value must be a number of at least 0, got {min_value!r}.")
        if min_value is not None and values_dtype == "float16":
            raise ValueError("min_value= makes sparse matrices, which know no float16: leave values_dtype out.")
        loaded = load_with_decoder(model, device=device, dtype=dtype, processes=processes)
        vocabulary = loaded.tokenizer.vocabulary
        gene_ids = None if genes is None else find_genes(vocabulary, genes)
        symbols = None if gene_ids is None else [vocabulary.symbols[gene] for gene in gene_ids]
        prepared = loaded.tokenizer.prepare(
            data,
            layer=layer,
            gene_column=gene_column,
            values=values,
            total_counts=total_counts,
            target_depth=target_depth,
            depth_fold=depth_fold,
            min_genes=min_genes,
            on_empty_cell=on_empty_cell,
        )
        with prepared, evaluating(loaded.model):
            _check_target_depths(prepared)
            num_genes = loaded.model.config.num_genes if gene_ids is None else len(gene_ids)
            job = CellJob(
                loaded,
                prepared,
                compute=lambda cells: _predict_batch(loaded.model, cells, gene_ids),
                row_shape=(num_genes,),
                dtype=np.dtype(values_dtype),
                settings={"genes": symbols, "values_dtype": values_dtype},
                tokens_per_batch=tokens_per_batch,
                cells_per_batch=cells_per_batch or default_cells_per_batch(loaded.model.device),
                verb="Enhancing",
                past="enhanced",
                show_progress=progress,
                processes=processes,
            )
            return _run(job, data, gene_ids, source=source, target=target, min_value=min_value, overwrite=overwrite)


def _run(
    job: CellJob,
    data: Any,
    gene_ids: np.ndarray | None,
    *,
    source: Path | None,
    target: Path | None,
    min_value: float | None,
    overwrite: bool,
) -> AnnData | Path:
    prepared, vocabulary = job.prepared, job.loaded.tokenizer.vocabulary
    obs = _read_obs(data, prepared)
    target_depths = 10**prepared.log10_target_depth
    obs[f"{KEY}_counts_kept"], obs[f"{KEY}_target_depth"] = prepared.counts_kept_per_cell, target_depths
    var = _describe_genes(vocabulary, prepared.report, gene_ids)
    record = {KEY: job.record({"min_value": min_value})}
    job.announce()
    if source is None or target is None:
        if min_value is None:
            return enhanced_anndata(job.gather(), target_depths, obs=obs, var=var, record=record)
        stored = vstack([with_exact_zeros(rows, min_value) for rows in job.batches()], format="csr")
        return enhanced_anndata(stored, target_depths, obs=obs, var=var, record=record)

    def finish(rows: StoredRows, folder: Path) -> None:
        write_enhanced(
            rows,
            target_depths,
            target,
            obs=obs,
            var=var,
            record=record,
            min_value=min_value,
            folder=folder,
            overwrite=overwrite,
        )

    job.write(source, target, finish=finish)
    return target


def _read_obs(data: Any, prepared: PreparedCells) -> pd.DataFrame:
    """The cells' annotation; of formats other than AnnData's only their names."""
    if isinstance(data, AnnData):
        return data.obs.copy()
    path = Path(data)
    if path.suffix == ".zarr":
        return read_elem(zarr.open_group(path, mode="r")["obs"])
    if path.suffix == ".h5ad":
        with h5py.File(path, "r") as file:
            return read_elem(file["obs"])
    return pd.DataFrame(index=pd.Index(prepared.cell_names.astype(str)))


def _describe_genes(vocabulary: GeneVocabulary, report: AlignmentReport, gene_ids: np.ndarray | None) -> pd.DataFrame:
    missing = set(report.missing)
    genes = vocabulary.genes if gene_ids is None else [vocabulary.genes[gene] for gene in gene_ids]
    return pd.DataFrame(
        {
            "ensembl_id": [gene.ensembl_id or "" for gene in genes],
            "in_input": [gene.symbol not in missing for gene in genes],
        },
        index=pd.Index([gene.symbol for gene in genes], name="symbol"),
    )


def find_genes(vocabulary: GeneVocabulary, names: Sequence[str]) -> np.ndarray:
    """Ids of genes called by symbol, other name or Ensembl id, `(genes,)` int64, in this order.

    Raises: ValueError: naming those that are none of the vocabulary's, or are the same gene.
    """
    if isinstance(names, str):
        raise ValueError(f"genes is the text {names!r}; pass a list of genes, such as [{names!r}].")
    names = list(names)
    ids = vocabulary.map_genes(names).column_to_gene.astype(np.int64)
    if (ids < 0).any():
        unknown = [repr(name) for name, gene in zip(names, ids, strict=True) if gene < 0]
        more = f" and {len(unknown) - _NAMES_SHOWN:,} more" if len(unknown) > _NAMES_SHOWN else ""
        raise ValueError(
            f"The model's vocabulary of {len(vocabulary):,} human genes does not hold "
            f"{', '.join(unknown[:_NAMES_SHOWN])}{more}. It predicts no other genes; leave them out of genes=."
        )
    unique, first = np.unique(ids, return_index=True)
    if len(unique) < len(ids):
        again = int(np.setdiff1d(np.arange(len(ids)), first)[0])
        gene = vocabulary.symbols[ids[again]]
        raise ValueError(
            f"genes holds {gene!r} twice (as {names[int(np.argmax(ids == ids[again]))]!r} and {names[again]!r})."
        )
    return ids


def default_cells_per_batch(device: torch.device) -> int:
    """The most cells that the decoder takes at once."""
    return CELLS_PER_BATCH.get(device.type, CELLS_PER_BATCH["cuda"])


def _check_output(source: Path, target: Path, *, overwrite: bool) -> None:
    if target.suffix not in FORMATS:
        raise ValueError(f"The output {target} must end in {' or '.join(FORMATS)}.")
    if source.exists():  # the reader has the better words for an input that does not
        check_place(source, target, overwrite=overwrite)


def _check_target_depths(prepared: PreparedCells) -> None:
    """Hold T within what means anything: at least the cell's own depth, at most 1e9 counts."""
    names, kept = prepared.cell_names, np.flatnonzero(prepared.is_kept)
    source, target = prepared.total_counts[kept], 10 ** prepared.log10_target_depth[kept]
    is_below = target < source * (1 - 1e-9)
    if is_below.any():
        cell = int(np.argmax(np.where(is_below, source / target, 0)))
        raise ValueError(
            f"The target depth is below the own depth of {is_below.sum():,} of {len(kept):,} cells (cell "
            f"{names[kept[cell]]!r} has {source[cell]:,.10g} counts, T would be {target[cell]:,.10g}): enhance "
            f"predicts deeper cells. Pass target_depth of at least {np.ceil(source.max()):,.0f}, the deepest cell's, "
            "or depth_fold of at least 1."
        )
    largest = int(np.argmax(target))
    if target[largest] > LARGEST_TARGET_DEPTH * (1 + 1e-9):
        raise ValueError(
            f"The target depth of cell {names[kept[largest]]!r} would be {target[largest]:,.3g} counts "
            f"({(target > LARGEST_TARGET_DEPTH).sum():,} cells are above {LARGEST_TARGET_DEPTH:.0e}), which no cell "
            "has. Pass a smaller target_depth or depth_fold."
        )
    if target[largest] > LARGEST_USUAL_TARGET_DEPTH * (1 + 1e-9):
        warnings.warn(
            f"The target depth of {(target > LARGEST_USUAL_TARGET_DEPTH).sum():,} cells is above "
            f"{LARGEST_USUAL_TARGET_DEPTH:.0e} counts (cell {names[kept[largest]]!r}: {target[largest]:,.3g}), deeper "
            "than any cell that a model was trained on.",
            UserWarning,
            stacklevel=4,
        )


@torch.inference_mode()
def _predict_batch(model: ScFoundationForPreTraining, cells: EncodedCells, gene_ids: np.ndarray | None) -> np.ndarray:
    """Predicted log1p(CP10k), float32 `(cells, genes)`."""
    batch = packed_on(model.device, cells)
    if gene_ids is not None:
        batch["target_ids"] = torch.from_numpy(gene_ids).to(model.device).expand(len(cells), -1)
    return model(**batch).predicted_values.float().cpu().numpy()
