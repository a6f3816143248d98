"""What `prepare` writes, when it refuses, and what a kill, a full disk, a rerun or other workers leave."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import anndata
import datasets
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.sparse import csr_matrix

import scfoundation_hf.corpus.prepare as prepare_module
from scfoundation_hf.cli import main
from scfoundation_hf.corpus.fingerprints import cell_ids
from scfoundation_hf.corpus.manifest import CorpusManifest
from scfoundation_hf.corpus.prepare import InputRefusedError, prepare
from scfoundation_hf.corpus.streaming import CorpusStream
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary

OPTIONS = {"gene_column": "symbol", "progress": False}


def rows_of(folder: Path, split: str = "train") -> pd.DataFrame:
    tables = [pq.read_table(path).to_pandas() for path in sorted((folder / split).glob("*.parquet"))]
    return pd.concat(tables, ignore_index=True)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in contents(folder).items()}


def edit(path: Path, change) -> Path:
    cells = anndata.read_h5ad(path)
    change(cells)
    cells.write_h5ad(path)
    return path


@pytest.fixture
def own_sources(sources, tmp_path) -> list[Path]:
    """Copies that a test may change."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    return [Path(shutil.copy2(path, folder)) for path in sources]


# --- What is written ---


def test_cells_are_those_of_the_input(corpus, sources):
    rows = pd.concat([rows_of(corpus, split) for split in ("train", "validation")])
    assert set(rows["split"]) == {"train", "validation"}
    for path in sources:
        cells = anndata.read_h5ad(path)
        aligned, _ = GeneVocabulary.default().align(cells.X, cells.var["symbol"])
        kept = np.flatnonzero(np.diff(aligned.indptr) > 200)
        names = np.array(cell_ids(aligned))[kept]
        written = rows[rows["source"] == str(path)].set_index("cell_id").loc[names]
        assert len(written) == len(kept) == (rows["source"] == str(path)).sum()
        for cell, (_, row) in zip(kept, written.iterrows(), strict=True):
            entries = slice(aligned.indptr[cell], aligned.indptr[cell + 1])
            assert row["gene_ids"].tolist() == aligned.indices[entries].tolist()
            assert row["counts"].tolist() == aligned.data[entries].tolist()
        if "cell_type" in cells.obs:
            assert written["cell_type"].tolist() == cells.obs["cell_type"].to_numpy()[kept].tolist()
        else:
            assert written["cell_type"].isna().all()


def test_one_schema_and_nothing_but_it(corpus):
    shards = list(corpus.rglob("*.parquet"))
    assert {shard.parent.name for shard in shards} == {"train", "validation"}
    schemas = {str(pq.read_schema(shard).remove_metadata()) for shard in shards}
    assert len(schemas) == 1
    schema = pq.read_schema(shards[0])
    assert schema.names == ["cell_id", "source", "split", "gene_ids", "counts", "cell_type", "donor"]
    assert (schema.field("gene_ids").type.value_type, schema.field("counts").type.value_type) == (
        pa.int16(),
        pa.float32(),
    )
    loaded = datasets.load_dataset("parquet", data_dir=str(corpus), streaming=True)
    assert set(loaded) == {"train", "validation"}
    manifest = CorpusManifest.read(corpus)
    assert sum(1 for _ in loaded["validation"]) == sum(s.num_rows for s in manifest.shards if s.split == "validation")


def test_manifest(corpus, sources):
    manifest = CorpusManifest.read(corpus)
    assert [source["name"] for source in manifest.sources] == sorted(map(str, sources))
    for source, path in zip(manifest.sources, sorted(sources), strict=True):
        cells = anndata.read_h5ad(path)
        assert source["num_cells_in_input"] == cells.n_obs
        assert source["num_cells"] + source["num_cells_left_out"] + source["num_repeated_cells"] == cells.n_obs
        assert source["input"]["sha256"] == prepare_module._sha256(path)
        assert 0.9 < source["counts_kept"] < 1
        assert source["num_genes_found"] == 11_684
        record = json.loads(
            next((corpus / "sources").glob(f"{prepare_module._Source(str(path)).key}.json")).read_text()
        )
        assert len(record["report"]["missing"]) == 19_264 - 11_684
    assert manifest.sources[2]["missing_obs"] == ["cell_type", "donor"]
    rows = rows_of(corpus)
    assert (
        sum(shard.num_entries for shard in manifest.shards if shard.split == "train") == rows["counts"].str.len().sum()
    )
    content = json.loads((corpus / "manifest.json").read_text())
    assert content["num_cells"]["train"] == rows["cell_id"].nunique()


