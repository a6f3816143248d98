"""Validation loss against the computation that training took, of several runs: the paper's Fig. 2a in small."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from scfoundation_hf.trainer_scripts.figures import COLORS, GREY, saved_figure
from scfoundation_hf.trainer_scripts.model_card import REPORT_FILE

NAME_HEIGHT = 9.5  # points


@dataclass(frozen=True)
class ScalingCurve:
    """The validations of a training run.

    Attributes:
        name: of the run's folder.
        flops: `(validations,)` computed by all processes up to each validation.
        losses: `(validations,)` validation losses.
        masking: recipe that hid the genes; None if it was changed in parts, or the run does not say.
    """

    name: str
    flops: np.ndarray
    losses: np.ndarray
    masking: str | None


def read_curve(run: str | PathLike[str]) -> ScalingCurve:
    """The curve of a run's folder, finished or not, from the log of its last checkpoint.

    Validations without computation before them, or after the last logged one, are left out.

    Raises: FileNotFoundError: if there is no checkpoint; ValueError: if its log holds no validations or no FLOPs.
    """
    folder = Path(run)
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    if not states:
        raise FileNotFoundError(f"{folder} holds no checkpoint-*/trainer_state.json, so it is no training run.")
    history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    logged = [(line["step"], line["flops"]) for line in history if "flops" in line]
    validations = [(line["step"], line["eval_loss"]) for line in history if "eval_loss" in line]
    if not logged or not validations:
        missing = "validation (eval_loss)" if logged else "computation (flops)"
        raise ValueError(f"The log in {states[-1]} has no line about {missing}, so there is no curve to draw.")
    steps, losses = np.array([pair for pair in validations if 0 < pair[0] <= logged[-1][0]], dtype=float).T
    settings = folder / "pretraining_settings.json"
    stored = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    masking = None if stored.get("masking_overrides") else stored.get("masking")
    flops = np.interp(steps, *np.array([(0, 0), *logged], dtype=float).T)
    return ScalingCurve(folder.resolve().name, flops, losses, masking)


def with_measured_end(curve: ScalingCurve, run: str | PathLike[str], loss: float) -> ScalingCurve:
    """The curve of a finished run, ended by what was measured of its model with all the computation that it took.

    Validations in the run may have been of a part of the cells. A run that is not finished is left as it is.
    """
    report = Path(run) / REPORT_FILE
    if not report.is_file():
        return curve
    total = float(json.loads(report.read_text(encoding="utf-8"))["flops"])
    is_before = curve.flops < total * (1 - 1e-6)
    flops, losses = np.append(curve.flops[is_before], total), np.append(curve.losses[is_before], loss)
    return replace(curve, flops=flops, losses=losses)


def draw_scaling(curves: Sequence[ScalingCurve], levels: Mapping[str, float], path: Path) -> None:
    """Draw the curves, and the baselines' losses as levels, as `path` with .svg and .png: the same bytes each time.

    Args:
        curves: one line each, named at its end.
        levels: the loss of each baseline.
        path: of the files, without suffix.
    """
    from matplotlib import ticker

    with saved_figure(path, width=6.4, height=4.0, font_size=9) as figure:
        axes = figure.add_subplot(xscale="log", yscale="log")
        for number, curve in enumerate(curves):
            color = COLORS[number % len(COLORS)]
            axes.plot(curve.flops, curve.losses, color, marker="o", markersize=2.5, linewidth=1.2, label=curve.name)
        for level in levels.values():
            axes.axhline(level, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        axes.set_xlabel("floating-point operations of training")
        axes.set_ylabel("validation loss (mean squared error)")
        # Losses often stay within one power of ten, whose two ends would be the only labels.
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(99, 99)))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        figure.legend(loc="outside upper left", ncols=4, frameon=False)
        figure.draw_without_rendering()  # settles the layout, so that the names' places are known
        _name_levels(axes, levels)


def _name_levels(axes: Any, levels: Mapping[str, float]) -> None:
    """Write each level's name at its right end, moved up where it would lie on the one below."""
    lowest = -math.inf
    for name, level in sorted(levels.items(), key=lambda item: item[1]):
        height = axes.transData.transform((1, level))[1] * 72 / axes.figure.dpi  # in points
        shift = max(0.0, lowest + NAME_HEIGHT - height)
        lowest = height + shift
        axes.annotate(
            name,
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(3, shift),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
            va="center",
        )
