"""The training objectives: squared error over hidden genes, cross entropy over cell types and its variants."""
# B cells, M targets, C cell types

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from scfoundation_hf.configuration.configuration_scfoundation import (
    ClassificationLoss,
    check_class_weights,
)

IGNORED_LABEL = -100
CLASS_WEIGHT_BOUND = 50  # of the paper's formula


def masked_mean_squared_error(
    predicted_values: Tensor, labels: Tensor, *, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Mean squared error over valid targets.

    Args:
        predicted_values: `(B, M)` log1p(CP10k).
        labels: `(B, M)` true values; -100 marks positions that do not count.
        num_items_in_batch: divide by this instead of by the valid targets of these cells, so that the sum
            over accumulation steps and devices is the mean over the whole batch.
    Returns: float32 scalar; 0 if no target is valid.
    Raises: ValueError: if the two shapes differ.
    Source: paper, Methods, "Pretraining": regression loss on masked genes.
    """
    if predicted_values.shape != labels.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, predictions {tuple(predicted_values.shape)}; pass "
            "target_ids of the labels' shape, or labels for every gene."
        )
    valid = labels != IGNORED_LABEL
    errors = nn.functional.mse_loss(predicted_values.float(), labels.float(), reduction="none")
    total = torch.where(valid, errors, 0).sum()
    if num_items_in_batch is None:
        return total / valid.sum().clamp(min=1)
    return total / num_items_in_batch


def cell_classification_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    kind: ClassificationLoss = "cross_entropy",
    class_weights: Sequence[float] | None = None,
    focal_gamma: float = 2.0,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean loss over the labelled cells.

    With p the probability that a cell's true type is given, w the weight of that type, "cross_entropy" is -ln p,
    "weighted_cross_entropy" -w ln p, and "focal" -w (1 - p)^gamma ln p. The weights are scaled to a mean of 1 over the
    types, so that only their ratios count. The sum is divided by the number of cells, not by the sum of their weights
    as torch does: parts of a batch then add up to the whole, and a rare type weighs the same in every batch.

    Args:
        logits: `(B, C)`.
        labels: int64 `(B,)`, 0 to C - 1; -100 marks cells without a label.
        kind: which of the three.
        class_weights: one for each type; needed for "weighted_cross_entropy", may be left out for "focal".
        focal_gamma: how much sure and right cells lose of their weight; 0 gives cross entropy.
        num_items_in_batch: divide by this instead of by the labelled cells given, as `masked_mean_squared_error` does.
    Returns: float32 scalar; 0 if no cell is labelled.
    Raises: ValueError: if labels and logits do not fit, or weights are missing, too many or not asked for.
    Source: focal: Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5.
    """
    check_class_weights(kind, class_weights, num_classes=logits.shape[-1])
    _check_labels(labels, logits)
    losses = nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="none")
    if kind == "focal":
        wrong = -torch.expm1(-losses)
        # Away from 0, where the derivative of a power below 1 is infinite.
        losses = losses * wrong.clamp(min=torch.finfo(wrong.dtype).tiny) ** focal_gamma
    valid = labels != IGNORED_LABEL
    if class_weights is not None:
        weights = torch.tensor(class_weights, dtype=losses.dtype, device=losses.device)
        losses = losses * (weights / weights.mean())[labels.where(valid, 0)]
    if num_items_in_batch is None:
        return losses.sum() / valid.sum().clamp(min=1)
    return losses.sum() / num_items_in_batch


def class_weights_as_printed(class_counts: Sequence[int]) -> list[float]:
    """Weights of cell types as the paper prints them: w_i = B_i / sum B, B_i = max(max A / A_i, 50).

    A is how many training cells each type has. Taken literally, types up to 50 times rarer than the commonest all
    weigh the same, and only rarer ones weigh more, without bound. `capped_class_weights` is what may have been meant.

    Args:
        class_counts: training cells of each type.
    Returns: weights that sum to 1.
    Raises: ValueError: if a type has no cell.
    Source: Hao et al. 2024, Methods, cell type annotation. The released code has no such loss.
    """
    return _normalise(max(ratio, CLASS_WEIGHT_BOUND) for ratio in _rarity(class_counts))


def capped_class_weights(class_counts: Sequence[int]) -> list[float]:
    """Weights of cell types that grow with rarity up to 50: w_i = B_i / sum B, B_i = min(max A / A_i, 50).

    Not what the paper prints, which has the maximum in place of the minimum: see `class_weights_as_printed`.
    Arguments, what returns and what raises are the same.
    """
    return _normalise(min(ratio, CLASS_WEIGHT_BOUND) for ratio in _rarity(class_counts))


def _rarity(class_counts: Sequence[int]) -> list[float]:
    """How many times rarer each type is than the commonest."""
    for index, count in enumerate(class_counts):
        if count < 1:
            raise ValueError(
                f"Class {index} of {len(class_counts)} has {count} cells, so it has no weight; leave out its label."
            )
    return [max(class_counts) / count for count in class_counts]


def _normalise(balances: Iterable[float]) -> list[float]:
    balances = list(balances)
    return [balance / sum(balances) for balance in balances]


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected one int64 class a cell, "
            f"shape ({len(logits)},)."
        )
    if torch.compiler.is_compiling():
        return  # asking would split the graph
    unknown = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= logits.shape[-1]))
    if bool(unknown.any()):
        row = int(unknown.nonzero()[0])
        raise ValueError(
            f"The label of cell {row} of the batch is {int(labels[row])}; the model has classes 0 to "
            f"{logits.shape[-1] - 1} (num_labels {logits.shape[-1]}), and {IGNORED_LABEL} for cells without a label."
        )