def test_fractions_and_recovered_counts_fit_the_schema(own_sources, tmp_path):
    counts = anndata.read_h5ad(own_sources[0])
    tpm = counts.copy()
    tpm.X = csr_matrix(tpm.X.multiply(1e6 / tpm.X.sum(axis=1)), dtype=np.float32)
    tpm.write_h5ad(own_sources[1])
    normalised = counts.copy()
    normalised.X = csr_matrix(np.log1p(normalised.X.multiply(1e4 / normalised.X.sum(axis=1)).toarray()))
    normalised.write_h5ad(own_sources[2])
    out = tmp_path / "corpus"
    for path, values in zip(own_sources, ("counts", "expected_counts", "recover_counts"), strict=True):
        prepare([path], out, values=values, validation_share=0, **OPTIONS)
    rows = rows_of(out).groupby("source")["cell_id"].apply(list)
    first, second, third = (rows[str(path)] for path in own_sources)
    assert first == third, "recovered"
    assert not set(first) & set(second)
    assert [source["options"]["values"] for source in CorpusManifest.read(out).sources] == [
        "counts",
        "expected_counts",
        "recover_counts",
    ]


def test_too_large_counts_are_refused(own_sources, tmp_path):
    def enlarge(cells) -> None:
        cells.X.data[np.argmax(cells.X.indices == np.flatnonzero(cells.var["symbol"] == "ACTB")[0])] = 2**24 + 1

    edit(own_sources[0], enlarge)
    with pytest.raises(
        InputRefusedError, match=r"a.h5ad: Cell '.*' has the count 16,777,217; .* exact up to 16,777,216 only"
    ):
        prepare(own_sources[:1], tmp_path / "corpus", **OPTIONS)


# --- Duplicates and the split ---


def test_duplicates_are_kept_once(corpus, sources, tmp_path):
    rows = pd.concat([rows_of(corpus, split) for split in ("train", "validation")])
    repeated = set(rows.loc[rows["cell_id"].duplicated(), "cell_id"])
    assert 90 < len(repeated) <= 100
    a, b, c = CorpusManifest.read(corpus).sources
    assert (a["num_duplicates_of_other_sources"], c["num_duplicates_of_other_sources"]) == (0, 0)
    assert b["num_duplicates_of_other_sources"] == len(repeated)


def test_duplicates_within_an_input_are_written_once(own_sources, tmp_path):
    cells = anndata.read_h5ad(own_sources[0])[:50]
    twice = anndata.concat([cells, cells[:20]], index_unique="-", merge="same")
    twice.write_h5ad(own_sources[0])
    prepare(own_sources[:1], tmp_path / "corpus", validation_share=0, **OPTIONS)
    source = CorpusManifest.read(tmp_path / "corpus").sources[0]
    assert source["num_cells_in_input"] == 70
    assert source["num_repeated_cells"] > 15
    rows = rows_of(tmp_path / "corpus")
    assert source["num_cells"] == len(rows) == rows["cell_id"].nunique()
    assert source["num_cells"] + source["num_repeated_cells"] + source["num_cells_left_out"] == 70


def test_order_workers_and_jobs_do_not_matter(sources, tmp_path):
    settings = {"obs": ["cell_type", "donor"], "validation_share": 0.1, **OPTIONS}
    plain = tmp_path / "plain"
    prepare(sources, plain, **settings)
    expected = bytes_of(plain)
    prepare(sources[::-1], tmp_path / "workers", workers=2, **settings)
    assert bytes_of(tmp_path / "workers") == expected
    for index in (3, 1, 2):
        manifest = prepare(sources, tmp_path / "jobs", shard=(index, 3), **settings)
        assert manifest.exists() == (index == 2), "the last job writes it"
    assert bytes_of(tmp_path / "jobs") == expected
    for path in (sources[1], sources[0], sources[2]):
        prepare([path], tmp_path / "one by one", **settings)
    assert bytes_of(tmp_path / "one by one") == expected


def test_split_of_cells_is_a_hash(own_sources, tmp_path):
    for share in (0.1, 0.3):
        prepare(own_sources, tmp_path / f"{share}", validation_share=share, **OPTIONS)
    small, large = ({*rows_of(tmp_path / f"{share}", "validation")["cell_id"]} for share in (0.1, 0.3))
    total = len(small) + len({*rows_of(tmp_path / "0.1")["cell_id"]})
    assert small < large
    for share, chosen in ((0.1, small), (0.3, large)):  # five standard deviations
        assert abs(len(chosen) - share * total) < 5 * np.sqrt(total * share * (1 - share))


