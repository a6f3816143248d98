"""The result file of a machine and a day: JSON with every measurement, and a page and a picture made of it."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from scfoundation_hf.tokenization.matrix_reader import CHUNK_ENTRIES

from .jobs import AS_SHIPPED, JOBS, WITH_SDPA
from .measure import MIB, Spread
from .studies import MEASURED, Record

Results = dict[str, Any]
JOB_TITLES = {
    "embed": "Embed: one vector a cell",
    "gene_embeddings": "Gene embeddings: one vector a gene and cell",
    "enhance": "Enhance: all 19,264 predictions",
    "train": "Training step: forward, backward, AdamW",
}
CASE_COLUMNS = (
    "genes",
    "computed by",
    "ms a cell",
    "cells/s",
    "peak MiB",
    "of the floor",
    "times as shipped",
    "times SDPA",
)
# What makes two records measurements of the same thing, so that a later run of the day takes its place.
KEYS = {
    "cases": ("size", "job", "num_genes"),
    "ablation": ("size", "job", "num_genes"),
    "growth": ("size",),
}


# --- The file ------------------------------------------------------------------------------------------------------


def file_stem(machine: Record, date: str) -> str:
    """Name of the files of this machine and date: the GPU, or the processor and its threads."""
    device = machine.get("gpu") or f"{machine['processor']}-{machine['threads']}-threads"
    cleaned = re.sub(r"\((r|tm)\)", "", device.lower())
    return f"{re.sub(r'[^a-z0-9]+', '-', cleaned).strip('-')}-{date}"


def merge(results: Results, part: str, records: list[Record]) -> None:
    """Put the records in, in the place of earlier ones of the same cases."""
    keys = KEYS[part]

    def key(record: Record) -> tuple[Any, ...]:
        return tuple(record[name] for name in keys)

    new = {key(record) for record in records}
    results[part] = [record for record in results.get(part, []) if key(record) not in new] + records


def read(path: Path) -> Results | None:
    """Results of an earlier run; `None`: there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write(results: Results, folder: Path, stem: str) -> list[Path]:
    """JSON, page and picture, each under a temporary name first.

    Returns: what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, page, picture = (folder / f"{stem}.{suffix}" for suffix in ("json", "md", "png"))
    _write_text(data, json.dumps(results, indent=1) + "\n")
    has_picture = draw(results, picture)
    _write_text(page, render(results, picture=picture.name if has_picture else None, data=data.name))
    return [data, page, *([picture] if has_picture else [])]


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


# --- The page ------------------------------------------------------------------------------------------------------


def render(results: Results, *, picture: str | None = None, data: str | None = None) -> str:
    """The page in Markdown."""
    machine = results["machine"]
    title = machine.get("gpu") or machine["processor"]
    parts = [f"# {title}, {machine['threads']} threads, {results['date']}", _describe(results, data)]
    if picture:
        parts.append(f"![Speed of each job against the original's with SDPA; above the bars cells a second]({picture})")
    cases = results.get("cases", [])
    for job in JOBS:
        of_job = [record for record in cases if record["job"] == job]
        if of_job:
            parts.append(f"## {JOB_TITLES[job]}")
        for size in _in_order(record["size"] for record in of_job):
            of_size = [record for record in of_job if record["size"] == size]
            parts.append(f"{size.upper()} model. {_describe_costs(of_size)}")
            parts.append(_case_table(of_size))
    for part, section in (("ablation", _ablation), ("packing", _packing), ("growth", _growth)):
        if results.get(part):
            parts.append(section(results[part]))
    return "\n\n".join(parts) + "\n"


def _describe(results: Results, data: str | None) -> str:
    machine = results["machine"]
    features = ", ".join(machine["processor_features"]) or "none that is asked for"
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "transformers", "scfoundation-hf") if name in machine
    )
    lines = [
        f"Processor: {machine['processor']} ({features}), {machine['memory_gib']} GiB, {machine['threads']} threads.",
        f"{versions}, Python {machine['python']}, {machine['system']}.",
    ]
    if "gpu" in machine:
        lines.insert(0, f"GPU: {machine['gpu']}, {machine['gpu_memory_gib']} GiB, CUDA {machine['cuda']}.")
    rates = "; ".join(
        f"{name} {' and '.join(f'{rate / 1e9:,.0f}' for rate in measured)} GFLOP/s"
        for name, measured in results["matrix_rates"].items()
    )
    lines.append(f"Matrix rate, measured at the beginning and the end of the last run: {rates}.")
    lines.append(f"Cells: real ones of {', '.join(results['files'])}; random weights.")
    lines += [f"Command: `{command}`" for command in results["commands"]]
    if data:
        lines.append(f"Every single measurement: `{data}`.")
    return "  \n".join(lines)


def _describe_costs(records: Sequence[Record]) -> str:
    def gflop(key: str) -> str:
        of_genes = (_of_genes(records, genes)[0] for genes in _genes_of(records))
        return " / ".join(f"{record[key] / 1e9:,.4g}" for record in of_genes)

    return f"GFLOP a cell: {gflop('flops_per_cell')}; by the original's algebra {gflop('plain_flops_per_cell')}."


def _case_table(records: Sequence[Record]) -> str:
    rows = []
    for genes in _genes_of(records):
        of_genes = _of_genes(records, genes)
        baselines = [next((r for r in of_genes if r["variant"] == v.name), None) for v in (AS_SHIPPED, WITH_SDPA)]
        rows += [_case_row(record, baselines) for record in of_genes]
    return _table(CASE_COLUMNS, rows)


def _case_row(record: Record, baselines: Sequence[Record | None]) -> list[str]:
    cells = record["cells_per_call"]
    name = record["variant"] + (f", {cells} cells a call" if cells > 1 else "")
    row = [f"{record['median_num_genes']:,}", name]
    if record["status"] != MEASURED:
        return [*row, record["status"], *[""] * (len(CASE_COLUMNS) - len(row) - 1)]
    spread = Spread.of(record["seconds_per_cell"])
    return [
        *row,
        milliseconds(spread),
        f"{1 / spread.median:,.3g}",
        "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / MIB:,.0f}",
        f"{record['share_of_floor']:.0%}",
        *(_ratio(record, baseline) for baseline in baselines),
    ]


def ratio_of_rounds(record: Record, baseline: Record) -> float:
    """Baseline's seconds a cell over the record's, median of what each round gave."""
    pairs = zip(record["seconds_per_cell"], baseline["seconds_per_cell"], strict=True)
    return median(theirs / ours for ours, theirs in pairs)


def _ratio(record: Record, baseline: Record | None) -> str:
    if baseline is None or baseline["status"] != MEASURED:
        return ""
    return f"{ratio_of_rounds(record, baseline):.2f}"


def milliseconds(spread: Spread) -> str:
    """Median and quartiles in milliseconds; the median alone where there is one measurement."""
    if spread.repeats == 1:
        return f"{1e3 * spread.median:,.4g} (once)"
    return f"{1e3 * spread.median:,.4g} ({1e3 * spread.low:,.4g} to {1e3 * spread.high:,.4g})"


def _ablation(records: Sequence[Record]) -> str:
    columns = ("job", "genes", "switched off", "ms a cell", "times all on", "peak MiB")
    rows = []
    for record in records:
        same = ("size", "job", "num_genes")
        of_case = [other for other in records if all(other[name] == record[name] for name in same)]
        all_on = of_case[0]
        row = [record["job"].replace("_", " "), f"{record['num_genes']:,}", record["path_off"]]
        row[0] += f" {record['size']}, {record['cells_per_call']} cells"
        if record["status"] != MEASURED:
            rows.append([*row, record["status"], "", ""])
            continue
        slower = (
            "" if record is all_on or all_on["status"] != MEASURED else f"{1 / ratio_of_rounds(record, all_on):.2f}"
        )
        peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / MIB:,.0f}"
        rows.append([*row, milliseconds(Spread.of(record["seconds_per_cell"])), slower, peak])
    return "\n\n".join(["## Each fast path switched off, the others on", _table(columns, rows)])


def _packing(record: Record) -> str:
    rows = [[name, f"{share:.1%}"] for name, share in record["wasted"].items()]
    return "\n\n".join(
        [
            "## Tokens computed that belong to no cell",
            f"{record['num_cells']:,} cells of {record['shortest']:,} to {record['longest']:,} tokens; packed batches "
            f"of at most {record['tokens_per_batch']:,} tokens, or one longer cell: on average "
            f"{record['share_of_budget_used']:.0%} of that.",
            _table(("layout", "wasted"), rows),
        ]
    )


def _growth(records: Sequence[Record]) -> str:
    smallest = min(records, key=lambda record: record["num_cells"])
    rows = [
        [
            record["size"].upper(),
            f"{record['num_cells']:,}",
            f"{record['seconds']:.2f}",
            f"{1e3 * record['seconds'] / record['num_cells']:.1f}",
            f"{record['peak_bytes'] / MIB:,.0f}",
            f"{record['peak_bytes'] / smallest['peak_bytes']:.2f}",
        ]
        for record in records
    ]
    columns = ("model", "cells", "seconds", "ms a cell", "peak MiB above the model", "of the smallest's")
    text = (
        "`scfoundation_hf.embed` from file to file, float32; cells of mixed lengths. A file is checked "
        f"{CHUNK_ENTRIES:,} stored entries at a time, so memory rises with files smaller than that and with no others."
    )
    return "\n\n".join(["## Growth with the number of cells", text, _table(columns, rows)])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _of_genes(records: Sequence[Record], num_genes: int) -> list[Record]:
    return [record for record in records if record["num_genes"] == num_genes]


def _genes_of(records: Sequence[Record]) -> list[int]:
    """Numbers of genes that were measured, rising: a later run may have replaced some of them."""
    return sorted({record["num_genes"] for record in records})


def _in_order(values: Iterable[Any]) -> list[Any]:
    """Each once, in the order of first appearance."""
    return list(dict.fromkeys(values))


# --- The picture ---------------------------------------------------------------------------------------------------


def draw(results: Results, path: Path) -> bool:
    """Speed of the largest model as a multiple of the original's with SDPA, a panel a job; above the bars cells/s.

    Returns: whether there was anything to draw.
    """
    measured = [record for record in results.get("cases", []) if record["status"] == MEASURED]
    baselines = {_case_key(record): record for record in measured if record["variant"] == WITH_SDPA.name}
    comparable = [record for record in measured if _case_key(record) in baselines]
    if not comparable:
        return False
    import matplotlib as mpl  # not needed to measure

    mpl.use("agg")
    from matplotlib import pyplot as plt

    size = comparable[-1]["size"]  # the last and largest
    comparable = [record for record in comparable if record["size"] == size]
    jobs = [job for job in JOBS if any(record["job"] == job for record in comparable)]
    names = [name for name in _in_order(record["variant"] for record in comparable) if name != WITH_SDPA.name]
    width = max(3.2 * len(jobs), 5.0)
    figure, panels = plt.subplots(1, len(jobs), figsize=(width, 3.6), squeeze=False, layout="constrained")
    for panel, job in zip(panels[0], jobs, strict=True):
        _draw_job(panel, [record for record in comparable if record["job"] == job], baselines, names)
        panel.set_title(job.replace("_", " "))
    panels[0][0].set_ylabel("times the original, with SDPA")
    figure.legend(*_handles_and_labels(panels[0]), loc="outside lower center", ncols=min(len(jobs), 3), frameon=False)
    figure.suptitle(f"{size.upper()} model, {results['machine'].get('gpu') or results['machine']['processor']}")
    unfinished = path.with_name(f".{path.name}.unfinished")
    figure.savefig(unfinished, format="png", dpi=150)
    plt.close(figure)
    unfinished.replace(path)
    return True


def _draw_job(
    panel: Any, records: Sequence[Record], baselines: dict[tuple[Any, ...], Record], names: Sequence[str]
) -> None:
    genes = _genes_of(records)
    width = 0.8 / len(names)
    panel.axhline(1, color="gray", linewidth=0.8, label=WITH_SDPA.name)
    for number, name in enumerate(names):
        of_name = [record for record in records if record["variant"] == name]
        places = [genes.index(record["num_genes"]) + (number - (len(names) - 1) / 2) * width for record in of_name]
        ratios = [ratio_of_rounds(record, baselines[_case_key(record)]) for record in of_name]
        if not of_name:
            continue
        bars = panel.bar(places, ratios, width, label=name, color=f"C{number}")
        rates = [1 / median(record["seconds_per_cell"]) for record in of_name]
        panel.bar_label(
            bars, [f"{rate:,.0f}" if rate >= 100 else f"{rate:.2g}" for rate in rates], fontsize=7, padding=1
        )
    panel.set_xticks(range(len(genes)), [f"{number:,}" for number in genes])
    panel.set_xlabel("expressed genes")
    panel.spines[["top", "right"]].set_visible(False)


def _handles_and_labels(panels: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """Of all panels, each label once: some variants are in one panel only."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    return list(handles.values()), list(handles)


def _case_key(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in KEYS["cases"])
