"""The metrics load by path without the network and give the numbers of a calculation by hand."""

import importlib
from math import log
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml

from scfoundation_hf.evaluation.expression_errors import error_sums, measures
from scfoundation_hf.evaluation.metrics.clustering.clustering import clustering_scores
from scfoundation_hf.evaluation.metrics.expression_recovery.expression_recovery import expression_recovery

NAMES = ("expression_recovery", "clustering", "integration")
# umap says so when it is imported, and scib-metrics and jax use what NumPy and each other deprecate
pytestmark = [pytest.mark.filterwarnings("ignore::ImportWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture
def load(repository, tmp_path):
    return lambda name: evaluate.load(str(repository / "evaluation" / "metrics" / name), cache_dir=str(tmp_path))


def test_expression_recovery_by_hand(load):
    found = load("expression_recovery").compute(
        predictions=[[0.0, 1.0, 3.0], [1.0, 1.0, 0.0]], references=[[0.0, 2.0, 2.0], [4.0, 0.0, 1.0]]
    )
    assert found["mae"] == pytest.approx(7 / 6)
    assert found["mae_nonzero"] == pytest.approx(6 / 4)
    assert found["mre_nonzero"] == pytest.approx((1 / 2 + 1 / 2 + 9 / 4 + 1) / 4)
    assert found["pearson"] == pytest.approx(3 / (11.5 * 6) ** 0.5)
    assert found["pearson_nonzero_per_cell"] == pytest.approx(1)  # the first cell's values are all the same


def test_expression_recovery_is_what_training_reports():
    generator = np.random.default_rng(0)
    X = generator.poisson(0.5, size=(6, 40)) * 1.5
    P = X + generator.normal(size=X.shape)
    ours, other = expression_recovery(P, X), measures(error_sums(torch.from_numpy(P), torch.from_numpy(X)).sum(0))
    for name in ("mae", "mae_nonzero", "mre_nonzero", "pearson", "pearson_nonzero"):
        assert ours[name] == pytest.approx(other[name], rel=1e-9)


def test_expression_recovery_refuses_what_is_no_expression():
    with pytest.raises(ValueError, match=r"Predictions are \(2, 3\), references \(2, 4\)"):
        expression_recovery(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="reference of cell 1, gene 2 is -1; log1p values are at least 0"):
        expression_recovery(np.zeros((2, 3)), np.array([[0, 1, 2], [0, 1, -1]]))


def test_clustering_by_hand(load):
    metric = load("clustering")
    found = metric.compute(predictions=[0, 0, 1, 1], references=["B", "B", "B", "T"])
    mutual = 0.5 * log(4 / 3) + 0.25 * log(2 / 3) + 0.25 * log(2)
    entropies = log(2) - (0.75 * log(0.75) + 0.25 * log(0.25))
    assert found == pytest.approx({"nmi": 2 * mutual / entropies, "ari": 0, "num_clusters": 2}, abs=1e-12)
    spread = metric.compute(
        predictions=["x", "x", "x", "y"], references=["B", "B", "T", "T"], embeddings=[[0.0], [1.0], [5.0], [6.0]]
    )
    assert spread["silhouette"] == pytest.approx((4.5 / 5.5 + 3.5 / 4.5) / 2)
    assert spread["calinski_harabasz"] == pytest.approx(25 / (1 / 2))


def test_clustering_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="There are 2 clusters of 3 labels; pass one of each a cell"):
        clustering_scores([0, 1], ["B", "B", "T"])


@pytest.fixture(scope="module")
def two_types():
    """120 cells of two types far apart, in two batches that lie on each other."""
    generator = np.random.default_rng(0)
    labels, batches = np.repeat(["B", "T"], 60), np.tile(["one", "two"], 60)
    embedding = generator.normal(size=(120, 5)) + 20 * (labels == "T")[:, None]
    return embedding, labels, batches


@pytest.mark.slow
def test_integration_tells_mixed_batches_from_apart(load, two_types):
    pytest.importorskip("scib_metrics", reason="needs scib-metrics, of the extra [mapping]")
    embedding, labels, batches = two_types
    metric = load("integration")
    mixed = metric.compute(predictions=embedding, references=labels, batches=batches)
    assert mixed["ari_kmeans"] == mixed["nmi_kmeans"] == pytest.approx(1)
    assert mixed["graph_connectivity"] == pytest.approx(1)
    assert mixed["clisi"] > 0.95
    bio = [mixed[name] for name in ("isolated_labels", "nmi_kmeans", "ari_kmeans", "silhouette_label", "clisi")]
    assert mixed["bio"] == pytest.approx(np.mean(bio))
    assert mixed["batch"] == pytest.approx(
        np.mean([mixed[name] for name in ("bras", "ilisi", "kbet", "graph_connectivity")])
    )
    assert mixed["total"] == pytest.approx(0.6 * mixed["bio"] + 0.4 * mixed["batch"])
    apart = metric.compute(
        predictions=embedding + 8 * (batches == "two")[:, None],
        references=labels,
        batches=batches,
        unintegrated=embedding,
    )
    assert "pcr" in apart
    for name in ("bras", "ilisi", "kbet", "batch"):
        assert apart[name] < mixed[name] - 0.2, name


def test_integration_refuses_what_it_cannot_score(two_types):
    pytest.importorskip("scib_metrics", reason="needs scib-metrics, of the extra [mapping]")
    scores = importlib.import_module("scfoundation_hf.evaluation.metrics.integration.integration").integration_scores
    embedding, labels, batches = two_types
    with pytest.raises(ValueError, match="120 embeddings, 119 labels and 120 batches; pass one of each a cell"):
        scores(embedding, labels[1:], batches)
    with pytest.raises(ValueError, match="80 cells are too few: the scores look at 90 neighbours"):
        scores(embedding[:80], labels[:80], batches[:80])
    with pytest.raises(ValueError, match="All cells have the batch 'one'; the scores compare at least two"):
        scores(embedding, labels, np.full(120, "one"))


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_of_a_metric_is_complete_and_stands_alone(repository, name):
    """What `evaluate.load("ORG/NAME")` needs, once the folder is a Space."""
    folder: Path = repository / "evaluation" / "metrics" / name
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(header)
    assert {"evaluate", "metric"} <= set(card["tags"])
    assert card["license"] == "apache-2.0"
    assert f'evaluate.load("{name}")' in text
    code = (folder / f"{name}.py").read_text()
    assert "scfoundation_hf" not in code
    required = set((folder / "requirements.txt").read_text().split())
    for module, package in (("numpy", "numpy"), ("sklearn", "scikit-learn"), ("scib_metrics", "scib-metrics")):
        assert (f"import {module}" in code or f"from {module}" in code) == (package in required)