def test_split_by_donor(own_sources, tmp_path):
    edit(own_sources[0], lambda cells: cells.obs.loc[cells.obs_names[:5], ["donor"]].__setitem__("donor", None))

    def forget(cells) -> None:
        cells.obs["donor"] = [None, *cells.obs["donor"][1:]]

    edit(own_sources[0], forget)
    edit(own_sources[1], lambda cells: cells.obs.rename(columns={"donor": "batch"}, inplace=True))
    with pytest.warns(UserWarning, match=r"c.h5ad: has no obs column 'donor' or 'batch' to split validation by"):
        prepare(
            own_sources,
            tmp_path / "c",
            obs=["donor", "batch"],
            validation_by=["donor", "batch"],
            validation_share=0.4,
            **OPTIONS,
        )
    rows = pd.concat([rows_of(tmp_path / "c", split) for split in ("train", "validation")])
    rows["group"] = rows["donor"].fillna(rows["batch"]).fillna(rows["source"])
    assert rows.groupby("group")["split"].nunique().max() == 1
    assert rows["group"].nunique() == 7 + 2, "seven donors over two files, the cell without one, and the last file"
    assert rows["split"].nunique() == 2
    assert [source["validation_by"] for source in CorpusManifest.read(tmp_path / "c").sources] == [
        "donor",
        "batch",
        None,
    ]


def test_columns_and_splits_that_stay_empty(own_sources, tmp_path):
    with pytest.warns(UserWarning, match="No input has the obs column 'tissue'"):
        prepare(own_sources[:1], tmp_path / "one", obs=["tissue"], **OPTIONS)
    with pytest.warns(UserWarning, match=r"No cell fell into the validation split: with validation_share=1e-09"):
        prepare(own_sources[:1], tmp_path / "two", validation_share=1e-9, **OPTIONS)


@pytest.mark.parametrize(("split", "share"), [("validation", 1e-9), ("train", 1 - 1e-9)])
def test_the_warning_names_a_share_that_draws(own_sources, tmp_path, split, share):
    choice = {"validation_by": ["donor"], **OPTIONS}
    with pytest.warns(UserWarning, match=f"No cell fell into the {split} split") as caught:
        prepare(own_sources[:1], tmp_path / "none", validation_share=share, **choice)
    (message,) = [str(warning.message) for warning in caught if "No cell fell" in str(warning.message)]
    named = float(re.search(r"at (0\.\d+)\.", message)[1])
    manifest = prepare(own_sources[:1], tmp_path / "some", validation_share=named, **choice)
    cells = json.loads(manifest.read_text())["num_cells"]
    assert cells["train"] > 0
    assert cells["validation"] > 0


