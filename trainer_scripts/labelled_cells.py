"""Which cells a fine-tuning run learns from: their types, what becomes of rare ones, and the split of each cell."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pandas as pd

from scfoundation_hf.modeling_scfoundation.losses import IGNORED_LABEL
from scfoundation_hf.tokenization.prepared_cells import PreparedCells

from .cell_splits import SHARES, SPLITS, Split, split_cells
from .finetuning_settings import RareClasses

NAMES_SHOWN = 5


@dataclass(frozen=True)
class LabelledCells:
    """The cells of a fine-tuning run.

    Attributes:
        classes: the types that have training cells, sorted.
        labels: `(cells,)` int64 place in `classes`; -100 for cells of no split.
        splits: `(cells,)` "train", "validation" or "test"; "" for cells that are left out.
        left_out: how many cells are left out, by reason.
        untrained: cells of each type that validation or test cells have but no training cell, so nobody can call it;
            they are among those left out.
    """

    classes: list[str]
    labels: np.ndarray
    splits: np.ndarray
    left_out: dict[str, int]
    untrained: dict[str, int]

    def cells(self, split: Split) -> np.ndarray:
        """Rows of the cells of one split."""
        return np.flatnonzero(self.splits == split)

    @property
    def used(self) -> np.ndarray:
        """Rows of the cells of all splits."""
        return np.flatnonzero(self.splits != "")

    def names(self, cells: np.ndarray) -> np.ndarray:
        """The type of each of these cells."""
        return np.array(self.classes, dtype=object)[self.labels[cells]]

    def counts(self) -> dict[str, dict[str, int]]:
        """Cells of each type in each split."""
        return {
            name: {split: int(((self.labels == number) & (self.splits == split)).sum()) for split in SPLITS}
            for number, name in enumerate(self.classes)
        }


def read_labelled_cells(
    cells: PreparedCells,
    *,
    label: str,
    split_by: str | None = None,
    split_column: str | None = None,
    min_cells_per_class: int = 10,
    rare_classes: RareClasses = "error",
    seed: int = 0,
) -> LabelledCells:
    """Read the types from obs and split the cells; a warning counts those that are left out and says why.

    Args:
        cells: the input; what it leaves out is left out here.
        label: obs column of the type. Cells without one (NaN) are left out.
        split_by: obs column of the donor or batch, whose groups lie in one split as a whole.
        split_column: obs column that says "train", "validation" or "test" itself; without a "validation" in it, one
            is drawn from the training cells. Neither: 8:1:1, by type (`split_cells`).
        min_cells_per_class: a type of fewer cells is rare.
        rare_classes: rare types are an "error", their cells are left out ("drop"), or they are learned all the same.
        seed: of what is drawn.
    Raises: KeyError: for a column that is not there; ValueError: for rare types, if so told, or unless two types have
        training cells and one has validation cells.
    """
    if split_by is not None and split_column is not None:
        raise ValueError(f"split_by={split_by!r} and split_column={split_column!r} exclude each other; give one.")
    if rare_classes not in get_args(RareClasses):
        raise ValueError(f"There is no rare_classes {rare_classes!r}; choose {', '.join(get_args(RareClasses))}.")
    names, has_label = _read(cells, label)
    if not (has_label & cells.is_kept).any():
        raise ValueError(f"No cell has a {label!r}; fine-tuning learns from labelled cells.")
    is_used = has_label & cells.is_kept
    left_out = {f"without {label!r}": int((cells.is_kept & ~has_label).sum())}
    rare = _rare(names[is_used], min_cells_per_class)
    if rare and rare_classes == "error":
        raise ValueError(
            f"{len(rare)} types of {label!r} have fewer than min_cells_per_class={min_cells_per_class} cells: "
            f"{_listed(rare)}. Leave them out (rare_classes='drop'), learn them all the same (rare_classes='keep'), or "
            "merge them with others."
        )
    if rare_classes == "drop":
        is_rare = np.isin(names, list(rare)) & is_used
        is_used &= ~is_rare
        left_out["of a rare type"] = int(is_rare.sum())
    _check_two(label, np.unique(names[is_used]), where="")

    splits = np.full(len(names), "", dtype="<U10")
    used = np.flatnonzero(is_used)
    if split_column is not None:
        splits[used] = _given_splits(cells, split_column, used, names, seed)
    else:
        groups = None if split_by is None else _read_for(cells, split_by, used)
        splits[used] = split_cells(names[used], groups=groups, seed=seed)
    classes = np.unique(names[splits == "train"]).tolist()
    _check_two(label, classes, where=" of the training cells")
    is_untrained = (splits != "") & ~np.isin(names, classes)
    untrained = dict(Counter(names[is_untrained].tolist()))
    if untrained:
        left_out["of a type without training cells"] = int(is_untrained.sum())
        splits[is_untrained] = ""
    if not (splits == "validation").any():
        raise ValueError(
            "No cell is left to validate with: every type has fewer than 3 cells, or no validation cell has a type of "
            "the training cells. Bring more cells of each type, or another split."
        )
    labels = np.full(len(names), IGNORED_LABEL, dtype=np.int64)
    labels[splits != ""] = np.searchsorted(classes, names[splits != ""])
    found = LabelledCells(classes, labels, splits, {why: n for why, n in left_out.items() if n}, untrained)
    _warn(found, label, rare if rare_classes == "keep" else {})
    return found


def _read(cells: PreparedCells, column: str) -> tuple[np.ndarray, np.ndarray]:
    """`(cells,)` values as text, and whether each cell has one."""
    given = cells.obs_column(column)
    has_value = ~pd.isna(given)
    return np.array([str(value) for value in given], dtype=object), has_value


def _read_for(cells: PreparedCells, column: str, used: np.ndarray) -> np.ndarray:
    """The column's values for cells that all must have one."""
    values, has_value = _read(cells, column)
    if not has_value[used].all():
        lacking = used[~has_value[used]]
        raise ValueError(
            f"{len(lacking):,} labelled cells have no {column!r}, the first {cells.cell_names[lacking[0]]!r}; it tells "
            "which cells belong together, so fill it in, or leave these cells out."
        )
    return values[used]


