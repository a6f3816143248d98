"""The command line: the same as the functions, and one clear message for everything that goes wrong."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

import scfoundation_hf
from scfoundation_hf import doctor
from scfoundation_hf.cli import main
from scfoundation_hf.inference import embedding


@pytest.fixture
def cells_file(example_cells, tmp_path) -> Path:
    anndata.read_h5ad(example_cells)[::40].copy().write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def run(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(exit_info.value.code or 0), out, err


def test_embed_is_the_function(capsys, cells_file, tiny_model_dir, tmp_path):
    options = ["--gene-column", "symbol", "--depth-fold", "2", "--no-progress"]
    code, out, err = run(capsys, "embed", cells_file, tmp_path / "o.h5ad", "--model", tiny_model_dir, *options)
    assert code == 0, err
    assert out.strip() == str(tmp_path / "o.h5ad")
    cells = anndata.read_h5ad(cells_file)
    scfoundation_hf.embed(cells, tiny_model_dir, gene_column="symbol", depth_fold=2, progress=False)
    written = anndata.read_h5ad(tmp_path / "o.h5ad")
    np.testing.assert_allclose(written.obsm["X_scfoundation"], cells.obsm["X_scfoundation"], rtol=0, atol=1e-5)


def test_every_argument_of_embed_has_an_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run(capsys, "embed", "--help")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert "Example:" in plain
    for name in set(inspect.signature(scfoundation_hf.embed).parameters) - {"data", "output"}:
        assert f"--{name.replace('_', '-')}" in plain, name


def one_message(err: str) -> str:
    messages = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(messages) == 1, err
    assert "Traceback" not in err
    return messages[0]


def truncated(cells_file: Path) -> Path:
    path = cells_file.with_name("truncated.h5ad")
    path.write_bytes(cells_file.read_bytes()[: cells_file.stat().st_size // 2])
    return path


def no_hdf5(cells_file: Path) -> Path:
    path = cells_file.with_name("text.h5ad")
    path.write_text("gene,cell\n")
    return path


def changed(cells_file: Path, name: str, change) -> Path:
    cells = change(anndata.read_h5ad(cells_file))
    cells.write_h5ad(cells_file.with_name(name))
    return cells_file.with_name(name)


def with_values(cells: anndata.AnnData, value: float) -> anndata.AnnData:
    cells.X = cells.X.astype(np.float32)
    cells.X.data[0] = value
    return cells


def as_mouse(cells: anndata.AnnData) -> anndata.AnnData:
    cells.var["symbol"] = cells.var["symbol"].astype(str).str.capitalize()
    return cells


def as_unknown(cells: anndata.AnnData) -> anndata.AnnData:
    cells.var["symbol"] = [f"peak_{i}" for i in range(cells.n_vars)]
    return cells


def with_empty_cell(cells: anndata.AnnData) -> anndata.AnnData:
    counts = cells.X.tolil()
    counts[2] = 0
    cells.X = counts.tocsr()
    return cells


BAD_FILES = {
    "missing file": (lambda f: f.with_name("nowhere.h5ad"), "nowhere.h5ad"),
    "truncated h5ad": (truncated, r"truncated\.h5ad"),
    "no HDF5": (no_hdf5, r"text\.h5ad"),
    "other format": (lambda f: f.rename(f.with_suffix(".csv")), r"\.csv"),
    "negative": (lambda f: changed(f, "bad.h5ad", lambda c: with_values(c, -1)), "negative"),
    "NaN": (lambda f: changed(f, "bad.h5ad", lambda c: with_values(c, np.nan)), "NaN"),
    "infinite": (lambda f: changed(f, "bad.h5ad", lambda c: with_values(c, np.inf)), "infinite"),
    "non-integer": (lambda f: changed(f, "bad.h5ad", lambda c: with_values(c, 1.5)), "1.5"),
    "no cells": (lambda f: changed(f, "bad.h5ad", lambda c: c[:0].copy()), "no cells"),
    "no genes": (lambda f: changed(f, "bad.h5ad", lambda c: c[:, :0].copy()), "no genes"),
    "mouse symbols": (lambda f: changed(f, "bad.h5ad", as_mouse), "mouse"),
    "no overlap": (lambda f: changed(f, "bad.h5ad", as_unknown), "peak_0"),
    "empty cell": (lambda f: changed(f, "bad.h5ad", with_empty_cell), "on_empty_cell"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_message_and_leaves_nothing(capsys, cells_file, tiny_model_dir, tmp_path, case):
    make, message = BAD_FILES[case]
    source = make(cells_file)
    before = sorted(tmp_path.iterdir())
    output = tmp_path / f"out{source.suffix}"
    code, out, err = run(
        capsys, "embed", source, output, "--model", tiny_model_dir, "--gene-column", "symbol", "--no-progress"
    )
    assert code == 1
    assert out == ""
    assert re.search(message, one_message(err))
    assert sorted(tmp_path.iterdir()) == before


BAD_OPTIONS = {
    "no model": (["--model", "./nowhere"], "no model folder"),
    "wrong layer": (["--layer", "counts"], "layer"),
    "wrong gene column": (["--gene-column", "gene_symbols"], "symbol"),
    "wrong obs column": (["--values", "log1p_cp10k", "--total-counts", "n_counts"], "n_counts"),
    "both depths": (["--target-depth", "10000", "--depth-fold", "2"], "exclude each other"),
    "logarithm as depth": (["--target-depth", "4"], "total count, not a logarithm"),
    "no device": (["--device", "gpu"], "cpu"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_one_message_and_leaves_nothing(capsys, cells_file, tiny_model_dir, tmp_path, case):
    options, message = BAD_OPTIONS[case]
    base = {"--model": str(tiny_model_dir), "--gene-column": "symbol"}
    base.update(zip(options[::2], options[1::2], strict=True))
    arguments = [part for pair in base.items() for part in pair]
    code, _, err = run(capsys, "embed", cells_file, tmp_path / "out.h5ad", *arguments, "--no-progress")
    assert code == 1
    assert message in one_message(err)
    assert sorted(tmp_path.iterdir()) == [cells_file]


def test_wrong_usage_is_exit_code_2(capsys, cells_file):
    code, _, err = run(capsys, "embed", cells_file)
    assert code == 2
    assert "OUT" in err
    code, _, err = run(capsys, "embed", cells_file, "out.h5ad", "--model", "m", "--values", "tpm")
    assert code == 2
    assert "tpm" in err


def test_an_interruption_says_how_to_go_on(capsys, cells_file, tiny_model_dir, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding, "embed_batch", interrupt)
    arguments = ("embed", cells_file, tmp_path / "out.h5ad", "--model", tiny_model_dir, "--gene-column", "symbol")
    code, _, err = run(capsys, *arguments, "--no-progress")
    assert code == 130
    assert "resumes when the same command is run again" in err
    monkeypatch.undo()
    code, _, err = run(capsys, *arguments, "--no-progress")
    assert code == 0, err


def test_debug_shows_the_traceback(capsys, cells_file, tmp_path):
    code, _, err = run(capsys, "embed", cells_file, tmp_path / "o.h5ad", "--model", "./nowhere", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert "Error: There is no model folder" in err


def test_convert_then_embed(capsys, parity_dir, cells_file, tmp_path):
    folder = tmp_path / "converted"
    code, out, err = run(capsys, "convert", parity_dir / "models.ckpt", folder, "--key", "cell")
    assert code == 0, err
    assert out.strip() == str(folder)
    code, _, err = run(
        capsys, "embed", cells_file, tmp_path / "o.h5ad", "--model", folder, "--gene-column", "symbol", "--no-progress"
    )
    assert code == 0, err
    code, _, err = run(capsys, "convert", parity_dir / "models.ckpt", folder, "--key", "cell")
    assert code == 1
    assert "--overwrite" in one_message(err)


def test_a_wrong_checkpoint_is_one_message_and_leaves_nothing(capsys, tmp_path):
    checkpoint = tmp_path / "models.ckpt"
    torch.save({"epoch": 3}, checkpoint)
    code, _, err = run(capsys, "convert", checkpoint, tmp_path / "out", "--key", "cell")
    assert code == 1
    assert "epoch" in one_message(err)
    assert sorted(tmp_path.iterdir()) == [checkpoint]


def test_doctor_reports_versions_devices_and_backends(capsys, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(doctor, "BACKENDS", ("eager", "sdpa", "flash_attention_2", "nonsense"))
    code, out, _ = run(capsys, "doctor", tiny_model_dir)
    assert code == 0
    for name in ("torch", "transformers", "cpu", "eager", "sdpa", "flash_attention_2"):
        assert name in out
    findings = {finding.name: finding for finding in doctor.diagnose(str(tiny_model_dir))}
    assert findings["eager"].passed
    assert findings["sdpa"].passed
    assert not findings["nonsense"].passed
    assert findings[str(tiny_model_dir)].passed
    assert "19,264 genes" in findings[str(tiny_model_dir)].result


def test_doctor_fails_for_a_damaged_model(capsys, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "BACKENDS", ())
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "gene_vocabulary.tsv").unlink()
    code, out, _ = run(capsys, "doctor", folder)
    assert code == 1
    assert "no" in out
    assert json.loads((folder / "config.json").read_text())["model_type"] == "scfoundation"


def test_the_installed_command_runs():
    command = shutil.which("scfoundation", path=str(Path(sys.executable).parent))
    arguments = [command] if command else [sys.executable, "-m", "scfoundation_hf"]
    out = subprocess.run([*arguments, "--help"], capture_output=True, text=True, check=True).stdout
    assert "embed" in out
    assert "doctor" in out
