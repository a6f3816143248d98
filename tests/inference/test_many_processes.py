"""Several processes share one file: the same output to the bit, one message, and any number of them goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import pytest
import torch

from scfoundation_hf.inference import many_processes
from scfoundation_hf.inference.embedding import embed
from scfoundation_hf.inference.enhancement import enhance
from scfoundation_hf.inference.many_processes import Processes
from scfoundation_hf.inference.writer import rows_noted

OPTIONS = {"gene_column": "symbol", "progress": False, "tokens_per_batch": 1000}


@pytest.fixture
def cells_file(example_cells, tmp_path) -> Path:
    anndata.read_h5ad(example_cells)[::32].copy().write_h5ad(tmp_path / "cells.h5ad")  # 25 cells
    return tmp_path / "cells.h5ad"


@pytest.fixture
def as_process(monkeypatch):
    def pretend(rank: int, count: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(count))

    return pretend


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two processes on one machine, as `accelerate launch` starts them too."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*torchrun, "-m", "scfoundation_hf.cli", *map(str, arguments)], capture_output=True, text=True, timeout=500
    )


def arguments(cells_file: Path, output: Path, model: Path) -> list[object]:
    options = ["--gene-column", "symbol", "--tokens-per-batch", 1000]
    return ["embed", cells_file, output, "--model", model, *options]


def test_launched_processes_write_what_one_writes(cells_file, tiny_model_dir, tmp_path):
    run = launch(*arguments(cells_file, tmp_path / "out.h5ad", tiny_model_dir))
    assert run.returncode == 0, run.stderr
    one = embed(cells_file, tiny_model_dir, output=tmp_path / "one.h5ad", **OPTIONS)
    assert (tmp_path / "out.h5ad").read_bytes() == one.read_bytes()
    assert run.stderr.count("genes found") == 1
    assert "Embedding (process 1 of 2)" in run.stderr
    assert not (tmp_path / "out.h5ad.progress").exists()


def test_an_error_of_launched_processes_is_one_message(cells_file, tiny_model_dir, tmp_path):
    run = launch(*arguments(cells_file, tmp_path / "out.h5ad", tiny_model_dir), "--layer", "nowhere")
    assert run.returncode != 0
    assert [line for line in run.stderr.splitlines() if line.startswith("Error:")] == [
        f"Error: {cells_file} has no layer 'nowhere'. Its layers: none."
    ]
    assert sorted(tmp_path.iterdir()) == [cells_file]


def test_the_last_of_a_job_array_writes_the_output(cells_file, tiny_model_dir, tmp_path, as_process):
    one = embed(cells_file, tiny_model_dir, output=tmp_path / "one.h5ad", **OPTIONS)
    output = tmp_path / "out.h5ad"
    for rank in (2, 0, 1):
        assert not output.exists()
        as_process(rank, 3)
        assert embed(cells_file, tiny_model_dir, output=output, **OPTIONS) == output
    assert output.read_bytes() == one.read_bytes()
    assert not (tmp_path / "out.h5ad.progress").exists()


def test_enhance_is_shared_likewise(cells_file, tiny_model_dir, tmp_path, as_process):
    options = {"gene_column": "symbol", "progress": False, "cells_per_batch": 4, "depth_fold": 2}
    one = enhance(cells_file, tiny_model_dir, output=tmp_path / "one.h5ad", **options)
    for rank in (0, 1):
        as_process(rank, 2)
        enhance(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", **options)
    assert (tmp_path / "out.h5ad").read_bytes() == one.read_bytes()


def test_a_process_for_which_nothing_is_left_leaves_no_trace(cells_file, tiny_model_dir, tmp_path, as_process):
    as_process(40, 41)  # there are fewer batches
    embed(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", **OPTIONS)
    assert sorted(tmp_path.iterdir()) == [cells_file]


def test_a_process_says_when_others_are_not_done(cells_file, tiny_model_dir, tmp_path, as_process, capsys):
    as_process(0, 2)
    embed(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", **{**OPTIONS, "progress": True})
    assert "Process 0 has done its share; the one that ends last writes" in capsys.readouterr().err


def test_a_killed_run_goes_on_with_another_number_of_processes(cells_file, tiny_model_dir, tmp_path, as_process):
    script = f"""
import os, time
from scfoundation_hf.inference import embedding
plain = embedding.embed_batch
def slow(*arguments):
    time.sleep(0.5)
    return plain(*arguments)
embedding.embed_batch = slow
embedding.embed({str(cells_file)!r}, {str(tiny_model_dir)!r}, output={str(tmp_path / "out.h5ad")!r},
    gene_column="symbol", tokens_per_batch=1000, progress=False)
"""
    folder = tmp_path / "out.h5ad.progress"
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = sum(rows_noted(path) for path in folder.glob("*.rows"))
    assert 0 < done < 25
    one = embed(cells_file, tiny_model_dir, output=tmp_path / "one.h5ad", **OPTIONS)
    resumed = embed(cells_file, tiny_model_dir, output=tmp_path / "out.h5ad", **OPTIONS)  # alone
    assert resumed.read_bytes() == one.read_bytes()
    assert not folder.exists()


def test_an_error_of_one_process_keeps_the_work_of_the_others(
    cells_file, tiny_model_dir, tmp_path, as_process, monkeypatch
):
    from scfoundation_hf.inference import embedding

    def fail(*_):
        raise RuntimeError("device on fire")

    monkeypatch.setattr(many_processes, "SECONDS_FOR_THE_FIRST", 0)
    output = tmp_path / "out.h5ad"
    as_process(0, 2)
    embed(cells_file, tiny_model_dir, output=output, **OPTIONS)
    as_process(1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(embedding, "embed_batch", fail)
        with pytest.raises(RuntimeError, match="on fire"):
            embed(cells_file, tiny_model_dir, output=output, **OPTIONS)
    assert json.loads((tmp_path / "out.h5ad.progress" / "job.json").read_text())
    embed(cells_file, tiny_model_dir, output=output, **OPTIONS)
    assert output.exists()


def test_processes_are_numbered_by_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.from_environment() == Processes()
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Processes.from_environment() == Processes(rank=5, count=8)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Processes.from_environment() == Processes(rank=5, count=8, local_rank=1, local_count=4)
    monkeypatch.setenv("RANK", "8")
    with pytest.raises(ValueError, match=r"does not number processes: RANK counts from 0 .* --array=0-7"):
        Processes.from_environment()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="not all are whole numbers"):
        Processes.from_environment()


def test_each_process_takes_its_own_gpu_and_its_share_of_the_cores(monkeypatch):
    second = Processes(rank=1, count=4, local_rank=1, local_count=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert second.share_of(torch.device("cuda")) == torch.device("cuda:1")
    assert second.share_of(torch.device("cuda:0")) == torch.device("cuda:0")
    assert Processes().share_of(torch.device("cuda")) == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"2 processes were launched on a machine with 1 GPUs.*Launch 1\."):
        second.share_of(torch.device("cuda"))
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert second.share_of(torch.device("cpu")) == torch.device("cpu")
    assert threads == [4]
