"""Peak memory of `embed` from an .h5ad on disk, above the loaded model, and cells/s, for files of growing size.

    python benchmarks/embedding_memory.py                         # 2,500 to 20,000 cells, a thin model of full width
    python benchmarks/embedding_memory.py --preset 100m --cells 100 200

The cells are the repository's example cells, drawn with replacement. The default model has the released width (so the
results are as large as the released model's, 3,072 numbers a cell) but one thin layer: its arithmetic is not the
subject. Each size runs in a process of its own; the ratio printed is peak memory against the smallest file's.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import anndata
import numpy as np
import psutil
import torch

import scfoundation_hf
from scfoundation_hf.corpus.worker_processes import end_with_parent

CELLS = Path(__file__).parents[1] / "examples" / "data" / "zheng_facs_pbmc_cut.h5ad"
THIN = {"num_hidden_layers": 1, "intermediate_size": 64, "decoder_num_hidden_layers": 1}


def resample(num_cells: int, path: Path) -> Path:
    """Write that many cells drawn from the example cells."""
    cells = anndata.read_h5ad(CELLS)
    drawn = cells[np.random.default_rng(0).integers(cells.n_obs, size=num_cells)].copy()
    drawn.obs_names_make_unique()
    drawn.write_h5ad(path)
    return path


def measure(source: Path, preset: str, dtype: str) -> tuple[int, float]:
    """Embed one file; returns peak bytes above the model, and seconds."""
    overrides = THIN if preset == "thin" else {}
    config = scfoundation_hf.ScFoundationConfig.from_preset("100m" if preset == "thin" else preset, **overrides)
    model = scfoundation_hf.ScFoundationModel(config).to(getattr(torch, dtype)).eval()
    anndata.read_h5ad(source, backed="r").file.close()  # what libraries load belongs to the baseline
    with torch.inference_mode():  # and what thread pools and kernels allocate at their first call
        model(torch.tensor([[0, 1, 19264, 19265]]), torch.ones(1, 4))
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    scfoundation_hf.embed(source, model, output=source.with_name("out.h5ad"), overwrite=True, progress=False)
    seconds = time.perf_counter() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, seconds


def main() -> None:
    """Print one row a file size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[2_500, 5_000, 10_000, 20_000])
    parser.add_argument("--preset", default="thin", choices=["thin", "3m", "10m", "100m"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    smallest = None
    print(
        f"model {arguments.preset}, {arguments.dtype}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}"
    )
    print(f"{'cells':>8} {'file MiB':>9} {'above model MiB':>16} {'ratio':>6} {'cells/s':>8}")
    for num_cells in arguments.cells:
        with tempfile.TemporaryDirectory() as folder:
            source = resample(num_cells, Path(folder) / "cells.h5ad")
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
                peak, seconds = pool.submit(measure, source, arguments.preset, arguments.dtype).result()
            smallest = smallest or peak
            print(
                f"{num_cells:>8,} {source.stat().st_size / 2**20:>9.0f} {peak / 2**20:>16.0f} {peak / smallest:>6.2f} "
                f"{num_cells / seconds:>8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
