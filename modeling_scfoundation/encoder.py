"""The encoder: a plain post-norm transformer over the expressed genes of a cell, T and S."""
# B cells, N tokens, H heads, D width

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig

from .attention import AttentionLayout, attend
from .dropout import ScFoundationDropout


class ScFoundationSelfAttention(nn.Module):
    """Multi-head self-attention among the tokens of a cell."""

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, layout: AttentionLayout) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of each cell: `(B, N, D)` to `(B, N, D)`; weights `(B, H, N, N)` if eager."""
        split = (*hidden_states.shape[:-1], -1, self.head_dim)
        attended, weights = attend(
            self,
            self.q_proj(hidden_states).view(split).transpose(1, 2),
            self.k_proj(hidden_states).view(split).transpose(1, 2),
            self.v_proj(hidden_states).view(split).transpose(1, 2),
            layout,
            backend=self.config._attn_implementation,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
        )
        return self.o_proj(attended.flatten(2)), weights


class ScFoundationEncoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with its norm behind the residual sum.

    Source: the original uses torch's `TransformerEncoderLayer` with `norm_first=False`.
    """

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        self.self_attn = ScFoundationSelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = ScFoundationDropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, layout: AttentionLayout) -> Tensor:
        """`(B, N, D)` to `(B, N, D)`."""
        attended, _ = self.self_attn(hidden_states, layout)
        hidden_states = self.attention_norm(hidden_states + self.dropout(attended))
        transformed = self.down_proj(self.dropout(self.activation(self.up_proj(hidden_states))))
        return self.feed_forward_norm(hidden_states + self.dropout(transformed))


class ScFoundationEncoder(nn.Module):
    """All encoder layers and the norm after the last."""

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ScFoundationEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, layout: AttentionLayout) -> Tensor:
        """`(B, N, D)` to `(B, N, D)`; rows of padding hold numbers that nobody reads."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, layout)
        return self.norm(hidden_states)
