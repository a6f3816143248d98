"""What people read of a fine-tuning run: `report.html`, in one file without links, and the model card."""
# N cells, D width, C cell types

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .figures import styled_figure
from .model_card import OFFICIAL_LICENCE, TAGS, licence_of

CURVE_BINS = 10
MAX_NAMED_CLASSES = 40  # of more, the confusion matrix shows no names
METRICS = {
    "f1": ("Macro F1", "macro_f1"),
    "accuracy": ("Accuracy", "accuracy"),
    "balanced_accuracy": ("Balanced accuracy", "balanced_accuracy"),
}


@dataclass(frozen=True)
class CellMaps:
    """What the head saw of some cells, to be laid out in the plane.

    Args:
        before, after: `(N, D)` pooled vectors of the pretrained and of the fine-tuned encoder.
        names: `(N,)` their types.
        is_trained: `(N,)` whether a cell was trained on.
    """

    before: np.ndarray
    after: np.ndarray
    names: np.ndarray
    is_trained: np.ndarray


def calibration_curve(confidence: np.ndarray, is_right: np.ndarray) -> list[dict[str, float]]:
    """Of the cells in each tenth of confidence: their number, mean confidence and share called right."""
    bins = np.minimum((confidence * CURVE_BINS).astype(int), CURVE_BINS - 1)
    return [
        {
            "cells": int((bins == number).sum()),
            "confidence": float(confidence[bins == number].mean()),
            "accuracy": float(is_right[bins == number].mean()),
        }
        for number in np.unique(bins)
    ]


def write_html(path: Path, record: Mapping[str, Any], maps: CellMaps, *, seed: int) -> None:
    """Write the report of a run.

    Args:
        record: what `finetuning_report.json` holds.
        maps: of the cells to draw.
        seed: of their layout.
    """
    split = "test" if "test" in record["scores"] else "validation"
    scores, classes = record["scores"][split], list(record["classes"])
    figures = {
        "confusion": _as_svg(lambda figure: _draw_confusion(figure, np.array(scores["confusion_matrix"]), classes)),
        "calibration": _as_svg(lambda figure: _draw_calibration(figure, scores["calibration_curve"])),
        "history": _as_svg(lambda figure: _draw_history(figure, record["history"], record["best_step"])),
        "maps": _draw_maps(maps, classes, seed=seed),
    }
    template = resources.files("scfoundation_hf.trainer_scripts").joinpath("finetuning_report_template.html")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template.read_text(encoding="utf-8")).render(
        record=record, split=split, scores=scores, figures=figures, is_same_map=_are_same(maps)
    )
    path.write_text(page, encoding="utf-8")


def make_finetuning_card(record: Mapping[str, Any], *, base: str) -> ModelCard:
    """The model card of a fine-tuned folder; what the base model's says of its licence holds for both.

    Args:
        record: what `finetuning_report.json` holds.
        base: the pretrained model's folder or Hub id.
    """
    stated = {} if record["settings"]["random_weights"] else licence_of(base)
    split = "test" if "test" in record["scores"] else "validation"
    data = ModelCardData(
        library_name="transformers",
        tags=[*TAGS, "cell-type-annotation"],
        base_model=None if record["settings"]["random_weights"] else base,
        model_name=f"scFoundation, cell types of {record['label']}",
        eval_results=[
            EvalResult(
                task_type="cell-annotation",
                task_name="Cell type annotation",
                dataset_type="custom",
                dataset_name=f"{split} cells, held out",
                metric_type=metric,
                metric_name=name,
                metric_value=round(record["scores"][split][key], 4),
            )
            for metric, (name, key) in METRICS.items()
        ],
        **stated,
    )
    template = resources.files("scfoundation_hf.trainer_scripts").joinpath("finetuned_card_template.md")
    return ModelCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        record=record,
        split=split,
        scores=record["scores"][split],
        is_official=stated.get("license_name") == OFFICIAL_LICENCE["license_name"],
        licence_link=OFFICIAL_LICENCE["license_link"],
    )


