"""Results on their way to disk: rows gathered in a progress folder, then a finished file put in place at once.

Nothing ever bears the output's name before it is complete. What is unfinished lies in one folder beside the output; a
run that is killed finds it again, a run that ends in an error takes it along.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import zarr
from filelock import FileLock, Timeout

FORMATS = (".h5ad", ".zarr")
ROWS_PER_WRITE = 4096
SECONDS_BETWEEN_NOTES = 5.0  # what a kill can cost at most, beside the batch in hand


@dataclass(frozen=True)
class CellResults:
    """What a job adds to the cells of an AnnData file.

    Args:
        obsm: name -> `(cells, width)` array or memory map, read in blocks of rows.
        obs: name -> `(cells,)` array.
        uns: name -> text, put below `uns["scfoundation"]`.
    """

    obsm: Mapping[str, np.ndarray]
    obs: Mapping[str, np.ndarray]
    uns: Mapping[str, str]


def check_output(source: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse an output that could not, or must not, be written.

    Raises: ValueError: for another format than the input's, or the input itself; FileExistsError: if something is there
        and `overwrite` is not set; FileNotFoundError: if its folder is missing.
    """
    if output.suffix != source.suffix:
        raise ValueError(
            f"The output {output} must end in {source.suffix}, as the input does: everything else in the file is "
            f"copied as it is. (Formats: {', '.join(FORMATS)}.)"
        )
    if not output.parent.is_dir():
        raise FileNotFoundError(f"The folder {output.parent} of the output does not exist; make it first.")
    if output.exists() and output.samefile(source):
        raise ValueError(f"The output {output} is the input itself; choose another name.")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists already; pass overwrite=True (--overwrite), or choose another name.")


