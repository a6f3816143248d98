"""Down-sampled cells brought back to depth, by our model and by others. Also `scfoundation benchmark enhancement`.

The paper's Fig. 2b in small: counts are drawn from full cells at a few rates, every method sees the draws, and its
log1p(counts per 10,000) is compared with the full cells', gene by gene, on the genes that the data set measures.
"""
# C cells, G genes

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from scipy.stats import ttest_1samp
from tqdm.auto import tqdm

from scfoundation_hf.evaluation.expression_errors import SUMS, error_sums, measures
from scfoundation_hf.evaluation.paired_comparison import CONFIDENCE, compare_errors
from scfoundation_hf.inference.loading import load_with_decoder
from scfoundation_hf.tokenization.read_depth import row_totals

from .cell_sets import CellFile, CellSet, down_sample_cells, read_cells
from .denoisers import DENOISERS, Denoiser, Reading, log1p_values, values_of
from .methods import Setup, check_methods, describe_model, save_random_weights, what_changes
from .panels import draw_enhancement
from .reports import enhancement_tables
from .stored_parts import Remeasure, StoredParts

RATES = (0.01, 0.05, 0.1, 0.2)
SETTINGS = ("methods", "rates", "max_cells", "seeds", "scvi_epochs")
CELLS_PER_SUM = 64  # bounds the memory of the error sums
PER_CELL = ("absolute_nonzero", "relative_nonzero", "absolute", "pearson", "pearson_nonzero")
OURS, UNCHANGED = "scfoundation", "down-sampled"


def benchmark_enhancement(
    data: Mapping[str, CellFile],
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    methods: Sequence[str] = tuple(DENOISERS),
    rates: Sequence[float] = RATES,
    max_cells: int | None = 500,
    seeds: Sequence[int] = (0,),
    scvi_epochs: int | None = None,
    device: str | None = None,
    remeasure: Remeasure = "nothing",
    progress: bool = True,
) -> Path:
    """Measure how close methods bring down-sampled cells to the full ones.

    Every (data set, method, rate, seed) is a file in `parts/` as soon as it is measured; the same call goes on with
    what is missing. Our model is asked for T = S / rate. Cells that a draw leaves without counts are left out for all
    methods.

    Args:
        data: data sets by name.
        model: model folder or Hub id.
        output: folder to make: `results.json`, `tables.md`, `enhancement.svg` and `.png`.
        methods: of `DENOISERS`.
        rates: share of the counts that is kept, above 0 and below 1.
        max_cells: of each data set; `None`: all.
        seeds: each draws the counts anew; measures are means over them.
        scvi_epochs: `None`: scVI's own number, 400 below 20,000 cells.
        device: `None`: a GPU if there is one.
        remeasure: of what `output` has: nothing, what was measured with another model, or everything.
        progress: show a progress bar.
    Returns: `output`.
    Raises: ValueError: for unknown methods, rates that are none, or parts in `output` of other settings; ImportError:
        for a method whose package is missing; FileExistsError, FileNotFoundError, KeyError: as the names say.
    """
    check_methods(methods, DENOISERS, extra="enhancement-benchmark")
    for rate in rates:
        if not 0 < rate < 1:
            raise ValueError(f"A rate is the share of counts to keep, above 0 and below 1; got {rate!r}.")
    loaded = load_with_decoder(str(model), device=device)
    about_the_model, vocabulary = describe_model(loaded), loaded.tokenizer.vocabulary
    parts = StoredParts(Path(output), depends_on={}, remeasure=remeasure)
    results: dict[str, Any] = {
        "model": about_the_model,
        "settings": {"max_cells": max_cells, "seeds": list(seeds), "scvi_epochs": scvi_epochs},
        "data": {},
    }
    with (
        tempfile.TemporaryDirectory() as temporary,
        tqdm(total=len(data) * len(rates) * len(seeds) * len(methods), unit=" parts", disable=not progress) as bar,
    ):
        control = Path(temporary) / "random-weights"
        if "random-weights" in methods:
            save_random_weights(Path(model), control, seed=0)
        setup = Setup(Path(model), control, depth_fold=1, scvi_epochs=scvi_epochs, device=device)
        for name, file in data.items():
            cells = read_cells(name, file, vocabulary, max_cells=max_cells)
            found = {}
            for rate in rates:
                bar.set_description(f"{name}, {rate:.0%}")
                found[str(rate)] = _measure_rate(
                    parts,
                    cells,
                    rate,
                    methods=methods,
                    seeds=seeds,
                    setup=setup,
                    about_the_model=about_the_model,
                    bar=bar,
                )
            results["data"][name] = {
                "num_cells": cells.adata.n_obs,
                "num_genes": cells.adata.n_vars,
                "median_counts": float(np.median(row_totals(cells.adata.X))),
                "rates": found,
            }
    parts.write_results(results, enhancement_tables(results))
    draw_enhancement(results, parts.folder / "enhancement")
    return parts.folder


