"""Figures of reports and benchmarks: one style, and the same bytes each time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: for all eyes
GREY = "#666666"


@contextmanager
def styled_figure(*, font_size: float = 8) -> Iterator[Any]:
    """A figure to fill and save within the block."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": font_size,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "scfoundation",
    }
    with mpl.rc_context(style):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


@contextmanager
def saved_figure(path: Path, *, width: float, height: float, font_size: float = 8) -> Iterator[Any]:
    """A figure to fill, in inches, saved as `path` with .svg and .png when the block ends."""
    with styled_figure(font_size=font_size) as figure:
        figure.set_size_inches(width, height)
        yield figure
        figure.savefig(path.with_suffix(".svg"), dpi=200, metadata={"Date": None, "Creator": None})
        figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Software": None})
