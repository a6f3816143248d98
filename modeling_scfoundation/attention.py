"""Full self-attention among the tokens of one cell, for padded and packed batches, over every backend.

`prepare_attention` runs once a forward pass and turns the batch's layout into what the chosen backend wants;
`attend` runs in each layer. A packed batch is all cells in one row, their borders in `cu_seq_lens_q`.
"""
# B cells, L tokens a row, H heads, D head width

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface, create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.utils.generic import is_flash_attention_requested

LARGEST_PACKED_HEAD_DIM = 256
XFORMERS_MISSING = "The attention backend 'xformers' needs xFormers: pip install xformers."


@dataclass
class AttentionLayout:
    """How the tokens of this batch lie, in the form the backend wants; made by `prepare_attention`.

    Args:
        mask: what the backend takes as its mask; `None`: every token of a row sees every other.
        token_counts: tokens of each cell, for backends that are called cell by cell.
        borders: `(cells + 1,)` int32 where these cells begin, for a kernel that takes all of them at once.
        backend_arguments: further keyword arguments of the backend.
    """

    mask: Any = None
    token_counts: list[int] | None = None
    borders: Tensor | None = None
    backend_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class XformersLayout:
    """Borders of the cells, and where the real tokens of a padded batch lie (`None`: no padding)."""

    block_mask: Any
    token_positions: Tensor | None


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, the only backend that returns its weights.

    Args:
        module: the attention layer; its `training` switches dropout.
        query: `(B, H, L, D)`, as `key` and `value`.
        attention_mask: additive, broadcastable to `(B, H, L, L)`.
    Returns: `(B, L, H, D)` and the weights `(B, H, L, L)`.
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def xformers_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: XformersLayout,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """xFormers' memory-efficient attention over the real tokens of all cells, with a block-diagonal mask.

    Returns: `(B, L, H, D)`, zero at padding, and no weights.
    Raises: NotImplementedError: from xFormers, where it has no operator for the device or dtype (so on every
        CPU).
    """
    try:  # here, not above: importing xFormers takes seconds and warns on machines that will never use it
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ImportError(XFORMERS_MISSING) from error
    rows, _, length, head_dim = query.shape
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]  # each (B * L, H, D)
    positions = attention_mask.token_positions
    if positions is not None:
        flat = [states.index_select(0, positions) for states in flat]
    try:
        attended = memory_efficient_attention(
            *(states[None] for states in flat),
            attn_bias=attention_mask.block_mask,
            p=dropout if module.training else 0.0,
            scale=scaling,
        )[0]
    except NotImplementedError as error:
        raise NotImplementedError(
            f"xFormers has no attention operator for {query.dtype} on {query.device.type}; take the backend "
            "sdpa, or another device or dtype."
        ) from error
    if positions is not None:
        attended = attended.new_zeros(rows * length, *attended.shape[1:]).index_copy(0, positions, attended)
    return attended.view(rows, length, -1, head_dim), None


