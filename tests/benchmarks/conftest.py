"""The benchmark scripts are no package: their folder goes on the path, as Python puts it there for a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from collections.abc import Callable
from typing import Any

import pytest
from harness import measure
from harness.cells import CountedCells, read_cells
from harness.jobs import Case, JobName

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig


@pytest.fixture(autouse=True)
def _small_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.MATRIX_SIZE, "cpu", 64)


@pytest.fixture(scope="session")
def real_cells(example_cells: Path) -> CountedCells:
    return read_cells([example_cells])


@pytest.fixture(scope="session")
def harness_config() -> ScFoundationConfig:
    """Tiny, without dropout so that variants agree in training, and with the original's width of feed-forwards."""
    return ScFoundationConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_head_dim=8,
        decoder_intermediate_size=32,
        num_bins=5,
    )


@pytest.fixture
def make_case(real_cells: CountedCells, harness_config: ScFoundationConfig) -> Callable[..., Case]:
    def make(job: JobName, *, num_cells: int = 2, original_cells: int = 2) -> Case:
        cells = real_cells.near(300, num_cells=max(num_cells, original_cells))
        return Case("tiny", harness_config, job, 300, cells, num_cells, original_cells)

    return make


class InThisProcess:
    """Stands for `FreshProcesses` where a test is not about processes."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


@pytest.fixture
def processes() -> InThisProcess:
    return InThisProcess()
