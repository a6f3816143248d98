"""Read-depth-aware (RDA) modelling: which counts and genes of a raw cell the model sees, and which it has to predict.

The training counterpart of `PreparedCells.encode`: counts -> tokens of the down-sampled cell with genes hidden, and
the full cell's values there. Only the draws themselves go cell by cell; all else works on whole batches.
Source: paper, Methods and Supplementary Note 9; training_hyperparameter.txt of biomap-research/scFoundation. The code
that made the published weights was never released, so the details are our reading: docs/read-depth-aware-masking.md.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from .read_depth import (
    down_sample,
    log1p_cp10k,
    log10_source_depth,
    row_of_entry,
    row_totals,
    with_data,
    without_stored_zeros,
    working_precision,
)

RECIPES: dict[str, dict[str, float]] = {
    "released": {"hidden_zero_probability": 0.03, "mask_share": 0.8, "random_value_share": 0.1},
    "paper": {"hidden_zero_probability": 0.3, "mask_share": 1.0, "random_value_share": 0.0},
}
_MASKING_STREAM, _DECODER_STREAM = 0, 1
_MIN_SHOWN_ZEROS = 256
_TINY = float(np.finfo(np.float32).tiny)  # divides uniforms in place of a probability of 0
_MAX_KEY = 2**128


@dataclass(frozen=True)
class ReadDepthAwareRecipe:
    """How cells are down-sampled and how many of their genes are hidden; the defaults are the `released` settings.

    Args:
        hidden_nonzero_probability: chance of each expressed gene of the input cell to become a target.
        hidden_zero_probability: the same for each gene without counts in the input cell.
        mask_share: share of the targets that the encoder doesn't see and the decoder sees as the mask embedding.
        random_value_share: share of the targets that show the value of another expressed gene of the cell. The
            rest, `1 - mask_share - random_value_share`, is shown as it is.
        down_sampling_probability: chance of a cell to be down-sampled; 0 for values that are no counts (TPM, FPKM).
        min_total_to_down_sample: cells with a lower total count are never down-sampled.
        down_sampling_rate_alpha, down_sampling_rate_beta: the rate of a cell is drawn from this Beta distribution.
    Raises: ValueError: naming the field that is out of range.
    Source: paper, Methods and Supplementary Note 9, and training_hyperparameter.txt of
        biomap-research/scFoundation. That 0.8 and 0.1 are shares of the chosen genes is our reading.
    """

    hidden_nonzero_probability: float = 0.3
    hidden_zero_probability: float = 0.03
    mask_share: float = 0.8
    random_value_share: float = 0.1
    down_sampling_probability: float = 0.5
    min_total_to_down_sample: int = 1000
    down_sampling_rate_alpha: float = 2.0
    down_sampling_rate_beta: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{field.name} must be a number, got {value!r}.")
        for name in (
            "hidden_nonzero_probability",
            "hidden_zero_probability",
            "mask_share",
            "random_value_share",
            "down_sampling_probability",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}.")
        if self.mask_share + self.random_value_share > 1 + 1e-9:
            raise ValueError(
                f"mask_share {self.mask_share} and random_value_share {self.random_value_share} are shares of the "
                f"same genes, but together {self.mask_share + self.random_value_share:g}; they may be 1 at most."
            )
        if self.hidden_nonzero_probability == self.hidden_zero_probability == 0:
            raise ValueError(
                "hidden_nonzero_probability and hidden_zero_probability are both 0, so there is nothing to predict; "
                "raise one of them."
            )
        if not 0 <= self.min_total_to_down_sample < np.inf:
            raise ValueError(
                f"min_total_to_down_sample must be a total count, 0 or more, got {self.min_total_to_down_sample!r}."
            )
        for name in ("down_sampling_rate_alpha", "down_sampling_rate_beta"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)!r}.")

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "ReadDepthAwareRecipe":
        """The recipe of a name: "released" (the settings of the published weights) or "paper" (its Methods).

        Both hide 30 % of the expressed genes. "released" hides 3 % of the others, and of the chosen genes masks
        0.8 and gives 0.1 a random value; "paper" hides 30 % of the others and masks all it chose.

        Args:
            name: "released" or "paper".
            **overrides: fields to set differently.
        Raises: ValueError: if there is no such recipe or field, or a field is out of range.
        """
        if name not in RECIPES:
            raise ValueError(f"There is no recipe {name!r}; choose one of {', '.join(RECIPES)}.")
        known = [field.name for field in fields(cls)]
        unknown = [field for field in overrides if field not in known]
        if unknown:
            raise ValueError(f"A read-depth-aware recipe has no {unknown[0]!r}. Its fields: {', '.join(known)}.")
        return cls(**(RECIPES[name] | overrides))


@dataclass(frozen=True)
class MaskedCells:
    """Tokens and targets of several cells end to end.

    Attributes:
        input_ids: `(tokens,)` int64 visible genes, rising within a cell, then T and S.
        values: `(tokens,)` float32 log1p(counts per 10,000) of the input cell; at T and S the log10 total count of
            the full cell and of the input.
        offsets: `(cells + 1,)` int64 where the tokens of each cell begin.
        target_ids: `(targets,)` int64 genes to predict, rising within a cell.
        labels: `(targets,)` float32 log1p(counts per 10,000) of the full cell.
        is_masked: `(targets,)` bool, true for the targets that are hidden; the others are shown.
        target_offsets: `(cells + 1,)` int64 where the targets of each cell begin.
    """

    input_ids: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    target_ids: np.ndarray
    labels: np.ndarray
    is_masked: np.ndarray
    target_offsets: np.ndarray

    def __len__(self) -> int:
        """Number of cells."""
        return len(self.offsets) - 1


class CellGenerators:
    """The random numbers of each cell: the same for a seed, epoch and cell id, whatever is drawn beside them.

    A cell's generator is `Philox(key=[seed, epoch])` with a counter that begins at `[0, stream, id]`, the id in the
    two upper words. One bit generator is moved from cell to cell, which takes 2 µs; making one takes 17.

    Args:
        seed: below 2**64.
        cell_ids: strings, of which 128 bits of a hash count, or integers below 2**128, which count as they are.
        epochs: `(cells,)` or one for all.
    Raises: ValueError: for a negative or too large seed, id or epoch, or a number of epochs that is not that of ids.
    """

    def __init__(self, *, seed: int, cell_ids: Sequence[Any] | np.ndarray, epochs: np.ndarray | int) -> None:
        check_seed(seed)
        epochs = np.asarray(epochs)
        if epochs.ndim and len(epochs) != len(cell_ids):
            raise ValueError(f"There are {len(epochs)} epochs for {len(cell_ids)} cells; pass one a cell, or one.")
        if epochs.size and epochs.min() < 0:
            raise ValueError(f"An epoch is {epochs.min()}; epochs count from 0.")
        self._epochs = np.broadcast_to(epochs, (len(cell_ids),)).tolist()
        self._keys = [_cell_key(cell_id) for cell_id in cell_ids]
        self._bit_generator = np.random.Philox(0)
        self._generator = np.random.Generator(self._bit_generator)
        self._state = self._bit_generator.state
        self._key, self._counter = self._state["state"]["key"], self._state["state"]["counter"]
        self._key[0] = seed

    def of(self, cell: int, *, stream: int) -> np.random.Generator:
        """The generator at the beginning of a stream of the cell; valid until the next call."""
        self._key[1] = self._epochs[cell]
        self._counter[1:] = stream, *self._keys[cell]
        self._bit_generator.state = self._state
        return self._generator


def check_seed(seed: int) -> None:
    """Refuse what can't be the seed of `CellGenerators`."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer between 0 and 2**64 - 1, got {seed!r}.")


