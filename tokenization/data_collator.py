"""Cells -> the batch a model takes, padded or packed (the two forms of the batch contract).

The tokenizer and all collators build their batches here, from `EncodedCells`: the tokens of many cells end to end. For
pretraining, `RawCells` are tokenised on the way, by `read_depth_aware.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.sparse import csr_matrix
from transformers import PreTrainedTokenizerBase

from .read_depth import first_entry, first_non_integer, without_stored_zeros
from .read_depth_aware import CellGenerators, ReadDepthAwareRecipe, check_seed, draw_decoder_positions, mask_cells

ReturnTensors = Literal["pt", "np"]
Layout = Literal["packed", "padded"]
IGNORED_LABEL = -100.0


@dataclass(frozen=True)
class EncodedCells:
    """The tokens of several cells end to end; a cell's last two tokens are T and S.

    Attributes:
        input_ids: `(tokens,)` int64 gene ids, rising within a cell, then T and S.
        values: `(tokens,)` float32 log1p(counts per 10,000); at T and S the log10 total count.
        offsets: `(cells + 1,)` int64 where each cell begins.
        cell_index: `(cells,)` int64 which row of the input each cell is.
    """

    input_ids: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    cell_index: np.ndarray

    def __len__(self) -> int:
        """Number of cells."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """`(cells,)` number of tokens of each cell, T and S included."""
        return np.diff(self.offsets)

    def row(self, i: int) -> dict[str, np.ndarray]:
        """One cell as a dataset row, `{"input_ids", "values"}`; views, not copies."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"There are {len(self)} cells; no cell {i}.")
        i %= len(self)
        tokens = slice(self.offsets[i], self.offsets[i + 1])
        return {"input_ids": self.input_ids[tokens], "values": self.values[tokens]}

    def select(self, cells: Sequence[int] | np.ndarray) -> "EncodedCells":
        """These cells, in this order (a batch of similar lengths, say)."""
        cells = np.asarray(cells, dtype=np.int64)
        tokens, offsets = _entries_of(self.offsets, cells)
        return EncodedCells(self.input_ids[tokens], self.values[tokens], offsets, self.cell_index[cells])

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> "EncodedCells":
        """Join dataset rows; where a row has an `attention_mask`, only its real tokens are taken.

        Raises: ValueError: for no rows, a row without `input_ids` or `values`, or with a different number of
            each.
        """
        if not len(rows):
            raise ValueError("A batch needs at least one cell; there are no rows.")
        input_ids, values = [], []
        for i, row in enumerate(rows):
            missing = [key for key in ("input_ids", "values") if key not in row]
            if missing:
                raise ValueError(
                    f"Row {i} has no {missing[0]!r}, only {sorted(row)}. A tokenised cell has 'input_ids' "
                    "and 'values'; as_dataset(adata, tokenizer) makes such rows. (Trainer drops columns that "
                    "the model's forward does not name.)"
                )
            ids, vals = (
                np.asarray(row["input_ids"], dtype=np.int64),
                np.asarray(row["values"], dtype=np.float32),
            )
            if ids.ndim != 1 or ids.shape != vals.shape or not ids.size:
                raise ValueError(
                    f"Row {i}: 'input_ids' has shape {ids.shape} and 'values' {vals.shape}; a cell has one "
                    "value for each id, in one dimension, and at least T and S."
                )
            if "attention_mask" in row:
                is_real = np.asarray(row["attention_mask"], dtype=bool)
                ids, vals = ids[is_real], vals[is_real]
            input_ids.append(ids)
            values.append(vals)
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in input_ids])])
        return cls(np.concatenate(input_ids), np.concatenate(values), offsets, np.arange(len(rows)))


