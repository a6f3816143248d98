"""The decoder: a pre-norm Performer over all positions of a cell: expressed, hidden and zero genes alike.

Nine positions of ten are zero genes, whose input is the same in every cell. So the first layer computes their
keys, values and queries once a batch and corrects the sums over keys for the genes that a cell does not have
zero; and the last layer computes queries and feed-forward only where a prediction is wanted. Both are the same
numbers as every layer over every position, which `place_genes` and plain layers give. docs/speed.md has the
equations.
"""
# B cells, S positions (genes, T, S), P placed genes a cell, M targets, D encoder width, E decoder width, H heads

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import maybe_autocast

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig

from .linear_attention import (
    ACCELERATOR_FEATURE_BUDGET,
    FEATURE_EPSILON,
    ExponentialSums,
    attend_shared_queries,
    attend_to_summary,
    largest_logit,
    scale_to_stabiliser,
    streaming_favor_attention,
    summarise_parts_of_keys,
)

# Sums that a cell does not have are subtracted from those of all zero genes. Float32 bears that while the largest
# logit subtracted is not far above the largest one left: e^4 costs two of seven digits.
LARGEST_SUBTRACTED_LOGIT = 4.0
# Entries of the feed-forward's wide activations held at once on a CPU: memory is slower than computing them again. But
# never fewer rows than these: each chunk reads all weights and adds to all their gradients.
CPU_WIDE_BUDGET = 2**20
CPU_FEWEST_ROWS = 2048


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

    def forward(
        self, hidden_states: Tensor, query_states: Tensor | None = None, *, key_weights: Tensor | None = None
    ) -> Tensor:
        """`(B, S, E)` to `(B, S, E)`; the features and their sums are float32 in every model dtype.

        Args:
            query_states: `(B, M, E)` what asks, if not every position does; the answer is then `(B, M, E)`.
            key_weights: `(B, S)` how often each position counts as a key.
        """
        query = self._heads(self.q_proj, hidden_states if query_states is None else query_states)
        key, value = self._heads(self.k_proj, hidden_states), self._heads(self.v_proj, hidden_states)
        with maybe_autocast(hidden_states.device.type, enabled=False):
            attended = streaming_favor_attention(query, key, value, self.projection, key_weights=key_weights)
        return self.o_proj(attended.transpose(1, 2).to(query.dtype).flatten(2))

    def summarise_in_chunks(self, hidden_states: Iterable[Tensor], key_weights: Iterable[Tensor | None]) -> Tensor:
        """What queries need to know of all positions, which come as `(B, S', E)` a few at a time; has no gradient."""
        keys_and_values = (
            (self._heads(self.k_proj, states), self._heads(self.v_proj, states), weights)
            for states, weights in zip(hidden_states, key_weights, strict=True)
        )
        return summarise_parts_of_keys(keys_and_values, self.projection)

    def summarise_with_zeros(self, zero_states: Tensor, placed_states: Tensor, placed_ids: Tensor) -> Tensor | None:
        """What queries need to know of all positions where all cells share the states of their zero genes.

        Args:
            zero_states: `(S, E)` each position as a zero gene.
            placed_states: `(B, P, E)` what stands in their place at `placed_ids`.
            placed_ids: `(B, P)`, padded with S.
        Returns: `(B, H, F, head width + 1)`; `None` where the subtraction would cost more than two digits.
        """
        zero_key, zero_value = self._heads(self.k_proj, zero_states[None]), self._heads(self.v_proj, zero_states[None])
        key, value = self._heads(self.k_proj, placed_states), self._heads(self.v_proj, placed_states)
        with maybe_autocast(zero_states.device.type, enabled=False):
            return _summarise_with_zeros(key, value, placed_ids, zero_key, zero_value, self.projection)

    def attend_to(self, summary: Tensor, hidden_states: Tensor) -> Tensor:
        """Attention of `(B, S, E)` to what was summarised, `(B, S, E)`; of `(S, E)`, asked in every cell: the same."""
        is_shared = hidden_states.dim() == 2
        query = self._heads(self.q_proj, hidden_states[None] if is_shared else hidden_states)
        with maybe_autocast(hidden_states.device.type, enabled=False):
            if is_shared:
                attended = attend_shared_queries(query[0], summary, self.projection)
            else:
                attended = attend_to_summary(query, summary, self.projection).transpose(1, 2).flatten(2)
        return self.o_proj(attended.to(query.dtype))

    def _heads(self, projection: nn.Linear, states: Tensor) -> Tensor:
        return projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _summarise_with_zeros(
    key: Tensor, value: Tensor, placed_ids: Tensor, zero_key: Tensor, zero_value: Tensor, projection: Tensor
) -> Tensor | None:
    """Sums over the keys of each cell: all zero genes, less those replaced, plus what replaces them.

    Args:
        key: `(B, H, P, head width)` of the placed genes, as `value`.
        placed_ids: `(B, P)`, padded with S.
        zero_key: `(1, H, S, head width)`, as `zero_value`.
    Returns: `(B, H, F, head width + 1)`, or `None` where float32 could not bear the subtraction.
    """
    num_cells, num_positions = len(placed_ids), zero_key.shape[2]
    is_padding = placed_ids.eq(num_positions)
    sign = (~is_padding).float()
    ids = placed_ids.masked_fill(is_padding, 0)
    replaced_key, replaced_value = (table[0][:, ids].transpose(0, 1) for table in (zero_key, zero_value))
    zero_sums, zero_value_sums, zero_reference, zero_maxima, _ = ExponentialSums.apply(
        zero_key, zero_value, None, projection, None
    )
    change_sums, change_value_sums, change_reference, change_maxima, _ = ExponentialSums.apply(
        torch.cat([key, replaced_key], dim=2),
        torch.cat([value, replaced_value], dim=2),
        torch.cat([sign, -sign], dim=1),
        projection,
        None,
    )
    # The stabiliser is the largest logit of the keys that the cell has: zero genes left, then placed genes.
    is_replaced = torch.zeros(num_cells, num_positions + 1, dtype=torch.bool, device=ids.device)
    is_replaced = is_replaced.scatter(1, placed_ids, True)[:, :num_positions]
    left = torch.where(is_replaced, -torch.inf, zero_maxima)
    placed = change_maxima[:, : ids.shape[1]].masked_fill(is_padding, -torch.inf)
    zero_winner, placed_winner = left.max(dim=1), placed.max(dim=1)
    winning_key = torch.where(
        (zero_winner.values >= placed_winner.values)[:, None, None],
        zero_key[0][:, zero_winner.indices].transpose(0, 1),
        key.take_along_dim(placed_winner.indices[:, None, None, None], dim=2).squeeze(2),
    )
    largest_left = torch.maximum(zero_winner.values, placed_winner.values)
    subtracted = torch.maximum(zero_reference, change_reference) - largest_left
    if subtracted.max() > LARGEST_SUBTRACTED_LOGIT:
        return None
    stabiliser = largest_logit(winning_key, projection)
    exponential_sums = scale_to_stabiliser(zero_sums, zero_reference, stabiliser) + scale_to_stabiliser(
        change_sums, change_reference, stabiliser
    )
    return exponential_sums + FEATURE_EPSILON * (zero_value_sums + change_value_sums)


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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent, which checkpoints the layer if it is told to."""
        if not self.gradient_checkpointing or not self.training:
            return super().__call__(*args, **kwargs)
        # torch ends computing a checkpoint again by an error, at the last tensor that is needed. Here that is the input
        # of a checkpoint within, the feed-forward's last chunk, and the error does not always get through that.
        with set_checkpoint_early_stop(False):
            return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        placed_states: Tensor | None = None,
        placed_ids: Tensor | None = None,
        *,
        query_slots: Tensor | None = None,
        key_weights: Tensor | None = None,
    ) -> Tensor:
        """Every position of every cell, `(B, S, E)` to `(B, S, E)`.

        Args:
            placed_states: `(B, P, E)`, with `placed_ids` `(B, P)`: then `hidden_states` is `(S, E)`, what all
                cells have in common, and these stand in its place.
            query_slots: `(B, M)` positions that are wanted: then the result is `(B, M, E)`.
            key_weights: `(B, S)` how often each position counts as a key.
        """
        if placed_states is not None and placed_ids is not None:
            attended = self._attend_from_shared_zeros(hidden_states, placed_states, placed_ids)
            if attended is not None:
                return self._feed_forward(attended)
            hidden_states = place_genes(hidden_states.expand(len(placed_ids), -1, -1), placed_states, placed_ids)
        if self._runs_in_chunks():
            return self._forward_in_chunks(hidden_states, query_slots, key_weights)
        normed = self.attention_norm(hidden_states)
        if query_slots is None:
            return self._feed_forward(hidden_states + self.attention(normed, key_weights=key_weights))
        queried = _take_slots(hidden_states, query_slots)
        # Normed once more: fewer rows than a second gather's gradient would have.
        attended = self.attention(normed, self.attention_norm(queried), key_weights=key_weights)
        return self._feed_forward(queried + attended)

    def _runs_in_chunks(self) -> bool:
        """Whether a few positions at a time may go through the layer: nothing of them has to be kept for gradients."""
        return not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _forward_in_chunks(
        self, hidden_states: Tensor, query_slots: Tensor | None, key_weights: Tensor | None
    ) -> Tensor:
        """The same without gradients: of what lies between input and output, only a few positions are ever held."""
        chunk_size = self._positions_at_once(hidden_states)
        chunks = hidden_states.split(chunk_size, dim=1)
        weights = [None] * len(chunks) if key_weights is None else key_weights.split(chunk_size, dim=1)
        summary = self.attention.summarise_in_chunks(map(self.attention_norm, chunks), weights)
        queried = hidden_states if query_slots is None else _take_slots(hidden_states, query_slots)

        def answer(states: Tensor) -> Tensor:
            return self._feed_forward_rows(states + self.attention.attend_to(summary, self.attention_norm(states)))

        return _fill(torch.empty_like(queried), answer, queried, chunk_size=chunk_size)

    def _attend_from_shared_zeros(
        self, zero_states: Tensor, placed_states: Tensor, placed_ids: Tensor
    ) -> Tensor | None:
        """States after attention, `(B, S, E)`; `None` where float32 could not bear the subtraction."""
        normed_zeros, normed_placed = self.attention_norm(zero_states), self.attention_norm(placed_states)
        summary = self.attention.summarise_with_zeros(normed_zeros, normed_placed, placed_ids)
        if summary is None:
            return None

        def answer(states: Tensor, normed: Tensor) -> Tensor:
            return states + self.attention.attend_to(summary, normed)

        if self._runs_in_chunks():
            of_zeros = zero_states.new_empty(len(placed_ids), *zero_states.shape)
            chunk_size = self._positions_at_once(of_zeros)
            of_zeros = _fill(of_zeros, answer, zero_states, normed_zeros, chunk_size=chunk_size)
        else:
            of_zeros = answer(zero_states, normed_zeros)
        return place_genes(of_zeros, answer(placed_states, normed_placed), placed_ids)

    def _positions_at_once(self, states: Tensor) -> int:
        """Positions of all cells of `(B, S, E)` that make `_rows_at_once` rows."""
        return max(self._rows_at_once(states.device) // len(states), 1)

    def _rows_at_once(self, device: torch.device) -> int:
        width = self.up_proj.out_features
        if device.type == "cpu":
            return max(CPU_WIDE_BUDGET // width, CPU_FEWEST_ROWS)
        return max(ACCELERATOR_FEATURE_BUDGET // width, 1)

    def _feed_forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, S, E)` to `(B, S, E)`; on a CPU never more of its wide activations at once than its cache holds."""
        rows = hidden_states.flatten(0, 1)
        chunk_size = self._rows_at_once(rows.device)
        if rows.device.type != "cpu" or len(rows) <= chunk_size or torch.compiler.is_compiling():
            return self._feed_forward_rows(hidden_states)
        if torch.is_grad_enabled():
            with set_checkpoint_early_stop(True):  # nothing lies within these
                chunks = rows.split(chunk_size)
                done = [checkpoint(self._feed_forward_rows, chunk, use_reentrant=False) for chunk in chunks]
            return torch.cat(done).view_as(hidden_states)
        result = _fill(torch.empty_like(rows), self._feed_forward_rows, rows, chunk_size=chunk_size)
        return result.view_as(hidden_states)

    def _feed_forward_rows(self, hidden_states: Tensor) -> Tensor:
        transformed = self.activation(self.up_proj(self.feed_forward_norm(hidden_states)))
        return hidden_states + self.down_proj(transformed)


