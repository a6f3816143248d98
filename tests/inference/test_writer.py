"""Results on disk: formats, refusal, resumption, nothing half-written."""

import json
import shutil
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import zarr
from filelock import FileLock

from scfoundation_hf.inference import writer
from scfoundation_hf.inference.many_processes import Processes
from scfoundation_hf.inference.writer import (
    CellResults,
    Progress,
    check_output,
    identify_file,
    progress_folder,
    rows_noted,
    write_results,
)


@pytest.fixture
def results() -> CellResults:
    rows = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    return CellResults(obsm={"X_new": rows}, obs={"new_share": np.linspace(0, 1, 20)}, uns={"X_new": '{"a": 1}'})


@pytest.fixture
def cells(example_cells: Path) -> anndata.AnnData:
    cells = anndata.read_h5ad(example_cells)[:20].copy()
    cells.layers["doubled"] = cells.X * 2
    cells.obsm["X_old"] = np.arange(40.0).reshape(20, 2)
    return cells


FORMATS = ["h5ad", "zarr2", "zarr3"]


def write(cells: anndata.AnnData, folder: Path, file_format: str, name: str = "in") -> Path:
    if file_format == "h5ad":
        cells.write_h5ad(folder / f"{name}.h5ad")
        return folder / f"{name}.h5ad"
    with anndata.settings.override(zarr_write_format=int(file_format[-1])), warnings.catch_warnings():
        # What anndata and zarr announce about their own formats.
        warnings.filterwarnings("ignore", message="Writing zarr v2|zarr v3 autosharding|Consolidated metadata")
        cells.write_zarr(folder / f"{name}.zarr")
    return folder / f"{name}.zarr"


def read(path: Path) -> anndata.AnnData:
    return anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)


@pytest.mark.parametrize("file_format", FORMATS)
def test_results_are_added_and_all_else_is_kept(cells, results, tmp_path, file_format):
    source = write(cells, tmp_path, file_format)
    output = source.with_stem("out")
    with progress_folder(output) as folder:
        write_results(source, output, results, folder=folder, overwrite=False)
    written = read(output)
    np.testing.assert_array_equal(written.obsm["X_new"], results.obsm["X_new"])
    np.testing.assert_array_equal(written.obs["new_share"], results.obs["new_share"])
    assert json.loads(written.uns["scfoundation"]["X_new"]) == {"a": 1}
    assert list(written.obs.columns) == [*cells.obs.columns, "new_share"]
    assert (written.X != cells.X).nnz == 0
    assert (written.layers["doubled"] != cells.layers["doubled"]).nnz == 0
    np.testing.assert_array_equal(written.obsm["X_old"], cells.obsm["X_old"])
    assert written.var.equals(cells.var)
    assert written.uns["source"] == cells.uns["source"]
    assert sorted(tmp_path.iterdir()) == [source, output, folder]


def test_results_replace_earlier_ones_of_the_same_name(cells, results, tmp_path):
    cells.obsm["X_new"] = np.zeros((20, 3))
    cells.obs["new_share"] = "stale"
    cells.uns["scfoundation"] = {"X_new": "stale", "X_other": "kept"}
    source, output = tmp_path / "in.h5ad", tmp_path / "out.h5ad"
    cells.write_h5ad(source)
    with progress_folder(output) as folder:
        write_results(source, output, results, folder=folder, overwrite=False)
    written = anndata.read_h5ad(output)
    assert written.obsm["X_new"].shape == (20, 6)
    assert written.obs["new_share"].dtype == np.float64
    assert written.uns["scfoundation"] == {"X_new": '{"a": 1}', "X_other": "kept"}


@pytest.mark.parametrize("file_format", FORMATS[1:])
def test_a_consolidated_zarr_shows_what_was_added(cells, results, tmp_path, file_format):
    source = write(cells, tmp_path, file_format)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(source)
    output = tmp_path / "out.zarr"
    with progress_folder(output) as folder:
        write_results(source, output, results, folder=folder, overwrite=False)
    assert "X_new" in zarr.open_group(output, mode="r", use_consolidated=True)["obsm"]


def test_a_file_without_obsm_and_uns_gets_them(cells, results, tmp_path):
    source, output = tmp_path / "in.h5ad", tmp_path / "out.h5ad"
    cells.write_h5ad(source)
    with h5py.File(source, "r+") as file:
        del file["obsm"], file["uns"]
    with progress_folder(output) as folder:
        write_results(source, output, results, folder=folder, overwrite=False)
    assert anndata.read_h5ad(output).obsm["X_new"].shape == (20, 6)


@pytest.mark.parametrize("file_format", FORMATS)
def test_overwriting_replaces_the_whole_output(cells, results, tmp_path, file_format):
    source, output = (write(cells, tmp_path, file_format, name) for name in ("in", "out"))
    with progress_folder(output) as folder:
        write_results(source, output, results, folder=folder, overwrite=True)
    assert "X_new" in read(output).obsm