def keep_padding_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask function of xFormers: the padding mask itself, `(B, L)`, read by `prepare_attention`."""
    return attention_mask


# Both registries, always: a backend that the mask registry lacks gets no padding mask at all, silently.
AttentionInterface.register("xformers", xformers_attention_forward)
AttentionMaskInterface.register("xformers", keep_padding_mask)


def prepare_attention(
    config: PreTrainedConfig,
    embeddings: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens: Tensor | None,
    max_length: int | None = None,
) -> AttentionLayout:
    """Express the layout of the batch for the backend in `config._attn_implementation`.

    Args:
        embeddings: `(B, L, D)`, `(1, L, D)` if packed; read for its shape, dtype and device.
        attention_mask: `(B, L)`, 1 for real tokens; unused if packed.
        cu_seq_lens: `(cells + 1,)` borders of the packed cells; `None`: the batch is padded.
        max_length: tokens of the longest packed cell, for flash attention; `None`: counted here.
    Raises: ValueError: if the backend cannot take packed cells, here or at all; ImportError: if xFormers is asked
        for and missing.
    """
    backend = config._attn_implementation
    if backend == "xformers":
        return _prepare_xformers(attention_mask, cu_seq_lens)
    if cu_seq_lens is None:
        mask = create_bidirectional_mask(config=config, inputs_embeds=embeddings, attention_mask=attention_mask)
        return AttentionLayout(mask=mask)
    if backend == "sdpa":
        return AttentionLayout(token_counts=cu_seq_lens.diff().tolist(), borders=cu_seq_lens.to(torch.int32))
    if is_flash_attention_requested(config):
        # transformers reads these four names and calls the variable-length kernel.
        longest = int(cu_seq_lens.diff().max()) if max_length is None else max_length
        borders = cu_seq_lens.to(torch.int32)
        return AttentionLayout(
            backend_arguments={
                "cu_seq_lens_q": borders,
                "cu_seq_lens_k": borders,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        )
    if backend == "flex_attention" and embeddings.device.type == "cpu":
        # torch 2.13: the compiled kernel reads out of bounds when the packed length changes.
        raise ValueError(
            "The attention backend 'flex_attention' cannot take packed cells on a CPU; choose sdpa, or pad the batch."
        )
    if backend in ("eager", "flex_attention"):
        mask = create_bidirectional_mask(
            config=config,
            inputs_embeds=embeddings,
            attention_mask=None,
            and_mask_function=_same_cell(cell_of_token(cu_seq_lens, embeddings.shape[1])),
        )
        return AttentionLayout(mask=mask)
    raise ValueError(
        f"The attention backend {backend!r} is not known to take packed cells; choose eager, sdpa, "
        "flex_attention, xformers or flash attention, or pad the batch (ScFoundationDataCollator)."
    )


def _prepare_xformers(attention_mask: Tensor | None, cu_seq_lens: Tensor | None) -> AttentionLayout:
    try:
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask
    except ImportError as error:
        raise ImportError(XFORMERS_MISSING) from error
    if cu_seq_lens is not None:
        return AttentionLayout(XformersLayout(BlockDiagonalMask.from_seqlens(cu_seq_lens.diff().tolist()), None))
    if attention_mask is None:
        raise ValueError("The attention backend 'xformers' needs attention_mask for a padded batch.")
    block_mask = BlockDiagonalMask.from_seqlens(attention_mask.sum(dim=1).tolist())
    return AttentionLayout(XformersLayout(block_mask, attention_mask.flatten().nonzero().flatten()))


def _same_cell(cell_of_each_token: Tensor) -> Callable[..., Tensor]:
    def same_cell(batch_index: Tensor, head_index: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return cell_of_each_token[query_index] == cell_of_each_token[key_index]

    return same_cell


def cell_of_token(cu_seq_lens: Tensor, num_tokens: int) -> Tensor:
    """Which cell each token of a packed row belongs to: `(num_tokens,)` int64."""
    positions = torch.arange(num_tokens, device=cu_seq_lens.device)
    return torch.bucketize(positions, cu_seq_lens[1:].to(positions.dtype), right=True)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: AttentionLayout,
    *,
    backend: str,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Attention within each cell by the named backend.

    Args:
        module: the attention layer, which backends ask for `training` and `is_causal`.
        query: `(B, H, L, D)`, as `key` and `value`; `(1, H, L, D)` if packed.
        layout: from `prepare_attention` with the same backend.
    Returns: `(B, L, H, D)`, and the weights `(B, H, L, L)` where the backend returns them (eager).
    """
    forward = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
    arguments = {"scaling": scaling, "dropout": dropout, **layout.backend_arguments}
    with _without_cudnn(query.device):
        if layout.token_counts is None:
            return forward(module, query, key, value, layout.mask, **arguments)
        if dropout == 0 and _has_packed_kernel(query):
            return _attend_packed(query, key, value, layout, scaling=scaling), None
        # Cell by cell costs the sum of the squared lengths; one masked row would cost the square of their sum.
        cells = zip(*(states.split(layout.token_counts, dim=2) for states in (query, key, value)), strict=True)
        return torch.cat([forward(module, *cell, None, **arguments)[0] for cell in cells], dim=1), None


def _has_packed_kernel(states: Tensor) -> bool:
    """Whether torch's own flash attention takes cells end to end: on NVIDIA GPUs from Ampere on, in half precision."""
    return (
        states.device.type == "cuda"
        and torch.version.cuda is not None
        and states.dtype in (torch.bfloat16, torch.float16)
        and states.shape[-1] % 8 == 0
        and states.shape[-1] <= LARGEST_PACKED_HEAD_DIM
        and torch.cuda.get_device_capability(states.device) >= (8, 0)
    )


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, *, scaling: float) -> Tensor:
    """All packed cells in one launch: `(1, H, L, D)` to `(1, L, H, D)`."""
    assert layout.token_counts is not None
    assert layout.borders is not None
    longest = max(layout.token_counts)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    attended = varlen_attn(query, key, value, layout.borders, layout.borders, longest, longest, scale=scaling)
    assert isinstance(attended, Tensor)  # a pair only where more is asked for
    return attended[None]


@contextmanager
def _without_cudnn(device: torch.device) -> Iterator[None]:
    """Keep SDPA from cuDNN's attention, unless that is the only one which the user allows.

    cuDNN makes a plan for every new shape, tens of milliseconds forward and backward, and cells have ever new lengths:
    on an H100, where torch prefers it, a training step of the 3M model took thirty times as long with it.
    """
    allows = torch.backends.cuda
    others = (allows.flash_sdp_enabled, allows.mem_efficient_sdp_enabled, allows.math_sdp_enabled)
    is_switched = (
        device.type == "cuda"
        and not torch.compiler.is_compiling()
        and allows.cudnn_sdp_enabled()
        and any(is_enabled() for is_enabled in others)
    )
    if not is_switched:
        yield
        return
    allows.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        allows.enable_cudnn_sdp(True)
