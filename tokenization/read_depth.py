"""Counts <-> log1p of counts per 10,000, and the read-depth tokens T and S: pure functions on CSR matrices.

The reader hands out counts, the vocabulary aligns them, the functions here turn them into the numbers a model
sees. Everything works on whole chunks of cells; there is no loop over cells or genes.
Source: `original-computation.md` section 7, after `model/get_embedding.py` of biomap-research/scFoundation.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

COUNTS_PER_CELL = 10_000
MAX_LOG1P_CP10K = float(np.log1p(COUNTS_PER_CELL))  # a cell with all its counts in one gene
MAX_RECOVERY_RESIDUE = 0.1
_LARGEST_COUNT_DRAWN_SINGLY = 24  # as many uniforms take as long as one binomial draw
_SMALL_COUNT = 16  # rounded right whatever the first estimate
_LARGEST_PLAUSIBLE_LOG = 50.0  # expm1 of more is above 1e21, no count


class Entry(NamedTuple):
    """One stored entry of a matrix: where it is and what it holds."""

    row: int
    column: int
    value: float


def row_ranges(indptr: np.ndarray, max_entries: int) -> Iterator[tuple[int, int]]:
    """Consecutive row ranges of at most `max_entries` stored entries; a row that holds more comes alone.

    Args:
        indptr: `(num_rows + 1,)` where each row begins, as in CSR (of a CSC matrix: column ranges).
    """
    if max_entries < 1:
        raise ValueError(f"max_entries must be at least 1, got {max_entries}.")
    num_rows, start = len(indptr) - 1, 0
    while start < num_rows:
        stop = int(np.searchsorted(indptr, indptr[start] + max_entries, side="right")) - 1
        stop = min(max(stop, start + 1), num_rows)
        yield start, stop
        start = stop


def row_of_entry(matrix: csr_matrix) -> np.ndarray:
    """`(nnz,)` the row each stored entry belongs to."""
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))


def row_totals(matrix: csr_matrix) -> np.ndarray:
    """`(num_rows,)` float64 sums, taken in float64 whatever the matrix holds."""
    return np.asarray(matrix @ np.ones(matrix.shape[1], dtype=np.float64))


def with_data(matrix: csr_matrix, data: np.ndarray) -> csr_matrix:
    """The same stored positions with other values; the positions are shared, not copied."""
    return csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)


def without_stored_zeros(matrix: csr_matrix) -> csr_matrix:
    """The matrix, or a copy without the zeros that it stores: a stored zero is not an expressed gene."""
    if np.all(matrix.data):
        return matrix
    matrix = matrix.copy()
    matrix.eliminate_zeros()
    return matrix


# --- Checks: each returns the first offending entry, or None ---


def first_entry(matrix: csr_matrix, offends: np.ndarray) -> Entry | None:
    """The first stored entry for which `offends` `(nnz,)` is true."""
    if not offends.any():
        return None
    position = int(np.argmax(offends))
    row = int(np.searchsorted(matrix.indptr, position, side="right")) - 1
    return Entry(row, int(matrix.indices[position]), float(matrix.data[position]))


def first_nan(matrix: csr_matrix) -> Entry | None:
    """The first entry that is not a number."""
    return first_entry(matrix, np.isnan(matrix.data))


def first_infinite(matrix: csr_matrix) -> Entry | None:
    """The first infinite entry."""
    return first_entry(matrix, np.isinf(matrix.data))


def first_negative(matrix: csr_matrix) -> Entry | None:
    """The first entry below zero."""
    return first_entry(matrix, matrix.data < 0)


def first_non_integer(matrix: csr_matrix) -> Entry | None:
    """The first entry with a fractional part."""
    if matrix.dtype.kind in "biu":
        return None
    return first_entry(matrix, np.rint(matrix.data) != matrix.data)


# --- Values ---


def working_precision(matrix: csr_matrix) -> csr_matrix:
    """Integers as float64, float32 and float64 as they are, half precision as float32.

    The original computes in the input's own dtype, so that float32 files differ from float64 ones in the last
    bits. Small integer types would also overflow when duplicate genes are summed.
    """
    if matrix.dtype.kind in "biu":
        return matrix.astype(np.float64)
    return matrix.astype(np.float32) if matrix.dtype.itemsize < 4 else matrix


def log1p_cp10k(counts: csr_matrix, totals: np.ndarray, *, scale: float = COUNTS_PER_CELL) -> csr_matrix:
    """log1p(counts / total * scale), in the dtype of `counts`.

    Args:
        counts: `(cells, genes)` floating point.
        totals: `(cells,)` what each cell is divided by; cells without entries may have a total of 0.
        scale: total of every cell before the logarithm; the median total of all samples for the original's
            bulk mode.
    """
    totals_of_entry = totals.astype(counts.dtype)[row_of_entry(counts)]
    return with_data(counts, np.log1p(counts.data / totals_of_entry * counts.dtype.type(scale)))


def log10_source_depth(totals: np.ndarray) -> np.ndarray:
    """S: log10 of each cell's total count, `(cells,)` float64. Empty cells, which have no depth, get NaN."""
    has_counts = totals > 0
    return np.where(has_counts, np.log10(np.where(has_counts, totals, 1.0)), np.nan)


