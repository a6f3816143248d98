import builtins
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scfoundation_hf.modeling_scfoundation import attention
from scfoundation_hf.modeling_scfoundation.attention import (
    XformersLayout,
    attend,
    cell_of_token,
    eager_attention_forward,
    keep_padding_mask,
    prepare_attention,
    xformers_attention_forward,
)

HEADS, HEAD_DIM = 2, 8
LENGTHS = (4, 1, 6)


@pytest.fixture
def states() -> list[torch.Tensor]:
    """Query, key and value of each cell, `(3, 1, H, tokens, D)`."""
    torch.manual_seed(0)
    return [torch.randn(3, 1, HEADS, length, HEAD_DIM) for length in LENGTHS]


@pytest.fixture
def one_by_one(states) -> torch.Tensor:
    """Attention written out for each cell alone, all tokens in a row: `(1, tokens, H, D)`."""
    outputs = []
    for query, key, value in states:
        weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(HEAD_DIM), dim=-1)
        outputs.append((weights @ value).transpose(1, 2))
    return torch.cat(outputs, dim=1)


@pytest.fixture
def packed(states) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.cat(states, dim=3))


@pytest.fixture
def padded(states) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width = max(LENGTHS) + 2
    rows = [nn.functional.pad(cell, (0, 0, 0, width - cell.shape[3]), value=5.0) for cell in states]
    return tuple(torch.cat(rows, dim=1))


@pytest.fixture
def mask() -> torch.Tensor:
    return (torch.arange(max(LENGTHS) + 2) < torch.tensor(LENGTHS)[:, None]).long()


def config_for(backend: str) -> SimpleNamespace:
    return SimpleNamespace(_attn_implementation=backend)


def run(
    backend: str, states: tuple, mask: torch.Tensor | None, borders: torch.Tensor | None, *, dropout: float = 0.0
) -> torch.Tensor:
    module = nn.Module().eval()
    module.is_causal = False
    query = states[0]
    embeddings = torch.empty(query.shape[0], query.shape[2], HEADS * HEAD_DIM)
    layout = prepare_attention(config_for(backend), embeddings, mask, borders)
    return attend(module, *states, layout, backend=backend, scaling=HEAD_DIM**-0.5, dropout=dropout)[0]


BORDERS = torch.tensor([0, 4, 5, 11], dtype=torch.int32)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_packed_cells_see_only_themselves(backend, packed, one_by_one):
    torch.testing.assert_close(run(backend, packed, None, BORDERS), one_by_one)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_padded_cells_see_only_real_tokens(backend, padded, mask, one_by_one):
    torch.testing.assert_close(run(backend, padded, mask, None)[mask.bool()], one_by_one[0])


def test_sdpa_packs_cell_by_cell_and_never_builds_the_square_mask(packed):
    layout = prepare_attention(config_for("sdpa"), torch.empty(1, 11, 16), None, BORDERS)
    assert layout.token_counts == [4, 1, 6]
    assert layout.mask is None


def test_sdpa_takes_all_packed_cells_at_once_where_a_kernel_does(monkeypatch, packed, one_by_one):
    calls = []

    def attend_by_borders(query, key, value, borders, key_borders, longest, longest_key, *, scale):
        """What torch's `varlen_attn` computes: `(tokens, H, D)`."""
        calls.append((borders.dtype, longest, longest_key))
        assert torch.equal(borders, key_borders)
        cells = zip(*(states.tensor_split(borders[1:-1].long()) for states in (query, key, value)), strict=True)
        return torch.cat(
            [
                torch.einsum("hqk,khd->qhd", (torch.einsum("qhd,khd->hqk", q, k) * scale).softmax(-1), v)
                for q, k, v in cells
            ]
        )

    monkeypatch.setattr(attention, "_has_packed_kernel", lambda states: True)
    monkeypatch.setattr(attention, "varlen_attn", attend_by_borders)
    torch.testing.assert_close(run("sdpa", packed, None, BORDERS.long()), one_by_one)
    assert calls == [(torch.int32, 6, 6)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 1e-9], ids=["one launch", "cell by cell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_packed_cells_on_a_gpu(packed, one_by_one, dtype, dropout):
    """Outputs and gradients, by the kernel that takes all cells and by the one that takes each."""
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    gradient = torch.randn_like(one_by_one)
    expected = [tensor.clone().requires_grad_() for tensor in packed]
    run("eager", expected, None, BORDERS).backward(gradient)
    states = [tensor.to("cuda", dtype).requires_grad_() for tensor in packed]
    attended = run("sdpa", states, None, BORDERS.cuda(), dropout=dropout)
    attended.backward(gradient.to("cuda", dtype))
    torch.testing.assert_close(attended.float().cpu(), one_by_one, **tolerance)
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours.grad.float().cpu(), theirs.grad, **tolerance)


