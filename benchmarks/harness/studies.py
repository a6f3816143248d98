"""What is measured: each case against the baseline, each fast path on and off, packing, and growth with the cells."""

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scfoundation_hf
from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.inference.cell_job import TOKENS_PER_BATCH, batch_borders

from .cells import CountedCells
from .fast_paths import FAST_PATHS, FastPath
from .jobs import (
    DTYPES,
    Case,
    Variant,
    build_model,
    build_optimizer,
    flops_per_cell,
    least_bytes_per_cell,
    make_call,
    used_parameters,
)
from .measure import (
    FreshProcesses,
    MatrixProduct,
    OutOfMemoryError,
    Spread,
    memory_held,
    out_of_memory_as_error,
    peak_memory,
    time_in_turns,
)

Record = dict[str, Any]
MEASURED, OUT_OF_MEMORY = "measured", "out of memory"
OURS = Variant("ours, float32", "ours")
CELLS_OF_PADDED_BATCH = 8


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        repeats: rounds at most.
        seconds_per_case: for the rounds of one case; one always runs.
        with_memory: measure peak memory too, which runs everything once more.
    """

    repeats: int = 5
    seconds_per_case: float = 45.0
    with_memory: bool = True


# --- Ours against the baseline -------------------------------------------------------------------------------------


def measure_case(
    case: Case,
    variants: Sequence[Variant],
    *,
    effort: Effort,
    device: torch.device,
    processes: FreshProcesses,
) -> list[Record]:
    """One record a variant: seconds a cell of every round, peak memory, operations and the share of the floor.

    The floor is the least number of operations at the machine's matrix rate, measured in the same rounds. What may be
    bfloat16 may also be computed in float32, so its rate is the higher of the two: without matrix units for bfloat16
    that is float32's. A variant that runs out of memory is recorded as such and not timed.
    """
    peaks: dict[str, int] = {}
    runnable = list(variants)
    for variant in variants if effort.with_memory else ():
        try:
            peaks[variant.name] = processes.run(peak_of_call, case, variant, device)
        except OutOfMemoryError:
            runnable.remove(variant)
    seconds, rates = processes.run(time_variants, case, runnable, effort, device)
    costs = {
        "flops_per_cell": flops_per_cell(case, algebra="reduced"),
        "plain_flops_per_cell": flops_per_cell(case, algebra="plain"),
    }
    num_parameters = used_parameters(case)
    records = []
    for variant in variants:
        num_cells = case.num_cells(variant)
        per_cell = [taken / num_cells for taken in seconds.get(variant.name, [])]
        record = {
            "size": case.size,
            "job": case.job,
            "num_genes": case.num_genes,
            "median_num_genes": int(np.median(case.cells.num_expressed)),
            "variant": variant.name,
            "dtype": variant.dtype,
            "cells_per_call": num_cells,
            **costs,
            "least_bytes_per_cell": least_bytes_per_cell(case, num_parameters=num_parameters, dtype=variant.dtype),
            "matrix_rates": rates,
            "status": MEASURED if per_cell else OUT_OF_MEMORY,
        }
        if per_cell:
            rate = rates["float32"] if variant.dtype == "float32" else max(rates.values())
            record |= {
                "seconds_per_cell": per_cell,
                "share_of_floor": costs["flops_per_cell"] / rate / Spread.of(per_cell).median,
                "peak_bytes": peaks.get(variant.name),
            }
        records.append(record)
    return records


def time_variants(
    case: Case, variants: Sequence[Variant], effort: Effort, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each variant's call, in turns, and the matrix rate of each dtype in the same rounds.

    A variant for which the memory does not suffice beside the others is missing, or has no seconds.
    """
    shared: dict[Any, tuple[torch.nn.Module, torch.optim.Optimizer | None]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for variant in variants:
        key = variant.model_key(case.job)
        with suppress(OutOfMemoryError), out_of_memory_as_error():
            if key not in shared:
                model = build_model(case, variant, device)
                shared[key] = model, build_optimizer(model, case, variant)
            calls[variant.name] = make_call(*shared[key], case, variant, device)
    products = {dtype: MatrixProduct(device, getattr(torch, dtype)) for dtype in DTYPES}
    seconds = time_in_turns(calls | products, repeats=effort.repeats, budget_s=effort.seconds_per_case, device=device)
    rates: dict[str, float] = {
        dtype: product.flops / Spread.of(seconds.pop(dtype)).median for dtype, product in products.items()
    }
    return seconds, rates


def peak_of_call(case: Case, variant: Variant, device: torch.device, path_off: int | None = None) -> int:
    """Peak bytes above the weights of one call; in training gradients and the optimizer's state are part of it.

    Args:
        path_off: place in `FAST_PATHS` of one to switch off.
    """
    model = build_model(case, variant, device)
    gc.collect()
    held = memory_held(device)
    call = make_call(model, build_optimizer(model, case, variant), case, variant, device)
    with nullcontext() if path_off is None else FAST_PATHS[path_off].switched_off(model):  # type: ignore[arg-type]
        return peak_memory(call, above=held, device=device)


# --- Each fast path, on and off ------------------------------------------------------------------------------------


def measure_ablation(case: Case, *, effort: Effort, device: torch.device, processes: FreshProcesses) -> list[Record]:
    """One record for all fast paths on, and one for each that is switched off while the others stay on."""
    paths = [i for i, path in enumerate(FAST_PATHS) if case.job in path.jobs]
    seconds = processes.run(time_fast_paths, case, paths, effort, device)
    records = []
    for name, path_off in [("all on", None), *((FAST_PATHS[i].name, i) for i in paths)]:
        peak = None
        if effort.with_memory:
            with suppress(OutOfMemoryError):  # and it was not timed either
                peak = processes.run(peak_of_call, case, OURS, device, path_off)
        record = {"size": case.size, "job": case.job, "num_genes": case.num_genes, "path_off": name}
        record |= {"cells_per_call": case.cells_per_call, "peak_bytes": peak}
        taken = [second / case.cells_per_call for second in seconds[name]]
        records.append(record | {"status": MEASURED if taken else OUT_OF_MEMORY, "seconds_per_cell": taken})
    return records


def time_fast_paths(case: Case, paths: Sequence[int], effort: Effort, device: torch.device) -> dict[str, list[float]]:
    """Seconds of our call with all paths on, and with each of these off, in turns."""
    model = build_model(case, OURS, device)
    call = make_call(model, build_optimizer(model, case, OURS), case, OURS, device)

    def without(path: FastPath) -> Callable[[], None]:
        def run() -> None:
            with path.switched_off(model):  # type: ignore[arg-type]
                call()

        return run

    calls = {"all on": call} | {FAST_PATHS[i].name: without(FAST_PATHS[i]) for i in paths}
    return time_in_turns(calls, repeats=effort.repeats, budget_s=effort.seconds_per_case, device=device)


# --- Packing -------------------------------------------------------------------------------------------------------


def measure_packing(cells: CountedCells, *, device: torch.device) -> Record:
    """Share of the computed tokens that belong to no cell, for cells of mixed lengths in the order of a file.

    Packed as `embed` packs them; padded, in batches of a few cells, in the same order and sorted by length.
    """
    lengths = cells.encoded.lengths
    budget = TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"])
    borders = batch_borders(lengths, budget)
    packed = [lengths[start:end] for start, end in pairwise(borders)]
    computed = {
        "packed": sum(int(batch.sum()) for batch in packed),
        "padded, order of the file": _padded_tokens(lengths),
        "padded, sorted by length": _padded_tokens(np.sort(lengths)),
    }
    return {
        "num_cells": len(lengths),
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "tokens_per_batch": budget,
        "share_of_budget_used": float(np.mean([batch.sum() for batch in packed[:-1]]) / budget),
        "wasted": {name: 1 - int(lengths.sum()) / tokens for name, tokens in computed.items()},
    }


def _padded_tokens(lengths: np.ndarray) -> int:
    batches = np.split(lengths, range(CELLS_OF_PADDED_BATCH, len(lengths), CELLS_OF_PADDED_BATCH))
    return sum(len(batch) * int(batch.max()) for batch in batches)


# --- Growth with the number of cells -------------------------------------------------------------------------------


def measure_growth(
    config: ScFoundationConfig,
    cells: CountedCells,
    *,
    size: str,
    nums_cells: Sequence[int],
    device: torch.device,
    processes: FreshProcesses,
) -> list[Record]:
    """Seconds and peak memory above the model of embedding files of growing size, reading and writing included."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "few.h5ad"
        cells.mixed(4).as_anndata().write_h5ad(few)
        for num_cells in nums_cells:
            source = Path(folder) / f"{num_cells}.h5ad"
            cells.mixed(num_cells).as_anndata().write_h5ad(source)
            seconds, peak = processes.run(embed_file, config, source, few, device)
            records.append({"size": size, "num_cells": num_cells, "seconds": seconds, "peak_bytes": peak})
    return records


def embed_file(config: ScFoundationConfig, source: Path, few_cells: Path, device: torch.device) -> tuple[float, int]:
    """Seconds, and peak bytes above the model, of `scfoundation_hf.embed` from file to file."""
    torch.manual_seed(0)
    model = scfoundation_hf.ScFoundationModel(config).eval().to(device)
    output = source.with_name("output.h5ad")

    def embed(path: Path) -> None:
        scfoundation_hf.embed(path, model, output=output, overwrite=True, progress=False)

    embed(few_cells)  # libraries load, pools start
    gc.collect()
    held = memory_held(device)
    start = time.perf_counter()
    peak = peak_memory(lambda: embed(source), above=held, device=device)
    return time.perf_counter() - start, peak
