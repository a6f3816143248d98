"""The clustering benchmark gives every representation as many clusters as labels, and scores them."""

import json
import time

import anndata
import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.sparse import csr_matrix
from typer.testing import CliRunner

from scfoundation_hf.cli import app
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.trainer_scripts.benchmarks.cell_sets import CellFile, read_cells
from scfoundation_hf.trainer_scripts.benchmarks.clustering import (
    REPRESENTATIONS,
    Representation,
    Setup,
    benchmark_clustering,
    embedding_of,
    measure,
)
from scfoundation_hf.trainer_scripts.benchmarks.denoisers import log1p_values, shares_of
from scfoundation_hf.trainer_scripts.benchmarks.graph_clustering import (
    components_of_expression,
    connectivity_of_labels,
    leiden,
    neighbor_graph,
    variable_genes,
)

pytest.importorskip("scanpy", reason="needs scanpy, of the extra [analysis]")
# umap says so when it is imported
pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning")
QUICK = ["counts", "random-weights", "scfoundation"]


@pytest.fixture(scope="module")
def blobs():
    """90 cells in three clouds."""
    kind = np.repeat([0, 1, 2], 30)
    return np.random.default_rng(0).normal(size=(90, 6)).astype(np.float32) + 12 * np.eye(6)[kind], kind


def test_leiden_finds_the_number_of_clusters_asked_for(blobs):
    places, kind = blobs
    graph = neighbor_graph(places)
    for number in (3, 6):
        found = leiden(graph, number)
        assert found.number == number
    three = leiden(graph, 3).of_cell
    assert len({(cluster, own) for cluster, own in zip(three, kind, strict=True)}) == 3


def test_connectivity_is_the_share_in_the_largest_part():
    labels = np.array(["B"] * 4 + ["T"] * 2)
    graph = csr_matrix(([1, 1, 1, 1], ([0, 1, 2, 4], [1, 2, 4, 5])), shape=(6, 6))
    assert connectivity_of_labels(graph, labels) == pytest.approx((3 / 4 + 1) / 2)  # 3 is alone among B


def test_expression_is_reduced_as_in_the_tutorial(example_cells):
    cells = read_cells("pbmc", CellFile(example_cells), GeneVocabulary.default(), max_cells=80)
    values = log1p_values(cells.adata.X)
    assert variable_genes(values).shape == (80, 2000)
    components = components_of_expression(values)
    assert components.shape == (80, 50)
    variances = components.var(axis=0)
    assert (np.diff(variances) <= 1e-4 * variances[0]).all()
    few = values[:, values.std(axis=0) > 0][:, :30]
    assert variable_genes(few).shape == (80, 30)


def test_a_representation_that_knows_the_types_scores_best(example_cells, tiny_model_dir):
    cells = read_cells("pbmc", CellFile(example_cells, label="cell_type"), GeneVocabulary.default(), max_cells=100)
    kinds, number = np.unique(cells.labels, return_inverse=True)
    setup = Setup(tiny_model_dir, tiny_model_dir, 1)

    def fixed(places):
        return Representation("fixed", lambda adata, setup: places)

    noise = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)
    knowing = measure(cells, fixed(noise + 30 * np.eye(len(kinds), 8)[number]), setup, num_repeats=2)
    guessing = measure(cells, fixed(noise), setup, num_repeats=2)
    for name in ("nmi", "ari", "silhouette", "calinski_harabasz"):
        assert knowing["scores"][name] > guessing["scores"][name]
    assert abs(guessing["scores"]["ari"]) < 0.2
    assert knowing["umap"].shape == (100, 2)


def test_scvi_is_trained_once_for_its_expression_and_its_latent_space(
    example_cells, tiny_model_dir, tmp_path, monkeypatch
):
    trained = []

    class Model:
        def __init__(self, cells):
            self.adata = cells
            self.places = components_of_expression(log1p_values(cells.X))

        def get_latent_representation(self):
            return self.places[:, :10]

        def get_normalized_expression(self, **options):
            return shares_of(self.adata.X)

    def train(cells, setup, batch):
        trained.append(batch)
        time.sleep(0.5)
        return Model(cells)

    monkeypatch.setattr("scfoundation_hf.trainer_scripts.benchmarks.denoisers._train_scvi", train)
    monkeypatch.setattr("scfoundation_hf.trainer_scripts.benchmarks.clustering.check_methods", lambda *_, **__: None)
    folder = benchmark_clustering(
        {name: CellFile(example_cells, label="cell_type") for name in ("one", "another")},
        tiny_model_dir,
        tmp_path / "out",
        methods=["scvi", "counts", "scvi-latent"],
        max_cells=60,
        min_cells_per_label=3,
        num_repeats=1,
        progress=False,
    )
    assert trained == [None, None]  # once in each data set
    for found in json.loads((folder / "results.json").read_text())["data"].values():
        seconds = {title: scores["seconds"] for title, scores in found["methods"].items()}
        assert min(seconds["scVI"], seconds["scVI latent space"]) >= 0.5


