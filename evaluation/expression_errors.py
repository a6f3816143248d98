"""How far predicted expression is from the truth, summed batch by batch: what validation and benchmarks report.

The Trainer feeds `ExpressionErrors` while it evaluates; the pretraining benchmark keeps `error_sums` per cell, from
which every share of the cells (a donor, a bootstrap draw) has its measures without another pass.
"""
# B cells, M targets

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scfoundation_hf.modeling_scfoundation.losses import IGNORED_LABEL

DEPTH_EDGES = (2.5, 3.0, 3.5, 4.0, 4.5)  # log10 counts: 316, 1,000, 3,162, 10,000, 31,623
KINDS = ("zero", "nonzero")
# X is the true value, P the predicted one. Sums only, so that parts of any cut can be added.
SUMS = ("num_targets", "squared", "absolute", "relative", "X", "P", "XX", "PP", "XP")
SMALLEST_VARIANCE = 1e-12  # of the mean square: what is left below it is rounding


def error_sums(predicted: Tensor, labels: Tensor) -> Tensor:
    """What every measure is made of, for each cell: `(B, 2, 9)` float64 on the CPU, by `KINDS` and `SUMS`.

    A target counts as zero or nonzero by its label, that is by the full cell, not by the input that may have been
    down-sampled.

    Args:
        predicted: `(B, M)` log1p(CP10k).
        labels: `(B, M)` true values; -100 marks positions that do not count.
    Raises: ValueError: if the shapes differ.
    """
    if predicted.shape != labels.shape or labels.ndim != 2:
        raise ValueError(
            f"Predictions have shape {tuple(predicted.shape)}, labels {tuple(labels.shape)}; both must be "
            "(cells, targets)."
        )
    X, P = (values.detach().to("cpu", torch.float64) for values in (labels, predicted))
    valid = X != IGNORED_LABEL
    nonzero = valid & (X != 0)
    squared = (X - P) ** 2
    relative = squared / torch.where(nonzero, X, 1)
    terms = torch.stack([torch.ones_like(X), squared, (X - P).abs(), relative, X, P, X * X, P * P, X * P])
    # where, not a product: a NaN at a padded target must not reach the sum
    by_kind = [torch.where(kind, terms, 0).sum(-1) for kind in (valid & ~nonzero, nonzero)]
    return torch.stack(by_kind).permute(2, 0, 1)


def measures(sums: Tensor) -> dict[str, float]:
    """The measures of a share of the cells from its `error_sums`, added up over cells to `(2, 9)`.

    Returns: `num_targets`, `mse`, `mae` and `pearson` of all targets, the same with `_nonzero`, without `pearson`
        with `_zero`, and `mre_nonzero`, mean((X - P)^2 / X) as the paper prints it. NaN where there is nothing to
        average, or no variance to correlate.
    """
    zero, nonzero = sums
    result: dict[str, float] = {}
    for suffix, part in (("", zero + nonzero), ("_nonzero", nonzero), ("_zero", zero)):
        num_targets, squared, absolute, relative = part[:4]
        result[f"num_targets{suffix}"] = float(num_targets)
        result[f"mse{suffix}"] = float(squared / num_targets)
        result[f"mae{suffix}"] = float(absolute / num_targets)
        if suffix != "_zero":
            result[f"pearson{suffix}"] = _pearson(part)
        if suffix == "_nonzero":
            result["mre_nonzero"] = float(relative / num_targets)
    return result


def _pearson(part: Tensor) -> float:
    """Pearson r from one row of sums."""
    X, P, XX, PP, XP = (part[4:] / part[0]).tolist()
    variance_X, variance_P = XX - X * X, PP - P * P
    if not (variance_X > SMALLEST_VARIANCE * XX and variance_P > SMALLEST_VARIANCE * PP):
        return float("nan")
    return (XP - X * P) / (variance_X * variance_P) ** 0.5


