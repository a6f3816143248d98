"""The one place that opens cells: an AnnData in memory or backed, or a path, .h5ad, .zarr or another format.

First step of the data flow. Hands out ranges of rows of the chosen matrix as CSR, with gene and cell names,
and reads nothing else: obsm, uns and the columns of obs and var that nobody asked for stay on disk.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import zarr
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import read_elem, sparse_dataset
from scipy.sparse import csr_matrix, sparray, spmatrix

from .matrix_reader import CHUNK_ENTRIES, canonical, check_shape
from .other_formats import (
    StoredRows,
    TableSource,
    is_matrix_folder,
    open_10x_h5,
    open_loom,
    open_matrix_folder,
    open_text,
    text_suffix,
)
from .read_depth import row_ranges

RAW = "raw"
_FORMATS = ".h5ad, .zarr, .h5 (10x), .loom, .csv, .tsv, or a folder with matrix.mtx (10x)"
_SAMPLED_ENTRIES = 100_000
_SAMPLED_ROWS = 256


class AnnDataReader:
    """Rows of an AnnData's matrix with the names of its genes and cells, in bounded memory.

    CSR and dense storage on disk are read range by range. CSC on disk holds genes, not cells, together: each
    `read` passes over the whole matrix, in blocks of columns, so that a run costs as many passes as it has
    chunks. It is correct and bounded in memory, but for a large file write it as CSR first. CSC in memory is
    converted once.

    Args:
        data: an AnnData, one opened with `backed="r"` included, or a path: .h5ad or .zarr; also .h5 and folders with
            `matrix.mtx` as Cell Ranger writes them, .loom, and .csv or .tsv (cells x genes, also .gz). Such folders
            and tables are read into memory whole.
        layer: name of a layer; left out, X. "raw" is `adata.raw`, with the genes of `adata.raw.var`, unless a
            layer bears that name.
        gene_column: the column of var with gene symbols or Ensembl ids; left out, var_names.
    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it is none of these formats, is damaged, or has no cells or genes.
        KeyError: unknown `layer` or `gene_column`; the message names those there are.
    """

    def __init__(
        self,
        data: AnnData | str | os.PathLike[str],
        *,
        layer: str | None = None,
        gene_column: str | None = None,
    ) -> None:
        """Open the input and choose the matrix; values are read later."""
        self.path: Path | None = None
        self._source: _Source
        if isinstance(data, AnnData):
            self._source = _ObjectSource(data)
        else:
            self.path = Path(data)
            self._source = _open_file(self.path)
        try:
            self._choose(layer, gene_column)
        except BaseException:
            self.close()
            raise

    def _choose(self, layer: str | None, gene_column: str | None) -> None:
        source = self._source
        layers = source.layer_names()
        if layer is not None and layer not in layers and not (layer == RAW and source.has_raw()):
            there_is = ", ".join(map(repr, layers)) or "none"
            raise KeyError(
                f"{source.name} has no layer {layer!r}. Its layers: {there_is}"
                + ("; layer='raw' is adata.raw." if source.has_raw() else ".")
            )
        is_raw = layer == RAW and layer not in layers
        self._var = "raw/var" if is_raw else "var"
        self._is_chosen = "adata.raw" if is_raw else "X" if layer is None else f"layer {layer!r}"
        self.description = f"{self._is_chosen} of {source.name}"
        matrix = source.raw_matrix() if is_raw else source.matrix(layer)
        if matrix is None:
            choices = [f"layer={name!r}" for name in layers] + ["layer='raw'"] * source.has_raw()
            raise ValueError(f"{source.name} has no X. Pass {' or '.join(choices) or 'a file with counts'}.")

        columns = source.column_names(self._var)
        if gene_column is not None and gene_column not in columns:
            there_is = ", ".join(map(repr, columns)) or "none"
            raise KeyError(
                f"{source.name} has no gene_column {gene_column!r} in {self._var}. Its columns: {there_is}. "
                "Left out, var_names are taken."
            )
        self._gene_column = gene_column
        self.gene_names = source.index(self._var) if gene_column is None else source.column(self._var, gene_column)
        self.cell_names = source.index("obs")
        self.num_cells, self.num_columns = len(self.cell_names), len(self.gene_names)
        check_shape(self.description, self.num_cells, self.num_columns)
        if tuple(matrix.shape) != (self.num_cells, self.num_columns):
            raise ValueError(
                f"{self.description} is {matrix.shape[0]:,} x {matrix.shape[1]:,}, but there are "
                f"{self.num_cells:,} cells in obs and {self.num_columns:,} genes in {self._var}: the file is "
                "damaged."
            )
        if matrix.dtype.kind not in "biuf":
            raise ValueError(f"{self.description} holds {matrix.dtype}, not real numbers.")
        # One conversion, because taking rows of a CSC matrix passes over all of it.
        is_in_memory = isinstance(matrix, spmatrix | sparray)
        self._matrix = csr_matrix(matrix) if is_in_memory else matrix
        self._indptr_of_rows: np.ndarray | None = None

    def read(self, start: int, stop: int) -> csr_matrix:
        """Rows [start, stop) of the chosen matrix, with sorted columns and without duplicates.

        Raises: ValueError: if the file is damaged there.
        """
        if not 0 <= start <= stop <= self.num_cells:
            raise ValueError(f"Rows [{start}, {stop}) of {self.num_cells:,} were asked for.")
        try:
            rows = _read_rows(self._matrix, start, stop)
            # scipy trusts these, and would read and write outside its arrays.
            if rows.nnz and not 0 <= rows.indices.min() <= rows.indices.max() < self.num_columns:
                raise ValueError(f"a column number is not within the {self.num_columns:,} genes")
            return canonical(rows)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"Rows [{start}, {stop}) of {self.description} could not be read ({error}): the file is "
                "damaged. Copy or download it again."
            ) from error

    def chunks(self, *, max_entries: int = CHUNK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Consecutive row ranges of at most `max_entries` entries as stored (all of them, if dense)."""
        if self._indptr_of_rows is None:
            self._indptr_of_rows = _indptr_of_rows(self._matrix)
        return row_ranges(self._indptr_of_rows, max_entries)

    def obs_column(self, name: str) -> np.ndarray:
        """One column of obs, `(cells,)`.

        Raises: KeyError: naming the columns there are.
        """
        columns = self._source.column_names("obs")
        if name not in columns:
            there_is = ", ".join(map(repr, columns)) or "none"
            raise KeyError(f"{self._source.name} has no obs column {name!r}. Its columns: {there_is}.")
        return self._source.column("obs", name)

    def integer_alternatives(self) -> list[str]:
        """Other matrices of this AnnData that seem to hold counts, spelled as the user asks for them."""
        source = self._source
        layers = source.layer_names()
        candidates: dict[str, tuple[str, Callable[[], Any]]]
        candidates = {"X (leave layer out)": ("X", partial(source.matrix, None))}
        candidates |= {f"layer={name!r}": (f"layer {name!r}", partial(source.matrix, name)) for name in layers}
        if source.has_raw() and RAW not in layers:
            candidates["layer='raw' (.raw)"] = ("adata.raw", source.raw_matrix)
        return [
            spelled
            for spelled, (name, get) in candidates.items()
            if name != self._is_chosen and (matrix := get()) is not None and _holds_integers(matrix)
        ]

    def gene_columns(self) -> dict[str, np.ndarray]:
        """The columns of var that hold text, other than the one chosen; each could be the `gene_column`."""
        columns = {
            name: self._source.column(self._var, name)
            for name in self._source.column_names(self._var)
            if name != self._gene_column
        }
        return {name: column for name, column in columns.items() if all(isinstance(entry, str) for entry in column)}

    def close(self) -> None:
        """Close the file, if this reader opened one."""
        self._source.close()

    def __enter__(self) -> "AnnDataReader":
        """The reader; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


# --- Where an AnnData is: an object, or a file of which only what is asked for is read ---


class _Source(Protocol):
    name: str

    def layer_names(self) -> list[str]: ...
    def has_raw(self) -> bool: ...
    def matrix(self, layer: str | None) -> Any: ...
    def raw_matrix(self) -> Any: ...
    def index(self, frame: str) -> np.ndarray: ...
    def column_names(self, frame: str) -> list[str]: ...
    def column(self, frame: str, name: str) -> np.ndarray: ...
    def close(self) -> None: ...


class _ObjectSource:
    def __init__(self, adata: AnnData) -> None:
        self._adata = adata
        self.name = f"the AnnData backed by {adata.filename}" if adata.isbacked else "the AnnData"

    def layer_names(self) -> list[str]:
        return list(self._adata.layers)

    def has_raw(self) -> bool:
        return self._adata.raw is not None

    def matrix(self, layer: str | None) -> Any:
        if layer is not None:
            return self._adata.layers[layer]
        if self._adata.isbacked and self._adata.is_view:
            raise ValueError(
                f"This is a view of {self.name}, whose X can't be read in chunks. Make it an AnnData of its "
                "own with adata.to_memory(), or write it with adata.copy(filename) and pass that."
            )
        return self._adata.X

    def raw_matrix(self) -> Any:
        if self._adata.isbacked and self._adata.is_view:
            return self.matrix(None)
        return self._adata.raw.X

    def _frame(self, frame: str) -> Any:
        return {"obs": self._adata.obs, "var": self._adata.var}[frame] if frame != "raw/var" else self._adata.raw.var

    def index(self, frame: str) -> np.ndarray:
        return self._frame(frame).index.to_numpy(dtype=object)

    def column_names(self, frame: str) -> list[str]:
        return list(self._frame(frame).columns)

    def column(self, frame: str, name: str) -> np.ndarray:
        return np.asarray(self._frame(frame)[name])

    def close(self) -> None:
        """The AnnData is the user's: it stays open."""