def test_embeddings_are_those_of_embed_at_the_fold(example_cells, tiny_model_dir):
    from scfoundation_hf.inference.embedding import embed

    cells = read_cells("pbmc", CellFile(example_cells), GeneVocabulary.default(), max_cells=4).adata
    found = embedding_of(cells, tiny_model_dir, depth_fold=3, device=None)
    direct = anndata.AnnData(cells.X.copy(), var=cells.var)
    embed(direct, tiny_model_dir, depth_fold=3, progress=False)
    np.testing.assert_array_equal(found, direct.obsm["X_scfoundation"])
    assert np.abs(found - embedding_of(cells, tiny_model_dir, depth_fold=1, device=None)).max() > 1e-4


@pytest.fixture(scope="module")
def measured(example_cells, tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clustering")
    recipe = {
        "data": {"pbmc": {"path": example_cells.name, "label": "cell_type"}},
        "min_cells_per_label": 3,
        "num_repeats": 2,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["benchmark", "clustering", str(folder / "recipe.yaml"), str(folder / "out"), "--no-progress"]
    arguments += ["--model", str(tiny_model_dir), "--data", str(example_cells.parent), "--max-cells", "60"]
    arguments += [part for method in QUICK for part in ("--method", method)]
    arguments += [part for fold in ("1", "5") for part in ("--fold", fold)]
    run = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert run.exit_code == 0
    return folder / "out"


def test_the_command_measures_and_draws(measured):
    found = json.loads((measured / "results.json").read_text())["data"]["pbmc"]
    assert list(found["methods"]) == [
        "counts as measured",
        "random weights",
        "scFoundation, T/S = 1",
        "scFoundation, T/S = 5",
    ]
    for scores in found["methods"].values():
        assert -1 <= scores["silhouette"] <= 1
        assert scores["nmi_sd"] >= 0
        assert abs(scores["num_clusters"] - found["num_labels"]) <= 2
    assert (
        f"| counts as measured | {found['methods']['counts as measured']['nmi']:.3f} ±"
        in (measured / "tables.md").read_text()
    )
    for name in ("clustering", "umap"):
        with Image.open(measured / f"{name}.png") as picture:
            assert min(picture.size) > 200


def test_a_run_goes_on_and_refuses_other_settings(measured, example_cells, tiny_model_dir, monkeypatch):
    data = {"pbmc": CellFile(example_cells, label="cell_type")}
    options = {
        "methods": QUICK,
        "folds": (1, 5),
        "max_cells": 60,
        "min_cells_per_label": 3,
        "progress": False,
    }
    figures = {path.name: path.read_bytes() for path in measured.glob("*.svg")}

    def fail(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr("scfoundation_hf.trainer_scripts.benchmarks.clustering.measure", fail)
    benchmark_clustering(data, tiny_model_dir, measured, num_repeats=2, **options)
    assert {path.name: path.read_bytes() for path in measured.glob("*.svg")} == figures
    with pytest.raises(ValueError, match="was measured with another repeats"):
        benchmark_clustering(data, tiny_model_dir, measured, num_repeats=3, **options)


def test_wrong_settings_are_refused(example_cells, tiny_model_dir, tmp_path):
    data = {"pbmc": CellFile(example_cells, label="cell_type")}
    with pytest.raises(ValueError, match=r"T / S must be at least 1, got 0\.5"):
        benchmark_clustering(data, tiny_model_dir, tmp_path / "out", methods=QUICK, folds=(0.5, 2))
    with pytest.raises(ValueError, match="Data set 'pbmc' names no label"):
        benchmark_clustering({"pbmc": CellFile(example_cells)}, tiny_model_dir, tmp_path / "out", methods=QUICK)
    with pytest.raises(ValueError, match="There is no method 'saver'"):
        benchmark_clustering(data, tiny_model_dir, tmp_path / "out", methods=["saver"])
    assert {"magic", "scvi", "knn-smoothing"} <= set(REPRESENTATIONS)
