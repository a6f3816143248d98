"""Peak memory of `enhance` from one .h5ad to another, above the loaded model, and cells/s, for files of growing size.

    python benchmarks/enhancement_memory.py                       # 1,250 to 5,000 cells x 19,264 genes, a thin model
    python benchmarks/enhancement_memory.py --min-value 0.1 --suffix .zarr
    python benchmarks/enhancement_memory.py --preset 3m --cells 100 200

The cells are the repository's example cells, drawn with replacement. The default model predicts all genes with a thin
encoder and decoder: its arithmetic is not the subject. Each size runs in a process of its own; the ratio printed is
peak memory against the smallest file's.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import anndata
import psutil
import torch
from embedding_memory import resample

import scfoundation_hf
from scfoundation_hf.corpus.worker_processes import end_with_parent
from scfoundation_hf.inference.enhancement import enhance

THIN = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 1,
    "decoder_head_dim": 8,
    "decoder_intermediate_size": 16,
}


def measure(source: Path, output: Path, preset: str, min_value: float | None) -> tuple[int, float]:
    """Enhance one file; returns peak bytes above the model, and seconds."""
    configuration = scfoundation_hf.ScFoundationConfig
    config = configuration(**THIN) if preset == "thin" else configuration.from_preset(preset)
    model = scfoundation_hf.ScFoundationForPreTraining(config).eval()
    anndata.read_h5ad(source, backed="r").file.close()  # what libraries load belongs to the baseline
    with torch.inference_mode():  # and what thread pools and kernels allocate at their first call
        model(torch.tensor([[0, 1, 19264, 19265]]), torch.ones(1, 4))
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    enhance(source, model, output=output, depth_fold=2, min_value=min_value, gene_column="symbol", progress=False)
    seconds = time.perf_counter() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, seconds


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(part.stat().st_size for part in (path.rglob("*") if path.is_dir() else [path]))


def main() -> None:
    """Print one row a file size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[1_250, 2_500, 5_000])
    parser.add_argument("--preset", default="thin", choices=["thin", "3m", "10m", "100m"])
    parser.add_argument("--min-value", type=float)
    parser.add_argument("--suffix", default=".h5ad", choices=[".h5ad", ".zarr"])
    arguments = parser.parse_args()
    smallest = None
    print(f"model {arguments.preset}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}")
    print(f"{'cells':>8} {'output MiB':>11} {'above model MiB':>16} {'ratio':>6} {'cells/s':>8}")
    for num_cells in arguments.cells:
        with tempfile.TemporaryDirectory() as folder:
            source = resample(num_cells, Path(folder) / "cells.h5ad")
            output = Path(folder) / f"out{arguments.suffix}"
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
                peak, seconds = pool.submit(measure, source, output, arguments.preset, arguments.min_value).result()
            smallest = smallest or peak
            print(
                f"{num_cells:>8,} {size_of(output) / 2**20:>11.0f} {peak / 2**20:>16.0f} {peak / smallest:>6.2f} "
                f"{num_cells / seconds:>8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