class _FileSource:
    def __init__(self, root: h5py.File | zarr.Group, path: Path) -> None:
        self._root: Any = root  # both kinds of group index alike; their types do not
        self.name = str(path)

    def layer_names(self) -> list[str]:
        return list(self._root["layers"]) if "layers" in self._root else []

    def has_raw(self) -> bool:
        return "raw" in self._root and "X" in self._root["raw"]

    def matrix(self, layer: str | None) -> Any:
        if layer is not None:
            return self._as_matrix(self._root["layers"][layer])
        return self._as_matrix(self._root["X"]) if "X" in self._root else None

    def raw_matrix(self) -> Any:
        return self._as_matrix(self._root["raw"]["X"])

    def _as_matrix(self, element: Any) -> Any:
        if not isinstance(element, h5py.Group | zarr.Group):
            is_table = element.shape is not None and len(element.shape) == 2
            return element if is_table else None  # newer versions of anndata write a missing X as "null"
        encoding = element.attrs.get("encoding-type", element.attrs.get("h5sparse_format"))
        if encoding not in ("csr_matrix", "csc_matrix", "csr", "csc"):
            raise ValueError(
                f"{self.name}: {element.name} is stored as {encoding!r}, not as a dense, CSR or CSC matrix."
            )
        return sparse_dataset(element)

    def index(self, frame: str) -> np.ndarray:
        group = self._root[frame]
        return np.asarray(read_elem(group[group.attrs["_index"]]), dtype=object)

    def column_names(self, frame: str) -> list[str]:
        return [str(name) for name in self._root[frame].attrs["column-order"]]

    def column(self, frame: str, name: str) -> np.ndarray:
        group = self._root[frame]
        if group.attrs.get("encoding-version") == "0.1.0":  # categories lie outside the column
            return np.asarray(read_elem(group)[name])
        return np.asarray(read_elem(group[name]))

    def close(self) -> None:
        if isinstance(self._root, h5py.File):
            self._root.close()


