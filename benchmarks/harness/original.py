"""The baseline: what the original code computes, the plain way: one cell at a time, everything held whole.

Written from the description of the computation, not from its code. The encoder is torch's own layer, as in the
original, so torch's fused path (which holds all attention weights) is taken in evaluation mode unless
`through_sdpa` switches it off; every position of the decoder goes through every layer, and the feature maps of
its linear attention are whole tensors. Its numbers equal our model's (tests/benchmarks/test_original.py), so the
time against it is a ratio at equal numbers.
"""
# L tokens of the cell, S positions (genes, T, S), D encoder width, E decoder width, H heads, F features, K bins

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.encoder import ScFoundationEncoderLayer
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining

MASK_VALUE, PAD_VALUE = 102.0, 103.0  # the original marks hidden and padded positions by these values
FEATURE_EPSILON = 1e-4


@dataclass(frozen=True)
class DenseCell:
    """One cell as the original takes it.

    Attributes:
        values: `(1, S)` log1p(CP10k) of all genes, then the log10 depths T and S; what is not expressed is 0.
        is_hidden: `(1, S)` positions that are shown to the decoder as the mask; `None`: none.
        target_ids: `(M,)` positions whose value is asked for in training.
        labels: `(M,)` their values.
    """

    values: Tensor
    is_hidden: Tensor | None = None
    target_ids: Tensor | None = None
    labels: Tensor | None = None


def dense_cells(batch: Mapping[str, Any], config: ScFoundationConfig) -> list[DenseCell]:
    """The cells of a packed batch (docs/batch-contract.md), one by one."""
    borders = batch["cu_seq_lens_q"].tolist()
    cells = []
    for cell, (start, end) in enumerate(pairwise(borders)):
        values = batch["values"].new_zeros(1, config.num_positions)
        values[0, batch["input_ids"][0, start:end]] = batch["values"][0, start:end]
        is_hidden = target_ids = labels = None
        if "masked_ids" in batch:
            hidden = batch["masked_ids"][cell]
            is_hidden = torch.zeros_like(values, dtype=torch.bool)
            is_hidden[0, hidden[hidden < config.num_positions]] = True
        if "target_ids" in batch:
            is_target = batch["target_ids"][cell] < config.num_positions
            target_ids, labels = batch["target_ids"][cell][is_target], batch["labels"][cell][is_target]
        cells.append(DenseCell(values, is_hidden, target_ids, labels))
    return cells


@contextmanager
def through_sdpa(model: nn.Module) -> Iterator[None]:
    """torch's encoder layers through `scaled_dot_product_attention`, in its form that holds no attention weights.

    In evaluation that is one flag, which keeps torch from its fused path. In training torch takes the form that saves
    memory only without dropout on the attention weights, so that is off too.
    """
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    dropouts = [attention.dropout for attention in attentions]
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for attention in attentions:
        attention.dropout = 0.0
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
        for attention, dropout in zip(attentions, dropouts, strict=True):
            attention.dropout = dropout


