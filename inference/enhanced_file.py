"""The AnnData that `enhance` makes, in memory or written block by block: predicted values and counts, dense or CSR."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from scipy.sparse import csr_matrix

from scfoundation_hf.tokenization.read_depth import COUNTS_PER_CELL

from .writer import (
    StoredRows,
    create_array,
    create_dense,
    put_in_place,
    row_blocks,
    unfinished_output,
    without_format_warnings,
)

COUNTS_LAYER = "counts_at_target_depth"
ENTRIES_PER_CHUNK = 2**18  # of a CSR matrix in a file


def counts_at_target_depth(log1p_cp10k: np.ndarray, target_depths: np.ndarray) -> np.ndarray:
    """Counts that a cell of T counts would have, float32 of the shape of `log1p_cp10k`; predictions below 0 are none.

    Args:
        log1p_cp10k: `(cells, genes)` predictions, or the stored ones of some cells end to end.
        target_depths: T as total counts, shaped to go with them.
    """
    counts_per_10k = np.expm1(np.maximum(log1p_cp10k.astype(np.float32), 0))
    return counts_per_10k * (target_depths / COUNTS_PER_CELL).astype(np.float32)


def with_exact_zeros(log1p_cp10k: np.ndarray, min_value: float) -> csr_matrix:
    """Predictions of at least `min_value`, and NaN, as a `(cells, genes)` CSR matrix."""
    is_stored = ~(log1p_cp10k < min_value)
    return csr_matrix((log1p_cp10k[is_stored], *_csr_index(is_stored)), shape=log1p_cp10k.shape)


def _csr_index(is_stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    indptr = np.concatenate([[0], np.cumsum(is_stored.sum(axis=1))])
    return np.nonzero(is_stored)[1].astype(np.int32), indptr


def enhanced_anndata(
    values: np.ndarray | csr_matrix,
    target_depths: np.ndarray,
    *,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    record: Mapping[str, str],
) -> AnnData:
    """The AnnData in memory; `values` `(cells, genes)` become its X, `record` goes below `uns["scfoundation"]`."""
    counts: np.ndarray | csr_matrix
    if isinstance(values, csr_matrix):
        depths = np.repeat(target_depths, np.diff(values.indptr))
        counts = csr_matrix((counts_at_target_depth(values.data, depths), values.indices, values.indptr), values.shape)
    else:
        counts = counts_at_target_depth(values, target_depths[:, None])
    return AnnData(values, obs=obs, var=var, layers={COUNTS_LAYER: counts}, uns={"scfoundation": dict(record)})


def write_enhanced(
    rows: StoredRows,
    target_depths: np.ndarray,
    output: Path,
    *,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    record: Mapping[str, str],
    min_value: float | None,
    folder: Path,
    overwrite: bool,
) -> None:
    """Write what `enhanced_anndata` makes of all rows, a block of them at a time, and give it its name at the end.

    Args:
        min_value: predictions below it become exact zeros, and both matrices are CSR.
        folder: the progress folder, on the file system of `output`, so that the last step is a rename.
    """
    unfinished = unfinished_output(output, folder=folder)
    frame = AnnData(obs=obs, var=var, uns={"scfoundation": dict(record)})
    with without_format_warnings():
        if output.suffix == ".zarr":
            _write_all(zarr.open_group(unfinished, mode="w"), frame, rows, target_depths, min_value)
            zarr.consolidate_metadata(unfinished)
        else:
            with h5py.File(unfinished, "w") as file:
                _write_all(file, frame, rows, target_depths, min_value)
    put_in_place(unfinished, output, folder=folder, overwrite=overwrite)


def _write_all(root: Any, frame: AnnData, rows: StoredRows, target_depths: np.ndarray, min_value: float | None) -> None:
    anndata.io.write_elem(root, "/", frame)
    if "X" in root:  # anndata notes that there is none
        del root["X"]
    if min_value is not None:
        _write_csr(root, rows, target_depths, min_value)
        return
    values = create_dense(root, "X", shape=rows.shape, dtype=rows.dtype)
    counts = create_dense(root["layers"], COUNTS_LAYER, shape=rows.shape, dtype=np.float32)
    for where, block in row_blocks(rows):
        values[where] = block
        counts[where] = counts_at_target_depth(block, target_depths[where, None])


def _write_csr(root: Any, rows: StoredRows, target_depths: np.ndarray, min_value: float) -> None:
    num_stored = np.zeros(len(rows), dtype=np.int64)
    for where, block in row_blocks(rows):
        num_stored[where] = (~(block < min_value)).sum(axis=1)
    indptr = np.concatenate([[0], np.cumsum(num_stored)])
    dtypes = {"X": rows.dtype, COUNTS_LAYER: np.dtype(np.float32)}
    values, counts = (
        _create_csr(group, name, shape=rows.shape, indptr=indptr, dtype=dtypes[name])
        for group, name in ((root, "X"), (root["layers"], COUNTS_LAYER))
    )
    for where, block in row_blocks(rows):
        stored = with_exact_zeros(block, min_value)
        entries = slice(int(indptr[where.start]), int(indptr[where.stop]))
        depths = np.repeat(target_depths[where], np.diff(stored.indptr))
        for matrix, data in ((values, stored.data), (counts, counts_at_target_depth(stored.data, depths))):
            matrix["indices"][entries] = stored.indices
            matrix["data"][entries] = data


def _create_csr(group: Any, name: str, *, shape: tuple[int, ...], indptr: np.ndarray, dtype: np.dtype[Any]) -> Any:
    """An empty CSR matrix as anndata lays it out, its borders of rows filled in."""
    matrix = group.create_group(name)
    num_entries = int(indptr[-1])
    chunks = (max(1, min(num_entries, ENTRIES_PER_CHUNK)),)
    create_array(matrix, "data", shape=(num_entries,), dtype=dtype, chunks=chunks)
    create_array(matrix, "indices", shape=(num_entries,), dtype=np.dtype(np.int32), chunks=chunks)
    anndata.io.write_elem(matrix, "indptr", indptr)
    matrix.attrs["encoding-type"] = "csr_matrix"
    matrix.attrs["encoding-version"] = "0.1.0"
    matrix.attrs["shape"] = list(shape)
    return matrix
