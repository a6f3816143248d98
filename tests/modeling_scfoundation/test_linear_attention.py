import math

import pytest
import torch
from torch import Tensor

from scfoundation_hf.modeling_scfoundation import linear_attention
from scfoundation_hf.modeling_scfoundation.linear_attention import (
    FEATURE_EPSILON,
    attend_shared_queries,
    chunk_size_for,
    draw_orthogonal_projection,
    favor_attention,
    streaming_favor_attention,
    summarise_keys,
    summarise_parts_of_keys,
)

CELLS, HEADS, POSITIONS, HEAD_DIM, FEATURES = 3, 2, 50, 8, 20


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    states = torch.randn(3, CELLS, HEADS, POSITIONS, HEAD_DIM) * 1.5
    return *states, draw_orthogonal_projection(FEATURES, HEAD_DIM)


def one_position_at_a_time(query: Tensor, key: Tensor, value: Tensor, projection: Tensor) -> Tensor:
    """The formula of original-computation.md section 6, in loops and float64, for one cell `(H, S, D)`."""
    query, key, value, projection = (tensor.double() for tensor in (query, key, value, projection))
    scale, ratio = HEAD_DIM**-0.25, FEATURES**-0.5
    stabiliser = max(float((projection @ (k * scale)).max()) for k in key.flatten(0, 1))
    output = torch.zeros_like(value)
    for head in range(HEADS):
        numerator = torch.zeros(FEATURES, HEAD_DIM, dtype=torch.float64)
        denominator = torch.zeros(FEATURES, dtype=torch.float64)
        for k, v in zip(key[head], value[head], strict=True):
            diagonal = k.square().sum() / 2 * HEAD_DIM**-0.5
            features = ratio * (torch.exp(projection @ (k * scale) - diagonal - stabiliser) + 1e-4)
            numerator += features[:, None] * v
            denominator += features
        for i, q in enumerate(query[head]):
            logits = projection @ (q * scale)
            diagonal = q.square().sum() / 2 * HEAD_DIM**-0.5
            features = ratio * (torch.exp(logits - diagonal - logits.max()) + 1e-4)
            output[head, i] = features @ numerator / (features @ denominator)
    return output


def test_plain_form_is_the_published_formula(inputs):
    expected = torch.stack([one_position_at_a_time(*cell, inputs[3]) for cell in zip(*inputs[:3], strict=True)])
    torch.testing.assert_close(favor_attention(*inputs).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 7, 25, 50, 512])
