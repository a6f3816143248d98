"""Simple predictors of hidden genes, which a pretrained model has to beat: fitted and asked with the model's batches.

Each reads what the model reads, from the batches of the same collator: visible genes, T, S, and which genes are hidden.
They are meant to be strong for what they are. "released" makes expressed genes targets ten times as often as others, so
that a target is expressed far more often than its gene is in the population, and a baseline that does not know this is
beaten by that alone. So all but `GeneMean` also learn from the targets drawn in training cells.
"""
# B cells, M targets, G genes, R rank

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from scfoundation_hf.modeling_scfoundation.losses import IGNORED_LABEL
from scfoundation_hf.tokenization.data_collator import RawCells, ScFoundationReadDepthAwareCollator
from scfoundation_hf.tokenization.read_depth import MAX_LOG1P_CP10K

from .principal_components import log1p_matrices, mean_values, principal_components

RANKS = (4, 8, 16, 32, 64)
REGRESSION_FOLD = 10  # one cell in ten tells the rank and the regression, the others the profile and the factors


class Baseline(Protocol):
    """What predicts hidden genes without a neural network."""

    name: str

    def fit(self, cells: Iterable[RawCells], *, collator: ScFoundationReadDepthAwareCollator) -> Self:
        """Learn from training cells.

        Args:
            cells: gone through several times, so no iterator; the same cells each time.
            collator: draws what is hidden; the one whose batches are to be predicted.
        Raises: ValueError: if there are too few cells.
        """

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """`(B, M)` float32 log1p(CP10k) at the `target_ids` of a batch, 0 at padding."""


@dataclass(frozen=True)
class VisibleCells:
    """A batch of the read-depth-aware collator, padded or packed, as arrays.

    Attributes:
        values: `(B, G)` float64 log1p(CP10k) of the visible genes, 0 at all others.
        is_hidden: `(B, G)` bool genes that are masked, whose zero in `values` says nothing.
        target_ids: `(B, M)` int64; 0 where `is_target` is false.
        is_target: `(B, M)` bool, false at padding.
        log10_target_depth, log10_source_depth: `(B,)` T and S.
    """

    values: np.ndarray
    is_hidden: np.ndarray
    target_ids: np.ndarray
    is_target: np.ndarray
    log10_target_depth: np.ndarray
    log10_source_depth: np.ndarray

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any], *, num_genes: int) -> Self:
        """Read the keys of the batch contract."""
        if "cu_seq_lens_q" in batch:
            lengths = batch["cu_seq_lens_q"].diff().long()
            cells = torch.repeat_interleave(torch.arange(len(lengths)), lengths).numpy()
            ids, tokens = batch["input_ids"][0].numpy(), batch["values"][0].numpy()
        else:
            is_real = batch["attention_mask"].bool()
            cells = is_real.nonzero()[:, 0].numpy()
            ids, tokens = batch["input_ids"][is_real].numpy(), batch["values"][is_real].numpy()
        target_ids, masked_ids = batch["target_ids"].numpy(), batch["masked_ids"].numpy()
        # Depth tokens and padding have columns of their own, behind the genes.
        values = np.zeros((len(target_ids), num_genes + 2))
        values[cells, ids] = tokens
        is_hidden = np.zeros((len(target_ids), num_genes + 3), dtype=bool)
        np.put_along_axis(is_hidden, masked_ids, True, axis=1)
        is_target = target_ids < num_genes
        return cls(
            values=values[:, :num_genes],
            is_hidden=is_hidden[:, :num_genes],
            target_ids=np.where(is_target, target_ids, 0),
            is_target=is_target,
            log10_target_depth=values[:, num_genes],
            log10_source_depth=values[:, num_genes + 1],
        )

    def at_targets(self, array: np.ndarray) -> np.ndarray:
        """`(B, M)`: of `(B, G)`, or of `(G,)` for all cells, what stands at the targets."""
        return np.take_along_axis(np.broadcast_to(array, self.values.shape), self.target_ids, axis=1)


class GeneMean:
    """Each gene's mean log1p(CP10k) over all training cells, whatever the visible genes are."""

    name = "gene mean"

    def fit(self, cells: Iterable[RawCells], *, collator: ScFoundationReadDepthAwareCollator) -> Self:
        """See `Baseline.fit`; nothing is drawn."""
        self.num_genes = _num_genes(collator)
        self.means = mean_values(lambda: cells, self.num_genes)
        return self

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """See `Baseline.predict`."""
        cells = VisibleCells.from_batch(batch, num_genes=self.num_genes)
        return _as_predictions(cells, cells.at_targets(self.means))


class TargetMean:
    """Each gene's mean over the training cells in which it is a target.

    The best predictor that does not look at the cell. A gene that was a target n times has its mean over these and one
    more, with the gene's mean over all cells.
    """

    name = "gene mean over targets"

    def fit(self, cells: Iterable[RawCells], *, collator: ScFoundationReadDepthAwareCollator) -> Self:
        """See `Baseline.fit`."""
        self.num_genes = _num_genes(collator)
        self.means = _mean_labels(lambda: cells, collator, prior=mean_values(lambda: cells, self.num_genes))
        return self

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """See `Baseline.predict`."""
        cells = VisibleCells.from_batch(batch, num_genes=self.num_genes)
        return _as_predictions(cells, cells.at_targets(self.means))


