"""Figures of the benchmarks of enhancement, clustering and mapping: small multiples, as SVG and PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scfoundation_hf.trainer_scripts.figures import COLORS, GREY, saved_figure

BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = COLORS
STYLES: dict[str, dict[str, Any]] = {
    "scFoundation": {"color": VERMILION, "linewidth": 2.2, "marker": "o", "zorder": 5},
    "random weights": {"color": ORANGE, "linestyle": (0, (1, 1.5)), "marker": "o"},
    "down-sampled data": {"color": "black", "marker": "s"},
    "gene mean": {"color": GREY, "linestyle": (0, (4, 2)), "marker": "D"},
    "kNN smoothing": {"color": SKY, "marker": "^"},
    "MAGIC": {"color": BLUE, "marker": "v"},
    "MAGIC on shares": {"color": BLUE, "linestyle": (0, (4, 2)), "marker": "v"},
    "scVI": {"color": GREEN, "marker": "P"},
    "counts as measured": {"color": "black"},
    "scVI latent space": {"color": GREEN, "linestyle": (0, (4, 2))},
    "scFoundation expression": {"color": VERMILION, "linestyle": (0, (4, 2))},
}
DEFAULTS = {"linewidth": 1.2, "markersize": 4}
ERRORS = {
    "mae_nonzero": "MAE, nonzero genes",
    "mre_nonzero": "MRE, nonzero genes",
    "pearson_nonzero_per_cell": "Pearson r, nonzero genes",
    "mae": "MAE, all genes",
}
SCORES = {"nmi": "NMI", "ari": "ARI", "silhouette": "silhouette"}


def draw_enhancement(results: Mapping[str, Any], path: Path) -> None:
    """Errors against the share of counts that was kept, one column a data set, as the paper's Fig. 2b.

    Of shares, the reading at the target depth is drawn for all genes, the plain one for nonzero genes: each is the
    kinder one there.
    """
    with saved_figure(path, width=2.7 * len(results["data"]) + 0.6, height=2.1 * len(ERRORS) + 0.7) as figure:
        grid = figure.subplots(len(ERRORS), len(results["data"]), squeeze=False, sharex=True)
        for column, (name, found) in enumerate(results["data"].items()):
            rates = sorted(found["rates"], key=float)
            for axes, (key, label) in zip(grid[:, column], ERRORS.items(), strict=True):
                for title in _plain_titles(found["rates"][rates[0]]["predictors"]):
                    drawn = f"{title}, at target depth"
                    if key != "mae" or drawn not in found["rates"][rates[0]]["predictors"]:
                        drawn = title
                    heights = [found["rates"][rate]["predictors"][drawn][key] for rate in rates]
                    axes.plot(
                        [100 * float(rate) for rate in rates],
                        [np.nan if height is None else height for height in heights],
                        label=title,
                        **DEFAULTS | STYLES.get(title, {}),
                    )
                axes.set_xscale("log")
                axes.set_xticks([100 * float(rate) for rate in rates], [f"{100 * float(rate):g}" for rate in rates])
                axes.minorticks_off()
                if column == 0:
                    axes.set_ylabel(label)
            grid[0, column].set_title(name, fontsize=9)
            grid[-1, column].set_xlabel("counts kept, %")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)


def _plain_titles(predictors: Mapping[str, Any]) -> list[str]:
    return [title for title in predictors if not title.endswith(", at target depth")]


def draw_clustering(results: Mapping[str, Any], path: Path) -> None:
    """Scores of our embeddings against T / S, and those of other methods as levels, as the paper's Fig. 2c."""
    with saved_figure(path, width=2.9 * len(results["data"]) + 0.8, height=2.2 * len(SCORES) + 0.9) as figure:
        grid = figure.subplots(len(SCORES), len(results["data"]), squeeze=False, sharex=True)
        for column, (name, found) in enumerate(results["data"].items()):
            folds = {scores["fold"]: scores for scores in found["methods"].values() if scores.get("fold") is not None}
            levels = {title: scores for title, scores in found["methods"].items() if scores.get("fold") is None}
            for axes, (key, label) in zip(grid[:, column], SCORES.items(), strict=True):
                for title, scores in levels.items():
                    style = STYLES.get(title, {"color": PINK})
                    axes.axhline(
                        scores[key], label=title, color=style["color"], linestyle=style.get("linestyle", "solid")
                    )
                heights = [folds[fold][key] for fold in sorted(folds)]
                spread = [folds[fold].get(f"{key}_sd") or 0 for fold in sorted(folds)]
                axes.errorbar(
                    sorted(folds),
                    heights,
                    yerr=spread,
                    label="scFoundation embeddings, T/S",
                    capsize=2,
                    **DEFAULTS | STYLES["scFoundation"],
                )
                axes.set_xticks(sorted(folds))
                if column == 0:
                    axes.set_ylabel(label)
            grid[0, column].set_title(name, fontsize=9)
            grid[-1, column].set_xlabel("T/S of the embeddings")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)


