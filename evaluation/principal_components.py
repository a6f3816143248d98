"""What sparse cells have in common, from a few passes over them: gene means and principal components."""
# G genes

from collections.abc import Callable, Iterable

import numpy as np
from scipy.sparse import csr_matrix

from scfoundation_hf.tokenization.data_collator import RawCells
from scfoundation_hf.tokenization.read_depth import log1p_cp10k, row_totals, working_precision

OVERSAMPLING = 16  # directions beyond the rank, which make the randomised ones converge
NUM_PASSES = 8


def log1p_matrices(cells: Iterable[RawCells], num_genes: int) -> Iterable[csr_matrix]:
    """log1p(CP10k) of the cells, float64 `(cells, G)`, part by part."""
    for part in cells:
        counts = working_precision(part.to_csr(num_genes))
        yield log1p_cp10k(counts, row_totals(counts))


def mean_values(cells: Callable[[], Iterable[RawCells]], num_genes: int) -> np.ndarray:
    """`(G,)` each gene's mean log1p(CP10k).

    Raises: ValueError: if there are no cells.
    """
    sums, num_cells = np.zeros(num_genes), 0
    for matrix in log1p_matrices(cells(), num_genes):
        sums += matrix.T @ np.ones(matrix.shape[0])
        num_cells += matrix.shape[0]
    if not num_cells:
        raise ValueError("There are no training cells to learn from, or it was given an iterator already used.")
    return sums / num_cells


def principal_components(
    matrices: Callable[[], Iterable[csr_matrix]], means: np.ndarray, *, rank: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, float]:
    """Principal components of sparse rows that are too many for memory, by randomised subspace iteration.

    Args:
        matrices: gives the rows `(rows, G)`, in parts, `NUM_PASSES` times.
        means: `(G,)` of the columns.
        rank: how many.
    Returns: `(G, rank)` orthonormal loadings, `(rank,)` falling variances along them, and the variance in all.
    Raises: ValueError: for a rank above the number of rows or columns.
    Source: Halko, Martinsson and Tropp, Finding structure with randomness, 2011, algorithm 4.4.
    """
    width = min(rank + OVERSAMPLING, len(means))
    loadings = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(means), width)))[0]
    for number in range(NUM_PASSES):
        product, num_rows, squares = np.zeros_like(loadings), 0, 0.0
        for matrix in matrices():
            scores = matrix @ loadings - means @ loadings
            product += matrix.T @ scores - np.outer(means, scores.sum(axis=0))
            num_rows += matrix.shape[0]
            squares += float(matrix.data @ matrix.data)
        if rank > min(num_rows, len(means)):
            raise ValueError(
                f"{num_rows:,} cells of {len(means):,} genes do not have {rank} components; pass lower ranks."
            )
        if number < NUM_PASSES - 1:
            loadings = np.linalg.qr(product)[0]
    # Rayleigh-Ritz: the components within the last subspace, whose product with the covariance is at hand.
    variances, rotation = np.linalg.eigh(loadings.T @ product / num_rows)
    largest = np.argsort(variances)[::-1][:rank]
    return loadings @ rotation[:, largest], variances[largest], squares / num_rows - float(means @ means)