def _open_file(path: Path) -> "_FileSource | TableSource":
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix == ".zarr":
        return _open_anndata(_open_zarr(path), path)
    if path.is_dir() and is_matrix_folder(path):
        return open_matrix_folder(path)
    if path.is_file() and text_suffix(path) is not None:
        return open_text(path)
    if path.suffix not in (".h5ad", ".h5", ".loom"):
        raise ValueError(
            f"{path} is of no known format ({_FORMATS}). Read it with scanpy or anndata and pass the AnnData, or "
            "write it with adata.write_h5ad."
        )
    file = _open_hdf5(path)
    if path.suffix == ".h5ad" or (path.suffix == ".h5" and "obs" in file):
        return _open_anndata(file, path)
    try:
        return open_loom(file, path) if path.suffix == ".loom" else open_10x_h5(file, path)
    except KeyError as error:
        file.close()
        raise ValueError(f"{path} lacks a part of its format ({error.args[0]}): the file is damaged.") from error
    except BaseException:
        file.close()
        raise


def _open_anndata(root: h5py.File | zarr.Group, path: Path) -> "_FileSource":
    source = _FileSource(root, path)
    try:
        _check_is_anndata(root, path)
    except BaseException:
        source.close()
        raise
    return source


def _open_zarr(path: Path) -> zarr.Group:
    try:
        return zarr.open_group(path, mode="r")
    except (OSError, ValueError) as error:  # zarr's own not-found errors are among both
        raise ValueError(f"{path} is no zarr group ({error}). adata.write_zarr writes one.") from error


