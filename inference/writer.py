"""Results on their way to disk: rows gathered in a progress folder, then a finished file put in place at once.

Nothing ever bears the output's name before it is complete. What is unfinished lies in one folder beside the output; a
run that is killed finds it again, a run that ends in an error takes it along. Several processes share the folder: each
writes files of its own there, and the one that completes the work writes the output.
"""

import hashlib
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from filelock import FileLock, Timeout

from .many_processes import ALONE, Processes

FORMATS = (".h5ad", ".zarr")
BYTES_PER_BLOCK = 2**25  # read and written at once
BYTES_PER_CHUNK = 2**20  # of a dense array in a file
SECONDS_BETWEEN_NOTES = 5.0  # what a kill can cost at most, beside the batch in hand


@dataclass(frozen=True)
class CellResults:
    """What a job adds to the cells of an AnnData file.

    Args:
        obsm: name -> `(cells, ...)` array or stored rows, read in blocks of rows, or columns of such rows.
        obs: name -> `(cells,)` array or categorical.
        uns: name -> text, put below `uns["scfoundation"]`.
        replaced: names in `obs` and below `uns["scfoundation"]` that an earlier run of the job may have left: removed,
            so that nothing of it is taken for a result of this one.
    """

    obsm: "Mapping[str, np.ndarray | StoredRows | NamedColumns]"
    obs: Mapping[str, np.ndarray | pd.Categorical]
    uns: Mapping[str, str]
    replaced: Collection[str] = ()

    def add_to(self, data: AnnData) -> None:
        """Put the results into an AnnData in memory."""
        for name in self.replaced:
            if name in data.obs:
                del data.obs[name]
            data.uns.get("scfoundation", {}).pop(name, None)
        for name, values in self.obs.items():
            data.obs[name] = values
        for name, rows in self.obsm.items():
            data.obsm[name] = rows.as_frame(data.obs_names) if isinstance(rows, NamedColumns) else rows
        for name, text in self.uns.items():
            data.uns.setdefault("scfoundation", {})[name] = text


@dataclass(frozen=True)
class NamedColumns:
    """The first columns of `(cells, columns)` rows, by name: a data frame of the cells.

    Args:
        names: of these columns; without "/", which would nest them in the file.
        index: `(cells,)` names of the cells.
    """

    rows: "np.ndarray | StoredRows"
    names: Sequence[str]
    index: np.ndarray

    def as_frame(self, index: pd.Index) -> pd.DataFrame:
        """All of it in memory."""
        return pd.DataFrame(self.rows[:][:, : len(self.names)], index=index, columns=list(self.names))