class ExpressionErrors:
    """MSE, MAE, MRE and Pearson r of predicted expression, over all cells and by read depth.

    Memory is a few hundred numbers, whatever passes through. The result does not depend, beyond the rounding of
    float64, on how the cells are cut into batches or shared out to processes.

    Args:
        depth_edges: rising borders of the read-depth bins, in log10 counts of S; a cell on a border belongs to
            the deeper bin. Below the first and from the last on are bins too.
    Attributes:
        sums: `(bins, 2, 9)` float64. Adding the `sums` of several processes (an all-reduce) is all that merging
            takes.
    """

    def __init__(self, *, depth_edges: Sequence[float] = DEPTH_EDGES) -> None:
        if not depth_edges or list(depth_edges) != sorted(set(depth_edges)):
            raise ValueError(f"depth_edges must be at least one number, rising; got {list(depth_edges)}.")
        self.depth_edges = tuple(float(edge) for edge in depth_edges)
        self.sums = torch.zeros(len(depth_edges) + 1, len(KINDS), len(SUMS), dtype=torch.float64)

    def update(self, predicted: Tensor, labels: Tensor, log10_depth: Tensor) -> None:
        """Add the cells of a batch.

        Args:
            predicted: `(B, M)` log1p(CP10k).
            labels: `(B, M)` true values; -100 marks positions that do not count.
            log10_depth: `(B,)` S, log10 total count of the input that was seen.
        Raises: ValueError: if the shapes do not fit, or a depth is not finite.
        """
        self.add_cells(error_sums(predicted, labels), log10_depth)

    def add_cells(self, sums: Tensor, log10_depth: Tensor) -> None:
        """Add cells of which the `error_sums` `(B, 2, 9)` are known; otherwise as `update`."""
        depths = log10_depth.detach().to("cpu", torch.float64)
        if depths.shape != sums.shape[:1]:
            raise ValueError(f"There are {len(sums)} cells but depths of shape {tuple(depths.shape)}; pass one a cell.")
        if not depths.isfinite().all():
            cell = int(depths.isfinite().logical_not().nonzero()[0])
            raise ValueError(
                f"Cell {cell} of the batch has log10 depth {depths[cell]}; a cell without counts has none."
            )
        bins = torch.bucketize(depths, torch.tensor(self.depth_edges, dtype=torch.float64), right=True)
        self.sums.index_add_(0, bins, sums)

    def compute(self) -> dict[str, float]:
        """The measures of all cells, then of each read-depth bin that has targets.

        Keys: those of `measures`, so `mse`, `mae`, `pearson`, `mse_nonzero`, `mae_nonzero`, `mre_nonzero`,
        `pearson_nonzero`, `mse_zero`, `mae_zero` and `num_targets...`; for bins the same with `_depth_below_2.5`,
        `_depth_2.5_to_3.0`, ..., `_depth_from_4.5` behind.
        """
        result = measures(self.sums.sum(0))
        for name, sums in zip(self._bin_names(), self.sums, strict=True):
            if sums[:, 0].sum() > 0:
                result |= {f"{key}_depth_{name}": value for key, value in measures(sums).items()}
        return result

    def merge(self, other: "ExpressionErrors") -> None:
        """Add what another process summed.

        Raises: ValueError: if its read-depth bins are others.
        """
        self._check_edges(other.depth_edges)
        self.sums += other.sums

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes: the bins and the sums."""
        return {"depth_edges": list(self.depth_edges), "sums": self.sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises: ValueError: if its read-depth bins are others.
        """
        self._check_edges(tuple(state["depth_edges"]))
        self.sums = state["sums"].clone()

    def _bin_names(self) -> list[str]:
        edges = self.depth_edges
        between = [f"{low}_to_{high}" for low, high in pairwise(edges)]
        return [f"below_{edges[0]}", *between, f"from_{edges[-1]}"]

    def _check_edges(self, depth_edges: tuple[float, ...]) -> None:
        if depth_edges != self.depth_edges:
            raise ValueError(
                f"The read-depth bins differ: borders {list(self.depth_edges)} here, {list(depth_edges)} there. "
                "Make both with the same depth_edges."
            )
