"""Cell files -> a corpus to pretrain on: parquet shards of one schema, with a manifest. Also `scfoundation prepare`.

Each input is aligned, checked and written by itself: its shards grow in a folder of unfinished work and are moved to
their places when the last is complete, then a record says so. A killed run loses the inputs it was working on and
nothing else. When every input has its record, duplicates are found over all of them and the manifest is written.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from filelock import FileLock, Timeout
from scipy.sparse import csr_matrix
from tqdm import tqdm

from scfoundation_hf.tokenization.anndata_reader import AnnDataReader
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.matrix_reader import CellReader
from scfoundation_hf.tokenization.prepared_cells import CountValues, PreparedCells
from scfoundation_hf.tokenization.read_depth import first_entry
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

from .census import PREFIX as CENSUS_PREFIX
from .census import open_census_dataset
from .duplicates import find_duplicates
from .fingerprints import DIGEST_BYTES, cell_digests
from .manifest import (
    DUPLICATE_DTYPE,
    DUPLICATES_FOLDER,
    FORMAT_VERSION,
    MANIFEST_NAME,
    OWN_COLUMNS,
    ROW_GROUP_ROWS,
    SPLITS,
    CorpusManifest,
    Shard,
    Split,
    corpus_schema,
)
from .whole_files import write_json, write_whole
from .worker_processes import end_with_parent

ROWS_PER_SHARD = 32 * ROW_GROUP_ROWS
CELLS_HELD_OUT, GROUPS_HELD_OUT = 0.02, 0.1  # chance of a cell, or of a donor, to be for validation
MAX_COUNT = 2**24  # up to here float32 holds every integer
_SOURCES = "sources"
_UNFINISHED = ".unfinished"
_SETTINGS_NAME = "settings.json"
_ONLY_IN_RECORDS = ("shards", "report", "description")
_IDS_NAME = "ids.npy"
_GENE_IDS_LEAF = "gene_ids.list.element"


class InputRefusedError(ValueError):
    """An input that cannot be trusted; the message begins with its name."""


@dataclass(frozen=True)
class _Source:
    """One input: the name it goes by, its path as given, and what its files are called."""

    path: str

    @property
    def is_remote(self) -> bool:
        """Whether it is no file, but a dataset of the Census."""
        return self.path.startswith(CENSUS_PREFIX)

    @property
    def key(self) -> str:
        """File names must not contain words like "train", which the datasets library takes for splits."""
        return hashlib.blake2b(self.path.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class _Job:
    """Everything about the corpus that the work on one input needs."""

    output: Path
    settings: dict[str, Any]  # the same for all inputs of a corpus
    options: dict[str, Any]  # how to read this input

    def record_path(self, source: _Source) -> Path:
        return self.output / _SOURCES / f"{source.key}.json"

    def ids_path(self, source: _Source) -> Path:
        return self.output / _SOURCES / f"{source.key}.ids.npy"

    def finish_lock(self) -> FileLock:
        return FileLock(self.output / _SOURCES / "finish.lock")


def prepare(
    inputs: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    obs: Sequence[str] = (),
    validation_by: Sequence[str] = (),
    validation_share: float | None = None,
    min_genes: int = 201,
    layer: str | None = None,
    gene_column: str | None = None,
    values: CountValues = "counts",
    shard: tuple[int, int] = (1, 1),
    workers: int = 1,
    skip_errors: bool = False,
    progress: bool = True,
) -> Path:
    """Write a corpus, or add inputs to one; what is finished there is left as it is.

    The folder is a dataset as it stands, `datasets.load_dataset("parquet", data_dir=output)`, with the splits train and
    validation; `CorpusStream` reads it and passes over duplicates.

    - Inputs are known by their paths as given. One that has changed since (size or time of change, then hash), or is
      now to be read with another `layer`, `gene_column` or `values`, is prepared again.
    - Cells with the same counts over the vocabulary's genes are kept once: within an input the first, among inputs the
      one whose path comes first in alphabetical order, whatever order, workers or jobs they were prepared in.
    - Memory: about 0.8 GB a worker, libraries included, and some 100 bytes for each cell of the input in hand.

    Args:
        inputs: files or folders that `AnnDataReader` reads, and `census:VERSION/DATASET_ID`.
        output: folder to make, or a corpus prepared with the same `obs`, `validation_*` and `min_genes`.
        obs: columns of obs to keep, as text; null where an input lacks one.
        validation_by: columns of obs, such as the donor; the first that an input has decides. All cells with the same
            value, also in different inputs, go to one split; cells without one go by their input's name. None: each
            cell goes by itself.
        validation_share: chance to be in the validation split, by a hash: 0 none, 1 all. None: 0.02 for cells, 0.1
            for the groups of `validation_by`, which are fewer. Where none is drawn, a warning names a share that does.
        min_genes: cells with fewer expressed vocabulary genes are left out (the paper keeps more than 200).
        layer, gene_column: as for the tokenizer; for all of these inputs.
        values: "counts" (integers), "expected_counts" (fractions, TPM or FPKM, kept as they are) or "recover_counts"
            (normalised values; see the tokenizer).
        shard: (i, n): prepare only the i-th of n shares of the inputs, counted from 1. Give every job of an array the
            same inputs; whichever ends last writes the manifest.
        workers: inputs prepared at a time.
        skip_errors: leave out what is refused, with a warning and an entry in the manifest.
        progress: show a progress bar on stderr.
    Returns: the manifest's path; with `shard`, it is not there before the last job has ended.
    Raises: InputRefusedError: for an input that is damaged or not what it should be, by its name; ValueError,
        FileExistsError: for arguments that do not fit each other or the folder; OSError: when writing fails;
        RuntimeError: if another process works on the same input, or a worker was killed. What was finished before
        stays.
    Source: paper, Methods, "Pretraining data": genes, least number of genes, recovered counts, TPM kept unchanged.
    """
    sources = _sources(inputs)
    settings = _settings(obs, validation_by, validation_share, min_genes)
    if values not in get_args(CountValues):
        raise ValueError(f"values must be one of {', '.join(map(repr, get_args(CountValues)))}; got {values!r}.")
    index, num_shards = shard
    if not 1 <= index <= num_shards:
        raise ValueError(f"shard is {index}/{num_shards}; expected I/N with I from 1 to N.")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}.")

    job = _Job(Path(output), settings, {"layer": layer, "gene_column": gene_column, "values": values})
    _open_output(job)
    own = sources[index - 1 :: num_shards]
    unfinished = [source for source in own if not _is_finished(job, source)]
    for result in tqdm(
        _prepare_all(job, unfinished, workers=workers, skip_errors=skip_errors),
        total=len(unfinished),
        desc="prepare",
        unit="input",
        disable=not progress,
    ):
        for message in result:
            warnings.warn(message, UserWarning, stacklevel=2)
    return _finish(job, sources, progress=progress)


# --- The folder ---


def _sources(inputs: Sequence[str | PathLike[str]]) -> list[_Source]:
    if isinstance(inputs, str | PathLike) or not len(inputs):
        raise ValueError(f"inputs must be one or more paths in a list, got {inputs!r}.")
    paths = [Path(os.path.normpath(path)).as_posix() for path in inputs]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is among the inputs {paths.count(path)} times.")
    return [_Source(path) for path in paths]


def _settings(
    obs: Sequence[str], validation_by: Sequence[str], validation_share: float | None, min_genes: int
) -> dict[str, Any]:
    for name, columns in (("obs", obs), ("validation_by", validation_by)):
        if isinstance(columns, str):
            raise ValueError(f"{name} must be a list of columns, got the text {columns!r}.")
        if len(set(columns)) < len(columns):
            raise ValueError(f"{name} names a column twice: {', '.join(columns)}.")
    if taken := sorted(set(obs) & set(OWN_COLUMNS)):
        raise ValueError(f"obs column {taken[0]!r} can't be kept under this name: the corpus has one of its own.")
    if validation_share is None:
        validation_share = GROUPS_HELD_OUT if validation_by else CELLS_HELD_OUT
    if not 0 <= validation_share <= 1:
        raise ValueError(f"validation_share is {validation_share}; expected a share between 0 and 1.")
    symbols = "\n".join(GeneVocabulary.default().symbols)
    return {
        "format_version": FORMAT_VERSION,
        "obs": list(obs),
        "validation_by": list(validation_by),
        "validation_share": float(validation_share),
        "min_genes": int(min_genes),
        "row_group_rows": ROW_GROUP_ROWS,
        "vocabulary_sha256": hashlib.sha256(symbols.encode()).hexdigest(),
    }


def _open_output(job: _Job) -> None:
    """Make the folder, or check that it is a corpus with the same settings."""
    settings_path = job.output / _SETTINGS_NAME
    holds_something = job.output.exists() and any(job.output.iterdir())
    if holds_something and not (job.output / _SOURCES).is_dir():
        raise FileExistsError(f"{job.output} is no corpus, but holds other files; choose another folder.")
    for folder in (_SOURCES, _UNFINISHED, DUPLICATES_FOLDER, *SPLITS):
        (job.output / folder).mkdir(parents=True, exist_ok=True)
    with job.finish_lock():
        if not settings_path.exists():
            write_json(settings_path, job.settings)
        stored = json.loads(settings_path.read_text(encoding="utf-8"))
    changed = [
        f"{key} {stored.get(key)!r}, now {job.settings[key]!r}"
        for key in job.settings
        if stored.get(key) != job.settings[key]
    ]
    if changed:
        raise ValueError(
            f"{job.output} was prepared with other settings ({'; '.join(changed)}), and they hold for all of a corpus. "
            "Pass the same, or choose another folder."
        )


def _is_finished(job: _Job, source: _Source) -> bool:
    """Whether the source's record is of this very input, read in this way."""
    path = job.record_path(source)
    if not path.exists():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    if "refused" in record:
        return False
    if record["options"] != job.options:
        return False
    if source.is_remote or not Path(source.path).exists():
        return True  # a finished source no longer needs its input
    stat = _stat(Path(source.path))
    if {key: record["input"][key] for key in stat} == stat:
        return True
    if _sha256(Path(source.path)) != record["input"]["sha256"]:
        return False
    record["input"] |= stat  # touched or copied, but the same
    write_json(path, record)
    return True


