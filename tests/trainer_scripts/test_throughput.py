"""Work adds up, rates are work over time, and the measured matrix rate is one that the machine can reach."""

import pytest
import torch

from scfoundation_hf.trainer_scripts.throughput import MATRIX_SIZE, Work, measure_matrix_rate


def test_work_adds_up_and_its_rates_are_over_time():
    before, after = Work(10, 100, 1e9, 1), Work(30, 500, 5e9, 3)
    assert before + (after - before) == after
    assert (after - before).rates(matrix_rate=4e9) == {"cells_per_second": 10, "tokens_per_second": 200, "mfu": 0.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_matrix_rate_is_that_of_the_fastest_product(monkeypatch, dtype):
    clock = iter([0.0, 0.1, 0.1, 1.1, 0.2, 1.2, 1.7, 9.0])  # start; then now, before and after a product; now
    monkeypatch.setattr("scfoundation_hf.trainer_scripts.throughput.time.perf_counter", lambda: next(clock))
    assert measure_matrix_rate(torch.device("cpu"), dtype) == pytest.approx(2 * MATRIX_SIZE**3 / 0.5)
