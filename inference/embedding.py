"""Cell embeddings for an AnnData or a file of any size: `scfoundation_hf.embed` and `scfoundation embed`."""

from os import PathLike
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from anndata import AnnData

from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationModel
from scfoundation_hf.modeling_scfoundation.pooling import PoolingMode, max_of_pooled
from scfoundation_hf.tokenization.data_collator import EncodedCells
from scfoundation_hf.tokenization.prepared_cells import OnEmptyCell, OriginalMode, PreparedCells, Values

from .cell_job import CellJob, check_at_least_one, check_data, packed_on
from .loading import LoadedModel, ModelSource, evaluating, load_encoder
from .many_processes import ALONE, Processes
from .writer import check_output


def embed(
    data: AnnData | str | PathLike[str],
    model: ModelSource,
    *,
    output: str | PathLike[str] | None = None,
    pooling: PoolingMode = "all",
    key_added: str = "X_scfoundation",
    layer: str | None = None,
    gene_column: str | None = None,
    values: Values = "counts",
    total_counts: np.ndarray | str | None = None,
    target_depth: float | None = None,
    depth_fold: float | None = None,
    min_genes: int | None = None,
    on_empty_cell: OnEmptyCell = "error",
    original_mode: OriginalMode | None = None,
    tokens_per_batch: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> AnnData | Path:
    """Embed every cell and write the result where scanpy looks for it.

    Adds `obsm[key_added]`, float32 `(cells, 4 * hidden_size)` (3,072 for the 100M model): [S, T, max over genes, mean
    over genes]; `obs[key_added + "_counts_kept"]`, the share of each cell's counts that the vocabulary holds; and
    `uns["scfoundation"][key_added]`, settings, model and alignment report as one JSON string.

    Args:
        data: an AnnData, written in place (one opened with `backed="r"` is read in chunks), or a .h5ad or .zarr path,
            read in chunks whatever its size.
        model: folder, Hub id or loaded scFoundation model.
        output: for a path only, and then required: the file to write, a copy of the input with the results added. A
            run that was killed resumes when the same call is made again. Several processes share the work
            (docs/many-devices.md).
        pooling: "all" as above; "max": max over all tokens, `(cells, hidden_size)`.
        key_added: name of the result.
        layer: layer that holds the values; `None`: `X`; "raw": `.raw`.
        gene_column: column of `var` with gene symbols or Ensembl ids; `None`: `var_names`.
        values: what the values are: raw "counts", "expected_counts" (fractional), "log1p_cp10k" (needs
            `total_counts`), or "recover_counts" from normalised values.
        total_counts: total count of each cell, or the `obs` column with it.
        target_depth: T as a total count, such as 10_000.
        depth_fold: T as a multiple of the cell's own total. Neither: T = S.
        min_genes: cells with fewer expressed vocabulary genes get NaN rows (the paper keeps cells with more than 200).
        on_empty_cell: a cell without counts is an "error", or gets a "nan" row.
        original_mode: reproduce the original script's other input modes.
        tokens_per_batch: genes and depth tokens computed at once; bounds memory. `None`: by device.
        device: `None`: a GPU if there is one.
        dtype: `None`: float32.
        overwrite: replace an existing output.
        progress: show a progress bar with cells/s.
    Returns: the same AnnData, or the written path.
    Raises: ValueError: for input that cannot be right, saying which cell, gene or column and what to do; OSError: for
        files that are missing, broken or in the way.
    Source: paper, Methods, "Cell embeddings"; `model/get_embedding.py` of the original, output_type "cell".
    """
    source, target = check_data(data, output, verb="embed")
    processes = ALONE if source is None else Processes.from_environment()
    with processes.speaking_once():
        if source is not None and target is not None and source.exists():  # the reader words a missing one better
            check_output(source, target, overwrite=overwrite)
        check_at_least_one(tokens_per_batch=tokens_per_batch)
        check_pooling(pooling)
        loaded = load_encoder(model, device=device, dtype=dtype, processes=processes)
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
            original_mode=original_mode,
        )
        with prepared, evaluating(loaded.model):
            job = embedding_job(
                loaded, prepared, pooling, tokens_per_batch=tokens_per_batch, progress=progress, processes=processes
            )
            return job.add_to(data, key_added=key_added, source=source, target=target, overwrite=overwrite)


def check_pooling(pooling: PoolingMode) -> None:
    """Refuse a pooling that there is not.

    Raises: ValueError.
    """
    if pooling not in get_args(PoolingMode):
        raise ValueError(f"There is no pooling {pooling!r}; choose 'all' or 'max'.")


def embedding_job(
    loaded: LoadedModel[ScFoundationModel],
    prepared: PreparedCells,
    pooling: PoolingMode,
    *,
    tokens_per_batch: int | None,
    progress: bool,
    processes: Processes,
) -> CellJob:
    """The job that embeds these cells."""
    return CellJob(
        loaded,
        prepared,
        compute=lambda cells: embed_batch(loaded.model, cells, pooling),
        row_shape=(loaded.model.config.hidden_size * (4 if pooling == "all" else 1),),
        dtype=np.dtype(np.float32),
        settings={"pooling": pooling},
        tokens_per_batch=tokens_per_batch,
        cells_per_batch=None,
        verb="Embedding",
        past="embedded",
        show_progress=progress,
        processes=processes,
    )


@torch.inference_mode()
def embed_batch(model: ScFoundationModel, cells: EncodedCells, pooling: PoolingMode) -> np.ndarray:
    """Pooled embeddings of some cells, float32 `(cells, 4 D)`, or `(cells, D)` for "max"."""
    pooled = model(**packed_on(model.device, cells)).pooler_output
    return (pooled if pooling == "all" else max_of_pooled(pooled)).float().cpu().numpy()