class _Regressed:
    """Base of the baselines that estimate a hidden gene from the visible ones: what they share is the regression.

    Nine tenths of the training cells give means (and factors). On the targets of the other tenth, labels are regressed
    on the estimate, the gene's mean over targets, the value shown (a target may be visible, unchanged or wrong), S and
    T - S: so an estimate cannot do worse there than these means alone.
    """

    def fit(self, cells: Iterable[RawCells], *, collator: ScFoundationReadDepthAwareCollator) -> Self:
        """See `Baseline.fit`."""
        self.num_genes = _num_genes(collator)

        def profile_cells() -> Iterable[RawCells]:
            return _split(cells, in_fold=False)

        self.means = mean_values(profile_cells, self.num_genes)
        self.target_means = _mean_labels(profile_cells, collator, prior=self.means)
        self._fit_profile(profile_cells)
        regressions: dict[int, _Regression] = {}
        for part in _split(cells, in_fold=True):
            batch = collator(part)
            visible = VisibleCells.from_batch(batch, num_genes=self.num_genes)
            for candidate, estimates in self._estimates(visible).items():
                regression = regressions.setdefault(candidate, _Regression())
                regression.add(visible, estimates, self.target_means, batch["labels"].numpy())
        if not regressions:
            raise ValueError(f"There are too few training cells: none of them fell into the tenth for {self.name}.")
        self.candidate = min(regressions, key=lambda candidate: regressions[candidate].sum_of_squared_errors())
        self.regression = regressions[self.candidate]
        return self

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """See `Baseline.predict`."""
        visible = VisibleCells.from_batch(batch, num_genes=self.num_genes)
        estimates = self._estimates(visible, only=self.candidate)[self.candidate]
        return _as_predictions(visible, self.regression.predict(visible, estimates, self.target_means))

    name: str

    def _fit_profile(self, cells: Callable[[], Iterable[RawCells]]) -> None:
        """Learn what `_estimates` needs beyond `means`."""

    def _estimates(self, cells: VisibleCells, *, only: int | None = None) -> dict[int, np.ndarray]:
        """For each candidate, or for one only, `(B, M)` estimates of the targets."""
        raise NotImplementedError


class ScaledProfile(_Regressed):
    """The mean profile of the training cells, times the factor that fits the visible genes best, then regressed.

    The factor is the least-squares one of the visible cell: s = <x, mean> / <mean, mean> over genes that are not
    hidden. It says how much of a typical cell this one is, read depth included.
    """

    name = "scaled profile"

    def _estimates(self, cells: VisibleCells, *, only: int | None = None) -> dict[int, np.ndarray]:
        factors = (cells.values @ self.means) / np.maximum(~cells.is_hidden @ self.means**2, 1e-12)
        return {0: factors[:, None] * cells.at_targets(self.means)}


class MatrixFactorisation(_Regressed):
    """Principal components of the training cells; a cell's coordinates come from its visible genes alone.

    The coordinates are the posterior mean of probabilistic PCA, which is ridge regression of the visible genes on the
    components' loadings, hidden genes left out. The rank is the one with the least error on the tenth of the training
    cells that the components were not fitted to.
    Source: Tipping and Bishop, Probabilistic Principal Component Analysis, 1999, eq. 9 of the visible genes.

    Args:
        ranks: candidates.
        seed: of the directions that the search for components begins with.
    """

    name = "matrix factorisation"

    def __init__(self, *, ranks: tuple[int, ...] = RANKS, seed: int = 0) -> None:
        self.ranks = ranks
        self.seed = seed

    @property
    def rank(self) -> int:
        """The rank that was chosen."""
        return self.candidate

    def _fit_profile(self, cells: Callable[[], Iterable[RawCells]]) -> None:
        self.loadings, self.variances, self.total_variance = principal_components(
            lambda: log1p_matrices(cells(), self.num_genes), self.means, rank=max(self.ranks), seed=self.seed
        )

    def _estimates(self, cells: VisibleCells, *, only: int | None = None) -> dict[int, np.ndarray]:
        ranks = self.ranks if only is None else (only,)
        deviations = np.where(cells.is_hidden, 0, cells.values - self.means)
        scores = deviations @ self.loadings
        result = {rank: cells.at_targets(self.means).copy() for rank in ranks}
        for cell, (is_hidden, target_ids) in enumerate(zip(cells.is_hidden, cells.target_ids, strict=True)):
            hidden = self.loadings[is_hidden]
            gram = np.eye(self.loadings.shape[1]) - hidden.T @ hidden  # the loadings are orthonormal
            target_loadings = self.loadings[target_ids]
            for rank in ranks:
                noise = (self.total_variance - self.variances[:rank].sum()) / max(self.num_genes - rank, 1)
                ridge = np.diag(noise / np.maximum(self.variances[:rank], 1e-12))
                coordinates = np.linalg.solve(gram[:rank, :rank] + ridge, scores[cell, :rank])
                result[rank][cell] += target_loadings[:, :rank] @ coordinates
        return result