def test_which_states_have_a_packed_kernel(monkeypatch):
    def states(dtype=torch.bfloat16, head_dim=32, device="cuda"):
        return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 2, 9, head_dim))

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert attention._has_packed_kernel(states())
    assert not attention._has_packed_kernel(states(torch.float32))
    assert not attention._has_packed_kernel(states(head_dim=36))
    assert not attention._has_packed_kernel(states(head_dim=264))
    assert not attention._has_packed_kernel(states(device="cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not attention._has_packed_kernel(states())


def test_cudnn_is_left_out_unless_it_is_all_there_is():
    """The switches exist without a GPU too."""
    cuda, is_enabled = torch.device("cuda"), torch.backends.cuda.cudnn_sdp_enabled
    before = is_enabled()
    with attention._without_cudnn(cuda):
        assert not is_enabled()
    assert is_enabled() == before
    with pytest.raises(ZeroDivisionError), attention._without_cudnn(cuda):
        raise ZeroDivisionError
    assert is_enabled() == before
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), attention._without_cudnn(cuda):
        assert is_enabled()
    with attention._without_cudnn(torch.device("cpu")):
        assert is_enabled() == before


@pytest.mark.parametrize("max_length", [None, 6])
@pytest.mark.parametrize("backend", ["flash_attention_2", "kernels-community/flash-attn3"])
def test_flash_gets_the_borders_transformers_reads(backend, max_length):
    layout = prepare_attention(config_for(backend), torch.empty(1, 11, 16), None, BORDERS.long(), max_length=max_length)
    arguments = layout.backend_arguments
    assert (layout.mask, layout.token_counts) == (None, None)
    assert (arguments["max_length_q"], arguments["max_length_k"]) == (6, 6)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert arguments[name].dtype == torch.int32
        assert torch.equal(arguments[name], BORDERS)


def test_unknown_backends_do_not_get_packed_cells():
    with pytest.raises(ValueError, match="backend 'paged_sdpa' is not known to take packed cells; choose eager, sdpa"):
        prepare_attention(config_for("paged_sdpa"), torch.empty(1, 11, 16), None, BORDERS)


def test_cell_of_token():
    assert cell_of_token(BORDERS, 11).tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2]


def test_eager_returns_weights_that_sum_to_one_and_drops_some_in_training(packed):
    module = nn.Module()
    output, weights = eager_attention_forward(module.eval(), *packed, None, scaling=1.0, dropout=0.5)
    assert output.shape == (1, 11, HEADS, HEAD_DIM)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, HEADS, 11))
    torch.manual_seed(0)
    _, dropped = eager_attention_forward(module.train(), *packed, None, scaling=1.0, dropout=0.5)
    assert (dropped == 0).any()


# xFormers: its kernels need a GPU, so here its call is replaced by SDPA under the mask that it was given.


def attention_by_materialized_mask(query, key, value, *, attn_bias, p, scale):
    """What `memory_efficient_attention` computes: `(1, tokens, H, D)` under a block-diagonal mask."""
    assert p == 0.0
    bias = attn_bias.materialize((query.shape[1], key.shape[1]), dtype=query.dtype)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale).transpose(1, 2)


@pytest.fixture
def xformers_ops(monkeypatch):
    ops = pytest.importorskip("xformers.ops", exc_type=ImportError)
    monkeypatch.setattr(ops, "memory_efficient_attention", attention_by_materialized_mask)


@pytest.mark.filterwarnings("ignore")  # xFormers says at import that this machine has no GPU
def test_xformers_packed(xformers_ops, packed, one_by_one):
    torch.testing.assert_close(run("xformers", packed, None, BORDERS), one_by_one)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flip", [False, True], ids=["right-padded", "left-padded"])
def test_xformers_padded(xformers_ops, padded, mask, one_by_one, flip):
    if flip:
        padded, mask = tuple(tensor.roll(2, dims=2) for tensor in padded), mask.roll(2, dims=1)
    attended = run("xformers", padded, mask, None)
    torch.testing.assert_close(attended[mask.bool()], one_by_one[0])
    assert not attended[~mask.bool()].any()


@pytest.mark.filterwarnings("ignore")
def test_xformers_without_a_gpu_says_so(packed):
    pytest.importorskip("xformers.ops", exc_type=ImportError)
    with pytest.raises(NotImplementedError, match=r"no attention operator for torch\.float32 on cpu"):
        run("xformers", packed, None, BORDERS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_xformers_kernel(packed, one_by_one, dtype):
    pytest.importorskip("xformers.ops", exc_type=ImportError)
    states = tuple(tensor.to("cuda", dtype) for tensor in packed)
    attended = run("xformers", states, None, BORDERS.cuda())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attended.float().cpu(), one_by_one, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore")
def test_xformers_needs_to_know_the_padding():
    pytest.importorskip("xformers.ops", exc_type=ImportError)
    with pytest.raises(ValueError, match="'xformers' needs attention_mask for a padded batch"):
        prepare_attention(config_for("xformers"), torch.empty(2, 3, 16), None, None)


def test_missing_xformers_is_named(monkeypatch, packed):
    original_import = builtins.__import__

    def without_xformers(name, *args, **kwargs):
        if name.startswith("xformers"):
            raise ImportError(name)
        return original_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_xformers)
    with pytest.raises(ImportError, match="needs xFormers: pip install xformers"):
        prepare_attention(config_for("xformers"), torch.empty(1, 11, 16), None, BORDERS)
    with pytest.raises(ImportError, match="needs xFormers: pip install xformers"):
        xformers_attention_forward(nn.Module(), *packed, XformersLayout(None, None), scaling=1.0)


def test_xformers_is_registered_with_its_mask():
    """A backend without a mask function would get no padding mask, silently."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert ALL_ATTENTION_FUNCTIONS["xformers"] is xformers_attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS["xformers"] is keep_padding_mask
    mask = torch.ones(2, 3)
    assert keep_padding_mask(attention_mask=mask, q_length=3) is mask
    assert attention.ALL_ATTENTION_FUNCTIONS is ALL_ATTENTION_FUNCTIONS