def _cell_key(cell_id: Any) -> tuple[int, int]:
    if isinstance(cell_id, str):
        key = int.from_bytes(hashlib.blake2b(cell_id.encode(), digest_size=16).digest(), "little")
    elif isinstance(cell_id, int | np.integer) and 0 <= cell_id < _MAX_KEY:
        key = int(cell_id)
    else:
        raise ValueError(f"A cell id must be a string or an integer between 0 and 2**128 - 1, got {cell_id!r}.")
    return key & (2**64 - 1), key >> 64


class _Draws(NamedTuple):
    """What chance decided, for all cells end to end."""

    input_counts: np.ndarray  # (entries of the full cells,), 0 where nothing was left
    uniforms: np.ndarray  # (entries of the full cells,) what happens to each, if something was left
    marks: np.ndarray  # (cells, N) genes that are hidden if they are zero, rising; more than there are: no gene
    mark_uniforms: np.ndarray  # (cells, N) what happens to each


class _Genes(NamedTuple):
    """Tokens and targets among some genes of the batch. A key is a gene id that rises over the whole batch."""

    token_keys: np.ndarray
    values: np.ndarray
    target_keys: np.ndarray
    labels: np.ndarray
    is_masked: np.ndarray  # (targets,)


def mask_cells(counts: csr_matrix, *, recipe: ReadDepthAwareRecipe, generators: CellGenerators) -> MaskedCells:
    """Down-sample cells, hide genes of what is left, and give the full cells' values as labels.

    Every cell keeps a visible expressed gene and has a target: where all its expressed genes would be masked, the one
    with the highest draw is not chosen after all; where nothing was chosen, the one with the lowest draw is a target,
    and masked unless it is the only one.

    Args:
        counts: `(cells, genes)` positive, in rising columns, no empty cell; whole numbers if the recipe down-samples.
        recipe: what to do to them.
        generators: of these cells.
    """
    num_cells, num_genes = counts.shape
    stride = num_genes + 2  # a cell's positions: its genes, T and S
    totals = row_totals(counts)
    draws = _draw(counts, totals, recipe, generators)
    full = working_precision(counts)
    full_values = log1p_cp10k(full, totals).data
    first_keys = np.arange(num_cells + 1).astype(np.int32 if num_cells * stride < 2**31 else np.int64) * stride
    full_keys = np.repeat(first_keys[:-1], np.diff(full.indptr)) + full.indices
    left, lost = np.flatnonzero(draws.input_counts), np.flatnonzero(draws.input_counts == 0)
    inputs = without_stored_zeros(with_data(full, draws.input_counts.astype(full.dtype)))
    input_totals = row_totals(inputs)
    inputs = log1p_cp10k(inputs, input_totals)

    keys, uniforms = full_keys[left], draws.uniforms[left]
    zeros, has_zeros = _zero_genes(inputs, keys, full_keys[lost], full_values[lost], draws, recipe, first_keys)
    expressed = _expressed_genes(inputs, keys, full_values[left], uniforms, recipe, has_hidden_zeros=has_zeros)
    depth_keys = np.stack([first_keys[1:] - 2, first_keys[1:] - 1], axis=1).ravel()
    depths = np.stack([log10_source_depth(totals), log10_source_depth(input_totals)], axis=1).ravel()

    token_keys = np.concatenate([expressed.token_keys, zeros.token_keys, depth_keys])
    order = np.argsort(token_keys, kind="stable")  # which merges runs that are in order
    token_keys = token_keys[order]
    values = np.concatenate([expressed.values, zeros.values, depths])[order]
    target_keys = np.concatenate([expressed.target_keys, zeros.target_keys])
    order = np.argsort(target_keys, kind="stable")
    target_keys = target_keys[order]
    return MaskedCells(
        input_ids=(token_keys % stride).astype(np.int64),
        values=values.astype(np.float32),
        offsets=np.searchsorted(token_keys, first_keys),
        target_ids=(target_keys % stride).astype(np.int64),
        labels=np.concatenate([expressed.labels, zeros.labels])[order].astype(np.float32),
        is_masked=np.concatenate([expressed.is_masked, zeros.is_masked])[order],
        target_offsets=np.searchsorted(target_keys, first_keys),
    )


