"""Scores of called cell types. The code lies in the folder of its metric, which is what `evaluate` fetches whole."""

from .metrics.cell_annotation.annotation_scores import annotation_scores, expected_calibration_error

__all__ = ["annotation_scores", "expected_calibration_error"]
