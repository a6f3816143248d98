"""The metric loads by its path without a network, and gives what the function gives."""

import os
import sys

import numpy as np
import pytest

from scfoundation_hf.evaluation.annotation_scores import annotation_scores

TRUE, PREDICTED = ["B", "NK", "NK"], ["B", "B", "NK"]
PROBABILITIES = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """The package, with caches of its own."""
    evaluate = pytest.importorskip("evaluate")
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr(evaluate.config, "DOWNLOADED_EVALUATE_PATH", str(tmp_path / "downloads"))
    monkeypatch.setattr(evaluate.loading, "init_hf_modules", lambda *_: str(modules))
    for name in loaded_metrics():
        monkeypatch.delitem(sys.modules, name)
    yield evaluate
    for name in loaded_metrics():
        del sys.modules[name]


def loaded_metrics() -> list[str]:
    """Copies of metrics that were imported from another cache."""
    return [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]


@pytest.fixture
def folder(repository):
    return repository / "evaluation" / "metrics" / "cell_annotation"


def test_loads_by_path_offline(evaluate, folder):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    metric = evaluate.load(str(folder))
    assert metric.compute(predictions=PREDICTED, references=TRUE) == annotation_scores(TRUE, PREDICTED)


def test_batches_are_added_up_and_probabilities_taken_at_the_end(evaluate, folder):
    metric = evaluate.load(str(folder))
    metric.add_batch(predictions=PREDICTED[:1], references=TRUE[:1])
    metric.add_batch(predictions=PREDICTED[1:], references=TRUE[1:])
    found = metric.compute(probabilities=PROBABILITIES, classes=["B", "NK"])
    assert found == annotation_scores(TRUE, PREDICTED, PROBABILITIES, classes=["B", "NK"])
    assert found["expected_calibration_error"] > 0