def test_the_share_held_out_by_default(own_sources, tmp_path):
    for name, choice, expected in (("cells", {}, 0.02), ("donors", {"validation_by": ["donor"]}, 0.1)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepare(own_sources[:1], tmp_path / name, **choice, **OPTIONS)
        assert CorpusManifest.read(tmp_path / name).settings["validation_share"] == expected


# --- Again ---


def test_rerun_leaves_what_is_finished(own_sources, tmp_path):
    out = tmp_path / "corpus"
    prepare(own_sources, out, **OPTIONS)
    before = contents(out)
    prepare(own_sources, out, **OPTIONS)
    assert contents(out) == before
    own_sources[0].touch()  # other time, same content: the record learns the time, no shard is touched
    prepare(own_sources, out, **OPTIONS)
    shards = {name: content for name, content in contents(out).items() if name.endswith("parquet")}
    assert shards == {name: content for name, content in before.items() if name.endswith("parquet")}


def test_changed_input_is_prepared_again(own_sources, tmp_path):
    out = tmp_path / "corpus"
    prepare(own_sources, out, **OPTIONS)
    before = contents(out)
    cells = anndata.read_h5ad(own_sources[2])
    cells[:100].copy().write_h5ad(own_sources[2])
    prepare(own_sources, out, **OPTIONS)
    key = prepare_module._Source(str(own_sources[2])).key
    for name, content in contents(out).items():
        is_derived = name == "manifest.json" or name.startswith("duplicates")
        assert is_derived or (content == before[name]) == (key not in name), name
    assert CorpusManifest.read(out).sources[2]["num_cells_in_input"] == 100
    prepare(own_sources[2:], out, gene_column=None, progress=False)  # read in another way
    assert CorpusManifest.read(out).sources[2]["options"]["gene_column"] is None


def test_input_may_be_gone_once_it_is_finished(own_sources, tmp_path):
    out = tmp_path / "corpus"
    prepare(own_sources, out, **OPTIONS)
    own_sources[1].unlink()
    before = contents(out)
    prepare(own_sources, out, **OPTIONS)
    assert contents(out) == before


def test_other_settings_need_another_folder(own_sources, tmp_path):
    prepare(own_sources[:1], tmp_path / "corpus", **OPTIONS)
    with pytest.raises(ValueError, match=r"other settings \(validation_share 0.02, now 0.5; min_genes 201, now 300\)"):
        prepare(own_sources[:1], tmp_path / "corpus", validation_share=0.5, min_genes=300, **OPTIONS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"is no corpus, but holds other files"):
        prepare(own_sources[:1], tmp_path / "other", **OPTIONS)


def test_changed_shards_are_noticed(own_sources, tmp_path):
    out = tmp_path / "corpus"
    prepare(own_sources[:2], out, **OPTIONS)
    shard = next((out / "train").glob("*.parquet"))
    shutil.copy(shard, out / "train" / "copy.parquet")
    with pytest.raises(ValueError, match=r"train/copy.parquet belongs to no input"):
        prepare(own_sources, out, **OPTIONS)
    (out / "train" / "copy.parquet").unlink()
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"missing or no longer the file that was written. Delete .*json"):
        prepare(own_sources, out, **OPTIONS)


# --- Refusals ---


def negative(path: Path) -> None:
    edit(path, lambda cells: cells.X.data.__setitem__(-1, -1))


def not_a_number(path: Path) -> None:
    def change(cells) -> None:
        cells.X = cells.X.astype(np.float32)
        cells.X.data[-1] = np.nan

    edit(path, change)


def no_overlap(path: Path) -> None:
    edit(path, lambda cells: cells.var.__setitem__("symbol", [f"gene{i}" for i in range(cells.n_vars)]))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_cells_left(path: Path) -> None:
    edit(path, lambda cells: setattr(cells, "X", csr_matrix(cells.X.shape, dtype=np.float32)))