BASELINES: tuple[Callable[[], Baseline], ...] = (GeneMean, TargetMean, ScaledProfile, MatrixFactorisation)


class _Regression:
    """Least squares on all terms up to degree 2, apart for hidden and shown targets, from sums only."""

    def __init__(self) -> None:
        num_inputs = 5
        num_terms = (num_inputs + 1) * (num_inputs + 2) // 2
        self.gram = np.zeros((2, num_terms, num_terms))
        self.moments = np.zeros((2, num_terms))
        self.squares = 0.0
        # Inputs outside of what was fitted are taken to its border: a parabola goes anywhere beyond it.
        self.lowest = np.full(num_inputs, np.inf)
        self.highest = np.full(num_inputs, -np.inf)

    def add(self, cells: VisibleCells, estimates: np.ndarray, target_means: np.ndarray, labels: np.ndarray) -> None:
        """Take in the targets of a batch."""
        inputs = self._inputs(cells, estimates, target_means)[cells.is_target]
        self.lowest = np.minimum(self.lowest, inputs.min(axis=0))
        self.highest = np.maximum(self.highest, inputs.max(axis=0))
        terms = _terms_up_to_degree_2(inputs)
        wanted = labels[cells.is_target].astype(np.float64)
        is_shown = ~cells.at_targets(cells.is_hidden)[cells.is_target]
        for kind, chosen in enumerate((~is_shown, is_shown)):
            self.gram[kind] += terms[chosen].T @ terms[chosen]
            self.moments[kind] += terms[chosen].T @ wanted[chosen]
        self.squares += float(wanted @ wanted)

    def sum_of_squared_errors(self) -> float:
        """Of the targets taken in."""
        return self.squares - float((self._coefficients() * self.moments).sum())

    def predict(self, cells: VisibleCells, estimates: np.ndarray, target_means: np.ndarray) -> np.ndarray:
        """`(B, M)`."""
        inputs = np.clip(self._inputs(cells, estimates, target_means), self.lowest, self.highest)
        hidden, shown = np.moveaxis(_terms_up_to_degree_2(inputs) @ self._coefficients().T, -1, 0)
        return np.where(cells.at_targets(cells.is_hidden), hidden, shown)

    def _coefficients(self) -> np.ndarray:
        # Scaled to a unit diagonal; terms that are always 0 (values shown, at hidden targets) get 0.
        scale = np.sqrt(np.maximum(np.diagonal(self.gram, axis1=1, axis2=2), 1e-300))
        scaled = self.gram / scale[:, :, None] / scale[:, None, :]
        return np.stack(
            [
                np.linalg.lstsq(gram, moments / one_scale, rcond=1e-11)[0] / one_scale
                for gram, moments, one_scale in zip(scaled, self.moments, scale, strict=True)
            ]
        )

    @staticmethod
    def _inputs(cells: VisibleCells, estimates: np.ndarray, target_means: np.ndarray) -> np.ndarray:
        S, T = cells.log10_source_depth, cells.log10_target_depth
        of_cell = (np.broadcast_to(depth[:, None], estimates.shape) for depth in (S, T - S))
        return np.stack([estimates, cells.at_targets(target_means), cells.at_targets(cells.values), *of_cell], axis=-1)


def _terms_up_to_degree_2(inputs: np.ndarray) -> np.ndarray:
    with_one = np.concatenate([np.ones_like(inputs[..., :1]), inputs], axis=-1)
    first, second = np.triu_indices(with_one.shape[-1])
    return with_one[..., first] * with_one[..., second]


def _as_predictions(cells: VisibleCells, predicted: np.ndarray) -> Tensor:
    possible = np.clip(predicted, 0, MAX_LOG1P_CP10K)
    return torch.from_numpy(np.where(cells.is_target, possible, 0).astype(np.float32))


def _num_genes(collator: ScFoundationReadDepthAwareCollator) -> int:
    return int(collator.tokenizer.target_depth_token_id)  # the first id behind the genes


def _split(cells: Iterable[RawCells], *, in_fold: bool) -> Iterable[RawCells]:
    """The cells in the regression's tenth, or the others, by a hash of their ids."""
    for part in cells:
        hashes = np.array([zlib.crc32(str(cell_id).encode()) for cell_id in part.cell_ids])
        chosen = np.flatnonzero((hashes % REGRESSION_FOLD == 0) == in_fold)
        if len(chosen):
            yield part.select(chosen)


def _mean_labels(
    cells: Callable[[], Iterable[RawCells]], collator: ScFoundationReadDepthAwareCollator, *, prior: np.ndarray
) -> np.ndarray:
    """`(G,)` each gene's mean label, with one cell of the prior mean beside."""
    sums, nums = prior.copy(), np.ones_like(prior)
    for part in cells():
        batch = collator(part)
        labels = batch["labels"].numpy()
        is_target = labels != IGNORED_LABEL
        ids = batch["target_ids"].numpy()[is_target]
        sums += np.bincount(ids, weights=labels[is_target], minlength=len(sums))
        nums += np.bincount(ids, minlength=len(nums))
    return sums / nums
