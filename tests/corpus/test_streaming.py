"""The order of the stream: every cell once an epoch, whatever the workers and processes, and taken up again exactly."""

import json
import shutil
from collections import Counter
from itertools import chain

import pyarrow.parquet as pq
import pytest
import torch

from scfoundation_hf.corpus.manifest import CorpusManifest
from scfoundation_hf.corpus.prepare import prepare
from scfoundation_hf.corpus.streaming import CorpusLoader, CorpusPosition, CorpusStream, load_corpus
from scfoundation_hf.tokenization.data_collator import RawCells, ScFoundationReadDepthAwareCollator
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

LIMITS = {"cells": {}, "tokens": {"tokens_per_batch": 9_000}}


def flat(batches) -> list[str]:
    return list(chain.from_iterable(batches))


def unchanged(cells: RawCells) -> RawCells:
    return cells


def stream(corpus, **options) -> CorpusStream:
    return CorpusStream(corpus, **{"batch_size": 16, "window": 100, "seed": 3} | options)


def ids(batches) -> list[list[str]]:
    return [list(cells.cell_ids) for cells in batches]


def epoch(corpus, num_workers=0, **options) -> list[list[str]]:
    return ids(CorpusLoader(stream(corpus, **options), unchanged, num_workers=num_workers))


@pytest.fixture(scope="module")
def stored(corpus) -> dict[str, tuple[list[int], list[float]]]:
    """What pyarrow reads: the cells of the training split by name."""
    cells = {}
    for path in (corpus / "train").glob("*.parquet"):
        for row in pq.read_table(path, columns=["cell_id", "gene_ids", "counts"]).to_pylist():
            cells[row["cell_id"]] = (row["gene_ids"], row["counts"])
    return cells


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_cell_once(corpus, stored, limit, num_processes):
    batches = [
        epoch(corpus, process_index=index, num_processes=num_processes, **LIMITS[limit])
        for index in range(num_processes)
    ]
    assert len({len(own) for own in batches}) == 1, "equally many batches for each process"
    seen = Counter(name for own in batches for batch in own for name in batch)
    assert seen == Counter(list(stored))
    assert max(len(batch) for own in batches for batch in own) <= 16


def test_contents(corpus, stored):
    for cells in stream(corpus):
        assert cells.epochs == 0
        for cell, name in enumerate(cells.cell_ids):
            entries = slice(cells.offsets[cell], cells.offsets[cell + 1])
            assert (cells.gene_ids[entries].tolist(), cells.counts[entries].tolist()) == stored[name]


def test_batches_keep_to_the_budget(corpus):
    batches = list(stream(corpus, tokens_per_batch=9_000, batch_size=64))
    num_tokens = [int((cells.lengths + 2).sum()) for cells in batches]
    assert max(num_tokens) <= 9_000
    assert len(batches) < 1.3 * sum(num_tokens) / 9_000, "and fill it"
    alone = list(stream(corpus, tokens_per_batch=10))
    assert {len(cells) for cells in alone} == {1}


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_do_not_matter(corpus, limit, num_workers):
    assert epoch(corpus, num_workers, **LIMITS[limit]) == epoch(corpus, **LIMITS[limit])


def test_processes_take_turns(corpus):
    """Step for step, two processes see together what one sees in two batches; but for the end of the epoch."""
    alone = epoch(corpus)
    first, second = (epoch(corpus, process_index=index, num_processes=2) for index in range(2))
    dealt = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert dealt[: len(alone) - 3] == alone[: len(alone) - 3]


def test_seed_and_epoch_change_the_order(corpus):
    first = epoch(corpus)
    assert epoch(corpus) == first
    assert epoch(corpus, seed=4) != first
    second = stream(corpus)
    second.set_epoch(1)
    batches = list(second)
    assert {int(cells.epochs) for cells in batches} == {1}
    assert ids(batches) != first
    assert sorted(flat(ids(batches))) == sorted(flat(first))