def check_output(source: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse an output that could not, or must not, be written.

    Raises: ValueError: for another format than the input's, or the input itself; FileExistsError: if something is there
        and `overwrite` is not set; FileNotFoundError: if its folder is missing.
    """
    if source.suffix not in FORMATS:
        raise ValueError(
            f"{source} can be read, but results are written into {' or '.join(FORMATS)} only: read it with "
            "scanpy and pass the AnnData, or convert it first with adata.write_h5ad."
        )
    if output.suffix != source.suffix:
        raise ValueError(
            f"The output {output} must end in {source.suffix}, as the input does: everything else in the file is "
            f"copied as it is. (Formats: {', '.join(FORMATS)}.)"
        )
    check_place(source, output, overwrite=overwrite)


def check_place(source: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse an output where nothing can, or must, be written.

    Raises: ValueError: for the input itself; FileExistsError: if something is there and `overwrite` is not set;
        FileNotFoundError: if its folder is missing.
    """
    check_parent(output)
    if output.exists() and output.samefile(source):
        raise ValueError(f"The output {output} is the input itself; choose another name.")
    check_free(output, overwrite=overwrite)


def check_parent(output: Path) -> None:
    """Refuse an output whose folder is missing.

    Raises: FileNotFoundError.
    """
    if not output.parent.is_dir():
        raise FileNotFoundError(f"The folder {output.parent} of the output does not exist; make it first.")


def check_free(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that is there, unless it may be replaced.

    Raises: FileExistsError.
    """
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


class StoredRows:
    """Rows of a result that lie in one file a part, `(cells, *row_shape)`; a slice of them is read when asked for.

    Not a memory map: its pages would count as memory of the process.
    """

    def __init__(
        self, paths: Sequence[Path], borders: Sequence[int], *, row_shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self._paths, self._borders = paths, borders
        self.shape = (borders[-1], *row_shape)
        self.dtype = dtype

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Consecutive rows, in memory."""
        start, stop, _ = rows.indices(len(self))
        read = np.empty((max(0, stop - start), *self.shape[1:]), dtype=self.dtype)
        for path, (first, last) in zip(self._paths, pairwise(self._borders), strict=True):
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                part = np.fromfile(
                    path, self.dtype, (end - begin) * self._row_size, offset=(begin - first) * self._row_bytes
                )
                read[begin - start : end - start] = part.reshape(-1, *self.shape[1:])
        return read

    @property
    def _row_size(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def _row_bytes(self) -> int:
        return self._row_size * self.dtype.itemsize


def row_blocks(rows: "np.ndarray | StoredRows") -> Iterator[tuple[slice, np.ndarray]]:
    """`(cells, ...)` rows in order, some tens of MB at a time, each block with where it is."""
    row_bytes = math.prod(rows.shape[1:]) * rows.dtype.itemsize
    step = max(1, BYTES_PER_BLOCK // max(1, row_bytes))
    for start in range(0, len(rows), step):
        where = slice(start, min(start + step, len(rows)))
        yield where, rows[where]


class PartProgress:
    """The rows of one part, `(rows, *row_shape)`, appended block by block, surviving a kill.

    Args:
        path: their file; beside it, a note says how many of them are safely there.
    """

    def __init__(self, path: Path, *, row_shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.path, self.row_shape, self.dtype = path, row_shape, dtype
        self._note_due = 0.0
        self.num_rows_done = rows_noted(path)
        with path.open("ab"):
            # A kill between appending and noting it leaves rows that nobody vouches for.
            os.truncate(path, self.num_rows_done * math.prod(row_shape) * dtype.itemsize)

    def append(self, rows: np.ndarray) -> None:
        """Add the next rows, `(n, *row_shape)`; every few seconds, note how many are safely there."""
        assert rows.dtype == self.dtype
        assert rows.shape[1:] == self.row_shape
        with self.path.open("ab") as file:
            file.write(np.ascontiguousarray(rows).data)
        self.num_rows_done += len(rows)
        if time.monotonic() >= self._note_due:
            self.note()

    def note(self) -> None:
        """Vouch for the rows there are."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
        self._note_due = time.monotonic() + SECONDS_BETWEEN_NOTES
        _replace_text(_note_of(self.path), json.dumps({"num_rows_done": self.num_rows_done}))


def rows_noted(path: Path) -> int:
    """How many rows of a part are safely there."""
    note = _note_of(path)
    return int(json.loads(note.read_text(encoding="utf-8"))["num_rows_done"]) if note.exists() else 0


def _note_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Progress:
    """Unfinished work: rows in one file a part, each part written by one process.

    Args:
        folder: where it lies.
        job: what the work is tied to, JSON-able; unfinished work of another job is not continued.
        borders: the first row of each part, and the number of rows.
    Raises: RuntimeError: if a process that is still running works on another job there.
    """

    def __init__(
        self,
        folder: Path,
        job: Mapping[str, Any],
        *,
        borders: Sequence[int],
        row_shape: tuple[int, ...],
        dtype: np.dtype[Any],
        processes: Processes = ALONE,
    ) -> None:
        self.folder, self.borders, self.row_shape, self.dtype = folder, borders, row_shape, dtype
        self._own_lock = folder / _process_lock(processes.rank)
        self._job_path = folder / "job.json"
        self._paths = [folder / f"part-{index:06}.rows" for index in range(len(borders) - 1)]
        with FileLock(folder / "job.lock"):
            self._join(json.loads(json.dumps(job)))

    def _join(self, job: dict[str, Any]) -> None:
        if self._job_path.exists():
            unfinished = json.loads(self._job_path.read_text(encoding="utf-8"))
            changed = ", ".join(sorted(key for key in job if job[key] != unfinished.get(key)))
            if not changed:
                return
            if self._others_are_running():
                raise RuntimeError(
                    f"Another process is working in {self.folder} on something else (it differs in {changed}); the "
                    "processes of one run need the same input, model, options and kind of device."
                )
            warnings.warn(
                f"{self.folder} holds unfinished work of another run (it differs in {changed}); "
                "starting from the first cell.",
                stacklevel=5,
            )
            for path in self.folder.glob("part-*"):
                path.unlink()
        _replace_text(self._job_path, json.dumps(job))

    def _others_are_running(self) -> bool:
        for path in self.folder.glob(_process_lock("*")):
            if path == self._own_lock:
                continue
            try:
                with FileLock(path, timeout=0):
                    pass
            except Timeout:
                return True
        return False

    def num_rows_done(self, index: int) -> int:
        """Rows of one part that are safely there."""
        return rows_noted(self._paths[index])

    @contextmanager
    def part(self, index: int) -> Iterator[PartProgress]:
        """One part, to be gone on with; its last rows are noted at the end."""
        progress = PartProgress(self._paths[index], row_shape=self.row_shape, dtype=self.dtype)
        yield progress
        progress.note()

    @contextmanager
    def completing(self) -> Iterator[bool]:
        """Whether all parts are done and this process is the one to finish the work; then the folder goes."""
        is_done = all(
            self.num_rows_done(index) == last - first for index, (first, last) in enumerate(pairwise(self.borders))
        )
        if not is_done:
            yield False
            return
        lock = FileLock(self.folder / "completing.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            # Two may see all parts done; the lock of the second may have made the folder anew.
            yield self._job_path.exists()
            shutil.rmtree(self.folder, ignore_errors=True)  # network file systems keep open files, such as the locks
        finally:
            lock.release()

    def rows(self) -> StoredRows:
        """All rows, once the work is complete."""
        return StoredRows(self._paths, self.borders, row_shape=self.row_shape, dtype=self.dtype)


@contextmanager
def progress_folder(output: Path, processes: Processes = ALONE) -> Iterator[Path]:
    """The folder of unfinished work beside `output`, for one process of each rank at a time.

    Left for the next run when a process is killed or interrupted. An error takes it along, but not the work of others:
    where several processes share it, it stays.
    Raises: RuntimeError: if another process is writing the same output.
    """
    folder = output.with_name(f"{output.name}.progress")
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / _process_lock(processes.rank), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RuntimeError(f"Another process is writing {output} (it holds {folder}); wait for it.") from error
    try:
        yield folder
    except Exception:
        if processes.count == 1:
            shutil.rmtree(folder)
        raise
    finally:
        lock.release()


def _process_lock(rank: int | str) -> str:
    return f"process-{rank}.lock"


def write_results(source: Path, output: Path, results: CellResults, *, folder: Path, overwrite: bool) -> None:
    """Copy `source`, add the results, and put the finished copy in place of `output`.

    Args:
        folder: the progress folder, on the file system of `output`, so that the last step is a rename.
    """
    unfinished = unfinished_output(output, folder=folder)
    if source.suffix == ".zarr":
        shutil.copytree(source, unfinished)
        _add_to_zarr(unfinished, results)
    else:
        shutil.copyfile(source, unfinished)
        with h5py.File(unfinished, "r+") as file:
            _add_results(file, results)
    put_in_place(unfinished, output, folder=folder, overwrite=overwrite)


def unfinished_output(output: Path, *, folder: Path) -> Path:
    """Where to build the output; what an earlier run left there is gone."""
    unfinished = folder / f"unfinished{output.suffix}"
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    unfinished.unlink(missing_ok=True)
    return unfinished


def put_in_place(unfinished: Path, output: Path, *, folder: Path, overwrite: bool) -> None:
    """Give the finished output its name, at once."""
    if overwrite and output.is_dir():
        output.rename(folder / "replaced.zarr")
    unfinished.replace(output)


@contextmanager
def without_format_warnings() -> Iterator[None]:
    """What anndata and zarr announce about their formats is not the user's doing."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="zarr v3 autosharding|Consolidated metadata is currently not part|Writing zarr v2"
        )
        yield


def _add_to_zarr(path: Path, results: CellResults) -> None:
    was_consolidated = zarr.open_group(path, mode="r").metadata.consolidated_metadata is not None
    with without_format_warnings():
        _add_results(zarr.open_group(path, mode="r+", use_consolidated=False), results)
        if was_consolidated:  # stale, it would hide what was added
            zarr.consolidate_metadata(path)


def _add_results(root: Any, results: CellResults) -> None:
    for name in ("obsm", "uns"):
        if name not in root:
            anndata.io.write_elem(root, name, {})
    if "scfoundation" not in root["uns"]:
        anndata.io.write_elem(root["uns"], "scfoundation", {})
    for name in results.replaced:
        _remove_obs_column(root, name)
        if name in root["uns/scfoundation"]:
            del root["uns/scfoundation"][name]
    for name, text in results.uns.items():
        anndata.io.write_elem(root["uns/scfoundation"], name, text)
    for name, values in results.obs.items():
        _add_obs_column(root, name, values)
    for name, rows in results.obsm.items():
        if isinstance(rows, NamedColumns):
            _add_frame(root["obsm"], name, rows)
        else:
            _add_rows(root["obsm"], name, rows)


def _add_obs_column(root: Any, name: str, values: np.ndarray | pd.Categorical) -> None:
    if "column-order" not in root["obs"].attrs:  # files older than anndata 0.7 hold obs as one compound array
        obs = anndata.io.read_elem(root["obs"])
        obs[name] = values
        anndata.io.write_elem(root, "obs", obs)
        return
    anndata.io.write_elem(root["obs"], name, values)
    columns = [str(column) for column in root["obs"].attrs["column-order"]]
    if name not in columns:
        _set_obs_columns(root, [*columns, name])


def _remove_obs_column(root: Any, name: str) -> None:
    if "column-order" not in root["obs"].attrs:
        obs = anndata.io.read_elem(root["obs"])
        if name in obs:
            anndata.io.write_elem(root, "obs", obs.drop(columns=name))
    elif name in root["obs"]:
        del root["obs"][name]
        columns = [str(column) for column in root["obs"].attrs["column-order"]]
        _set_obs_columns(root, [column for column in columns if column != name])


def _set_obs_columns(root: Any, columns: list[str]) -> None:
    in_h5 = isinstance(root, h5py.Group)
    root["obs"].attrs["column-order"] = np.array(columns, dtype=h5py.string_dtype()) if in_h5 else columns


def _add_rows(group: Any, name: str, rows: np.ndarray | StoredRows) -> None:
    """Write a dense array as anndata lays it out, a block of rows at a time."""
    if name in group:
        del group[name]
    array = create_dense(group, name, shape=rows.shape, dtype=rows.dtype)
    for where, block in row_blocks(rows):
        array[where] = block


def _add_frame(group: Any, name: str, columns: NamedColumns) -> None:
    """Write a data frame as anndata lays it out, a block of rows at a time."""
    no_rows = pd.DataFrame(columns=list(columns.names), dtype=columns.rows.dtype)
    anndata.io.write_elem(group, name, no_rows)  # the layout; what is in it is replaced
    frame = group[name]
    anndata.io.write_elem(frame, frame.attrs["_index"], columns.index.astype(object))
    for column in columns.names:
        del frame[column]
    num_cells = len(columns.rows)
    arrays = [create_dense(frame, column, shape=(num_cells,), dtype=columns.rows.dtype) for column in columns.names]
    for where, block in row_blocks(columns.rows):
        for array, values in zip(arrays, block.T, strict=False):
            array[where] = values


def create_dense(group: Any, name: str, *, shape: tuple[int, ...], dtype: Any) -> Any:
    """An empty dense array in an HDF5 or zarr group as anndata lays it out, in chunks of whole rows."""
    row_bytes = max(1, math.prod(shape[1:]) * np.dtype(dtype).itemsize)
    chunks = (max(1, min(shape[0], BYTES_PER_CHUNK // row_bytes)), *shape[1:])
    array = create_array(group, name, shape=shape, dtype=dtype, chunks=chunks)
    array.attrs["encoding-type"] = "array"
    array.attrs["encoding-version"] = "0.2.0"
    return array


def create_array(group: Any, name: str, *, shape: tuple[int, ...], dtype: Any, chunks: tuple[int, ...]) -> Any:
    """An empty array, in whichever format the group is."""
    create = group.create_dataset if isinstance(group, h5py.Group) else group.create_array
    return create(name, shape=shape, dtype=dtype, chunks=chunks)
