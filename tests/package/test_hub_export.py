"""A model folder with its code: complete, minimal, always the same bytes, and working without this package."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files

import scfoundation_hf
from scfoundation_hf import hub
from scfoundation_hf.doctor import diagnose
from scfoundation_hf.inference.model_folder import check_model_folder
from scfoundation_hf.modeling_scfoundation.saving import AUTO_MAP

LOADER = Path(__file__).with_name("load_remote_code.py")
CODE = {
    "attention.py",
    "classification_head.py",
    "code_export.py",
    "configuration_scfoundation.py",
    "data_collator.py",
    "decoder.py",
    "dropout.py",
    "embeddings.py",
    "encoder.py",
    "gene_vocabulary.py",
    "linear_attention.py",
    "losses.py",
    "matrix_reader.py",
    "modeling_scfoundation.py",
    "pooling.py",
    "prepared_cells.py",
    "read_depth.py",
    "read_depth_aware.py",
    "saving.py",
    "tokenization_scfoundation.py",
}
DATA = {"README.md", "SHA256SUMS", "config.json", "gene_vocabulary.tsv", "model.safetensors", "tokenizer_config.json"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def exported(tiny_model_dir, tmp_path_factory) -> Path:
    return hub.export(tiny_model_dir, tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="module")
def cells_npz(example_cells, tmp_path_factory) -> Path:
    cells = anndata.read_h5ad(example_cells)[::200]
    path = tmp_path_factory.mktemp("cells") / "cells.npz"
    np.savez(path, counts=cells.X.toarray(), gene_names=cells.var["symbol"].to_numpy(dtype=str))
    return path


@pytest.fixture(scope="module")
def expected(tiny_model_dir, cells_npz) -> dict[str, np.ndarray]:
    """What this package computes, natively loaded."""
    given = np.load(cells_npz)
    batch = AutoTokenizer.from_pretrained(tiny_model_dir)(given["counts"], gene_names=given["gene_names"])
    encoder = AutoModel.from_pretrained(tiny_model_dir).eval()
    whole = AutoModelForPreTraining.from_pretrained(tiny_model_dir).eval()
    with torch.inference_mode():
        pooled = encoder(**batch).pooler_output
        predicted = whole(**batch, target_ids=batch["input_ids"][:, :5]).predicted_values
    return {"pooled": pooled, "predicted": predicted, "ids": batch["input_ids"], "values": batch["values"]}


def assert_same_outputs(python: str, model: Path, cells: Path, expected: dict, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, LOADER, model, cells, tmp_path / "outputs.npz"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    outputs = np.load(tmp_path / "outputs.npz")
    for name, value in expected.items():
        np.testing.assert_array_equal(outputs[name], value.numpy(), err_msg=name)


def test_the_export_holds_code_and_data_and_nothing_else(exported):
    assert set(contents(exported)) == CODE | DATA


def test_every_file_of_code_is_needed(exported):
    """Transformers' own search, from the files that auto_map names, reaches every one."""
    config = json.loads((exported / "config.json").read_text())
    tokenizer_config = json.loads((exported / "tokenizer_config.json").read_text())
    named = [*config["auto_map"].values(), tokenizer_config["auto_map"]["AutoTokenizer"][0]]
    roots = {exported / f"{name.split('.')[0]}.py" for name in named}
    reached = roots | {Path(path) for root in roots for path in get_relative_import_files(root)}
    assert {path.name for path in reached} == CODE


def test_exported_code_imports_the_package_only_where_it_may_fail(exported):
    for name in CODE:
        tree = ast.parse((exported / name).read_text(encoding="utf-8"))
        optional = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in optional:
                assert node.level == 1 or not (node.module or "").startswith("scfoundation_hf"), name


def test_the_same_model_gives_the_same_bytes_and_is_not_touched(tiny_model_dir, exported, tmp_path):
    before = contents(tiny_model_dir)
    again = hub.export(tiny_model_dir, tmp_path / "again")
    assert contents(again) == contents(exported)
    assert contents(tiny_model_dir) == before
    assert (again / "model.safetensors").stat().st_mode == (again / "config.json").stat().st_mode


def test_auto_map_names_the_classes_that_are_registered(tiny_config):
    import transformers

    for name, reference in AUTO_MAP.items():
        if name == "AutoConfig":
            continue
        registered = getattr(transformers, name)._model_mapping[type(tiny_config)]
        assert reference == f"{registered.__module__.rpartition('.')[2]}.{registered.__name__}"
    heads = ("AutoModel", "AutoModelForPreTraining", "AutoModelForSequenceClassification")
    registered_heads = {name for name in heads if type(tiny_config) in getattr(transformers, name)._model_mapping}
    assert set(AUTO_MAP) == {"AutoConfig", *registered_heads}


def test_it_works_without_the_package(exported, cells_npz, expected, tmp_path):
    assert_same_outputs(sys.executable, exported, cells_npz, expected, tmp_path)