def _as_svg(draw: Any) -> str:
    """A figure as text of an `<svg>`, the same each time."""
    with styled_figure() as figure:
        draw(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    return text[text.index("<svg") :]


def _draw_confusion(figure: Any, confusion: np.ndarray, classes: Sequence[str]) -> None:
    """Rows are true types; a cell of the matrix is shaded by its share of the row and says how many cells."""
    size = max(3.2, 0.32 * len(classes))
    figure.set_size_inches(size + 2, size + 1.4)
    axes = figure.add_subplot()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= MAX_NAMED_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        for row, column in np.argwhere(confusion):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, confusion[row, column], ha="center", va="center", color=color, fontsize=7)
    axes.set_xlabel("called")
    axes.set_ylabel("true")


def _draw_calibration(figure: Any, curve: Sequence[Mapping[str, float]]) -> None:
    figure.set_size_inches(3.6, 3.4)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
    sizes = np.array([point["cells"] for point in curve], dtype=float)
    confidence, accuracy = ([point[name] for point in curve] for name in ("confidence", "accuracy"))
    axes.plot(confidence, accuracy, color="#0072b2", linewidth=1)
    axes.scatter(confidence, accuracy, s=10 + 90 * sizes / sizes.max(), color="#0072b2")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.05), xlabel="confidence", ylabel="share of cells called right")


def _draw_history(figure: Any, history: Mapping[str, Any], best_step: int) -> None:
    figure.set_size_inches(6.4, 2.6)
    losses, scores = figure.subplots(1, 2)
    steps, validation_losses, macro_f1 = zip(*history["validation"], strict=True)
    losses.plot(*zip(*history["training"], strict=True), color="#999999", label="training")
    losses.plot(steps, validation_losses, color="#0072b2", label="validation")
    losses.set(xlabel="step", ylabel="loss", ylim=(0, None))
    losses.legend(frameon=False)
    scores.plot(steps, macro_f1, color="#0072b2")
    scores.axvline(best_step, color="#d55e00", linewidth=0.8)
    scores.set(xlabel="step", ylabel="macro F1, validation", ylim=(0, 1.02))


def _draw_maps(maps: CellMaps, classes: Sequence[str], *, seed: int) -> str:
    """The cells before and after, as the text of a PNG in base64; one picture where nothing changed."""
    import matplotlib as mpl

    titles = {"as pretrained": maps.before, "fine-tuned": maps.after}
    if _are_same(maps):
        titles = {"as pretrained": maps.before}
    colors = mpl.colormaps["turbo"](np.linspace(0.04, 0.96, len(classes)))
    with styled_figure() as figure:
        columns = 2 * len(titles)
        figure.set_size_inches(5.0 * len(titles), 4.4 + 0.16 * -(-len(classes) // columns))
        for number, (title, vectors) in enumerate(titles.items()):
            axes = figure.add_subplot(1, len(titles), number + 1, title=title, xticks=[], yticks=[])
            places = lay_out(vectors, seed=seed)
            for color, name in zip(colors, classes, strict=True):
                for is_trained, size, opacity in ((True, 3, 0.35), (False, 9, 1.0)):
                    chosen = (maps.names == name) & (maps.is_trained == is_trained)
                    label = name if number == 0 and not is_trained else None
                    axes.scatter(*places[chosen].T, s=size, color=[color], alpha=opacity, linewidths=0, label=label)
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, markerscale=2)
        written = io.BytesIO()
        figure.savefig(written, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(written.getvalue()).decode()


def lay_out(vectors: np.ndarray, *, seed: int) -> np.ndarray:
    """UMAP of `(N, D)` vectors, each number standardised over the cells: `(N, 2)`."""
    from umap import UMAP

    standardised = (vectors - vectors.mean(axis=0)) / np.maximum(vectors.std(axis=0), 1e-6)
    if len(vectors) < 4:  # nothing to lay out; UMAP would refuse
        return np.pad(standardised, ((0, 0), (0, 2)))[:, :2]
    neighbors = min(15, len(vectors) - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap and numba about themselves
        layout = UMAP(
            n_neighbors=neighbors, init="spectral" if len(vectors) > 20 else "random", random_state=seed, n_jobs=1
        )
        return layout.fit_transform(standardised.astype(np.float32))


def _are_same(maps: CellMaps) -> bool:
    return bool(np.array_equal(maps.before, maps.after))
