"""The scores are scikit-learn's where that has them, and the calibration error is the one of the formula."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from scfoundation_hf.evaluation.annotation_scores import annotation_scores, expected_calibration_error


@pytest.fixture(scope="module")
def calls():
    generator = np.random.default_rng(0)
    true = generator.choice(["B", "NK", "T", "mono"], size=300, p=[0.1, 0.2, 0.3, 0.4])
    predicted = np.where(generator.random(300) < 0.7, true, generator.choice(["B", "NK", "T", "mono"], size=300))
    return true.tolist(), predicted.tolist()


def test_are_those_of_scikit_learn(calls):
    true, predicted = calls
    scores = annotation_scores(true, predicted)
    assert scores["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"))
    assert scores["weighted_f1"] == pytest.approx(f1_score(true, predicted, average="weighted"))
    assert scores["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted))
    by_class = dict(zip(["B", "NK", "T", "mono"], f1_score(true, predicted, average=None), strict=True))
    assert {name: found["f1"] for name, found in scores["per_class"].items()} == pytest.approx(by_class)
    assert {name: found["support"] for name, found in scores["per_class"].items()} == {
        name: true.count(name) for name in by_class
    }
    assert "expected_calibration_error" not in scores


def test_a_call_of_a_type_that_is_not_there_does_not_change_the_denominator():
    """2 of 3 cells of A are right: F1 0.8 of A and 1 of B, whichever wrong name the third cell gets."""
    true = ["A", "A", "A", "B"]
    for wrong in ("unassigned", "C"):
        scores = annotation_scores(true, ["A", "A", wrong, "B"])
        assert scores["macro_f1"] == pytest.approx((0.8 + 1) / 2)
        assert scores["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
        assert scores["per_class"][wrong] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_a_type_that_is_never_called_counts_as_zero():
    scores = annotation_scores(["A", "B"], ["A", "A"])
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_the_order_of_per_class_is_that_of_classes(calls):
    order = ["mono", "T", "absent", "NK"]
    assert list(annotation_scores(*calls, classes=order)["per_class"]) == ["mono", "T", "NK", "B"]


def test_calibration_error_by_hand():
    """Bins of 1/15: cells of confidence 0.95 and 0.97 share one, the two of 0.6 another; gaps 0.46 and 0.1."""
    probabilities = np.array([[0.95, 0.05], [0.03, 0.97], [0.6, 0.4], [0.4, 0.6]])
    true = ["A", "A", "A", "A"]
    expected = abs(1 - 0.95 - 0.97) / 4 + abs(1 - 0.6 - 0.6) / 4
    assert expected_calibration_error(true, probabilities, classes=["A", "B"]) == pytest.approx(expected)
    scores = annotation_scores(true, ["A", "B", "A", "B"], probabilities, classes=["A", "B"])
    assert scores["expected_calibration_error"] == pytest.approx(expected)


def test_who_says_what_happens_is_calibrated_and_who_is_too_sure_is_not():
    generator = np.random.default_rng(1)
    certainty = generator.uniform(0.5, 1, size=20_000)
    true = np.where(generator.random(20_000) < certainty, "A", "B").tolist()

    def error(confidence):
        return expected_calibration_error(true, np.stack([confidence, 1 - confidence], 1), classes=["A", "B"])

    assert error(certainty) < 0.01
    assert error(np.full(20_000, 1.0)) == pytest.approx(1 - true.count("A") / 20_000)


def test_borders_of_bins_belong_below():
    """A confidence of 10/15 is in the bin with 9.5/15, not with 10.5/15: errors of opposite sign then add up or not."""
    probabilities = np.array([[10 / 15, 0.1], [9.5 / 15, 0.1], [10.5 / 15, 0.1]])
    error = expected_calibration_error(["A", "B", "A"], probabilities, classes=["A", "B"])
    assert error == pytest.approx((abs(1 - 10 / 15 - 9.5 / 15) + abs(1 - 10.5 / 15)) / 3)


def test_a_label_that_is_no_class_is_called_wrongly():
    assert expected_calibration_error(["C"], np.array([[0.9, 0.1]]), classes=["A", "B"]) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"predicted": ["A"]}, "2 labels, 1 calls", id="lengths"),
        pytest.param({"true": [], "predicted": []}, "0 labels, 0 calls", id="none"),
        pytest.param({"true": ["A", None]}, "true cell type of cell 1 is None", id="missing"),
        pytest.param({"predicted": ["A", float("nan")]}, "predicted cell type of cell 1 is nan", id="nan"),
        pytest.param({"true": [["A"], ["B"]]}, r"true has shape \(2, 1\)", id="shape"),
        pytest.param({"probabilities": np.full((2, 2), 0.5)}, "Pass classes", id="no classes"),
        pytest.param(
            {"probabilities": np.full((2, 3), 0.3), "classes": ["A", "B"]}, r"\(2, 3\); expected \(2, 2\)", id="columns"
        ),
        pytest.param({"probabilities": np.full((2, 2), 0.5), "classes": ["A", "A"]}, "named twice: A, A", id="twice"),
        pytest.param(
            {"probabilities": np.array([[0.5, 0.5], [0.1, 3.0]]), "classes": ["A", "B"]},
            "'B' in cell 1 is 3.0, .* logits",
            id="logits",
        ),
        pytest.param(
            {"probabilities": np.array([[np.nan, 0.5], [0.1, 0.9]]), "classes": ["A", "B"]},
            "'A' in cell 0 is nan",
            id="nan probability",
        ),
    ],
)
def test_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        annotation_scores(**{"true": ["A", "B"], "predicted": ["A", "B"]} | arguments)
