"""FAVOR+: softmax attention approximated by random features, linear in the number of positions.

Both forms compute the original's formula, its 1e-4 inside the feature map included: at ordinary weight scales
that constant is as large as the exponentials it stands beside, so it shapes the answer and cannot be dropped.
For the same reason the key stabiliser G matters; here it is the maximum within one cell, over all heads,
positions and features, which is what the original computes when it is run one cell at a time.

Source: Choromanski et al. 2021 (FAVOR+); the Performer decoder of the original.
"""
# B cells, H heads, S positions, F random features, D head width

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

FEATURE_EPSILON = 1e-4
KEY_CHUNK_SIZE = 2048  # 17 MB of features a cell and 8 heads; shorter chunks are slower, whole cells slower still


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


def favor_attention(query: Tensor, key: Tensor, value: Tensor, projection: Tensor) -> Tensor:
    """FAVOR+ attention with all feature maps held at once: the formula itself, for tests and for reading.

    Args:
        query: `(B, H, S, D)`, as `key` and `value`.
        projection: `(F, D)` random features.
    Returns: float32 `(B, H, S, D)`.
    Source: original-computation of the Performer; the factors 1/sqrt(F) of both maps cancel and are left out.
    """
    query_logits, query_half_square = _project(query, projection)
    key_logits, key_half_square = _project(key, projection)
    query_stabiliser = query_logits.amax(dim=-1, keepdim=True)
    key_stabiliser = key_logits.amax(dim=(1, 2, 3), keepdim=True)
    query_features = torch.exp(query_logits - query_half_square - query_stabiliser) + FEATURE_EPSILON
    key_features = torch.exp(key_logits - key_half_square - key_stabiliser) + FEATURE_EPSILON
    numerator = query_features @ (key_features.transpose(-1, -2) @ value.float())
    return numerator / (query_features @ key_features.sum(dim=2)[..., None])


def streaming_favor_attention(
    query: Tensor, key: Tensor, value: Tensor, projection: Tensor, *, chunk_size: int = KEY_CHUNK_SIZE
) -> Tensor:
    """The same as `favor_attention`, never holding more than `chunk_size` positions' feature maps.

    Keys are summed up chunk by chunk under a running maximum; what was summed under a smaller one is scaled
    down when a larger one turns up. The 1e-4 does not scale with it, so it enters at the end as a rank-one
    term. When gradients are wanted each chunk's feature map is computed again in the backward pass.

    Args and returns: as `favor_attention`.
    """
    key_summary, feature_sum = _summarise_keys(key, value, projection, chunk_size)
    chunks = [
        _run_chunk(_read_summary, chunk, key_summary, feature_sum, projection)
        for chunk in query.split(chunk_size, dim=2)
    ]
    return torch.cat(chunks, dim=2)


def _project(states: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """Random-feature logits `(B, H, S, F)` and half the squared norm `(B, H, S, 1)`, in float32."""
    scaled = states.float() * states.shape[-1] ** -0.25
    return scaled @ projection.float().transpose(0, 1), scaled.square().sum(dim=-1, keepdim=True) / 2


def _summarise_keys(key: Tensor, value: Tensor, projection: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Sum of feature x value `(B, H, F, D)` and of features `(B, H, F)` over all keys."""
    num_cells, num_heads, num_positions, head_dim = key.shape
    num_features = projection.shape[0]
    running_maximum = key.new_full((num_cells, 1, 1, 1), -torch.inf, dtype=torch.float32)
    exponential_summary = key.new_zeros((num_cells, num_heads, num_features, head_dim), dtype=torch.float32)
    exponential_sum = key.new_zeros((num_cells, num_heads, num_features), dtype=torch.float32)
    state = (running_maximum, exponential_summary, exponential_sum)
    for key_chunk, value_chunk in zip(key.split(chunk_size, dim=2), value.split(chunk_size, dim=2), strict=True):
        state = _run_chunk(_add_keys, *state, key_chunk, value_chunk, projection)
    _, exponential_summary, exponential_sum = state
    value_sum = value.float().sum(dim=2)[:, :, None, :]
    return (
        exponential_summary + FEATURE_EPSILON * value_sum,
        exponential_sum + FEATURE_EPSILON * num_positions,
    )


def _add_keys(
    running_maximum: Tensor, summary: Tensor, total: Tensor, key: Tensor, value: Tensor, projection: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    logits, half_square = _project(key, projection)
    maximum = torch.maximum(running_maximum, logits.amax(dim=(1, 2, 3), keepdim=True))
    rescale = torch.exp(running_maximum - maximum)
    exponentials = torch.exp(logits - half_square - maximum)
    summary = summary * rescale + exponentials.transpose(-1, -2) @ value.float()
    return maximum, summary, total * rescale[..., 0] + exponentials.sum(dim=2)


def _read_summary(query: Tensor, summary: Tensor, total: Tensor, projection: Tensor) -> Tensor:
    logits, half_square = _project(query, projection)
    features = torch.exp(logits - half_square - logits.amax(dim=-1, keepdim=True)) + FEATURE_EPSILON
    return (features @ summary) / (features @ total[..., None])


def _run_chunk(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """Call `function`, keeping only its inputs for the backward pass."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return function(*tensors)
