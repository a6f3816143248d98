"""`embed`: the same numbers however the cells arrive, everything else kept, nothing half-written."""

import json
import os
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

import scfoundation_hf
from scfoundation_hf.inference import cell_job, embedding, writer
from scfoundation_hf.inference.cell_job import batch_borders
from scfoundation_hf.inference.embedding import embed
from scfoundation_hf.inference.writer import rows_noted
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining

OPTIONS = {"gene_column": "symbol", "progress": False}
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def cells(example_cells) -> anndata.AnnData:
    return anndata.read_h5ad(example_cells)[::16].copy()  # 50 cells of ten types


@pytest.fixture
def cells_file(cells, tmp_path) -> Path:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def test_an_anndata_is_filled_in_place(cells, tiny_model_dir):
    before = cells.copy()
    result = embed(cells, tiny_model_dir, **OPTIONS)
    assert result is cells
    assert cells.obsm["X_scfoundation"].shape == (50, 64)
    assert cells.obsm["X_scfoundation"].dtype == np.float32
    assert np.isfinite(cells.obsm["X_scfoundation"]).all()
    assert cells.obs["X_scfoundation_counts_kept"].between(0.5, 1).all()
    record = json.loads(cells.uns["scfoundation"]["X_scfoundation"])
    assert record["cells"] == {"total": 50, "embedded": 50, "empty": 0, "below_min_genes": 0}
    assert record["model"]["name"] == str(tiny_model_dir)
    assert record["settings"]["pooling"] == "all"
    assert record["alignment_report"]["num_matched_genes"] > 10_000
    assert (cells.X != before.X).nnz == 0
    assert cells.obs[before.obs.columns].equals(before.obs)
    assert cells.var.equals(before.var)


def test_the_result_survives_a_round_trip_to_disk(cells, tiny_model_dir, tmp_path):
    embed(cells, tiny_model_dir, **OPTIONS)
    cells.write_h5ad(tmp_path / "out.h5ad")
    read = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert read.uns["scfoundation"]["X_scfoundation"] == cells.uns["scfoundation"]["X_scfoundation"]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_file_gives_what_memory_gives(cells, tiny_model_dir, tmp_path, suffix, write_copy):
    source = write_copy(cells, tmp_path / f"in{suffix}")
    output = embed(source, tiny_model_dir, output=tmp_path / f"out{suffix}", tokens_per_batch=700, **OPTIONS)
    assert output == tmp_path / f"out{suffix}"
    written = anndata.read_h5ad(output) if suffix == ".h5ad" else anndata.read_zarr(output)
    expected = embed(cells.copy(), tiny_model_dir, **OPTIONS)
    np.testing.assert_allclose(written.obsm["X_scfoundation"], expected.obsm["X_scfoundation"], **TOLERANCE)
    assert (written.X != cells.X).nnz == 0
    assert written.obs[cells.obs.columns].equals(cells.obs)
    assert sorted(tmp_path.iterdir()) == [source, output]


def test_a_backed_anndata_gives_what_memory_gives(cells, cells_file, tiny_model_dir):
    backed = anndata.read_h5ad(cells_file, backed="r")
    assert embed(backed, tiny_model_dir, **OPTIONS) is backed
    expected = embed(cells, tiny_model_dir, **OPTIONS)
    np.testing.assert_allclose(backed.obsm["X_scfoundation"], expected.obsm["X_scfoundation"], **TOLERANCE)
    assert backed.isbacked
    backed.file.close()


def test_neither_order_nor_company_nor_columns_matter(cells, tiny_model_dir):
    expected = embed(cells.copy(), tiny_model_dir, **OPTIONS).obsm["X_scfoundation"]
    order = np.random.default_rng(0).permutation(cells.n_obs)
    shuffled = cells[order, np.arange(cells.n_vars)[::-1]].copy()
    got = embed(shuffled, tiny_model_dir, tokens_per_batch=1, **OPTIONS).obsm["X_scfoundation"]
    np.testing.assert_allclose(got, expected[order], **TOLERANCE)
    alone = embed(cells[7:8].copy(), tiny_model_dir, **OPTIONS).obsm["X_scfoundation"]
    np.testing.assert_allclose(alone, expected[7:8], **TOLERANCE)


