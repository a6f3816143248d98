"""How fast and in how much memory each job runs, against the original's computation, in one run.

    python benchmarks/speed.py --output docs/benchmarks                  # what `make bench` runs, about 35 minutes
    python benchmarks/speed.py --output docs/benchmarks --device cuda    # `make bench-gpu`, under 10 minutes
    python benchmarks/speed.py --quick                                   # a minute or two; prints, writes nothing
    python benchmarks/speed.py --sizes 3m --jobs train --genes 1000 --batch-size 8 --repeats 7

Cells are real, weights random. Ours and the baseline (harness/original.py: one cell at a time, float32, everything
held whole; once as shipped and once with its attention through SDPA) are timed in turns, and peak memory is measured
in processes of their own. Results go to one file per machine and date; a later run of the same day adds its cases.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import report
from harness.cells import REPOSITORY, SHIPPED_CELLS, CountedCells, read_cells
from harness.checkout import is_expressible
from harness.jobs import DTYPES, JOBS, Case, DtypeName, JobName, cells_per_call, flops_per_cell, variants
from harness.measure import FreshProcesses, describe_machine, matrix_rate
from harness.studies import Effort, measure_ablation, measure_case, measure_growth, measure_packing

from scfoundation_hf.configuration.configuration_scfoundation import PRESETS, ScFoundationConfig

PARTS = ("cases", "ablation", "packing", "growth")
SHARED_CELLS = REPOSITORY.parent / "shared" / "data"  # beside the maintainers' clone
NUM_GENES = (500, 2_000, 5_000)
MIDDLE_NUM_GENES = NUM_GENES[1]
SECONDS_PER_CASE = {"cpu": 45.0, "cuda": 5.0}
GROWTH = (64, 128, 256, 512)
NUM_MIXED_CELLS = 512
PRELOADED = [
    "anndata",
    "scfoundation_hf.inference.cell_job",
    "scfoundation_hf.inference.embedding",
    "scfoundation_hf.modeling_scfoundation.modeling_scfoundation",
    "scfoundation_hf.tokenization.tokenization_scfoundation",
]
# A first guess at the share of the matrix rate that a training step reaches, to choose its batch by.
EXPECTED_SHARE = 0.35


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        parts, sizes, jobs, dtypes: which.
        genes: expressed genes a cell; `None`: those of `NUM_GENES` that there are cells for, see `genes_of`.
        device: where.
        effort: how long.
        batch_size: cells of a training step; `None`: 8, or fewer where such a step would take longer than a case may.
        cells_per_call: cells of one call of the other jobs; `None`: as many as our own jobs take.
        original: a checkout of the original to time too.
    """

    parts: tuple[str, ...]
    sizes: tuple[str, ...]
    jobs: tuple[JobName, ...]
    genes: tuple[int, ...] | None
    dtypes: tuple[DtypeName, ...]
    device: torch.device
    effort: Effort
    batch_size: int | None = None
    cells_per_call: int | None = None
    original: Path | None = None

    def genes_of(self, size: str, job: JobName, *, longest: int) -> tuple[int, ...]:
        """Numbers of genes a cell to measure a job at.

        Unless asked for, the middle model, and gene embeddings, which are enhance without its last product, are
        measured at one.
        """
        if self.genes is not None:
            return self.genes
        if size == "10m" or job == "gene_embeddings":
            return (MIDDLE_NUM_GENES,)
        return tuple(num_genes for num_genes in NUM_GENES if num_genes <= longest)


def iterate_cases(plan: Plan, cells: CountedCells, rates: dict[str, float]) -> Iterator[Case]:
    """The cases, small models first."""
    for size in plan.sizes:
        config = ScFoundationConfig.from_preset(size)
        for job in plan.jobs:
            for num_genes in plan.genes_of(size, job, longest=int(cells.num_expressed.max())):
                yield make_case(plan, size, config, job, num_genes, cells, rates)


def make_case(
    plan: Plan,
    size: str,
    config: ScFoundationConfig,
    job: JobName,
    num_genes: int,
    cells: CountedCells,
    rates: dict[str, float],
) -> Case:
    """One case, with as many cells a call as fit its time."""
    if job != "train":
        num_cells = plan.cells_per_call or cells_per_call(job, num_genes=num_genes, device=plan.device, batch_size=1)
        return Case(size, config, job, num_genes, cells.near(num_genes, num_cells=num_cells), num_cells)
    case = Case(size, config, job, num_genes, cells.near(num_genes, num_cells=8), cells_per_call=1)
    seconds_per_cell = flops_per_cell(case, algebra="plain") / (EXPECTED_SHARE * rates["float32"])
    batch_size = plan.batch_size or 8
    while plan.batch_size is None and batch_size > 2 and batch_size * seconds_per_cell > plan.effort.seconds_per_case:
        batch_size //= 2
    # The original goes through its cells one by one: more of them only average.
    of_original = batch_size if batch_size * seconds_per_cell < plan.effort.seconds_per_case / 10 else 1
    drawn = cells.near(num_genes, num_cells=batch_size)
    return Case(size, config, job, num_genes, drawn, batch_size, of_original)


