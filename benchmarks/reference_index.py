"""How fast a labelled reference answers, by its size, against comparing with every cell of it.

    python benchmarks/reference_index.py                                  # 20,000 and 200,000 cells
    python benchmarks/reference_index.py --sizes 1000000                  # long, and several GiB

References of any size are made from the embeddings of real cells: each new one lies somewhere between a real cell and
one of its 15 nearest, so that neighbourhoods are those of cells, not of noise. Queries are made in the same way. The
baseline is scikit-learn's exact search, `NearestNeighbors(metric="cosine", algorithm="brute")`, on the same scaled
numbers; index and baseline answer the same batches of queries in turns.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
from sklearn.neighbors import NearestNeighbors

from scfoundation_hf.inference.embedding import embed
from scfoundation_hf.inference.reference_index import GRAPH_FILE, ReferenceIndex

ROOT = Path(__file__).parents[1]
CELLS = ROOT / "examples" / "data" / "zheng_facs_pbmc_cut.h5ad"
NUM_NEIGHBORS = 15
CELLS_PER_BLOCK = 50_000


def real_embeddings(path: Path, model: Path) -> np.ndarray:
    """`(cells, P)` float32."""
    cells = anndata.read_h5ad(path)
    embed(cells, model, gene_column="symbol" if "symbol" in cells.var else None)
    return np.asarray(cells.obsm["X_scfoundation"])


class BetweenNeighbors:
    """Draws embeddings between real ones and their neighbours."""

    def __init__(self, real: np.ndarray, *, seed: int = 0) -> None:
        self.real = real
        scaled = (real - real.mean(0)) / np.maximum(real.std(0), 1e-6)
        search = NearestNeighbors(n_neighbors=NUM_NEIGHBORS + 1, metric="cosine").fit(scaled)
        self.neighbors = search.kneighbors(scaled, return_distance=False)[:, 1:]
        self.generator = np.random.default_rng(seed)

    def draw(self, number: int) -> np.ndarray:
        """`(number, P)` float32."""
        drawn = np.empty((number, self.real.shape[1]), dtype=np.float32)
        for start in range(0, number, CELLS_PER_BLOCK):
            block = drawn[start : start + CELLS_PER_BLOCK]
            cells = self.generator.integers(len(self.real), size=len(block))
            others = self.neighbors[cells, self.generator.integers(NUM_NEIGHBORS, size=len(block))]
            shares = self.generator.random((len(block), self.real.shape[1]), dtype=np.float32)
            block[:] = self.real[cells] + shares * (self.real[others] - self.real[cells])
        return drawn


def measure(size: int, source: BetweenNeighbors, *, num_queries: int, repeats: int) -> str:
    """A line of the table."""
    reference = source.draw(size)
    labels = np.where(np.arange(size) % 2, "one", "other")  # what the types are does not matter here
    start = time.perf_counter()
    index = ReferenceIndex.build(reference, labels)
    built = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = (index.save(Path(folder) / "index") / GRAPH_FILE).stat().st_size
        index = ReferenceIndex.load(Path(folder) / "index")
        reference -= index.mean
        reference /= index.scale
        exact = NearestNeighbors(n_neighbors=NUM_NEIGHBORS, metric="cosine", algorithm="brute").fit(reference)
        ours, theirs, found = [], [], []
        for _ in range(repeats):
            queries = source.draw(num_queries)
            start = time.perf_counter()
            rows, _distances = index.neighbors(queries, num_neighbors=NUM_NEIGHBORS)
            ours.append(1e3 * (time.perf_counter() - start) / num_queries)
            scaled = (queries - index.mean) / index.scale
            start = time.perf_counter()
            truth = exact.kneighbors(scaled, return_distance=False)
            theirs.append(1e3 * (time.perf_counter() - start) / num_queries)
            found += [len(set(one) & set(other)) / NUM_NEIGHBORS for one, other in zip(rows, truth, strict=True)]
    ratio = statistics.median(their / our for our, their in zip(ours, theirs, strict=True))
    columns = [
        f"{size:,}",
        f"{built:,.0f} s",
        f"{num_bytes / 2**20:,.0f} MiB",
        *(f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})" for times in (ours, theirs)),
        f"{ratio:.1f}",
        f"{np.mean(found):.1%}",
    ]
    return "| " + " | ".join(columns) + " |"


def main() -> None:
    """Print a line a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 200_000], help="cells of the reference")
    parser.add_argument("--queries", type=int, default=200, help="cells asked for at once")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cells", type=Path, default=CELLS, help="real cells to begin with, .h5ad")
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "reference-model")
    options = parser.parse_args()
    real = real_embeddings(options.cells, options.model)
    source = BetweenNeighbors(real)
    print(f"{len(real):,} real cells, {real.shape[1]} numbers each; {options.queries} queries a batch; median (range)")
    print("| cells | build | file | ms a cell, index | ms a cell, exact | ratio | true neighbours found |")
    print("|" + " --- |" * 7)
    for size in options.sizes:
        print(measure(size, source, num_queries=options.queries, repeats=options.repeats), flush=True)


if __name__ == "__main__":
    main()
