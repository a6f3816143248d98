"""Cell embeddings for an AnnData or a file of any size: `scfoundation_hf.embed` and `scfoundation embed`."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from tqdm import tqdm

from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationModel
from scfoundation_hf.modeling_scfoundation.pooling import PoolingMode, max_of_pooled
from scfoundation_hf.tokenization.data_collator import EncodedCells, as_tensors, pack_cells
from scfoundation_hf.tokenization.prepared_cells import OnEmptyCell, OriginalMode, PreparedCells, Values

from .loading import LoadedEncoder, ModelSource, load_encoder
from .writer import CellResults, RowProgress, check_output, identify_file, progress_folder, write_results

TOKENS_PER_BATCH = {"cpu": 8_192, "cuda": 65_536, "mps": 16_384}
BATCHES_PER_READ = 64  # read from the file at once


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
            run that was killed resumes when the same call is made again.
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
    if not isinstance(data, AnnData | str | PathLike):
        raise TypeError(
            f"embed takes an AnnData or the path of one, not a {type(data).__name__}; for a matrix, "
            "anndata.AnnData(matrix, var=pandas.DataFrame(index=gene_names))."
        )
    source = None if isinstance(data, AnnData) else Path(data)
    target = _check_target(source, output, overwrite=overwrite)
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch is {tokens_per_batch}; it must be at least 1.")
    if pooling not in ("all", "max"):
        raise ValueError(f"There is no pooling {pooling!r}; choose 'all' or 'max'.")
    loaded = load_encoder(model, device=device, dtype=dtype)
    budget = tokens_per_batch or TOKENS_PER_BATCH.get(loaded.model.device.type, TOKENS_PER_BATCH["cuda"])
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
    with prepared:
        prepared.warn_left_out()
        if progress:
            tqdm.write(prepared.describe(), file=sys.stderr)
        job = _Job(loaded, prepared, pooling, budget, show_progress=progress)
        if isinstance(data, AnnData):
            data.obsm[key_added] = job.gather()
            data.obs[f"{key_added}_counts_kept"] = prepared.counts_kept_per_cell
            data.uns.setdefault("scfoundation", {})[key_added] = job.record()
            return data
        assert source is not None
        assert target is not None
        with progress_folder(target) as folder:
            rows = RowProgress(folder, job.identity(source), width=job.width)
            for batch in job.embeddings(start=rows.num_rows_done):
                rows.append(batch)
            results = CellResults(
                obsm={key_added: rows.rows()},
                obs={f"{key_added}_counts_kept": prepared.counts_kept_per_cell},
                uns={key_added: job.record()},
            )
            write_results(source, target, results, folder=folder, overwrite=overwrite)
        return target


def batch_borders(lengths: np.ndarray, tokens_per_batch: int) -> np.ndarray:
    """Where consecutive cells are cut into batches of at most `tokens_per_batch` tokens, or of one longer cell.

    Packed batches waste nothing on cells of unequal length, so the order of the file is kept.

    Args:
        lengths: `(cells,)` tokens of each cell; 0 for cells that are left out.
    Returns: `(batches + 1,)` int64, from 0 to the number of cells.
    """
    ends = np.cumsum(lengths)
    borders = [0]
    while borders[-1] < len(lengths):
        done = ends[borders[-1] - 1] if borders[-1] else 0
        borders.append(max(borders[-1] + 1, int(np.searchsorted(ends, done + tokens_per_batch, side="right"))))
    return np.array(borders)


def _check_target(source: Path | None, output: str | PathLike[str] | None, *, overwrite: bool) -> Path | None:
    if source is None:
        if output is not None:
            raise ValueError(
                "output= is for files: an AnnData in memory is written in place. Leave output out, then "
                "adata.write_h5ad(...)."
            )
        return None
    if output is None:
        raise ValueError(f"output= is missing: {source} is a file, and the result goes into a copy of it.")
    target = Path(output)
    if source.exists():  # the reader has the better words for an input that does not
        check_output(source, target, overwrite=overwrite)
    return target


@dataclass(frozen=True)
class _Job:
    """The embedding of one input, batch by batch."""

    loaded: LoadedEncoder
    prepared: PreparedCells
    pooling: PoolingMode
    tokens_per_batch: int
    show_progress: bool

    @property
    def width(self) -> int:
        """Numbers a cell."""
        return self.loaded.model.config.hidden_size * (4 if self.pooling == "all" else 1)

    def embeddings(self, *, start: int = 0) -> Iterator[np.ndarray]:
        """Embeddings of consecutive cells, float32 `(cells of a batch, width)`, from cell `start` on.

        Where a batch ends depends on the input and the budget only, so a resumed run forms the same batches.
        """
        prepared = self.prepared
        borders = batch_borders(np.where(prepared.is_kept, prepared.token_lengths, 0), self.tokens_per_batch)
        borders = borders[np.searchsorted(borders, start) :]
        bar = tqdm(
            total=prepared.num_cells, initial=start, unit=" cells", desc="Embedding", disable=not self.show_progress
        )
        with bar, _evaluating(self.loaded.model):
            for first_batch in range(0, len(borders) - 1, BATCHES_PER_READ):
                batches = borders[first_batch : first_batch + BATCHES_PER_READ + 1]
                encoded = prepared.encode(int(batches[0]), int(batches[-1]))
                for first, last in pairwise(batches.tolist()):
                    rows = np.full((last - first, self.width), np.nan, dtype=np.float32)
                    kept = slice(*np.searchsorted(encoded.cell_index, (first, last)))
                    cells = encoded.select(np.arange(len(encoded))[kept])
                    if len(cells):
                        rows[cells.cell_index - first] = _embed_batch(self.loaded.model, cells, self.pooling)
                    bar.update(last - first)
                    yield rows

    def gather(self) -> np.ndarray:
        """All embeddings in memory, float32 `(cells, width)`."""
        rows = np.empty((self.prepared.num_cells, self.width), dtype=np.float32)
        num_done = 0
        for batch in self.embeddings():
            rows[num_done : num_done + len(batch)] = batch
            num_done += len(batch)
        return rows

    def record(self) -> str:
        """Everything that says how the numbers came to be, as JSON (`uns` keeps no `None` and no nested lists)."""
        prepared = self.prepared
        record: dict[str, Any] = {
            "model": {
                "name": self.loaded.name,
                "revision": self.loaded.revision,
                "dtype": str(self.loaded.model.dtype),
            },
            "settings": {**prepared.settings, "pooling": self.pooling},
            "cells": {
                "total": prepared.num_cells,
                "embedded": int(prepared.is_kept.sum()),
                "empty": int(prepared.is_empty.sum()),
                "below_min_genes": int(prepared.is_below_min_genes.sum()),
            },
            "alignment_report": json.loads(prepared.report.to_json()),
            "scfoundation_hf_version": version("scfoundation-hf"),
        }
        return json.dumps(record)

    def identity(self, source: Path) -> dict[str, Any]:
        """What unfinished work is tied to: input, model and all that changes the numbers or the batches."""
        return {
            "input": identify_file(source),
            "model": self.loaded.fingerprint(),
            "settings": {**self.prepared.settings, "pooling": self.pooling, "tokens_per_batch": self.tokens_per_batch},
            "dtype": str(self.loaded.model.dtype),
            "scfoundation_hf": version("scfoundation-hf"),
        }


@torch.inference_mode()
def _embed_batch(model: ScFoundationModel, cells: EncodedCells, pooling: PoolingMode) -> np.ndarray:
    batch = as_tensors(pack_cells(cells), "pt")
    on_device = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
    pooled = model(**on_device).pooler_output
    return (pooled if pooling == "all" else max_of_pooled(pooled)).float().cpu().numpy()


@contextmanager
def _evaluating(model: ScFoundationModel) -> Iterator[None]:
    """Dropout off, pooling on; afterwards the model is as its owner left it."""
    was_training, had_pooling = model.training, model.add_pooling_layer
    model.eval()
    model.add_pooling_layer = True
    try:
        yield
    finally:
        model.train(was_training)
        model.add_pooling_layer = had_pooling