def test_outputs_that_must_not_be_written_are_refused(cells, tmp_path):
    source = tmp_path / "in.h5ad"
    cells.write_h5ad(source)
    with pytest.raises(ValueError, match=r"must end in \.h5ad"):
        check_output(source, tmp_path / "out.zarr", overwrite=False)
    with pytest.raises(ValueError, match="is the input itself"):
        check_output(source, tmp_path / "." / "in.h5ad", overwrite=True)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_output(source, tmp_path / "nowhere" / "out.h5ad", overwrite=False)
    shutil.copy(source, tmp_path / "there.h5ad")
    with pytest.raises(FileExistsError, match="--overwrite"):
        check_output(source, tmp_path / "there.h5ad", overwrite=False)
    check_output(source, tmp_path / "there.h5ad", overwrite=True)


def progress_of(folder: Path, job: dict, borders=(0, 4, 10), **options) -> Progress:
    return Progress(folder, job, borders=borders, row_shape=(3,), dtype=np.dtype(np.float32), **options)


ROWS = np.arange(30, dtype=np.float32).reshape(10, 3)


def test_rows_survive_a_kill_and_unvouched_rows_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SECONDS_BETWEEN_NOTES", 0)
    progress = progress_of(tmp_path, {"job": 1})
    with progress.part(1) as part:
        part.append(ROWS[4:6])
        part.append(ROWS[6:7])
    with part.path.open("ab") as file:  # killed between writing rows and noting them
        file.write(ROWS[7:9].tobytes()[:-2])
    with progress.completing() as is_complete:
        assert not is_complete
    resumed = progress_of(tmp_path, {"job": 1})
    with resumed.part(1) as part:
        assert part.num_rows_done == 3
        part.append(ROWS[7:])
    with resumed.part(0) as part:
        assert part.num_rows_done == 0
        part.append(ROWS[:4])
    with resumed.completing() as is_complete:
        assert is_complete
        np.testing.assert_array_equal(resumed.rows()[:], ROWS)
        np.testing.assert_array_equal(resumed.rows()[3:6], ROWS[3:6])
        assert resumed.rows()[8:3].shape == (0, 3)
    assert not tmp_path.exists()


def test_rows_are_noted_now_and_then_and_at_the_end_of_a_part(tmp_path):
    progress = progress_of(tmp_path, {"job": 1}, borders=(0, 10))
    with progress.part(0) as part:
        for _ in range(5):
            part.append(np.ones((2, 3), np.float32))
        assert rows_noted(part.path) == 2
    assert rows_noted(part.path) == 10


def test_unfinished_work_of_another_run_is_not_continued(tmp_path):
    with progress_of(tmp_path, {"model": "a", "input": "x"}).part(0) as part:
        part.append(ROWS[:4])
    with pytest.warns(UserWarning, match="another run .it differs in model.*starting from the first cell"):
        fresh = progress_of(tmp_path, {"model": "b", "input": "x"})
    with fresh.part(0) as part:
        assert part.num_rows_done == 0


def test_processes_that_do_not_agree_on_the_job_are_stopped(tmp_path):
    output, second = tmp_path / "out.h5ad", Processes(rank=1, count=2)
    with progress_folder(output, Processes(rank=0, count=2)) as folder:
        progress_of(folder, {"device": "cpu"})
        with (
            pytest.raises(RuntimeError, match=r"working in .* on something else .it differs in device"),
            progress_folder(output, second),
        ):
            progress_of(folder, {"device": "cuda"}, processes=second)
        with progress_folder(output, second):
            progress_of(folder, {"device": "cpu"}, processes=second)


def test_only_one_process_completes_the_work(tmp_path):
    folder = tmp_path / "out.h5ad.progress"
    folder.mkdir()
    progress = progress_of(folder, {"job": 1}, borders=(0, 4))
    with progress.part(0) as part:
        part.append(ROWS[:4])
    with progress.completing() as first, progress.completing() as second:
        assert first
        assert not second
    assert not folder.exists()
    with progress.completing() as is_complete:
        assert not is_complete


def test_the_progress_folder_stays_after_a_kill_and_goes_after_an_error(tmp_path):
    output = tmp_path / "out.h5ad"
    with pytest.raises(KeyboardInterrupt), progress_folder(output) as folder:
        raise KeyboardInterrupt
    assert folder.is_dir()
    with pytest.raises(ValueError, match="broken"), progress_folder(output):
        raise ValueError("broken")
    assert not folder.exists()
    with pytest.raises(ValueError, match="broken"), progress_folder(output, Processes(rank=1, count=2)):
        raise ValueError("broken")
    assert folder.is_dir()  # the work of the others


def test_two_processes_cannot_write_the_same_output(tmp_path):
    output = tmp_path / "out.h5ad"
    folder = tmp_path / "out.h5ad.progress"
    folder.mkdir()
    with (
        FileLock(folder / "process-0.lock"),
        pytest.raises(RuntimeError, match=r"Another process is writing .*out\.h5ad"),
        progress_folder(output),
    ):
        pass
    assert folder.is_dir()


def test_an_input_that_changed_is_told_apart(cells, tmp_path):
    path = write(cells, tmp_path, "zarr3")
    before = identify_file(path)
    assert identify_file(path) == before
    part = next(part for part in sorted(path.rglob("*")) if part.is_file())
    part.write_bytes(part.read_bytes() + b" ")
    assert identify_file(path) != before
