"""Every method learns from training cells only, says what it is scored on, and our model's are ours."""

from dataclasses import dataclass, replace

import anndata
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

import scfoundation_hf
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.trainer_scripts.benchmarks import annotators
from scfoundation_hf.trainer_scripts.benchmarks.annotation import draw_splits
from scfoundation_hf.trainer_scripts.benchmarks.annotators import (
    METHODS,
    Calls,
    Cells,
    Cost,
    by_neighbors,
    by_regression,
    measure,
    model_annotators,
)
from scfoundation_hf.trainer_scripts.benchmarks.cell_sets import CellFile, read_cells

SIMPLE = ["majority", "gene-regression", "pca-regression", "pca-neighbors"]
# Of packages that warn when they are imported or used with this version of another.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def cells(example_cells, tmp_path_factory) -> Cells:
    """200 cells of five sorted populations."""
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    anndata.read_h5ad(example_cells)[::4].copy().write_h5ad(path)
    file = CellFile(path, label="subpop", gene_column="symbol")
    return draw_splits(read_cells("sorted", file, GeneVocabulary.default()), 1)[0]


def of_other_test_cells(cells: Cells) -> Cells:
    """The same, but all test cells except the first have the counts of others and of fewer genes, and other labels."""
    test = np.flatnonzero(cells.rows("test"))
    adata, labels = cells.adata.copy(), cells.labels.copy()
    matrix = adata.X.tolil()
    matrix[test[1:]] = 0
    matrix[test[1:], :50] = 7
    adata.X = matrix.tocsr().astype(np.float32)
    labels[test] = labels[test][::-1]
    return replace(cells, adata=adata, labels=labels)


def check_learns_from_training_cells_only(method: str, cells: Cells, tolerance: float = 1e-5) -> Calls:
    calls = METHODS[method].fit_predict(cells, seed=0)
    num_test = cells.rows("test").sum()
    assert calls.probabilities.shape == (num_test, len(calls.classes))
    assert sorted(calls.classes) == sorted(np.unique(cells.labels[cells.rows("train")]))
    others = METHODS[method].fit_predict(of_other_test_cells(cells), seed=0)
    assert others.chosen == calls.chosen
    np.testing.assert_allclose(others.probabilities[0], calls.probabilities[0], rtol=0, atol=tolerance)
    return calls


def accuracy(calls: Calls, cells: Cells) -> float:
    return float(np.mean(calls.predicted() == cells.labels[cells.rows("test")]))


@pytest.mark.parametrize("method", SIMPLE)
def test_simple_methods(cells, method):
    calls = check_learns_from_training_cells_only(method, cells)
    np.testing.assert_allclose(calls.probabilities.sum(axis=1), 1, atol=1e-6)
    largest_share = max(np.unique(cells.labels[cells.rows("test")], return_counts=True)[1]) / cells.rows("test").sum()
    if method == "majority":
        assert accuracy(calls, cells) == pytest.approx(largest_share)
        assert calls.probabilities[0].max() == pytest.approx(0.6, abs=0.02)
    else:
        assert accuracy(calls, cells) > largest_share


def test_celltypist(cells):
    pytest.importorskip("celltypist")
    calls = check_learns_from_training_cells_only("celltypist", cells)
    assert accuracy(calls, cells) > 0.8
    # Its probabilities are one regression a type, so they need not sum to 1.
    assert not np.allclose(calls.probabilities.sum(axis=1), 1)


def test_one_vs_rest_is_one_regression_a_class():
    generator = np.random.default_rng(0)
    labels = generator.choice(["a", "b", "c"], size=90)
    features = generator.normal(size=(90, 4)) + (labels[:, None] == ["a", "b", "c", "-"])
    options = {"C": 1.0, "solver": "lbfgs", "max_iter": 200}
    ours = annotators.OneVsRestRegression(**options, n_jobs=None, multi_class="ovr").fit(features, labels)
    for number, name in enumerate("abc"):
        one = LogisticRegression(**options).fit(features, labels == name)
        np.testing.assert_allclose(ours.decision_function(features)[:, number], one.decision_function(features))


@pytest.mark.slow
def test_scanvi(cells, monkeypatch):
    pytest.importorskip("scvi")
    monkeypatch.setattr(annotators, "SCVI_EPOCHS", (15, 15))
    monkeypatch.setattr(annotators, "SCANVI_EPOCHS", (10, 10))
    calls = check_learns_from_training_cells_only("scanvi", cells, tolerance=1e-3)
    assert calls.chosen == {"scvi_epochs": 15, "scanvi_epochs": 10}
    assert accuracy(calls, cells) > 0.5


def test_settings_are_those_that_call_the_validation_cells_best(cells):
    generator = np.random.default_rng(0)
    _, numbers = np.unique(cells.labels, return_inverse=True)
    features = np.eye(5)[numbers] + generator.normal(scale=0.7, size=(len(numbers), 5))
    train, validation = cells.rows("train"), cells.rows("validation")
    scores = {
        C: f1_score(
            cells.labels[validation],
            LogisticRegression(C=C, max_iter=1000)
            .fit(features[train], cells.labels[train])
            .predict(features[validation]),
            average="macro",
        )
        for C in annotators.REGULARISATION
    }
    assert len(set(scores.values())) > 1
    assert by_regression(features, cells).chosen["C"] == max(scores, key=scores.get)
    assert by_neighbors(features, cells, metric="euclidean").chosen["neighbors"] in annotators.NUM_NEIGHBORS


