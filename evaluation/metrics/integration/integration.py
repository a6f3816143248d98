"""How well an embedding keeps cell types apart and brings batches together, for `evaluate.load`: scib-metrics."""
# C cells, D dimensions

import warnings
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import scib_metrics
from sklearn.neighbors import NearestNeighbors

_DESCRIPTION = """\
The scores of scIB (Luecken et al. 2022) as scib-metrics computes them: conservation of cell types and correction of
batches in an embedding, each score from 0 to 1, higher is better.
"""
_INPUTS = """\
Args:
    predictions: for each cell, its coordinates in the integrated space.
    references: the cell type of each cell.
    batches: the batch of each cell; at least two.
    unintegrated: optional, for each cell its coordinates before integration, such as principal components.
Returns:
    Cell types: isolated_labels, nmi_kmeans, ari_kmeans, silhouette_label, clisi.
    Batches: bras, ilisi, kbet, graph_connectivity; with unintegrated also pcr, the drop of the variance that the
    batch explains (0 where it rises).
    bio, batch: means of the two kinds; total: 0.6 bio + 0.4 batch, as scIB weighs them. Nothing is scaled between
    methods. The batch mean has another make-up with unintegrated than without.
Examples:
    >>> metric = evaluate.load("integration")
    >>> scores = metric.compute(predictions=embedding, references=cell_types, batches=donors)
"""
_CITATION = """\
@article{luecken2022benchmarking,
  title={Benchmarking atlas-level data integration in single-cell genomics},
  author={Luecken, Malte D. and others},
  journal={Nature Methods},
  volume={19},
  pages={41--50},
  year={2022}
}
"""
BIO = ("isolated_labels", "nmi_kmeans", "ari_kmeans", "silhouette_label", "clisi")
BATCH = ("bras", "ilisi", "kbet", "graph_connectivity", "pcr")
NEIGHBORS = {
    "graph_connectivity": 15,
    "kbet": 50,
    "lisi": 90,
}  # each cell itself among them, as scib-metrics takes them


def integration_scores(
    embedding: np.ndarray,
    labels: Sequence[str] | np.ndarray,
    batches: Sequence[str] | np.ndarray,
    *,
    unintegrated: np.ndarray | None = None,
) -> dict[str, float]:
    """The scores of a `(C, D)` embedding by name as `_INPUTS` lists them.

    Neighbours are exact, where scib-metrics' own pipeline approximates them.

    Raises: ValueError: if the lengths differ, there are too few cells, or only one batch or label.
    """
    X, types, batch = np.asarray(embedding, dtype=np.float32), np.asarray(labels), np.asarray(batches)
    if not len(X) == len(types) == len(batch) or (unintegrated is not None and len(unintegrated) != len(X)):
        raise ValueError(
            f"There are {len(X)} embeddings, {len(types)} labels and {len(batch)} batches"
            + ("" if unintegrated is None else f", {len(unintegrated)} unintegrated")
            + "; pass one of each a cell."
        )
    if len(X) < max(NEIGHBORS.values()):
        raise ValueError(f"{len(X)} cells are too few: the scores look at {max(NEIGHBORS.values())} neighbours.")
    for what, names in (("label", types), ("batch", batch)):
        if len(np.unique(names)) < 2:
            raise ValueError(f"All cells have the {what} {str(names[0])!r}; the scores compare at least two.")
    distances, indices = NearestNeighbors(n_neighbors=max(NEIGHBORS.values())).fit(X).kneighbors(X)
    neighbors = scib_metrics.nearest_neighbors.NeighborsResults(indices=indices, distances=distances)
    near = {name: neighbors.subset_neighbors(n=number) for name, number in NEIGHBORS.items()}
    kmeans = scib_metrics.nmi_ari_cluster_labels_kmeans(X, types)
    scores = {
        "isolated_labels": scib_metrics.isolated_labels(X, types, batch),
        "nmi_kmeans": kmeans["nmi"],
        "ari_kmeans": kmeans["ari"],
        "silhouette_label": scib_metrics.silhouette_label(X, types),
        "clisi": scib_metrics.clisi_knn(near["lisi"], types),
        "bras": scib_metrics.bras(X, types, batch),
        "ilisi": scib_metrics.ilisi_knn(near["lisi"], batch),
        "kbet": scib_metrics.kbet_per_label(near["kbet"], batch, types),
        "graph_connectivity": scib_metrics.graph_connectivity(near["graph_connectivity"], types),
    }
    if unintegrated is not None:
        before = np.asarray(unintegrated, dtype=np.float32)
        with warnings.catch_warnings():  # where batches weigh more than before, the score is 0, as documented
            warnings.filterwarnings("ignore", message="PCR comparison score is negative", category=UserWarning)
            scores["pcr"] = scib_metrics.pcr_comparison(before, X, batch, categorical=True)
    scores = {name: float(score) for name, score in scores.items()}
    bio = float(np.mean([scores[name] for name in BIO]))
    batch_score = float(np.mean([scores[name] for name in BATCH if name in scores]))
    return scores | {"bio": bio, "batch": batch_score, "total": 0.6 * bio + 0.4 * batch_score}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Integration(evaluate.Metric):
    """The scIB scores of an embedding."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("string"),
                }
            ),
            reference_urls=["https://doi.org/10.1038/s41592-021-01336-8", "https://scib-metrics.readthedocs.io"],
        )

    def _compute(self, predictions: Any, references: Any, batches: Any, unintegrated: Any = None) -> dict[str, float]:
        return integration_scores(predictions, references, batches, unintegrated=unintegrated)
