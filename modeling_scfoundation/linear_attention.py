"""FAVOR+: softmax attention approximated by random features, linear in the number of positions.

All forms compute the original's formula, its 1e-4 inside the feature map included: at ordinary weight scales
that constant is as large as the exponentials it stands beside, so it shapes the answer and cannot be dropped.
For the same reason the key stabiliser G matters; here it is the maximum within one cell, over all heads,
positions and features, which is what the original computes when it is run one cell at a time.

The streaming form is made of two sums, so that a caller may put together the keys of a cell from parts:

    keys    ->  sum_s exp(w . k_s - |k_s|^2 / 2 - G) [v_s, 1]      (`ExponentialSums`, then `scale_to_stabiliser`)
    queries ->  (numerator, denominator) = (exp(w . q - |q|^2 / 2 - max) + 1e-4) @ summary      (`read_summary`)

The denominator is the same sum as the numerator, of ones instead of values, so it rides along as one more
column; weights of keys scale that row `[v, 1]`.

Source: Choromanski et al. 2021 (FAVOR+); the Performer decoder of the original.
"""
# B cells, H heads, S positions, F random features, D head width, N = B * H, R cells that share their queries

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

FEATURE_EPSILON = 1e-4
# Entries of a feature map held at once. A CPU is fastest while they fit its cache; a GPU wants large launches.
CPU_FEATURE_BUDGET = 2**19
ACCELERATOR_FEATURE_BUDGET = 2**27


