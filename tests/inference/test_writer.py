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
from scfoundation_hf.inference.writer import (
    CellResults,
    RowProgress,
    check_output,
    identify_file,
    progress_folder,
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
    assert sorted(tmp_path.iterdir()) == [source, output]


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
    assert not list(tmp_path.glob("*.progress"))


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


def test_rows_survive_a_kill_and_unvouched_rows_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SECONDS_BETWEEN_NOTES", 0)
    rows = np.arange(30, dtype=np.float32).reshape(10, 3)
    progress = RowProgress(tmp_path, {"job": 1}, width=3)
    progress.append(rows[:4])
    progress.append(rows[4:6])
    with progress.rows_path.open("ab") as file:  # killed between writing rows and noting them
        file.write(rows[6:9].tobytes()[:-2])
    resumed = RowProgress(tmp_path, {"job": 1}, width=3)
    assert resumed.num_rows_done == 6
    resumed.append(rows[6:])
    np.testing.assert_array_equal(resumed.rows(), rows)


def test_rows_are_noted_now_and_then_only(tmp_path):
    progress = RowProgress(tmp_path, {"job": 1}, width=3)
    for _ in range(5):
        progress.append(np.ones((2, 3), np.float32))
    assert progress.rows().shape == (10, 3)
    assert RowProgress(tmp_path, {"job": 1}, width=3).num_rows_done == 2


def test_unfinished_work_of_another_run_is_not_continued(tmp_path):
    RowProgress(tmp_path, {"model": "a", "input": "x"}, width=3).append(np.ones((4, 3), np.float32))
    with pytest.warns(UserWarning, match="another run .it differs in model.*starting from the first cell"):
        fresh = RowProgress(tmp_path, {"model": "b", "input": "x"}, width=3)
    assert fresh.num_rows_done == 0
    fresh.append(np.zeros((2, 3), np.float32))
    assert fresh.rows().shape == (2, 3)


def test_the_progress_folder_stays_after_a_kill_and_goes_after_an_error(tmp_path):
    output = tmp_path / "out.h5ad"
    with pytest.raises(KeyboardInterrupt), progress_folder(output) as folder:
        raise KeyboardInterrupt
    assert folder.is_dir()
    with pytest.raises(ValueError, match="broken"), progress_folder(output):
        raise ValueError("broken")
    assert not folder.exists()
    with progress_folder(output):
        pass
    assert not folder.exists()


def test_two_processes_cannot_write_the_same_output(tmp_path):
    output = tmp_path / "out.h5ad"
    folder = tmp_path / "out.h5ad.progress"
    folder.mkdir()
    with (
        FileLock(folder / "lock"),
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
