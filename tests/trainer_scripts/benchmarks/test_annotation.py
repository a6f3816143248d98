"""The benchmark goes on where it was cut off, mixes nothing, compares on the same splits, and reports all of it."""

import json
import os
import xml.etree.ElementTree as ET

import anndata
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from scfoundation_hf.cli import app
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.trainer_scripts.benchmarks import annotation
from scfoundation_hf.trainer_scripts.benchmarks.annotation import (
    benchmark_annotation,
    draw_splits,
    read_data_sets,
    summarise,
)
from scfoundation_hf.trainer_scripts.benchmarks.annotators import (
    EmbeddingStore,
    FrozenEmbeddings,
    PretrainedModel,
    measure,
    vote_by_embeddings,
)
from scfoundation_hf.trainer_scripts.benchmarks.cell_sets import CellFile, read_cells

METHODS = ["majority", "gene-regression", "frozen-neighbors"]
QUIET = {"progress": False, "device": "cpu"}
pytestmark = pytest.mark.filterwarnings("ignore:.*vocabulary:UserWarning")


@pytest.fixture(scope="module")
def cells_file(example_cells, tmp_path_factory):
    """100 cells of three sorted populations and three that are none, in four batches."""
    cells = anndata.read_h5ad(example_cells)[::8].copy()
    names = cells.obs["subpop"].astype(str).to_numpy()
    cells.obs["kind"] = np.where(np.isin(names, ["T cell", "B cell"]), names, "other")
    cells.obs.loc[cells.obs_names[:3], "kind"] = "unclear"
    cells.obs["batch"] = np.array(["a", "b", "c", "d"])[np.arange(cells.n_obs) % 4]
    path = tmp_path_factory.mktemp("cells") / "sorted.h5ad"
    cells.write_h5ad(path)
    return path


@pytest.fixture
def data(cells_file):
    return {"sorted": CellFile(cells_file, label="kind", gene_column="symbol")}


@pytest.fixture
def in_this_process(monkeypatch):
    """Processes cost seconds each."""
    monkeypatch.setattr(
        annotation, "_in_new_process", lambda function, *arguments, seed: function(*arguments, seed=seed)
    )


def test_measures_goes_on_and_reports(in_this_process, data, tiny_model_dir, trained_further, tmp_path, monkeypatch):
    arguments = {"methods": METHODS, "min_cells_per_type": 5, **QUIET}
    output = benchmark_annotation(data, [tiny_model_dir], tmp_path / "out", seeds=2, **arguments)
    results = json.loads((output / "results.json").read_text())
    found = results["data"]["sorted"]
    assert found["num_cells"] == 97
    assert set(found["types"]) == {"B cell", "T cell", "other"}
    assert found["held_out_by"] is None
    assert found["share_seen_in_pretraining"] == {tiny_model_dir.name: None}
    ours = [f"{tiny_model_dir.name}-frozen-neighbors", f"{tiny_model_dir.name}-random-frozen-neighbors"]
    assert list(found["methods"]) == list(results["methods"]) == ["majority", "gene-regression", *ours]
    for method in found["methods"].values():
        values = method["macro_f1"]["values"]
        assert len(values) == 2
        assert method["macro_f1"]["mean"] == pytest.approx(np.mean(values))
        assert method["macro_f1"]["sd"] == pytest.approx(np.std(values, ddof=1))
        assert set(method["per_class_f1"]) <= set(found["types"])
    assert found["methods"]["gene-regression"]["accuracy"]["mean"] > found["methods"]["majority"]["accuracy"]["mean"]

    tables = (output / "tables.md").read_text()
    for title in (
        "majority class",
        "random weights: frozen + kNN",
        "F1 by type (cells)",
        "| B cell (",
        "calibration error",
    ):
        assert title in tables
    image = ET.parse(output / "annotation.svg").getroot()
    assert image.tag.endswith("svg")
    with Image.open(output / "annotation.png") as drawn:
        assert drawn.size[0] > 500

    measured = []
    original = annotation._measure

    def watch(annotator, cells, seed):
        measured.append((annotator.title, seed))
        return original(annotator, cells, seed)

    monkeypatch.setattr(annotation, "_measure", watch)
    (output / "parts" / "sorted--majority--1.json").unlink()
    again = benchmark_annotation(data, [tiny_model_dir], output, seeds=2, **arguments)
    assert measured == [("majority class", 1)]
    assert json.loads((again / "results.json").read_text())["data"]["sorted"]["types"] == found["types"]

    measured.clear()
    benchmark_annotation(data, [trained_further], output, seeds=2, remeasure="model", **arguments)
    assert measured == [
        (f"{tiny_model_dir.name}: frozen + kNN", seed) for seed in (0, 1)
    ]  # and no control, nor other tools

    with pytest.raises(ValueError, match="measured with another cells"):
        benchmark_annotation(data, [tiny_model_dir], output, seeds=2, **arguments | {"exclude_labels": ["other"]})