def test_streaming_form_equals_the_plain_one(inputs, chunk_size):
    streamed = streaming_favor_attention(*inputs, chunk_size=chunk_size)
    torch.testing.assert_close(streamed, favor_attention(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("largest_at", [0, 30, 49])
def test_a_large_key_in_any_chunk(inputs, largest_at):
    inputs[1][1, 0, largest_at] *= 4
    streamed = streaming_favor_attention(*inputs, chunk_size=7)
    torch.testing.assert_close(streamed, favor_attention(*inputs), rtol=1e-5, atol=1e-6)


def test_streaming_gradients_equal_the_plain_ones(inputs):
    gradients = []
    for attention in (favor_attention, lambda *args: streaming_favor_attention(*args, chunk_size=7)):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
        attention(*leaves, inputs[3]).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for plain, streamed in zip(*gradients, strict=True):
        torch.testing.assert_close(streamed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [None, torch.linspace(0.5, 2, CELLS * POSITIONS).view(CELLS, POSITIONS)])
@pytest.mark.parametrize("largest_at", [0, 30, 49])
def test_keys_may_come_in_parts(inputs, largest_at, weights):
    """Each part has a largest logit of its own; the stabiliser is that of all."""
    _, key, value, projection = inputs
    key[1, 0, largest_at] *= 4
    parts = [None] * 3 if weights is None else weights.split((20, 29, 1), dim=1)
    in_parts = zip(key.split((20, 29, 1), dim=2), value.split((20, 29, 1), dim=2), parts, strict=True)
    expected = summarise_keys(key, value, projection, key_weights=weights)
    torch.testing.assert_close(summarise_parts_of_keys(in_parts, projection), expected, rtol=1e-5, atol=1e-6)


def test_weights_of_keys_count_them_so_often(inputs):
    query, key, value, projection = inputs
    weights = torch.ones(CELLS, POSITIONS)
    weights[:, :10] = 2
    repeated_key, repeated_value = (torch.cat([states, states[:, :, :10]], dim=2) for states in (key, value))
    expected = favor_attention(query, repeated_key, repeated_value, projection)
    for attention in (favor_attention, streaming_favor_attention):
        torch.testing.assert_close(attention(*inputs, key_weights=weights), expected, rtol=1e-5, atol=1e-6)


def test_shared_queries_are_read_as_each_cell_s_own(inputs):
    query, key, value, projection = inputs
    summary = summarise_keys(key, value, projection)
    shared = attend_shared_queries(query[0], summary, projection, chunk_size=7)
    expected = favor_attention(query[:1].expand_as(query), key, value, projection).transpose(1, 2).flatten(2)
    torch.testing.assert_close(shared, expected, rtol=1e-5, atol=1e-6)


def test_chunks_follow_the_device():
    on_cpu = chunk_size_for(8, 266, torch.device("cpu"))
    assert on_cpu * 8 * 266 <= linear_attention.CPU_FEATURE_BUDGET
    assert chunk_size_for(8, 266, torch.device("cuda")) > on_cpu
    assert chunk_size_for(10_000, 10_000, torch.device("cpu")) == 32


def test_a_cell_does_not_depend_on_the_others(inputs):
    query, key, value, projection = inputs
    key = key.clone()
    key[0] *= 3  # the largest key of the batch, which the original's stabiliser would spread to the other cells
    together = streaming_favor_attention(query, key, value, projection)
    alone = streaming_favor_attention(query[1:2], key[1:2], value[1:2], projection)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-6)


def test_epsilon_is_no_rounding_term(inputs, monkeypatch):
    with_epsilon = favor_attention(*inputs)
    monkeypatch.setattr(linear_attention, "FEATURE_EPSILON", 0.0)
    assert FEATURE_EPSILON == 1e-4
    assert (favor_attention(*inputs) - with_epsilon).abs().max() > 1e-3


def test_no_feature_map_of_all_positions_is_held(inputs, monkeypatch):
    sizes = []
    project = linear_attention._project_scaled

    def watch(scaled: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(scaled[..., 0].numel())
        return project(scaled, projection)

    monkeypatch.setattr(linear_attention, "_project_scaled", watch)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    attended = streaming_favor_attention(*leaves, inputs[3], chunk_size=7)
    positions = CELLS * HEADS * POSITIONS
    assert max(sizes) == HEADS * 7
    assert sum(sizes) == 2 * positions + CELLS * HEADS  # every query and key once, the winning keys again
    attended.sum().backward()
    assert max(sizes) == HEADS * 7
    assert sum(sizes) == 4 * positions + CELLS * HEADS


def test_features_are_float32_for_half_precision_inputs(inputs):
    half = [tensor.bfloat16() for tensor in inputs]
    exact = favor_attention(*(tensor.float() for tensor in half))
    assert streaming_favor_attention(*half).dtype == torch.float32
    torch.testing.assert_close(streaming_favor_attention(*half), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("features", "head_dim"), [(266, 64), (5, 8), (16, 8)], ids=["released", "part", "whole"])
def test_projection_is_orthogonal_in_blocks_with_gaussian_lengths(features, head_dim):
    projection = draw_orthogonal_projection(features, head_dim, generator=torch.Generator().manual_seed(0))
    assert projection.shape == (features, head_dim)
    for block in projection.split(head_dim):
        directions = block / block.norm(dim=1, keepdim=True)
        torch.testing.assert_close(directions @ directions.T, torch.eye(len(block)), rtol=0, atol=1e-5)
    if features > 100:
        assert projection.norm(dim=1).mean().item() == pytest.approx(math.sqrt(head_dim), rel=0.05)
        assert projection.norm(dim=1).std().item() == pytest.approx(math.sqrt(0.5), rel=0.2)


def test_projection_repeats_under_a_seed_and_stays_on_the_cpu():
    drawn = [draw_orthogonal_projection(20, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with torch.device("meta"):
        assert draw_orthogonal_projection(20, 8).device.type == "cpu"
