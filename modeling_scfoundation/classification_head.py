"""From one vector a cell to one logit a cell type: the head of the released fine-tuning script."""
# B cells, P width of the pooled vector, C cell types

import torch
from torch import Tensor, nn

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig


class ScFoundationClassificationHead(nn.Module):
    """Batch norm without weights, a hidden layer, ReLU, one logit a cell type.

    It takes pooled vectors and nothing else, so it can be trained on stored ones of a frozen encoder.

    A batch of one cell has no spread: normalised by its own statistics it would be zero, so torch refuses it. Yet an
    epoch may end with one, where the number of cells leaves a rest of one. Such a batch is normalised by the running
    statistics, as in evaluation, and leaves them as they are. Before any larger batch these say nothing: an error.

    Source: `model/finetune_model.py` of biomap-research/scFoundation, class `LinearProbingClassifier`, where the hidden
    layer has 256 units and the batch norm an epsilon of 1e-6.
    """

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        assert config.num_labels is not None  # 2 unless told otherwise
        pooled_size = {"all": 4, "max": 1}[config.classifier_pooling] * config.hidden_size
        self.norm = nn.BatchNorm1d(pooled_size, affine=False, eps=1e-6)
        self.hidden = nn.Linear(pooled_size, config.classifier_hidden_size)
        self.output = nn.Linear(config.classifier_hidden_size, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        """Score cells: `(B, P)` to `(B, C)`; P is `hidden_size`, four times that with all four pools.

        Raises: ValueError: in training, if the first batch ever has one cell.
        """
        pooled = pooled.to(self.hidden.weight.dtype)  # kept in float32 where the encoder is not
        if self.training and pooled.shape[0] == 1:
            normalised = self._norm_as_in_evaluation(pooled)
        else:
            normalised = self.norm(pooled)
        return self.output(nn.functional.relu(self.hidden(normalised)))

    def _norm_as_in_evaluation(self, pooled: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and not self.norm.num_batches_tracked:
            raise ValueError(
                "The first training batch has 1 cell, and batch norm has seen no other yet: train on batches of at "
                "least 2 cells. A single one is taken later, as the rest of an epoch."
            )
        return nn.functional.batch_norm(pooled, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)