def _measure_rate(
    parts: StoredParts,
    cells: CellSet,
    rate: float,
    *,
    methods: Sequence[str],
    seeds: Sequence[int],
    setup: Setup,
    about_the_model: Mapping[str, Any],
    bar: "tqdm[Any]",
) -> dict[str, Any]:
    by_predictor: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        draw = Draw(cells, rate=rate, seed=seed)
        for method in methods:
            part = parts.get(
                {"data": cells.name, "method": method, "rate": rate, "seed": seed},
                partial(draw.measure, DENOISERS[method], replace(setup, depth_fold=1 / rate, seed=seed)),
                depends_on=what_changes(
                    cells, DENOISERS[method], about_the_model=about_the_model, scvi_epochs=setup.scvi_epochs
                ),
            )
            about = {name: part[name] for name in ("seconds", "num_left_out")}
            for reading, errors in part["readings"].items():
                by_predictor.setdefault(title_of(method, reading), []).append(errors | about)
            bar.update()
    return summarise(by_predictor, groups=groups_of(cells))


@dataclass(frozen=True)
class Draw:
    """The cells of a data set, and what a draw of their counts left."""

    cells: CellSet
    rate: float
    seed: int

    @cached_property
    def shallow(self) -> AnnData:
        """The shallow cells that still have counts."""
        left = down_sample_cells(self.cells.adata.X, rate=self.rate, seed=self.seed)
        adata = AnnData(left, obs=self.cells.adata.obs, var=self.cells.adata.var)
        return adata[row_totals(left) > 0].copy()

    def measure(self, denoiser: Denoiser, setup: Setup) -> dict[str, Any]:
        """Errors of a method, and the seconds that it took."""
        start = perf_counter()
        predicted = denoiser.predict(self.shallow, setup)
        seconds = perf_counter() - start
        rows = self.cells.adata.obs_names.get_indexer(self.shallow.obs_names)
        full = log1p_values(self.cells.adata.X)[rows]
        depths = row_totals(self.shallow.X) * setup.depth_fold
        return {
            "seconds": seconds,
            "num_left_out": self.cells.adata.n_obs - len(rows),
            "readings": {
                reading: expression_scores(values, full, rows=rows, num_cells=self.cells.adata.n_obs)
                for reading, values in values_of(denoiser, predicted, depths).items()
            },
        }


