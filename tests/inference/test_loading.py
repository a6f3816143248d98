"""A folder or a loaded model becomes an encoder, or says why not."""

import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertModel

from scfoundation_hf.hub import export
from scfoundation_hf.inference.loading import load_encoder, load_with_decoder, parse_device, parse_dtype
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import (
    ScFoundationForPreTraining,
    ScFoundationModel,
)


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def test_a_folder_is_loaded_in_float32_whatever_it_stores(folder):
    ScFoundationForPreTraining.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert load_encoder(folder).model.dtype == torch.float32
    assert load_encoder(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert not load_encoder(folder).model.training


def test_a_loaded_model_is_used_as_it_is(tiny_model_dir):
    model = ScFoundationForPreTraining.from_pretrained(tiny_model_dir)
    assert load_encoder(model).model is model.scfoundation
    assert load_encoder(model.scfoundation).model is model.scfoundation
    with pytest.raises(ValueError, match=r"is torch\.float32, not bfloat16; convert it"):
        load_encoder(model, dtype="bfloat16")


def test_the_fingerprint_is_that_of_the_numbers_wherever_they_lie(tiny_model_dir, tmp_path):
    first = load_with_decoder(tiny_model_dir)
    elsewhere = export(tiny_model_dir, tmp_path / "elsewhere")  # with auto_map
    second = load_with_decoder(elsewhere)
    assert first.fingerprint() == second.fingerprint()
    assert first.configuration_sha256() == second.configuration_sha256()
    second.model.config.layer_norm_eps *= 2
    assert first.configuration_sha256() != second.configuration_sha256()
    assert first.fingerprint() != second.fingerprint()


def test_the_fingerprint_follows_the_weights(tiny_model_dir):
    first, second = load_encoder(tiny_model_dir), load_encoder(tiny_model_dir)
    assert first.fingerprint() == second.fingerprint()
    with torch.no_grad():
        second.model.encoder.norm.bias[0] += 1e-3
    assert first.fingerprint() != second.fingerprint()
    assert load_encoder(tiny_model_dir, dtype="bfloat16").fingerprint() != first.fingerprint()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model folder .*nowhere.*scfoundation convert"):
        load_encoder(tmp_path / "nowhere")


def test_another_model_type_is_refused(tmp_path):
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model of type 'bert', not scFoundation"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="A BertModel is no scFoundation model"):
        load_encoder(BertModel.from_pretrained(tmp_path))


def test_missing_weights_are_refused(folder, tiny_config):
    model = ScFoundationModel(tiny_config)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(ValueError, match=r"lack 16 tensors of the encoder \(encoder\.layers\.1"):
        load_encoder(folder)


def test_a_folder_without_tokenizer_is_refused(folder):
    for name in ("gene_vocabulary.tsv", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises((ValueError, OSError), match=r"tokenizer|vocabulary"):
        load_encoder(folder)


def test_a_tokenizer_of_other_genes_is_refused(folder):
    vocabulary = folder / "gene_vocabulary.tsv"
    vocabulary.write_text("\n".join(vocabulary.read_text().split("\n")[:101]) + "\n")
    with pytest.raises(ValueError, match="has 100 genes, its model 19,264"):
        load_encoder(folder)


def test_a_truncated_weights_file_is_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)safetensors|incomplete|header"):
        load_encoder(folder)


def test_a_config_that_is_no_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config\.json"):
        load_encoder(folder)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ValueError, match="model of type None"):
        load_encoder(folder)


def test_dtypes_and_devices_are_checked():
    assert parse_dtype(None) is None
    assert parse_dtype("float16") == parse_dtype(torch.float16) == torch.float16
    with pytest.raises(ValueError, match=r"no dtype 'int8'.*float32, bfloat16, float16"):
        parse_dtype("int8")
    assert parse_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"no device 'gpu'; here: .*cpu"):
        parse_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"'cuda:1' is not available; here: .*cpu"):
            parse_device("cuda:1")


def test_a_loaded_model_on_another_device_is_refused(tiny_config):
    with torch.device("meta"):
        model = ScFoundationModel(tiny_config)
    with pytest.raises(ValueError, match="is on meta, not cpu; move it"):
        load_encoder(model, device="cpu")