@pytest.mark.slow
def test_it_works_in_an_environment_of_its_own(exported, cells_npz, expected, tmp_path, repository):
    """SCFOUNDATION_REMOTE_PYTHON names the interpreter of one that has the five packages; else one is made."""
    python = os.environ.get("SCFOUNDATION_REMOTE_PYTHON")
    if not python:
        venv.create(tmp_path / "venv", with_pip=True)
        python = str(tmp_path / "venv" / "bin" / "python")
        packages = ["torch", "transformers", "numpy", "scipy", "safetensors"]
        install = [python, "-m", "pip", "install", "--quiet", "--constraint", repository / "constraints.txt", *packages]
        installed = subprocess.run(install, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"needs a package index to make an environment from: {installed.stderr[-300:]}")
    without = "import importlib.util, sys; sys.exit(importlib.util.find_spec('scfoundation_hf') is not None)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    assert subprocess.run([python, "-c", without], cwd=tmp_path, env=environment).returncode == 0
    assert_same_outputs(python, exported, cells_npz, expected, tmp_path)


def test_shards_are_exported_too(tiny_model_dir, cells_npz, expected, tmp_path):
    folder = tmp_path / "sharded"
    scfoundation_hf.ScFoundationForPreTraining.from_pretrained(tiny_model_dir).save_pretrained(
        folder, max_shard_size="300KB"
    )
    scfoundation_hf.ScFoundationTokenizer().save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    exported = hub.export(folder, tmp_path / "export")
    assert_same_outputs(sys.executable, exported, cells_npz, expected, tmp_path)


def test_a_classifier_is_exported_too(tiny_config, cells_npz, tmp_path):
    from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForCellClassification

    config = type(tiny_config)(**{**tiny_config.to_dict(), "id2label": {0: "B cell", 1: "T cell", 2: "other"}})
    model, tokenizer = ScFoundationForCellClassification(config).eval(), scfoundation_hf.ScFoundationTokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = np.load(cells_npz)
    batch = tokenizer(given["counts"], gene_names=given["gene_names"])
    with torch.inference_mode():
        expected = {"pooled": model.scfoundation(**batch).pooler_output, "predicted": model(**batch).logits}
    exported = hub.export(tmp_path / "model", tmp_path / "export")
    assert_same_outputs(sys.executable, exported, cells_npz, expected, tmp_path)


def test_with_the_package_the_export_loads_natively(exported):
    assert type(AutoModel.from_pretrained(exported)) is scfoundation_hf.ScFoundationModel
    assert type(AutoTokenizer.from_pretrained(exported)) is scfoundation_hf.ScFoundationTokenizer
    trusted = AutoModel.from_pretrained(exported, trust_remote_code=True)
    assert type(trusted) is scfoundation_hf.ScFoundationModel


def test_saving_with_code(exported, tiny_config, tmp_path):
    model, tokenizer = scfoundation_hf.ScFoundationForPreTraining(tiny_config), scfoundation_hf.ScFoundationTokenizer()
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    model.save_pretrained(tmp_path / "code", include_code=True)
    tokenizer.save_pretrained(tmp_path / "code", include_code=True)
    written = contents(tmp_path / "code")
    assert {name: written[name] for name in CODE} == {name: contents(exported)[name] for name in CODE}
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" in json.loads(written[name])
        assert "auto_map" not in json.loads((tmp_path / "plain" / name).read_text())


def test_a_model_that_came_with_code_is_saved_with_code_unless_told_otherwise(exported, tmp_path):
    model, tokenizer = AutoModelForPreTraining.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    model.save_pretrained(tmp_path / "kept")
    tokenizer.save_pretrained(tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").glob("*.py")} == CODE
    model.save_pretrained(tmp_path / "dropped", include_code=False)
    tokenizer.save_pretrained(tmp_path / "dropped", include_code=False)
    assert not list((tmp_path / "dropped").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "dropped" / "config.json").read_text())


def test_documents_travel_and_pickles_stay(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    torch.save({"anything": 1}, folder / "training_args.bin")
    (folder / "training_report.txt").write_text("report")
    (folder / "README.md").write_text("# My card\n")
    (folder / "old_code.py").write_text("raise SystemExit\n")
    (folder / ".hidden.json").write_text("{}")
    (folder / "checkpoint-5").mkdir()
    publication = hub.prepare(folder)
    assert sorted(publication.left_out) == [".hidden.json", "checkpoint-5/", "old_code.py", "training_args.bin"]
    exported = contents(hub.export(folder, tmp_path / "export"))
    assert set(exported) == CODE | DATA | {"training_report.txt"}
    assert exported["README.md"] == b"# My card\n"


def test_an_existing_output_is_kept(tiny_model_dir, exported, tmp_path):
    target = shutil.copytree(exported, tmp_path / "export")
    with pytest.raises(FileExistsError, match="exists already; pass overwrite=True"):
        hub.export(tiny_model_dir, target)
    (target / "left_over.txt").write_text("")
    hub.export(tiny_model_dir, target, overwrite=True)
    assert contents(target) == contents(exported)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="was not made by an export"):
        hub.export(tiny_model_dir, tmp_path / "mine", overwrite=True)
    with pytest.raises(FileNotFoundError, match="make it first"):
        hub.export(tiny_model_dir, tmp_path / "nowhere" / "export")
    with pytest.raises(ValueError, match="is the model itself"):
        hub.export(target, target, overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def changed_byte(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def with_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def wrong_shape(folder: Path) -> None:
    with_tensors(folder, lambda tensors: tensors.update({"gene_norm.weight": torch.ones(9)}))


def missing_tensor(folder: Path) -> None:
    with_tensors(folder, lambda tensors: tensors.pop("gene_norm.weight"))


def foreign_tensor(folder: Path) -> None:
    with_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(1)}))


