"""`annotate`: the model's calls with their verdict, the same however the cells arrive, in memory and on disk."""

import dataclasses
import inspect
import json
import re
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from transformers import AutoModelForSequenceClassification, pipeline

from scfoundation_hf.cli import main
from scfoundation_hf.inference import annotation, annotation_pipeline
from scfoundation_hf.inference.annotation import annotate, column_names
from scfoundation_hf.inference.calibration import Calibration
from scfoundation_hf.inference.embedding import embed
from scfoundation_hf.inference.reference_index import ReferenceIndex, index_reference
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import (
    ScFoundationForCellClassification,
    ScFoundationForPreTraining,
)
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

OPTIONS = {"gene_column": "symbol", "progress": False}
TOLERANCE = {"rtol": 0, "atol": 1e-5}
PROBABILITIES = "scfoundation_probabilities"


@pytest.fixture
def cells(example_cells) -> anndata.AnnData:
    return anndata.read_h5ad(example_cells)[::20].copy()  # 40 cells of ten types


@pytest.fixture
def cells_file(cells, tmp_path) -> Path:
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture(scope="module")
def cell_types(example_cells) -> list[str]:
    return sorted(anndata.read_h5ad(example_cells, backed="r").obs["cell_type"].unique())


@pytest.fixture(scope="module")
def uncalibrated_dir(tiny_model_dir, cell_types, example_cells, tmp_path_factory) -> Path:
    """A classifier of ten types whose norm has seen cells; its head is random."""
    torch.manual_seed(0)
    model = ScFoundationForCellClassification.from_pretrained(
        tiny_model_dir,
        id2label=dict(enumerate(cell_types)),
        label2id={name: number for number, name in enumerate(cell_types)},
        classifier_pooling="all",
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    ).train()
    batch = ScFoundationTokenizer()(anndata.read_h5ad(example_cells)[10::80].copy(), gene_column="symbol")
    model.classifier.norm.momentum = 1.0
    model(**batch)
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    ScFoundationTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def calibration(uncalibrated_dir, example_cells) -> Calibration:
    """A temperature, and a threshold in the middle of these cells' confidences."""
    model = ScFoundationForCellClassification.from_pretrained(uncalibrated_dir).eval()
    with torch.inference_mode():
        logits = model(**ScFoundationTokenizer()(anndata.read_h5ad(example_cells)[::20], gene_column="symbol")).logits
    confidence = Calibration(0.5, 0.0).probabilities(logits).max(dim=-1).values.sort().values
    return Calibration(0.5, float(confidence[19:21].mean()))


@pytest.fixture(scope="module")
def model_dir(uncalibrated_dir, calibration, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(uncalibrated_dir, tmp_path_factory.mktemp("calibrated") / "classifier"))
    calibration.save(folder)
    return folder


@pytest.fixture(scope="module")
def reference_dir(example_cells, tiny_model_dir, tmp_path_factory) -> Path:
    index = index_reference(
        anndata.read_h5ad(example_cells)[4::16].copy(), tiny_model_dir, label="cell_type", **OPTIONS
    )
    return index.save(tmp_path_factory.mktemp("indices") / "reference")


def same_results(got: anndata.AnnData, expected: anndata.AnnData, key: str = "scfoundation") -> None:
    for name in ("cell_type", "best_cell_type"):
        column, other = got.obs[f"{key}_{name}"], expected.obs[f"{key}_{name}"]
        assert column.astype(str).tolist() == other.astype(str).tolist()
    for name in ("confidence", "distance"):
        if f"{key}_{name}" in expected.obs:
            np.testing.assert_allclose(got.obs[f"{key}_{name}"], expected.obs[f"{key}_{name}"], **TOLERANCE)
    pd.testing.assert_frame_equal(
        got.obsm[f"{key}_probabilities"], expected.obsm[f"{key}_probabilities"], check_names=False, **TOLERANCE
    )


# --- By a classifier ---


