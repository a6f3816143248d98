"""How close predicted expression comes to the full cell's, for `evaluate.load`: MAE, MRE and Pearson r."""
# C cells, G genes

from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Errors and correlation of predicted gene expression, log1p(counts per 10,000), against the expression of the full cell:
over all genes, and over the genes that the full cell expresses ("nonzero"). Used for read-depth enhancement: the
predictions are made from a down-sampled copy of the cell.
"""
_INPUTS = """\
Args:
    predictions: for each cell, the predicted values of its genes.
    references: for each cell, the true values of the same genes in the same order; at least 0.
Returns:
    mae, mae_nonzero: mean |X - P| over all values, and over those whose true value X is not 0.
    mre_nonzero: mean (X - P)^2 / X over nonzero values, the paper's formula.
    pearson, pearson_nonzero: Pearson r over the values of all cells together.
    pearson_per_cell, pearson_nonzero_per_cell: mean over cells of the r of each; cells without variance are left out.
    NaN where nothing can be measured.
Examples:
    >>> metric = evaluate.load("expression_recovery")
    >>> metric.compute(predictions=[[0.0, 1.0, 3.0]], references=[[0.0, 2.0, 2.0]])["mre_nonzero"]
    0.5
"""
_CITATION = """\
@article{hao2024large,
  title={Large-scale foundation model on single-cell transcriptomics},
  author={Hao, Minsheng and Gong, Jing and Zeng, Xin and others},
  journal={Nature Methods},
  volume={21},
  pages={1481--1491},
  year={2024},
  doi={10.1038/s41592-024-02305-7}
}
"""


def expression_recovery(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The measures of `(C, G)` predicted values against the true ones, by name as `_INPUTS` lists them.

    Raises: ValueError: if the shapes differ, or a true value is negative or no number.
    """
    P, X = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
    if P.shape != X.shape or X.ndim != 2:
        raise ValueError(f"Predictions are {P.shape}, references {X.shape}; both must be (cells, genes).")
    if not (X >= 0).all():
        cell, gene = np.argwhere(~(X >= 0))[0]
        raise ValueError(
            f"The reference of cell {cell}, gene {gene} is {X[cell, gene]:g}; log1p values are at least 0."
        )
    is_nonzero = X > 0
    absolute = np.abs(X - P)
    return {
        "mae": _mean(absolute),
        "mae_nonzero": _mean(absolute[is_nonzero]),
        "mre_nonzero": _mean(absolute[is_nonzero] ** 2 / X[is_nonzero]),
        "pearson": _pearson(X, P),
        "pearson_nonzero": _pearson(X[is_nonzero], P[is_nonzero]),
        "pearson_per_cell": _mean_defined([_pearson(x, p) for x, p in zip(X, P, strict=True)]),
        "pearson_nonzero_per_cell": _mean_defined(
            [_pearson(x[chosen], p[chosen]) for x, p, chosen in zip(X, P, is_nonzero, strict=True)]
        ),
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _mean_defined(values: list[float]) -> float:
    return _mean(np.array([value for value in values if not np.isnan(value)]))


def _pearson(X: np.ndarray, P: np.ndarray) -> float:
    if X.size < 2 or np.ptp(X) == 0 or np.ptp(P) == 0:
        return float("nan")
    return float(np.corrcoef(X.ravel(), P.ravel())[0, 1])


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ExpressionRecovery(evaluate.Metric):
    """MAE, MRE and Pearson r of predicted expression."""

    def _info(self) -> evaluate.MetricInfo:
        values = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": values, "references": values}),
            reference_urls=["https://doi.org/10.1038/s41592-024-02305-7"],
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return expression_recovery(predictions, references)
