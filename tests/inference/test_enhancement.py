"""`enhance`: the same numbers however the cells arrive, honest depths, nothing half-written."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.sparse import issparse

from scfoundation_hf.cli import main
from scfoundation_hf.inference import enhancement, writer
from scfoundation_hf.inference.enhancement import enhance, find_genes
from scfoundation_hf.inference.gene_embeddings import gene_embeddings
from scfoundation_hf.inference.writer import rows_noted
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining, ScFoundationModel
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer
from scfoundation_hf.trainer_scripts.convert_checkpoint import convert_checkpoint

OPTIONS = {"gene_column": "symbol", "progress": False}
GENES = ["NKG7", "ENSG00000167286", "CD4", "INS"]  # the second is CD3D; the last is in no blood cell
TOLERANCE = {"rtol": 0, "atol": 1e-5}
COUNTS = "counts_at_target_depth"


@pytest.fixture
def cells(example_cells) -> anndata.AnnData:
    return anndata.read_h5ad(example_cells)[::80].copy()  # 10 cells


@pytest.fixture
def cells_file(cells, tmp_path) -> Path:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> ScFoundationForPreTraining:
    return ScFoundationForPreTraining.from_pretrained(tiny_model_dir).eval()


def read(path: Path) -> anndata.AnnData:
    return anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if issparse(matrix) else np.asarray(matrix)


def test_a_new_anndata_holds_what_the_model_predicts(cells, model):
    before = cells.copy()
    enhanced = enhance(cells, model, target_depth=20_000, **OPTIONS)
    tokenizer = ScFoundationTokenizer()
    with torch.inference_mode():  # one cell at a time, padded
        batches = [tokenizer(cells[i : i + 1], gene_column="symbol", target_depth=20_000) for i in range(10)]
        expected = np.concatenate([model(**batch).predicted_values.numpy() for batch in batches])
    assert enhanced.X.dtype == np.float32
    np.testing.assert_allclose(enhanced.X, expected, **TOLERANCE)
    np.testing.assert_allclose(
        enhanced.layers[COUNTS], np.maximum(np.expm1(expected), 0) / 10_000 * 20_000, rtol=0, atol=1e-4
    )
    assert (expected < 0).any()
    assert enhanced.X.min() < 0  # as the model gave it, while no count is below 0
    assert enhanced.layers[COUNTS].min() == 0
    assert enhanced.var_names.tolist() == list(tokenizer.vocabulary.symbols)
    assert enhanced.var.loc["CD3D", "ensembl_id"] == "ENSG00000167286"
    assert enhanced.var.loc["CD3D", "in_input"]
    assert not enhanced.var.loc["A1CF", "in_input"]
    assert enhanced.obs[before.obs.columns].equals(before.obs)
    assert (enhanced.obs["enhanced_target_depth"].round(6) == 20_000).all()
    assert enhanced.obs["enhanced_counts_kept"].between(0.5, 1).all()
    record = json.loads(enhanced.uns["scfoundation"]["enhanced"])
    assert record["cells"] == {"total": 10, "enhanced": 10, "empty": 0, "below_min_genes": 0}
    assert record["settings"]["target_depth"] == 20_000
    assert record["alignment_report"]["num_matched_genes"] > 10_000
    assert cells.obs.equals(before.obs)
    assert "scfoundation" not in cells.uns


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_file_gives_what_memory_gives_in_any_batch(cells, cells_file, model, tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(writer, "BYTES_PER_BLOCK", 3 * 4 * 19_264)  # blocks of three cells
    expected = enhance(cells[::-1].copy(), model, depth_fold=2, cells_per_batch=1, **OPTIONS)[cells.obs_names]
    output = enhance(cells_file, model, output=tmp_path / f"out{suffix}", depth_fold=2, cells_per_batch=4, **OPTIONS)
    written = read(output)
    np.testing.assert_allclose(written.X, expected.X, **TOLERANCE)
    np.testing.assert_allclose(written.layers[COUNTS], expected.layers[COUNTS], rtol=2e-5, atol=1e-4)
    assert written.obs_names.equals(cells.obs_names)
    assert written.obs["cell_type"].tolist() == cells.obs["cell_type"].tolist()
    assert written.var.equals(expected.var)
    assert json.loads(written.uns["scfoundation"]["enhanced"])["settings"]["depth_fold"] == 2
    assert sorted(tmp_path.iterdir()) == sorted([cells_file, output])


def test_chosen_genes_are_those_of_all_genes(cells, model):
    everything = enhance(cells, model, depth_fold=5, **OPTIONS)
    chosen = enhance(cells, model, genes=GENES, depth_fold=5, cells_per_batch=3, **OPTIONS)
    assert chosen.var_names.tolist() == ["NKG7", "CD3D", "CD4", "INS"]
    np.testing.assert_allclose(chosen.X, everything[:, chosen.var_names].X, **TOLERANCE)
    assert json.loads(chosen.uns["scfoundation"]["enhanced"])["settings"]["genes"] == chosen.var_names.tolist()


def test_genes_that_there_are_not_are_named(cells, model):
    vocabulary = GeneVocabulary.default()
    assert find_genes(vocabulary, ["CD3D"]).tolist() == [vocabulary.index("CD3D")]
    with pytest.raises(ValueError, match=r"does not hold 'Actb', 'ENSG00000000001'\. It predicts no other"):
        enhance(cells, model, genes=["CD3D", "Actb", "ENSG00000000001"], **OPTIONS)
    with pytest.raises(ValueError, match=r"'g0', 'g1', 'g2', 'g3', 'g4' and 2 more"):
        find_genes(vocabulary, [f"g{i}" for i in range(7)])
    with pytest.raises(ValueError, match=r"holds 'CD3D' twice \(as 'CD3D' and 'ENSG00000167286'\)"):
        find_genes(vocabulary, ["CD3D", "NKG7", "ENSG00000167286"])
    with pytest.raises(ValueError, match=r"genes is the text 'CD3D'; pass a list"):
        find_genes(vocabulary, "CD3D")


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_small_predictions_become_exact_zeros_of_a_sparse_matrix(cells, cells_file, model, tmp_path, suffix):
    plain = enhance(cells, model, depth_fold=2, **OPTIONS)
    threshold = float(np.quantile(plain.X, 0.7))
    options = {"depth_fold": 2, "min_value": threshold, **OPTIONS}
    written = read(enhance(cells_file, model, output=tmp_path / f"out{suffix}", **options))
    in_memory = enhance(cells, model, **options)
    for enhanced in (written, in_memory):
        assert issparse(enhanced.X)
        assert enhanced.X.format == enhanced.layers[COUNTS].format == "csr"
        assert enhanced.X.dtype == enhanced.layers[COUNTS].dtype == np.float32
        assert 0.29 < enhanced.X.nnz / plain.X.size < 0.31
        values, counts = enhanced.X.toarray(), enhanced.layers[COUNTS].toarray()
        is_large, is_clear = plain.X - threshold > 0, np.abs(plain.X - threshold) > 1e-4
        expected = np.where(is_large, plain.X, 0)
        np.testing.assert_allclose(values[is_clear], expected[is_clear], **TOLERANCE)
        np.testing.assert_array_equal(counts > 0, values > 0)
        assert json.loads(enhanced.uns["scfoundation"]["enhanced"])["settings"]["min_value"] == threshold
    np.testing.assert_allclose(dense(written.layers[COUNTS]), dense(in_memory.layers[COUNTS]), rtol=1e-6)


def test_float16_keeps_counts_beyond_its_range(cells, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        enhanced = enhance(cells, model, target_depth=9e8, values_dtype="float16", **OPTIONS)
    assert enhanced.X.dtype == np.float16
    assert np.isfinite(enhanced.layers[COUNTS]).all()
    expected = np.expm1(np.maximum(enhanced.X.astype(np.float32), 0)) * 9e4
    np.testing.assert_allclose(enhanced.layers[COUNTS], expected, rtol=1e-6)
    assert enhanced.layers[COUNTS].dtype == np.float32


def test_cells_left_out_get_nan_rows(cells, model, cells_file, tmp_path):
    counts = cells.X.tolil()
    counts[3] = 0
    cells.X = counts.tocsr()
    cells.write_h5ad(cells_file)
    with pytest.raises(ValueError, match=cells.obs_names[3]):
        enhance(cells, model, **OPTIONS)
    for min_value in (None, 0.1):
        with pytest.warns(UserWarning, match="1 of 10 cells are left out"):
            output = enhance(
                cells_file,
                model,
                output=tmp_path / f"{min_value}.h5ad",
                on_empty_cell="nan",
                min_value=min_value,
                **OPTIONS,
            )
        written = read(output)
        for matrix in (dense(written.X), dense(written.layers[COUNTS])):
            assert np.isnan(matrix).all(axis=1).tolist() == [cell == 3 for cell in range(10)]
            assert np.isfinite(np.delete(matrix, 3, axis=0)).all()
        assert np.isnan(written.obs["enhanced_target_depth"].iloc[3])


def test_target_depths_that_mean_nothing_are_refused(cells, model):
    totals = np.asarray(cells.X.sum(axis=1)).ravel()
    deepest = cells.obs_names[int(np.argmax(totals))]
    with pytest.raises(ValueError, match=rf"below the own depth of \d+ of 10 cells .*{deepest}.*target_depth of at"):
        enhance(cells, model, target_depth=np.sort(totals)[-1] * 0.9, **OPTIONS)
    with pytest.raises(ValueError, match=r"below the own depth of 10 of 10 cells"):
        enhance(cells, model, depth_fold=0.5, **OPTIONS)
    with pytest.raises(ValueError, match=rf"of cell '{deepest}' would be .*above 1e\+09\), which no cell has"):
        enhance(cells, model, depth_fold=1e9 / totals.min(), **OPTIONS)
    with pytest.warns(UserWarning, match=r"target depth of 10 cells is above 1e\+07") as warned:
        enhance(cells, model, target_depth=2e7, genes=["CD4"], **OPTIONS)
    assert len(warned) == 1
    enhance(cells, model, target_depth=1e7, genes=["CD4"], **OPTIONS)


def test_outputs_and_arguments_are_checked_before_anything_runs(cells, cells_file, model, tiny_model_dir, tmp_path):
    out = tmp_path / "out.h5ad"
    with pytest.raises(TypeError, match="enhance takes an AnnData or the path of one, not a ndarray"):
        enhance(np.ones((2, 3)), model)
    with pytest.raises(ValueError, match="output= is missing"):
        enhance(cells_file, model, **OPTIONS)
    with pytest.raises(ValueError, match=r"out\.csv must end in \.h5ad or \.zarr"):
        enhance(cells_file, model, output=tmp_path / "out.csv", **OPTIONS)
    with pytest.raises(ValueError, match="is the input itself"):
        enhance(cells_file, model, output=cells_file, overwrite=True, **OPTIONS)
    with pytest.raises(ValueError, match="cells_per_batch is 0"):
        enhance(cells, model, cells_per_batch=0, **OPTIONS)
    with pytest.raises(ValueError, match="values_dtype must be 'float32' or 'float16', got 'int8'"):
        enhance(cells, model, values_dtype="int8", **OPTIONS)
    with pytest.raises(ValueError, match="min_value must be a number of at least 0, got -1"):
        enhance(cells, model, min_value=-1, **OPTIONS)
    with pytest.raises(ValueError, match="sparse matrices, which know no float16"):
        enhance(cells, model, min_value=1, values_dtype="float16", **OPTIONS)
    with pytest.raises(ValueError, match="A ScFoundationModel has no decoder"):
        enhance(cells, ScFoundationModel.from_pretrained(tiny_model_dir), **OPTIONS)
    ScFoundationModel.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "encoder")
    ScFoundationTokenizer().save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"lack \d+ tensors of the encoder and decoder \(decoder\."):
        enhance(cells, tmp_path / "encoder", **OPTIONS)
    out.touch()
    with pytest.raises(FileExistsError, match="overwrite"):
        enhance(cells_file, model, output=out, **OPTIONS)
    assert read(enhance(cells_file, model, output=out, genes=GENES, overwrite=True, **OPTIONS)).shape == (10, 4)


def test_cells_of_another_format_bring_their_names(cells, model, tmp_path):
    table = cells.to_df()
    table.columns = cells.var["symbol"].astype(str)
    table = table.loc[:, ~table.columns.duplicated()]
    table.to_csv(tmp_path / "cells.csv")
    output = enhance(tmp_path / "cells.csv", model, output=tmp_path / "out.h5ad", genes=GENES, progress=False)
    assert read(output).obs_names.equals(cells.obs_names)


def test_the_original_predicts_the_same(parity_dir, tmp_path):
    """From the original's input to its stored outputs, gene_expression and gene."""
    inputs, outputs = (load_file(parity_dir / f"{name}.safetensors") for name in ("inputs", "outputs"))
    model = convert_checkpoint(parity_dir / "models.ckpt", tmp_path / "gene", key="gene")
    cells = anndata.AnnData(inputs["counts"].numpy())
    cells.var_names = GeneVocabulary.default().symbols
    enhanced = enhance(cells, model, target_depth=10_000, progress=False).X
    expected = outputs["expr_single_F_t4"].numpy()
    np.testing.assert_allclose(enhanced, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    genes = [GeneVocabulary.default().symbols[gene] for gene in inputs["gene_positions"].tolist()]
    gene_embeddings(cells, model, genes=genes, progress=False)
    expected = outputs["gene_F_f1"].numpy()
    got = cells.obsm["X_scfoundation_genes"][: len(expected)]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def run_command(capsys, *arguments) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert not exit_info.value.code, err
    return out


@pytest.mark.parametrize(("command", "function"), [("enhance", enhance), ("gene-embeddings", gene_embeddings)])
def test_the_commands_are_the_functions(
    capsys, cells, cells_file, model, tiny_model_dir, tmp_path, command, function, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    help_text = re.sub(r"\x1b\[[0-9;]*m", "", run_command(capsys, command, "--help"))
    assert "Example:" in help_text
    for name in set(inspect.signature(function).parameters) - {"data", "output"}:
        assert f"--{name.replace('_', '-')}" in help_text, name
    options = ["--gene-column", "symbol", "--depth-fold", 2, "--no-progress", "--genes", "NKG7", "--genes", "CD4"]
    out = run_command(capsys, command, cells_file, tmp_path / "out.h5ad", "--model", tiny_model_dir, *options)
    assert out.strip() == str(tmp_path / "out.h5ad")
    written = read(tmp_path / "out.h5ad")
    expected = function(cells, model, genes=["NKG7", "CD4"], depth_fold=2, **OPTIONS)
    if function is enhance:
        np.testing.assert_allclose(written.X, expected.X, **TOLERANCE)
    else:
        key = "X_scfoundation_genes"
        np.testing.assert_allclose(written.obsm[key], expected.obsm[key], **TOLERANCE)


def test_a_model_in_training_is_left_in_training(cells, tiny_model_dir):
    model = ScFoundationForPreTraining.from_pretrained(tiny_model_dir).train()
    enhance(cells, model, genes=GENES, **OPTIONS)
    assert model.training
    assert model.decoder.training


def test_an_error_leaves_nothing_behind(cells_file, model, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("device on fire")

    monkeypatch.setattr(enhancement, "_predict_batch", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        enhance(cells_file, model, output=tmp_path / "out.h5ad", **OPTIONS)
    assert sorted(tmp_path.iterdir()) == [cells_file]


def test_a_killed_process_resumes_and_ends_with_the_same_file(cells_file, model, tiny_model_dir, tmp_path):
    script = f"""
import time
from scfoundation_hf.inference import enhancement
plain = enhancement._predict_batch
def slow(*arguments):
    time.sleep(1)
    return plain(*arguments)
enhancement._predict_batch = slow
enhancement.enhance({str(cells_file)!r}, {str(tiny_model_dir)!r}, output={str(tmp_path / "out.h5ad")!r},
    gene_column="symbol", cells_per_batch=1, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    folder = tmp_path / "out.h5ad.progress"
    deadline = time.monotonic() + 120
    while not list(folder.glob("*-000002.rows")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.h5ad").exists()
    assert 2 <= sum(rows_noted(path) for path in folder.glob("*.rows")) < 10
    options = {**OPTIONS, "cells_per_batch": 1}
    computed = []
    plain = enhancement._predict_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enhancement, "_predict_batch", lambda *given: computed.append(given) or plain(*given))
        resumed = enhance(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", **options)
    assert 0 < len(computed) <= 8
    whole = enhance(cells_file, tiny_model_dir, output=tmp_path / "whole.h5ad", **options)
    assert resumed.read_bytes() == whole.read_bytes()
    assert not folder.exists()
