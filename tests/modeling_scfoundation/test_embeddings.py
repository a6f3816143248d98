import pytest
import torch
from torch import nn

from scfoundation_hf.modeling_scfoundation.embeddings import (
    Float32Linear,
    ScFoundationEmbeddings,
    ScFoundationValueEmbedding,
)


@pytest.fixture
def value_embedding(small_config) -> ScFoundationValueEmbedding:
    torch.manual_seed(0)
    small_config.bin_alpha = 0.7
    module = ScFoundationValueEmbedding(small_config)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def test_value_embedding_is_a_soft_mixture_of_bins(value_embedding):
    module = value_embedding
    for x in (0.0, 0.3, 4.7):
        scores = nn.functional.leaky_relu(x * module.bin_scores.weight[:, 0] + module.bin_scores.bias, 0.1)
        mixed = 0.7 * scores + module.bin_mixing.weight @ scores + module.bin_mixing.bias
        expected = torch.softmax(mixed, dim=0) @ module.bin_embeddings
        torch.testing.assert_close(module(torch.tensor([[x]]))[0, 0], expected)


def test_hidden_values_get_the_mask_embedding(value_embedding):
    assert torch.equal(value_embedding(None), value_embedding.mask_embedding)


def test_values_keep_their_digits_in_bfloat16(value_embedding):
    half = value_embedding.bfloat16()
    close = torch.tensor([[5.000, 5.001]])  # one number in bfloat16
    assert close.bfloat16()[0, 0] == close.bfloat16()[0, 1]
    embedded = half(close)
    assert embedded.dtype == torch.float32
    assert not torch.equal(embedded[0, 0], embedded[0, 1])


def test_autocast_does_not_touch_the_value_embedding(value_embedding):
    values = torch.rand(2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = value_embedding(values)
    assert torch.equal(under_autocast, value_embedding(values))


def test_float32_linear_without_bias():
    linear = Float32Linear(3, 2, bias=False).bfloat16()
    assert linear(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_embeddings_add_the_identity(small_config):
    module = ScFoundationEmbeddings(small_config)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    input_ids = torch.tensor([[0, 59, 60, 61, 62]])
    values = torch.rand(1, 5)
    torch.testing.assert_close(
        module(input_ids, values), module.value_embedding(values) + module.identity_embedding.weight[input_ids]
    )
    hidden = module(input_ids, None)
    torch.testing.assert_close(
        hidden, module.value_embedding.mask_embedding + module.identity_embedding.weight[input_ids]
    )
    assert module.bfloat16()(input_ids, values).dtype == torch.bfloat16
