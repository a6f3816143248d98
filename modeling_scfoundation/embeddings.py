"""From (gene id, value) to a vector: the first step of the encoder, and again the input of the decoder.

A position's vector is the sum of what it measures (value embedding) and which gene it is (identity
embedding).
"""
# B cells, N positions, K bins, D width

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig


class Float32Linear(nn.Linear):
    """A linear map computed in float32 whatever the dtype of its weights."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `(..., in_features)` to float32 `(..., out_features)`."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


class ScFoundationBinScores(Float32Linear):
    """The first layer of the value embedding; a class of its own because it is drawn wider than other layers."""


class ScFoundationValueEmbedding(nn.Module):
    """Embed a scalar as a learned soft mixture of bins; hidden genes get one learned vector instead.

    Runs in float32 in every model dtype, under autocast too: log values lose digits in bfloat16.

    Source: paper, Methods, "Value embedding"; `AutoDiscretizationEmbedding2` of the original.
    """

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        self.bin_alpha = config.bin_alpha
        self.bin_scores = ScFoundationBinScores(1, config.num_bins)
        self.bin_mixing = Float32Linear(config.num_bins, config.num_bins)
        self.bin_embeddings = nn.Parameter(torch.empty(config.num_bins, config.hidden_size))
        self.mask_embedding = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, values: Tensor | None) -> Tensor:
        """Embed values.

        Args:
            values: `(B, N)` log1p(CP10k) of genes, log10 counts of T and S; `None` asks for the mask
                embedding.
        Returns: float32 `(B, N, D)`, or `(D,)` for `None`.
        """
        if values is None:
            return self.mask_embedding.float()
        with maybe_autocast(values.device.type, enabled=False):
            scores_BNK = nn.functional.leaky_relu(self.bin_scores(values[..., None]), negative_slope=0.1)
            weights_BNK = torch.softmax(self.bin_alpha * scores_BNK + self.bin_mixing(scores_BNK), dim=-1)
            return weights_BNK @ self.bin_embeddings.float()


class ScFoundationEmbeddings(nn.Module):
    """Value embedding plus identity embedding, in the model's dtype."""

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        self.value_embedding = ScFoundationValueEmbedding(config)
        # The padding row is an ordinary row, as in the released table; nobody reads what it makes.
        self.identity_embedding = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids: Tensor, values: Tensor | None) -> Tensor:
        """Embed positions.

        Args:
            input_ids: `(B, N)` genes, T, S or padding.
            values: float32, broadcastable to `(B, N)`; `None`: these positions are hidden from the model.
        Returns: `(B, N, D)` in the dtype of the identity table.
        """
        identities = self.identity_embedding(input_ids)
        measured = self.value_embedding(values)
        if torch.is_grad_enabled():
            return (measured + identities).to(identities.dtype)
        return identities.add_(measured)  # rounded alike, without the sum of all genes in float32
