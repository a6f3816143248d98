"""The streamed sums give what scikit-learn and SciPy give on the whole, however the cells are cut and shared out."""

import math
from itertools import pairwise

import anndata
import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, mean_squared_error

from scfoundation_hf.evaluation.expression_errors import ExpressionErrors, error_sums, measures
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.read_depth import log1p_cp10k, log10_source_depth, row_totals


@pytest.fixture(scope="module")
def cells(example_cells):
    """Real cells of mixed depth with noisy predictions at 400 genes each, every row padded to another length."""
    adata = anndata.read_h5ad(example_cells)[:60]
    aligned, _ = GeneVocabulary.default().align(adata.X, adata.var_names)
    generator = np.random.default_rng(0)
    aligned.data = generator.binomial(aligned.data.astype(np.int64), 0.6).astype(np.float64)
    aligned.eliminate_zeros()
    totals = row_totals(aligned)
    expressed = np.flatnonzero(np.asarray((aligned > 0).sum(0)).ravel())
    genes = generator.choice(expressed, 400, replace=False)
    labels = log1p_cp10k(aligned, totals).toarray()[:, genes]
    predicted = 0.7 * labels + generator.normal(0.2, 0.3, labels.shape)
    labels[np.arange(400) >= generator.integers(200, 400, size=(60, 1))] = -100
    predicted[labels == -100] = 0  # as the model writes it
    return (
        torch.from_numpy(predicted).float(),
        torch.from_numpy(labels).float(),
        torch.from_numpy(log10_source_depth(totals)).float(),
    )


def expected_measures(predicted, labels):
    valid = labels != -100
    X, P = labels[valid].double().numpy(), predicted[valid].double().numpy()
    nonzero = X != 0
    result = {"mre_nonzero": np.mean((X - P)[nonzero] ** 2 / X[nonzero])}
    for suffix, part in (("", slice(None)), ("_nonzero", nonzero), ("_zero", ~nonzero)):
        result[f"num_targets{suffix}"] = len(X[part])
        result[f"mse{suffix}"] = mean_squared_error(X[part], P[part])
        result[f"mae{suffix}"] = mean_absolute_error(X[part], P[part])
        if suffix != "_zero":
            result[f"pearson{suffix}"] = pearsonr(X[part], P[part]).statistic
    return result


def batches(cells, borders):
    edges = [0, *borders, len(cells[0])]
    return [tuple(part[start:stop] for part in cells) for start, stop in pairwise(edges)]


def summed(parts, **options):
    errors = ExpressionErrors(**options)
    for part in parts:
        errors.update(*part)
    return errors


CUTS = [[], [1, 2, 40], list(range(1, 60))]


@pytest.mark.parametrize("borders", CUTS, ids=["whole", "uneven", "one-cell"])
def test_equals_scikit_learn_however_the_cells_are_cut(cells, borders):
    found = summed(batches(cells, borders)).compute()
    expected = expected_measures(*cells[:2])
    assert {key for key in found if "_depth_" not in key} == expected.keys()
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-11)


def test_read_depth_bins_are_the_measures_of_their_cells(cells):
    edges = (2.75, 3.0, 9.0)
    found = summed(batches(cells, [7, 30]), depth_edges=edges).compute()
    predicted, labels, depths = cells
    bins = {
        "below_2.75": depths < 2.75,
        "2.75_to_3.0": (depths >= 2.75) & (depths < 3.0),
        "3.0_to_9.0": depths >= 3.0,
    }
    for name, chosen in bins.items():
        assert chosen.any()
        expected = expected_measures(predicted[chosen], labels[chosen])
        assert {key: found[f"{key}_depth_{name}"] for key in expected} == pytest.approx(expected, rel=1e-11)
    assert not any(key.endswith("from_9.0") for key in found)  # no cell is that deep
    assert len(found) == 12 * (1 + len(bins))


def test_a_cell_on_a_border_belongs_to_the_deeper_bin():
    found = summed([(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([3.0]))], depth_edges=(3.0, 4.0)).compute()
    assert found["num_targets_depth_3.0_to_4.0"] == 1


