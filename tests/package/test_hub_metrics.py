"""Metrics on the Hub: uploaded by the command of the docs, loaded by name with nothing but what was uploaded."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scfoundation_hf.evaluation.annotation_scores import annotation_scores
from scfoundation_hf.evaluation.metrics.clustering.clustering import clustering_scores
from scfoundation_hf.evaluation.metrics.expression_recovery.expression_recovery import expression_recovery

CELL_TYPES, CALLS = ["B", "NK", "NK", "B"], ["B", "B", "NK", "B"]
EXPRESSION, PREDICTED = [[0.0, 2.0, 2.0], [4.0, 0.0, 1.0]], [[0.0, 1.0, 3.0], [1.0, 1.0, 0.0]]


@pytest.fixture
def run(server, tmp_path) -> Callable[..., str]:
    """Runs a command that takes the server for the Hub."""
    return lambda *command: server.run_client(tmp_path / "home", *command)


@pytest.fixture
def push(server, run, repository):
    """Uploads a metric by name; returns how it is called there."""

    def upload(name: str) -> str:
        hf = Path(sys.executable).with_name("hf")
        folder = repository / "evaluation" / "metrics" / name
        run(hf, "upload", f"lab/{name}", folder, "--repo-type", "space", "--exclude", "__pycache__/*")
        uploaded = server.files(f"spaces/lab/{name}").keys() - {".gitattributes"}
        assert uploaded == {path.name for path in folder.iterdir() if path.is_file()}
        return f"lab/{name}"

    return upload


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("cell_annotation", {"predictions": CALLS, "references": CELL_TYPES}, annotation_scores(CELL_TYPES, CALLS)),
        ("clustering", {"predictions": CALLS, "references": CELL_TYPES}, clustering_scores(CALLS, CELL_TYPES)),
        (
            "expression_recovery",
            {"predictions": PREDICTED, "references": EXPRESSION},
            expression_recovery(np.array(PREDICTED), np.array(EXPRESSION)),
        ),
    ],
    ids=["cell_annotation", "clustering", "expression_recovery"],
)
def test_a_metric_loads_by_name(run, push, name, arguments, expected):
    code = (
        "import json, sys, evaluate; print(json.dumps(evaluate.load(sys.argv[1]).compute(**json.loads(sys.argv[2]))))"
    )
    found = json.loads(run(sys.executable, "-c", code, push(name), json.dumps(arguments)))
    assert found == json.loads(json.dumps(expected))


def test_the_metric_of_integration_loads_by_name(run, push):
    """Its scores need more cells; tests/evaluation computes them."""
    pytest.importorskip("scib_metrics")
    code = "import sys, evaluate; print(evaluate.load(sys.argv[1]).name)"
    assert run(sys.executable, "-W", "ignore", "-c", code, push("integration")).strip() == "integration"
