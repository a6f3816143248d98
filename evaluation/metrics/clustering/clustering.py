"""How well clusters, and the space they lie in, agree with known cell types, for `evaluate.load`."""
# C cells, D dimensions

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import (
    adjusted_rand_score,
    calinski_harabasz_score,
    normalized_mutual_info_score,
    silhouette_score,
)

_DESCRIPTION = """\
Agreement of clusters with reference labels (normalised mutual information, adjusted Rand index), and how far the
labels lie apart in the space that was clustered (silhouette, Calinski-Harabasz index).
"""
_INPUTS = """\
Args:
    predictions: the cluster of each cell.
    references: the label of each cell.
    embeddings: optional, for each cell its coordinates in the space that was clustered.
Returns:
    nmi: normalised mutual information, arithmetic mean, 0 to 1.
    ari: adjusted Rand index, at most 1; 0 is what chance gives.
    num_clusters: how many clusters there are.
    With embeddings, of the reference labels (so that it does not depend on the clusters):
    silhouette: mean silhouette width with Euclidean distances, -1 to 1.
    calinski_harabasz: variance between labels over variance within, from 0.
    Both depend on the scale and the number of dimensions: compare them between spaces with care.
Examples:
    >>> metric = evaluate.load("clustering")
    >>> metric.compute(predictions=["0", "0", "1"], references=["B", "B", "T"])["ari"]
    1.0
"""
_CITATION = """\
@article{pedregosa2011scikit,
  title={Scikit-learn: Machine Learning in Python},
  author={Pedregosa, Fabian and others},
  journal={Journal of Machine Learning Research},
  volume={12},
  pages={2825--2830},
  year={2011}
}
"""


def clustering_scores(
    clusters: Sequence[Any] | np.ndarray, labels: Sequence[Any] | np.ndarray, *, embeddings: np.ndarray | None = None
) -> dict[str, float]:
    """NMI and ARI of `(C,)` clusters against labels; with `(C, D)` embeddings the labels' separation there.

    Raises: ValueError: if the lengths differ, or the labels are of fewer than two kinds where they must be told apart.
    """
    if len(clusters) != len(labels) or (embeddings is not None and len(embeddings) != len(labels)):
        raise ValueError(
            f"There are {len(clusters)} clusters of {len(labels)} labels"
            + ("" if embeddings is None else f" and {len(embeddings)} embeddings")
            + "; pass one of each a cell."
        )
    scores = {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
        "num_clusters": len(set(clusters)),
    }
    if embeddings is not None:
        scores["silhouette"] = float(silhouette_score(embeddings, labels))
        scores["calinski_harabasz"] = float(calinski_harabasz_score(embeddings, labels))
    return scores


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Clustering(evaluate.Metric):
    """NMI, ARI, silhouette and Calinski-Harabasz index."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(label_kind)})
                for kind, label_kind in (("int64", "int64"), ("string", "string"), ("int64", "string"))
            ],
            reference_urls=["https://scikit-learn.org/stable/modules/clustering.html#clustering-evaluation"],
        )

    def _compute(self, predictions: Any, references: Any, embeddings: Any = None) -> dict[str, float]:
        matrix = None if embeddings is None else np.asarray(embeddings, dtype=np.float64)
        return clustering_scores(predictions, references, embeddings=matrix)