def test_processes_merge_to_the_whole(cells):
    whole = summed([cells])
    parts = [summed([part]) for part in batches(cells, [13, 44])]
    merged = ExpressionErrors()
    for part in parts:
        merged.merge(part)
    restored = ExpressionErrors()
    restored.load_state_dict(merged.state_dict())
    assert restored.compute() == pytest.approx(whole.compute(), rel=1e-11)
    torch.testing.assert_close(sum(part.sums for part in parts), whole.sums, rtol=1e-12, atol=0)


def test_a_state_is_a_copy(cells):
    errors = summed(batches(cells, [30])[:1])
    state = errors.state_dict()
    errors.update(*batches(cells, [30])[1])
    assert not torch.equal(state["sums"], errors.sums)


def test_sums_of_cells_add_up_to_any_share_of_them(cells):
    predicted, labels, _ = cells
    sums = error_sums(predicted, labels)
    assert sums.shape == (60, 2, 9)
    found = measures(sums[10:20].sum(0))
    assert found == pytest.approx(expected_measures(predicted[10:20], labels[10:20]), rel=1e-11)


def test_half_precision_is_summed_in_float64():
    """4,096 errors of 0.1 beside a large one: sums in bfloat16 or float32 would lose them."""
    labels = torch.zeros(1, 4097)
    predicted = torch.full((1, 4097), 0.1, dtype=torch.bfloat16)
    predicted[0, 0] = 2.0**15
    found = measures(error_sums(predicted, labels)[0])
    assert found["mae"] * 4097 == 2.0**15 + 4096 * float(predicted[0, 1])


def test_what_stands_at_padding_does_not_matter(cells):
    predicted, labels, depths = cells
    spoiled = torch.where(labels == -100, torch.nan, predicted)
    assert summed([(spoiled, labels, depths)]).compute() == summed([cells]).compute()


def test_undefined_measures_are_nan(cells):
    predicted, labels, depths = cells
    constant = summed([(torch.full_like(predicted, 0.1), labels, depths)]).compute()
    assert math.isnan(constant["pearson"])
    assert constant["mse"] > 0
    only_zeros = summed([(predicted, torch.where(labels == -100, labels, 0), depths)]).compute()
    assert math.isnan(only_zeros["mse_nonzero"])
    assert math.isnan(only_zeros["mre_nonzero"])
    nothing = ExpressionErrors().compute()
    assert nothing["num_targets"] == 0
    assert math.isnan(nothing["mse"])


def test_a_prediction_that_is_not_a_number_shows(cells):
    predicted, labels, depths = cells
    broken = predicted.clone()
    broken[0, 0] = torch.nan
    assert math.isnan(summed([(broken, labels, depths)]).compute()["mse"])


@pytest.mark.parametrize(
    ("predicted", "labels", "depths", "message"),
    [
        ((2, 3), (2, 4), [3.0, 3.0], r"shape \(2, 3\), labels \(2, 4\)"),
        ((6,), (6,), [3.0] * 6, r"must be \(cells, targets\)"),
        ((2, 3), (2, 3), [3.0], r"2 cells but depths of shape \(1,\)"),
        ((2, 3), (2, 3), [3.0, math.nan], "Cell 1 of the batch has log10 depth nan"),
    ],
    ids=["shapes", "one-dimension", "depths", "no-depth"],
)
def test_refuses_what_does_not_fit(predicted, labels, depths, message):
    labels = torch.ones(labels)
    with pytest.raises(ValueError, match=message):
        ExpressionErrors().update(torch.ones(predicted), labels, torch.tensor(depths))


@pytest.mark.parametrize("edges", [(), (3.0, 3.0), (4.0, 3.0)], ids=["none", "twice", "falling"])
def test_refuses_borders_that_do_not_rise(edges):
    with pytest.raises(ValueError, match="depth_edges must be at least one number, rising"):
        ExpressionErrors(depth_edges=edges)


def test_refuses_to_merge_other_bins():
    errors, other = ExpressionErrors(depth_edges=(3.0,)), ExpressionErrors(depth_edges=(4.0,))
    with pytest.raises(ValueError, match=r"borders \[3.0\] here, \[4.0\] there"):
        errors.merge(other)
    with pytest.raises(ValueError, match="read-depth bins differ"):
        errors.load_state_dict(other.state_dict())