@dataclass(frozen=True)
class RawCells:
    """The counts of several cells end to end, not yet tokenised.

    Attributes:
        cell_ids: `(cells,)` strings or integers, different for different cells: the draws of a cell depend on it.
        gene_ids: `(entries,)` integer gene ids, rising within a cell.
        counts: `(entries,)` nonzero counts, or TPM or FPKM, of any numeric dtype.
        offsets: `(cells + 1,)` int64 where each cell begins.
        epochs: `(cells,)` which time each cell is shown, or one number for all.
    Raises: ValueError: if the lengths do not fit each other.
    """

    cell_ids: Sequence[Any] | np.ndarray
    gene_ids: np.ndarray
    counts: np.ndarray
    offsets: np.ndarray
    epochs: np.ndarray | int = 0

    def __post_init__(self) -> None:
        if self.gene_ids.dtype.kind not in "iu" or self.counts.dtype.kind not in "biuf":
            raise ValueError(
                f"gene_ids must be integers and counts real numbers, got {self.gene_ids.dtype} and {self.counts.dtype}."
            )
        num_entries, num_cells = len(self.counts), len(self.cell_ids)
        if len(self.gene_ids) != num_entries:
            raise ValueError(f"There are {len(self.gene_ids):,} gene_ids for {num_entries:,} counts.")
        if len(self.offsets) != num_cells + 1 or self.offsets[0] != 0 or self.offsets[-1] != num_entries:
            raise ValueError(
                f"offsets must lead from 0 to the {num_entries:,} counts in {num_cells + 1} numbers for {num_cells} "
                f"cells, got {len(self.offsets)} numbers from {self.offsets[:1]} to {self.offsets[-1:]}."
            )

    def __len__(self) -> int:
        """Number of cells."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """`(cells,)` number of expressed genes of each cell."""
        return np.diff(self.offsets)

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> "RawCells":
        """Join dataset rows `{"cell_id", "gene_ids", "counts", "epoch"?}`; other columns are left aside.

        Raises: ValueError: for no rows, a row without one of these, or with a different number of ids and counts.
        """
        if not len(rows):
            raise ValueError("A batch needs at least one cell; there are no rows.")
        gene_ids, counts = [], []
        for i, row in enumerate(rows):
            missing = [key for key in ("cell_id", "gene_ids", "counts") if key not in row]
            if missing:
                raise ValueError(
                    f"Row {i} has no {missing[0]!r}, only {sorted(row)}. A raw cell has 'cell_id', 'gene_ids' and "
                    "'counts'. (Trainer drops columns that the model's forward does not name, unless "
                    "remove_unused_columns=False.)"
                )
            gene_ids.append(np.asarray(row["gene_ids"]))
            counts.append(np.asarray(row["counts"]))
            if gene_ids[-1].ndim != 1 or gene_ids[-1].shape != counts[-1].shape or not gene_ids[-1].size:
                raise ValueError(
                    f"Row {i}: 'gene_ids' has shape {gene_ids[-1].shape} and 'counts' {counts[-1].shape}; a cell has "
                    "one count for each gene id, in one dimension, and at least one."
                )
        return cls(
            cell_ids=[row["cell_id"] for row in rows],
            gene_ids=np.concatenate(gene_ids),
            counts=np.concatenate(counts),
            offsets=np.concatenate([[0], np.cumsum([len(ids) for ids in gene_ids])]),
            epochs=np.array([row.get("epoch", 0) for row in rows]),
        )

    @classmethod
    def from_csr(
        cls, counts: csr_matrix, *, cell_ids: Sequence[Any] | np.ndarray, epochs: np.ndarray | int = 0
    ) -> "RawCells":
        """The rows of a `(cells, genes)` matrix whose columns are the vocabulary's genes (`GeneVocabulary.align`)."""
        counts = without_stored_zeros(counts)
        if not counts.has_sorted_indices:
            counts = counts.sorted_indices()
        return cls(cell_ids, counts.indices, counts.data, counts.indptr.astype(np.int64), epochs)

    def select(self, cells: np.ndarray) -> "RawCells":
        """These cells, in this order."""
        entries, offsets = _entries_of(self.offsets, cells)
        return RawCells(
            cell_ids=np.asarray(self.cell_ids)[cells],
            gene_ids=self.gene_ids[entries],
            counts=self.counts[entries],
            offsets=offsets,
            epochs=self.epochs if np.ndim(self.epochs) == 0 else np.asarray(self.epochs)[cells],
        )

    def to_csr(self, num_genes: int) -> csr_matrix:
        """The cells as a `(cells, num_genes)` matrix.

        Raises: ValueError: naming cell and gene, for a cell without counts, ids that do not rise or are no genes,
            and counts that are negative, zero or not finite.
        """
        if (self.lengths < 1).any():
            cell = int(np.argmax(self.lengths < 1))
            raise ValueError(f"Cell {self.cell_ids[cell]!r} has no counts: leave it out.")
        matrix = csr_matrix((self.counts, self.gene_ids, self.offsets), shape=(len(self), num_genes), copy=False)
        follows = np.ones(len(self.gene_ids), dtype=bool)
        follows[1:] = self.gene_ids[1:] > self.gene_ids[:-1]
        follows[self.offsets[:-1]] = True
        for offends, message in (
            ((self.gene_ids < 0) | (self.gene_ids >= num_genes), f"is none of the {num_genes:,} genes"),
            (~follows, "is not above the id before it; ids rise within a cell, each gene once"),
            (~(self.counts > 0) | ~np.isfinite(self.counts), "has the count {value:g}; counts are above 0 and finite"),
        ):
            entry = first_entry(matrix, offends)
            if entry is not None:
                raise ValueError(
                    f"Cell {self.cell_ids[entry.row]!r}: gene id {entry.column} {message.format(value=entry.value)}."
                )
        return matrix


