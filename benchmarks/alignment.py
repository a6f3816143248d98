"""How long alignment to the gene vocabulary takes and how much memory it needs, against the original's way.

    python benchmarks/alignment.py [FILE.h5ad] [--cells 100000] [--repeats 5]

Real cells are drawn with replacement, so the entries and their spread over genes are a real file's. Memory is
the process's peak resident size (Linux) above what it held before the call; the result is part of it. The
baseline repeats the gene selection of the original's `get_embedding.py`: a dense table of all cells, filled
up with a column of zeros for each missing gene and reindexed by name. (The original itself would take the
file's 33,538 columns for the vocabulary's 19,264 and select nothing.) It does not fit the memory for all
cells and therefore runs on a slice; its time is scaled by the number of cells. Both are run in turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "hao_pbmc.h5ad"  # beside the maintainers' clone
MIB = 2**20


def resample(counts: sparse.csr_matrix, num_cells: int) -> sparse.csr_matrix:
    """`num_cells` rows drawn with replacement."""
    rows = np.random.default_rng(0).integers(counts.shape[0], size=num_cells)
    return sparse.csr_matrix(counts[rows])


def align_as_original(counts: sparse.csr_matrix, gene_names: list[str], symbols: list[str]) -> pd.DataFrame:
    """Dense, filled up with zeros and reindexed by name, as `main_gene_selection` of the original does."""
    table = pd.DataFrame(counts.toarray(), columns=gene_names)
    missing = sorted(set(symbols) - set(gene_names))
    zeros = pd.DataFrame(np.zeros((len(table), len(missing))), columns=missing, index=table.index)
    return pd.concat([table, zeros], axis=1)[symbols]


def measure(function: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds, seconds of processor time, and MiB of peak resident memory above what was resident before."""

    def resident(field: str) -> float:
        status = Path("/proc/self/status").read_text()
        return float(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before, start, processor_start = resident("VmRSS:"), time.perf_counter(), time.process_time()
    result = function()
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    extra = resident("VmHWM:") - before
    del result
    return seconds, processor_seconds, extra


def show(values: list[float], unit: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):,.2f} {unit} (from {min(values):,.2f} to {max(values):,.2f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=DATA)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--baseline-cells", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    if arguments.file == DATA and not DATA.is_file():
        print(f"Skipped: {DATA} is not here; pass an .h5ad of raw counts with gene symbols in var_names.")
        return
    adata = anndata.read_h5ad(arguments.file)
    vocabulary, gene_names = GeneVocabulary.default(), adata.var_names.tolist()
    symbols = list(vocabulary.symbols)
    counts = resample(adata.X, arguments.cells)
    sliced = counts[: arguments.baseline_cells]
    input_mib = (counts.data.nbytes + counts.indices.nbytes + counts.indptr.nbytes) / MIB
    print(f"{arguments.file.name}: {counts.shape[0]:,} cells drawn x {counts.shape[1]:,} genes, {counts.dtype}")
    print(f"input {input_mib:,.0f} MiB, {counts.nnz:,} entries; {arguments.repeats} repeats in turns")

    aligned, report = vocabulary.align(sliced, gene_names)
    same = [symbol for symbol in symbols if symbol not in report.summed and symbol not in report.renamed.values()]
    expected = align_as_original(sliced, gene_names, symbols)[same].to_numpy()
    assert np.array_equal(aligned[:, [vocabulary.index(symbol) for symbol in same]].toarray(), expected)
    del aligned, expected

    ours, theirs = [], []
    for _ in range(arguments.repeats):
        ours.append(measure(lambda: vocabulary.align(counts, gene_names)))
        theirs.append(measure(lambda: align_as_original(sliced, gene_names, symbols)))
    our_seconds, our_processor, our_mib = map(list, zip(*ours, strict=True))
    scale = counts.shape[0] / sliced.shape[0]
    their_seconds, their_processor, their_mib = map(list, zip(*theirs, strict=True))
    their_seconds = [seconds * scale for seconds in their_seconds]
    their_processor = [seconds * scale for seconds in their_processor]
    print(f"align:    {show(our_seconds, 's')}; processor {show(our_processor, 's')}")
    print(f"          {show([mib / input_mib for mib in our_mib], 'x input')} of extra memory, with the result")
    print(f"original: {show(their_seconds, 's')}; processor {show(their_processor, 's')},")
    print(f"          both scaled by {scale:,.0f} from {sliced.shape[0]:,} cells, which alone take")
    print(f"          {show(their_mib, 'MiB')} of extra memory")
    ratios = [theirs / ours for ours, theirs in zip(our_seconds, their_seconds, strict=True)]
    print(f"original / align: {show(ratios, 'times')} the seconds per cell")


if __name__ == "__main__":
    main()
