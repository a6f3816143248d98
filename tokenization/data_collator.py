"""One-cell rows -> the batch a model takes, padded or packed (the two forms of the batch contract).

The tokenizer and both collators build their batches here, from `EncodedCells`: the tokens of many cells end
to end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

ReturnTensors = Literal["pt", "np"]


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
        lengths = self.lengths[cells]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.repeat(self.offsets[:-1][cells] - offsets[:-1], lengths) + np.arange(offsets[-1])
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
    is_real = np.arange(length) < lengths[:, None]  # row-major order is the order of the tokens
    input_ids = np.full(is_real.shape, pad_token_id, dtype=np.int64)
    values = np.zeros(is_real.shape, dtype=np.float32)
    input_ids[is_real] = cells.input_ids
    values[is_real] = cells.values
    return {"input_ids": input_ids, "values": values, "attention_mask": is_real.astype(np.int64)}


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


def _check_not_empty(cells: EncodedCells) -> None:
    if not len(cells):
        raise ValueError("A batch needs at least one cell; none is left.")