class Killed:
    """Ends the process that it is sent to."""

    title, package = "killed", None

    def __reduce__(self):
        return os._exit, (9,)


def test_what_fails_is_told_at_the_end_and_the_rest_is_kept(data, tmp_path, monkeypatch):
    """In processes of their own, as always outside of these tests."""
    store = EmbeddingStore(PretrainedModel("nowhere", weights="trained", device="cpu"), "nowhere", tmp_path)
    failing = FrozenEmbeddings("failing", store, vote_by_embeddings)
    methods = {"killed": Killed(), "failing": failing, "majority": annotation.METHODS["majority"]}
    monkeypatch.setattr(annotation, "METHODS", methods)
    monkeypatch.setattr(annotation, "ALL_METHODS", tuple(methods))
    with pytest.raises(RuntimeError) as error:
        benchmark_annotation(data, [], tmp_path / "out", methods=list(methods), seeds=1, **QUIET)
    message = str(error.value)
    assert "2 results are missing" in message
    assert "sorted, killed, seed 0: its process ended without a result" in message
    assert "sorted, failing, seed 0: FileNotFoundError: There is no model folder nowhere" in message
    part = json.loads((tmp_path / "out" / "parts" / "sorted--majority--0.json").read_text())["result"]
    assert part["peak_memory_bytes"] > 100 * 2**20
    assert not (tmp_path / "out" / "results.json").exists()


def test_whole_batches_are_held_out(in_this_process, cells_file, tmp_path, monkeypatch):
    seen = []

    def watch(annotator, cells, seed):
        seen.append(cells)
        return measure(annotator, cells, seed=seed)

    monkeypatch.setattr(annotation, "_measure", watch)
    data = {"sorted": CellFile(cells_file, label="kind", batch="batch", gene_column="symbol")}
    output = benchmark_annotation(data, [], tmp_path / "out", methods=["majority"], seeds=3, **QUIET)
    for cells in seen:
        splits_of_batch = cells.adata.obs["batch"].groupby(cells.split).unique()
        assert sum(len(batches) for batches in splits_of_batch) == 4
    assert len({cells.adata.obs["batch"][cells.rows("test")].iloc[0] for cells in seen}) == 3
    found = json.loads((output / "results.json").read_text())["data"]["sorted"]
    assert (found["held_out_by"], found["num_batches"]) == ("batch", 4)
    assert "held out: whole groups of `batch` (4 in all)" in (output / "tables.md").read_text()


def test_test_batches_repeat_only_when_there_are_no_others(cells_file):
    """Four batches: four splits with other test cells, then again; more of them do not change the first."""
    file = CellFile(cells_file, label="kind", batch="batch", gene_column="symbol")
    cells = read_cells("sorted", file, GeneVocabulary.default(), min_cells_per_label=5)
    six, three = draw_splits(cells, 6), draw_splits(cells, 3)
    tested = [cells.batches[split.rows("test")][0] for split in six]
    assert sorted(tested[:4]) == ["a", "b", "c", "d"]
    assert all((one.split == other.split).all() for one, other in zip(six, three, strict=False))


def part(macro_f1: float, **per_class: tuple[float, int]) -> dict:
    return {
        "macro_f1": macro_f1,
        "weighted_f1": 0.5,
        "accuracy": 0.5,
        "balanced_accuracy": 0.5,
        "expected_calibration_error": 0.1,
        "per_class": {name: {"f1": f1, "support": support} for name, (f1, support) in per_class.items()},
        "seconds": 1.0,
        "cpu_seconds": 1.0,
        "peak_memory_bytes": None,
        "num_cells": {"train": 8, "validation": 1, "test": 1},
        "num_not_scored": 0,
    }


def test_differences_are_those_of_the_same_splits():
    """The model is 0.1 better on each split, whose scores differ by far more."""
    found = summarise(
        {
            "pca-regression": [part(0.5), part(0.9)],
            "m-finetuned": [part(0.6), part(1.0)],
            "m-random-finetuned": [part(0.1), part(0.2)],
        },
        models=["m"],
    )
    compared = found["comparisons"]["m"]
    assert set(compared) == {"finetuned - PCA regression", "finetuned - random weights"}
    assert compared["finetuned - PCA regression"]["mean"] == pytest.approx(0.1)
    assert compared["finetuned - PCA regression"]["sd"] == pytest.approx(0)
    assert compared["finetuned - random weights"]["values"] == pytest.approx([0.5, 0.8])
    assert found["methods"]["m-finetuned"]["peak_memory_bytes"]["mean"] is None


