"""The decoder: a pre-norm Performer over all positions of a cell: expressed, hidden and zero genes alike."""
# B cells, S positions (genes, T, S), D encoder width, E decoder width, H heads

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import maybe_autocast

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig

from .linear_attention import streaming_favor_attention


class ScFoundationLinearAttention(nn.Module):
    """Multi-head FAVOR+ attention; its random features are weights of the checkpoint, never redrawn here."""

    projection: Tensor

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        inner_size = config.decoder_num_attention_heads * config.decoder_head_dim
        self.head_dim = config.decoder_head_dim
        self.q_proj = nn.Linear(config.decoder_hidden_size, inner_size)
        self.k_proj = nn.Linear(config.decoder_hidden_size, inner_size)
        self.v_proj = nn.Linear(config.decoder_hidden_size, inner_size)
        self.o_proj = nn.Linear(inner_size, config.decoder_hidden_size)
        assert config.decoder_num_random_features is not None  # the configuration fills it in
        self.register_buffer("projection", torch.empty(config.decoder_num_random_features, config.decoder_head_dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, S, E)` to `(B, S, E)`; the features and their sums are float32 in every model dtype."""
        split = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(split).transpose(1, 2)
        key = self.k_proj(hidden_states).view(split).transpose(1, 2)
        value = self.v_proj(hidden_states).view(split).transpose(1, 2)
        with maybe_autocast(hidden_states.device.type, enabled=False):
            attended = streaming_favor_attention(query, key, value, self.projection)
        return self.o_proj(attended.to(query.dtype).transpose(1, 2).flatten(2))


class ScFoundationDecoderLayer(GradientCheckpointingLayer):
    """Linear attention and feed-forward, each behind its norm."""

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.decoder_hidden_size, eps=config.layer_norm_eps)
        self.attention = ScFoundationLinearAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.decoder_hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(config.decoder_hidden_size, config.decoder_intermediate_size)
        self.activation = ACT2FN[config.decoder_hidden_act]
        self.down_proj = nn.Linear(config.decoder_intermediate_size, config.decoder_hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, S, E)` to `(B, S, E)`."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states))
        transformed = self.activation(self.up_proj(self.feed_forward_norm(hidden_states)))
        return hidden_states + self.down_proj(transformed)


class ScFoundationDecoder(nn.Module):
    """Narrow all positions to the decoder's width, put them in place, and run the layers."""

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        self.num_positions = config.num_positions
        self.input_projection = nn.Linear(config.hidden_size, config.decoder_hidden_size)
        self.layers = nn.ModuleList(ScFoundationDecoderLayer(config) for _ in range(config.decoder_num_hidden_layers))
        self.norm = nn.LayerNorm(config.decoder_hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        zero_states: Tensor,
        visible_states: Tensor,
        visible_cells: Tensor,
        visible_ids: Tensor,
        masked_states: Tensor | None,
        masked_ids: Tensor | None,
        *,
        num_cells: int,
    ) -> Tensor:
        """Decode every position of every cell.

        Args:
            zero_states: `(1, S + 1, D)` each position where a gene is zero; the last row is padding's.
            visible_states: `(tokens, D)` encoder output plus identity, all cells in a row, padding allowed.
            visible_cells: `(tokens,)` the cell each token belongs to.
            visible_ids: `(tokens,)` its position.
            masked_states: `(B, hidden genes, D)` mask embedding plus identity; `None`: nothing is hidden.
            masked_ids: `(B, hidden genes)` positions, padded with the padding id.
            num_cells: B.
        Returns: `(B, S, E)` after the decoder's norm.
        """
        # Projecting before placing is the same map on fewer rows: a zero gene is the same in every cell.
        placed = self.input_projection(zero_states).repeat(num_cells, 1, 1)  # (B, S + 1, E)
        placed = placed.index_put((visible_cells, visible_ids), self.input_projection(visible_states))
        if masked_states is not None and masked_ids is not None:
            cells = torch.arange(num_cells, device=masked_ids.device)[:, None]
            placed = placed.index_put((cells, masked_ids), self.input_projection(masked_states))
        hidden_states = placed[:, : self.num_positions]  # whatever padding wrote lies in the row behind
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.norm(hidden_states)