def expression_scores(predicted: np.ndarray, full: np.ndarray, *, rows: np.ndarray, num_cells: int) -> dict[str, Any]:
    """Measures over all cells, and the sums and correlations of each, NaN for cells that are not among `rows`."""
    sums = torch.cat(
        [
            error_sums(torch.from_numpy(np.array(predicted[start:stop])), torch.from_numpy(full[start:stop]))
            for start in range(0, len(full), CELLS_PER_SUM)
            for stop in [start + CELLS_PER_SUM]
        ]
    )
    of_cells = [measures(cell) for cell in sums]
    each = {
        "absolute_nonzero": sums[:, 1, SUMS.index("absolute")].numpy(),
        "relative_nonzero": sums[:, 1, SUMS.index("relative")].numpy(),
        "absolute": sums[:, :, SUMS.index("absolute")].sum(1).numpy(),
        "pearson": np.array([cell["pearson"] for cell in of_cells]),
        "pearson_nonzero": np.array([cell["pearson_nonzero"] for cell in of_cells]),
    }
    per_cell = {}
    for name, values in each.items():
        per_cell[name] = np.full(num_cells, np.nan)
        per_cell[name][rows] = [float(f"{value:.6g}") for value in values]
    means = {f"{name}_per_cell": _mean_defined(each[name]) for name in ("pearson", "pearson_nonzero")}
    return {"measures": measures(sums.sum(0)) | means, "per_cell": per_cell}


def _mean_defined(values: np.ndarray) -> float:
    """Mean of what is defined: a constant prediction correlates with nothing."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def summarise(predictors: Mapping[str, Sequence[Mapping[str, Any]]], *, groups: np.ndarray) -> dict[str, Any]:
    """Mean measures of every predictor over seeds, and each compared with our model cell by cell.

    Args:
        predictors: by title, the parts of all seeds.
        groups: `(C,)` the batch of each cell, within which cells are drawn anew for the intervals.
    """
    summary: dict[str, Any] = {"predictors": {}, "comparisons": {}}
    per_cell: dict[str, dict[str, np.ndarray]] = {}
    for title, of_seeds in predictors.items():
        keys = of_seeds[0]["measures"]
        summary["predictors"][title] = {
            key: float(np.mean(np.array([part["measures"][key] for part in of_seeds], dtype=float))) for key in keys
        } | {"seconds": float(np.mean([part["seconds"] for part in of_seeds]))}
        per_cell[title] = {
            name: np.mean([np.array(part["per_cell"][name], dtype=float) for part in of_seeds], axis=0)
            for name in PER_CELL
        }
        summary["num_left_out"] = sum(part["num_left_out"] for part in of_seeds)
    ours = DENOISERS[OURS].title
    for title, theirs in per_cell.items():
        if ours in per_cell and title != ours:
            summary["comparisons"][title] = {
                name: _compare(per_cell[ours][key], theirs[key], groups)
                for name, key in (
                    ("mae_nonzero", "absolute_nonzero"),
                    ("mre_nonzero", "relative_nonzero"),
                    ("mae", "absolute"),
                )
            } | {
                f"{name}_per_cell": _difference(per_cell[ours][name], theirs[name])
                for name in ("pearson", "pearson_nonzero")
            }
    return summary


def _compare(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    is_measured = np.isfinite(ours) & np.isfinite(theirs)
    pair = compare_errors(ours[is_measured], theirs[is_measured], groups=groups[is_measured].tolist())
    return asdict(pair)


def _difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Mean difference of paired cells with its 95 % interval; NaN where the other has no correlations."""
    differences = (ours - theirs)[np.isfinite(ours) & np.isfinite(theirs)]
    if len(differences) < 2:
        return dict.fromkeys(("difference", "low", "high"), float("nan"))
    paired = ttest_1samp(differences, 0.0)
    low, high = paired.confidence_interval(CONFIDENCE)
    return {"difference": float(differences.mean()), "low": float(low), "high": float(high)}


def groups_of(cells: CellSet) -> np.ndarray:
    """`(C,)` the batch of each cell, or the data set's name where there are none."""
    return cells.batches if "batch" in cells.adata.obs else np.full(cells.adata.n_obs, cells.name)


def title_of(method: str, reading: Reading) -> str:
    """A predictor's name in results and figures."""
    title = DENOISERS[method].title
    return title if reading == "plain" else f"{title}, {reading}"