def test_rows_of_all_shards_are_mixed(corpus, stored):
    """The first window is not the first shards: its cells come from all over the corpus."""
    sources = {
        name: path.name
        for path in (corpus / "train").glob("*.parquet")
        for name in pq.read_table(path, columns=["cell_id"])["cell_id"].to_pylist()
    }
    first_window = flat(epoch(corpus)[:6])
    assert len({sources[name] for name in first_window}) >= 4


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("num_processes", [1, 2])
def test_resuming_anywhere(corpus, limit, num_processes):
    """Two epochs left alone, against the same stopped after each number of batches and taken up by a new loader."""

    def loader(num_workers: int = 0) -> CorpusLoader:
        options = {"process_index": num_processes - 1, "num_processes": num_processes, **LIMITS[limit]}
        return CorpusLoader(stream(corpus, **options), unchanged, num_workers=num_workers)

    whole = loader()
    names, states, ends = [], [json.loads(json.dumps(whole.state_dict()))], []
    for _ in range(2):
        for cells in whole:
            names.append((list(cells.cell_ids), int(cells.epochs)))
            states.append(json.loads(json.dumps(whole.state_dict())))
        ends.append(len(names))
    assert states[ends[0]]["position"] == vars(CorpusPosition(epoch=1))
    for stop in range(0, len(names), 1 if limit == "tokens" else 3):
        resumed = loader()
        resumed.load_state_dict(states[stop])
        rest = [(list(cells.cell_ids), int(cells.epochs)) for cells in resumed]
        assert rest == names[stop : ends[stop >= ends[0]]], stop
    resumed = loader(num_workers=2)
    resumed.load_state_dict(states[5])
    assert [(list(cells.cell_ids), int(cells.epochs)) for cells in resumed] == names[5 : ends[0]]


def test_position_is_that_of_the_last_batch_handed_out(corpus):
    """Workers are ahead of what was trained on."""
    names = epoch(corpus)
    loader = CorpusLoader(stream(corpus), unchanged, num_workers=2, prefetch_factor=4)
    for number, _ in enumerate(loader):
        if number == 4:
            break
    assert loader.position.batch == 5
    assert ids(loader) == names[5:]


def test_position_is_the_same_for_all_processes(corpus):
    positions = [
        [cells.position for cells in stream(corpus, process_index=index, num_processes=2)] for index in range(2)
    ]
    assert [position.batch for position in positions[0]] == [position.batch for position in positions[1]]
    start = positions[0][3]  # process 1 goes on from the position of process 0
    resumed = ids(stream(corpus, process_index=1, num_processes=2, position=start))
    assert resumed == epoch(corpus, process_index=1, num_processes=2)[4:]


def test_position_of_another_order_is_refused(corpus):
    state = stream(corpus).state_dict()
    with pytest.raises(ValueError, match=r"another order of its cells \(seed was 3, is 4\)"):
        stream(corpus, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"num_processes was 1, is 2"):
        stream(corpus, num_processes=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"The position is in window 99"):
        list(stream(corpus, position=CorpusPosition(window=99)))


def test_resuming_reads_no_more_than_a_window_or_two(corpus, monkeypatch):
    whole = list(stream(corpus))
    resumed = stream(corpus, position=whole[-3].position)
    read, read_group = [], type(resumed._row_groups).read
    monkeypatch.setattr(
        type(resumed._row_groups), "read", lambda self, group: read.append(group) or read_group(self, group)
    )
    assert ids(resumed) == ids(whole[-2:])
    assert len(read) <= 3 * 100 // 16


def test_validation_is_one_pass_in_stored_order(corpus):
    in_order = []
    for shard in CorpusManifest.read(corpus).shards:
        if shard.split == "validation":
            in_order += pq.read_table(corpus / shard.path, columns=["cell_id"])["cell_id"].to_pylist()
    in_order = list(dict.fromkeys(in_order))  # a, b, c: a duplicate's first place is the one that is kept
    assert flat(epoch(corpus, split="validation")) == in_order
    loader = CorpusLoader(stream(corpus, split="validation"), unchanged)
    first, second = list(loader), list(loader)
    assert ids(first) == ids(second)
    assert {int(cells.epochs) for cells in second} == {0}, "the same genes are hidden each time"
    halves = [epoch(corpus, split="validation", process_index=index, num_processes=2) for index in range(2)]
    assert sorted(flat(halves[0] + halves[1])) == sorted(in_order)