def test_calls_are_the_models_calibrated(cells, model_dir, calibration, cell_types):
    before = cells.copy()
    assert annotate(cells, model_dir, **OPTIONS) is cells
    model = AutoModelForSequenceClassification.from_pretrained(model_dir).eval()
    with torch.inference_mode():
        logits = model(**ScFoundationTokenizer()(before, gene_column="symbol")).logits
    expected = (logits / calibration.temperature).softmax(dim=-1).numpy()
    probabilities = cells.obsm[PROBABILITIES]
    assert list(probabilities.columns) == [name.replace("/", "_") for name in cell_types]
    assert (probabilities.dtypes == np.float32).all()
    np.testing.assert_allclose(probabilities, expected, **TOLERANCE)
    np.testing.assert_allclose(cells.obs["scfoundation_confidence"], expected.max(axis=1), **TOLERANCE)
    best = np.array(cell_types)[expected.argmax(axis=1)]
    assert cells.obs["scfoundation_best_cell_type"].tolist() == best.tolist()
    verdict = np.where(expected.max(axis=1) < calibration.unassigned_below, "unassigned", best)
    assert cells.obs["scfoundation_cell_type"].tolist() == verdict.tolist()
    assert (verdict == "unassigned").sum() == 20
    assert list(cells.obs["scfoundation_cell_type"].cat.categories) == [*cell_types, "unassigned"]
    assert cells.obs["scfoundation_counts_kept"].between(0.5, 1).all()
    assert cells.obs[before.obs.columns].equals(before.obs)
    record = json.loads(cells.uns["scfoundation"]["scfoundation"])
    assert record["cells"]["annotated"] == 40
    assert record["settings"]["cell_types"] == cell_types
    assert record["settings"]["calibration"] == {
        "temperature": calibration.temperature,
        "unassigned_below": calibration.unassigned_below,
    }
    assert record["model"]["name"] == str(model_dir)


def test_without_the_verdict_every_cell_has_its_best_type(cells, model_dir):
    annotate(cells, model_dir, unassigned=False, key_added="plain", **OPTIONS)
    assert cells.obs["plain_cell_type"].tolist() == cells.obs["plain_best_cell_type"].tolist()
    assert set(cells.uns["scfoundation"]) == {"plain"}


def test_a_model_without_calibration_says_so(cells, uncalibrated_dir):
    with pytest.warns(UserWarning, match=r"has no calibration\.json.*no cell is called unassigned"):
        annotate(cells, uncalibrated_dir, **OPTIONS)
    assert "unassigned" not in set(cells.obs["scfoundation_cell_type"])
    assert json.loads(cells.uns["scfoundation"]["scfoundation"])["settings"]["calibration"] is None
    logits = annotation._classify(
        ScFoundationForCellClassification.from_pretrained(uncalibrated_dir).eval(),
        ScFoundationTokenizer().prepare(cells, gene_column="symbol").encode(0, 40),
    )
    np.testing.assert_allclose(cells.obsm[PROBABILITIES], logits.softmax(dim=-1), **TOLERANCE)
    annotate(cells, uncalibrated_dir, unassigned=False, **OPTIONS)  # and is silent where that is meant


def test_a_loaded_model_and_a_saved_one_give_the_same(cells, model_dir, tmp_path):
    expected = annotate(cells.copy(), model_dir, **OPTIONS)
    model = AutoModelForSequenceClassification.from_pretrained(model_dir).train()
    same_results(annotate(cells.copy(), model, **OPTIONS), expected)
    assert model.training
    model.save_pretrained(tmp_path)
    ScFoundationTokenizer().save_pretrained(tmp_path)
    Calibration.load(model_dir).save(tmp_path)
    same_results(annotate(cells.copy(), tmp_path, **OPTIONS), expected)


def test_the_pipeline_says_the_same(cells, model_dir, uncalibrated_dir):
    annotate(cells, model_dir, **OPTIONS)
    results = pipeline(annotation_pipeline.TASK, model=str(model_dir), device="cpu")(cells, gene_column="symbol")
    assert [result["label"] for result in results] == cells.obs["scfoundation_best_cell_type"].tolist()
    scores = [result["score"] for result in results]
    np.testing.assert_allclose(scores, cells.obs["scfoundation_confidence"], **TOLERANCE)
    plain = pipeline(annotation_pipeline.TASK, model=str(uncalibrated_dir), device="cpu")(cells, gene_column="symbol")
    assert max(result["score"] for result in plain) < max(scores)


