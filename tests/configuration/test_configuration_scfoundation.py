import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from scfoundation_hf.configuration.configuration_scfoundation import PRESETS, ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining

UNUSED_PAD_VECTOR = 768  # a parameter of the released model that nothing reads, and ours does not have


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build(config: ScFoundationConfig) -> ScFoundationForPreTraining:
    with torch.device("meta"):
        return ScFoundationForPreTraining(config)


@pytest.mark.parametrize(
    ("preset", "parameters", "without_gene_table"),
    [
        ("100m", 119_252_285 - UNUSED_PAD_VECTOR, 104_455_229 - UNUSED_PAD_VECTOR),
        ("10m", 9_774_653, 4_842_301),
        ("3m", 2_995_645, 529_469),
    ],
)
def test_parameter_counts_of_presets(preset: str, parameters: int, without_gene_table: int):
    model = build(ScFoundationConfig.from_preset(preset))
    assert count(model) == parameters
    assert count(model) - model.get_input_embeddings().weight.numel() == without_gene_table


def test_100m_has_the_released_modules_and_buffers():
    model = build(ScFoundationConfig.from_preset("100m"))
    embeddings = model.scfoundation.embeddings
    assert count(embeddings.value_embedding) == 88_636 - UNUSED_PAD_VECTOR
    assert count(embeddings.identity_embedding) == 14_797_056
    assert count(model.scfoundation.encoder) == 85_056_000
    assert count(model.decoder.input_projection) == 393_728
    assert count(model.decoder) - count(model.decoder.input_projection) == 18_915_328
    assert (count(model.gene_norm), count(model.prediction_head)) == (1_024, 513)
    # The original counts one more: its counter of training steps since the last redraw.
    assert sum(buffer.numel() for buffer in model.buffers()) == 102_145 - 1


def test_100m_is_the_default_and_every_preset_is_covered():
    assert ScFoundationConfig.from_preset("100M").to_dict() == ScFoundationConfig().to_dict()
    assert PRESETS == ("3m", "10m", "100m")


def test_preset_takes_overrides():
    config = ScFoundationConfig.from_preset("3m", hidden_dropout_prob=0.0, num_genes=100)
    assert (config.hidden_dropout_prob, config.num_genes, config.pad_token_id) == (0.0, 100, 102)


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match="no preset '1b'; choose one of 3m, 10m, 100m"):
        ScFoundationConfig.from_preset("1b")


def test_ids_follow_the_batch_contract():
    config = ScFoundationConfig()
    assert (config.target_depth_token_id, config.source_depth_token_id, config.pad_token_id) == (
        19264,
        19265,
        19266,
    )
    assert (config.num_positions, config.vocab_size) == (19266, 19267)


@pytest.mark.parametrize(("head_dim", "features"), [(64, 266), (8, 16), (32, 110)])
def test_random_features_follow_from_the_head(head_dim: int, features: int):
    assert ScFoundationConfig(decoder_head_dim=head_dim).decoder_num_random_features == features


def test_random_features_can_be_set():
    assert ScFoundationConfig(decoder_num_random_features=32).decoder_num_random_features == 32


def test_round_trip_through_json(tmp_path: Path):
    config = ScFoundationConfig(
        num_genes=50, bin_alpha=0.5, decoder_num_random_features=32, hidden_dropout_prob=0.0, num_labels=4
    )
    config.save_pretrained(tmp_path)
    loaded = ScFoundationConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() | {"transformers_version": None} == config.to_dict() | {"transformers_version": None}
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "scfoundation"
    assert (stored["num_genes"], stored["pad_token_id"], stored["bin_alpha"]) == (50, 52, 0.5)


SIZES = [
    "num_genes",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_head_dim",
    "decoder_num_random_features",
    "decoder_intermediate_size",
    "num_bins",
]


@pytest.mark.parametrize("field", SIZES)
def test_sizes_must_be_positive(field: str):
    with pytest.raises(ValueError, match=f"{field} is 0; it must be at least 1"):
        ScFoundationConfig(**{field: 0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 12}, "hidden_size 100 .* num_attention_heads 12 heads"),
        ({"pad_token_id": 0}, "pad_token_id is 0, but with num_genes 19264 padding is always 19266"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0; it must be at least 0 and below 1"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob is -0.1; it must be"),
    ],
    ids=["heads", "padding", "dropout", "attention-dropout"],
)
def test_impossible_values_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ScFoundationConfig(**fields)


def test_wrong_types_are_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        ScFoundationConfig(hidden_size="768")


def test_a_field_changed_for_the_worse_is_caught_before_saving(tmp_path: Path):
    config = ScFoundationConfig()
    config.num_bins = 0
    with pytest.raises(StrictDataclassClassValidationError, match="num_bins is 0"):
        config.save_pretrained(tmp_path)