def _fill(result: Tensor, compute: Callable[..., Tensor], *states: Tensor, chunk_size: int) -> Tensor:
    """`result` `(..., S, E)`, filled with what `compute` makes of a few positions of the states at a time."""
    chunks = (each.split(chunk_size, dim=-2) for each in (result, *states))
    for place, *given in zip(*chunks, strict=True):
        place.copy_(compute(*given))
    return result


def place_genes(zero_states: Tensor, placed_states: Tensor, placed_slots: Tensor) -> Tensor:
    """`(B, S, E)` with `placed_states` `(B, P, E)` at `placed_slots` `(B, P)`; slot S, padding's, is left out.

    Every cell has a placed gene: padding writes that one's state once more, without a gradient of its own, so that no
    row for padding has to be added to all positions and cut off again, each a copy of them.
    """
    is_padding = placed_slots.eq(zero_states.shape[1])
    first = is_padding.int().argmin(dim=1, keepdim=True)
    slots = torch.where(is_padding, placed_slots.gather(1, first), placed_slots)
    placed_states = placed_states.to(zero_states.dtype)
    repeated = placed_states.detach().take_along_dim(first[..., None], dim=1)
    states = torch.where(is_padding[..., None], repeated, placed_states)
    return zero_states.scatter(1, slots[..., None].expand_as(states), states)