def log10_target_depth(
    totals: np.ndarray, *, target_depth: float | None = None, depth_fold: float | None = None
) -> np.ndarray:
    """T: log10 of the depth to predict for, `(cells,)` float64. Empty cells get NaN.

    Args:
        totals: `(cells,)` total counts.
        target_depth: one total count for all cells (the original's t4 is 10,000).
        depth_fold: multiple of each cell's own total (its f2 is 2, its a5 is 1e5). Neither: T = S.
    """
    if target_depth is not None:
        return np.where(totals > 0, np.log10(target_depth), np.nan)
    return log10_source_depth(totals) + (0.0 if depth_fold is None else np.log10(depth_fold))


# --- Shallower cells ---


def down_sample(counts: np.ndarray, *, rate: float, generator: np.random.Generator) -> np.ndarray:
    """One cell as a shallower sequencing run would have read it: each count ~ Binomial(count, rate).

    Small counts are drawn one by one, in single precision: the rate is that of the next multiple of 2**-24.

    Args:
        counts: `(genes,)` integers.
        rate: chance of each count to be kept.
    Returns: `(genes,)` int64; the counts unchanged if none would be left.
    Source: paper, Supplementary Note 9.
    """
    drawn_singly = np.where(counts > _LARGEST_COUNT_DRAWN_SINGLY, 0, counts)
    ends, total = np.cumsum(drawn_singly), int(drawn_singly.sum())
    num_kept = np.zeros(total + 1, dtype=np.int64)  # of the counts before each
    np.cumsum(generator.random(total, dtype=np.float32) < rate, out=num_kept[1:])
    left = num_kept[ends] - num_kept[ends - drawn_singly]
    is_large = np.flatnonzero(counts > _LARGEST_COUNT_DRAWN_SINGLY)
    left[is_large] = generator.binomial(counts[is_large], rate)
    return left if left.any() else counts


# --- Counts from normalised values ---


def recover_counts(values: csr_matrix, *, is_logged: bool) -> tuple[csr_matrix, np.ndarray]:
    """Counts of cells that were scaled, and perhaps logged: a cell's smallest nonzero value is one count.

    That value is only a first estimate: files often keep three decimals, so that it is off by up to a
    thousandth, which 100 counts multiply to a tenth of a count. The size of one count is therefore fitted
    again, by least squares, to the small counts and then to all.

    Args:
        values: `(cells, genes)` non-negative, before alignment: a cell's one-count genes may lie outside the
            vocabulary, and duplicates may only be summed as counts.
        is_logged: whether the values are log1p of the scaled counts.
    Returns: the counts, float64 integers without stored zeros, and `(nnz,)` how far each lay from its
        integer. The caller refuses residues above `MAX_RECOVERY_RESIDUE`.
    """
    scaled = without_stored_zeros(values.astype(np.float64))
    rows, num_entries = row_of_entry(scaled), np.diff(scaled.indptr)
    with np.errstate(over="ignore", invalid="ignore"):  # values too large to be logs end as infinite residues
        amounts = np.expm1(scaled.data) if is_logged else scaled.data
        one_count = np.ones(scaled.shape[0])
        if scaled.nnz:
            # reduceat takes every start as a segment, so rows without entries must not contribute one.
            starts = scaled.indptr[:-1][num_entries > 0]
            one_count[num_entries > 0] = np.minimum.reduceat(amounts, starts)
        counts = np.rint(amounts / one_count[rows])
        for largest_used in (_SMALL_COUNT, np.inf):
            weights = np.where(counts <= largest_used, counts, 0)
            products = np.bincount(rows, weights=amounts * weights, minlength=len(one_count))
            squares = np.bincount(rows, weights=counts * weights, minlength=len(one_count))
            one_count = np.divide(products, squares, out=one_count, where=squares > 0)
            counts = np.rint(amounts / one_count[rows])
        residues = np.abs(amounts / one_count[rows] - counts)
    return with_data(scaled, counts), np.where(np.isnan(residues), np.inf, residues)


def are_logged(values: csr_matrix) -> bool:
    """Whether scaled counts were also logged: the reading under which they lie closer to whole counts.

    Args:
        values: a sample of cells, non-negative, with at least one nonzero entry.
    """
    if values.data.max() > _LARGEST_PLAUSIBLE_LOG:
        return False
    _, residues_as_logs = recover_counts(values, is_logged=True)
    _, residues_as_scaled = recover_counts(values, is_logged=False)
    return bool(residues_as_logs.mean() <= residues_as_scaled.mean())
