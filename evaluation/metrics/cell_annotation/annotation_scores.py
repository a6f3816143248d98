"""How good called cell types are, from labels and calls: the one definition that training, benchmarks and metric share.

It lies beside the metric because `evaluate` fetches the files of that folder, and no others. Imports numpy and
scikit-learn only.
"""
# C cells, K classes

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

Names = Sequence[str] | np.ndarray
CALIBRATION_BINS = 15  # Guo et al. 2017, "On Calibration of Modern Neural Networks"


def annotation_scores(
    true: Names,
    predicted: Names,
    probabilities: np.ndarray | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Macro F1 and what belongs to it.

    Means over classes are over those that occur in `true`, whatever is called: so predictors of the same cells are
    divided by the same number. A call of any other class, or "unassigned", costs its true class the recall.

    Args:
        true: `(C,)` the label of each cell.
        predicted: `(C,)` the call for each cell.
        probabilities: `(C, K)` of each class; rows need not sum to 1, their largest entry is the confidence.
        classes: `(K,)` names of the columns of `probabilities`; also the order of `per_class`, with any others behind.
    Returns: `macro_f1`, `weighted_f1`, `accuracy`, `balanced_accuracy`; `per_class`, for every class that occurs in
        `true` or `predicted`: `precision`, `recall`, `f1`, `support` (cells); with `probabilities` also
        `expected_calibration_error`, over 15 bins of equal width. F1 and precision of a class that is never called
        are 0.
    Raises: ValueError: if lengths or shapes do not fit, a label is missing, there is no cell, or a probability is not
        within 0 and 1.
    """
    labels, calls = _as_names(true, "true"), _as_names(predicted, "predicted")
    if len(labels) != len(calls) or not len(labels):
        raise ValueError(f"Scores need one call a cell: {len(labels)} labels, {len(calls)} calls.")
    names = _ordered(labels, calls, classes)
    precision, recall, f1, support = precision_recall_fscore_support(labels, calls, labels=names, zero_division=0)
    occurs = support > 0
    scores: dict[str, Any] = {
        "macro_f1": float(f1[occurs].mean()),
        "weighted_f1": float(np.average(f1, weights=support)),
        "accuracy": float(np.mean(labels == calls)),
        "balanced_accuracy": float(recall[occurs].mean()),
        "per_class": {
            name: {
                "precision": float(precision[number]),
                "recall": float(recall[number]),
                "f1": float(f1[number]),
                "support": int(support[number]),
            }
            for number, name in enumerate(names)
        },
    }
    if probabilities is not None:
        if classes is None:
            raise ValueError("Pass classes, the names of the columns of probabilities.")
        scores["expected_calibration_error"] = expected_calibration_error(labels, probabilities, classes=classes)
    return scores


def expected_calibration_error(true: Names, probabilities: np.ndarray, *, classes: Sequence[str]) -> float:
    """Mean distance between confidence and accuracy, over 15 bins of equal width, weighed by their cells.

    The call is the class of the largest probability, which is the confidence; the first of several equal ones. A cell
    whose label is none of `classes` is called wrongly.

    Args and Raises: as for `annotation_scores`.
    Source: Guo et al. 2017, ICML, equation 3.
    """
    labels = _as_names(true, "true")
    table = np.asarray(probabilities, dtype=np.float64)
    if table.shape != (len(labels), len(classes)):
        raise ValueError(
            f"probabilities have shape {table.shape}; expected ({len(labels)}, {len(classes)}), a row a cell and a "
            "column a class."
        )
    if len(set(classes)) < len(classes):
        raise ValueError(f"A class is named twice: {', '.join(map(str, classes))}.")
    if not ((table >= 0) & (table <= 1 + 1e-6)).all():  # not true of NaN either
        cell, column = np.argwhere(~((table >= 0) & (table <= 1 + 1e-6)))[0]
        raise ValueError(
            f"The probability of {classes[column]!r} in cell {cell} is {table[cell, column]}, not within 0 and 1. "
            "Are these logits?"
        )
    confidence = table.max(axis=1)
    is_right = np.asarray(classes, dtype=object)[table.argmax(axis=1)] == labels
    # Bins are open below and closed above, as in the source.
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=is_right - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def _as_names(values: Names, what: str) -> np.ndarray:
    names = np.asarray(values, dtype=object)
    if names.ndim != 1:
        raise ValueError(f"{what} has shape {names.shape}; expected one name a cell.")
    for cell, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(f"The {what} cell type of cell {cell} is {name!r}; expected a name.")
    return names


def _ordered(labels: np.ndarray, calls: np.ndarray, classes: Sequence[str] | None) -> list[str]:
    """All names that occur, those of `classes` first and in its order."""
    found = set(labels) | set(calls)
    first = [name for name in classes or () if name in found]
    return first + sorted(found.difference(first))