def _stat(path: Path) -> dict[str, int]:
    stats = [part.stat() for part in _parts(path)]
    return {
        "size": sum(stat.st_size for stat in stats),
        "mtime_ns": max((stat.st_mtime_ns for stat in stats), default=0),
    }


def _sha256(path: Path) -> str:
    """Of a file's content; of a folder's, the hash over names and hashes of its files."""

    def hash_file(file_path: Path) -> str:
        with file_path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if path.is_file():
        return hash_file(path)
    lines = [f"{part.relative_to(path).as_posix()}\0{hash_file(part)}\n" for part in _parts(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _parts(path: Path) -> list[Path]:
    return sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]


# --- All inputs ---


def _prepare_all(job: _Job, sources: Sequence[_Source], *, workers: int, skip_errors: bool) -> Iterator[Sequence[str]]:
    """For each input, when it is done, the warnings it gave."""
    run = partial(_prepare_or_refuse, job, skip_errors=skip_errors)
    if workers == 1 or len(sources) < 2:
        yield from map(run, sources)
        return
    # Spawned, because forking a process that holds HDF5 and Arrow threads is asking for a deadlock.
    context, number = get_context("spawn"), min(workers, len(sources))
    with ProcessPoolExecutor(number, mp_context=context, initializer=end_with_parent) as pool:
        futures = {pool.submit(run, source): source for source in sources}
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "A worker was killed, perhaps for memory. Run the same command again, with fewer workers: what was "
                "finished is kept."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare_or_refuse(job: _Job, source: _Source, *, skip_errors: bool) -> Sequence[str]:
    """Prepare one input; returns its warnings, with its name before them."""
    lock = FileLock(job.output / _SOURCES / f"{source.key}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RuntimeError(f"Another process is preparing {source.path} in {job.output}; wait for it.") from error
    try:
        with job.finish_lock():  # from here on neither the old record nor a manifest that includes it holds
            job.record_path(source).unlink(missing_ok=True)
            (job.output / MANIFEST_NAME).unlink(missing_ok=True)
        try:
            return [f"{source.path}: {message}" for message in _prepare_source(job, source)]
        except InputRefusedError as error:
            if not skip_errors:
                raise
            write_json(job.record_path(source), {"name": source.path, "refused": str(error)})
            return [f"Left out: {error}"]
    finally:
        lock.release()


def _finish(job: _Job, sources: Sequence[_Source], *, progress: bool) -> Path:
    """Write the manifest, if every input is done; the last of several jobs finds that so."""
    manifest_path = job.output / MANIFEST_NAME
    with job.finish_lock():
        missing = [source for source in sources if not job.record_path(source).exists()]
        if missing:
            if progress:
                tqdm.write(f"{len(missing):,} of {len(sources):,} inputs are left to the other jobs.", file=sys.stderr)
            return manifest_path
        if manifest_path.exists():
            return manifest_path  # nothing was prepared since
        records = [json.loads(path.read_text(encoding="utf-8")) for path in (job.output / _SOURCES).glob("*.json")]
        manifest = _assemble(job, sorted(records, key=lambda record: record["name"]))
        write_whole(manifest_path, lambda file: file.write(manifest.to_json().encode()))
        for folder in (_UNFINISHED, DUPLICATES_FOLDER, *SPLITS):
            if not any((job.output / folder).iterdir()):
                (job.output / folder).rmdir()
    _warn_of_columns(job, manifest)
    return manifest_path


def _assemble(job: _Job, records: Sequence[dict[str, Any]]) -> CorpusManifest:
    prepared = [record for record in records if "refused" not in record]
    if not prepared:
        raise ValueError(f"None of the {len(records)} inputs could be prepared: {records[0]['refused']}")
    _check_shards(job, prepared)
    shards: list[Shard] = []
    duplicates = find_duplicates([job.ids_path(_Source(record["name"])) for record in prepared])
    for record, rows in zip(prepared, duplicates, strict=True):
        path = f"{DUPLICATES_FOLDER}/{_Source(record['name']).key}.npy"
        (job.output / path).unlink(missing_ok=True)
        if len(rows):
            write_whole(job.output / path, partial(_save_array, rows))
        record["num_duplicates_of_other_sources"] = len(rows)
        per_shard = np.bincount(rows["shard"], minlength=len(record["shards"]))
        shards += [
            Shard(**shard | {"num_duplicates": int(number), "duplicates": path if number else None})
            for shard, number in zip(record["shards"], per_shard, strict=True)
        ]
    return CorpusManifest(
        shards=tuple(shards),
        settings=job.settings,
        sources=[{key: record[key] for key in record if key not in _ONLY_IN_RECORDS} for record in prepared],
        refused=[{"name": record["name"], "reason": record["refused"]} for record in records if "refused" in record],
        vocabulary_sha256=job.settings["vocabulary_sha256"],
        package_version=version("scfoundation-hf"),
    )


def _check_shards(job: _Job, records: Sequence[dict[str, Any]]) -> None:
    """The folder holds the shards of the records, whole, and no others."""
    expected = {shard["path"]: shard["num_bytes"] for record in records for shard in record["shards"]}
    found = {
        path.relative_to(job.output).as_posix(): path.stat().st_size
        for split in SPLITS
        for path in (job.output / split).glob("**/*")
    }
    for path in sorted(expected.keys() | found.keys()):
        if path not in expected:
            raise ValueError(f"{job.output / path} belongs to no input of this corpus. Move it elsewhere.")
        if found.get(path) != expected[path]:
            key = Path(path).stem.rpartition("-")[0]
            raise ValueError(
                f"{job.output / path} is missing or no longer the file that was written. Delete "
                f"{job.output / _SOURCES / key}.json and prepare again."
            )


def _warn_of_columns(job: _Job, manifest: CorpusManifest) -> None:
    for column in job.settings["obs"]:
        if all(column in source["missing_obs"] for source in manifest.sources):
            warnings.warn(f"No input has the obs column {column!r}: it is null everywhere.", UserWarning, stacklevel=4)
    share = job.settings["validation_share"]
    is_wanted: dict[Split, bool] = {"validation": share > 0, "train": share < 1}
    for split in SPLITS:
        if is_wanted[split] and not manifest.num_cells(split):
            warnings.warn(
                f"No cell fell into the {split} split: with validation_share={share:g} none of the groups or cells was "
                f"drawn. {_share_that_draws(manifest, split)} Prepare into another folder with it.",
                UserWarning,
                stacklevel=4,
            )


def _share_that_draws(manifest: CorpusManifest, split: Split) -> str:
    """Which `validation_share` would leave the split its first cell."""
    lowest, highest = zip(*(source["validation_draws"] for source in manifest.sources), strict=True)
    if split == "validation":
        return f"The first one comes at {math.ceil(min(lowest) * 1000 + 1e-9) / 1000:g}."
    return f"The first one is left at {math.floor(max(highest) * 1000) / 1000:g}."


# --- One input ---


def _prepare_source(job: _Job, source: _Source) -> list[str]:
    """Write the source's shards, then its record; returns the warnings."""
    folder = job.output / _UNFINISHED / source.key
    if folder.is_dir():
        shutil.rmtree(folder)  # left by a kill
    folder.mkdir(parents=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            record = _write_source(job, source, folder)
        record["warnings"] = [str(warning.message) for warning in caught]
        _put_in_place(job, source, folder, record)
    finally:
        shutil.rmtree(folder)
    return record["warnings"]


def _write_source(job: _Job, source: _Source, folder: Path) -> dict[str, Any]:
    """Write the source's shards and cell names into the folder; returns its record."""
    settings = job.settings
    with ExitStack() as opened:
        with _refusing(source):
            stat, sha256 = _identify(source)
            data = opened.enter_context(_open(source, job.options))
            prepared = ScFoundationTokenizer().prepare(
                data, values=job.options["values"], min_genes=settings["min_genes"], on_empty_cell="nan"
            )
        opened.enter_context(prepared)
        columns = {name: _obs_column(prepared, name) for name in settings["obs"]}
        groups, group_column = _validation_groups(prepared, source, settings["validation_by"])
        of_groups = None if groups is None else _draws(_digests_of_texts(groups))
        names, num_repeated, total_counts = _CellNames(), 0, 0.0
        lowest, highest = 1.0, 0.0
        with _ShardWriter(folder, source, corpus_schema(settings["obs"])) as shards:
            for start, stop in prepared.chunks():
                rows = start + np.flatnonzero(prepared.is_kept[start:stop])
                with _refusing(source):
                    counts = prepared.counts(start, stop)[rows - start]
                    _check_exact(counts, prepared.cell_names[rows])
                digests = cell_digests(counts)
                new = names.first_seen(digests)
                num_repeated += len(rows) - len(new)
                rows, counts, digests = rows[new], counts[new], [digests[cell] for cell in new]
                total_counts += float(counts.sum(dtype=np.float64))
                drawn = _draws(digests) if of_groups is None else of_groups[rows]
                lowest, highest = drawn.min(initial=lowest), drawn.max(initial=highest)
                is_validation = drawn < settings["validation_share"]
                for split in SPLITS:
                    cells = np.flatnonzero(is_validation == (split == "validation"))
                    obs = {name: column if column is None else column[rows[cells]] for name, column in columns.items()}
                    shards.write(split, counts[cells], [digests[cell] for cell in cells], obs)
            shards.finish()
        np.save(folder / _IDS_NAME, np.sort(np.concatenate(shards.names), order="cell_id"))
        if not source.is_remote and _stat(Path(source.path)) != stat:
            raise InputRefusedError(f"{source.path} was changed while it was read. Prepare it when it is complete.")
        report = prepared.report
        return {
            "name": source.path,
            "input": stat | {"sha256": sha256},
            "options": job.options,
            "num_cells_in_input": prepared.num_cells,
            "num_cells_left_out": int(prepared.num_cells - prepared.is_kept.sum()),
            "num_repeated_cells": num_repeated,
            "num_cells": sum(shard.num_rows for shard in shards.finished),
            "num_entries": sum(shard.num_entries for shard in shards.finished),
            "total_counts": total_counts,
            "num_genes_in_input": report.num_input_genes,
            "num_genes_found": report.num_matched_genes,
            "counts_kept": report.counts_kept,
            "validation_by": group_column,
            "validation_draws": [float(lowest), float(highest)],
            "missing_obs": [name for name, column in columns.items() if column is None],
            "shards": [asdict(shard) for shard in shards.finished],
            "description": prepared.describe(),
            "report": json.loads(report.to_json()),
        }


def _identify(source: _Source) -> tuple[dict[str, int], str]:
    """Size, time of change and hash; of a Census release, which does not change, the hash of its name."""
    if source.is_remote:
        return {}, hashlib.sha256(source.path.encode()).hexdigest()
    path = Path(source.path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    return _stat(path), _sha256(path)


def _open(source: _Source, options: Mapping[str, Any]) -> AbstractContextManager[CellReader]:
    choice = {name: options[name] for name in ("layer", "gene_column")}
    return open_census_dataset(source.path, **choice) if source.is_remote else AnnDataReader(source.path, **choice)


def _put_in_place(job: _Job, source: _Source, folder: Path, record: dict[str, Any]) -> None:
    """Move what is complete to where it is looked for; the record, which vouches for it, comes last."""
    for split in SPLITS:
        for earlier in (job.output / split).glob(f"{source.key}-*"):
            earlier.unlink()
    for shard in record["shards"]:
        (job.output / shard["split"]).mkdir(exist_ok=True)
        (folder / Path(shard["path"]).name).replace(job.output / shard["path"])
    (folder / _IDS_NAME).replace(job.ids_path(source))
    write_json(job.record_path(source), record)


@contextmanager
def _refusing(source: _Source) -> Iterator[None]:
    """What is raised while an input is read is about that input, and says so."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise InputRefusedError(message if source.path in message else f"{source.path}: {message}") from error


def _check_exact(counts: csr_matrix, cell_names: np.ndarray) -> None:
    entry = first_entry(counts, counts.data > MAX_COUNT)
    if entry is not None:
        raise ValueError(
            f"Cell {cell_names[entry.row]!r} has the count {entry.value:,.0f}; shards keep counts as float32, which is "
            f"exact up to {MAX_COUNT:,} only. Pool of cells or bulk sample? Leave it out."
        )


def _obs_column(prepared: PreparedCells, name: str) -> np.ndarray | None:
    """The column as text with None for what is missing; None if there is no such column."""
    try:
        column = prepared.obs_column(name)
    except KeyError:
        return None
    return np.array([None if value is None or value != value else str(value) for value in column], dtype=object)


def _validation_groups(
    prepared: PreparedCells, source: _Source, columns: Sequence[str]
) -> tuple[np.ndarray | None, str | None]:
    """What decides on each cell's split, and the column it is from; None if each cell decides for itself."""
    if not columns:
        return None, None
    for name in columns:
        groups = _obs_column(prepared, name)
        if groups is not None:
            return np.where(groups == None, source.path, groups), name  # noqa: E711 (elementwise)
    warnings.warn(
        f"has no obs column {' or '.join(map(repr, columns))} to split validation by: all its cells go to one split.",
        UserWarning,
        stacklevel=2,
    )
    return np.full(prepared.num_cells, source.path, dtype=object), None


def _digests_of_texts(texts: np.ndarray) -> list[bytes]:
    unique, numbers = np.unique(texts.astype(str), return_inverse=True)
    digests = [hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in unique.tolist()]
    return [digests[number] for number in numbers]


def _draws(digests: Sequence[bytes]) -> np.ndarray:
    """Each digest as a number from 0 to 1: below `validation_share`, its cell is in the validation split."""
    return np.array([int.from_bytes(digest[:8]) for digest in digests], dtype=np.float64) / 2.0**64


class _CellNames:
    """Remembers which cells an input has had."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def first_seen(self, digests: Sequence[bytes]) -> np.ndarray:
        """Positions of the digests that were not there before."""
        new = []
        for position, digest in enumerate(digests):
            if digest not in self._seen:
                self._seen.add(digest)
                new.append(position)
        return np.array(new, dtype=np.int64)


class _ShardWriter:
    """Rows of one source, into row groups and shards of fixed size for each split.

    Attributes:
        finished: the shards, in the order they were begun; complete once the writer is closed.
        names: `DUPLICATE_DTYPE` arrays: where each cell is.
    """

    def __init__(self, folder: Path, source: _Source, schema: pa.Schema) -> None:
        self.finished: list[Shard] = []
        self.names: list[np.ndarray] = [np.empty(0, DUPLICATE_DTYPE)]
        self._folder, self._source, self._schema = folder, source, schema
        self._open: dict[Split, _OpenShard] = {}
        self._waiting: dict[Split, list[pa.Table]] = {split: [] for split in SPLITS}

    def write(
        self, split: Split, counts: csr_matrix, digests: Sequence[bytes], obs: Mapping[str, np.ndarray | None]
    ) -> None:
        """Add cells, whole row groups of which are written."""
        if not counts.shape[0]:
            return
        self._waiting[split].append(self._table(split, counts, digests, obs))
        if sum(map(len, self._waiting[split])) >= ROW_GROUP_ROWS:
            self._write_waiting(split, keep_rest=True)

    def _table(
        self, split: Split, counts: csr_matrix, digests: Sequence[bytes], obs: Mapping[str, np.ndarray | None]
    ) -> pa.Table:
        num_cells, offsets = counts.shape[0], pa.array(counts.indptr.astype(np.int32))

        def lists(name: str, values: np.ndarray) -> pa.Array:
            return pa.ListArray.from_arrays(offsets, pa.array(values), type=self._schema.field(name).type)

        columns = [
            pa.array([digest.hex() for digest in digests], type=pa.string()),
            pa.repeat(pa.scalar(self._source.path), num_cells),
            pa.repeat(pa.scalar(split), num_cells),
            lists("gene_ids", counts.indices.astype(np.int16)),
            lists("counts", counts.data.astype(np.float32)),
            *(
                pa.nulls(num_cells, pa.string()) if column is None else pa.array(column, type=pa.string())
                for column in obs.values()
            ),
        ]
        return pa.Table.from_arrays(columns, schema=self._schema)

    def _write_waiting(self, split: Split, *, keep_rest: bool) -> None:
        rows = pa.concat_tables(self._waiting[split])
        num_rest = len(rows) % ROW_GROUP_ROWS if keep_rest else 0
        self._waiting[split] = [rows.slice(len(rows) - num_rest)] if num_rest else []
        for start in range(0, len(rows) - num_rest, ROW_GROUP_ROWS):
            shard = self._shard_to_fill(split)
            group = rows.slice(start, min(ROW_GROUP_ROWS, len(rows) - num_rest - start)).combine_chunks()
            self.names.append(shard.write(group))

    def _shard_to_fill(self, split: Split) -> "_OpenShard":
        shard = self._open.get(split)
        if shard is not None and shard.num_rows == ROWS_PER_SHARD:
            self._finish(split)
            shard = None
        if shard is None:
            number = len(self.finished) + len(self._open)
            name = f"{self._source.key}-{number:05d}.parquet"
            shard = self._open[split] = _OpenShard(self._folder / name, number, self._schema)
        return shard

    def _finish(self, split: Split) -> None:
        shard = self._open.pop(split)
        shard.close()  # closes its file also when the footer does not fit
        self.finished.append(
            Shard(
                path=f"{split}/{shard.path.name}",
                source=self._source.path,
                split=split,
                number=shard.number,
                num_rows=shard.num_rows,
                num_entries=shard.num_entries,
                num_bytes=shard.path.stat().st_size,
            )
        )

    def finish(self) -> None:
        """Write what is left."""
        for split in SPLITS:
            if self._waiting[split]:
                self._write_waiting(split, keep_rest=False)
        for split in list(self._open):
            self._finish(split)
        self.finished.sort(key=lambda shard: shard.number)

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self._open.values():  # there are some after an error only
            shard.abandon()


class _OpenShard:
    """A parquet file being written."""

    def __init__(self, path: Path, number: int, schema: pa.Schema) -> None:
        self.path, self.number = path, number
        self.num_rows = self.num_entries = 0
        self._file = path.open("wb")
        # Rising ids as differences, few different counts as a dictionary: half the size of the defaults.
        self._writer = pq.ParquetWriter(
            self._file,
            schema,
            compression="zstd",
            use_dictionary=[column for column in _leaves(schema) if column not in ("cell_id", _GENE_IDS_LEAF)],
            column_encoding={_GENE_IDS_LEAF: "DELTA_BINARY_PACKED"},
        )

    def write(self, group: pa.Table) -> np.ndarray:
        """Add one row group; returns where each of its cells is."""
        names = np.empty(len(group), DUPLICATE_DTYPE)
        names["shard"], names["row"] = self.number, np.arange(self.num_rows, self.num_rows + len(group))
        names["cell_id"] = [bytes.fromhex(cell_id) for cell_id in group.column("cell_id").to_pylist()]
        self._writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
        self.num_rows += len(group)
        self.num_entries += len(group.column("counts").combine_chunks().flatten())
        return names

    def close(self) -> None:
        """Write the footer, and see to it that all is on the disk before a record says so."""
        with self._file:
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())

    def abandon(self) -> None:
        """Close without a word: an error is on its way already, and the folder is about to be removed."""
        with suppress(OSError), self._file:
            self._writer.close()


def _leaves(schema: pa.Schema) -> list[str]:
    """The schema's columns as parquet calls them."""
    return [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in schema]


def _save_array(array: np.ndarray, file: BinaryIO) -> None:
    np.save(file, array, allow_pickle=False)