def draw_maps(maps: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], path: Path) -> None:
    """UMAPs: one row a data set, one column a method.

    Args:
        maps: data set -> method -> `(cells, 2)` coordinates and `(cells,)` names that colour the cells.
    """
    from matplotlib import colormaps

    methods = list(dict.fromkeys(method for of_set in maps.values() for method in of_set))
    with saved_figure(path, width=1.7 * len(methods) + 1.6, height=1.8 * len(maps) + 0.3) as figure:
        grid = figure.subplots(len(maps), len(methods), squeeze=False)
        for row, (name, of_set) in enumerate(maps.items()):
            for axes, method in zip(grid[row], methods, strict=True):
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if row == 0:
                    axes.set_title(method, fontsize=8)
                if method not in of_set:
                    continue
                places, names = of_set[method]
                kinds = np.unique(names)
                palette = colormaps["tab20" if len(kinds) > 10 else "tab10"]
                for number, kind in enumerate(kinds):
                    members = places[names == kind]
                    color = palette(number % palette.N)
                    # a bitmap within the SVG: thousands of points as shapes are megabytes
                    axes.scatter(*members.T, s=3, color=color, linewidths=0, label=kind, rasterized=True)
            grid[row, 0].set_ylabel(name, fontsize=8)
            handles, labels = grid[row, 0].get_legend_handles_labels()
            if len(labels) <= 12:
                grid[row, -1].legend(
                    handles,
                    labels,
                    loc="center left",
                    bbox_to_anchor=(1, 0.5),
                    fontsize=6,
                    frameon=False,
                    markerscale=2,
                )


def draw_integration(results: Mapping[str, Any], path: Path) -> None:
    """Conservation of cell types against correction of batches, one panel a data set; up and right is better."""
    with saved_figure(path, width=3.4 * len(results["data"]) + 0.4, height=3.6) as figure:
        grid = figure.subplots(1, len(results["data"]), squeeze=False)[0]
        for axes, (name, found) in zip(grid, results["data"].items(), strict=True):
            scored = {title: scores for title, scores in found["methods"].items() if scores.get("bio") is not None}
            for title, scores in scored.items():
                style = _integration_style(title)
                axes.plot(scores["batch"], scores["bio"], linestyle="none", markersize=8, label=title, **style)
            axes.set(xlabel="correction of batches", title=name)
            axes.title.set_fontsize(9)
        grid[0].set_ylabel("conservation of cell types")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)


def _integration_style(title: str) -> dict[str, Any]:
    marker = "s" if "Harmony" in title else "o"
    for name, color in (
        ("scFoundation", VERMILION),
        ("random weights", ORANGE),
        ("scVI", GREEN),
        ("PCA", BLUE),
    ):
        if title.startswith(name):
            return {"color": color, "marker": marker}
    return {"color": "black", "marker": marker}
