"""How much faster several processes embed one file than one process does, each pinned to a core of its own.

    python benchmarks/many_processes.py                               # two processes, the reference model
    python benchmarks/many_processes.py --model scfoundation-cell --processes 4 --cells 2000

The repository's example cells, drawn with replacement. Times are those of whole commands, from start to the written
output: imports, reading, computing, putting the parts together. One process and several take turns; the outputs have
to be the same to the bit. Linux, CPU.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import anndata
import numpy as np
from embedding_memory import resample

REFERENCE_MODEL = Path(__file__).parents[1] / "examples" / "reference-model"


def embed(source: Path, output: Path, model: str, cores: list[int]) -> float:
    """Seconds from the start of the processes, one a core, to the end of the last."""
    command = [sys.executable, "-m", "scfoundation_hf.cli", "embed", str(source), str(output)]
    command += ["--model", model, "--gene-column", "symbol", "--device", "cpu"]
    start = time.perf_counter()
    running = []
    for rank, core in enumerate(cores):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(len(cores)), "OMP_NUM_THREADS": "1"}
        pin = partial(os.sched_setaffinity, 0, [core])
        running.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=pin
            )
        )
    for process in running:
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.decode()}")
    return time.perf_counter() - start


def embeddings(path: Path) -> np.ndarray:
    """`(cells, width)` as written."""
    return anndata.read_h5ad(path).obsm["X_scfoundation"]


def main() -> None:
    """Print each round, then the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REFERENCE_MODEL), help="folder; default: the reference model")
    parser.add_argument("--cells", type=int, default=6_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < options.processes:
        sys.exit(f"--processes {options.processes}, but there are {len(cores)} cores; each process needs its own.")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        source = resample(options.cells, Path(folder) / "cells.h5ad")
        for round_number in range(options.repeats):
            outputs = [Path(folder) / f"{name}-{round_number}.h5ad" for name in ("one", "several")]
            one = embed(source, outputs[0], options.model, cores[:1])
            several = embed(source, outputs[1], options.model, cores[: options.processes])
            if not np.array_equal(*map(embeddings, outputs)):
                sys.exit(f"The outputs of 1 and {options.processes} processes differ.")
            ratios.append(one / several)
            print(f"1 process {one:.1f} s, {options.processes} processes {several:.1f} s: {ratios[-1]:.2f}", flush=True)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(
        f"{options.processes} processes are {statistics.median(ratios):.2f} times as fast as 1 ({spread}; "
        f"{options.cells:,} cells, {time.strftime('%Y-%m-%d')})"
    )


if __name__ == "__main__":
    main()