def draw_orthogonal_projection(num_features: int, head_dim: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Random directions, orthogonal in blocks of `head_dim`, with the lengths of Gaussian vectors.

    Returns: float32 `(num_features, head_dim)` on the CPU, so that one seed draws the same on every device.
    Source: Choromanski et al. 2021, section 3.3.
    """
    num_blocks = -(-num_features // head_dim)
    blocks = torch.randn(num_blocks, head_dim, head_dim, generator=generator, device="cpu")
    directions = torch.linalg.qr(blocks).Q.transpose(-1, -2).flatten(0, 1)[:num_features]
    lengths = torch.randn(num_features, head_dim, generator=generator, device="cpu").norm(dim=1, keepdim=True)
    return directions * lengths


def favor_attention(
    query: Tensor, key: Tensor, value: Tensor, projection: Tensor, *, key_weights: Tensor | None = None
) -> Tensor:
    """FAVOR+ attention with all feature maps held at once: the formula itself, for tests and for reading.

    Args:
        query: `(B, H, S, D)`, as `key` and `value`; the number of queries may differ.
        projection: `(F, D)` random features.
        key_weights: `(B, S)` how often each key counts; left out: once.
    Returns: float32 `(B, H, S, D)`.
    Source: original-computation of the Performer; the factors 1/sqrt(F) of both maps cancel and are left out.
    """
    query_logits, query_half_square = _project(query, projection)
    key_logits, key_half_square = _project(key, projection)
    query_stabiliser = query_logits.amax(dim=-1, keepdim=True)
    key_stabiliser = key_logits.amax(dim=(1, 2, 3), keepdim=True)
    query_features = torch.exp(query_logits - query_half_square - query_stabiliser) + FEATURE_EPSILON
    key_features = torch.exp(key_logits - key_half_square - key_stabiliser) + FEATURE_EPSILON
    if key_weights is not None:
        key_features = key_features * key_weights[:, None, :, None]
    numerator = query_features @ (key_features.transpose(-1, -2) @ value.float())
    return numerator / (query_features @ key_features.sum(dim=2)[..., None])


def streaming_favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    key_weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """The same as `favor_attention`, never holding more than `chunk_size` positions' feature maps.

    Memory does not grow with the number of positions, forward or backward: each chunk's feature map is computed
    again for the gradients.

    Args and returns: as `favor_attention`; `chunk_size` left out: by `chunk_size_for`.
    """
    summary = summarise_keys(key, value, projection, key_weights=key_weights, chunk_size=chunk_size)
    return attend_to_summary(query, summary, projection, chunk_size=chunk_size)


def summarise_keys(
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    key_weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """What queries need to know of all keys: sum of key feature times `[v, 1]`.

    Args:
        key: `(B, H, S, D)`, as `value`.
        key_weights: `(B, S)` how often each key counts; left out: once.
    Returns: float32 `(B, H, F, D + 1)`.
    """
    sums, value_sums, reference, _, winning_key = ExponentialSums.apply(key, value, key_weights, projection, chunk_size)
    stabiliser = largest_logit(winning_key, projection)
    return scale_to_stabiliser(sums, reference, stabiliser) + FEATURE_EPSILON * value_sums


def summarise_parts_of_keys(
    parts: Iterable[tuple[Tensor, Tensor, Tensor | None]], projection: Tensor, *, chunk_size: int | None = None
) -> Tensor:
    """`summarise_keys` of keys, values and weights that come a part of the positions at a time; has no gradient.

    Args:
        parts: `(B, H, S', D)` keys and values of some positions, and their weights `(B, S')` or `None`.
    """
    summed: tuple[Tensor, Tensor, Tensor] | None = None
    for key, value, weights in parts:
        with maybe_autocast(key.device.type, enabled=False):  # not around the loop: the parts are made in it
            sums, value_sums, reference, _, _ = ExponentialSums.apply(key, value, weights, projection, chunk_size)
        if summed is not None:
            larger = torch.maximum(reference, summed[2])
            sums = scale_to_stabiliser(sums, reference, larger) + scale_to_stabiliser(summed[0], summed[2], larger)
            value_sums, reference = value_sums + summed[1], larger
        summed = sums, value_sums, reference
    assert summed is not None
    sums, value_sums, _ = summed  # the largest logit of all is the stabiliser
    return sums + FEATURE_EPSILON * value_sums


def largest_logit(keys: Tensor, projection: Tensor) -> Tensor:
    """The largest random-feature logit of each cell's one key `(B, H, D)`, over heads and features: `(B,)`."""
    return _project(keys, projection)[0].amax(dim=(1, 2))


def scale_to_stabiliser(sums: Tensor, reference: Tensor, stabiliser: Tensor) -> Tensor:
    """Sums that were taken under a constant `reference` `(B,)` as if under `stabiliser` `(B,)`."""
    return sums * torch.exp(reference - stabiliser)[:, None, None, None]


def attend_to_summary(query: Tensor, summary: Tensor, projection: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """Attention of queries `(B, H, S, D)` to keys summed up by `summarise_keys`: float32 `(B, H, S, D)`.

    The result lies in memory as `(B, S, H, D)`, ready for its heads to be joined.
    """
    return _ReadSummary.apply(query, summary[:, :, :, None], projection, chunk_size).squeeze(1).transpose(1, 2)


def attend_shared_queries(
    query: Tensor, summary: Tensor, projection: Tensor, *, chunk_size: int | None = None
) -> Tensor:
    """The same queries `(H, S, D)` asked of every cell's summary `(B, H, F, D + 1)`: float32 `(B, S, H * D)`.

    Their feature map is computed once, and read by all cells in one matrix product a head.
    """
    readers = summary.permute(1, 2, 0, 3)[None]
    return _ReadSummary.apply(query[None], readers, projection, chunk_size).squeeze(0).flatten(2)


def chunk_size_for(rows_per_position: int, num_features: int, device: torch.device) -> int:
    """Positions whose feature maps are held at once: as many as fit the budget of the device."""
    budget = CPU_FEATURE_BUDGET if device.type == "cpu" else ACCELERATOR_FEATURE_BUDGET
    return max(budget // (rows_per_position * num_features), 32)


class ExponentialSums(torch.autograd.Function):
    """sum_s exp(w . k_s - |k_s|^2 / 2 - reference) [v_s, 1], streamed over positions.

    The reference is the largest logit met, taken as a constant: it is only the scale in which the sums are
    written, and cancels when they are brought to another. So no gradient flows through it here; that of the
    stabiliser flows where the stabiliser is chosen, through the winning key.
    """

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, weights: Tensor | None, projection: Tensor, chunk_size: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Keys and values `(B, H, S, D)`, each counted `weights` `(B, S)` times, to sums `(B, H, F, D + 1)`.

        Returns: the sums; the sum of `[v, 1]` `(B, H, 1, D + 1)`; the reference `(B,)`; the largest logit of each
            position over heads and features `(B, S)`; the key `(B, H, D)` of the position with the largest of all.
        """
        num_cells, num_heads, num_positions, head_dim = key.shape
        reference = key.new_full((num_cells,), -torch.inf, dtype=torch.float32)
        sums = key.new_zeros((num_cells, num_heads, projection.shape[0], head_dim + 1), dtype=torch.float32)
        value_sums = key.new_zeros((num_cells, num_heads, 1, head_dim + 1), dtype=torch.float32)
        row_maxima = key.new_empty((num_cells, num_positions), dtype=torch.float32)
        for cells, positions in _pieces(key, projection, chunk_size):
            logits, half_square = _project(key[cells, :, positions], projection)
            values = _with_ones(value, weights, cells, positions)
            maxima = logits.amax(dim=-1).amax(dim=1)
            larger = torch.maximum(reference[cells], maxima.amax(dim=1))
            exponentials = logits.sub_(half_square + larger[:, None, None, None]).exp_()
            sums[cells] *= torch.exp(reference[cells] - larger)[:, None, None, None]
            sums[cells].flatten(0, 1).baddbmm_(exponentials.flatten(0, 1).transpose(1, 2), values.flatten(0, 1))
            value_sums[cells] += values.sum(dim=2, keepdim=True)
            row_maxima[cells, positions] = maxima
            reference[cells] = larger
        winning_position = row_maxima.argmax(dim=1)
        ctx.save_for_backward(key, value, weights, projection, reference, winning_position)
        ctx.chunk_size = chunk_size
        ctx.mark_non_differentiable(reference, row_maxima)
        winning_key = key[torch.arange(num_cells, device=key.device), :, winning_position]
        return sums, value_sums, reference, row_maxima, winning_key

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Gradients for keys and values; each chunk's exponentials are computed again."""
        key, value, weights, projection, reference, winning_position = ctx.saved_tensors
        sums_gradient, value_sums_gradient, _, _, winning_key_gradient = gradients
        head_dim = key.shape[-1]
        key_gradient, value_gradient = torch.empty_like(key), torch.empty_like(value)
        with maybe_autocast(key.device.type, enabled=False):
            for cells, positions in _pieces(key, projection, ctx.chunk_size):
                scaled = _scale(key[cells, :, positions])
                logits, half_square = _project_scaled(scaled, projection)
                exponentials = logits.sub_(half_square + reference[cells, None, None, None]).exp_()
                values_gradient = exponentials @ sums_gradient[cells, :, :, :-1] + value_sums_gradient[cells, ..., :-1]
                if weights is not None:
                    values_gradient *= weights[cells, None, positions, None]
                value_gradient[cells, :, positions] = values_gradient
                values = _with_ones(value, weights, cells, positions)
                logits_gradient = (values @ sums_gradient[cells].transpose(2, 3)).mul_(exponentials)
                scaled_gradient = logits_gradient @ projection.float()
                scaled_gradient -= logits_gradient.sum(dim=-1, keepdim=True) * scaled
                key_gradient[cells, :, positions] = scaled_gradient.mul_(head_dim**-0.25)
        key_gradient[torch.arange(len(key), device=key.device), :, winning_position] += winning_key_gradient
        return key_gradient, value_gradient, None, None, None


class _ReadSummary(torch.autograd.Function):
    """(query features @ numerator) / (query features @ denominator), streamed over queries.

    R cells read the answers to the queries of each: their own summaries lie side by side.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, summary: Tensor, projection: Tensor, chunk_size: int | None) -> Tensor:
        """`(B, H, S, D)` queries and `(B, H, F, R, D + 1)` summaries to `(B, R, S, H, D)`."""
        num_cells, num_heads, num_queries, head_dim = query.shape
        readers = summary.shape[3:]
        columns = summary.flatten(3)
        constant = FEATURE_EPSILON * columns.sum(dim=2, keepdim=True)
        shape = (num_cells, readers[0], num_queries, num_heads)
        attended = query.new_empty((*shape, head_dim), dtype=torch.float32)
        denominator = query.new_empty((*shape, 1), dtype=torch.float32)
        for cells, positions in _pieces(query, projection, chunk_size):
            logits, half_square = _project(query[cells, :, positions], projection)
            exponentials = logits.sub_(half_square + logits.amax(dim=-1, keepdim=True)).exp_()
            read = torch.baddbmm(
                constant[cells].flatten(0, 1), exponentials.flatten(0, 1), columns[cells].flatten(0, 1)
            ).view(*exponentials.shape[:3], *readers)
            read = read.permute(0, 3, 2, 1, 4)
            denominator[cells, :, positions] = read[..., -1:]
            attended[cells, :, positions] = read[..., :-1].div_(read[..., -1:])
        ctx.save_for_backward(query, summary, projection, attended, denominator)
        ctx.chunk_size = chunk_size
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Gradients for queries and summaries; each chunk's exponentials are computed again."""
        query, summary, projection, attended, denominator = ctx.saved_tensors
        head_dim = query.shape[-1]
        columns = summary.flatten(3)
        columns_gradient = torch.zeros_like(columns)
        query_gradient = torch.empty_like(query)
        with maybe_autocast(query.device.type, enabled=False):
            for cells, positions in _pieces(query, projection, ctx.chunk_size):
                numerator_gradient = gradients[0][cells, :, positions] / denominator[cells, :, positions]
                denominator_gradient = -(numerator_gradient * attended[cells, :, positions]).sum(dim=-1, keepdim=True)
                read_gradient = torch.cat([numerator_gradient, denominator_gradient], dim=-1)
                read_gradient = read_gradient.permute(0, 3, 2, 1, 4).flatten(3)
                scaled = _scale(query[cells, :, positions])
                logits, half_square = _project_scaled(scaled, projection)
                largest = logits.max(dim=-1, keepdim=True)
                exponentials = logits.sub_(half_square + largest.values).exp_()
                columns_gradient[cells] += exponentials.transpose(2, 3) @ read_gradient
                columns_gradient[cells] += FEATURE_EPSILON * read_gradient.sum(dim=2, keepdim=True)
                logits_gradient = (read_gradient @ columns[cells].transpose(2, 3)).mul_(exponentials)
                total = logits_gradient.sum(dim=-1, keepdim=True)
                logits_gradient.scatter_add_(-1, largest.indices, -total)  # the stabiliser is one of the logits
                scaled_gradient = logits_gradient @ projection.float() - total * scaled
                query_gradient[cells, :, positions] = scaled_gradient.mul_(head_dim**-0.25)
        return query_gradient, columns_gradient.unflatten(3, summary.shape[3:]), None, None


def _pieces(states: Tensor, projection: Tensor, chunk_size: int | None) -> Iterator[tuple[slice, slice]]:
    """Cells and positions of `(B, H, S, D)` to work on at once: a part of one cell, or several whole cells.

    Not parts of several cells: their rows would lie apart in memory, and products of such are slower.
    """
    num_cells, num_heads, num_positions, _ = states.shape
    # A compiled graph writes out every turn of the loop; it must not have one for each cell.
    together = num_cells if torch.compiler.is_compiling() else 1
    chunk_size = chunk_size or chunk_size_for(together * num_heads, projection.shape[0], states.device)
    cells_at_once = max(chunk_size // max(num_positions, 1), together)
    for cell in range(0, num_cells, cells_at_once):
        for start in range(0, num_positions, chunk_size):
            yield slice(cell, cell + cells_at_once), slice(start, start + chunk_size)


def _with_ones(value: Tensor, weights: Tensor | None, cells: slice, positions: slice) -> Tensor:
    """`[v, 1]` of a piece, float32 `(B, H, S, D + 1)`, each row times its weight."""
    extended = torch.nn.functional.pad(value[cells, :, positions].float(), (0, 1), value=1.0)
    return extended if weights is None else extended.mul_(weights[cells, None, positions, None])


def _scale(states: Tensor) -> Tensor:
    return (states.float() * states.shape[-1] ** -0.25).contiguous()


def _project(states: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Random-feature logits `(..., S, F)` and half the squared norm `(..., S, 1)`, in float32."""
    return _project_scaled(_scale(states), projection)


def _project_scaled(scaled: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    return scaled @ projection.float().transpose(0, 1), scaled.square().sum(dim=-1, keepdim=True) / 2
