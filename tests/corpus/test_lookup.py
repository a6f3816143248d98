"""Whether a data set was in pretraining, told from hashes that ship with the model."""

import json
import re
import shutil

import anndata
import numpy as np
import pytest
from safetensors import safe_open
from scipy.sparse import csr_matrix

from scfoundation_hf.cli import main
from scfoundation_hf.corpus.fingerprints import cell_ids
from scfoundation_hf.corpus.lookup import MANIFEST_FILE, MEMBERS_FILE, TrainingCells, lookup, record_training_data
from scfoundation_hf.corpus.manifest import CorpusManifest
from scfoundation_hf.corpus.prepare import prepare
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer


@pytest.fixture(scope="module")
def cells(example_cells) -> anndata.AnnData:
    return anndata.read_h5ad(example_cells)[::10].copy()


@pytest.fixture(scope="module")
def ids(cells) -> list[str]:
    with ScFoundationTokenizer().prepare(cells, gene_column="symbol") as prepared:
        return cell_ids(prepared.counts(0, cells.n_obs))


@pytest.fixture
def model(tiny_model_dir, ids, tmp_path):
    """A model that was trained on the first half of the cells, from two sources that share five of them."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    TrainingCells.from_ids([("blood", ids[:30]), ("more blood", ids[25:40])]).save(folder / MEMBERS_FILE)
    return folder


def test_cells_of_the_training_are_found_with_their_source_and_others_are_not(model, cells):
    result = lookup(model, cells, gene_column="symbol")
    expected = ["blood"] * 30 + ["more blood"] * 10 + [""] * (cells.n_obs - 40)
    assert result.source_of_cell.tolist() == expected
    assert result.num_found == 40
    assert result.num_training_cells == 40
    assert str(result).startswith(f"40 of {cells.n_obs} cells (")
    assert "(blood: 30, more blood: 10)" in str(result)


def test_order_names_and_format_of_the_file_do_not_matter(model, cells, tmp_path):
    shuffled = cells[::-1, np.random.default_rng(0).permutation(cells.n_vars)].copy()
    shuffled.X = shuffled.X.astype(np.float64).tocsc()
    shuffled.obs_names = [f"renamed {i}" for i in range(cells.n_obs)]
    shuffled.write_h5ad(tmp_path / "query.h5ad")
    result = lookup(model, tmp_path / "query.h5ad", gene_column="symbol")
    assert result.source_of_cell.tolist() == lookup(model, cells, gene_column="symbol").source_of_cell[::-1].tolist()


def test_the_training_split_of_a_corpus_is_recorded(example_cells, tiny_model_dir, tmp_path):
    cells = anndata.read_h5ad(example_cells)[::4].copy()
    for name, rows in (("one", slice(0, 120)), ("two", slice(100, None))):
        cells[rows].write_h5ad(tmp_path / f"{name}.h5ad")
    inputs = [tmp_path / "one.h5ad", tmp_path / "two.h5ad"]
    corpus = tmp_path / "corpus"
    prepare(inputs, corpus, gene_column="symbol", min_genes=400, validation_share=0.2, progress=False)
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    record_training_data(corpus, folder)
    manifest = CorpusManifest.read(corpus)
    result = lookup(folder, cells, gene_column="symbol")
    assert result.num_found == result.num_training_cells == manifest.num_cells("train")
    recorded = json.loads((folder / MANIFEST_FILE).read_text())
    assert sum(source["num_cells"] for source in recorded["sources"]) == manifest.num_cells("train")
    assert sum(source["num_validation_cells"] for source in recorded["sources"]) == manifest.num_cells("validation")
    found = dict(zip(*np.unique(result.source_of_cell, return_counts=True), strict=True))
    assert found.pop("") == cells.n_obs - result.num_found
    assert found == {source["name"]: source["num_cells"] for source in recorded["sources"]}


def test_one_other_count_is_another_cell(model, cells):
    changed = cells[:3].copy()
    changed.X = changed.X.astype(np.float32)
    changed.X.data[0] += 1
    assert lookup(model, changed, gene_column="symbol").source_of_cell.tolist() == ["", "blood", "blood"]


def test_an_empty_cell_and_cells_that_training_would_leave_out_are_no_error(model, cells):
    few = cells[:3].copy()
    counts = few.X.tolil()
    counts[1] = 0
    few.X = csr_matrix(counts)
    assert lookup(model, few, gene_column="symbol").source_of_cell.tolist() == ["blood", "", "blood"]


def test_the_file_holds_hashes_only_in_ten_bytes_a_cell(model, ids, tmp_path):
    path = model / MEMBERS_FILE
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {"hashes", "sources"}
        hashes = file.get_tensor("hashes")
        assert set(file.metadata()) == {"source_names"}
    assert path.stat().st_size < 40 * 10 + 400
    assert (np.diff(hashes.astype(object)) > 0).all()  # sorted, so that their order tells nothing of the corpus
    assert {f"{number:016x}" for number in hashes.tolist()} == {name[:16] for name in ids[:40]}
    again = TrainingCells.load(path).save(tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_the_order_of_cells_within_a_source_does_not_change_the_file(ids, tmp_path):
    first = TrainingCells.from_ids([("a", ids[:10]), ("b", ids[10:20])]).save(tmp_path / "first")
    second = TrainingCells.from_ids([("a", ids[4::-1]), ("a", ids[9:4:-1]), ("b", ids[10:20])]).save(
        tmp_path / "second"
    )
    assert first.read_bytes() == second.read_bytes()


def test_the_stated_rate_of_false_positives(ids):
    members = TrainingCells.from_ids([("a", ids)])
    assert members.false_positive_rate == len(ids) / 2**64
    random_ids = [f"{number:032x}" for number in np.random.default_rng(0).integers(0, 2**63, 1000)]
    assert (members.find(random_ids) == -1).all()
    assert (members.find(ids) == 0).all()


def test_no_training_cells_find_nothing(ids):
    members = TrainingCells.from_ids([])
    assert len(members) == 0
    assert members.find(ids).tolist() == [-1] * len(ids)


def test_a_model_without_hashes_says_so(tiny_model_dir, cells):
    message = f"{tiny_model_dir} has no {MEMBERS_FILE}: whoever trained it did not ship"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        lookup(tiny_model_dir, cells, gene_column="symbol")


def test_logarithms_have_no_counts_to_compare(model, cells):
    with pytest.raises(ValueError, match="values='log1p_cp10k' has no counts to compare"):
        lookup(model, cells, gene_column="symbol", values="log1p_cp10k")


def test_the_command_says_it(model, cells, tmp_path, capsys):
    cells.write_h5ad(tmp_path / "query.h5ad")
    with pytest.raises(SystemExit) as exit_info:
        main(["lookup", str(model), str(tmp_path / "query.h5ad"), "--gene-column", "symbol"])
    assert not exit_info.value.code
    assert f"40 of {cells.n_obs} cells" in capsys.readouterr().out
