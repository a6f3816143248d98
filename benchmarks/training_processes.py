"""How much faster a CPU trains with a process on each core than with one process of as many threads.

    python benchmarks/training_processes.py CORPUS                    # two cores, the 3M preset, bfloat16
    python benchmarks/training_processes.py CORPUS --processes 4 --dtype float32 --cells-per-step 32

CORPUS comes from `scfoundation prepare`. Both take the same steps of the same cells, shared out among the processes,
and take turns; the rates are those of the training reports, start and imports not counted. Linux.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MICRO_BATCH = 8


def train(corpus: Path, run: Path, options: argparse.Namespace, *, processes: int) -> float:
    """Cells a second of a run in which the processes share the cores, as its report says."""
    threads = options.processes // processes
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    settings = {
        "corpus": corpus,
        "output-dir": run,
        "model": options.model,
        "max-steps": options.steps,
        "per-device-train-batch-size": MICRO_BATCH,
        "effective-batch-size": options.cells_per_step,
        "decoder-positions": 2560,
        "bf16": str(options.dtype == "bfloat16").lower(),
        "use-cpu": "true",
        "eval-strategy": "no",
        "save-strategy": "no",
        "report-to": "none",
    }
    command = [*launcher, "scfoundation_hf.cli", "pretrain", "pretrain-3m"]
    command += [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True, stdout=subprocess.DEVNULL)
    return float(json.loads((run / "training_report.json").read_text())["cells_per_second"])


def main() -> None:
    """Print each round, then the medians of the rates and of their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--model", default="3m", help="a preset, or a folder to continue from")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--cells-per-step", type=int, default=48)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if cores < options.processes:
        sys.exit(f"--processes {options.processes}, but there are {cores} cores; each process needs its own.")
    if options.cells_per_step % (MICRO_BATCH * options.processes):
        sys.exit(f"--cells-per-step must be a multiple of {MICRO_BATCH} x {options.processes} (--processes).")
    rates: list[tuple[float, float]] = []
    for round_number in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            one, several = (
                train(options.corpus, Path(folder) / f"run-{processes}", options, processes=processes)
                for processes in (1, options.processes)
            )
        rates.append((one, several))
        print(
            f"Round {round_number + 1}: 1 process of {options.processes} threads {one:.2f} cells/s, "
            f"{options.processes} processes {several:.2f}: {several / one:.2f}",
            flush=True,
        )
    ratios = [several / one for one, several in rates]
    fastest = statistics.median(several for _, several in rates)
    print(
        f"{options.processes} processes train {statistics.median(ratios):.2f} times as fast as 1 of as many threads "
        f"({min(ratios):.2f} to {max(ratios):.2f}), {fastest:.2f} cells/s; {options.model}, {options.dtype}, "
        f"{time.strftime('%Y-%m-%d')}"
    )


if __name__ == "__main__":
    main()
