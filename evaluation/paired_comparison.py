"""Whether one predictor is better than another on the same hidden genes of the same cells, and how sure that is."""
# C cells

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
MAX_DRAWS = 2**20  # bounds the memory


@dataclass(frozen=True)
class PairedComparison:
    """How the error of a predictor relates to that of another.

    Attributes:
        ratio: of the two errors over all targets; below 1, the first is better.
        low, high: 95 % interval of the ratio, from drawing cells anew within each group. It speaks of further cells of
            the same donors; what to expect of other donors is in the groups.
        share_of_cells: cells in which the first has the smaller error.
        ratios: the ratio in each group.
    """

    ratio: float
    low: float
    high: float
    share_of_cells: float
    ratios: dict[str, float]


def compare_errors(errors: np.ndarray, others: np.ndarray, *, groups: Sequence[str], seed: int = 0) -> PairedComparison:
    """Compare two predictors cell by cell.

    Args:
        errors: `(C,)` sum of the errors over the targets of each cell, squared or of another kind.
        others: `(C,)` the same of the predictor to compare with, for the same targets.
        groups: `(C,)` the donor, batch or file of each cell.
        seed: of the bootstrap.
    Raises: ValueError: if the lengths differ or there is no cell.
    """
    if not len(errors) == len(others) == len(groups) or not len(errors):
        raise ValueError(
            f"A comparison needs the same cells on both sides: {len(errors)} and {len(others)} errors of "
            f"{len(groups)} cells."
        )
    pairs = np.stack([errors, others], axis=1)
    names, group_of_cell = np.unique(np.asarray(groups), return_inverse=True)
    generator = np.random.default_rng(seed)
    resampled, ratios = np.zeros((NUM_RESAMPLES, 2)), {}
    for number, name in enumerate(names):
        members = pairs[group_of_cell == number]
        ratios[str(name)] = _ratio(members.sum(axis=0))
        rows = max(1, MAX_DRAWS // len(members))  # resamples drawn at once
        for start in range(0, NUM_RESAMPLES, rows):
            part = resampled[start : start + rows]
            part += members[generator.integers(len(members), size=(len(part), len(members)))].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled[:, 0] / resampled[:, 1], [tail, 1 - tail])
    return PairedComparison(
        ratio=_ratio(pairs.sum(axis=0)),
        low=float(low),
        high=float(high),
        share_of_cells=float(np.mean(errors < others)),
        ratios=ratios,
    )


def _ratio(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1])
