import pytest
import torch
from torch import nn

from scfoundation_hf.modeling_scfoundation.decoder import (
    ScFoundationDecoder,
    ScFoundationDecoderLayer,
    ScFoundationLinearAttention,
)
from scfoundation_hf.modeling_scfoundation.linear_attention import favor_attention


def randomise(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        nn.init.normal_(tensor, std=0.3)
    return module


@pytest.fixture
def decoder(small_config) -> ScFoundationDecoder:
    return randomise(ScFoundationDecoder(small_config))


@pytest.fixture
def inputs(small_config) -> dict:
    """Two cells: the first sees genes 3 and 5, the second gene 0; padding after it; genes 1 and 7 hidden."""
    torch.manual_seed(1)
    width, padding = small_config.hidden_size, small_config.pad_token_id
    visible_ids = torch.tensor([3, 5, 60, 61, 0, 60, 61, padding])
    return {
        "zero_states": torch.randn(1, small_config.vocab_size, width),
        "visible_states": torch.randn(len(visible_ids), width),
        "visible_cells": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        "visible_ids": visible_ids,
        "masked_states": torch.randn(2, 2, width),
        "masked_ids": torch.tensor([[1, 7], [7, padding]]),
        "num_cells": 2,
    }


def test_linear_attention_is_favor_between_its_projections(small_config):
    module = randomise(ScFoundationLinearAttention(small_config))
    states = torch.randn(2, 11, small_config.decoder_hidden_size)

    def heads(projection: nn.Linear) -> torch.Tensor:
        return projection(states).view(2, 11, 2, 16).transpose(1, 2)

    attended = favor_attention(heads(module.q_proj), heads(module.k_proj), heads(module.v_proj), module.projection)
    torch.testing.assert_close(module(states), module.o_proj(attended.transpose(1, 2).reshape(2, 11, 32)))
    assert module(states).shape == states.shape


def test_autocast_does_not_touch_the_features(small_config, monkeypatch):
    from scfoundation_hf.modeling_scfoundation import decoder as decoder_module

    seen = []

    def watch(query, key, value, projection):
        seen.append(torch.is_autocast_enabled("cpu"))
        return favor_attention(query, key, value, projection)

    monkeypatch.setattr(decoder_module, "streaming_favor_attention", watch)
    module = randomise(ScFoundationLinearAttention(small_config))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(1, 5, small_config.decoder_hidden_size)).dtype == torch.bfloat16
    assert seen == [False]


def test_layer_is_pre_norm_and_residual(small_config):
    layer = randomise(ScFoundationDecoderLayer(small_config))
    states = torch.randn(2, 11, small_config.decoder_hidden_size)
    attended = states + layer.attention(layer.attention_norm(states))
    expected = attended + layer.down_proj(nn.functional.gelu(layer.up_proj(layer.feed_forward_norm(attended))))
    torch.testing.assert_close(layer(states), expected)


def test_every_position_gets_its_own_state(decoder, inputs, small_config):
    """Zero genes keep theirs, visible and hidden ones are replaced, padding touches nothing."""
    placed = inputs["zero_states"][:, : small_config.num_positions].repeat(2, 1, 1)
    for cell, position, state in zip(
        inputs["visible_cells"][:-1], inputs["visible_ids"][:-1], inputs["visible_states"], strict=False
    ):
        placed[cell, position] = state
    placed[0, 1], placed[0, 7], placed[1, 7] = (
        inputs["masked_states"][0, 0],
        inputs["masked_states"][0, 1],
        inputs["masked_states"][1, 0],
    )
    expected = decoder.input_projection(placed)
    for layer in decoder.layers:
        expected = layer(expected)
    torch.testing.assert_close(decoder(**inputs), decoder.norm(expected), rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing(decoder, inputs):
    before = decoder(**inputs)
    inputs["visible_states"][-1] = 100.0
    inputs["masked_states"][1, 1] = 100.0
    assert torch.equal(decoder(**inputs), before)


def test_nothing_hidden(decoder, inputs):
    hidden_nowhere = {**inputs, "masked_ids": torch.full((2, 1), 62), "masked_states": inputs["masked_states"][:, :1]}
    unmasked = {**inputs, "masked_ids": None, "masked_states": None}
    assert torch.equal(decoder(**unmasked), decoder(**hidden_nowhere))
    assert not torch.equal(decoder(**unmasked), decoder(**inputs))
