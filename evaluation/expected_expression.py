"""What a cell of a given depth shows on average, where the share of each gene in its RNA is known."""
# C cells, G genes, L points of the table, K counts

import numpy as np
from scipy.stats import poisson

from scfoundation_hf.tokenization.read_depth import COUNTS_PER_CELL

_LARGEST_IN_TABLE = 64.0  # expected counts; beyond, the second-order expansion is right to 1e-4
_NUM_POINTS = 512
_MOST_COUNTS = 160  # what 64 expected counts never reach


def expected_log1p_cp10k(shares: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """Mean log1p(counts per 10,000) of cells that are read to a depth, `(C, G)` float32.

    log1p(10,000 x share) is what a cell of unlimited depth shows. A real one has whole counts, mostly none of a gene of
    small share, and the mean of their logarithms is lower. The counts of a gene are taken as Poisson(share x depth).

    Args:
        shares: `(C, G)` share of each gene in the cell's RNA.
        depths: `(C,)` total counts.
    """
    sqrt_grid_L = np.linspace(0, _LARGEST_IN_TABLE**0.5, _NUM_POINTS)
    counts_K = np.arange(_MOST_COUNTS + 1)
    probabilities_LK = poisson.pmf(counts_K, sqrt_grid_L[:, None] ** 2)
    result = np.empty(shares.shape, dtype=np.float32)
    for cell, (share, depth) in enumerate(zip(shares, depths, strict=True)):
        per_count = COUNTS_PER_CELL / depth
        table_L = probabilities_LK @ np.log1p(counts_K * per_count)
        expected = share.astype(np.float64) * depth
        result[cell] = np.interp(np.sqrt(expected), sqrt_grid_L, table_L)
        is_beyond = expected > _LARGEST_IN_TABLE
        mean = 1 + expected[is_beyond] * per_count
        result[cell, is_beyond] = np.log(mean) - expected[is_beyond] * (per_count / mean) ** 2 / 2
    return result
