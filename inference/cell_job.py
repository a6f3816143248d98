"""Batch by batch through the cells of one input, into memory or onto disk: what all jobs of this folder have in common.

Batches are runs of consecutive cells. Where one ends depends on the input and the budget only, so that a resumed run,
and one shared between processes, forms the same batches and writes the same bits.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from tqdm import tqdm

from scfoundation_hf.tokenization.data_collator import EncodedCells, as_tensors, pack_cells
from scfoundation_hf.tokenization.prepared_cells import PreparedCells

from .loading import LoadedModel
from .many_processes import ALONE, Processes
from .writer import CellResults, Progress, StoredRows, identify_file, progress_folder, write_results

TOKENS_PER_BATCH = {"cpu": 2_048, "cuda": 65_536, "mps": 16_384}
BATCHES_PER_READ = 64  # read from the file at once
PARTS = 64  # into which a smaller input is cut, so that several processes can share it


def batch_borders(lengths: np.ndarray, tokens_per_batch: int, *, cells_per_batch: int | None = None) -> np.ndarray:
    """Where consecutive cells are cut into batches of at most `tokens_per_batch` tokens, or of one longer cell.

    Packed batches waste nothing on cells of unequal length, so the order of the file is kept.

    Args:
        lengths: `(cells,)` tokens of each cell; 0 for cells that are left out.
        cells_per_batch: the most cells in a batch, those left out included.
    Returns: `(batches + 1,)` int64, from 0 to the number of cells.
    """
    ends = np.cumsum(lengths)
    borders = [0]
    while borders[-1] < len(lengths):
        start = borders[-1]
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + tokens_per_batch, side="right")))
        borders.append(stop if cells_per_batch is None else min(stop, start + cells_per_batch))
    return np.array(borders)


def check_data(data: Any, output: str | PathLike[str] | None, *, verb: str) -> tuple[Path | None, Path | None]:
    """The input's path and the output's, for an input that is a file.

    Raises: TypeError: for neither an AnnData nor a path; ValueError: for an output where there is none, or none where
        there must be one.
    """
    if not isinstance(data, AnnData | str | PathLike):
        raise TypeError(
            f"{verb} takes an AnnData or the path of one, not a {type(data).__name__}; for a matrix, "
            "anndata.AnnData(matrix, var=pandas.DataFrame(index=gene_names))."
        )
    if isinstance(data, AnnData):
        if output is not None:
            raise ValueError(
                "output= is for files: from an AnnData in memory the result is one too. Leave output out, then "
                "adata.write_h5ad(...)."
            )
        return None, None
    if output is None:
        raise ValueError(f"output= is missing: {data} is a file, and the result is written into another one.")
    return Path(data), Path(output)


def check_at_least_one(**numbers: int | None) -> None:
    """Refuse numbers below 1, by their names.

    Raises: ValueError.
    """
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1.")


def packed_on(device: torch.device, cells: EncodedCells) -> dict[str, Any]:
    """The packed batch of these cells, its tensors on the device."""
    batch = as_tensors(pack_cells(cells), "pt")
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


@dataclass(frozen=True)
class CellJob:
    """One result of a fixed shape for each cell of an input.

    Args:
        compute: tokens of some cells -> `(cells, *row_shape)`.
        settings: what else the numbers depend on, JSON-able; goes into the record.
        tokens_per_batch: `None`: by device.
        verb: names the progress bar.
        past: names, in the record, the cells that have a result.
    """

    loaded: LoadedModel[Any]
    prepared: PreparedCells
    compute: Callable[[EncodedCells], np.ndarray]
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    settings: Mapping[str, Any]
    tokens_per_batch: int | None
    cells_per_batch: int | None
    verb: str
    past: str
    show_progress: bool
    processes: Processes = ALONE

    def announce(self) -> None:
        """Say, once, how the input was taken and which cells are left out."""
        self.prepared.warn_left_out()
        if self.show_progress and self.processes.is_first:
            tqdm.write(self.prepared.describe(), file=sys.stderr)

    @cached_property
    def tokens_budget(self) -> int:
        """Tokens a batch."""
        device = self.loaded.model.device.type
        return self.tokens_per_batch or TOKENS_PER_BATCH.get(device, TOKENS_PER_BATCH["cuda"])

    @cached_property
    def parts(self) -> list[np.ndarray]:
        """Borders of the batches, in runs that are read, written and given to a process as one."""
        lengths = np.where(self.prepared.is_kept, self.prepared.token_lengths, 0)
        borders = batch_borders(lengths, self.tokens_budget, cells_per_batch=self.cells_per_batch)
        step = min(BATCHES_PER_READ, -(-(len(borders) - 1) // PARTS))
        return [borders[first : first + step + 1] for first in range(0, len(borders) - 1, step)]

    def rows(self, part: np.ndarray, *, start: int) -> Iterator[np.ndarray]:
        """Results of one part's batches from cell `start` on, each `(cells, *row_shape)`; NaN for cells left out."""
        part = part[np.searchsorted(part, start) :]
        if len(part) < 2:
            return
        encoded = self.prepared.encode(int(part[0]), int(part[-1]))
        for first, last in pairwise(part.tolist()):
            rows = np.full((last - first, *self.row_shape), np.nan, dtype=self.dtype)
            kept = slice(*np.searchsorted(encoded.cell_index, (first, last)))
            cells = encoded.select(np.arange(len(encoded))[kept])
            if len(cells):
                rows[cells.cell_index - first] = self.compute(cells)
            yield rows

    def batches(self) -> Iterator[np.ndarray]:
        """Results of all batches, in the order of the cells."""
        with self._progress_bar(self.prepared.num_cells) as bar:
            for part in self.parts:
                for rows in self.rows(part, start=int(part[0])):
                    bar.update(len(rows))
                    yield rows

    def gather(self) -> np.ndarray:
        """All results in memory, `(cells, *row_shape)`."""
        gathered = np.empty((self.prepared.num_cells, *self.row_shape), dtype=self.dtype)
        num_done = 0
        for rows in self.batches():
            gathered[num_done : num_done + len(rows)] = rows
            num_done += len(rows)
        return gathered

    def add_to(
        self, data: Any, *, key_added: str, source: Path | None, target: Path | None, overwrite: bool
    ) -> AnnData | Path:
        """Put the rows, and what became of the cells, into the AnnData or a copy of the file; returns that."""

        def results(rows: np.ndarray | StoredRows) -> CellResults:
            return CellResults(
                obsm={key_added: rows},
                obs={f"{key_added}_counts_kept": self.prepared.counts_kept_per_cell},
                uns={key_added: self.record()},
            )

        return self.add_results(data, results, source=source, target=target, overwrite=overwrite)

    def add_results(
        self,
        data: Any,
        results: Callable[[np.ndarray | StoredRows], CellResults],
        *,
        source: Path | None,
        target: Path | None,
        overwrite: bool,
    ) -> AnnData | Path:
        """Put what `results` makes of all rows into the AnnData or a copy of the file; returns that."""
        self.announce()
        if source is None or target is None:
            results(self.gather()).add_to(data)
            return data

        def finish(rows: StoredRows, folder: Path) -> None:
            write_results(source, target, results(rows), folder=folder, overwrite=overwrite)

        self.write(source, target, finish=finish)
        return target

    def write(self, source: Path, target: Path, *, finish: Callable[[StoredRows, Path], None]) -> None:
        """Compute this process's parts onto disk; the process that completes the work writes the output.

        Args:
            finish: writes the output from all rows, with what is unfinished in the folder given.
        """
        mine = range(self.processes.rank, len(self.parts), self.processes.count)
        if not mine:  # more processes than parts: the others may be through already
            return
        with progress_folder(target, self.processes) as folder:
            progress = Progress(
                folder,
                self._identity(source),
                borders=[int(part[0]) for part in self.parts] + [self.prepared.num_cells],
                row_shape=self.row_shape,
                dtype=self.dtype,
                processes=self.processes,
            )
            num_cells = sum(int(np.ptp(self.parts[index])) for index in mine)
            with self._progress_bar(num_cells, num_done=sum(progress.num_rows_done(index) for index in mine)) as bar:
                for index in mine:
                    self._write_part(progress, index, bar)
            with progress.completing() as is_complete:
                if is_complete:
                    finish(progress.rows(), folder)
            if not is_complete and self.show_progress:
                tqdm.write(
                    f"Process {self.processes.rank} has done its share; the one that ends last writes {target}.",
                    file=sys.stderr,
                )

    def _write_part(self, progress: Progress, index: int, bar: "tqdm[Any]") -> None:
        part = self.parts[index]
        with progress.part(index) as written:
            for rows in self.rows(part, start=int(part[0]) + written.num_rows_done):
                written.append(rows)
                bar.update(len(rows))

    def _progress_bar(self, num_cells: int, *, num_done: int = 0) -> "tqdm[Any]":
        share = f" (process 1 of {self.processes.count})" if self.processes.count > 1 else ""
        is_shown = self.show_progress and self.processes.is_first
        return tqdm(
            total=num_cells,
            initial=num_done,
            unit=" cells",
            desc=f"{self.verb}{share}",
            disable=not is_shown,
        )

    def record(self, further_settings: Mapping[str, Any] | None = None) -> str:
        """Everything that says how the numbers came to be, as JSON (`uns` keeps no `None` and no nested lists).

        Args:
            further_settings: of what is done with the numbers afterwards.
        """
        prepared = self.prepared
        record: dict[str, Any] = {
            "model": {
                "name": self.loaded.name,
                "revision": self.loaded.revision,
                "dtype": str(self.loaded.model.dtype),
            },
            "settings": {**prepared.settings, **self.settings, **(further_settings or {})},
            "cells": {
                "total": prepared.num_cells,
                self.past: int(prepared.is_kept.sum()),
                "empty": int(prepared.is_empty.sum()),
                "below_min_genes": int(prepared.is_below_min_genes.sum()),
            },
            "alignment_report": json.loads(prepared.report.to_json()),
            "scfoundation_hf_version": version("scfoundation-hf"),
        }
        return json.dumps(record)

    def _identity(self, source: Path) -> dict[str, Any]:
        """What unfinished work is tied to: input, model and all that changes the numbers or the batches."""
        return {
            "input": identify_file(source),
            "model": self.loaded.fingerprint(),
            "settings": {**self.prepared.settings, **self.settings},
            "batches": [self.tokens_budget, self.cells_per_batch],
            "dtype": str(self.loaded.model.dtype),
            "scfoundation_hf": version("scfoundation-hf"),
        }
