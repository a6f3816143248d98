"""Cells that are stored in other ways than AnnData's: 10x HDF5 and matrix folders, loom, CSV.

`AnnDataReader` opens them by their names and reads them as if they were AnnData. 10x HDF5 and loom are read range by
range; matrix folders and CSV are text, and held in memory as a sparse matrix.
"""

import csv
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import h5py
import numpy as np
import pandas as pd
from scipy.io import mmread
from scipy.sparse import csr_matrix, vstack

TEXT_SUFFIXES = (".csv", ".tsv")
GENE_EXPRESSION = "Gene Expression"
_ROWS_OF_TEXT = 256
_NAMES_OF_LOOM = {"var": ("Gene", "var_names", "Accession"), "obs": ("CellID", "obs_names")}


def is_matrix_folder(path: Path) -> bool:
    """Whether Cell Ranger wrote this folder: `matrix.mtx` with the names of its rows and columns."""
    return any((path / name).is_file() for name in ("matrix.mtx.gz", "matrix.mtx"))


def text_suffix(path: Path) -> str | None:
    """`.csv` or `.tsv`, also before `.gz`; None for other names."""
    name = path.with_suffix("") if path.suffix == ".gz" else path
    return name.suffix if name.suffix in TEXT_SUFFIXES else None


class TableSource:
    """Matrices over the same cells and genes with columns of names: what `AnnDataReader` asks a source for.

    Args:
        name: of the file, for messages.
        matrices: by layer; None is X.
        frames: "obs" and "var", each with its index under None.
        close: lets go of the file.
    """

    def __init__(
        self,
        name: str,
        matrices: dict[str | None, Any],
        frames: dict[str, dict[str | None, np.ndarray]],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """See the class."""
        self.name = name
        self._matrices, self._frames, self._close = matrices, frames, close

    def layer_names(self) -> list[str]:
        """Layers other than X."""
        return [name for name in self._matrices if name is not None]

    def has_raw(self) -> bool:
        """Only AnnData has `.raw`."""
        return False

    def matrix(self, layer: str | None) -> Any:
        """X or a layer."""
        return self._matrices[layer]

    def raw_matrix(self) -> Any:
        """Only AnnData has `.raw`."""
        raise AssertionError("has_raw() is False")

    def index(self, frame: str) -> np.ndarray:
        """Names of the cells or genes."""
        return self._frames[frame][None]

    def column_names(self, frame: str) -> list[str]:
        """Further columns."""
        return [name for name in self._frames[frame] if name is not None]

    def column(self, frame: str, name: str) -> np.ndarray:
        """One of them."""
        return self._frames[frame][name]

    def close(self) -> None:
        """Close the file."""
        self._close()


class StoredRows:
    """Rows of a compressed matrix in HDF5, without AnnData's attributes; only some columns, if told so."""

    def __init__(self, group: h5py.Group, shape: tuple[int, int], columns: np.ndarray) -> None:
        """`shape` is that of all columns; `columns` are those wanted."""
        self.indptr = np.asarray(group["indptr"][:], dtype=np.int64)
        self.dtype = group["data"].dtype
        self.shape = (shape[0], len(columns))
        self._group, self._num_columns, self._columns = group, shape[1], columns

    def __getitem__(self, rows: slice) -> csr_matrix:
        start, stop = self.indptr[rows.start], self.indptr[rows.stop]
        indices, data = self._group["indices"][start:stop], self._group["data"][start:stop]
        if len(indices) and not 0 <= indices.min() <= indices.max() < self._num_columns:
            raise ValueError(f"a column number is not within the {self._num_columns:,} features")
        shape = (rows.stop - rows.start, self._num_columns)
        matrix = csr_matrix((data, indices, self.indptr[rows.start : rows.stop + 1] - start), shape=shape)
        return matrix if len(self._columns) == self._num_columns else csr_matrix(matrix[:, self._columns])


class TransposedRows:
    """Rows of a dense HDF5 matrix that is stored (genes, cells), as loom does."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        """Nothing is read yet."""
        self.shape, self.dtype = dataset.shape[::-1], dataset.dtype
        self._dataset = dataset

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._dataset[:, rows].T


def open_10x_h5(file: h5py.File, path: Path) -> TableSource:
    """What Cell Ranger calls `filtered_feature_bc_matrix.h5` (3 and later) or `filtered_gene_bc_matrices_h5.h5` (2).

    Genes are named by their symbols; their ids are in the column `gene_ids`. Features other than gene expression
    (antibodies, guides) are left out: some of them bear the names of genes.
    """
    if "matrix" in file:
        group, features = file["matrix"], file["matrix/features"]
        columns = {None: features["name"], "gene_ids": features["id"]}
        kinds = _text(features["feature_type"]) if "feature_type" in features else None
    else:
        genomes = [name for name in file if isinstance(file[name], h5py.Group) and "gene_names" in file[name]]
        if len(genomes) != 1:
            raise ValueError(
                f"{path} is no 10x HDF5 file of one genome and no AnnData: it holds "
                f"{', '.join(sorted(file)) or 'nothing'}."
            )
        group, kinds = file[genomes[0]], None
        columns = {None: group["gene_names"], "gene_ids": group["genes"]}
    num_features, num_cells = (int(number) for number in group["shape"][:])
    wanted = np.arange(num_features) if kinds is None else np.flatnonzero(kinds == GENE_EXPRESSION)
    return TableSource(
        str(path),
        {None: StoredRows(group, (num_cells, num_features), wanted)},
        {
            "obs": {None: _text(group["barcodes"])},
            "var": {name: _text(column)[wanted] for name, column in columns.items()},
        },
        close=file.close,
    )


def open_loom(file: h5py.File, path: Path) -> TableSource:
    """A loom file: dense, (genes, cells), with any number of layers."""
    missing = [name for name in ("matrix", "row_attrs", "col_attrs") if name not in file]
    if missing:
        raise ValueError(f"{path} is no loom file: it has no {' and no '.join(missing)}.")
    frames: dict[str, dict[str | None, np.ndarray]] = {}
    for frame, attributes in (("var", file["row_attrs"]), ("obs", file["col_attrs"])):
        columns = {name: attributes[name] for name in attributes if len(attributes[name].shape) == 1}
        names = [name for name in _NAMES_OF_LOOM[frame] if name in columns]
        if not names:
            raise ValueError(
                f"{path} does not name its {'genes' if frame == 'var' else 'cells'}: none of "
                f"{', '.join(_NAMES_OF_LOOM[frame])} is among {', '.join(sorted(columns)) or 'no attributes'}."
            )
        frames[frame] = {None: _text(columns[names[0]])}
        frames[frame] |= {name: _text(column) for name, column in columns.items()}
    layers = {name: TransposedRows(file["layers"][name]) for name in file["layers"]} if "layers" in file else {}
    return TableSource(str(path), {None: TransposedRows(file["matrix"]), **layers}, frames, close=file.close)


def open_matrix_folder(path: Path) -> TableSource:
    """A folder of `matrix.mtx`, `features.tsv` (or `genes.tsv`) and `barcodes.tsv`, each perhaps with `.gz`."""
    features = _read_lines(_one_of(path, "features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv"))
    barcodes = [line[0] for line in _read_lines(_one_of(path, "barcodes.tsv.gz", "barcodes.tsv"))]
    mtx = _one_of(path, "matrix.mtx.gz", "matrix.mtx")
    try:
        stored = mmread(mtx)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{mtx} could not be read ({error}): the file is damaged. Copy it again.") from error
    if stored.shape != (len(features), len(barcodes)):
        raise ValueError(
            f"{mtx} is {stored.shape[0]:,} x {stored.shape[1]:,}, but there are {len(features):,} features and "
            f"{len(barcodes):,} barcodes beside it: files of different runs, or damaged."
        )
    wanted = np.array([len(line) < 3 or line[2] == GENE_EXPRESSION for line in features])
    counts = csr_matrix(csr_matrix(stored.T)[:, np.flatnonzero(wanted)])
    kept = [line for line, is_wanted in zip(features, wanted, strict=True) if is_wanted]
    return TableSource(
        str(path),
        {None: counts},
        {
            "obs": {None: np.array(barcodes, dtype=object)},
            "var": {
                None: np.array([line[min(1, len(line) - 1)] for line in kept], dtype=object),
                "gene_ids": np.array([line[0] for line in kept], dtype=object),
            },
        },
    )


def open_text(path: Path) -> TableSource:
    """A table of cells x genes: a header with the genes, and in the first column the names of the cells."""
    separator = {".csv": ",", ".tsv": "\t"}[text_suffix(path) or ".csv"]
    with _open_text(path) as file:
        genes = next(csv.reader(file, delimiter=separator), [])[1:]
    if not genes:
        raise ValueError(f"{path} has no header line with genes, separated by {separator!r}.")
    parts, cells = [], []
    options: Any = {"sep": separator, "header": None, "skiprows": 1, "index_col": 0, "chunksize": _ROWS_OF_TEXT}
    try:
        with pd.read_csv(path, **options) as tables:
            for table in tables:
                numbers = table.to_numpy()
                if numbers.shape[1] != len(genes):
                    raise ValueError(f"its rows have {numbers.shape[1]:,} values, its header {len(genes):,} genes")
                if numbers.dtype.kind not in "biuf":
                    column = next(i for i in range(len(genes)) if table.iloc[:, i].dtype.kind not in "biuf")
                    raise ValueError(f"gene {genes[column]!r} has values that are no numbers")
                parts.append(csr_matrix(numbers))
                cells += [str(name) for name in table.index]
    except (ValueError, EOFError, OSError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path} is no table of numbers, cells x genes ({error}).") from error
    return TableSource(
        str(path),
        {None: csr_matrix(vstack(parts, format="csr"))},
        {"obs": {None: np.array(cells, dtype=object)}, "var": {None: np.array(genes, dtype=object)}},
    )


def _text(dataset: h5py.Dataset) -> np.ndarray:
    """Strings as Python's own, numbers as they are."""
    values = dataset[:]
    if values.dtype.kind not in "SO":
        return values
    return np.array([value.decode() if isinstance(value, bytes) else value for value in values], dtype=object)


def _one_of(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has none of {', '.join(names)}.")


def _read_lines(path: Path) -> list[list[str]]:
    with _open_text(path) as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
