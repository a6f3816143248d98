import pytest
import torch
from torch import nn

from scfoundation_hf.modeling_scfoundation.attention import AttentionLayout
from scfoundation_hf.modeling_scfoundation.encoder import (
    ScFoundationEncoder,
    ScFoundationEncoderLayer,
    ScFoundationSelfAttention,
)


@pytest.fixture
def sdpa_config(small_config):
    small_config._attn_implementation = "sdpa"
    return small_config


def torch_layer(layer: ScFoundationEncoderLayer, config) -> nn.TransformerEncoderLayer:
    """torch's post-norm layer, which the original uses, with our weights."""
    reference = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        dropout=0.0,
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
    ).eval()
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    state = {
        "self_attn.in_proj_weight": torch.cat([projection.weight for projection in projections]),
        "self_attn.in_proj_bias": torch.cat([projection.bias for projection in projections]),
    }
    for ours, theirs in (
        (attention.o_proj, "self_attn.out_proj"),
        (layer.up_proj, "linear1"),
        (layer.down_proj, "linear2"),
        (layer.attention_norm, "norm1"),
        (layer.feed_forward_norm, "norm2"),
    ):
        state |= {f"{theirs}.weight": ours.weight, f"{theirs}.bias": ours.bias}
    reference.load_state_dict(state)
    return reference


def test_layer_equals_torchs_post_norm_layer(sdpa_config):
    torch.manual_seed(0)
    layer = ScFoundationEncoderLayer(sdpa_config).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    states = torch.randn(2, 7, sdpa_config.hidden_size)
    torch.testing.assert_close(
        layer(states, AttentionLayout()), torch_layer(layer, sdpa_config)(states), rtol=1e-4, atol=1e-5
    )


def test_encoder_norms_after_the_last_layer(sdpa_config):
    encoder = ScFoundationEncoder(sdpa_config).eval()
    states = torch.randn(2, 7, sdpa_config.hidden_size)
    by_hand = states
    for layer in encoder.layers:
        by_hand = layer(by_hand, AttentionLayout())
    assert torch.equal(encoder(states, AttentionLayout()), encoder.norm(by_hand))
    assert len(encoder.layers) == sdpa_config.num_hidden_layers


def test_only_eager_attention_returns_weights(sdpa_config):
    states = torch.randn(2, 7, sdpa_config.hidden_size)
    assert ScFoundationSelfAttention(sdpa_config)(states, AttentionLayout())[1] is None
    sdpa_config._attn_implementation = "eager"
    _, weights = ScFoundationSelfAttention(sdpa_config)(states, AttentionLayout())
    assert weights.shape == (2, 2, 7, 7)


def test_dropout_acts_in_training_only(sdpa_config):
    sdpa_config.hidden_dropout_prob = 0.5
    layer = ScFoundationEncoderLayer(sdpa_config)
    states = torch.randn(2, 7, sdpa_config.hidden_size)
    layer.train()
    assert not torch.equal(layer(states, AttentionLayout()), layer(states, AttentionLayout()))
    layer.eval()
    assert torch.equal(layer(states, AttentionLayout()), layer(states, AttentionLayout()))
