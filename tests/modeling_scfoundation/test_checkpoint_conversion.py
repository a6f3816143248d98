import contextlib
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scfoundation_hf.modeling_scfoundation.checkpoint_conversion import (
    CHECKPOINT_KEYS,
    UNUSED_NAMES,
    OfficialCheckpoint,
    convert_config,
    convert_tensors,
    iterate_names,
    read_official_checkpoint,
    restore_original_tensors,
)
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining, ScFoundationModel


@pytest.fixture(scope="session")
def official(parity_dir: Path) -> dict[str, OfficialCheckpoint]:
    return {key: read_official_checkpoint(parity_dir / "models.ckpt", key=key) for key in CHECKPOINT_KEYS}


@pytest.fixture
def gene(official) -> tuple[dict, dict]:
    """Config and tensors of key gene, to be spoilt."""
    return official["gene"].config, dict(official["gene"].tensors)


@pytest.mark.parametrize("key", CHECKPOINT_KEYS)
def test_every_key_is_read_with_its_own_tensors(official, parity_dir, key):
    expected = load_file(parity_dir / "weights_gene.safetensors")
    if key != "gene":
        expected |= load_file(parity_dir / f"weights_{key}_overrides.safetensors")
    assert official[key].tensors.keys() == expected.keys()
    for name, tensor in official[key].tensors.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@pytest.mark.parametrize("key", CHECKPOINT_KEYS)
def test_round_trip_to_the_bit(official, key):
    original = official[key].tensors
    config = convert_config(official[key].config, original)
    model = ScFoundationForPreTraining(config)
    model.load_state_dict(convert_tensors(original, config), strict=True)
    restored = restore_original_tensors(model.state_dict(), {name: original[name] for name in UNUSED_NAMES}, config)
    assert restored.keys() == original.keys()
    for name in original:
        assert restored[name].dtype == original[name].dtype, name
        assert torch.equal(restored[name], original[name]), name


def test_the_folder_of_a_converted_checkpoint_loads(official, tmp_path):
    checkpoint = official["cell"]
    config = convert_config(checkpoint.config, checkpoint.tensors)
    model = ScFoundationForPreTraining(config)
    model.load_state_dict(convert_tensors(checkpoint.tensors, config))
    model.save_pretrained(tmp_path)
    encoder = ScFoundationModel.from_pretrained(tmp_path)
    table = checkpoint.tensors["pos_emb.weight"]
    assert torch.equal(encoder.embeddings.identity_embedding.weight, table)


def test_config_of_the_parity_model(official):
    config = convert_config(official["gene"].config, official["gene"].tensors)
    assert (config.num_genes, config.num_bins, config.bin_alpha) == (19264, 10, 1.0)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 2, 4)
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (32, 2)
    assert (config.decoder_num_attention_heads, config.decoder_head_dim) == (2, 64)
    assert config.decoder_num_random_features == 266
    assert (config.intermediate_size, config.decoder_intermediate_size) == (256, 128)


def test_every_tensor_of_ours_has_one_origin(official):
    config = convert_config(official["gene"].config, official["gene"].tensors)
    ours = [name for _, names in iterate_names(config) for name in names]
    with torch.device("meta"):
        expected = ScFoundationForPreTraining(config).state_dict().keys()
    assert len(ours) == len(set(ours))
    assert set(ours) == set(expected)


