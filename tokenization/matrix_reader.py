"""A (cells, genes) matrix or DataFrame in memory, read in the way an AnnData file is; and what any such reader offers.

Imports neither anndata nor pandas: this file also runs from the Hub, where they need not be installed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from scipy.sparse import csr_matrix, sparray, spmatrix

from .read_depth import row_ranges

CHUNK_ENTRIES = 4_000_000  # stored matrix entries read at a time: about 0.3 GB with all intermediates


@runtime_checkable
class CellReader(Protocol):
    """What the tokenizer needs of its input: rows of values, with gene and cell names.

    `AnnDataReader` and `MatrixReader` read what people pass; a reader of one's own may be passed in their place.
    """

    num_cells: int
    num_columns: int
    gene_names: np.ndarray
    cell_names: np.ndarray
    path: Path | None
    description: str

    def read(self, start: int, stop: int) -> csr_matrix:
        """Rows [start, stop)."""

    def chunks(self, *, max_entries: int = CHUNK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Consecutive row ranges holding at most that many stored entries."""

    def obs_column(self, name: str) -> np.ndarray:
        """One value a cell; KeyError naming the columns there are."""

    def integer_alternatives(self) -> list[str]:
        """Other matrices of the same input that hold integers, as the user would ask for them."""

    def gene_columns(self) -> dict[str, np.ndarray]:
        """Other names of the genes, by the `gene_column` that selects them."""

    def close(self) -> None:
        """Let go of the file, if there is one."""


class MatrixReader:
    """A (cells, genes) matrix or DataFrame in memory as a `CellReader`.

    Args:
        matrix: scipy sparse matrix or array, or anything numpy takes as a 2-D array of numbers.
        gene_names: one name a column.
        cell_names: one name a row; left out, cells are called by their row numbers.
    """

    path: Path | None = None

    def __init__(
        self,
        matrix: Any,
        gene_names: Sequence[str] | np.ndarray,
        cell_names: Sequence[str] | np.ndarray | None = None,
    ) -> None:
        """See the class."""
        is_sparse = isinstance(matrix, spmatrix | sparray)
        if not is_sparse:
            matrix = np.asarray(matrix)
        if matrix.ndim != 2:
            raise ValueError(
                f"Expected a (cells, genes) matrix, got shape {tuple(matrix.shape)}. For one cell, pass "
                "counts[None, :]."
            )
        if matrix.dtype.kind not in "biuf":
            raise ValueError(f"Expected a matrix of real numbers, got dtype {matrix.dtype}.")
        self.num_cells, self.num_columns = (int(n) for n in matrix.shape)
        check_shape("the matrix", self.num_cells, self.num_columns)
        self.gene_names = np.asarray(gene_names, dtype=object)
        if self.gene_names.shape != (self.num_columns,):
            is_transposed = self.gene_names.shape == (self.num_cells,)
            raise ValueError(
                f"gene_names has {self.gene_names.size:,} names, the matrix {self.num_columns:,} columns"
                + (" and as many rows as names: pass matrix.T, cells are rows." if is_transposed else ".")
            )
        names = np.arange(self.num_cells) if cell_names is None else np.asarray(cell_names)
        self.cell_names = names.astype(str).astype(object)
        if self.cell_names.shape != (self.num_cells,):
            raise ValueError(f"cell_names has {self.cell_names.size:,} names, the matrix {self.num_cells:,} rows.")
        self.description = "the matrix"
        self._matrix: csr_matrix | np.ndarray = csr_matrix(matrix) if is_sparse else matrix

    @classmethod
    def from_dataframe(cls, frame: Any) -> "MatrixReader":
        """Rows of the frame are cells, its columns genes."""
        dtypes = {str(dtype) for dtype in frame.dtypes}
        if dtypes and all(dtype.startswith("Sparse") for dtype in dtypes):
            matrix = frame.sparse.to_coo()
        else:
            matrix = frame.to_numpy()
            if matrix.dtype.kind not in "biuf":
                raise ValueError(
                    "Expected a DataFrame of numbers, cells x genes, but its columns have the types "
                    f"{sorted(dtypes)}. Move cell annotations to the index or drop them."
                )
        reader = cls(matrix, frame.columns.to_numpy(), frame.index.to_numpy())
        reader.description = "the DataFrame"
        return reader

    def read(self, start: int, stop: int) -> csr_matrix:
        """Rows [start, stop)."""
        return canonical(csr_matrix(self._matrix[start:stop]))

    def chunks(self, *, max_entries: int = CHUNK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Consecutive row ranges holding at most `max_entries` stored entries."""
        if isinstance(self._matrix, csr_matrix):
            return row_ranges(self._matrix.indptr, max_entries)
        return row_ranges(np.arange(self.num_cells + 1) * self.num_columns, max_entries)

    def obs_column(self, name: str) -> np.ndarray:
        """A matrix has no columns of cell annotations: always a KeyError."""
        raise KeyError(f"{self.description} has no obs columns, so no {name!r}: pass an array with one value a cell.")

    def integer_alternatives(self) -> list[str]:
        """A matrix comes alone."""
        return []

    def gene_columns(self) -> dict[str, np.ndarray]:
        """A matrix comes with one set of names."""
        return {}

    def close(self) -> None:
        """Nothing to close."""


def canonical(rows: csr_matrix) -> csr_matrix:
    """Rows with sorted columns, without duplicates; `rows`, perhaps a view of user data, is unchanged."""
    if not rows.has_canonical_format:
        rows = rows.copy()
        rows.sum_duplicates()
    return rows


def check_shape(where: str, num_cells: int, num_columns: int) -> None:
    """Refuse an input without cells or without genes."""
    for count, what in ((num_cells, "cells"), (num_columns, "genes")):
        if not count:
            raise ValueError(f"There are no {what} in {where} (cells x genes: {num_cells} x {num_columns}).")