def _expressed_genes(
    inputs: csr_matrix,
    keys: np.ndarray,
    labels: np.ndarray,
    uniforms: np.ndarray,
    recipe: ReadDepthAwareRecipe,
    *,
    has_hidden_zeros: np.ndarray,
) -> _Genes:
    """What becomes of the expressed genes: tokens, unless they are masked."""
    cells, sizes = row_of_entry(inputs), np.diff(inputs.indptr)
    # One uniform says what becomes of a gene and, if that is a random value, whose. Shares below 1 are chosen.
    probability = recipe.hidden_nonzero_probability
    shares = uniforms / np.float32(probability) if probability else np.full_like(uniforms, np.inf)
    is_target, is_masked = shares < 1, shares < recipe.mask_share
    _keep_one_visible(is_target, is_masked, uniforms, inputs.indptr)
    _have_one_target(is_target, is_masked, uniforms, inputs.indptr, has_hidden_zeros=has_hidden_zeros)
    is_random = is_target & ~is_masked & (shares < recipe.mask_share + recipe.random_value_share) & (sizes > 1)[cells]
    random = np.flatnonzero(is_random)
    donors = inputs.indptr[cells[random]] + _donors(shares[random], sizes[cells[random]] - 1, recipe)
    donors += donors >= random  # another gene than itself
    values = inputs.data.copy()
    values[random] = inputs.data[donors]
    visible, targets = np.flatnonzero(~is_masked), np.flatnonzero(is_target)  # faster than masks, for several arrays
    return _Genes(keys[visible], values[visible], keys[targets], labels[targets], is_masked[targets])


