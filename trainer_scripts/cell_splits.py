"""Which labelled cells train, validate and test: by whole donors or batches, or by drawing from every cell type."""

from collections.abc import Sequence
from itertools import combinations
from typing import Literal, get_args

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SHARES = (0.8, 0.1, 0.1)


def split_cells(
    labels: Sequence[str] | np.ndarray,
    *,
    groups: Sequence[str] | np.ndarray | None = None,
    shares: tuple[float, float, float] = SHARES,
    seed: int = 0,
) -> np.ndarray:
    """Draw the split of each cell: `(cells,)` of "train", "validation" and "test".

    Without groups, every type is cut by the shares, rounded, so that types keep their proportions; a type of at least 3
    cells has one in each split, one of fewer cells only trains.

    With groups, a group lies in one split as a whole. Groups are gathered into folds of about equal size and
    composition, as many as the shares ask for (10 for 8:1:1) or as there are groups; some of them, drawn by the seed,
    validate and test. Of what could be drawn, only what leaves the fewest cells of a type without training cells is
    considered. With few groups the held-out parts are larger than their shares: of 4 groups, 2 train. Of 2 groups one
    tests, and the validation cells are drawn from the other as without groups: they then only tell when to stop, while
    the test still says how well a new group is called.

    Args:
        labels: the type of each cell.
        groups: the donor or batch of each cell.
        shares: of train, validation and test; they sum to 1. Only that of the test may be 0.
        seed: of what is drawn.
    Raises: ValueError: for shares that are none, lengths that differ, or fewer than 2 groups (3 without a test).
    """
    _check_shares(shares)
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    if groups is None:
        return _split_each_type(labels, shares, generator)
    groups = np.asarray(groups)
    if groups.shape != labels.shape:
        raise ValueError(f"There are {len(groups):,} groups for {len(labels):,} labels; give one for each cell.")
    names = np.unique(groups)
    if len(names) == 2 and shares[2]:
        return _split_two_groups(labels, groups, shares, generator)
    if len(names) < 3:
        raise ValueError(
            f"The groups have {len(names)} value{'s' * (len(names) != 1)} ({', '.join(map(str, names))}), too few to "
            "hold whole ones out; split without groups, or by a column with more values."
        )
    return _split_groups(labels, groups, shares, generator)


def _split_each_type(
    labels: np.ndarray, shares: tuple[float, float, float], generator: np.random.Generator
) -> np.ndarray:
    # scikit-learn's StratifiedShuffleSplit refuses types of one cell and does not promise a rare type to every split.
    splits = np.full(len(labels), "train", dtype="<U10")
    for label in np.unique(labels):
        cells = generator.permutation(np.flatnonzero(labels == label))
        if len(cells) < 3:
            continue
        start = 0
        for split, share in zip(SPLITS[1:], shares[1:], strict=True):
            num_cells = max(round(share * len(cells)), 1) if share else 0
            splits[cells[start : start + num_cells]] = split
            start += num_cells
    return splits


def _split_two_groups(
    labels: np.ndarray, groups: np.ndarray, shares: tuple[float, float, float], generator: np.random.Generator
) -> np.ndarray:
    candidates = [groups == name for name in np.unique(groups)]
    is_test = _draw(candidates, labels, generator)
    splits = np.full(len(labels), "test", dtype="<U10")
    train, validation = (share / (shares[0] + shares[1]) for share in shares[:2])
    splits[~is_test] = _split_each_type(labels[~is_test], (train, validation, 0.0), generator)
    return splits


def _split_groups(
    labels: np.ndarray, groups: np.ndarray, shares: tuple[float, float, float], generator: np.random.Generator
) -> np.ndarray:
    names, group_of_cell = np.unique(groups, return_inverse=True)
    num_folds = min(len(names), round(1 / min(share for share in shares[1:] if share)))
    fold_of_cell = _folds(labels, group_of_cell, num_folds)
    num_held_out = [max(round(share * num_folds), 1) if share else 0 for share in shares[1:]]
    while sum(num_held_out) >= num_folds:  # few folds, large shares
        num_held_out[int(np.argmax(num_held_out))] -= 1
    held_out_folds = list(combinations(range(num_folds), sum(num_held_out)))
    candidates = [np.isin(fold_of_cell, folds) for folds in held_out_folds]
    is_held_out = _draw(candidates, labels, generator)
    folds = generator.permutation(np.unique(fold_of_cell[is_held_out]))
    splits = np.full(len(labels), "train", dtype="<U10")
    splits[np.isin(fold_of_cell, folds[: num_held_out[0]])] = "validation"
    splits[np.isin(fold_of_cell, folds[num_held_out[0] :])] = "test"
    return splits


def _folds(labels: np.ndarray, group_of_cell: np.ndarray, num_folds: int) -> np.ndarray:
    """Which fold each cell lies in: as many as there are groups, or fewer of about equal size and composition."""
    if num_folds == group_of_cell.max() + 1:
        return group_of_cell
    folds = np.empty(len(labels), dtype=np.int64)
    splitter = StratifiedGroupKFold(n_splits=num_folds)
    # Types rarer than there are folds are nothing to refuse or warn of here; all of them together are not rarer.
    counts = np.bincount(np.unique(labels, return_inverse=True)[1])
    strata = np.where(np.isin(labels, np.unique(labels)[counts >= num_folds]), labels, "")
    for number, (_, cells) in enumerate(splitter.split(strata, strata, group_of_cell)):
        folds[cells] = number
    return folds


def _draw(candidates: Sequence[np.ndarray], labels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One of the masks of held-out cells: at random among those that leave the fewest cells of untrained types."""
    num_untrained = [int((~np.isin(labels, labels[~held_out])).sum()) for held_out in candidates]
    best = np.flatnonzero(np.array(num_untrained) == min(num_untrained))
    return candidates[generator.choice(best)]


def _check_shares(shares: tuple[float, float, float]) -> None:
    train, validation, test = shares
    if train <= 0 or validation <= 0 or test < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(
            f"shares are {shares}; those of train, validation and test must sum to 1, and only the test's may be 0."
        )