def test_neither_order_nor_company_nor_columns_matter(cells, model_dir):
    expected = annotate(cells.copy(), model_dir, **OPTIONS)
    order = np.random.default_rng(0).permutation(cells.n_obs)
    shuffled = cells[order, np.arange(cells.n_vars)[::-1]].copy()
    same_results(annotate(shuffled, model_dir, tokens_per_batch=1, **OPTIONS), expected[order].copy())


def test_genes_that_training_never_saw_are_taken_and_foreign_ones_change_nothing(cells, model_dir):
    expected = annotate(cells.copy(), model_dir, **OPTIONS)
    foreign = anndata.AnnData(
        np.full((cells.n_obs, 3), 7, dtype=np.float32),
        obs=cells.obs,
        var=pd.DataFrame({"symbol": ["peak_1", "peak_2", "peak_3"]}, index=["p1", "p2", "p3"]),
    )
    foreign.X = csr_matrix(foreign.X)
    wider = anndata.concat([cells, foreign], axis="var", merge="same")
    same_results(annotate(wider, model_dir, **OPTIONS), expected)
    report = json.loads(wider.uns["scfoundation"]["scfoundation"])["alignment_report"]
    assert {"peak_1", "peak_2", "peak_3"} <= set(report["dropped"])


def test_other_genes_than_the_training_set_count_as_not_expressed(cells, model_dir):
    fewer = cells[:, ::2].copy()
    with pytest.warns(UserWarning, match=r"read depth is computed from a subset of genes"):
        annotate(fewer, model_dir, **OPTIONS)
    zeros = cells.copy()
    zeros.X = csr_matrix(zeros.X.multiply(np.arange(cells.n_vars) % 2 == 0))
    same_results(fewer, annotate(zeros, model_dir, **OPTIONS))


def test_too_few_shared_genes_are_refused(cells, model_dir):
    with pytest.raises(ValueError, match=r"Only .* genes .*at least 5% are needed"):
        annotate(cells[:, :500].copy(), model_dir, **OPTIONS)


@pytest.mark.parametrize("source", [pytest.param("pretrained", id="pretrained"), pytest.param("loaded", id="loaded")])
def test_a_model_without_classification_head_is_refused(cells, tiny_model_dir, source):
    model = ScFoundationForPreTraining.from_pretrained(tiny_model_dir) if source == "loaded" else tiny_model_dir
    with pytest.raises(ValueError, match=r"has no classification head .*scfoundation finetune.*reference="):
        annotate(cells, model, **OPTIONS)


def test_a_model_that_names_no_types_is_refused(cells, tiny_model_dir, tmp_path):
    model = ScFoundationForCellClassification.from_pretrained(tiny_model_dir, num_labels=3)
    with pytest.raises(ValueError, match=r"does not say which cell types its 3 classes are \('LABEL_0', .*id2label"):
        annotate(cells, model, **OPTIONS)
    model.save_pretrained(tmp_path)
    ScFoundationTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say which cell types its 3 classes are"):
        annotate(cells, tmp_path, **OPTIONS)