BROKEN = {
    negative: r"b\.h5ad.* holds -1, which is negative",
    not_a_number: r"b\.h5ad.* which is not a number",
    no_overlap: r"b\.h5ad: Only 1 of the vocabulary's 19,264 genes",
    truncated: r"b\.h5ad is truncated",
    no_cells_left: r"b\.h5ad: No cell of 300 is left",
    Path.unlink: r"There is no file .*b\.h5ad",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_refused_by_name(own_sources, tmp_path, damage):
    out = tmp_path / "corpus"
    damage(own_sources[1])
    with pytest.raises(InputRefusedError, match=BROKEN[damage]):
        prepare(own_sources, out, **OPTIONS)
    assert not (out / "manifest.json").exists()
    with pytest.warns(UserWarning, match=r"Left out: .*" + BROKEN[damage]):
        prepare(own_sources, out, skip_errors=True, **OPTIONS)
    manifest = CorpusManifest.read(out)
    assert [source["name"] for source in manifest.sources] == [str(own_sources[0]), str(own_sources[2])]
    assert [refused["name"] for refused in manifest.refused] == [str(own_sources[1])]
    assert len(list((out / "train").iterdir())) == 2
    with pytest.raises(InputRefusedError):  # and looked at again, since it may have been mended
        prepare(own_sources, out, **OPTIONS)


def test_all_refused(own_sources, tmp_path):
    truncated(own_sources[0])
    with pytest.warns(UserWarning, match="Left out"), pytest.raises(ValueError, match=r"None of the 1 inputs could be"):
        prepare(own_sources[:1], tmp_path / "corpus", skip_errors=True, **OPTIONS)


@pytest.mark.slow
def test_refused_by_a_worker(own_sources, tmp_path):
    truncated(own_sources[1])
    with pytest.raises(InputRefusedError, match=r"b\.h5ad is truncated"):
        prepare(own_sources, tmp_path / "corpus", workers=2, **OPTIONS)


def test_input_that_changes_while_it_is_read(own_sources, tmp_path, monkeypatch):
    stats = iter([{"size": 1, "mtime_ns": 1}, {"size": 2, "mtime_ns": 2}])
    monkeypatch.setattr(prepare_module, "_stat", lambda path: next(stats))
    with pytest.raises(InputRefusedError, match=r"a.h5ad was changed while it was read"):
        prepare(own_sources[:1], tmp_path / "corpus", **OPTIONS)


def test_warnings_name_the_input(shared_data, tmp_path):
    with pytest.raises(InputRefusedError, match=r"papalexi_thp1.h5ad"):
        prepare([shared_data / "papalexi_thp1.h5ad"], tmp_path / "a", progress=False)
    with pytest.warns(UserWarning, match=r"kang_ifnb.h5ad: Only .* of the vocabulary's"):
        prepare([shared_data / "kang_ifnb.h5ad"], tmp_path / "b", progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": []}, r"inputs must be one or more paths in a list"),
        ({"inputs": "a.h5ad"}, r"inputs must be one or more paths in a list, got 'a.h5ad'"),
        ({"inputs": ["a.h5ad", "./a.h5ad"]}, r"a.h5ad is among the inputs 2 times"),
        ({"values": "log1p_cp10k"}, r"values must be one of 'counts', 'expected_counts', 'recover_counts'"),
        ({"shard": (4, 3)}, r"shard is 4/3; expected I/N"),
        ({"workers": 0}, r"workers must be at least 1"),
        ({"obs": "donor"}, r"obs must be a list of columns"),
        ({"obs": ["donor", "donor"]}, r"obs names a column twice"),
        ({"obs": ["source"]}, r"obs column 'source' can't be kept under this name"),
        ({"validation_share": 2}, r"validation_share is 2; expected a share"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(**{"inputs": ["a.h5ad"], "output": tmp_path / "corpus"} | arguments)


# --- Kills and full disks ---


def assert_nothing_looks_whole(out: Path) -> None:
    """No manifest, and what has the name of a shard is one that its record vouches for, or lies out of sight."""
    assert not (out / "manifest.json").exists()
    vouched = {
        shard["path"] for path in (out / "sources").glob("*.json") for shard in json.loads(path.read_text())["shards"]
    }
    found = {str(path.relative_to(out)) for split in ("train", "validation") for path in (out / split).glob("*")}
    assert found <= vouched
    with pytest.raises(FileNotFoundError, match="no finished corpus"):
        CorpusStream(out, batch_size=4)


class FullDisk:
    """A file on a disk with room for so many bytes more."""

    def __init__(self, file, room: list[int]) -> None:
        self._file, self._room = file, room

    def write(self, content) -> int:
        self._room[0] -= len(content)
        if self._room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()


@pytest.mark.parametrize("room", [5_000, 200_000, 420_000])
@pytest.mark.parametrize("skip_errors", [False, True])
def test_full_disk(own_sources, tmp_path, monkeypatch, room, skip_errors):
    """Not the input's fault, so never skipped."""
    out, left = tmp_path / "corpus", [room]
    plain_open = Path.open

    def open_on_full_disk(path, mode="r", *args, **kwargs):
        file = plain_open(path, mode, *args, **kwargs)
        return FullDisk(file, left) if path.suffix == ".parquet" and mode == "wb" else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(OSError, match="No space left on device"):
            prepare(own_sources, out, skip_errors=skip_errors, **OPTIONS)
    assert_nothing_looks_whole(out)
    assert not any((out / ".unfinished").iterdir()), "what was begun is gone: it only takes room"
    prepare(own_sources, out, **OPTIONS)
    prepare(own_sources, tmp_path / "expected", **OPTIONS)
    assert bytes_of(out) == bytes_of(tmp_path / "expected")


@pytest.mark.parametrize(
    "moment", ["second row group", "between two shards", "before the record", "before the manifest"]
)
def test_kill(own_sources, tmp_path, moment):
    """SIGKILL at the worst moments; the same call afterwards gives what an undisturbed one gives."""
    out = tmp_path / "corpus"
    script = f"""
import os, signal, sys
from pathlib import Path
import scfoundation_hf.corpus.prepare as module
moment, calls = {moment!r}, []
def kill(): os.kill(os.getpid(), signal.SIGKILL)
write = module._OpenShard.write
def write_or_die(self, group):
    calls.append(1)
    if moment == "second row group" and len(calls) == 4: kill()
    return write(self, group)
module._OpenShard.write = write_or_die
replace = Path.replace
def replace_or_die(self, target):
    if str(target).endswith(".parquet"): calls.append("moved")
    if moment == "between two shards" and calls.count("moved") == 4: kill()
    if moment == "before the record" and "sources" in str(target) and target.suffix == ".json": kill()
    if moment == "before the manifest" and target.name == "manifest.json": kill()
    return replace(self, target)
Path.replace = replace_or_die
module.ROW_GROUP_ROWS, module.ROWS_PER_SHARD = 64, 128
module.prepare({[str(path) for path in own_sources]!r}, {str(out)!r}, gene_column="symbol", progress=False)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (out / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="no finished corpus"):
        CorpusStream(out, batch_size=4)
    for shard in out.rglob("*/*-*.parquet"):
        if ".unfinished" not in shard.parts:
            pq.read_table(shard)  # each one that has its name is whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "ROW_GROUP_ROWS", 64)
        patch.setattr(prepare_module, "ROWS_PER_SHARD", 128)
        prepare(own_sources, out, **OPTIONS)
        prepare(own_sources, tmp_path / "expected", **OPTIONS)
    assert bytes_of(out) == bytes_of(tmp_path / "expected")


def is_worker(process: psutil.Process) -> bool:
    try:
        return any("spawn_main" in argument for argument in process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return False


def run_with_workers(inputs: list[Path], folder: Path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """`prepare` with two workers, in the midst of its work."""
    script = f"""
import scfoundation_hf.corpus.prepare as module
if __name__ == "__main__":
    inputs = {[str(path) for path in inputs]!r}
    module.prepare(inputs, {str(folder / "corpus")!r}, gene_column="symbol", progress=False, workers=2)
"""
    (folder / "run.py").write_text(script)
    run = subprocess.Popen([sys.executable, str(folder / "run.py")], stderr=subprocess.PIPE, text=True)
    workers, deadline = [], time.monotonic() + 60
    while not workers and time.monotonic() < deadline and run.poll() is None:
        workers = [child for child in psutil.Process(run.pid).children() if is_worker(child)]
    assert workers
    time.sleep(1)  # not while they are being started
    return run, workers


@pytest.mark.slow
def test_killed_worker(own_sources, tmp_path):
    """As the kernel does when memory runs out."""
    run, workers = run_with_workers(own_sources, tmp_path)
    workers[0].kill()
    _, error = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "A worker was killed, perhaps for memory. Run the same command again" in error


@pytest.mark.slow
def test_workers_end_with_a_killed_process(own_sources, tmp_path):
    run, workers = run_with_workers(own_sources, tmp_path)
    run.kill()
    run.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    prepare(own_sources, tmp_path / "corpus", **OPTIONS)  # no input is locked


def test_two_processes_on_one_input(own_sources, tmp_path):
    out = tmp_path / "corpus"
    prepare(own_sources[:1], out, **OPTIONS)
    lock = prepare_module.FileLock(out / "sources" / f"{prepare_module._Source(str(own_sources[1])).key}.lock")
    with lock, pytest.raises(RuntimeError, match=r"Another process is preparing .*b.h5ad"):
        prepare(own_sources, out, **OPTIONS)


# --- The command ---


def test_command(capsys, own_sources, tmp_path):
    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main(["prepare", *map(str, arguments), "--gene-column", "symbol", "--no-progress"])
        return exit_info.value.code, *capsys.readouterr()

    out = tmp_path / "corpus"
    options = ["--obs", "cell_type", "--obs", "donor", "--validation-share", "0.1"]
    code, said, error = run(*own_sources, out, *options, "--shard", "1/2")
    assert (code, said.strip(), error) == (0, str(out / "manifest.json"), "")
    assert not (out / "manifest.json").exists()
    assert run(*own_sources, out, *options, "--shard", "2/2")[0] == 0
    prepare(own_sources, tmp_path / "expected", obs=["cell_type", "donor"], validation_share=0.1, **OPTIONS)
    assert bytes_of(out) == bytes_of(tmp_path / "expected")
    code, _, error = run(*own_sources, out, "--shard", "3")
    assert code == 2
    assert "not of the form I/N" in error
    truncated(own_sources[0])
    code, _, error = run(*own_sources, tmp_path / "other")
    assert code == 1
    assert "a.h5ad is truncated" in error
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, error = run(*own_sources, tmp_path / "other", "--skip-errors")
    assert code == 0
    assert "Left out" in error