def _open_hdf5(path: Path) -> h5py.File:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an .h5ad file.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if isinstance(error, PermissionError | BlockingIOError):
            raise
        if "truncated" in str(error):
            raise ValueError(f"{path} is truncated ({error}). Copy or download it again.") from error
        if not h5py.is_hdf5(path):
            with path.open("rb") as file:
                beginning = file.read(8)
            raise ValueError(
                f"{path} is no HDF5 file, whatever its name says (it begins with {beginning!r})."
            ) from error
        raise ValueError(f"{path} could not be opened ({error}): the file is damaged.") from error


def _check_is_anndata(root: h5py.File | zarr.Group, path: Path) -> None:
    missing = [name for name in ("obs", "var") if name not in root]
    if missing:
        found = ", ".join(sorted(root)[:10]) or "nothing"
        raise ValueError(
            f"{path} holds no AnnData: it has no {' and no '.join(missing)}, but {found}. A Cell Ranger file "
            "ends in .h5."
        )
    for name in ("obs", "var"):
        if "_index" not in root[name].attrs:
            raise ValueError(
                f"{path}: {name} is not stored as anndata 0.7 and later store it. Open the file with "
                "anndata.read_h5ad and pass the AnnData, or write it again."
            )


# --- Rows of a matrix, however it is stored ---


def _read_rows(matrix: Any, start: int, stop: int) -> csr_matrix:
    if isinstance(matrix, CSCDataset):
        return _read_rows_of_csc(matrix, start, stop)
    rows = matrix[start:stop]
    if hasattr(rows, "compute"):  # dask
        rows = rows.compute()
    return csr_matrix(rows)


def _read_rows_of_csc(matrix: CSCDataset, start: int, stop: int) -> csr_matrix:
    indptr, indices, data = _csc_arrays(matrix)
    parts = []
    for first, last in row_ranges(indptr, CHUNK_ENTRIES):
        entries = slice(int(indptr[first]), int(indptr[last]))
        rows = indices[entries]
        is_wanted = (rows >= start) & (rows < stop)
        if is_wanted.any():
            columns = np.repeat(np.arange(first, last), np.diff(indptr[first : last + 1]))
            parts.append((data[entries][is_wanted], rows[is_wanted] - start, columns[is_wanted]))
    shape = (stop - start, matrix.shape[1])
    if not parts:
        return csr_matrix(shape, dtype=matrix.dtype)
    values, rows, columns = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return csr_matrix((values, (rows, columns)), shape=shape)


def _csc_arrays(matrix: CSCDataset) -> tuple[np.ndarray, Any, Any]:
    return np.asarray(matrix.group["indptr"][:]), matrix.group["indices"], matrix.group["data"]


def _indptr_of_rows(matrix: Any) -> np.ndarray:
    """`(rows + 1,)` where each row's stored entries begin if they lie row after row."""
    if isinstance(matrix, csr_matrix | StoredRows):
        return matrix.indptr
    if isinstance(matrix, CSRDataset):
        return np.asarray(matrix.group["indptr"][:])
    if isinstance(matrix, CSCDataset):
        indptr, indices, _ = _csc_arrays(matrix)
        per_row = np.zeros(matrix.shape[0], dtype=np.int64)
        for first, last in row_ranges(indptr, CHUNK_ENTRIES):
            per_row += np.bincount(indices[int(indptr[first]) : int(indptr[last])], minlength=len(per_row))
        return np.concatenate([[0], np.cumsum(per_row)])
    return np.arange(matrix.shape[0] + 1) * matrix.shape[1]


def _holds_integers(matrix: Any) -> bool:
    if matrix.dtype.kind not in "biuf":
        return False
    if isinstance(matrix, CSCDataset):  # its first rows would cost a pass over all of it
        sample = matrix.group["data"][:_SAMPLED_ENTRIES]
    else:
        sample = _read_rows(matrix, 0, min(_SAMPLED_ROWS, matrix.shape[0])).data
    is_count = np.isfinite(sample) & (sample >= 0) & (np.rint(sample) == sample)
    return bool(len(sample) and is_count.all())
