"""Measuring, the studies, the report, and the command as a whole."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import speed
import torch
from allocation import allocate
from harness import report, studies
from harness.cells import CountedCells
from harness.jobs import DTYPES, JOBS, Case, variants
from harness.measure import (
    MIB,
    FreshProcesses,
    OutOfMemoryError,
    Spread,
    describe_machine,
    matrix_rate,
    time_in_turns,
)
from harness.studies import Effort, measure_ablation, measure_case, measure_growth, measure_packing

CPU = torch.device("cpu")
ONCE = Effort(repeats=1, seconds_per_case=0.0)


# --- Measuring -----------------------------------------------------------------------------------------------------


def test_calls_take_turns_and_the_first_round_warms_up():
    order: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    seconds = time_in_turns({"a": call("a"), "b": call("b")}, repeats=3, budget_s=60.0, device=CPU)
    assert order == ["a", "b"] * 4
    assert [len(taken) for taken in seconds.values()] == [3, 3]


def test_a_round_that_fills_the_budget_counts():
    seconds = time_in_turns({"slow": lambda: time.sleep(0.05)}, repeats=3, budget_s=0.06, device=CPU)
    assert len(seconds["slow"]) == 1
    assert seconds["slow"][0] == pytest.approx(0.05, rel=0.5)


def test_what_runs_out_of_memory_is_left_out():
    calls = {"too much": lambda: torch.empty(2**58), "enough": lambda: None}
    seconds = time_in_turns(calls, repeats=2, budget_s=60.0, device=CPU)
    assert seconds["too much"] == []
    assert len(seconds["enough"]) == 2


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        time_in_turns({"wrong": lambda: torch.ones(2, 3) @ torch.ones(2, 3)}, repeats=1, budget_s=1.0, device=CPU)


def test_spread():
    assert Spread.of([3.0, 1.0]) == Spread(2.0, 1.0, 3.0, 2)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0, 5)


@pytest.mark.slow
def test_peak_memory_and_its_limit_in_fresh_processes():
    processes = FreshProcesses(CPU, preload=speed.PRELOADED)
    assert processes.run(allocate, 300) == pytest.approx(300 * MIB, rel=0.05)
    assert processes.run(allocate, 100) == pytest.approx(100 * MIB, rel=0.1)  # not what the one before held
    with pytest.raises(OutOfMemoryError, match="allocate"):
        processes.run(allocate, 2**30)


def test_the_machine_says_what_it_is():
    assert matrix_rate(CPU, torch.float32) > 1e8
    machine = describe_machine(CPU)
    assert machine["processor"]
    assert machine["torch"] == torch.__version__
    assert machine["memory_gib"] > 0


# --- Studies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", JOBS)
def test_a_case_gives_a_record_for_each_variant(make_case: Callable[..., Case], processes, job):
    case = make_case(job, original_cells=1)
    compared = variants(DTYPES)
    records = measure_case(case, compared, effort=ONCE, device=CPU, processes=processes)
    assert [record["variant"] for record in records] == [variant.name for variant in compared]
    for record in records:
        assert record["status"] == "measured"
        assert len(record["seconds_per_cell"]) == 1
        rates = record["matrix_rates"]
        rate = rates["float32"] if record["dtype"] == "float32" else max(rates.values())
        floor = record["flops_per_cell"] / rate
        assert record["share_of_floor"] == pytest.approx(floor / record["seconds_per_cell"][0])
        assert record["plain_flops_per_cell"] >= record["flops_per_cell"] > 0
    assert [record["cells_per_call"] for record in records] == [2, 2, 1, 1]


def test_a_variant_that_runs_out_of_memory_is_recorded(make_case, processes, monkeypatch):
    run = processes.run

    def refuse_the_original(function, case, variant, *arguments):
        if function.__name__ == "peak_of_call" and variant.implementation == "original":
            raise OutOfMemoryError("no")
        return run(function, case, variant, *arguments)

    monkeypatch.setattr(processes, "run", refuse_the_original)
    records = measure_case(make_case("embed"), variants(["float32"]), effort=ONCE, device=CPU, processes=processes)
    assert [record["status"] for record in records] == ["measured", "out of memory", "out of memory"]
    page = report.render(results_of(cases=records))
    assert "| original, as shipped, 2 cells a call | out of memory |" in page


def test_a_variant_whose_model_does_not_fit_beside_the_others_is_recorded(make_case, processes, monkeypatch):
    build = studies.build_model

    def refuse_the_original(case, variant, device):
        if variant.implementation == "original":
            raise MemoryError
        return build(case, variant, device)

    monkeypatch.setattr(studies, "build_model", refuse_the_original)
    effort = replace(ONCE, with_memory=False)
    compared = variants(["float32"])
    records = measure_case(make_case("embed"), compared, effort=effort, device=CPU, processes=processes)
    assert [record["status"] for record in records] == ["measured", "out of memory", "out of memory"]


@pytest.mark.parametrize("job", ["embed", "train"])
def test_an_ablation_gives_a_record_for_each_path(make_case, processes, job):
    records = measure_ablation(make_case(job), effort=ONCE, device=CPU, processes=processes)
    assert records[0]["path_off"] == "all on"
    assert len(records) > (1 if job == "embed" else 4)
    assert all(record["seconds_per_cell"] for record in records)


def test_packing_wastes_nothing_and_padding_does(real_cells: CountedCells):
    cells = real_cells.mixed(100)
    measured = measure_packing(cells, device=CPU)
    lengths = cells.num_expressed + 2
    padded = sum(len(batch) * max(batch) for batch in (lengths[i : i + 8] for i in range(0, 100, 8)))
    assert measured["wasted"]["packed"] == 0
    assert measured["wasted"]["padded, order of the file"] == pytest.approx(1 - lengths.sum() / padded)
    assert 0 < measured["wasted"]["padded, sorted by length"] < measured["wasted"]["padded, order of the file"]
    assert 0.5 < measured["share_of_budget_used"] <= 1


@pytest.mark.filterwarnings("ignore:Transforming to str index")
def test_growth_measures_files_of_growing_size(real_cells, harness_config, processes):
    records = measure_growth(
        harness_config, real_cells, size="tiny", nums_cells=(4, 8), device=CPU, processes=processes
    )
    assert [record["num_cells"] for record in records] == [4, 8]
    assert all(record["seconds"] > 0 for record in records)


# --- Report --------------------------------------------------------------------------------------------------------


def results_of(**parts: object) -> report.Results:
    machine = {
        "processor": "Some(R) Processor 1000",
        "processor_features": ["avx2"],
        "threads": 2,
        "memory_gib": 8.0,
        "system": "Linux",
        "python": "3.11",
        "torch": "2.13.0",
    }
    return {
        "machine": machine,
        "date": "2026-11-22",
        "commands": ["python benchmarks/speed.py"],
        "files": ["cells.h5ad"],
        "matrix_rates": {"float32": [2e11, 2.1e11]},
        **parts,
    }


def record_of(variant: str, seconds: list[float], **changes: object) -> report.Record:
    return {
        "size": "3m",
        "job": "embed",
        "num_genes": 500,
        "median_num_genes": 498,
        "variant": variant,
        "cells_per_call": 1,
        "seconds_per_cell": seconds,
        "share_of_floor": 0.5,
        "peak_bytes": 10 * MIB,
        "flops_per_cell": 1e9,
        "plain_flops_per_cell": 2e9,
        "status": "measured",
        **changes,
    }


def test_the_page_gives_ratios_of_rounds_and_both_baselines():
    ours = record_of("ours, float32", [0.1, 0.2, 0.4])
    shipped = record_of("original, as shipped", [0.5, 0.4, 4.0])
    sdpa = record_of("original, with SDPA", [0.2, 0.4, 0.4])
    page = report.render(results_of(cases=[ours, shipped, sdpa]))
    # Medians of 5, 2, 10 and of 2, 2, 1: not the ratios of the medians, which are 2.5 and 2.
    assert "| 498 | ours, float32 | 200 (100 to 400) | 5 | 10 | 50% | 5.00 | 2.00 |" in page
    assert "GFLOP a cell: 1; by the original's algebra 2." in page
    assert "float32 200 and 210 GFLOP/s" in page


def test_a_later_run_takes_the_place_of_its_cases_only():
    results: report.Results = {}
    report.merge(results, "cases", [record_of("a", [1.0]), record_of("b", [1.0])])
    report.merge(results, "cases", [record_of("a", [2.0], num_genes=2_000)])
    report.merge(results, "cases", [record_of("a", [3.0])])
    assert [record["seconds_per_cell"] for record in results["cases"]] == [[2.0], [3.0]]


def test_files_are_named_by_machine_and_date():
    assert report.file_stem(results_of()["machine"], "2026-11-22") == "some-processor-1000-2-threads-2026-11-22"
    assert report.file_stem({"gpu": "NVIDIA H100 80GB HBM3"}, "2026-11-22") == "nvidia-h100-80gb-hbm3-2026-11-22"


def test_writing_leaves_data_page_and_picture_and_nothing_else(tmp_path: Path):
    results = results_of(cases=[record_of("ours, float32", [0.1]), record_of("original, with SDPA", [0.2])])
    written = report.write(results, tmp_path, "stem")
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert report.read(tmp_path / "stem.json") == results
    assert "](stem.png)" in (tmp_path / "stem.md").read_text()
    assert (tmp_path / "stem.png").read_bytes().startswith(b"\x89PNG")


# --- The command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_plan(harness_config, processes, monkeypatch) -> speed.Plan:
    monkeypatch.setattr(speed.ScFoundationConfig, "from_preset", lambda size: harness_config)
    monkeypatch.setattr(speed, "FreshProcesses", lambda device, preload: processes)
    monkeypatch.setattr(speed, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(speed, "GROWTH", (2, 4))
    arguments = ["--sizes", "3m", "--genes", "300", "--batch-size", "1", "--jobs", "embed", "train"]
    options = speed.parse_arguments([*arguments, "--dtypes", "float32", "--parts", *speed.PARTS])
    return replace(speed.make_plan(options), effort=ONCE, cells_per_call=1)


@pytest.mark.filterwarnings("ignore:Transforming to str index")
def test_a_run_writes_everything_and_a_second_adds_to_it(tiny_plan, real_cells, tmp_path, capsys):
    speed.run(tiny_plan, real_cells, output=tmp_path, command="first")
    (data,) = tmp_path.glob("*.json")
    results = json.loads(data.read_text())
    assert {record["job"] for record in results["cases"]} == {"embed", "train"}
    assert {record["job"] for record in results["ablation"]} == {"embed", "train"}
    assert [record["num_cells"] for record in results["growth"]] == [2, 4]
    page = data.with_suffix(".md").read_text()
    for title in ("Embed: ", "Training step: ", "Each fast path", "Tokens computed", "Growth with"):
        assert title in page
    assert "of the floor" in capsys.readouterr().err  # progress
    only_embed = replace(tiny_plan, parts=("cases",), jobs=("embed",))
    speed.run(only_embed, real_cells, output=tmp_path, command="second")
    again = json.loads(data.read_text())
    assert again["commands"] == ["first", "second"]
    assert len(again["cases"]) == len(results["cases"])
    assert again["growth"] == results["growth"]


def test_the_batch_of_a_training_step_fits_the_time(tiny_plan, real_cells):
    def case(seconds: float, batch_size: int | None = None) -> Case:
        plan = replace(tiny_plan, batch_size=batch_size, effort=Effort(5, seconds))
        config = speed.ScFoundationConfig()
        return speed.make_case(plan, "100m", config, "train", 500, real_cells, {"float32": 230e9})

    assert (case(3600.0).cells_per_call, case(3600.0).original_cells_per_call) == (8, 8)
    assert (case(60.0).cells_per_call, case(60.0).original_cells_per_call) == (2, 1)  # about 35 s a cell
    assert case(1.0).cells_per_call == 2
    assert case(60.0, batch_size=8).cells_per_call == 8


def test_the_plan_of_the_command_line():
    plan = speed.make_plan(speed.parse_arguments([]))
    assert (plan.parts, plan.sizes, plan.jobs) == (speed.PARTS, ("3m", "10m", "100m"), JOBS)
    assert plan.genes_of("100m", "train", longest=8_000) == (500, 2_000, 5_000)
    assert plan.genes_of("100m", "train", longest=2_100) == (500, 2_000)
    assert plan.genes_of("10m", "train", longest=8_000) == (2_000,)
    asked_for = speed.make_plan(speed.parse_arguments(["--genes", "1000"]))
    assert asked_for.genes_of("10m", "gene_embeddings", longest=8_000) == (1_000,)
    assert asked_for.parts == ("cases",)
    quick = speed.make_plan(speed.parse_arguments(["--quick"]))
    assert (quick.sizes, quick.genes, quick.effort.repeats) == (("3m",), (500,), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        speed.make_plan(speed.parse_arguments(["--device", "cuda"]))