@pytest.fixture
def ours(tiny_model_dir, tmp_path):
    return model_annotators(
        "tiny", str(tiny_model_dir), methods=list(annotators.MODEL_METHODS), folder=tmp_path, max_steps=4, device="cpu"
    )


def test_each_of_our_methods_has_its_control(ours):
    pretrained = [key for key in ours if "random" not in key]
    assert pretrained == ["tiny-frozen-regression", "tiny-frozen-neighbors", "tiny-finetuned"]
    assert [key.replace("random-", "") for key in ours if "random" in key] == pretrained
    assert ours["tiny-random-finetuned"].title == "tiny, random weights: fine-tuned"


def test_frozen_embeddings_are_computed_once_and_their_cost_is_counted(ours, cells, tiny_model_dir, monkeypatch):
    regression, neighbors = ours["tiny-frozen-regression"], ours["tiny-frozen-neighbors"]
    regression.store.compute(cells, seed=0)
    embedded = scfoundation_hf.embed(cells.adata.copy(), tiny_model_dir, device="cpu", progress=False)
    embeddings, cost = regression.store.read(cells, seed=5)  # pretrained weights know no seed
    np.testing.assert_array_equal(embeddings, embedded.obsm["X_scfoundation"])
    monkeypatch.setattr(annotators, "embed", None)
    neighbors.store.compute(cells, seed=1)
    result = measure(neighbors, cells, seed=0)
    assert result["seconds"] > cost.seconds > 0
    assert result["peak_memory_bytes"] >= cost.peak_memory_bytes > 2**20


def test_random_weights_differ_by_seed_and_from_the_pretrained(ours, cells):
    store = ours["tiny-random-frozen-neighbors"].store
    few = replace(cells, adata=cells.adata[:6].copy())
    for seed in (1, 2):  # the tiny model itself was drawn with 0
        store.compute(few, seed=seed)
    ours["tiny-frozen-neighbors"].store.compute(few, seed=1)
    first, second = store.read(few, seed=1)[0], store.read(few, seed=2)[0]
    pretrained, _ = ours["tiny-frozen-neighbors"].store.read(few, seed=1)
    assert first.shape == second.shape == pretrained.shape
    assert not np.allclose(first, second)
    assert not np.allclose(first, pretrained)


@pytest.mark.parametrize("key", ["tiny-finetuned", "tiny-random-finetuned"])
def test_fine_tuning_never_sees_the_test_cells(ours, cells, key, monkeypatch):
    seen = []
    finetune = annotators.finetune

    def watch(data, *arguments, **options):
        seen.append((data, options))
        return finetune(data, *arguments, **options)

    monkeypatch.setattr(annotators, "finetune", watch)
    cells = Cells(cells.adata[::3].copy(), cells.labels[::3], cells.split[::3], cells.fingerprint)
    calls = ours[key].fit_predict(cells, seed=0)
    (data, options), names = seen[0], cells.adata.obs_names
    assert set(data.obs_names) == set(names[cells.rows("train", "validation")])
    assert options["random_weights"] == ("random" in key)
    assert sorted(calls.classes) == sorted(set(cells.labels))
    assert calls.probabilities.shape == (cells.rows("test").sum(), 5)
    np.testing.assert_allclose(calls.probabilities.sum(axis=1), 1, atol=1e-5)


@dataclass(frozen=True)
class CallsB:
    """Calls every cell B, and warns."""

    title: str = "B"
    package: str | None = None

    def fit_predict(self, cells: Cells, *, seed: int) -> Calls:
        np.float64(1) / np.float64(0)
        num_test = cells.rows("test").sum()
        return Calls(["A", "B"], np.tile([0.25, 0.75], (num_test, 1)), {"seed": seed}, Cost(10.0, 20.0, 2**50))


def test_measure_scores_the_types_that_could_be_called():
    """The test cells are B, B, C, of which C has no training cells."""
    cells = Cells(
        anndata.AnnData(np.ones((6, 2), np.float32)),
        labels=np.array(["A", "B", "A", "B", "B", "C"], dtype=object),
        split=np.array(["train", "train", "validation", "test", "test", "test"]),
        fingerprint="",
    )
    result = measure(CallsB(), cells, seed=3)
    assert result["accuracy"] == result["macro_f1"] == 1
    assert result["num_not_scored"] == 1
    assert result["num_cells"] == {"train": 2, "validation": 1, "test": 3}
    assert result["expected_calibration_error"] == pytest.approx(0.25)
    assert result["chosen"] == {"seed": 3}
    assert 10 < result["seconds"] < 11
    assert 20 < result["cpu_seconds"] < 21
    assert result["peak_memory_bytes"] == 2**50
    assert any("divide by zero" in warning for warning in result["warnings"])
