"""Peak memory of a training step by the number of cells in it, and the largest batch that a GPU would hold.

    python benchmarks/training_memory.py                          # the 100M model, cells of about 2,000 genes
    python benchmarks/training_memory.py --preset 3m --genes 1000

Real cells, genes hidden by the pretraining collator, forward, backward and AdamW; each step in a process of its own.
Weights (4 bytes a parameter), their gradients and AdamW's moments (12 more) are the fixed part; what a cell adds is
the slope over the batch sizes. With the CPU's own trick off, the decoder's feed-forward in chunks, a step holds what it
would on a GPU: from that slope, and `RESERVED_BYTES` for what a GPU holds beside it, the largest batch is worked out,
not measured. Linux on CPU.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import torch
from harness.cells import SHIPPED_CELLS, read_cells
from harness.fast_paths import FAST_PATHS
from harness.jobs import DTYPES, Case, Variant, used_parameters
from harness.measure import FreshProcesses, OutOfMemoryError
from harness.studies import peak_of_call
from speed import PRELOADED, SHARED_CELLS

from scfoundation_hf.configuration.configuration_scfoundation import PRESETS, ScFoundationConfig

GIB = 2**30
GPU_BYTES = {"80 GB": 80e9, "139 GB": 139e9}
RESERVED_BYTES = 4 * GIB  # CUDA's context, chunks of the decoder's features (512 MB each there), fragmentation
CPU = torch.device("cpu")
FEED_FORWARD_IN_CHUNKS = next(i for i, path in enumerate(FAST_PATHS) if "feed-forward" in path.name)


def main() -> None:
    """Print a line a measurement, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="100m")
    parser.add_argument("--genes", type=int, default=2000, help="expressed genes a cell, about")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--data", nargs="+", type=Path, help=".h5ad files of raw counts, or folders of them")
    options = parser.parse_args()
    cells = read_cells(options.data or [SHARED_CELLS if SHARED_CELLS.is_dir() else SHIPPED_CELLS])
    config = ScFoundationConfig.from_preset(options.preset)
    processes = FreshProcesses(CPU, preload=PRELOADED)
    cases = {
        size: Case(options.preset, config, "train", options.genes, cells.near(options.genes, num_cells=size), size)
        for size in options.batch_sizes
    }
    weights = 4 * used_parameters(next(iter(cases.values())))
    rows = []
    for dtype, checkpointing, as_on_gpu in product(options.dtypes, (False, True), (False, True)):
        variant = Variant("ours", "ours", dtype, checkpointing=checkpointing)
        path_off = FEED_FORWARD_IN_CHUNKS if as_on_gpu else None
        peaks: dict[int, int] = {}
        for size, case in cases.items():
            what = f"{dtype}, checkpointing {checkpointing}, as on a GPU {as_on_gpu}, {size} cells"
            try:
                above = processes.run(peak_of_call, case, variant, CPU, path_off)
            except OutOfMemoryError:
                print(f"{what}: more than this machine has", flush=True)
                break
            peaks[size] = weights + above
            print(f"{what}: {peaks[size] / GIB:.2f} GiB", flush=True)
        if len(peaks) < 2:
            continue
        a_cell, fixed = np.polyfit(list(peaks), list(peaks.values()), 1)
        fits = [f"{int((room - RESERVED_BYTES - fixed) // a_cell)}" if as_on_gpu else "" for room in GPU_BYTES.values()]
        row = [
            dtype,
            "yes" if checkpointing else "no",
            "as on a GPU" if as_on_gpu else "CPU",
            *(f"{peaks[size] / GIB:.1f} GiB" if size in peaks else "" for size in options.batch_sizes),
            *(f"{number / GIB:.2f} GiB" for number in (a_cell, fixed)),
            *fits,
        ]
        rows.append("| " + " | ".join(row) + " |")
    sizes = [f"{size} cells" for size in options.batch_sizes]
    heads = ["dtype", "checkpointing", "computed", *sizes, "a cell", "fixed", *GPU_BYTES]
    print(f"\n{options.preset}, cells of about {options.genes:,} genes; worked out: the largest batch that fits\n")
    print("| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), *rows, sep="\n")


if __name__ == "__main__":
    main()
