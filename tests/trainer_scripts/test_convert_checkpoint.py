"""The released checkpoint becomes a folder that transformers loads and that says whose weights it holds."""

import json
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer

from scfoundation_hf import convert_checkpoint
from scfoundation_hf.modeling_scfoundation.checkpoint_conversion import (
    UNUSED_NAMES,
    read_official_checkpoint,
    restore_original_tensors,
)
from scfoundation_hf.trainer_scripts import convert_checkpoint as script


@pytest.fixture(params=["cell", "rde", "gene"])
def converted(request, parity_dir, tmp_path):
    checkpoint = parity_dir / "models.ckpt"
    folder = convert_checkpoint(checkpoint, tmp_path / "model", key=request.param)
    return folder, read_official_checkpoint(checkpoint, key=request.param)


def test_the_folder_loads_through_the_auto_classes_and_holds_the_same_numbers(converted):
    folder, original = converted
    model = AutoModelForPreTraining.from_pretrained(folder)
    unused = load_file(folder / "original_unused_tensors.safetensors")
    restored = restore_original_tensors(model.state_dict(), unused, model.config)
    assert restored.keys() == original.tensors.keys()
    assert all(torch.equal(restored[name], original.tensors[name]) for name in restored)
    assert set(unused) == set(UNUSED_NAMES)
    encoder = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(encoder.state_dict(), model.scfoundation.state_dict(), rtol=0, atol=0)
    assert len(AutoTokenizer.from_pretrained(folder).vocabulary) == 19264


def test_all_files_have_ordinary_permissions(converted, tmp_path):
    (tmp_path / "ordinary").touch()
    ordinary = (tmp_path / "ordinary").stat().st_mode
    assert {path.stat().st_mode for path in converted[0].iterdir()} == {ordinary}


def test_the_original_config_is_kept_verbatim(converted):
    folder, original = converted
    assert json.loads((folder / "original_config.json").read_text()) == original.config


def test_the_card_states_the_licence_of_the_weights(converted):
    card = ModelCard.load(converted[0] / "README.md")
    assert card.data.license == "other"
    assert "non-commercial" in card.data.license_name
    assert "non-commercial research only" in card.text


def test_existing_folders_are_replaced_only_if_a_conversion_made_them(parity_dir, tmp_path):
    checkpoint = parity_dir / "models.ckpt"
    folder = convert_checkpoint(checkpoint, tmp_path / "model", key="cell")
    before = load_file(folder / "model.safetensors")
    with pytest.raises(FileExistsError, match="overwrite"):
        convert_checkpoint(checkpoint, folder, key="gene")
    convert_checkpoint(checkpoint, folder, key="gene", overwrite=True)
    after = load_file(folder / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not made by a conversion"):
        convert_checkpoint(checkpoint, tmp_path / "thesis", key="cell", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "thesis"]


def test_bad_arguments_are_refused(parity_dir, tmp_path):
    with pytest.raises(ValueError, match="no key 'encoder'; choose cell, rde, gene"):
        convert_checkpoint(parity_dir / "models.ckpt", tmp_path / "model", key="encoder")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_checkpoint(parity_dir / "models.ckpt", tmp_path / "nowhere" / "model", key="cell")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*absent\.ckpt"):
        convert_checkpoint(tmp_path / "absent.ckpt", tmp_path / "model", key="cell")
    assert list(tmp_path.iterdir()) == []


def test_another_number_of_genes_is_refused(parity_dir, tmp_path, monkeypatch):
    content = torch.load(parity_dir / "models.ckpt", weights_only=True)
    model = content["cell"]
    model["config"]["model_config"]["mae_autobin"]["seq_len"] = 102
    model["config"]["dataset_config"]["rnaseq"].pop("seq_len", None)
    model["state_dict"]["model.pos_emb.weight"] = model["state_dict"]["model.pos_emb.weight"][:103].clone()
    torch.save({"cell": model}, tmp_path / "models.ckpt")
    with pytest.raises(ValueError, match="has 100 genes, the published vocabulary 19,264"):
        convert_checkpoint(tmp_path / "models.ckpt", tmp_path / "model", key="cell")


def test_the_script_does_the_same(parity_dir, tmp_path, monkeypatch, capsys):
    arguments = ["convert", str(parity_dir / "models.ckpt"), str(tmp_path / "model"), "--key", "rde"]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    assert str(tmp_path / "model") in capsys.readouterr().out
    assert (tmp_path / "model" / "model.safetensors").is_file()