def _take_slots(states: Tensor, slots: Tensor) -> Tensor:
    """`(B, S, E)` at `slots` `(B, M)`: `(B, M, E)`."""
    return states.gather(1, slots[..., None].expand(-1, -1, states.shape[-1]))


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
        placed_states: Tensor,
        placed_ids: Tensor,
        *,
        target_ids: Tensor | None = None,
        decoder_ids: Tensor | None = None,
        decoder_weights: Tensor | None = None,
    ) -> Tensor:
        """Decode every position of every cell, or the targets.

        Args:
            zero_states: `(S, D)` each position where a gene is zero.
            placed_states: `(B, P, D)` what is not zero: encoder output plus identity of visible genes, T and
                S, mask embedding plus identity of hidden genes.
            placed_ids: `(B, P)` their positions, padded with S; none twice in a cell.
            target_ids: `(B, M)` positions wanted; left out: all.
            decoder_ids: `(B, P')` rising: the positions shown, if not all. All of `placed_ids` and
                `target_ids` are among them.
            decoder_weights: `(B, P')` how often each counts as a key.
        Returns: `(B, M, E)` or `(B, S, E)` after the decoder's norm.
        """
        # Projecting before placing is the same map on fewer rows: a zero gene is the same in every cell.
        zero_states, placed_states = self.input_projection(zero_states), self.input_projection(placed_states)
        if decoder_ids is not None:
            is_padding = placed_ids.eq(self.num_positions)
            placed_ids = torch.searchsorted(decoder_ids, placed_ids).masked_fill(is_padding, decoder_ids.shape[1])
            target_ids = None if target_ids is None else torch.searchsorted(decoder_ids, target_ids)
        first, *others = self.layers
        if others and decoder_ids is None and len(placed_ids) > 1 and not torch.compiler.is_compiling():
            hidden_states = first(zero_states, placed_states, placed_ids)
        else:
            others = list(self.layers)
            shown = zero_states.expand(len(placed_ids), -1, -1) if decoder_ids is None else zero_states[decoder_ids]
            hidden_states = place_genes(shown, placed_states, placed_ids)
        for layer in others[:-1]:
            hidden_states = layer(hidden_states, key_weights=decoder_weights)
        return self.norm(others[-1](hidden_states, query_slots=target_ids, key_weights=decoder_weights))
