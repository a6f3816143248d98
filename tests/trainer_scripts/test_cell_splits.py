"""Splits of labelled cells: proportions, whole groups, and what becomes of few cells and few groups."""

from collections import Counter
from pathlib import Path

import anndata
import numpy as np
import pytest

from scfoundation_hf.trainer_scripts.cell_splits import split_cells


def counts(splits: np.ndarray, chosen: np.ndarray | slice = slice(None)) -> tuple[int, int, int]:
    found = Counter(splits[chosen].tolist())
    return found["train"], found["validation"], found["test"]


def test_every_type_is_cut_8_1_1():
    labels = np.array(["T"] * 1000 + ["B"] * 105 + ["NK"] * 10)
    splits = split_cells(labels)
    assert [counts(splits, labels == name) for name in ("T", "B", "NK")] == [(800, 100, 100), (85, 10, 10), (8, 1, 1)]


def test_rare_types_are_in_every_split_from_three_cells_on():
    labels = np.array(["a"] * 3 + ["b"] * 2 + ["c"])
    splits = split_cells(labels)
    assert [counts(splits, labels == name) for name in "abc"] == [(1, 1, 1), (2, 0, 0), (1, 0, 0)]


def test_shares_can_be_given_and_the_test_left_out():
    labels = ["a"] * 100
    assert counts(split_cells(labels, shares=(0.5, 0.2, 0.3))) == (50, 20, 30)
    assert counts(split_cells(labels, shares=(0.9, 0.1, 0.0))) == (90, 10, 0)


@pytest.mark.parametrize("groups", [None, np.repeat(np.arange(20), 10).astype(str)], ids=["by-type", "by-group"])
def test_the_seed_decides(groups):
    labels = np.tile(["a", "b"], 100)
    first, again, other = (split_cells(labels, groups=groups, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("num_groups", "held_out"), [(3, (1, 1)), (4, (1, 1)), (9, (1, 1)), (10, (1, 1)), (20, (2, 2)), (31, None)]
)
def test_groups_stay_whole(num_groups, held_out):
    groups = np.repeat([f"donor {number}" for number in range(num_groups)], 12)
    labels = np.tile(["a", "b", "c"], 4 * num_groups)
    splits = split_cells(labels, groups=groups)
    of_group = {name: set(splits[groups == name].tolist()) for name in np.unique(groups)}
    assert all(len(found) == 1 for found in of_group.values())
    found = Counter(split for (split,) in of_group.values())
    assert sum(found.values()) == num_groups
    if held_out is not None:
        assert (found["validation"], found["test"]) == held_out
    else:
        assert 2 <= found["validation"] <= 4
        assert 2 <= found["test"] <= 4


def test_with_few_groups_large_shares_leave_one_to_train():
    groups = np.repeat(["a", "b", "c"], 10)
    assert counts(split_cells(["x", "y"] * 15, groups=groups, shares=(0.34, 0.33, 0.33))) == (10, 10, 10)
    assert counts(split_cells(["x", "y"] * 15, groups=groups, shares=(0.7, 0.3, 0.0))) == (20, 10, 0)


def test_of_two_groups_one_tests_and_the_other_is_cut_by_type():
    groups, labels = np.repeat(["a", "b"], 90), np.tile(["x", "y", "z"], 60)
    splits = split_cells(labels, groups=groups)
    (tested,) = set(groups[splits == "test"].tolist())
    assert counts(splits, groups == tested) == (0, 0, 90)
    for name in "xyz":
        assert counts(splits, (groups != tested) & (labels == name)) == (27, 3, 0)


def test_a_group_that_alone_has_a_type_trains():
    groups = np.repeat(["a", "b", "c", "d", "e"], 20)
    labels = np.array((["x"] * 10 + ["y"] * 10) * 5)
    labels[20:25] = "rare"
    for seed in range(10):
        splits = split_cells(labels, groups=groups, seed=seed)
        assert set(splits[groups == "b"].tolist()) == {"train"}


def test_donors_of_unequal_size(shared_data: Path):
    obs = anndata.read_h5ad(shared_data / "corpus" / "kidney_immune.h5ad", backed="r").obs
    labels, donors = obs["cell_type"].astype(str).to_numpy(), obs["donor"].astype(str).to_numpy()
    for seed in range(5):
        splits = split_cells(labels, groups=donors, seed=seed)
        assert (splits == "train").sum() > 500
        assert all(len(set(splits[donors == donor].tolist())) == 1 for donor in np.unique(donors))
        assert set(labels) == set(labels[splits == "train"])


def test_more_groups_than_cells_of_any_type():
    labels = np.array([f"type {number % 15}" for number in range(60)])
    splits = split_cells(labels, groups=np.repeat(np.arange(12), 5).astype(str))
    assert min(counts(splits)) >= 5


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["a"] * 6, r"The groups have 1 value \(a\), too few to hold whole ones out; split without groups"),
        (["a", "b"], "There are 2 groups for 6 labels; give one for each cell"),
    ],
)
def test_impossible_groups_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        split_cells(["x"] * 6, groups=groups)


def test_two_groups_without_a_test_are_too_few():
    with pytest.raises(ValueError, match=r"The groups have 2 values \(a, b\), too few"):
        split_cells(["x"] * 6, groups=["a", "b"] * 3, shares=(0.9, 0.1, 0.0))


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.2), (1.0, 0.0, 0.0), (0.0, 0.5, 0.5), (1.1, 0.1, -0.2)])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match="must sum to 1, and only the test's may be 0"):
        split_cells(["x"] * 6, shares=shares)