def test_a_folder_without_its_heads_weights_is_refused(cells, model_dir, tmp_path):
    model = ScFoundationForCellClassification.from_pretrained(model_dir)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "classifier.output" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    ScFoundationTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack 2 tensors of the encoder and classification head \(classifier\.output"):
        annotate(cells, tmp_path, **OPTIONS)


def test_cells_left_out_keep_their_place(cells, model_dir, cell_types):
    counts = cells.X.tolil()
    counts[3] = 0
    cells.X = counts.tocsr()
    with pytest.raises(ValueError, match=cells.obs_names[3]):
        annotate(cells.copy(), model_dir, **OPTIONS)
    with pytest.warns(UserWarning, match="1 of 40 cells are left out"):
        annotate(cells, model_dir, on_empty_cell="nan", **OPTIONS)
    is_missing = np.arange(40) == 3
    for name in ("cell_type", "best_cell_type", "confidence"):
        assert cells.obs[f"scfoundation_{name}"].isna().tolist() == is_missing.tolist()
    assert cells.obsm[PROBABILITIES].isna().all(axis=1).tolist() == is_missing.tolist()


def test_slashes_in_names_are_underscores_in_columns():
    assert column_names(["CD4+/CD25 T Reg", "B"]) == ["CD4+_CD25 T Reg", "B"]
    with pytest.raises(ValueError, match=r"would share the column 'T_NK' .*rename one"):
        column_names(["T/NK", "B", "T_NK"])


def test_bfloat16_is_close(cells, model_dir):
    expected = annotate(cells.copy(), model_dir, **OPTIONS).obsm[PROBABILITIES]
    got = annotate(cells, model_dir, dtype="bfloat16", **OPTIONS).obsm[PROBABILITIES]
    assert (got.dtypes == np.float32).all()
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.05)
    assert not got.equals(expected)


# --- From file to file ---


def read(path: Path) -> anndata.AnnData:
    return anndata.read_zarr(path) if path.suffix == ".zarr" else anndata.read_h5ad(path)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_a_file_gives_what_memory_gives(cells, model_dir, cell_types, tmp_path, suffix, write_copy):
    source = write_copy(cells, tmp_path / f"in{suffix}")
    output = annotate(source, model_dir, output=tmp_path / f"out{suffix}", tokens_per_batch=700, **OPTIONS)
    written = read(output)
    same_results(written, annotate(cells.copy(), model_dir, **OPTIONS))
    assert written.obsm[PROBABILITIES].index.equals(cells.obs_names)
    assert list(written.obs["scfoundation_cell_type"].cat.categories) == [*cell_types, "unassigned"]
    assert list(written.obs["scfoundation_best_cell_type"].cat.categories) == cell_types
    assert (written.X != cells.X).nnz == 0
    assert written.obs[cells.obs.columns].equals(cells.obs)
    assert sorted(tmp_path.iterdir()) == [source, output]


def test_what_memory_gives_can_be_written(cells, model_dir, tmp_path):
    annotate(cells, model_dir, explain="gradient_x_input", **OPTIONS)
    cells.write_h5ad(tmp_path / "out.h5ad")
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    same_results(written, cells)
    assert written.uns["scfoundation"] == cells.uns["scfoundation"]
    assert written.obs["scfoundation_top_genes"].tolist() == cells.obs["scfoundation_top_genes"].tolist()


def test_a_file_is_annotated_again(cells_file, model_dir, tmp_path):
    once = annotate(cells_file, model_dir, output=tmp_path / "once.h5ad", **OPTIONS)
    twice = annotate(once, model_dir, output=tmp_path / "twice.h5ad", unassigned=False, **OPTIONS)
    written = anndata.read_h5ad(twice)
    assert "unassigned" not in set(written.obs["scfoundation_cell_type"])
    assert list(written.obs.columns) == list(anndata.read_h5ad(once).obs.columns)
    assert list(written.obsm) == [PROBABILITIES]


@pytest.mark.parametrize("suffix", [None, ".h5ad", ".zarr"])
def test_explanations_of_an_earlier_call_do_not_stay(cells, model_dir, tmp_path, suffix, write_copy):
    annotate(cells, model_dir, explain="gradient_x_input", **OPTIONS)
    assert "scfoundation_top_genes" in cells.obs
    assert "scfoundation_top_genes" in cells.uns["scfoundation"]
    if suffix is None:
        again = annotate(cells, model_dir, **OPTIONS)
    else:
        explained = write_copy(cells, tmp_path / f"explained{suffix}")
        again = read(annotate(explained, model_dir, output=tmp_path / f"again{suffix}", **OPTIONS))
    assert "scfoundation_top_genes" not in again.obs
    assert "scfoundation_top_genes" not in again.uns["scfoundation"]
    assert "scfoundation_cell_type" in again.obs


