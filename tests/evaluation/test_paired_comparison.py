"""The interval covers the truth as often as it says, and tells a difference in every cell from one in a few."""

import numpy as np
import pytest

from scfoundation_hf.evaluation.paired_comparison import compare_errors


def draw(generator, num_cells=120, ratio=0.8):
    """Errors of two predictors whose expected errors have this ratio, in cells of three donors."""
    donors = np.repeat(["a", "b", "c"], num_cells // 3)
    others = generator.gamma(4, 25, num_cells) * np.repeat([1.0, 2.0, 0.5], num_cells // 3)
    return others * ratio * generator.gamma(16, 1 / 16, num_cells), others, donors


def test_ratio_and_shares():
    found = compare_errors(np.array([1.0, 4.0, 3.0]), np.array([2.0, 3.0, 5.0]), groups=["a", "b", "b"])
    assert found.ratio == pytest.approx(8 / 10)
    assert found.share_of_cells == pytest.approx(2 / 3)
    assert found.ratios == pytest.approx({"a": 1 / 2, "b": 7 / 8})
    assert found.low <= found.ratio <= found.high


def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch):
    """200 draws; the number of misses of a 95 % interval is above 20 with a probability of 0.1 %, below 2 of 0.4 %."""
    monkeypatch.setattr("scfoundation_hf.evaluation.paired_comparison.NUM_RESAMPLES", 200)
    generator = np.random.default_rng(0)
    comparisons = [compare_errors(*errors, groups=groups) for *errors, groups in (draw(generator) for _ in range(200))]
    misses = sum(not found.low < 0.8 < found.high for found in comparisons)
    assert 2 <= misses <= 20


def test_pairing_tells_a_small_but_steady_difference():
    """A predictor 2 % better in every cell: cells differ by far more, pairs do not."""
    generator = np.random.default_rng(1)
    others = generator.gamma(4, 25, 300)
    found = compare_errors(0.98 * others, others, groups=["a"] * 300)
    assert found.high < 1
    assert found.share_of_cells == 1
    shuffled = compare_errors(0.98 * generator.permutation(others), others, groups=["a"] * 300)
    assert shuffled.low < 1 < shuffled.high


def test_is_the_same_for_a_seed():
    errors, others, groups = draw(np.random.default_rng(2))
    first, second = (compare_errors(errors, others, groups=groups, seed=seed) for seed in (3, 3))
    assert first == second
    assert compare_errors(errors, others, groups=groups, seed=4).low != first.low


def test_refuses_different_cells():
    with pytest.raises(ValueError, match="2 and 3 errors of 3 cells"):
        compare_errors(np.ones(2), np.ones(3), groups=["a"] * 3)
    with pytest.raises(ValueError, match="0 and 0 errors of 0 cells"):
        compare_errors(np.ones(0), np.ones(0), groups=[])


def test_how_many_are_drawn_at_once_does_not_matter(monkeypatch):
    errors, others, groups = draw(np.random.default_rng(5))
    expected = compare_errors(errors, others, groups=groups)
    monkeypatch.setattr("scfoundation_hf.evaluation.paired_comparison.MAX_DRAWS", 100)
    found = compare_errors(errors, others, groups=groups)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