def _zero_genes(
    inputs: csr_matrix,
    input_keys: np.ndarray,
    lost_keys: np.ndarray,
    lost_values: np.ndarray,
    draws: _Draws,
    recipe: ReadDepthAwareRecipe,
    first_keys: np.ndarray,
) -> tuple[_Genes, np.ndarray]:
    """What becomes of the chosen genes without counts in the input: tokens, if they get a random value.

    Returns: the genes, and `(cells,)` whether a cell has any.
    """
    num_genes = inputs.shape[1]
    is_zero = np.ones(first_keys[-1], dtype=bool)
    is_zero[input_keys] = False
    is_zero[first_keys[:-1] + num_genes] = False  # T, where marks behind the last gene are put
    marks = first_keys[:-1, None] + np.minimum(draws.marks, num_genes)
    is_chosen = is_zero[marks]
    keys, shares = marks[is_chosen], draws.mark_uniforms[is_chosen]
    is_masked = shares < recipe.mask_share
    is_random = ~is_masked & (shares < recipe.mask_share + recipe.random_value_share)
    donor_cells = np.searchsorted(first_keys, keys[is_random], side="right") - 1
    donors = inputs.indptr[donor_cells] + _donors(shares[is_random], np.diff(inputs.indptr)[donor_cells], recipe)
    labels = _look_up(keys, lost_keys, lost_values)
    return _Genes(keys[is_random], inputs.data[donors], keys, labels, is_masked), is_chosen.any(axis=1)


def _draw(counts: csr_matrix, totals: np.ndarray, recipe: ReadDepthAwareRecipe, generators: CellGenerators) -> _Draws:
    may_down_sample = (recipe.down_sampling_probability > 0) & (totals >= recipe.min_total_to_down_sample)
    input_counts = counts.data.astype(np.int64) if may_down_sample.any() else counts.data
    num_cells, num_genes = counts.shape
    num_marks = _num_marks(num_genes, recipe.hidden_zero_probability)
    # Single precision: half the memory, and random numbers in half the time.
    uniforms = np.empty(counts.nnz, np.float32)
    waits, mark_uniforms = (np.empty((num_cells, num_marks), np.float32) for _ in range(2))
    for cell, (start, stop) in enumerate(pairwise(counts.indptr.tolist())):
        generator = generators.of(cell, stream=_MASKING_STREAM)
        if may_down_sample[cell] and generator.random() < recipe.down_sampling_probability:
            rate = generator.beta(recipe.down_sampling_rate_alpha, recipe.down_sampling_rate_beta)
            input_counts[start:stop] = down_sample(input_counts[start:stop], rate=rate, generator=generator)
        generator.random(out=uniforms[start:stop], dtype=np.float32)
        generator.standard_exponential(out=waits[cell], dtype=np.float32)
        generator.random(out=mark_uniforms[cell], dtype=np.float32)
    return _Draws(input_counts, uniforms, _marks(waits, num_genes, recipe.hidden_zero_probability), mark_uniforms)


def _num_marks(num_genes: int, probability: float) -> int:
    """So many that fewer than all marked genes are drawn in none of 10^20 cells."""
    spread = np.sqrt(num_genes * probability * (1 - probability))
    return 0 if not probability else min(int(num_genes * probability + 10 * spread) + 20, num_genes)


def _marks(waits: np.ndarray, num_genes: int, probability: float) -> np.ndarray:
    """Each gene with a probability, by the gaps between those chosen: geometric, whole parts of exponential waits."""
    gaps = np.minimum(waits / -float(np.log1p(-min(probability, 1 - 1e-16))), num_genes).astype(np.int32)
    return np.cumsum(gaps + 1, axis=1, dtype=np.int32) - 1


