"""The results of the annotation benchmark as Markdown tables and a figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scfoundation_hf.trainer_scripts.figures import COLORS, GREY, saved_figure

from .reports import markdown_table

COLUMNS = {
    "macro_f1": "macro F1",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "expected_calibration_error": "calibration error",
}
MIB = 2**20
PANELS_A_ROW = 3
_, VERMILION, _, _, ORANGE, _ = COLORS


def annotation_tables(results: Mapping[str, Any]) -> str:
    """Macro F1 of all methods and data sets, our models compared on the same splits, then each data set by itself.

    Args:
        results: what `benchmark_annotation` writes as JSON.
    """
    titles = {key: method["title"] for key, method in results["methods"].items()}
    data, seeds = results["data"], results["settings"]["seeds"]
    parts = [
        f"Mean ± standard deviation over {seeds} seeds, each with a split of its own.\n",
        "### Macro F1\n",
        markdown_table(
            ["method", *data],
            [
                [title, *(_spread(found["methods"][key]["macro_f1"]) for found in data.values())]
                for key, title in titles.items()
            ],
        ),
        _compared(data),
    ]
    return "\n".join([*parts, *(_of_set(name, found, titles) for name, found in data.items())])


def _compared(data: Mapping[str, Any]) -> str:
    rows = [
        [model, title, *(_spread(found["comparisons"][model][title], signed=True) for found in data.values())]
        for model, pairs in next(iter(data.values()))["comparisons"].items()
        for title in pairs
    ]
    if not rows:
        return ""
    return "### Differences of macro F1 on the same splits\n\n" + markdown_table(["model", "difference", *data], rows)


def _of_set(name: str, found: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    held_out = "cells" if found["held_out_by"] is None else f"whole groups of `{found['held_out_by']}`"
    groups = "" if found["num_batches"] is None else f" ({found['num_batches']} in all)"
    seen = [
        f"{model}: {'not recorded' if share is None else f'{share:.0%}'}"
        for model, share in found["share_seen_in_pretraining"].items()
    ]
    about = (
        f"{found['num_cells']:,} cells, {len(found['types'])} types, {found['num_genes']:,} genes of the vocabulary; "
        f"held out: {held_out}{groups}; cells for training, validation and test: {_sizes(found['splits'])}."
        + (f" Cells seen in pretraining, without labels: {', '.join(seen)}." if seen else "")
    )
    not_scored = [split["not_scored"] for split in found["splits"]]
    if any(not_scored):
        about += f" Test cells of types without training cells, not scored: {', '.join(map(str, not_scored))}."
    measured = [
        [
            title,
            *(_spread(found["methods"][key][measure]) for measure in COLUMNS),
            _plain(found["methods"][key]["seconds"]["mean"], 1),
            _plain(found["methods"][key]["cpu_seconds"]["mean"], 1),
            _plain(found["methods"][key]["peak_memory_bytes"]["mean"], MIB),
        ]
        for key, title in titles.items()
    ]
    by_class = [
        [f"{cell_type} ({number:,})", *(_f1(found["methods"][key]["per_class_f1"].get(cell_type)) for key in titles)]
        for cell_type, number in found["types"].items()
    ]
    return "\n".join(
        [
            f"### {name}\n\n{about}\n",
            markdown_table(["method", *COLUMNS.values(), "seconds", "CPU seconds", "peak, MiB"], measured),
            markdown_table(["F1 by type (cells)", *titles.values()], by_class),
        ]
    )


def _sizes(splits: list[Mapping[str, int]]) -> str:
    """Of every seed, or once if they are all the same."""
    sizes = [f"{split['train']:,}/{split['validation']:,}/{split['test']:,}" for split in splits]
    return ", ".join(dict.fromkeys(sizes))


def _spread(measure: Mapping[str, Any], *, signed: bool = False) -> str:
    if measure["mean"] is None:
        return "-"
    mean = f"{measure['mean']:+.3f}" if signed else f"{measure['mean']:.3f}"
    return mean if measure["sd"] is None else f"{mean} ± {measure['sd']:.3f}"


def _plain(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:,.1f}" if value < 10 * unit else f"{value / unit:,.0f}"


def _f1(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw_annotation(results: Mapping[str, Any], path: Path) -> None:
    """One panel a data set: macro F1 of every method, a dot a seed and a bar at the mean; `path` with .svg and .png."""
    data = results["data"]
    methods = list(reversed(results["methods"]))  # the first is on top
    num_columns = min(PANELS_A_ROW, len(data))
    num_rows = -(-len(data) // num_columns)
    height = 0.17 * len(methods) + 0.6
    with saved_figure(path, width=2.3 * num_columns + 2.2, height=height * num_rows) as figure:
        grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
        for axes, (name, found) in zip(grid.flat, data.items(), strict=False):
            for row, key in enumerate(methods):
                values = found["methods"][key]["macro_f1"]["values"]
                color = _color(results["methods"][key])
                axes.scatter(values, [row] * len(values), s=10, color=color, alpha=0.6, linewidths=0)
                axes.plot([np.mean(values)] * 2, [row - 0.35, row + 0.35], color=color, linewidth=1.6)
            axes.set_title(name, fontsize=8)
            axes.set_yticks(range(len(methods)), [results["methods"][key]["title"] for key in methods])
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="y", linewidth=0.3, color="#dddddd")
            axes.set_axisbelow(True)
            axes.set_xlim(-0.02, 1.02)
        for axes in list(grid.flat)[len(data) :]:
            axes.set_visible(False)
        figure.supxlabel("macro F1 on held-out cells", fontsize=8)


def _color(method: Mapping[str, Any]) -> str:
    """Ours, the control, and all others."""
    if method["model"] is None:
        return GREY
    return ORANGE if "random weights" in method["title"] else VERMILION
