"""The scores of called cell types as a metric of `evaluate`: `evaluate.load(<this folder>)`, no network needed."""

from typing import Any

import datasets
import evaluate

from .annotation_scores import annotation_scores

DESCRIPTION = """Macro F1, weighted F1, accuracy, balanced accuracy and F1 of each class of called cell types, and the
expected calibration error where probabilities are given. Means over classes are over those among the references."""

INPUTS = """
Args:
    predictions (list of str): the call for each cell.
    references (list of str): the label of each cell.
    probabilities (numpy array of (cells, classes), optional): of each class. `compute` only.
    classes (list of str, optional): names of the columns of `probabilities`.
Returns:
    macro_f1, weighted_f1, accuracy, balanced_accuracy; per_class: precision, recall, f1, support of each class;
    expected_calibration_error (15 bins of equal width) with probabilities.
"""

CITATION = """@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}"""


class CellAnnotation(evaluate.Metric):
    """`annotation_scores` for strings of names, batch by batch or at once."""

    def _info(self) -> evaluate.MetricInfo:
        names = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(names),
        )

    def _compute(self, *, predictions: list[str], references: list[str], **options: Any) -> dict[str, Any]:
        return annotation_scores(references, predictions, **options)