def test_f1_of_a_type_is_over_the_splits_that_have_test_cells_of_it():
    found = summarise({"majority": [part(0.5, A=(0.4, 3), B=(0.0, 0)), part(0.5, A=(0.6, 2), B=(0.9, 1))]}, models=[])
    assert found["methods"]["majority"]["per_class_f1"] == pytest.approx({"A": 0.5, "B": 0.9})
    assert summarise({"majority": [part(0.5)]}, models=[])["methods"]["majority"]["macro_f1"]["sd"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"methods": ["majorty"]}, "There is no method 'majorty'; choose among majority", id="method"),
        pytest.param({"seeds": 0}, "seeds is 0", id="seeds"),
        pytest.param({"freezing": "last_n"}, "no freezing 'last_n' .* choose head", id="freezing"),
        pytest.param({"min_cells_per_type": 40}, "1 types of at least 40 cells", id="one type"),
        pytest.param({"exclude_labels": ["other", "T cell", "unclear"]}, "1 types", id="excluded"),
    ],
)
def test_says_what_is_wrong(data, tmp_path, changes, message):
    arguments = {"methods": ["majority"], **QUIET}
    with pytest.raises(ValueError, match=message):
        benchmark_annotation(data, [], tmp_path / "out", **arguments | changes)


def test_a_data_set_needs_a_label(cells_file, tmp_path):
    with pytest.raises(ValueError, match="'sorted' has no label"):
        benchmark_annotation({"sorted": CellFile(cells_file)}, [], tmp_path / "out", methods=["majority"], **QUIET)


def test_a_missing_package_is_told_before_anything_runs(data, tmp_path, monkeypatch):
    monkeypatch.setattr("scfoundation_hf.trainer_scripts.benchmarks.methods.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"method 'celltypist' needs celltypist.*scfoundation-hf\[annotation-benchmark\]"
    ):
        benchmark_annotation(data, [], tmp_path / "out", methods=["celltypist"], **QUIET)


def test_two_models_need_two_names(data, tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match="are both named"):
        benchmark_annotation(data, [tiny_model_dir, tiny_model_dir], tmp_path / "out", methods=["majority"], **QUIET)


def test_a_split_without_two_types_to_learn_from(cells_file, tmp_path):
    cells = anndata.read_h5ad(cells_file)
    cells.obs["donor"] = cells.obs["kind"].astype(str)
    cells.write_h5ad(tmp_path / "by-type.h5ad")
    data = {"by-type": CellFile(tmp_path / "by-type.h5ad", label="kind", batch="donor", gene_column="symbol")}
    with pytest.raises(ValueError, match="'by-type', seed 0"):
        benchmark_annotation(data, [], tmp_path / "out", methods=["majority"], min_cells_per_type=5, **QUIET)


def test_the_recipe_names_every_labelled_set(shared_data):
    arguments = read_data_sets(["annotation-benchmark"])
    assert "unlabelled" in arguments["exclude_labels"]
    data = arguments.pop("data")
    assert len(data) == 9
    for file in data.values():
        path = shared_data / file.path.relative_to("../shared/data")
        obs = anndata.read_h5ad(path, backed="r").obs
        assert {file.label, file.batch} - {None} <= set(obs.columns)


def test_data_sets_of_files_and_recipes(tmp_path):
    (tmp_path / "sets.yaml").write_text("seeds: 5\ndata:\n  one: {path: one.h5ad, label: cell_type}\n")
    arguments = read_data_sets([tmp_path / "sets.yaml", "two.h5ad"], label="kind", split_by="donor")
    assert arguments["seeds"] == 5
    assert arguments["data"]["one"].label == "cell_type"
    assert (arguments["data"]["two"].label, arguments["data"]["two"].batch) == ("kind", "donor")
    with pytest.raises(ValueError, match="Two data sets are named 'two'"):
        read_data_sets(["two.h5ad", "folder/two.h5ad"])


def test_the_command_is_the_function(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(annotation, "benchmark_annotation", lambda **arguments: given.update(arguments) or tmp_path)
    options = "--data cells.h5ad --label kind --split-by donor --model m --seeds 2 --method majority --no-progress"
    result = CliRunner().invoke(app, ["benchmark", "annotation", "out", *options.split()], catch_exceptions=False)
    assert result.exit_code == 0
    assert given["data"]["cells"].batch == "donor"
    assert (given["models"], given["seeds"], given["methods"], given["progress"]) == (["m"], 2, ["majority"], False)
    assert "freezing" not in given
