"""Cells a second from storage to the model's batch, beside other loaders and the original's way.

    python benchmarks/loaders.py [DATA] [--workers 2] [--repeats 5]

DATA is a folder of .h5ad files with raw counts of human cells. Their cells of more than 200 genes are aligned and
written once as one CSR .h5ad file and once as a corpus (`scfoundation prepare`). Every loader then hands over shuffled
micro-batches of 128 cells; all but the original's way go through the same alignment and the same read-depth-aware
collator to packed batches. A repeat is one epoch, or `--slow-cells` cells for the slow ones, start of the workers
included. Loaders take turns, so that a busy moment of the machine meets all of them.

- corpus: `CorpusLoader` on the parquet shards
- h5ad: `CellFilesStream` on the CSR file (scDataset's order, our reader)
- scDataset: its own indexing of an `AnnCollection`, aligned by us
- AnnLoader: anndata's own, whose batches are dense, in this process
- original: one row at a time, as `get_embedding.py` of biomap-research/scFoundation prepares it, with genes hidden;
  from an aligned pandas table in memory, in this process

The collator alone, on cells in memory, is timed by its CPU time for several recipes.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from scdataset import BlockShuffling, scDataset
from scipy.sparse import csr_matrix, vstack
from torch.utils.data import DataLoader

from scfoundation_hf.corpus.cell_files import CellFilesStream
from scfoundation_hf.corpus.fingerprints import cell_ids
from scfoundation_hf.corpus.prepare import prepare
from scfoundation_hf.corpus.streaming import CorpusLoader, CorpusStream
from scfoundation_hf.tokenization.data_collator import RawCells, ScFoundationReadDepthAwareCollator
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "corpus"  # beside the maintainers' clone
BATCH_SIZE = 128
COLLATED_BATCHES = 20
MIN_GENES = 201
COLLATORS: dict[str, dict[str, Any]] = {
    "released, packed": {},
    "released, padded": {"layout": "padded"},
    "released, decoder_positions=4096": {"decoder_positions": 4096},
    "paper, packed": {"recipe": "paper"},
}
PUBLISHED = "published by others on one laptop, not measured here: annbatch 68,867 cells/s (without our collator)"


def write_cells(files: list[Path], path: Path) -> csr_matrix:
    """All cells over the vocabulary's genes, in one CSR file."""
    vocabulary, parts = GeneVocabulary.default(), []
    for file in files:
        cells = anndata.read_h5ad(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # files of fewer genes than half the vocabulary
            aligned, _ = vocabulary.align(cells.X, cells.var_names)
        parts.append(aligned[np.diff(aligned.indptr) >= MIN_GENES].astype(np.float32))
    counts = csr_matrix(vstack(parts, format="csr"))
    var = pd.DataFrame(index=list(vocabulary.symbols))
    anndata.AnnData(counts, obs=pd.DataFrame(index=np.arange(counts.shape[0]).astype(str)), var=var).write_h5ad(path)
    return counts


def as_raw_cells(counts: Any, vocabulary: GeneVocabulary) -> RawCells:
    """A batch of another loader, aligned and named as ours are."""
    matrix = csr_matrix(np.asarray(counts) if not hasattr(counts, "tocsr") else counts)
    aligned = vocabulary.map_genes(vocabulary.symbols).apply(matrix)
    return RawCells(np.array(cell_ids(aligned)), aligned.indices, aligned.data, aligned.indptr.astype(np.int64))


def scdataset_batches(path: Path, collate: Callable, workers: int, epoch: int) -> Iterator[dict[str, Any]]:
    """scDataset on an AnnCollection, as its documentation shows."""
    adata = anndata.read_h5ad(path, backed="r")
    vocabulary = GeneVocabulary.default()
    dataset = scDataset(
        anndata.experimental.AnnCollection([adata], join_vars="inner", harmonize_dtypes=False),
        BlockShuffling(block_size=64),
        batch_size=BATCH_SIZE,
        fetch_factor=64,
        fetch_transform=lambda rows: csr_matrix(rows.X),
        batch_transform=lambda rows: collate(as_raw_cells(rows, vocabulary)),
        seed=epoch,
    )
    yield from DataLoader(dataset, batch_size=None, num_workers=workers)
    adata.file.close()


def annloader_batches(path: Path, collate: Callable, epoch: int) -> Iterator[dict[str, Any]]:
    """anndata's loader, backed and shuffled."""
    adata = anndata.read_h5ad(path, backed="r")
    torch.manual_seed(epoch)
    vocabulary = GeneVocabulary.default()
    for rows in anndata.experimental.AnnLoader([adata], batch_size=BATCH_SIZE, shuffle=True):
        yield collate(as_raw_cells(rows.X, vocabulary))
    adata.file.close()


def original_batches(table: pd.DataFrame, epoch: int) -> Iterator[torch.Tensor]:
    """One row at a time: normalised in pandas, through a list into a tensor, genes hidden, expressed ones gathered."""
    generator = np.random.default_rng(epoch)
    gene_ids = torch.arange(table.shape[1] + 2)
    while True:
        for i in generator.permutation(len(table)):
            row = table.iloc[i, :]
            values = np.log1p(row / row.sum() * 1e4).tolist()
            depth = np.log10(row.sum())
            x = torch.tensor([*values, depth, depth]).unsqueeze(0)
            hidden = torch.from_numpy(generator.random(len(gene_ids)) < torch.where(x[0] > 0, 0.3, 0.03).numpy())
            is_visible = (x > 0) & ~hidden
            yield torch.stack([x[is_visible], gene_ids[None][is_visible].float()])


def rate(batches: Iterator, num_cells: int | None, count: Callable[[Any], int]) -> float:
    """Cells a second over an epoch, or over the first `num_cells`."""
    seen, start = 0, time.perf_counter()
    for batch in batches:
        seen += count(batch)
        if num_cells is not None and seen >= num_cells:
            break
    return seen / (time.perf_counter() - start)


def collator_rates(batches: list[RawCells], repeats: int) -> dict[str, list[float]]:
    """Cells a second of CPU time of each of `COLLATORS`, in turns."""
    rates: dict[str, list[float]] = {name: [] for name in COLLATORS}
    num_cells = sum(map(len, batches))
    for _ in range(repeats):
        for name, options in COLLATORS.items():
            collate = ScFoundationReadDepthAwareCollator(ScFoundationTokenizer(), **options)
            start = time.process_time()
            for batch in batches:
                collate(batch)
            rates[name].append(num_cells / (time.process_time() - start))
    return rates


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, default=DATA)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow-cells", type=int, default=512, help="for the loaders that take milliseconds a cell")
    parser.add_argument("--max-files", type=int, help="the first of them only")
    arguments = parser.parse_args()
    files = sorted(arguments.data.glob("*.h5ad"))[: arguments.max_files]
    if not files:
        print(f"Skipped: no .h5ad file in {arguments.data}; pass a folder with raw counts of human cells.")
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the other loaders
    with tempfile.TemporaryDirectory() as folder:
        h5ad, corpus = Path(folder) / "cells.h5ad", Path(folder) / "corpus"
        counts = write_cells(files, h5ad)
        prepare([h5ad], corpus, validation_share=0, progress=False)
        size = sum(path.stat().st_size for path in (corpus / "train").iterdir())
        print(
            f"{len(files)} files: {counts.shape[0]:,} cells, {counts.nnz / counts.shape[0]:,.0f} expressed genes a cell"
        )
        print(f"cells.h5ad {h5ad.stat().st_size / 2**20:,.0f} MiB, corpus {size / 2**20:,.0f} MiB")
        collate = ScFoundationReadDepthAwareCollator(ScFoundationTokenizer())
        table = pd.DataFrame(counts[: arguments.slow_cells].toarray(), columns=GeneVocabulary.default().symbols)

        def from_corpus(workers: int, epoch: int) -> Iterator[dict[str, Any]]:
            stream = CorpusStream(corpus, batch_size=BATCH_SIZE)
            stream.set_epoch(epoch)
            yield from CorpusLoader(stream, collate, num_workers=workers)

        def from_h5ad(workers: int, epoch: int) -> Iterator[dict[str, Any]]:
            stream = CellFilesStream([h5ad], batch_size=BATCH_SIZE)
            stream.set_epoch(epoch)
            yield from DataLoader(stream, batch_size=None, collate_fn=collate, num_workers=workers)

        def cells_of_batch(batch: dict[str, Any]) -> int:
            return len(batch["cu_seq_lens_q"]) - 1

        workers, slow = arguments.workers, arguments.slow_cells
        loaders: dict[str, tuple[Callable[[int], Iterator], int | None, Callable[[Any], int]]] = {
            f"corpus, {workers} workers": (partial(from_corpus, workers), None, cells_of_batch),
            "corpus, in this process": (partial(from_corpus, 0), None, cells_of_batch),
            f"h5ad, {workers} workers": (partial(from_h5ad, workers), None, cells_of_batch),
            f"scDataset, {workers} workers": (partial(scdataset_batches, h5ad, collate, workers), None, cells_of_batch),
            "AnnLoader": (partial(annloader_batches, h5ad, collate), slow, cells_of_batch),
            "original": (partial(original_batches, table), slow, lambda _: 1),
        }
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for repeat in range(arguments.repeats):
            for name, (batches, num_cells, count) in loaders.items():
                rates[name].append(rate(batches(repeat), num_cells, count))
        some = list(islice(iter(CorpusStream(corpus, batch_size=BATCH_SIZE)), COLLATED_BATCHES))
        of_collators = collator_rates(some, arguments.repeats)
    print(f"cells a second, median (from .. to) of {arguments.repeats} repeats in turns; ratio to the original's way:")
    for name, measured in rates.items():
        ratios = [mine / base for mine, base in zip(measured, rates["original"], strict=True)]
        print(
            f"{name:<26}{statistics.median(measured):>10,.0f} ({min(measured):,.0f} .. {max(measured):,.0f})"
            f"{statistics.median(ratios):>9,.1f} x"
        )
    print(PUBLISHED)
    print("the collator alone, cells a second of CPU time")
    for name, measured in of_collators.items():
        print(f"{name:<34}{statistics.median(measured):>8,.0f} ({min(measured):,.0f} .. {max(measured):,.0f})")


if __name__ == "__main__":
    main()