def test_another_attention_backend_gives_the_same(cells, tiny_model_dir):
    cells = cells[:10].copy()  # eager attention over packed cells is quadratic in all of them
    expected = embed(cells.copy(), tiny_model_dir, **OPTIONS).obsm["X_scfoundation"]
    model = ScFoundationForPreTraining.from_pretrained(tiny_model_dir, attn_implementation="eager")
    got = embed(cells, model, **OPTIONS).obsm["X_scfoundation"]
    np.testing.assert_allclose(got, expected, **TOLERANCE)


def test_max_pooling_is_the_max_over_all_tokens(cells, tiny_model_dir):
    embed(cells, tiny_model_dir, **OPTIONS)
    embed(cells, tiny_model_dir, pooling="max", key_added="X_max", **OPTIONS)
    parts = cells.obsm["X_scfoundation"].reshape(50, 4, 16)
    np.testing.assert_allclose(cells.obsm["X_max"], parts[:, :3].max(axis=1), **TOLERANCE)
    assert set(cells.uns["scfoundation"]) == {"X_scfoundation", "X_max"}


def test_a_training_model_is_used_in_evaluation_and_left_training(cells, tiny_model_dir):
    expected = embed(cells.copy(), tiny_model_dir, **OPTIONS).obsm["X_scfoundation"]
    model = ScFoundationForPreTraining.from_pretrained(tiny_model_dir).train()
    np.testing.assert_allclose(embed(cells, model, **OPTIONS).obsm["X_scfoundation"], expected, **TOLERANCE)
    assert model.training
    assert model.scfoundation.training
    assert not model.scfoundation.add_pooling_layer


def test_bfloat16_is_close_and_written_as_float32(cells, tiny_model_dir):
    expected = embed(cells.copy(), tiny_model_dir, **OPTIONS).obsm["X_scfoundation"]
    got = embed(cells, tiny_model_dir, dtype="bfloat16", **OPTIONS).obsm["X_scfoundation"]
    assert got.dtype == np.float32
    cosine = (got * expected).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.999
    assert not np.array_equal(got, expected)