def _given_splits(cells: PreparedCells, column: str, used: np.ndarray, names: np.ndarray, seed: int) -> np.ndarray:
    splits = _read_for(cells, column, used)
    unknown = sorted(set(splits) - set(SPLITS))
    if unknown or "train" not in splits:
        found = f"holds {', '.join(map(repr, unknown[:NAMES_SHOWN]))}" if unknown else "has no 'train'"
        raise ValueError(f"The column {column!r} {found}; split_column takes {', '.join(map(repr, SPLITS))}.")
    if "validation" not in splits:
        is_train = splits == "train"
        train, validation = (share / (SHARES[0] + SHARES[1]) for share in SHARES[:2])
        splits[is_train] = split_cells(names[used][is_train], shares=(train, validation, 0.0), seed=seed)
    return splits


def _rare(names: np.ndarray, min_cells: int) -> dict[str, int]:
    return {name: number for name, number in sorted(Counter(names.tolist()).items()) if number < min_cells}


def _check_two(label: str, classes: Iterable[str], *, where: str) -> None:
    classes = list(classes)
    if len(classes) < 2:
        found = f"one type, {classes[0]!r}" if classes else "no type"
        raise ValueError(
            f"The column {label!r}{where} holds {found}, once rare types are left out; telling types apart takes at "
            "least two."
        )


def _listed(counts: Mapping[str, int]) -> str:
    shown = [f"{name} ({number})" for name, number in list(counts.items())[:NAMES_SHOWN]]
    more = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _warn(found: LabelledCells, label: str, kept_rare: Mapping[str, int]) -> None:
    parts = [f"{number:,} cells {reason}" for reason, number in found.left_out.items()]
    lines = []
    if parts:
        lines.append(f"Left out of fine-tuning on {label!r}: {'; '.join(parts)}.")
    if found.untrained:
        lines.append(f"Without training cells in this split: {_listed(found.untrained)}.")
    if kept_rare:
        lines.append(f"Learned from very few cells, as told: {_listed(kept_rare)}.")
    if lines:
        warnings.warn(" ".join(lines), UserWarning, stacklevel=3)


def describe(found: LabelledCells) -> dict[str, Any]:
    """What became of the cells, for a report; JSON-able."""
    return {"classes": found.counts(), "left_out": found.left_out, "types_without_training_cells": found.untrained}
