"""Back to the original's checkpoint, to the bit."""

import shutil

import pytest
import torch

from scfoundation_hf import ScFoundationForPreTraining, convert_checkpoint
from scfoundation_hf.cli import main
from scfoundation_hf.trainer_scripts.restore_checkpoint import restore_checkpoint


@pytest.fixture(scope="module")
def converted(parity_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    return {key: convert_checkpoint(parity_dir / "models.ckpt", folder / key, key=key) for key in ("cell", "gene")}


def test_the_round_trip_is_exact(converted, parity_dir, tmp_path):
    options = [word for key, folder in converted.items() for word in (f"--{key}", str(folder))]
    with pytest.raises(SystemExit) as exit_info:
        main(["restore", str(tmp_path / "models.ckpt"), *options])
    assert not exit_info.value.code
    original = torch.load(parity_dir / "models.ckpt", weights_only=True)
    restored = torch.load(tmp_path / "models.ckpt", weights_only=True)
    assert list(restored) == ["cell", "gene"]
    for key, model in restored.items():
        assert model["config"] == original[key]["config"]
        tensors = original[key]["state_dict"]
        assert model["state_dict"].keys() == tensors.keys()
        for name, tensor in model["state_dict"].items():
            assert tensor.dtype == tensors[name].dtype, name
            assert torch.equal(tensor, tensors[name]), name


def test_weights_trained_further_are_restored_with_the_files_of_the_conversion(converted, tmp_path):
    model = ScFoundationForPreTraining.from_pretrained(converted["gene"])
    with torch.no_grad():
        model.gene_norm.weight += 1
    model.save_pretrained(tmp_path / "trained", max_shard_size="1MB")
    with pytest.raises(FileNotFoundError, match=r"has no original_config\.json.*copy it from the converted model"):
        restore_checkpoint({"gene": tmp_path / "trained"}, tmp_path / "models.ckpt")
    for name in ("original_config.json", "original_unused_tensors.safetensors"):
        shutil.copy(converted["gene"] / name, tmp_path / "trained")
    restore_checkpoint({"gene": tmp_path / "trained"}, tmp_path / "models.ckpt")
    restored = torch.load(tmp_path / "models.ckpt", weights_only=True)["gene"]["state_dict"]
    assert torch.equal(restored["model.norm.weight"], model.gene_norm.weight.detach())


def test_what_cannot_be_restored(converted, tmp_path):
    target = tmp_path / "models.ckpt"
    with pytest.raises(ValueError, match="No model was given"):
        restore_checkpoint({}, target)
    target.write_text("mine")
    with pytest.raises(FileExistsError, match=r"models\.ckpt exists already"):
        restore_checkpoint(converted, target)
    ScFoundationForPreTraining.from_pretrained(converted["cell"]).scfoundation.save_pretrained(tmp_path / "encoder")
    with pytest.raises(
        ValueError, match="holds a ScFoundationModel; the original's checkpoint needs encoder and decoder"
    ):
        restore_checkpoint({"cell": tmp_path / "encoder"}, target, overwrite=True)
    assert target.read_text() == "mine"