def run(plan: Plan, cells: CountedCells, *, output: Path | None, command: str) -> report.Results:
    """Measure all of the plan; with `output`, write after every case, so that an interrupted run leaves what it has."""
    machine, date = describe_machine(plan.device), time.strftime("%Y-%m-%d")
    stem = report.file_stem(machine, date)
    earlier = report.read(output / f"{stem}.json") if output else None
    results: report.Results = earlier or {"date": date, "commands": []}
    results |= {"machine": machine, "files": list(cells.files)}
    results["commands"].append(command)
    rates = {dtype: matrix_rate(plan.device, getattr(torch, dtype)) for dtype in DTYPES}
    results["matrix_rates"] = {dtype: [rate] for dtype, rate in rates.items()}
    say(f"{machine.get('gpu') or machine['processor']}, {machine['threads']} threads; matrix rate " + show_rates(rates))
    processes = FreshProcesses(plan.device, preload=PRELOADED)

    def save() -> None:
        if output:
            report.write(results, output, stem)

    if "cases" in plan.parts:
        for case in iterate_cases(plan, cells, rates):
            checkout = plan.original
            if checkout and not is_expressible(case.config):
                say(f"The original's own code cannot build the {case.size} model, so it is not timed.")
                checkout = None
            compared = variants(plan.dtypes, checkpointing=case.job == "train", checkout=checkout)
            records = measure_case(case, compared, effort=plan.effort, device=plan.device, processes=processes)
            report.merge(results, "cases", records)
            say(*(show_record(record) for record in records))
            save()
    if "ablation" in plan.parts:
        size = plan.sizes[len(plan.sizes) // 2]
        num_genes = plan.genes[len(plan.genes) // 2] if plan.genes else MIDDLE_NUM_GENES
        for job in plan.jobs:
            case = make_case(plan, size, ScFoundationConfig.from_preset(size), job, num_genes, cells, rates)
            records = measure_ablation(case, effort=plan.effort, device=plan.device, processes=processes)
            report.merge(results, "ablation", records)
            say(*(f"{size:>5} {job:<15} {record['path_off']}" for record in records))
            save()
    if "packing" in plan.parts:
        results["packing"] = measure_packing(cells.mixed(NUM_MIXED_CELLS), device=plan.device)
    if "growth" in plan.parts:
        size = plan.sizes[0]
        config = ScFoundationConfig.from_preset(size)
        records = measure_growth(config, cells, size=size, nums_cells=GROWTH, device=plan.device, processes=processes)
        report.merge(results, "growth", records)
    for dtype, measured in results["matrix_rates"].items():
        measured.append(matrix_rate(plan.device, getattr(torch, dtype)))
    save()
    return results


def say(*lines: str) -> None:
    """Progress, at once and apart from the report."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def show_rates(rates: dict[str, float]) -> str:
    """Matrix rates in words."""
    return ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())


def show_record(record: report.Record) -> str:
    """One line of progress."""
    what = f"{record['size']:>5} {record['job']:<15} {record['median_num_genes']:>5,} genes, {record['variant']:<32}"
    if record["status"] != "measured":
        return f"{what} {record['status']}"
    spread = report.Spread.of(record["seconds_per_cell"])
    peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:>7,.0f} MiB"
    return f"{what} {report.milliseconds(spread):>32} ms a cell, {record['share_of_floor']:>4.0%} of the floor {peak}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the result files; left out: print the page only")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all; with sizes, jobs or genes: cases")
    parser.add_argument("--sizes", nargs="+", choices=PRESETS, help="default: all")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, help="default: all")
    parser.add_argument("--genes", nargs="+", type=int, help="about so many a cell; default: 500, 2000 and 5000")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of a case at most")
    parser.add_argument("--seconds-per-case", type=float, help="for its rounds; default 45, on a GPU 5")
    parser.add_argument("--batch-size", type=int, help="of a training step; default 8, fewer where that takes too long")
    parser.add_argument("--cells-per-call", type=int, help="of the other jobs; default: as many as our own jobs take")
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out peak memory, which runs everything once more"
    )
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument(
        "--data", nargs="+", type=Path, help=".h5ad files of raw counts, or folders of them; default: the shared cells"
    )
    parser.add_argument("--original", type=Path, help="a checkout of biomap-research/scFoundation, to be timed too")
    parser.add_argument("--quick", action="store_true", help="3M model, 500 genes, one round")
    return parser.parse_args(arguments)


def make_plan(options: argparse.Namespace) -> Plan:
    """What the command line asks for.

    Raises: ValueError: if there is no GPU to measure.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU here; leave --device out, or install torch with CUDA.")
    seconds = options.seconds_per_case or SECONDS_PER_CASE.get(device.type, SECONDS_PER_CASE["cpu"])
    if options.quick:
        effort = Effort(repeats=1, seconds_per_case=seconds)
        return Plan(PARTS[:3], PRESETS[:1], JOBS, NUM_GENES[:1], DTYPES, device, effort, batch_size=2)
    asks_for_cases = options.sizes or options.jobs or options.genes
    return Plan(
        parts=tuple(options.parts or (PARTS[:1] if asks_for_cases else PARTS)),
        sizes=tuple(options.sizes or PRESETS),
        jobs=tuple(options.jobs or JOBS),
        genes=tuple(options.genes) if options.genes else None,
        dtypes=tuple(options.dtypes),
        device=device,
        effort=Effort(options.repeats, seconds, with_memory=not options.no_memory),
        batch_size=options.batch_size,
        cells_per_call=options.cells_per_call,
        original=options.original,
    )


def main() -> None:
    """Measure, write, print the page."""
    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    has_shared_cells = SHARED_CELLS.is_dir()
    if not has_shared_cells and not options.data:
        say(f"Measuring with the cells that the repository ships ({SHIPPED_CELLS.name}), which have up to 2,100 genes.")
    paths = options.data or ([SHARED_CELLS] if has_shared_cells else [SHIPPED_CELLS])
    plan = make_plan(options)
    arguments = (Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:])
    command = " ".join(["python", "benchmarks/speed.py", *arguments])
    results = run(plan, read_cells(paths), output=options.output, command=command)
    print(report.render(results))


if __name__ == "__main__":
    main()