def _draw_some(is_taken: np.ndarray, size: int, generator: np.random.Generator) -> None:
    """Take `size` more of the positions that are not taken, in place; each set of them has the same chance."""
    left = size
    while left > 0:  # those met twice are drawn again
        before = int(np.count_nonzero(is_taken))
        is_taken[generator.integers(len(is_taken), size=left, dtype=np.int32)] = True
        left -= int(np.count_nonzero(is_taken)) - before


def _keep_one_visible(is_target: np.ndarray, is_masked: np.ndarray, uniforms: np.ndarray, indptr: np.ndarray) -> None:
    for cell in np.flatnonzero(np.logical_and.reduceat(is_masked, indptr[:-1])):
        entry = indptr[cell] + np.argmax(uniforms[indptr[cell] : indptr[cell + 1]])
        is_target[entry] = is_masked[entry] = False


def _have_one_target(
    is_target: np.ndarray,
    is_masked: np.ndarray,
    uniforms: np.ndarray,
    indptr: np.ndarray,
    *,
    has_hidden_zeros: np.ndarray,
) -> None:
    for cell in np.flatnonzero(~np.logical_or.reduceat(is_target, indptr[:-1]) & ~has_hidden_zeros):
        entry = indptr[cell] + np.argmin(uniforms[indptr[cell] : indptr[cell + 1]])
        is_target[entry] = True
        is_masked[entry] = indptr[cell + 1] - indptr[cell] > 1


def _donors(shares: np.ndarray, sizes: np.ndarray, recipe: ReadDepthAwareRecipe) -> np.ndarray:
    """Which of `sizes` expressed genes lends its value, from where in the random share the uniforms fell."""
    uniforms = (shares - recipe.mask_share) / max(recipe.random_value_share, _TINY)
    # Rounding may have moved them just out of [0, 1).
    return np.clip((uniforms * sizes).astype(np.int64), 0, sizes - 1)


def _look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` at the wanted keys, 0 where there is none; both rise."""
    found = np.zeros(len(wanted), dtype=values.dtype)
    positions = np.searchsorted(wanted, keys)
    is_within = positions < len(wanted)
    positions, keys, values = positions[is_within], keys[is_within], values[is_within]
    is_wanted = wanted[positions] == keys
    found[positions[is_wanted]] = values[is_wanted]
    return found


def draw_decoder_positions(
    cells: MaskedCells, *, num_genes: int, num_positions: int, generators: CellGenerators
) -> tuple[np.ndarray, np.ndarray]:
    """The positions the decoder is shown, when it is to see only a part of the zero genes.

    Visible and hidden genes, T and S are always among them; randomly drawn zero genes fill up. Every cell shows at
    least 256 of these, or all: where one needs more than `num_positions` for that, the whole batch gets as many.

    Args:
        num_positions: how many positions.
        generators: of these cells; their draws here are independent of those of `mask_cells`.
    Returns: `(cells, P)` int64 ids, rising, and `(cells, P)` float32 weights: 1, and at drawn zero genes the number
        of zero genes that are not hidden divided by how many are shown, so that weighted sums are unbiased.
    """
    is_needed = np.zeros((len(cells), num_genes + 2), dtype=bool)
    is_needed[np.repeat(np.arange(len(cells)), np.diff(cells.offsets)), cells.input_ids] = True
    is_needed[np.repeat(np.arange(len(cells)), np.diff(cells.target_offsets)), cells.target_ids] = True
    num_needed = np.count_nonzero(is_needed, axis=1)
    num_zeros = num_genes + 2 - num_needed
    num_positions = max(num_positions, int((num_needed + np.minimum(num_zeros, _MIN_SHOWN_ZEROS)).max()))
    num_positions = min(num_positions, num_genes + 2)
    ids = np.empty((len(cells), num_positions), dtype=np.int64)
    weights = np.ones(ids.shape, dtype=np.float32)
    for cell, needed in enumerate(is_needed):
        num_shown = num_positions - int(num_needed[cell])
        is_shown = needed.copy()
        _draw_some(is_shown, num_shown, generators.of(cell, stream=_DECODER_STREAM))
        ids[cell] = np.flatnonzero(is_shown)
        weights[cell, ~needed[ids[cell]]] = num_zeros[cell] / max(num_shown, 1)
    return ids, weights
