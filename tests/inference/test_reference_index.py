"""A reference index: the neighbours a full search finds, its own distances, and a folder that is whole or refused."""

import builtins
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from scfoundation_hf.inference import embedding, reference_index
from scfoundation_hf.inference.embedding import embed
from scfoundation_hf.inference.loading import load_encoder
from scfoundation_hf.inference.reference_index import ReferenceIndex, index_reference
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining

OPTIONS = {"gene_column": "symbol", "progress": False}


@pytest.fixture(scope="module")
def embedded(example_cells, tiny_model_dir) -> anndata.AnnData:
    """100 cells of ten types and their embeddings."""
    return embed(anndata.read_h5ad(example_cells)[::8].copy(), tiny_model_dir, **OPTIONS)


@pytest.fixture(scope="module")
def index(embedded) -> ReferenceIndex:
    return ReferenceIndex.build(embedded.obsm["X_scfoundation"], embedded.obs["cell_type"])


@pytest.fixture(scope="module")
def folder(index, tmp_path_factory) -> Path:
    return index.save(tmp_path_factory.mktemp("indices") / "reference")


def full_search(embeddings: np.ndarray, queries: np.ndarray, num_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    mean, scale = embeddings.mean(axis=0), embeddings.std(axis=0)
    search = NearestNeighbors(n_neighbors=num_neighbors, metric="cosine").fit((embeddings - mean) / scale)
    distances, rows = search.kneighbors((queries - mean) / scale)
    return rows, distances


def test_the_nearest_cells_are_found(embedded, index):
    embeddings = embedded.obsm["X_scfoundation"]
    queries = embeddings[:20] + 0.3 * np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    rows, distances = index.neighbors(queries, num_neighbors=10)
    expected_rows, expected_distances = full_search(embeddings, queries, 10)
    np.testing.assert_allclose(distances, expected_distances, rtol=0, atol=2e-3)  # stored in float16
    assert (rows == expected_rows).mean() > 0.95
    assert (np.diff(distances, axis=1) >= 0).all()
    one_row, one_distance = index.neighbors(queries[3:4], num_neighbors=10)
    np.testing.assert_array_equal(one_row, rows[3:4])
    np.testing.assert_array_equal(one_distance, distances[3:4])


def test_the_graph_of_a_large_reference_finds_them_too(embedded, index, monkeypatch):
    queries = embedded.obsm["X_scfoundation"][:20] + np.float32(0.1)
    exact, _ = index.neighbors(queries)
    monkeypatch.setattr(reference_index, "MAX_EXACT_CELLS", 10)
    found, _ = index.neighbors(queries)
    assert np.mean([len(np.intersect1d(a, b)) / 15 for a, b in zip(exact, found, strict=True)]) > 0.98


def test_votes_weigh_by_nearness(embedded, index):
    queries = embedded.obsm["X_scfoundation"][::9] + np.float32(0.05)
    rows, distances = index.neighbors(queries, num_neighbors=5)
    probabilities, mean_distances = index.call(queries, num_neighbors=5)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(mean_distances, distances.mean(axis=1))
    types = np.array(index.cell_types)[index.labels[rows[0]]]
    for number, name in enumerate(index.cell_types):
        expected = (1 / distances[0])[types == name].sum() / (1 / distances[0]).sum()
        assert probabilities[0, number] == pytest.approx(expected, abs=1e-5)


def test_a_cell_of_the_reference_is_itself(embedded, index):
    probabilities, _ = index.call(embedded.obsm["X_scfoundation"])
    called = np.array(index.cell_types)[probabilities.argmax(axis=1)]
    assert (called == embedded.obs["cell_type"].to_numpy()).all()


def test_its_own_distances_leave_each_cell_out(embedded, index):
    embeddings = embedded.obsm["X_scfoundation"]
    _, expected = full_search(embeddings, embeddings, 51)  # the first is the cell itself
    np.testing.assert_allclose(index.own_distances, expected[:, 1:], rtol=0, atol=3e-3)
    threshold = index.unassigned_above(10)
    assert threshold == pytest.approx(np.quantile(expected[:, 1:11].mean(axis=1), 0.95), abs=3e-3)
    far = embeddings[:5] + 5 * np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    assert (index.call(far, num_neighbors=10)[1] > threshold).all()


def test_cells_that_are_the_same_are_no_reason_to_count_oneself(embedded):
    embeddings = np.repeat(embedded.obsm["X_scfoundation"][:3], 60, axis=0)
    index = ReferenceIndex.build(embeddings, np.repeat(["a", "b", "c"], 60))
    assert index.own_distances.shape == (180, 50)
    np.testing.assert_allclose(index.own_distances, 0, rtol=0, atol=1e-3)


def test_own_distances_of_a_large_reference_are_drawn(embedded, monkeypatch):
    monkeypatch.setattr(reference_index, "MAX_THRESHOLD_CELLS", 30)
    build = [
        ReferenceIndex.build(embedded.obsm["X_scfoundation"], embedded.obs["cell_type"], seed=seed)
        for seed in (0, 0, 1)
    ]
    assert [index.own_distances.shape for index in build] == [(30, 50)] * 3
    np.testing.assert_array_equal(build[0].own_distances, build[1].own_distances)
    assert not np.array_equal(build[0].own_distances, build[2].own_distances)


def test_a_folder_keeps_it(embedded, index, folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "embeddings.usearch",
        "reference.json",
        "reference.safetensors",
    ]
    loaded = ReferenceIndex.load(folder)
    assert repr(loaded) == "<ReferenceIndex: 100 cells of 10 types, 64 numbers each>"
    queries = embedded.obsm["X_scfoundation"][:9] + np.float32(0.1)
    for got, expected in zip(loaded.call(queries), index.call(queries), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert loaded.unassigned_above() == index.unassigned_above()
    assert loaded.sha256() == index.sha256()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On more, the links of a graph depend on timing (and exact answers do not use them)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_same_reference_gives_the_same_folder(embedded, tmp_path):
    folder, again = (
        ReferenceIndex.build(embedded.obsm["X_scfoundation"], embedded.obs["cell_type"]).save(tmp_path / name)
        for name in ("reference", "again")
    )
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def damage(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


DAMAGES = {
    "record is no JSON": ("reference.json", lambda content: b"{"),
    "record lacks types": ("reference.json", lambda content: b"{}"),
    "tensors cut off": ("reference.safetensors", lambda content: content[:-50]),
    "graph cut off": ("embeddings.usearch", lambda content: content[: len(content) // 2]),
    "graph is something else": ("embeddings.usearch", lambda content: b"x" * 1000),
    "graph is empty": ("embeddings.usearch", lambda content: b""),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused(folder, tmp_path, case):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    name, change = DAMAGES[case]
    damage(copy, name, change((copy / name).read_bytes()))
    with pytest.raises(ValueError, match=r"copy is damaged \(.*\); make it again"):
        ReferenceIndex.load(copy)


def test_parts_of_two_folders_are_refused(embedded, folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    other = ReferenceIndex.build(embedded.obsm["X_scfoundation"][:50], embedded.obs["cell_type"][:50])
    shutil.copy(other.save(tmp_path / "other") / "embeddings.usearch", copy)
    with pytest.raises(ValueError, match=r"embeddings\.usearch has 50 cells, reference\.safetensors 100"):
        ReferenceIndex.load(copy)


def test_places_are_checked(index, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no reference index .*nowhere .*scfoundation index"):
        ReferenceIndex.load(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="exists already; pass overwrite=True"):
        index.save(folder)
    assert index.save(folder, overwrite=True) == folder
    (tmp_path / "precious").mkdir()
    with pytest.raises(FileExistsError, match="is no reference index; choose another name"):
        index.save(tmp_path / "precious", overwrite=True)
    with pytest.raises(FileNotFoundError, match="does not exist; make it first"):
        index.save(tmp_path / "nowhere" / "reference")


def test_what_cannot_be_indexed_or_asked_is_refused(embedded, index):
    embeddings, types = embedded.obsm["X_scfoundation"], embedded.obs["cell_type"].to_numpy(dtype=object)
    with pytest.raises(ValueError, match=r"\(99,\) labels do not fit embeddings of shape \(100, 64\)"):
        ReferenceIndex.build(embeddings, types[1:])
    with pytest.raises(ValueError, match="100 cells of 1 type"):
        ReferenceIndex.build(embeddings, ["B cell"] * 100)
    with pytest.raises(ValueError, match="2 of the cells have no label; take the labelled cells only"):
        ReferenceIndex.build(embeddings, np.concatenate([[None, np.nan], types[2:]]))
    with pytest.raises(ValueError, match="num_neighbors is 51; with a reference of 100 cells it may be 1 to 50"):
        index.neighbors(embeddings, num_neighbors=51)
    with pytest.raises(ValueError, match=r"shape \(100, 16\), those of the reference 64 numbers a cell"):
        index.neighbors(embeddings[:, :16])


def test_usearch_is_asked_for_where_it_is_missing(embedded, monkeypatch):
    plain_import = builtins.__import__

    def without_usearch(name, *arguments, **options):
        if name.startswith("usearch"):
            raise ImportError(name)
        return plain_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_usearch)
    with pytest.raises(ImportError, match="needs USearch: pip install usearch"):
        ReferenceIndex.build(embedded.obsm["X_scfoundation"], embedded.obs["cell_type"])


def test_cells_are_embedded_and_indexed(embedded, index, tiny_model_dir, tmp_path):
    cells = embedded.copy()
    made = index_reference(cells, tiny_model_dir, label="cell_type", **OPTIONS)
    np.testing.assert_allclose(made.own_distances, index.own_distances, rtol=0, atol=2e-3)
    assert made.cell_types == index.cell_types
    assert made.record["label"] == "cell_type"
    assert made.record["cells"]["embedded"] == 100
    cells.write_h5ad(tmp_path / "cells.h5ad")
    output = index_reference(
        tmp_path / "cells.h5ad", tiny_model_dir, label="cell_type", output=tmp_path / "reference", **OPTIONS
    )
    assert output == tmp_path / "reference"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.h5ad", "reference"]
    assert ReferenceIndex.load(output).sha256() == made.sha256()
    smaller = index_reference(cells, tiny_model_dir, label="cell_type", pooling="max", **OPTIONS)
    assert smaller.mean.shape == (16,)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_goes_on(embedded, tiny_model_dir, tmp_path, monkeypatch):
    embedded.copy().write_h5ad(tmp_path / "cells.h5ad")
    arguments = {"label": "cell_type", "tokens_per_batch": 10_000, **OPTIONS}
    whole = index_reference(tmp_path / "cells.h5ad", tiny_model_dir, output=tmp_path / "whole", **arguments)
    plain, batches = embedding.embed_batch, []

    def interrupt_the_third(*given):
        batches.append(given)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(embedding, "embed_batch", interrupt_the_third)
    with pytest.raises(KeyboardInterrupt):
        index_reference(tmp_path / "cells.h5ad", tiny_model_dir, output=tmp_path / "reference", **arguments)
    assert not (tmp_path / "reference").exists()
    index_reference(tmp_path / "cells.h5ad", tiny_model_dir, output=tmp_path / "reference", **arguments)
    assert sum(len(cells) for _, cells, _ in batches) < 200  # the third is computed twice, the first two are not
    assert (tmp_path / "reference" / "embeddings.usearch").read_bytes() == (whole / "embeddings.usearch").read_bytes()


def test_cells_left_out_are_not_in_the_reference(embedded, tiny_model_dir):
    cells = embedded.copy()
    counts = cells.X.tolil()
    counts[3] = 0
    cells.X = counts.tocsr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        index = index_reference(cells, tiny_model_dir, label="cell_type", on_empty_cell="nan", **OPTIONS)
    assert len(index) == 99
    assert index.labels.max() == 9


def test_arguments_are_checked_before_anything_is_embedded(embedded, tiny_model_dir, tmp_path):
    cells = embedded.copy()
    with pytest.raises(ValueError, match=r"an AnnData gives a ReferenceIndex, which has save\(folder\)"):
        index_reference(cells, tiny_model_dir, label="cell_type", output=tmp_path / "reference", **OPTIONS)
    with pytest.raises(KeyError, match="celltype"):
        index_reference(cells, tiny_model_dir, label="celltype", **OPTIONS)
    cells.obs["one"] = "B cell"
    with pytest.raises(ValueError, match="100 cells of 1 type"):
        index_reference(cells, tiny_model_dir, label="one", **OPTIONS)
    cells.obs["gaps"] = cells.obs["cell_type"].where(np.arange(100) != 7)
    with pytest.raises(ValueError, match="1 cells have no 'gaps'"):
        index_reference(cells, tiny_model_dir, label="gaps", **OPTIONS)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "precious").mkdir()
    with pytest.raises(FileExistsError, match="is no reference index"):
        index_reference(
            tmp_path / "cells.h5ad",
            tiny_model_dir,
            label="cell_type",
            output=tmp_path / "precious",
            overwrite=True,
            **OPTIONS,
        )


def test_another_model_is_refused(embedded, tiny_model_dir, tiny_config):
    made = index_reference(embedded.copy(), tiny_model_dir, label="cell_type", **OPTIONS)
    made.check_model(load_encoder(tiny_model_dir))
    made.check_model(load_encoder(ScFoundationForPreTraining.from_pretrained(tiny_model_dir)))
    with pytest.raises(ValueError, match=r"in torch\.float32, and .* is another encoder"):
        made.check_model(load_encoder(ScFoundationForPreTraining(tiny_config)))
    with pytest.raises(ValueError, match=r"in torch\.bfloat16 is another encoder"):
        made.check_model(load_encoder(tiny_model_dir, dtype="bfloat16"))
    assert json.loads(json.dumps(made.record))["model"]["weights_sha256"]
