import pytest
import torch
from torch import nn

from scfoundation_hf.modeling_scfoundation import decoder as decoder_module
from scfoundation_hf.modeling_scfoundation.decoder import (
    ScFoundationDecoder,
    ScFoundationDecoderLayer,
    ScFoundationLinearAttention,
    place_genes,
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
    """Two cells: the first sees genes 3 and 5, hides 1 and 7; the second sees gene 0, hides 7; then padding."""
    torch.manual_seed(1)
    padding = small_config.pad_token_id
    return {
        "zero_states": torch.randn(small_config.num_positions, small_config.hidden_size),
        "placed_states": torch.randn(2, 6, small_config.hidden_size),
        "placed_ids": torch.tensor([[3, 5, 60, 61, 1, 7], [0, 60, 61, padding, 7, padding]]),
    }


def placed(zero_states: torch.Tensor, placed_states: torch.Tensor, placed_ids: torch.Tensor) -> torch.Tensor:
    states = zero_states.repeat(2, 1, 1)
    for cell, cell_ids in enumerate(placed_ids.tolist()):
        for slot, position in enumerate(cell_ids):
            if position < len(zero_states):
                states[cell, position] = placed_states[cell, slot]
    return states


def plainly(decoder: ScFoundationDecoder, inputs: dict) -> torch.Tensor:
    """Every layer over every position, with all feature maps held."""
    states = decoder.input_projection(placed(**inputs))
    for layer in decoder.layers:
        attention, normed = layer.attention, layer.attention_norm(states)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended = favor_attention(query, key, value, attention.projection)
        states = states + attention.o_proj(attended.transpose(1, 2).flatten(2))
        states = states + layer.down_proj(layer.activation(layer.up_proj(layer.feed_forward_norm(states))))
    return decoder.norm(states)


def test_linear_attention_is_favor_between_its_projections(small_config):
    module = randomise(ScFoundationLinearAttention(small_config))
    states = torch.randn(2, 11, small_config.decoder_hidden_size)

    def heads(projection: nn.Linear) -> torch.Tensor:
        return projection(states).view(2, 11, 2, 16).transpose(1, 2)

    attended = favor_attention(heads(module.q_proj), heads(module.k_proj), heads(module.v_proj), module.projection)
    torch.testing.assert_close(module(states), module.o_proj(attended.transpose(1, 2).reshape(2, 11, 32)))
    assert module(states).shape == states.shape


def test_autocast_does_not_touch_the_features(small_config, monkeypatch):
    seen = []

    def watch(query, key, value, projection, **_):
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


@pytest.mark.parametrize("targets", [None, [[1, 7, 60], [7, 0, 20]]], ids=["all", "targets"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_reduced_layers_give_the_numbers_and_gradients_of_plain_ones(small_config, inputs, num_layers, targets):
    """The first layer's shared zeros and the last layer's few queries are algebra, not approximation."""
    small_config.decoder_num_hidden_layers = num_layers
    decoder = randomise(ScFoundationDecoder(small_config))
    target_ids = None if targets is None else torch.tensor(targets)
    leaves = [inputs["zero_states"].requires_grad_(), inputs["placed_states"].requires_grad_(), *decoder.parameters()]
    reduced = decoder(**inputs, target_ids=target_ids)
    expected = plainly(decoder, inputs)
    if target_ids is not None:
        expected = expected.gather(1, target_ids[..., None].expand(-1, -1, expected.shape[-1]))
    torch.testing.assert_close(reduced, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(reduced, leaves, direction), torch.autograd.grad(expected, leaves, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4 * float(theirs.abs().max()) + 1e-6)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("targets", [None, [[1, 7, 60], [7, 0, 20]]], ids=["all", "targets"])
def test_without_gradients_a_few_positions_at_a_time_give_the_same(small_config, inputs, monkeypatch, targets, rows):
    small_config.decoder_num_hidden_layers = 3
    decoder = randomise(ScFoundationDecoder(small_config))
    target_ids = None if targets is None else torch.tensor(targets)
    expected = decoder(**inputs, target_ids=target_ids)
    monkeypatch.setattr(decoder_module, "CPU_WIDE_BUDGET", rows * small_config.decoder_intermediate_size)
    monkeypatch.setattr(decoder_module, "CPU_FEWEST_ROWS", 1)
    widest = []
    for layer in decoder.layers:
        layer.up_proj.register_forward_hook(lambda module, given, output: widest.append(output.flatten(0, -2).shape[0]))
    with torch.no_grad():
        found = decoder(**inputs, target_ids=target_ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert max(widest) <= max(rows, 2)  # at least one position of each cell


def test_without_gradients_keys_count_as_often_and_autocast_holds_as_with_them(small_config, monkeypatch):
    layer = randomise(ScFoundationDecoderLayer(small_config))
    monkeypatch.setattr(decoder_module, "CPU_WIDE_BUDGET", 5 * small_config.decoder_intermediate_size)
    monkeypatch.setattr(decoder_module, "CPU_FEWEST_ROWS", 1)
    states, weights = torch.randn(2, 11, small_config.decoder_hidden_size), torch.rand(2, 11) + 0.5
    dtypes = []
    layer.attention.k_proj.register_forward_hook(lambda module, given, output: dtypes.append(output.dtype))
    for enabled, tolerance in ((False, 1e-5), (True, 0.05)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected = layer(states, key_weights=weights)
            with torch.no_grad():
                found = layer(states, key_weights=weights)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert found.dtype == expected.dtype == torch.float32
        assert set(dtypes) == {torch.bfloat16 if enabled else torch.float32}
        dtypes.clear()


def test_shared_zeros_are_what_runs(decoder, inputs, monkeypatch):
    took = []
    original = ScFoundationLinearAttention.summarise_with_zeros

    def watch(self, *args):
        took.append(original(self, *args))
        return took[-1]

    monkeypatch.setattr(ScFoundationLinearAttention, "summarise_with_zeros", watch)
    decoder(**inputs)
    assert len(took) == 1
    assert took[0] is not None


def test_a_gene_that_outshines_all_others_is_not_subtracted(decoder, inputs):
    """Its exponential would leave nothing of the others in float32: then every position is computed."""
    attention, norm = decoder.layers[0].attention, decoder.layers[0].attention_norm
    with torch.no_grad():
        norm.weight.fill_(1)
        norm.bias.zero_()
        zeros, placed_states = (
            norm(decoder.input_projection(inputs[name])) for name in ("zero_states", "placed_states")
        )
        # One feature that looks along gene 3, which the first cell replaces.
        for tensor in (attention.projection, attention.k_proj.weight, attention.k_proj.bias):
            tensor.zero_()
        attention.projection[0, 0] = 20
        attention.k_proj.weight[0] = zeros[3] / zeros[3].norm()
        assert attention.summarise_with_zeros(zeros, placed_states, inputs["placed_ids"]) is None
        assert attention.summarise_with_zeros(zeros, placed_states[1:], inputs["placed_ids"][1:]) is not None
        torch.testing.assert_close(decoder(**inputs), plainly(decoder, inputs), rtol=1e-4, atol=1e-5)


def test_feed_forward_in_chunks_is_the_same_forward_and_backward(small_config, monkeypatch):
    layer = randomise(ScFoundationDecoderLayer(small_config))
    states = torch.randn(2, 11, small_config.decoder_hidden_size, requires_grad=True)
    rows = []
    layer.up_proj.register_forward_hook(lambda module, inputs, output: rows.append(output.numel()))
    leaves = [states, *(parameter for name, parameter in layer.named_parameters() if "attention" not in name)]
    direction = torch.randn(2, 11, small_config.decoder_hidden_size)

    def run() -> list[torch.Tensor]:
        result = layer._feed_forward(states)
        return [result, *torch.autograd.grad(result, leaves, direction)]

    whole = run()
    budget = 5 * small_config.decoder_intermediate_size
    monkeypatch.setattr(decoder_module, "CPU_WIDE_BUDGET", budget)
    monkeypatch.setattr(decoder_module, "CPU_FEWEST_ROWS", 1)
    rows.clear()
    in_chunks = run()
    assert len(rows) == 10  # five chunks, and again for the gradients
    assert max(rows) <= budget
    with torch.no_grad():
        in_chunks.append(layer._feed_forward(states))
    for ours, theirs in zip(in_chunks, [*whole, whole[0]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_every_position_gets_its_own_state(inputs):
    """Zero genes keep theirs, visible and hidden ones are replaced, padding touches nothing."""
    zeros = inputs["zero_states"].expand(2, -1, -1)
    assert torch.equal(place_genes(zeros, inputs["placed_states"], inputs["placed_ids"]), placed(**inputs))


def test_padding_has_no_gradient(inputs):
    """It repeats another gene's state, which must not count twice."""
    direction = torch.randn(2, *inputs["zero_states"].shape)
    gradients = []
    for place in (
        lambda zero_states, placed_states, ids: place_genes(zero_states.expand(2, -1, -1), placed_states, ids),
        placed,
    ):
        leaves = [inputs[name].clone().requires_grad_() for name in ("zero_states", "placed_states")]
        gradients.append(torch.autograd.grad(place(*leaves, inputs["placed_ids"]), leaves, direction))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert not gradients[0][1][1, [3, 5]].any()


@pytest.mark.parametrize("shared_zeros", [True, False])
def test_padding_changes_nothing(decoder, inputs, monkeypatch, shared_zeros):
    if not shared_zeros:
        monkeypatch.setattr(decoder_module, "LARGEST_SUBTRACTED_LOGIT", -torch.inf)
    before = decoder(**inputs)
    inputs["placed_states"][1, [3, 5]] = 100.0
    torch.testing.assert_close(decoder(**inputs), before, rtol=0, atol=1e-6)


def test_all_positions_shown_by_name_are_all_positions(decoder, inputs, small_config):
    every_id = torch.arange(small_config.num_positions).repeat(2, 1)
    targets = torch.tensor([[1, 7, 60], [7, 0, 20]])
    shown = decoder(**inputs, target_ids=targets, decoder_ids=every_id, decoder_weights=torch.ones(2, 62))
    torch.testing.assert_close(shown, decoder(**inputs, target_ids=targets), rtol=1e-4, atol=1e-5)


def test_a_part_of_the_positions_is_a_smaller_cell(decoder, inputs):
    """Positions that are not shown do not exist; a weight makes one count for many."""
    shown = torch.tensor([0, 1, 3, 5, 7, 20, 60, 61])
    targets = torch.tensor([[1, 7, 20], [7, 1, 20]])
    weights = torch.ones(2, len(shown))
    part = {
        "zero_states": inputs["zero_states"][shown],
        "placed_states": inputs["placed_states"],
        "placed_ids": torch.tensor([[2, 3, 6, 7, 1, 4], [0, 6, 7, 8, 4, 8]]),
    }
    expected = plainly(decoder, part).gather(1, torch.tensor([[1, 4, 5], [4, 1, 5]])[..., None].expand(-1, -1, 24))
    options = {"target_ids": targets, "decoder_ids": shown.repeat(2, 1)}
    torch.testing.assert_close(decoder(**inputs, **options, decoder_weights=weights), expected, rtol=1e-4, atol=1e-5)
    weights[:, 5] = 40
    assert not torch.allclose(decoder(**inputs, **options, decoder_weights=weights), expected, atol=1e-3)