class OriginalValueEmbedding(nn.Module):
    """A scalar as a soft mixture of bins; two values stand for the mask and for padding."""

    padding_embedding: Tensor

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        self.bin_alpha = config.bin_alpha
        self.bin_scores = nn.Linear(1, config.num_bins)
        self.bin_mixing = nn.Linear(config.num_bins, config.num_bins)
        self.bin_embeddings = nn.Parameter(torch.empty(config.num_bins, config.hidden_size))
        self.mask_embedding = nn.Parameter(torch.empty(config.hidden_size))
        # One cell at a time has no padding, but the original looks for it at every position.
        self.register_buffer("padding_embedding", torch.zeros(config.hidden_size), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """`(1, N)` to `(1, N, D)`."""
        scores_NK = nn.functional.leaky_relu(self.bin_scores(values[..., None]), negative_slope=0.1)
        weights_NK = torch.softmax(self.bin_alpha * scores_NK + self.bin_mixing(scores_NK), dim=-1)
        embedded = weights_NK @ self.bin_embeddings
        embedded = torch.where((values == MASK_VALUE)[..., None], self.mask_embedding, embedded)
        return torch.where((values == PAD_VALUE)[..., None], self.padding_embedding, embedded)


class OriginalLinearAttention(nn.Module):
    """FAVOR+ with both feature maps of all positions held whole."""

    projection: Tensor

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        inner = config.decoder_num_attention_heads * config.decoder_head_dim
        self.head_dim = config.decoder_head_dim
        self.q_proj = nn.Linear(config.decoder_hidden_size, inner)
        self.k_proj = nn.Linear(config.decoder_hidden_size, inner)
        self.v_proj = nn.Linear(config.decoder_hidden_size, inner)
        self.o_proj = nn.Linear(inner, config.decoder_hidden_size)
        assert config.decoder_num_random_features is not None
        self.register_buffer("projection", torch.empty(config.decoder_num_random_features, self.head_dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(1, S, E)` to `(1, S, E)`."""
        split = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (
            linear(hidden_states).view(split).transpose(1, 2) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        query_HSF, key_HSF = self._features(query, is_query=True), self._features(key, is_query=False)
        inverse = 1.0 / torch.einsum("bhsf,bhf->bhs", query_HSF, key_HSF.sum(dim=2))
        context = torch.einsum("bhsf,bhsd->bhfd", key_HSF, value)
        attended = torch.einsum("bhfd,bhsf,bhs->bhsd", context, query_HSF, inverse)
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def _features(self, states: Tensor, *, is_query: bool) -> Tensor:
        scale = self.head_dim**-0.25
        projected = torch.einsum("bhsd,fd->bhsf", scale * states, self.projection)
        half_square = states.square().sum(dim=-1, keepdim=True) / 2 * scale**2
        stabiliser = projected.amax(dim=-1, keepdim=True) if is_query else projected.amax()
        features = torch.exp(projected - half_square - stabiliser) + FEATURE_EPSILON
        return self.projection.shape[0] ** -0.5 * features


class OriginalDecoderLayer(nn.Module):
    """Pre-norm linear attention and feed-forward."""

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = OriginalLinearAttention(config)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(width, config.decoder_intermediate_size)
        self.down_proj = nn.Linear(config.decoder_intermediate_size, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(1, S, E)` to `(1, S, E)`."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states))
        return hidden_states + self.down_proj(nn.functional.gelu(self.up_proj(self.feed_forward_norm(hidden_states))))


class OriginalModel(nn.Module):
    """Encoder and decoder of the original for one cell at a time, with the weights of our model.

    Args:
        model: gives configuration and weights; parameters are copies.
    Source: the model of biomap-research/scFoundation, operation by operation.
    """

    def __init__(self, model: ScFoundationForPreTraining) -> None:
        super().__init__()
        config = self.config = model.config
        self.value_embedding = OriginalValueEmbedding(config)
        self.identity_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder_layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                dropout=config.hidden_dropout_prob,
                layer_norm_eps=config.layer_norm_eps,
                batch_first=True,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.encoder_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.input_projection = nn.Linear(config.hidden_size, config.decoder_hidden_size)
        self.decoder_layers = nn.ModuleList(
            OriginalDecoderLayer(config) for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(config.decoder_hidden_size, eps=config.layer_norm_eps)
        self.gene_norm = nn.LayerNorm(config.decoder_hidden_size, eps=config.layer_norm_eps)
        self.prediction_head = nn.Linear(config.decoder_hidden_size, 1)
        self._load_weights(model)
        self.to(model.device).train(model.training)

    def _load_weights(self, model: ScFoundationForPreTraining) -> None:
        embeddings, encoder, decoder = model.scfoundation.embeddings, model.scfoundation.encoder, model.decoder
        for layer, ours in zip(self.encoder_layers, encoder.layers, strict=True):
            layer.load_state_dict(_torch_layer_weights(ours))
        for module, same in (
            (self.value_embedding, embeddings.value_embedding),
            (self.identity_embedding, embeddings.identity_embedding),
            (self.encoder_norm, encoder.norm),
            (self.input_projection, decoder.input_projection),
            (self.decoder_layers, decoder.layers),
            (self.decoder_norm, decoder.norm),
            (self.gene_norm, model.gene_norm),
            (self.prediction_head, model.prediction_head),
        ):
            module.load_state_dict(same.state_dict())

    def encode(self, cell: DenseCell) -> tuple[Tensor, Tensor]:
        """Encoder output `(1, L, D)` of the expressed positions that are not hidden, and where they are, `(L,)`."""
        is_visible = cell.values > 0
        if cell.is_hidden is not None:
            is_visible = is_visible & ~cell.is_hidden
        positions = is_visible[0].nonzero().flatten()
        values = cell.values[:, positions]
        hidden_states = self.value_embedding(values) + self.identity_embedding(positions)
        is_padding = values == PAD_VALUE
        for layer in self.encoder_layers:
            hidden_states = layer(hidden_states, src_key_padding_mask=is_padding)
        return self.encoder_norm(hidden_states), positions

    def embed(self, cell: DenseCell) -> Tensor:
        """Cell embedding `(4 * D,)`: [S, T, max over genes, mean over genes]."""
        tokens = self.encode(cell)[0][0]
        genes = tokens[:-2]
        return torch.cat([tokens[-1], tokens[-2], genes.max(dim=0).values, genes.mean(dim=0)])

    def decode(self, cell: DenseCell) -> Tensor:
        """Vectors of all positions `(1, S, E)`, after both norms."""
        encoded, positions = self.encode(cell)
        values = cell.values
        if cell.is_hidden is not None:
            values = values.masked_fill(cell.is_hidden, MASK_VALUE)
        embedded = self.value_embedding(values)
        embedded = embedded.index_copy(1, positions, encoded.to(embedded.dtype))
        embedded = embedded + self.identity_embedding(torch.arange(values.shape[1], device=values.device))
        hidden_states = self.input_projection(embedded)
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states)
        return self.gene_norm(self.decoder_norm(hidden_states))

    def gene_embeddings(self, cell: DenseCell) -> Tensor:
        """Gene embeddings `(G, E)`."""
        return self.decode(cell)[0, : self.config.num_genes]

    def enhance(self, cell: DenseCell) -> Tensor:
        """Predicted log1p(CP10k) of all genes, `(G,)`."""
        return self.prediction_head(self.gene_embeddings(cell)).squeeze(-1)

    def loss(self, cell: DenseCell) -> Tensor:
        """Mean squared error at the targets, a scalar."""
        assert cell.labels is not None
        predicted = self.prediction_head(self.decode(cell))[0, cell.target_ids, 0]
        return nn.functional.mse_loss(predicted, cell.labels)


def _torch_layer_weights(layer: ScFoundationEncoderLayer) -> dict[str, Tensor]:
    """Our encoder layer's weights under the names of `torch.nn.TransformerEncoderLayer`, which stacks q, k and v."""
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    weights = {
        "self_attn.in_proj_weight": torch.cat([projection.weight for projection in projections]),
        "self_attn.in_proj_bias": torch.cat([projection.bias for projection in projections]),
    }
    same = {
        "self_attn.out_proj": attention.o_proj,
        "linear1": layer.up_proj,
        "linear2": layer.down_proj,
        "norm1": layer.attention_norm,
        "norm2": layer.feed_forward_norm,
    }
    for name, module in same.items():
        weights |= {f"{name}.{parameter}": tensor for parameter, tensor in module.state_dict().items()}
    return weights