def test_names_that_do_not_fit_are_listed(gene):
    original_config, tensors = gene
    config = convert_config(original_config, tensors)
    del tensors["to_final.bias"], tensors["norm.weight"], tensors[UNUSED_NAMES[0]]
    tensors["extra.weight"] = torch.zeros(1)
    tensors["decoder_embed.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match="does not fit the model its config describes") as error:
        convert_tensors(tensors, config)
    message = str(error.value)
    assert "missing: norm.weight, to_final.bias, token_emb.emb_pad.weight" in message
    assert "unexpected: extra.weight" in message
    assert "wrong shape: decoder_embed.bias (7,), expected (32,)" in message


def test_long_lists_are_cut_and_counted(gene):
    original_config, tensors = gene
    config = convert_config(original_config, tensors)
    with pytest.raises(ValueError, match=r"unexpected: extra0, extra1, .*extra19 and 5 more"):
        convert_tensors({**tensors, **{f"extra{i}": torch.zeros(1) for i in range(25)}}, config)


@pytest.mark.parametrize("missing", ["pos_emb.weight", "token_emb.emb_mask.weight"])
def test_a_scalar_where_a_table_belongs(gene, missing):
    original_config, tensors = gene
    config = convert_config(original_config, tensors)
    with pytest.raises(ValueError, match=rf"wrong shape: {missing} "):
        convert_tensors({**tensors, missing: torch.zeros(3)}, config)


def test_config_without_a_key_or_a_tensor_names_it(gene):
    config, tensors = gene
    with pytest.raises(ValueError, match="lacks 'dataset_config'; it is not a released scFoundation model"):
        convert_config({"model_config": config["model_config"]}, tensors)
    del tensors["encoder.transformer_encoder.0.linear1.bias"]
    with pytest.raises(ValueError, match=r"lacks 'encoder.transformer_encoder.0.linear1.bias'"):
        convert_config(config, tensors)


def test_other_architectures_are_refused(gene):
    config, tensors = gene
    model = config["model_config"]["mae_autobin"]
    other = {**model, "encoder": {**model["encoder"], "module_type": "performer"}}
    with pytest.raises(ValueError, match="has a performer encoder and a performer decoder; only transformer and"):
        convert_config({**config, "model_config": {"mae_autobin": other}}, tensors)


# --- Files that are no checkpoint ------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint file .*none\.ckpt"):
        read_official_checkpoint(tmp_path / "none.ckpt", key="cell")


def test_wrong_key(parity_dir):
    with pytest.raises(ValueError, match=r"holds no model 'cells'; .* found: cell, rde, gene"):
        read_official_checkpoint(parity_dir / "models.ckpt", key="cells")


@pytest.mark.parametrize(
    ("content", "found"), [({"epoch": 1}, "found: epoch"), ({}, "found: nothing"), ([1], "found: list")]
)
def test_other_checkpoints(tmp_path, content, found):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=f"expected a dictionary with the keys cell, rde and gene, {found}"):
        read_official_checkpoint(tmp_path / "other.ckpt", key="cell")


def test_a_model_without_its_parts(tmp_path):
    torch.save({"cell": {"state_dict": {}}}, tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="key 'cell': expected 'config' and 'state_dict' in it"):
        read_official_checkpoint(tmp_path / "half.ckpt", key="cell")


def test_names_without_the_prefix(tmp_path):
    tensors = {"model.norm.weight": torch.zeros(1), "to_final.bias": torch.zeros(1)}
    torch.save({"cell": {"config": {}, "state_dict": tensors}}, tmp_path / "names.ckpt")
    with pytest.raises(ValueError, match=r"must begin with 'model\.'; these do not: to_final\.bias"):
        read_official_checkpoint(tmp_path / "names.ckpt", key="cell")


@pytest.mark.parametrize("kept", [0, 10, 1000, 5_000_000], ids=["empty", "ten-bytes", "kilobyte", "most"])
def test_truncated_file(parity_dir, tmp_path, kept):
    (tmp_path / "cut.ckpt").write_bytes((parity_dir / "models.ckpt").read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut\.ckpt is not a complete PyTorch checkpoint|cut\.ckpt is not a plain"):
        read_official_checkpoint(tmp_path / "cut.ckpt", key="cell")


def test_a_text_file(tmp_path):
    (tmp_path / "page.ckpt").write_text("<!doctype html><html>Please sign in</html>")
    with pytest.raises(ValueError, match=r"page\.ckpt is not a"):
        read_official_checkpoint(tmp_path / "page.ckpt", key="cell")


class RunsCode:
    """A pickle of this creates the file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "save", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, protocol=2))], ids=["torch", "pickle"]
)
def test_code_in_the_pickle_does_not_run(tmp_path, save):
    trace, path = tmp_path / "was-run", tmp_path / "evil.ckpt"
    save({"cell": {"config": {}, "state_dict": RunsCode(trace)}}, path)
    with pytest.raises(ValueError, match="could run code when loaded, so it was not loaded"):
        read_official_checkpoint(path, key="cell")
    assert not trace.exists()
    with contextlib.suppress(RuntimeError):  # of the bare pickle, after it has run
        torch.load(path, weights_only=False)
    assert trace.exists()
