"""The results of the benchmarks of enhancement, clustering and mapping as Markdown tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ENHANCEMENT = {
    "mae_nonzero": "MAE, nonzero",
    "mre_nonzero": "MRE, nonzero",
    "pearson_nonzero_per_cell": "r, nonzero",
    "mae": "MAE, all genes",
    "pearson_per_cell": "r, all genes",
}
CLUSTERING = {
    "nmi": "NMI",
    "ari": "ARI",
    "silhouette": "silhouette",
    "calinski_harabasz": "Calinski-Harabasz",
}
GRAPH = {"nmi_leiden": "NMI, Leiden", "ari_leiden": "ARI, Leiden", "graph_connectivity_of_graph": "types connected"}
INTEGRATION = {
    "bio": "cell types",
    "batch": "batches",
    "total": "total",
    "isolated_labels": "isolated labels",
    "nmi_kmeans": "NMI, k-means",
    "ari_kmeans": "ARI, k-means",
    "silhouette_label": "silhouette, types",
    "clisi": "cLISI",
    "bras": "BRAS",
    "ilisi": "iLISI",
    "kbet": "kBET",
    "graph_connectivity": "graph connectivity",
    "pcr": "PCR",
}


def enhancement_tables(results: Mapping[str, Any]) -> str:
    """For each data set and rate: the measures of every predictor, and our model against each of them."""
    parts = [_about_the_model(results)]
    for name, found in results["data"].items():
        for rate, summary in found["rates"].items():
            parts.append(
                f"### {name}, {float(rate):.0%} of the counts\n\n{found['num_cells']:,} cells of "
                f"{found['median_counts']:,.0f} counts (median, full), {found['num_genes']:,} genes; "
                f"{summary['num_left_out']:,} cells without counts at this rate left out.\n"
            )
            rows = [
                [title, *(number(measures[key]) for key in ENHANCEMENT), f"{measures['seconds']:.0f}"]
                for title, measures in summary["predictors"].items()
            ]
            parts.append(markdown_table(["predictor", *ENHANCEMENT.values(), "seconds"], rows))
            if summary["comparisons"]:
                compared = [
                    [
                        title,
                        *(_ratio(pair[key]) for key in ("mae_nonzero", "mre_nonzero", "mae")),
                        *(_difference(pair[key]) for key in ("pearson_nonzero_per_cell", "pearson_per_cell")),
                    ]
                    for title, pair in summary["comparisons"].items()
                ]
                header = [
                    "scFoundation against (95 %)",
                    "MAE, nonzero, ratio",
                    "MRE, nonzero, ratio",
                    "MAE, all, ratio",
                    "r, nonzero, difference",
                    "r, all, difference",
                ]
                parts.append(markdown_table(header, compared))
    return "\n".join(parts)


def clustering_tables(results: Mapping[str, Any]) -> str:
    """For each data set the scores of every method, mean over Leiden seeds with their standard deviation."""
    parts = [_about_the_model(results)]
    for name, found in results["data"].items():
        parts.append(f"### {name}: {found['num_cells']:,} cells, {found['num_labels']} cell types\n")
        rows = [
            [
                title,
                *(
                    number(scores[key]) + (f" ± {number(scores[f'{key}_sd'])}" if f"{key}_sd" in scores else "")
                    for key in CLUSTERING
                ),
                f"{scores['num_clusters']:.1f}",
                f"{scores['seconds']:.0f}",
            ]
            for title, scores in found["methods"].items()
        ]
        parts.append(markdown_table(["method", *CLUSTERING.values(), "clusters", "seconds"], rows))
    return "\n".join(parts)


def mapping_tables(results: Mapping[str, Any]) -> str:
    """For each data set the scIB scores of every method, and those of its neighbour graph."""
    parts = [_about_the_model(results)]
    for name, found in results["data"].items():
        parts.append(
            f"### {name}: {found['num_cells']:,} cells, {found['num_labels']} cell types, "
            f"{found['num_batches']} batches\n"
        )
        columns = {**INTEGRATION, **GRAPH}
        rows = [[title, *(number(scores.get(key)) for key in columns)] for title, scores in found["methods"].items()]
        parts.append(markdown_table(["method", *columns.values()], rows))
    return "\n".join(parts)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *rows))


def number(value: float | None) -> str:
    """Three digits behind the point, or three in all; a dash for what is not defined."""
    if value is None or value != value:
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"


def _ratio(pair: Mapping[str, Any]) -> str:
    return f"{number(pair['ratio'])} ({number(pair['low'])} to {number(pair['high'])})"


def _difference(pair: Mapping[str, Any]) -> str:
    if pair["difference"] is None or pair["difference"] != pair["difference"]:
        return "-"
    return f"{pair['difference']:+.3f} ({pair['low']:+.3f} to {pair['high']:+.3f})"


def _about_the_model(results: Mapping[str, Any]) -> str:
    model = results["model"]
    return f"scFoundation is `{model['name']}`, {model['num_parameters'] / 1e6:.1f}M parameters.\n"
