"""Shards -> micro-batches of raw cells, in an order that can be taken up again anywhere.

The order of an epoch is a function of the seed, the epoch and the shards. All row groups (runs of 512 rows) of the
split are shuffled; consecutive ones are gathered in windows; the rows of a window are shuffled, and batches are cut
from the row of windows. Batches have one numbering over all processes and are dealt out in turn, so that neither the
number of loader workers nor, for a given number of batches a step, the number of processes changes what is learnt.
Validation goes through the rows as they are stored.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from functools import lru_cache
from os import PathLike
from typing import Any

import datasets
import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from scfoundation_hf.tokenization.data_collator import RawCells

from .manifest import SPLITS, CorpusManifest, Shard, Split, read_duplicates

NUM_DEPTH_TOKENS = 2  # T and S
OPEN_SHARDS = 64
_COLUMNS = ["cell_id", "gene_ids", "counts"]


@dataclass(frozen=True)
class CorpusPosition:
    """A place between two steps; the same for all processes of a run.

    Attributes:
        epoch: times that the whole split was seen before.
        batch: batches of this epoch that all processes together have taken.
        window: the window that the last of these batches was cut in.
        first_row: of the epoch, where cutting began in that window: rows left over from the window before come first.
        first_batch: number of the first batch cut there.
    """

    epoch: int = 0
    batch: int = 0
    window: int = 0
    first_row: int = 0
    first_batch: int = 0


@dataclass(frozen=True)
class CorpusCells(RawCells):
    """A micro-batch of the stream, which knows the position after it."""

    position: CorpusPosition = CorpusPosition()


class CorpusStream(IterableDataset):
    """The micro-batches of one process, `CorpusCells`, from its position to the end of the epoch.

    Every cell of the split is in exactly one batch of the epoch, over all processes, and every process gets equally
    many batches: where the last step would be incomplete, the epoch's largest last batches are halved until it is not.
    Batches hold `batch_size` cells, fewer where `tokens_per_batch` says so, or at the end of the epoch.

    Every worker of every process decodes all windows and takes its own batches from them. A window lies in memory
    decoded, about 6 bytes an expressed gene: 200 MB for 16,384 cells of 2,000 genes.

    Give it to a `DataLoader` with `batch_size=None`; `CorpusLoader` does, and keeps the position.

    Args:
        folder: made by `scfoundation prepare`; local, or any fsspec address (`hf://datasets/...`, `https://...`).
        split: "train", shuffled, or "validation", in stored order and always as epoch 0.
        batch_size: most cells a batch.
        tokens_per_batch: most tokens a batch (expressed genes before down-sampling, T and S); a cell that has more
            comes alone.
        seed: of the order; that of the collator is its own.
        window: rows that are shuffled together, about.
        process_index, num_processes: which share of the batches to take.
        position: where to begin; left out, at the first batch of epoch 0.
    Raises: FileNotFoundError: for no finished corpus, or a missing shard. ValueError: for settings that do not fit
        each other or the corpus, and for a shard that is not the one in the manifest.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        split: Split = "train",
        batch_size: int,
        tokens_per_batch: int | None = None,
        seed: int = 0,
        window: int = 16_384,
        process_index: int = 0,
        num_processes: int = 1,
        position: CorpusPosition | None = None,
    ) -> None:
        """Read the manifest; shards are opened when the iteration comes to them."""
        self.folder = str(folder)
        self.split = split
        self.batch_size, self.tokens_per_batch = batch_size, tokens_per_batch
        self.seed, self.window = seed, window
        self.process_index, self.num_processes = process_index, num_processes
        self.position = CorpusPosition() if position is None else position
        self._check_settings()
        self.manifest = CorpusManifest.read(folder)
        self._shards = [shard for shard in self.manifest.shards if shard.split == split]
        self.num_cells = self.manifest.num_cells(split)
        self._check_cells()
        self._row_groups = _RowGroups(self.folder, self._shards, self.manifest.row_group_rows)
        num_windows = min(len(self._row_groups), max(1, round(self.num_cells / window)))
        self._window_borders = np.linspace(0, len(self._row_groups), num_windows + 1).astype(np.int64)

    @property
    def is_shuffled(self) -> bool:
        """Whether the order differs from that of the shards: in training."""
        return self.split == "train"

    def __len__(self) -> int:
        """Batches of one process and epoch, from the epoch's beginning. TypeError with `tokens_per_batch`."""
        if self.tokens_per_batch is not None:
            raise TypeError("With tokens_per_batch, how many batches there are is not known before they are cut.")
        return -(-self.num_cells // (self.batch_size * self.num_processes))

    def __iter__(self) -> Iterator[CorpusCells]:
        """The batches after the position; in a loader's worker those that are its turn."""
        worker = get_worker_info()
        worker_index, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        start = self.position
        first_step = start.batch // self.num_processes
        for step, batch in self._batches(start):
            if step >= first_step and (step - first_step) % num_workers == worker_index:
                yield batch()

    def _batches(self, start: CorpusPosition) -> Iterator[tuple[int, Callable[[], CorpusCells]]]:
        """This process's batches from the start of the position's window on, numbered within the epoch."""
        epoch = _Epoch(self, start.epoch)
        num_windows = len(epoch)
        if start.window >= num_windows:
            raise ValueError(f"The position is in window {start.window}, but an epoch has {num_windows}.")
        left_over = epoch.rows(start.first_row, start.window)
        first_row, first_batch = start.first_row, start.first_batch
        for window in range(start.window, num_windows):
            cells, order = epoch.window(window, left_over)
            borders = _cut(cells.lengths[order] + NUM_DEPTH_TOKENS, self.batch_size, self.tokens_per_batch)
            is_last = window == num_windows - 1
            # The last batch may be incomplete: it is cut with the next window, if there is one.
            borders = _fill_up(borders, first_batch, self.num_processes) if is_last else borders[:-1]
            num_batches = first_batch + len(borders) - 1
            here = CorpusPosition(start.epoch, 0, window, first_row, first_batch)
            for number in range(first_batch, num_batches):
                step, process = divmod(number, self.num_processes)
                if process != self.process_index:
                    continue
                begin, end = borders[number - first_batch], borders[number - first_batch + 1]
                taken = (step + 1) * self.num_processes
                if is_last and taken == num_batches:
                    position = CorpusPosition(epoch=start.epoch + 1)
                else:
                    position = CorpusPosition(**(asdict(here) | {"batch": taken}))
                yield step, _Batch(cells, order[begin:end], start.epoch if self.is_shuffled else 0, position)
            left_over = cells.select(order[borders[-1] :])
            first_row, first_batch = first_row + int(borders[-1]), num_batches

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless the position is in it."""
        if epoch != self.position.epoch:
            self.position = CorpusPosition(epoch=epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it depends on; JSON-able and the same on every process."""
        return {"position": asdict(self.position), "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises: ValueError: if it was saved for another order: other shards, seed, batch or window sizes or number of
            processes.
        """
        order = self._order()
        changed = [
            f"{key} was {state['order'].get(key)!r}, is {order[key]!r}"
            for key in order
            if state["order"].get(key) != order[key]
        ]
        if changed:
            raise ValueError(
                f"The saved position in {self.folder} belongs to another order of its cells ({'; '.join(changed)}). "
                "Resume with the same corpus and settings, or start anew."
            )
        self.position = CorpusPosition(**state["position"])

    def _order(self) -> dict[str, Any]:
        return {
            "corpus": self.manifest.fingerprint(self.split),
            "split": self.split,
            "batch_size": self.batch_size,
            "tokens_per_batch": self.tokens_per_batch,
            "seed": self.seed,
            "window": self.window,
            "num_processes": self.num_processes,
        }

    def _check_settings(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}; got {self.split!r}.")
        for name in ("batch_size", "tokens_per_batch", "num_processes"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        if not 0 <= self.process_index < self.num_processes:
            raise ValueError(
                f"process_index is {self.process_index}; with num_processes={self.num_processes} it is from 0 to "
                f"{self.num_processes - 1}."
            )
        if self.window < self.batch_size * self.num_processes:
            raise ValueError(
                f"window={self.window:,} is less than one batch of each process, {self.batch_size} x "
                f"{self.num_processes}; make it larger."
            )

    def _check_cells(self) -> None:
        if self.num_cells < self.num_processes:
            raise ValueError(
                f"The {self.split} split of {self.folder} has {self.num_cells} cells, for {self.num_processes} "
                "process(es). Prepare more cells, or another share for validation."
            )
        if self.batch_size == 1 and self.num_cells % self.num_processes:
            raise ValueError(
                f"{self.num_cells:,} cells in batches of one can't be dealt evenly to {self.num_processes} processes; "
                "pass a larger batch_size."
            )


class CorpusLoader:
    """Batches of a collator from a stream, through a torch `DataLoader`; keeps the place in the data.

    Each iteration goes from the position to the end of the epoch; the next goes on with the next epoch. The stream
    itself is left as it is, so that a validation stream can be gone through again and again.

    Args:
        stream: where the cells come from.
        collator: makes a batch of `RawCells`, in the worker.
        num_workers: 0: in this process.
        **loader_options: of `torch.utils.data.DataLoader`: `pin_memory`, `prefetch_factor`, ...
    """

    def __init__(
        self, stream: CorpusStream, collator: Callable[[RawCells], Any], *, num_workers: int = 0, **loader_options: Any
    ) -> None:
        """See the class."""
        self._stream = copy(stream)
        self.collator = collator
        self.num_workers = num_workers
        self._loader_options = loader_options

    @property
    def position(self) -> CorpusPosition:
        """The place after the last batch that was handed out."""
        return self._stream.position

    def __len__(self) -> int:
        """Batches of a whole epoch. TypeError with `tokens_per_batch`."""
        return len(self._stream)

    def __iter__(self) -> Iterator[Any]:
        """The collated batches from the position to the end of the epoch."""
        loader: DataLoader = DataLoader(
            copy(self._stream),
            batch_size=None,
            collate_fn=_CollateWithPosition(self.collator),  # type: ignore[arg-type]  # no list, with batch_size=None
            num_workers=self.num_workers,
            **self._loader_options,
        )
        for position, batch in loader:
            self._stream.position = position
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """See `CorpusStream.state_dict`."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `CorpusStream.load_state_dict`."""
        self._stream.load_state_dict(state)


def load_corpus(folder: str | PathLike[str], *, split: Split = "train") -> datasets.IterableDataset:
    """The corpus as a streaming dataset of the datasets library, rows `{"cell_id", "gene_ids", "counts", ...}`.

    For people who want the library's own tools: `shuffle(buffer_size=)`, `datasets.distributed.split_dataset_by_node`,
    `map`. Duplicates are left out. `ScFoundationReadDepthAwareCollator` takes its rows. Row by row it is many times
    slower than `CorpusStream`, and it does not resume exactly: the library's shuffle buffer is lost with the process.

    Args:
        folder: as for `CorpusStream`.
        split: "train" or "validation".
    """
    manifest = CorpusManifest.read(folder)
    shards = [shard for shard in manifest.shards if shard.split == split]
    if not shards:
        raise ValueError(f"The {split} split of {folder} has no cells.")
    urls = [f"{str(folder).rstrip('/')}/{shard.path}" for shard in shards]
    rows = datasets.load_dataset("parquet", data_files={split: urls}, split=split, streaming=True)
    paths = {(shard.source, shard.duplicates) for shard in shards if shard.duplicates is not None}
    # The same cell in another source is the one that is kept.
    left_out = {
        (source, cell_id.ljust(16, b"\0").hex())  # NumPy cuts zero bytes off the end
        for source, path in paths
        for cell_id in read_duplicates(folder, path)["cell_id"]
    }
    if not left_out:
        return rows
    return rows.filter(lambda source, cell_id: (source, cell_id) not in left_out, input_columns=["source", "cell_id"])


# --- The order ---


class _Epoch:
    """Windows of rows in the order of one epoch."""

    def __init__(self, stream: CorpusStream, epoch: int) -> None:
        self._groups, self._borders = stream._row_groups, stream._window_borders
        self._key = (stream.seed, epoch) if stream.is_shuffled else None
        self._order = np.arange(len(self._groups))
        if self._key is not None:
            self._order = np.random.default_rng(self._key).permutation(len(self._groups))
        rows_before = np.concatenate([[0], np.cumsum(self._groups.num_kept[self._order])])
        self._first_rows = rows_before[self._borders]  # of each window, and the end

    def __len__(self) -> int:
        return len(self._borders) - 1

    def window(self, window: int, left_over: RawCells | None = None) -> tuple[RawCells, np.ndarray]:
        """Its cells and the order to take them in; `left_over` comes first, as it is."""
        groups = self._order[self._borders[window] : self._borders[window + 1]]
        parts = [self._groups.read(group) for group in groups]
        num_rows = sum(map(len, parts))
        order = np.arange(num_rows)
        if self._key is not None:
            order = np.random.default_rng((*self._key, window)).permutation(num_rows)
        if left_over is None or not len(left_over):
            return _join(parts), order
        num_left = len(left_over)
        return _join([left_over, *parts]), np.concatenate([np.arange(num_left), order + num_left])

    def rows(self, first_row: int, window: int) -> RawCells | None:
        """The rows from `first_row` to the beginning of `window`, read again."""
        if first_row == self._first_rows[window]:
            return None
        first_window = int(np.searchsorted(self._first_rows, first_row, side="right")) - 1
        parts = []
        for earlier in range(first_window, window):
            cells, order = self.window(earlier)
            parts.append(cells.select(order[max(0, first_row - self._first_rows[earlier]) :]))
        return _join(parts)


def _cut(num_tokens: np.ndarray, batch_size: int, tokens_per_batch: int | None) -> np.ndarray:
    """`(batches + 1,)` where consecutive cells are cut into batches of as many as the two limits allow."""
    num_cells = len(num_tokens)
    if tokens_per_batch is None:
        return np.append(np.arange(0, num_cells, batch_size), num_cells)
    ends = np.cumsum(num_tokens)
    borders = [0]
    while borders[-1] < num_cells:
        begin = borders[-1]
        done = ends[begin - 1] if begin else 0
        fitting = int(np.searchsorted(ends, done + tokens_per_batch, side="right"))
        borders.append(min(begin + batch_size, max(begin + 1, fitting)))
    return np.array(borders)


def _fill_up(borders: np.ndarray, first_batch: int, num_processes: int) -> np.ndarray:
    """Halve the largest of the last batches until the epoch has as many batches for each process."""
    filled = borders.tolist()
    num_wanted = -(-(first_batch + len(filled) - 1) // num_processes) * num_processes - first_batch
    while len(filled) - 1 < num_wanted:
        sizes = np.diff(filled)
        largest = len(sizes) - 1 - int(np.argmax(sizes[::-1]))
        if sizes[largest] < 2:
            raise ValueError(
                f"The last batches of the epoch, of one cell each, can't be dealt evenly to {num_processes} processes; "
                "pass a larger tokens_per_batch, batch_size or window."
            )
        filled.insert(largest + 1, filled[largest] + int(sizes[largest]) // 2)
    return np.array(filled)


@dataclass(frozen=True)
class _Batch:
    """A batch that is only gathered if it is somebody's turn."""

    cells: RawCells
    rows: np.ndarray
    epoch: int
    position: CorpusPosition

    def __call__(self) -> CorpusCells:
        taken = self.cells.select(self.rows)
        return CorpusCells(
            taken.cell_ids, taken.gene_ids, taken.counts, taken.offsets, epochs=self.epoch, position=self.position
        )


@dataclass(frozen=True)
class _CollateWithPosition:
    collator: Callable[[RawCells], Any]

    def __call__(self, cells: CorpusCells) -> tuple[CorpusPosition, Any]:
        return cells.position, self.collator(cells)


# --- Rows ---


class _RowGroups:
    """All row groups of some shards: how many rows of each are kept, and those rows."""

    def __init__(self, folder: str, shards: Sequence[Shard], size: int) -> None:
        self._folder, self._shards, self._size = folder, shards, size
        num_groups = [-(-shard.num_rows // size) for shard in shards]
        self._shard_of_group = np.repeat(np.arange(len(shards)), num_groups)
        self._number_in_shard = np.concatenate([np.arange(number) for number in num_groups])
        rows_in_shard = np.array([shard.num_rows for shard in shards])[self._shard_of_group]
        self._left_out = self._read_left_out()
        self.num_kept = np.minimum(self._size, rows_in_shard - self._number_in_shard * self._size)
        first_groups = np.cumsum([0, *num_groups])
        for shard, rows in self._left_out.items():
            np.subtract.at(self.num_kept, first_groups[shard] + rows // self._size, 1)
        has_rows = self.num_kept > 0
        self._shard_of_group, self._number_in_shard = self._shard_of_group[has_rows], self._number_in_shard[has_rows]
        self.num_kept = self.num_kept[has_rows]

    def __len__(self) -> int:
        return len(self.num_kept)

    def _read_left_out(self) -> dict[int, np.ndarray]:
        """For each shard that has some, the rows that are passed over."""
        of_file: dict[str, np.ndarray] = {}
        left_out = {}
        for i, shard in enumerate(self._shards):
            if shard.duplicates is not None:
                if shard.duplicates not in of_file:
                    of_file[shard.duplicates] = read_duplicates(self._folder, shard.duplicates)
                rows = of_file[shard.duplicates]
                left_out[i] = rows["row"][rows["shard"] == shard.number].astype(np.int64)
        return left_out

    def read(self, group: int) -> RawCells:
        """The kept rows of one row group, as stored."""
        shard_index, number = int(self._shard_of_group[group]), int(self._number_in_shard[group])
        shard = self._shards[shard_index]
        file = _open_shard(self._folder, shard, os.getpid())
        table = file.read_row_group(number, columns=_COLUMNS, use_threads=False).combine_chunks()
        gene_ids, counts = (table.column(name).chunk(0) for name in ("gene_ids", "counts"))
        offsets = gene_ids.offsets.to_numpy().astype(np.int64)
        cells = RawCells(
            cell_ids=table.column("cell_id").to_numpy(),
            gene_ids=gene_ids.values.to_numpy()[offsets[0] : offsets[-1]],
            counts=counts.values.to_numpy()[offsets[0] : offsets[-1]],
            offsets=offsets - offsets[0],
        )
        left_out = self._left_out.get(shard_index)
        if left_out is None:
            return cells
        is_kept = np.ones(len(cells), dtype=bool)
        first = number * self._size
        is_kept[left_out[(left_out >= first) & (left_out < first + len(cells))] - first] = False
        return cells if is_kept.all() else cells.select(np.flatnonzero(is_kept))


@lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(folder: str, shard: Shard, process_id: int) -> pq.ParquetFile:
    """Opened once a process: a forked worker would share the place in the file with its parent."""
    assert process_id == os.getpid()
    filesystem, root = fsspec.core.url_to_fs(folder)
    try:
        file = pq.ParquetFile(filesystem.open(f"{root}/{shard.path}", "rb"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} lacks the shard {shard.path}, which its manifest lists. Copy it again."
        ) from error
    except (OSError, ValueError) as error:  # pyarrow's own errors are among both
        raise ValueError(f"{folder}/{shard.path} could not be read ({error}). Copy it again.") from error
    if file.metadata.num_rows != shard.num_rows:
        raise ValueError(
            f"{folder}/{shard.path} has {file.metadata.num_rows:,} rows, the manifest says {shard.num_rows:,}: it is "
            "not the shard that was prepared. Copy it again."
        )
    return file


def _join(parts: Sequence[RawCells]) -> RawCells:
    starts = np.cumsum([0, *(len(part.counts) for part in parts)])
    return RawCells(
        cell_ids=np.concatenate([part.cell_ids for part in parts]),
        gene_ids=np.concatenate([part.gene_ids for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        offsets=np.concatenate([[0], *(part.offsets[1:] + start for part, start in zip(parts, starts, strict=False))]),
    )