def test_an_interrupted_run_resumes_where_it_stopped(cells_file, model_dir, tmp_path, monkeypatch):
    options = {**OPTIONS, "tokens_per_batch": 2000}
    expected = annotate(cells_file, model_dir, output=tmp_path / "whole.h5ad", **options)
    classify, batches = annotation._classify, []

    def interrupt_the_third(model, cells):
        batches.append(cells)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return classify(model, cells)

    monkeypatch.setattr(annotation, "_classify", interrupt_the_third)
    with pytest.raises(KeyboardInterrupt):
        annotate(cells_file, model_dir, output=tmp_path / "out.h5ad", **options)
    assert not (tmp_path / "out.h5ad").exists()
    resumed = annotate(cells_file, model_dir, output=tmp_path / "out.h5ad", **options)
    assert resumed.read_bytes() == expected.read_bytes()
    assert sum(map(len, batches)) == 40 + len(batches[2])  # only the third is computed twice
    assert not (tmp_path / "out.h5ad.progress").exists()


def test_another_calibration_starts_anew(cells_file, model_dir, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    with monkeypatch.context() as patch:
        patch.setattr(annotation, "_classify", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            annotate(cells_file, copy, output=tmp_path / "out.h5ad", **OPTIONS)
    Calibration(3.0, 0.0).save(copy)
    with pytest.warns(UserWarning, match="differs in settings"):
        annotate(cells_file, copy, output=tmp_path / "out.h5ad", **OPTIONS)


def test_several_processes_share_a_file(cells_file, model_dir, tmp_path, monkeypatch):
    options = {**OPTIONS, "tokens_per_batch": 1000}
    one = annotate(cells_file, model_dir, output=tmp_path / "one.h5ad", **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (tmp_path / "out.h5ad").exists()
        monkeypatch.setenv("RANK", rank)
        annotate(cells_file, model_dir, output=tmp_path / "out.h5ad", **options)
    assert (tmp_path / "out.h5ad").read_bytes() == one.read_bytes()


def test_arguments_are_checked_before_anything_runs(cells, cells_file, model_dir, tmp_path):
    with pytest.raises(TypeError, match="annotate takes an AnnData or the path of one, not a ndarray"):
        annotate(np.ones((2, 3)), model_dir, **OPTIONS)
    with pytest.raises(ValueError, match="output= is missing"):
        annotate(cells_file, model_dir, **OPTIONS)
    with pytest.raises(ValueError, match="is the input itself"):
        annotate(cells_file, model_dir, output=cells_file, overwrite=True, **OPTIONS)
    with pytest.raises(ValueError, match="tokens_per_batch is 0"):
        annotate(cells, model_dir, tokens_per_batch=0, **OPTIONS)
    with pytest.raises(ValueError, match="no explanation 'saliency'"):
        annotate(cells, model_dir, explain="saliency", **OPTIONS)


# --- With the genes that drove the calls ---


@pytest.mark.parametrize("method", ["gradient_x_input", "integrated_gradients"])
def test_the_genes_that_drove_each_call(cells, model_dir, method):
    cells = cells[:6].copy()
    plain = annotate(cells.copy(), model_dir, **OPTIONS)
    annotate(cells, model_dir, explain=method, **OPTIONS)
    same_results(cells, plain)
    vocabulary = ScFoundationTokenizer().vocabulary
    symbols = cells.var["symbol"].astype(str).to_numpy()
    for row, named in enumerate(cells.obs["scfoundation_top_genes"]):
        genes = named.split(", ")
        assert len(set(genes)) == 10
        genes_of_columns = vocabulary.map_genes(symbols[cells.X[row].indices]).column_to_gene
        expressed = {vocabulary.symbols[gene] for gene in genes_of_columns if gene >= 0}
        assert set(genes) <= expressed
    tables = json.loads(cells.uns["scfoundation"]["scfoundation_top_genes"])
    assert set(tables) == set(cells.obs["scfoundation_best_cell_type"])
    for name, table in tables.items():
        strengths = list(table.values())
        assert 10 <= len(strengths) <= 20
        assert strengths == sorted(strengths, reverse=True)
        assert strengths[-1] > 0
        if (cells.obs["scfoundation_best_cell_type"] == name).sum() == 1:
            (row,) = np.flatnonzero(cells.obs["scfoundation_best_cell_type"] == name)
            assert list(table)[:10] == cells.obs["scfoundation_top_genes"].iloc[row].split(", ")


def test_explanations_survive_a_file_and_other_batches(cells, cells_file, model_dir, tmp_path):
    annotate(cells, model_dir, explain="gradient_x_input", **OPTIONS)
    output = annotate(
        cells_file, model_dir, output=tmp_path / "o.h5ad", explain="gradient_x_input", tokens_per_batch=900, **OPTIONS
    )
    written = anndata.read_h5ad(output)
    same_results(written, cells)
    assert list(written.obsm[PROBABILITIES].columns) == list(cells.obsm[PROBABILITIES].columns)
    pairs = zip(written.obs["scfoundation_top_genes"], cells.obs["scfoundation_top_genes"], strict=True)
    shared = [len({*got.split(", ")} & {*expected.split(", ")}) for got, expected in pairs]
    assert min(shared) >= 9  # a tie may fall either way
    got, expected = (json.loads(data.uns["scfoundation"]["scfoundation_top_genes"]) for data in (written, cells))
    for name, table in expected.items():
        for gene, strength in list(table.items())[:5]:
            assert got[name][gene] == pytest.approx(strength, rel=1e-2)


def test_cells_left_out_have_no_genes(cells, model_dir):
    with pytest.warns(UserWarning, match="are left out"):
        annotate(cells, model_dir, explain="gradient_x_input", min_genes=int(np.median(cells.X.getnnz(1))), **OPTIONS)
    is_left_out = cells.obs["scfoundation_cell_type"].isna()
    assert 0 < is_left_out.sum() < 40
    assert (cells.obs["scfoundation_top_genes"] == "").tolist() == is_left_out.tolist()


# --- By a reference ---


def test_neighbours_name_types(cells, tiny_model_dir, reference_dir, cell_types):
    annotate(cells, tiny_model_dir, reference=reference_dir, num_neighbors=5, **OPTIONS)
    index = ReferenceIndex.load(reference_dir)
    embed(cells, tiny_model_dir, **OPTIONS)
    probabilities, distances = index.call(cells.obsm["X_scfoundation"], num_neighbors=5)
    np.testing.assert_allclose(cells.obsm[PROBABILITIES], probabilities, rtol=0, atol=1e-3)
    np.testing.assert_allclose(cells.obs["scfoundation_distance"], distances, **TOLERANCE)
    np.testing.assert_allclose(cells.obs["scfoundation_confidence"], probabilities.max(axis=1), rtol=0, atol=1e-3)
    best = np.array(cell_types)[probabilities.argmax(axis=1)]
    assert cells.obs["scfoundation_best_cell_type"].tolist() == best.tolist()
    threshold = index.unassigned_above(5)
    verdict = np.where(distances > threshold, "unassigned", best)
    assert cells.obs["scfoundation_cell_type"].tolist() == verdict.tolist()
    settings = json.loads(cells.uns["scfoundation"]["scfoundation"])["settings"]
    assert settings["unassigned_above"] == threshold
    assert settings["reference"] == {"label": "cell_type", "num_cells": 50, "sha256": index.sha256()}


def test_cells_farther_than_the_references_own_are_unassigned(cells, tiny_model_dir, reference_dir):
    index = ReferenceIndex.load(reference_dir)
    close = dataclasses.replace(index, own_distances=index.own_distances / 100)
    annotate(cells, tiny_model_dir, reference=close, **OPTIONS)
    assert (cells.obs["scfoundation_cell_type"] == "unassigned").all()
    assert "unassigned" not in set(cells.obs["scfoundation_best_cell_type"])
    annotate(cells, tiny_model_dir, reference=close, unassigned=False, **OPTIONS)
    assert "unassigned" not in set(cells.obs["scfoundation_cell_type"])
    annotate(cells, tiny_model_dir, reference=index, **OPTIONS)
    assert (cells.obs["scfoundation_cell_type"] == "unassigned").mean() < 0.3


def test_neighbours_from_file_to_file_and_in_another_order(cells, cells_file, tiny_model_dir, reference_dir, tmp_path):
    options = {"reference": reference_dir, "num_neighbors": 5, **OPTIONS}
    output = annotate(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", tokens_per_batch=700, **options)
    written = anndata.read_h5ad(output)
    shuffled = annotate(cells[::-1].copy(), tiny_model_dir, **options)[::-1]
    assert written.obs["scfoundation_cell_type"].tolist() == shuffled.obs["scfoundation_cell_type"].tolist()
    np.testing.assert_allclose(
        written.obs["scfoundation_distance"], shuffled.obs["scfoundation_distance"], rtol=0, atol=1e-3
    )


def test_references_are_checked(cells, tiny_model_dir, model_dir, reference_dir, tiny_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="no reference index"):
        annotate(cells, tiny_model_dir, reference=tmp_path / "nowhere", **OPTIONS)
    with pytest.raises(TypeError, match=r"index_reference\(adata, model, label=\.\.\.\)"):
        annotate(cells, tiny_model_dir, reference=cells, **OPTIONS)
    with pytest.raises(ValueError, match="is another encoder"):
        annotate(cells, ScFoundationForPreTraining(tiny_config), reference=reference_dir, **OPTIONS)
    with pytest.raises(ValueError, match="num_neighbors is 50; with a reference of 50 cells it may be 1 to 49"):
        annotate(cells, tiny_model_dir, reference=reference_dir, num_neighbors=50, **OPTIONS)
    with pytest.raises(ValueError, match="explain= asks a classification head"):
        annotate(cells, tiny_model_dir, reference=reference_dir, explain="gradient_x_input", **OPTIONS)
    foreign = ReferenceIndex.build(np.random.default_rng(0).normal(size=(20, 7)), ["a", "b"] * 10)
    with pytest.raises(ValueError, match=r"holds 7 numbers a cell, but this model's embeddings have 64 .* or 16"):
        annotate(cells, tiny_model_dir, reference=foreign, **OPTIONS)
    # A classifier whose encoder is the reference's own will do.
    annotate(cells, model_dir, reference=reference_dir, **OPTIONS)


# --- On the command line ---


def test_the_commands_are_the_functions(cells, cells_file, model_dir, tiny_model_dir, tmp_path, capsys):
    def run(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([*map(str, arguments), "--gene-column", "symbol", "--no-progress"])
        out, err = capsys.readouterr()
        assert not exit_info.value.code, err
        return out.strip()

    output = tmp_path / "out.h5ad"
    assert run("annotate", cells_file, output, "--model", model_dir, "--explain", "gradient_x_input") == str(output)
    same_results(anndata.read_h5ad(output), annotate(cells.copy(), model_dir, **OPTIONS))
    assert "scfoundation_top_genes" in anndata.read_h5ad(output).obs
    reference = tmp_path / "reference"
    made = run("index", cells_file, reference, "--model", tiny_model_dir, "--label", "cell_type")
    assert made == str(reference)
    by_reference = ["--reference", reference, "--num-neighbors", "7", "--overwrite", "--no-unassigned"]
    run("annotate", cells_file, output, "--model", tiny_model_dir, *by_reference)
    expected = annotate(cells.copy(), tiny_model_dir, reference=reference, num_neighbors=7, unassigned=False, **OPTIONS)
    same_results(anndata.read_h5ad(output), expected)


@pytest.mark.parametrize(("command", "function"), [("annotate", annotate), ("index", index_reference)])
def test_every_argument_has_an_option(capsys, monkeypatch, command, function):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "Example:" in plain
    for name in set(inspect.signature(function).parameters) - {"data", "output"}:
        assert f"--{name.replace('_', '-')}" in plain, name