def other_vocabulary(folder: Path) -> None:
    path = folder / "gene_vocabulary.tsv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def with_config(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def without(name: str):
    return lambda folder: (folder / name).unlink()


def bad_checksums(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text("no checksum\n")


DAMAGE = {
    "truncated weights": (truncated, ValueError, r"model\.safetensors is no complete safetensors file"),
    "empty weights": (without_header, ValueError, r"model\.safetensors is no complete safetensors file"),
    "one byte changed": (changed_byte, ValueError, r"model\.safetensors in .* changed since the model was saved"),
    "wrong shape": (wrong_shape, ValueError, r"1 of another shape \(gene_norm\.weight \(9,\) instead of \(8,\)\)"),
    "tensor missing": (missing_tensor, ValueError, r"1 missing \(gene_norm\.weight\)"),
    "tensor unexpected": (foreign_tensor, ValueError, r"1 unexpected \(lm_head\.weight\)"),
    "other vocabulary": (other_vocabulary, ValueError, "has 19,263 genes, the model 19,264"),
    "no vocabulary": (without("gene_vocabulary.tsv"), FileNotFoundError, r"has no gene_vocabulary\.tsv"),
    "other model type": (with_config(model_type="bert"), ValueError, "a model of type 'bert', not 'scfoundation'"),
    "other architecture": (with_config(architectures=["Other"]), ValueError, "architecture 'Other'"),
    "no configuration": (without("config.json"), FileNotFoundError, r"has no config\.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), ValueError, "is not JSON"),
    "no weights": (without("model.safetensors"), FileNotFoundError, r"lacks the weights model\.safetensors"),
    "no tokenizer settings": (without("tokenizer_config.json"), FileNotFoundError, r"has no tokenizer_config\.json"),
    "unreadable checksums": (bad_checksums, ValueError, r"SHA256SUMS, line 1: expected '<SHA-256>"),
}


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_model_is_refused_with_the_reason(damage, error, message, tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    damage(folder)
    with pytest.raises(error, match=message):
        hub.export(folder, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_whole_model_is_not_refused(tiny_model_dir):
    assert check_model_folder(tiny_model_dir).num_genes == 19264


def test_doctor_finds_one_changed_byte(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(scfoundation_hf.doctor, "BACKENDS", ())

    def checked(folder: Path) -> dict[str, object]:
        return {finding.name: finding for finding in diagnose(str(folder)) if finding.section == "Model"}

    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    assert checked(folder)["SHA-256"].passed
    changed_byte(folder)
    finding = checked(folder)["SHA-256"]
    assert finding.passed is False
    assert "model.safetensors" in finding.result
    (folder / "SHA256SUMS").unlink()
    finding = checked(folder)["SHA-256"]
    assert finding.passed is None
    assert "not recorded" in finding.result


def test_the_checksums_are_those_of_sha256sum(tiny_model_dir):
    digest = hashlib.sha256((tiny_model_dir / "model.safetensors").read_bytes()).hexdigest()
    assert (tiny_model_dir / "SHA256SUMS").read_text() == f"{digest}  model.safetensors\n"


def test_doctor_names_unknown_fields(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(scfoundation_hf.doctor, "BACKENDS", ())
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    with_config(hidden_sizes=3, num_binz=4)(folder)
    findings = {finding.name: finding for finding in diagnose(str(folder))}
    assert findings["configuration"].result == "unknown, so unused: hidden_sizes, num_binz"
    assert findings["configuration"].passed is None


def test_loading_names_unknown_fields_in_one_warning(tiny_model_dir, tmp_path, caplog):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    with_config(hidden_width=3, num_bims=4)(folder)
    model = AutoModel.from_pretrained(folder)
    assert model.config.num_bims == 4
    warnings = [record.getMessage() for record in caplog.records if "num_bims" in record.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        "The scFoundation configuration has no field(s) hidden_width, num_bims: kept, but used"
    )


def test_ordinary_configurations_have_no_unknown_fields(exported, tiny_config, caplog):
    AutoModel.from_pretrained(exported, attn_implementation="eager", output_hidden_states=True)
    type(tiny_config)(num_labels=3, name_or_path="x", torch_dtype="float32", label2id={"a": 0}, output_attentions=True)
    assert not [record for record in caplog.records if "has no field(s)" in record.getMessage()]
