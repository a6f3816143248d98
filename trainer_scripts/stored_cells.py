"""What a frozen part of a model makes of each cell, or the cells' tokens: computed once, on disk, read batch by batch.

Read with plain reads and not as a memory map, whose pages would count as memory of the process; the system keeps in
memory what it has room for.
"""
# L tokens of a batch

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class StoredCells:
    """Arrays of some cells, one row a token or one row a cell, in one file each.

    Args:
        folder: where the files lie.
        labels: `(cells,)` int64, in the order in which the cells are appended.
        lengths: `(cells,)` rows of each cell; `None`: one each.
    """

    def __init__(self, folder: Path, *, labels: np.ndarray, lengths: np.ndarray | None) -> None:
        self.folder, self.labels, self.lengths = folder, labels, lengths
        rows = np.ones(len(labels), dtype=np.int64) if lengths is None else lengths
        self._offsets = np.concatenate([[0], np.cumsum(rows)])
        self._arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}

    def __len__(self) -> int:
        """Number of cells."""
        return len(self.labels)

    @property
    def array_names(self) -> list[str]:
        """What is stored of each cell."""
        return list(self._arrays)

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(self._path(name).stat().st_size for name in self._arrays)

    def fill(self, blocks: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Write the rows of all cells, in order, block by block."""
        for block in blocks:
            for name, rows in block.items():
                self._arrays[name] = (rows.shape[1:], rows.dtype)
                with self._path(name).open("ab") as file:
                    file.write(np.ascontiguousarray(rows).data)

    def batch(self, cells: Sequence[int]) -> dict[str, Tensor]:
        """These cells, in this order: their `labels`, and each array, `(cells, ...)` or packed, `(1, L, ...)`."""
        # The labels first: Trainer takes the first tensor's length for the number of cells.
        batch = {"labels": torch.from_numpy(self.labels[list(cells)])}
        for name in self._arrays:
            rows = torch.from_numpy(np.concatenate([self._read(name, cell) for cell in cells]))
            batch[name] = rows if self.lengths is None else rows[None]
        if self.lengths is not None:
            lengths = self.lengths[list(cells)]
            batch["cu_seq_lens_q"] = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        return batch

    def _read(self, name: str, cell: int) -> np.ndarray:
        row_shape, dtype = self._arrays[name]
        row_size = int(np.prod(row_shape))
        start, stop = self._offsets[cell : cell + 2]
        rows = np.fromfile(
            self._path(name), dtype, count=(stop - start) * row_size, offset=start * row_size * dtype.itemsize
        )
        return rows.reshape(-1, *row_shape)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.rows"