def _entries_of(offsets: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of some cells lie in an array that holds all cells end to end, and the offsets of their own."""
    lengths = np.diff(offsets)[cells]
    own_offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.repeat(offsets[:-1][cells] - own_offsets[:-1], lengths) + np.arange(own_offsets[-1]), own_offsets


def pad_cells(
    cells: EncodedCells,
    *,
    pad_token_id: int,
    max_length: int | None = None,
    pad_to_multiple_of: int | None = None,
) -> dict[str, np.ndarray]:
    """The padded batch: `input_ids`, `values`, `attention_mask`, each `(cells, length)`.

    Args:
        max_length: pad to this length instead of the longest cell's. Cells are never cut, so it may not be
            less.
        pad_to_multiple_of: round the length up to a multiple of this.
    """
    _check_not_empty(cells)
    lengths = cells.lengths
    length = int(lengths.max())
    if max_length is not None:
        if max_length < length:
            raise ValueError(
                f"The longest cell has {length:,} tokens, more than max_length={max_length:,}. Cells are not "
                "truncated: that would drop T and S, which stand last."
            )
        length = max_length
    if pad_to_multiple_of is not None:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    return {
        "input_ids": _pad(cells.input_ids, lengths, pad_token_id, length=length),
        "values": _pad(cells.values, lengths, 0, length=length),
        "attention_mask": (np.arange(length) < lengths[:, None]).astype(np.int64),
    }


def pack_cells(cells: EncodedCells) -> dict[str, Any]:
    """The packed batch: `input_ids`, `values` (1, tokens); `cu_seq_lens_q/k` int32; `max_length_q/k` ints."""
    _check_not_empty(cells)
    cu_seq_lens = cells.offsets.astype(np.int32)
    max_length = int(cells.lengths.max())
    return {
        "input_ids": cells.input_ids[None],
        "values": cells.values[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens.copy(),
        "max_length_q": max_length,
        "max_length_k": max_length,
    }


def collect_labels(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """`{"labels": (cells,)}` int64 (float32 where the rows hold fractions), or nothing if the rows have none.

    Raises: ValueError: if only some rows are labelled, or a label is not one number.
    """
    has_label = ["labels" in row for row in rows]
    if not any(has_label):
        return {}
    if not all(has_label):
        raise ValueError(f"Row {has_label.index(False)} has no 'labels', while others have. Label all cells or none.")
    labels = np.asarray([np.asarray(row["labels"]) for row in rows])
    if labels.ndim != 1 or labels.dtype.kind not in "biuf":
        raise ValueError(
            f"'labels' must be one number a cell, got {rows[0]['labels']!r}. as_dataset(..., label=COLUMN) "
            "numbers the classes of an obs column."
        )
    return {"labels": labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64)}


def as_tensors(batch: Mapping[str, Any], return_tensors: str) -> dict[str, Any]:
    """Arrays as torch tensors (`"pt"`) or left alone (`"np"`); plain ints stay ints."""
    if return_tensors == "np":
        return dict(batch)
    if return_tensors != "pt":
        raise ValueError(f"return_tensors must be 'pt' or 'np', got {return_tensors!r}.")
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in batch.items()}


@dataclass
class ScFoundationDataCollator:
    """Pads tokenised one-cell rows, with their `labels` if they have them.

    Args:
        tokenizer: gives the padding id.
        pad_to_multiple_of: round the length up, which tensor cores like.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None
    return_tensors: ReturnTensors = "pt"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The padded batch of these rows."""
        batch = pad_cells(
            EncodedCells.from_rows(rows),
            pad_token_id=self.tokenizer.pad_token_id,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        return as_tensors(batch | collect_labels(rows), self.return_tensors)


@dataclass
class ScFoundationPackedDataCollator:
    """Lays tokenised one-cell rows end to end, without padding; `labels` keep one row a cell."""

    return_tensors: ReturnTensors = "pt"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The packed batch of these rows."""
        return as_tensors(pack_cells(EncodedCells.from_rows(rows)) | collect_labels(rows), self.return_tensors)


@dataclass
class ScFoundationReadDepthAwareCollator:
    """Makes the batches of read-depth-aware pretraining: down-samples cells, hides genes, gives the labels.

    What is drawn for a cell depends on the seed, its epoch and its `cell_id` and on nothing else: not on the other
    cells of the batch, their order, the layout, or the process that draws.

    Args:
        tokenizer: gives the ids of T, S and padding.
        recipe: a recipe or its name, "released" or "paper".
        seed: of all draws.
        layout: "packed" or "padded", the two forms of the batch.
        decoder_positions: show the decoder all visible and hidden genes and only so many of the others that it sees
            this number of positions: adds `decoder_ids` and `decoder_weights`. Left out: it sees all positions.
    Raises: ValueError: for settings out of range; when called, for cells that are none, naming cell and gene.
    """

    tokenizer: PreTrainedTokenizerBase
    recipe: ReadDepthAwareRecipe | str = "released"
    seed: int = 0
    layout: Layout = "packed"
    decoder_positions: int | None = None
    return_tensors: ReturnTensors = "pt"

    def __post_init__(self) -> None:
        if isinstance(self.recipe, str):
            self.recipe = ReadDepthAwareRecipe.from_name(self.recipe)
        check_seed(self.seed)
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout must be 'packed' or 'padded', got {self.layout!r}.")
        if self.decoder_positions is not None and self.decoder_positions < 1:
            raise ValueError(f"decoder_positions must be at least 1, or left out, got {self.decoder_positions}.")

    def __call__(self, cells: RawCells | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of these cells, `RawCells` or rows `{"cell_id", "gene_ids", "counts", "epoch"?}`."""
        assert isinstance(self.recipe, ReadDepthAwareRecipe)  # names were replaced above
        if not isinstance(cells, RawCells):
            cells = RawCells.from_rows(cells)
        num_genes = self.tokenizer.target_depth_token_id  # the first id behind the genes
        counts = cells.to_csr(num_genes)
        if self.recipe.down_sampling_probability > 0:
            _check_integers(counts, cells)
        generators = CellGenerators(seed=self.seed, cell_ids=cells.cell_ids, epochs=cells.epochs)
        masked = mask_cells(counts, recipe=self.recipe, generators=generators)
        encoded = EncodedCells(masked.input_ids, masked.values, masked.offsets, np.arange(len(masked)))
        pad_token_id = self.tokenizer.pad_token_id
        batch = pack_cells(encoded) if self.layout == "packed" else pad_cells(encoded, pad_token_id=pad_token_id)
        num_masked = np.add.reduceat(masked.is_masked, masked.target_offsets[:-1], dtype=np.int64)
        num_targets = np.diff(masked.target_offsets)
        batch |= {
            "masked_ids": _pad(masked.target_ids[masked.is_masked], num_masked, pad_token_id),
            "target_ids": _pad(masked.target_ids, num_targets, pad_token_id),
            "labels": _pad(masked.labels, num_targets, IGNORED_LABEL),
        }
        if self.decoder_positions is not None:
            batch["decoder_ids"], batch["decoder_weights"] = draw_decoder_positions(
                masked, num_genes=num_genes, num_positions=self.decoder_positions, generators=generators
            )
        return as_tensors(batch, self.return_tensors)


def _check_integers(counts: csr_matrix, cells: RawCells) -> None:
    entry = first_non_integer(counts)
    if entry is not None:
        raise ValueError(
            f"Cell {cells.cell_ids[entry.row]!r} holds {entry.value:g} at gene id {entry.column}, which is no count; "
            "down-sampling needs whole counts. For TPM or FPKM switch it off: "
            "ReadDepthAwareRecipe.from_name('released', down_sampling_probability=0)."
        )


def _pad(tokens: np.ndarray, lengths: np.ndarray, fill: float, *, length: int | None = None) -> np.ndarray:
    """`(cells, length)`: what lies end to end, one row a cell, filled on the right."""
    is_real = np.arange(lengths.max() if length is None else length) < lengths[:, None]
    padded = np.full(is_real.shape, fill, dtype=tokens.dtype)
    padded[is_real] = tokens  # row-major order is the order of the tokens
    return padded


def _check_not_empty(cells: EncodedCells) -> None:
    if not len(cells):
        raise ValueError("A batch needs at least one cell; none is left.")
