"""The mapping benchmark scores spaces and graphs; a method that mixes batches scores higher for it."""

import json

import anndata
import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from scfoundation_hf.cli import app
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.trainer_scripts.benchmarks import methods
from scfoundation_hf.trainer_scripts.benchmarks.cell_sets import CellFile, read_cells
from scfoundation_hf.trainer_scripts.benchmarks.mapping import MAPPERS, Mapper, benchmark_mapping, measure
from scfoundation_hf.trainer_scripts.benchmarks.methods import Setup

for package in ("scanpy", "scib_metrics", "harmonypy", "bbknn"):
    pytest.importorskip(package, reason=f"needs {package}, of the extras [analysis] and [mapping]")
# umap says so when it is imported; scib-metrics and jax use what NumPy deprecates
pytestmark = [
    pytest.mark.slow,  # jax and numba compile
    pytest.mark.filterwarnings("ignore::ImportWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def two_runs(example_cells, tmp_path_factory):
    """A file of 120 of the cells, every other one called a second run."""
    adata = anndata.read_h5ad(example_cells)[:120].copy()
    adata.obs["run"] = np.where(np.arange(120) % 2, "one", "two")
    adata.obs["kind"] = np.where(adata.obs["cell_type"] == "CD19+ B", "B", "other")
    path = tmp_path_factory.mktemp("runs") / "runs.h5ad"
    adata.write_h5ad(path)
    return path


def test_bringing_batches_together_is_rewarded(two_runs, tiny_model_dir):
    cells = read_cells("runs", CellFile(two_runs, label="kind", batch="run"), GeneVocabulary.default())
    generator = np.random.default_rng(0)
    places = generator.normal(size=(120, 8)) + 25 * np.eye(2, 8)[(cells.labels == "B").astype(int)]
    shifted = places + 6 * np.eye(2, 8, k=4)[(cells.batches == "one").astype(int)]
    setup = Setup(tiny_model_dir, tiny_model_dir, 1)

    def scores(places, then=None):
        mapper = Mapper("made", lambda adata, setup: places.astype(np.float32), then)
        return measure(cells, mapper, setup, spaces={})["scores"]

    apart, together, graph = scores(shifted), scores(shifted, "harmony"), scores(shifted, "bbknn")
    assert together["batch"] > apart["batch"] + 0.03
    assert together["ari_kmeans"] == pytest.approx(1)
    assert set(graph) == {"nmi_leiden", "ari_leiden", "graph_connectivity_of_graph"}
    assert graph["graph_connectivity_of_graph"] == pytest.approx(1)


def test_the_command_measures_and_draws(two_runs, tiny_model_dir, tmp_path):
    recipe = {"data": {"runs": {"path": two_runs.name, "label": "kind", "batch": "run"}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["benchmark", "mapping", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--no-progress"]
    arguments += ["--model", str(tiny_model_dir), "--data", str(two_runs.parent)]
    methods = ("pca", "scfoundation-harmony", "scfoundation-bbknn", "random-weights")
    arguments += [part for method in methods for part in ("--method", method)]
    run = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert run.exit_code == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())["data"]["runs"]
    assert list(found["methods"]) == [MAPPERS[method].title for method in methods]
    assert found["num_batches"] == 2
    for title, scores in found["methods"].items():
        assert ("total" in scores) == ("BBKNN" not in title)
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert f"| PCA | {found['methods']['PCA']['bio']:.3f} |" in tables
    assert "| scFoundation + BBKNN | - | - |" in tables
    for name in ("mapping", "umap_batch", "umap_cell_type"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert min(picture.size) > 150


def test_wrong_settings_are_refused(two_runs, tiny_model_dir, tmp_path, monkeypatch):
    def run(file, **options):
        benchmark_mapping({"runs": file}, tiny_model_dir, tmp_path / "out", progress=False, **options)

    with pytest.raises(ValueError, match="Data set 'runs' must name label and batch"):
        run(CellFile(two_runs, label="kind"), methods=["pca"])
    with pytest.raises(ValueError, match="There is no method 'scanorama'"):
        run(CellFile(two_runs, label="kind", batch="run"), methods=["scanorama"])
    found = methods.find_spec
    monkeypatch.setattr(methods, "find_spec", lambda name: None if name == "scib_metrics" else found(name))
    with pytest.raises(
        ImportError, match=r"Scoring needs scib-metrics: pip install scib-metrics, or 'scfoundation-hf\[mapping"
    ):
        run(CellFile(two_runs, label="kind", batch="run"), methods=["pca"])
