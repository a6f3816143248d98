"""The training objective: mean squared error over the genes that were hidden."""
# B cells, M targets

import torch
from torch import Tensor, nn

IGNORED_LABEL = -100


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
