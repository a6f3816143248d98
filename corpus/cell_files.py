"""Cells straight from their files, without preparing a corpus: for a look, or for data that is used once.

scDataset draws the order (blocks of neighbouring cells, shuffled) and shares it out among processes and workers; the
reading and the alignment are ours. Chosen by `benchmarks/loaders.py` over anndata's own loader.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from os import PathLike
from typing import Any, Literal, get_args

import numpy as np
from scipy.sparse import csr_matrix, vstack
from torch.utils.data import IterableDataset

from scfoundation_hf.tokenization.anndata_reader import AnnDataReader
from scfoundation_hf.tokenization.data_collator import RawCells
from scfoundation_hf.tokenization.gene_vocabulary import GeneMapping, GeneVocabulary
from scfoundation_hf.tokenization.read_depth import first_entry, first_non_integer
from scfoundation_hf.tokenization.tokenization_scfoundation import MIN_VOCABULARY_SHARE

from .fingerprints import cell_ids

CountsAsStored = Literal["counts", "expected_counts"]


class CellFilesStream(IterableDataset):
    """Micro-batches of raw cells from cell files, `RawCells`; an iteration is one epoch.

    Values are checked as they are read, not beforehand; cells are not deduplicated, no validation split is kept, and a
    run cannot be resumed within an epoch. `prepare` gives all that, and reads faster.

    Args:
        paths: files that `AnnDataReader` reads; those in memory-bound formats (CSV, mtx) are held by every worker.
        batch_size: most cells a batch; those with fewer than `min_genes` expressed genes are left out of it.
        block_size: neighbouring cells that are read together.
        fetch_factor: batches read and shuffled together.
        layer, gene_column: as for the tokenizer.
        values: "counts", integers, or "expected_counts", used as they are.
        seed: of the order; with the epoch, which `set_epoch` sets.
        process_index, num_processes: which share of the batches to take.
    Raises: ImportError: without scdataset. ValueError, KeyError, FileNotFoundError: for files that are not what they
        should be; while iterating too.
    """

    def __init__(
        self,
        paths: Sequence[str | PathLike[str]],
        *,
        batch_size: int,
        block_size: int = 64,
        fetch_factor: int = 64,
        layer: str | None = None,
        gene_column: str | None = None,
        values: CountsAsStored = "counts",
        min_genes: int = 201,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Open each file once, to map its genes; they are opened again where they are read."""
        try:
            import scdataset  # type: ignore[import-untyped]  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "CellFilesStream needs scDataset: pip install scdataset. A prepared corpus (`scfoundation prepare`) "
                "does not."
            ) from error
        if isinstance(paths, str | PathLike) or not len(paths):
            raise ValueError(f"paths must be one or more paths in a list, got {paths!r}.")
        if values not in get_args(CountsAsStored):
            raise ValueError(f"values must be one of {', '.join(map(repr, get_args(CountsAsStored)))}; got {values!r}.")
        self.batch_size, self.block_size, self.fetch_factor = batch_size, block_size, fetch_factor
        self.min_genes, self.seed, self.epoch = min_genes, seed, 0
        self.process_index, self.num_processes = process_index, num_processes
        self._files = _Files([str(path) for path in paths], layer=layer, gene_column=gene_column, values=values)
        self.num_cells = len(self._files)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the draws of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[RawCells]:
        """This process's batches of the epoch; in a loader's worker, its share of them."""
        from scdataset import BlockShuffling, scDataset

        batches = scDataset(
            self._files,
            BlockShuffling(block_size=self.block_size),
            batch_size=self.batch_size,
            fetch_factor=self.fetch_factor,
            fetch_callback=_Files.read,
            batch_callback=self._batch,
            rank=self.process_index,
            world_size=self.num_processes,
            seed=int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]),
        )
        for cells in batches:
            if len(cells):
                yield cells

    def _batch(self, cells: RawCells, rows: np.ndarray) -> RawCells:
        taken = cells.select(rows[cells.lengths[rows] >= self.min_genes])
        return RawCells(taken.cell_ids, taken.gene_ids, taken.counts, taken.offsets, epochs=self.epoch)


@dataclass
class _OpenFile:
    path: str
    num_cells: int
    mapping: GeneMapping
    reader: AnnDataReader | None = None
    process_id: int | None = None


class _Files:
    """All cells of several files under one numbering."""

    def __init__(self, paths: Sequence[str], *, layer: str | None, gene_column: str | None, values: str) -> None:
        self._options = {"layer": layer, "gene_column": gene_column}
        self._values = values
        self._files = []
        vocabulary = GeneVocabulary.default()
        for path in paths:
            with AnnDataReader(path, layer=layer, gene_column=gene_column) as reader:
                mapping = vocabulary.map_genes(reader.gene_names)
                mapping.check_vocabulary_share(MIN_VOCABULARY_SHARE)
                self._files.append(_OpenFile(path, reader.num_cells, mapping))
        self._first_cells = np.cumsum([0, *(file.num_cells for file in self._files)])

    def __len__(self) -> int:
        return int(self._first_cells[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which cannot be sent to a worker."""
        return vars(self) | {"_files": [replace(file, reader=None) for file in self._files]}

    def read(self, cells: np.ndarray) -> RawCells:
        """These cells, whose numbers rise."""
        borders = np.searchsorted(cells, self._first_cells)
        parts = [
            self._read_file(file, cells[start:stop] - first)
            for file, first, (start, stop) in zip(self._files, self._first_cells, pairwise(borders), strict=False)
            if stop > start
        ]
        counts = csr_matrix(vstack(parts, format="csr"))
        return RawCells(np.array(cell_ids(counts)), counts.indices, counts.data, counts.indptr.astype(np.int64))

    def _read_file(self, file: _OpenFile, rows: np.ndarray) -> csr_matrix:
        if file.reader is None or file.process_id != os.getpid():  # HDF5 files do not survive a fork
            file.reader, file.process_id = AnnDataReader(file.path, **self._options), os.getpid()
        run_starts = np.flatnonzero(np.diff(rows, prepend=-2) > 1)
        runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, run_starts[1:])]
        counts = csr_matrix(vstack([file.reader.read(start, stop) for start, stop in runs], format="csr"))
        offends = ~(counts.data >= 0) | ~np.isfinite(counts.data)
        offender = first_entry(counts, offends)
        if offender is None and self._values == "counts":
            offender = first_non_integer(counts)
        if offender is not None:
            cell, gene = file.reader.cell_names[rows[offender.row]], file.reader.gene_names[offender.column]
            raise ValueError(
                f"Cell {cell!r}, gene {gene!r} of {file.reader.description} holds {offender.value:g}, but "
                f"values={self._values!r} are non-negative{' integers' * (self._values == 'counts')}. Choose another "
                "layer, or mend the file."
            )
        return file.mapping.apply(counts.astype(np.float32) if counts.dtype.itemsize < 4 else counts)