def test_length(corpus):
    for num_processes in (1, 2, 3):
        options = {"num_processes": num_processes, "batch_size": 7}
        assert len(stream(corpus, **options)) == len(epoch(corpus, **options))
    assert len(CorpusLoader(stream(corpus), unchanged)) == len(epoch(corpus))
    with pytest.raises(TypeError, match=r"With tokens_per_batch"):
        len(stream(corpus, tokens_per_batch=100))


def test_duplicates_are_passed_over(corpus, stored):
    manifest = CorpusManifest.read(corpus)
    num_duplicates = sum(shard.num_duplicates for shard in manifest.shards if shard.split == "train")
    num_rows = sum(shard.num_rows for shard in manifest.shards if shard.split == "train")
    assert num_duplicates > 50
    assert len(flat(epoch(corpus))) == len(stored) == num_rows - num_duplicates == stream(corpus).num_cells


def test_same_batches_through_the_collator(corpus):
    """Tokens, hidden genes and labels of an epoch do not depend on the workers."""
    collator = ScFoundationReadDepthAwareCollator(ScFoundationTokenizer(), seed=5)
    batches = [list(CorpusLoader(stream(corpus), collator, num_workers=number)) for number in (0, 2)]
    for alone, shared in zip(*batches, strict=True):
        assert alone.keys() == shared.keys()
        for key, value in alone.items():
            assert torch.equal(value, shared[key]) if isinstance(value, torch.Tensor) else value == shared[key]


def test_library_stream(corpus, stored):
    rows = load_corpus(corpus)
    cells = {row["cell_id"]: (row["gene_ids"], row["counts"]) for row in rows}
    assert cells == stored
    assert sum(1 for _ in load_corpus(corpus)) == len(stored), "no cell twice"
    assert {row["split"] for row in load_corpus(corpus, split="validation")} == {"validation"}
    some = list(load_corpus(corpus).shuffle(seed=1, buffer_size=50).take(4))
    batch = ScFoundationReadDepthAwareCollator(ScFoundationTokenizer())(some)
    assert len(batch["labels"]) == 4


def test_remote_address(corpus):
    assert epoch(f"file://{corpus}") == epoch(corpus)


# --- What can't be right ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, r"split must be one of 'train', 'validation'; got 'test'"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"tokens_per_batch": -1}, r"tokens_per_batch must be at least 1"),
        ({"process_index": 2, "num_processes": 2}, r"process_index is 2; with num_processes=2"),
        ({"window": 10}, r"window=10 is less than one batch of each process, 16 x 1"),
        ({"num_processes": 10_000, "window": 10**6}, r"train split of .* cells, for 10000 process"),
        ({"batch_size": 1, "num_processes": 13}, r"in batches of one can't be dealt evenly to 13 processes"),
    ],
)
def test_wrong_settings(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        stream(corpus, **options)


def test_last_cells_that_cannot_be_dealt(corpus):
    with pytest.raises(ValueError, match=r"of one cell each, can't be dealt evenly to 13 processes"):
        epoch(corpus, tokens_per_batch=1, num_processes=13, window=600)


def test_no_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no manifest.json, so no finished corpus"):
        CorpusStream(tmp_path, batch_size=1)
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match=r"has format_version 99; this package reads 1"):
        CorpusStream(tmp_path, batch_size=1)


def test_damaged_shards(corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / "corpus")
    shards = [shard for shard in CorpusManifest.read(copy).shards if shard.split == "train"]
    (copy / shards[0].path).write_bytes((copy / shards[-1].path).read_bytes())
    with pytest.raises(ValueError, match=r"rows, the manifest says .* not the shard that was prepared"):
        epoch(copy)
    (copy / shards[0].path).write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"could not be read .* Copy it again"):
        epoch(copy)
    (copy / shards[0].path).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the shard train/.* which its manifest lists"):
        epoch(copy)


def test_empty_split(sources, tmp_path):
    prepare(sources[:1], tmp_path / "c", gene_column="symbol", validation_share=1, progress=False)
    with pytest.raises(ValueError, match=r"The train split of .* has 0 cells, for 1 process"):
        CorpusStream(tmp_path / "c", batch_size=4)
    with pytest.raises(ValueError, match=r"The train split of .* has no cells"):
        load_corpus(tmp_path / "c")
    assert len(CorpusStream(tmp_path / "c", batch_size=4, split="validation")) > 50
