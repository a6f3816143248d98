"""The expected expression of a cell of given depth is the mean of many drawn cells."""

import numpy as np
import pytest

from scfoundation_hf.evaluation.expected_expression import expected_log1p_cp10k


@pytest.mark.parametrize("depth", [500, 5_000, 100_000])
def test_it_is_the_mean_of_draws(depth):
    shares = np.array([0.0, 1e-6, 1e-4, 1e-3, 0.01, 0.2])
    counts = np.random.default_rng(0).poisson(shares * depth, size=(200_000, len(shares)))
    drawn = np.log1p(counts / depth * 10_000)
    found = expected_log1p_cp10k(shares[None], np.array([depth]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], drawn.mean(axis=0), atol=0.01)


def test_cells_have_their_own_depths_and_deep_ones_show_their_shares():
    shares = np.full((2, 3), [1e-4, 1e-3, 1e-2])
    shallow, deep = expected_log1p_cp10k(shares, np.array([1_000, 1e8]))
    assert (shallow < deep).all()
    np.testing.assert_allclose(deep, np.log1p(shares[0] * 10_000), atol=1e-3)