def identify_file(path: Path) -> dict[str, Any]:
    """What ties unfinished work to its input: path, size and time of change (of all parts of a .zarr folder)."""
    parts = sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for part in parts:
        stat = part.stat()
        digest.update(f"{part.relative_to(path.parent)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return {"path": str(path.resolve()), "stat_sha256": digest.hexdigest()}


class RowProgress:
    """Rows of a `(cells, width)` float32 result, appended block by block, surviving a kill.

    Args:
        folder: where the unfinished work lies.
        job: what the work is tied to; unfinished work of another job is not continued.
        width: numbers a row.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], *, width: int) -> None:
        self.folder = folder
        self.width = width
        self.rows_path = folder / "rows.float32"
        self.state_path = folder / "state.json"
        self._job = json.loads(json.dumps(job))
        self._note_due = 0.0
        self.num_rows_done = self._resume()

    def _resume(self) -> int:
        if not self.state_path.exists():
            self.rows_path.touch()
            return 0
        state = json.loads(self.state_path.read_text(encoding="utf-8"))
        if state["job"] != self._job:
            changed = sorted(key for key in self._job if self._job[key] != state["job"].get(key))
            warnings.warn(
                f"{self.folder} holds unfinished work of another run (it differs in {', '.join(changed)}); "
                "starting from the first cell.",
                stacklevel=4,
            )
            self.rows_path.write_bytes(b"")
            return 0
        # A kill between appending and noting it leaves rows that nobody vouches for.
        os.truncate(self.rows_path, state["num_rows_done"] * self.width * 4)
        return int(state["num_rows_done"])

    def append(self, rows: np.ndarray) -> None:
        """Add the next rows, `(n, width)` float32; every few seconds, note how many are safely there."""
        assert rows.dtype == np.float32
        assert rows.shape[1:] == (self.width,)
        with self.rows_path.open("ab") as file:
            file.write(np.ascontiguousarray(rows).data)
            self.num_rows_done += len(rows)
            if time.monotonic() < self._note_due:
                return
            file.flush()
            os.fsync(file.fileno())
        self._note_due = time.monotonic() + SECONDS_BETWEEN_NOTES
        state = {"job": self._job, "num_rows_done": self.num_rows_done}
        temporary = self.state_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state), encoding="utf-8")
        temporary.replace(self.state_path)

    def rows(self) -> np.ndarray:
        """All rows so far as a read-only memory map, `(num_rows_done, width)`."""
        shape = (self.num_rows_done, self.width)
        return np.memmap(self.rows_path, dtype=np.float32, mode="r", shape=shape)


@contextmanager
def progress_folder(output: Path) -> Iterator[Path]:
    """The folder of unfinished work beside `output`, for one process at a time.

    Removed on success and on any error; left for the next run when the process is killed or interrupted.
    Raises: RuntimeError: if another process is writing the same output.
    """
    folder = output.with_name(f"{output.name}.progress")
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RuntimeError(f"Another process is writing {output} (it holds {folder}); wait for it.") from error
    try:
        yield folder
    except Exception:
        shutil.rmtree(folder)
        raise
    else:
        shutil.rmtree(folder)
    finally:
        lock.release()


def write_results(source: Path, output: Path, results: CellResults, *, folder: Path, overwrite: bool) -> None:
    """Copy `source`, add the results, and put the finished copy in place of `output`.

    Args:
        folder: the progress folder, on the file system of `output`, so that the last step is a rename.
    """
    unfinished = folder / f"unfinished{output.suffix}"
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    if source.suffix == ".zarr":
        shutil.copytree(source, unfinished)
        _add_to_zarr(unfinished, results)
    else:
        shutil.copyfile(source, unfinished)
        with h5py.File(unfinished, "r+") as file:
            _add_results(file, results)
    if overwrite and output.is_dir():
        output.rename(folder / "replaced.zarr")
    unfinished.replace(output)


def _add_to_zarr(path: Path, results: CellResults) -> None:
    was_consolidated = zarr.open_group(path, mode="r").metadata.consolidated_metadata is not None
    with warnings.catch_warnings():  # what anndata and zarr announce about their formats is not the user's doing
        warnings.filterwarnings("ignore", message="zarr v3 autosharding|Consolidated metadata is currently not part")
        _add_results(zarr.open_group(path, mode="r+", use_consolidated=False), results)
        if was_consolidated:  # stale, it would hide what was added
            zarr.consolidate_metadata(path)


def _add_results(root: Any, results: CellResults) -> None:
    for name in ("obsm", "uns"):
        if name not in root:
            anndata.io.write_elem(root, name, {})
    if "scfoundation" not in root["uns"]:
        anndata.io.write_elem(root["uns"], "scfoundation", {})
    for name, text in results.uns.items():
        anndata.io.write_elem(root["uns/scfoundation"], name, text)
    for name, values in results.obs.items():
        _add_obs_column(root, name, values)
    for name, rows in results.obsm.items():
        _add_rows(root["obsm"], name, rows)


def _add_obs_column(root: Any, name: str, values: np.ndarray) -> None:
    if "column-order" not in root["obs"].attrs:  # files older than anndata 0.7 hold obs as one compound array
        obs = anndata.io.read_elem(root["obs"])
        obs[name] = values
        anndata.io.write_elem(root, "obs", obs)
        return
    anndata.io.write_elem(root["obs"], name, values)
    columns = [str(column) for column in root["obs"].attrs["column-order"]]
    if name not in columns:
        columns.append(name)
        in_h5 = isinstance(root, h5py.Group)
        root["obs"].attrs["column-order"] = np.array(columns, dtype=h5py.string_dtype()) if in_h5 else columns


def _add_rows(group: Any, name: str, rows: np.ndarray) -> None:
    """Write a dense array as anndata lays it out, a block of rows at a time."""
    if name in group:
        del group[name]
    chunks = (max(1, min(len(rows), 2**20 // (4 * rows.shape[1]))), rows.shape[1])
    create = group.create_dataset if isinstance(group, h5py.Group) else group.create_array
    array = create(name, shape=rows.shape, dtype=rows.dtype, chunks=chunks)
    array.attrs["encoding-type"] = "array"
    array.attrs["encoding-version"] = "0.2.0"
    for start in range(0, len(rows), ROWS_PER_WRITE):
        array[start : start + ROWS_PER_WRITE] = rows[start : start + ROWS_PER_WRITE]