def test_cells_left_out_get_nan_and_are_counted(cells, tiny_model_dir, tmp_path):
    counts = cells.X.tolil()
    counts[3] = 0
    cells.X = counts.tocsr()
    few = int(np.argmin(np.where(np.arange(50) == 3, 10**6, cells.X.getnnz(axis=1))))
    threshold = int(cells.X[few].nnz) - 20
    with pytest.raises(ValueError, match=cells.obs_names[3]):
        embed(cells.copy(), tiny_model_dir, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        embed(cells, tiny_model_dir, on_empty_cell="nan", min_genes=threshold, **OPTIONS)
    is_nan = np.isnan(cells.obsm["X_scfoundation"]).all(axis=1)
    record = json.loads(cells.uns["scfoundation"]["X_scfoundation"])["cells"]
    assert is_nan[3]
    assert record["empty"] == 1
    assert record["embedded"] + record["empty"] + record["below_min_genes"] == 50
    assert is_nan.sum() == record["empty"] + record["below_min_genes"]
    assert np.isnan(cells.obs["X_scfoundation_counts_kept"].iloc[3])


def test_outputs_and_arguments_are_checked_before_anything_runs(cells, cells_file, tiny_model_dir, tmp_path):
    with pytest.raises(TypeError, match="takes an AnnData or the path of one, not a ndarray"):
        embed(np.ones((2, 3)), tiny_model_dir, **OPTIONS)
    with pytest.raises(ValueError, match="output= is for files"):
        embed(cells, tiny_model_dir, output=tmp_path / "out.h5ad", **OPTIONS)
    with pytest.raises(ValueError, match="output= is missing"):
        embed(cells_file, tiny_model_dir, **OPTIONS)
    with pytest.raises(ValueError, match="is the input itself"):
        embed(cells_file, tiny_model_dir, output=cells_file, overwrite=True, **OPTIONS)
    with pytest.raises(ValueError, match="tokens_per_batch is 0"):
        embed(cells, tiny_model_dir, tokens_per_batch=0, **OPTIONS)
    with pytest.raises(ValueError, match="no pooling 'mean'"):
        embed(cells, tiny_model_dir, pooling="mean", **OPTIONS)
    embed(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", **OPTIONS)
    with pytest.raises(FileExistsError, match="overwrite"):
        embed(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", **OPTIONS)
    embed(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", overwrite=True, **OPTIONS)


def test_an_error_leaves_nothing_behind(cells_file, tiny_model_dir, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("device on fire")

    monkeypatch.setattr(embedding, "embed_batch", fail)
    with pytest.raises(RuntimeError, match="on fire"):
        embed(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", **OPTIONS)
    assert sorted(tmp_path.iterdir()) == [cells_file]


def test_an_interrupted_run_resumes_where_it_stopped(cells_file, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(cell_job, "PARTS", 2)
    monkeypatch.setattr(writer, "SECONDS_BETWEEN_NOTES", 0)
    options = {**OPTIONS, "tokens_per_batch": 4000}
    expected = embed(cells_file, tiny_model_dir, output=tmp_path / "whole.h5ad", **options)
    embed_batch, batches = embedding.embed_batch, []

    def interrupt_the_third(*arguments):
        batches.append(arguments)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return embed_batch(*arguments)

    monkeypatch.setattr(embedding, "embed_batch", interrupt_the_third)
    with pytest.raises(KeyboardInterrupt):
        embed(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", **options)
    assert not (tmp_path / "out.h5ad").exists()
    done = sum(rows_noted(path) for path in (tmp_path / "out.h5ad.progress").glob("*.rows"))
    assert done == batches[2][1].cell_index[0]  # everything before the third batch
    del batches[:3]
    monkeypatch.setattr(
        embedding, "embed_batch", lambda *arguments: batches.append(arguments) or embed_batch(*arguments)
    )
    resumed = embed(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", **options)
    assert resumed.read_bytes() == expected.read_bytes()
    assert sorted(np.concatenate([cells.cell_index for _, cells, _ in batches])) == list(range(done, 50))
    assert not (tmp_path / "out.h5ad.progress").exists()


def test_a_killed_process_resumes_and_ends_with_the_same_file(cells_file, tiny_model_dir, tmp_path):
    script = f"""
import time, scfoundation_hf
from scfoundation_hf.inference import embedding
plain = embedding.embed_batch
def slow(*arguments):
    time.sleep(0.3)
    return plain(*arguments)
embedding.embed_batch = slow
scfoundation_hf.embed({str(cells_file)!r}, {str(tiny_model_dir)!r}, output={str(tmp_path / "out.h5ad")!r},
    gene_column="symbol", tokens_per_batch=1000, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    part = tmp_path / "out.h5ad.progress" / "part-000000.rows"
    deadline = time.monotonic() + 120
    while not part.with_suffix(".json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.h5ad").exists()
    done = sum(rows_noted(path) for path in part.parent.glob("*.rows"))
    assert 0 < done < 50
    options = {**OPTIONS, "tokens_per_batch": 1000}
    resumed = embed(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", **options)
    whole = embed(cells_file, tiny_model_dir, output=tmp_path / "whole.h5ad", **options)
    assert resumed.read_bytes() == whole.read_bytes()


def test_batches_are_consecutive_cells_within_the_budget():
    assert batch_borders(np.array([50, 40, 30, 0, 500, 60, 0, 0]), 100).tolist() == [0, 2, 4, 5, 8]
    assert batch_borders(np.array([7]), 1).tolist() == [0, 1]
    assert batch_borders(np.array([0, 0, 3]), 100).tolist() == [0, 3]
    assert batch_borders(np.array([5, 5, 5, 0, 5]), 100, cells_per_batch=2).tolist() == [0, 2, 4, 5]
    assert batch_borders(np.array([5, 60, 5, 5, 5]), 50, cells_per_batch=2).tolist() == [0, 1, 2, 4, 5]
    lengths = np.random.default_rng(0).integers(1, 300, size=1000)
    borders = batch_borders(lengths, 400)
    assert borders[0] == 0
    assert borders[-1] == 1000
    assert np.add.reduceat(lengths, borders[:-1]).max() <= 400


def test_the_progress_bar_and_the_report_go_to_stderr(cells, tiny_model_dir, capsys):
    scfoundation_hf.embed(cells, tiny_model_dir, gene_column="symbol")
    out, err = capsys.readouterr()
    assert out == ""
    assert "50/50" in err
    assert "cells/s" in err
    assert "genes found" in err


def test_a_model_on_the_gpu_is_used_by_default(tiny_model_dir, cells):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    expected = embed(cells.copy(), tiny_model_dir, device="cpu", **OPTIONS).obsm["X_scfoundation"]
    got = embed(cells, tiny_model_dir, **OPTIONS).obsm["X_scfoundation"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
