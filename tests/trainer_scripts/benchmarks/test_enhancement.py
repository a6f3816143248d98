"""The enhancement benchmark measures every method on the same draws, resumes, and refuses what it cannot measure."""

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import anndata
import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.sparse import csr_matrix
from typer.testing import CliRunner

from scfoundation_hf.cli import app
from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.evaluation.metrics.expression_recovery.expression_recovery import expression_recovery
from scfoundation_hf.inference.enhancement import enhance
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer
from scfoundation_hf.trainer_scripts.benchmarks import clustering, enhancement, mapping, methods
from scfoundation_hf.trainer_scripts.benchmarks.cell_sets import (
    CellFile,
    down_sample_cells,
    read_cells,
    read_recipe,
)
from scfoundation_hf.trainer_scripts.benchmarks.denoisers import DENOISERS, log1p_values, shares_of
from scfoundation_hf.trainer_scripts.benchmarks.enhancement import Draw, benchmark_enhancement
from scfoundation_hf.trainer_scripts.benchmarks.methods import Setup
from scfoundation_hf.trainer_scripts.benchmarks.stored_parts import StoredParts

QUICK = ["down-sampled", "gene-mean", "knn-smoothing", "random-weights", "scfoundation"]
# umap says so when it is imported
pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning")


@pytest.fixture(scope="module")
def file(example_cells) -> CellFile:
    return CellFile(example_cells, label="cell_type", gene_column="symbol")


@pytest.fixture(scope="module")
def cells(file):
    return read_cells("pbmc", file, GeneVocabulary.default(), max_cells=60)


@pytest.fixture(scope="module")
def measured(file, tiny_model_dir, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("measured") / "enhancement"
    benchmark_enhancement(
        {"pbmc": file}, tiny_model_dir, output, methods=QUICK, rates=(0.05, 0.2), max_cells=20, progress=False
    )
    return output


def results_of(folder: Path):
    return json.loads((folder / "results.json").read_text())


def test_every_method_is_measured_at_every_rate(measured):
    found = results_of(measured)["data"]["pbmc"]
    assert found["num_cells"] == 20
    assert list(found["rates"]) == ["0.05", "0.2"]
    for summary in found["rates"].values():
        titles = ["down-sampled data", "gene mean", "kNN smoothing", "random weights", "scFoundation"]
        plain = [title for title in summary["predictors"] if not title.endswith("at target depth")]
        assert plain == titles
        assert "gene mean, at target depth" in summary["predictors"]
        assert "scFoundation, at target depth" not in summary["predictors"]
        assert len({measures["num_targets"] for measures in summary["predictors"].values()}) == 1
        assert set(summary["comparisons"]) == set(summary["predictors"]) - {"scFoundation"}
    assert len(list((measured / "parts").iterdir())) == 2 * len(QUICK)


def test_the_numbers_are_those_of_the_metric(measured, file, tiny_model_dir):
    """Down-sampled data and our model, from the counts on, without the harness."""
    cells = read_cells("pbmc", file, GeneVocabulary.default(), max_cells=20).adata
    full = log1p_values(cells.X)
    shallow = anndata.AnnData(down_sample_cells(cells.X, rate=0.2, seed=0), var=cells.var, obs=cells.obs)
    assert np.asarray(shallow.X.sum(axis=1)).min() > 0
    enhanced = enhance(shallow, tiny_model_dir, genes=list(cells.var_names), depth_fold=5, progress=False).X
    found = results_of(measured)["data"]["pbmc"]["rates"]["0.2"]["predictors"]
    for title, values in (("down-sampled data", log1p_values(shallow.X)), ("scFoundation", enhanced)):
        for name, value in expression_recovery(values, full).items():
            assert found[title][name] == pytest.approx(value, rel=1e-4), (title, name)


def test_comparisons_are_paired_ratios(measured):
    summary = results_of(measured)["data"]["pbmc"]["rates"]["0.05"]
    ours = summary["predictors"]["scFoundation"]
    for title, pair in summary["comparisons"].items():
        for name in ("mae_nonzero", "mre_nonzero", "mae"):
            expected = ours[name] / summary["predictors"][title][name]
            assert pair[name]["ratio"] == pytest.approx(expected, rel=1e-4)
            assert pair[name]["low"] <= pair[name]["ratio"] <= pair[name]["high"]
    against = summary["comparisons"]["down-sampled data"]["pearson_per_cell"]
    expected = ours["pearson_per_cell"] - summary["predictors"]["down-sampled data"]["pearson_per_cell"]
    assert against["difference"] == pytest.approx(expected, abs=1e-4)
    assert against["low"] < against["difference"] < against["high"]


def test_tables_and_figure_show_the_results(measured):
    tables = (measured / "tables.md").read_text()
    found = results_of(measured)["data"]["pbmc"]["rates"]["0.2"]["predictors"]["gene mean"]
    assert f"| gene mean | {found['mae_nonzero']:.3f} | {found['mre_nonzero']:.3f} |" in tables
    ET.parse(measured / "enhancement.svg")
    with Image.open(measured / "enhancement.png") as picture:
        assert min(picture.size) > 500


def test_a_run_goes_on_with_what_is_missing(measured, file, tiny_model_dir, monkeypatch):
    before = (measured / "results.json").read_bytes()
    figure = (measured / "enhancement.svg").read_bytes()
    (measured / "parts" / "pbmc--gene-mean--0.2--0.json").unlink()
    asked = []
    original = Draw.measure
    monkeypatch.setattr(Draw, "measure", lambda *args: asked.append(args[1].title) or original(*args))
    monkeypatch.setattr(enhancement, "perf_counter", lambda: 0.0)
    benchmark_enhancement(
        {"pbmc": file}, tiny_model_dir, measured, methods=QUICK, rates=(0.05, 0.2), max_cells=20, progress=False
    )
    assert asked == ["gene mean"]
    after, before = results_of(measured), json.loads(before)
    for results in (before, after):
        for title in ("gene mean", "gene mean, at target depth"):
            del results["data"]["pbmc"]["rates"]["0.2"]["predictors"][title]["seconds"]
    assert after == before
    assert (measured / "enhancement.svg").read_bytes() == figure


def test_parts_of_other_settings_are_refused(measured, file, tiny_model_dir, tmp_path):
    options = {"methods": QUICK[:2], "rates": (0.2,), "progress": False}
    with pytest.raises(
        ValueError, match=r"was measured with another cells\. Choose another folder, or .*--remeasure e"
    ):
        benchmark_enhancement({"pbmc": file}, tiny_model_dir, measured, max_cells=25, **options)
    own = tmp_path / "own"
    for max_cells in (20, 25):
        benchmark_enhancement(
            {"pbmc": file}, tiny_model_dir, own, max_cells=max_cells, remeasure="everything", **options
        )
    assert results_of(own)["data"]["pbmc"]["num_cells"] == 25
    assert results_of(own)["data"]["pbmc"]["rates"]["0.2"]["comparisons"] == {}  # our model was not asked for


def test_another_model_is_measured_anew_and_the_rest_kept(
    measured, file, tiny_model_dir, trained_further, tmp_path, monkeypatch
):
    folder = shutil.copytree(measured, tmp_path / "enhancement")
    options = {"methods": QUICK, "rates": (0.05, 0.2), "max_cells": 20, "progress": False}
    with pytest.raises(
        ValueError, match=r"--scfoundation--0\.05--0\.json was measured with another model\..*--remeasure m"
    ):
        benchmark_enhancement({"pbmc": file}, trained_further, folder, **options)
    asked = []
    original = Draw.measure
    monkeypatch.setattr(Draw, "measure", lambda *args: asked.append(args[1].title) or original(*args))
    benchmark_enhancement({"pbmc": file}, trained_further, folder, remeasure="model", **options)
    assert asked == ["scFoundation"] * 2  # random weights of the same sizes are the same control
    before, after = results_of(measured), results_of(folder)
    assert after["model"]["fingerprint"] != before["model"]["fingerprint"]
    for rate, found in before["data"]["pbmc"]["rates"].items():
        now = after["data"]["pbmc"]["rates"][rate]["predictors"]
        changed = [title for title in found["predictors"] if now[title] != found["predictors"][title]]
        assert changed == ["scFoundation"]

    benchmark_enhancement({"pbmc": file}, trained_further, folder, remeasure="model", **options)
    assert len(asked) == 2


def test_a_model_of_other_sizes_takes_its_control_along(measured, file, tiny_config, tmp_path, monkeypatch):
    folder = shutil.copytree(measured, tmp_path / "enhancement")
    larger = tmp_path / "larger"
    sizes = tiny_config.to_dict() | {"intermediate_size": 2 * tiny_config.intermediate_size}
    ScFoundationForPreTraining(ScFoundationConfig(**sizes)).save_pretrained(larger)
    ScFoundationTokenizer().save_pretrained(larger)
    asked = []
    original = Draw.measure
    monkeypatch.setattr(Draw, "measure", lambda *args: asked.append(args[1].title) or original(*args))
    benchmark_enhancement(
        {"pbmc": file}, larger, folder, methods=QUICK, rates=(0.2,), max_cells=20, remeasure="model", progress=False
    )
    assert asked == ["random weights", "scFoundation"]


def test_a_part_of_before_the_days_is_refused(tmp_path):
    def measure() -> None:
        StoredParts(tmp_path / "out", depends_on={}).get({"data": "pbmc"}, lambda: {"seconds": 1}, depends_on={})

    measure()
    path = tmp_path / "out" / "parts" / "pbmc.json"
    part = json.loads(path.read_text())
    del part["measured"]
    path.write_text(json.dumps(part))
    with pytest.raises(ValueError, match=r"pbmc\.json has no measured: another version .*--remeasure everything"):
        measure()


def test_results_of_several_days_say_so(tmp_path):
    def measure(*names: str) -> str:
        parts = StoredParts(tmp_path / "out", depends_on={})
        for name in names:
            parts.get({"data": name}, lambda: {"seconds": 1}, depends_on={})
        parts.write_results({}, "tables\n")
        return (tmp_path / "out" / "tables.md").read_text()

    assert measure("first") == "tables\n"
    path = tmp_path / "out" / "parts" / "first.json"
    part = json.loads(path.read_text())
    path.write_text(json.dumps(part | {"measured": "2026-01-31"}))
    assert f"Measured on 2026-01-31, {part['measured']}; seconds" in measure("first", "second")
    assert results_of(tmp_path / "out")["measured"] == ["2026-01-31", part["measured"]]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.md").write_text("my work")
    with pytest.raises(FileExistsError, match="was not made by a benchmark"):
        StoredParts(tmp_path, depends_on={}, remeasure="everything")
    assert (tmp_path / "thesis.md").read_text() == "my work"


def test_wrong_settings_are_refused_before_anything_is_made(file, tiny_model_dir, tmp_path, monkeypatch):
    def run(**options):
        benchmark_enhancement({"pbmc": file}, tiny_model_dir, tmp_path / "out", progress=False, **options)

    with pytest.raises(ValueError, match="There is no method 'saver'; choose among down-sampled, gene-mean"):
        run(methods=["saver"])
    with pytest.raises(ValueError, match=r"A rate is the share of counts to keep, above 0 and below 1; got 5"):
        run(methods=QUICK, rates=(5,))
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"The method 'magic' needs magic-impute: pip install magic-impute, or 'scfoundation-hf"
    ):
        run(methods=["magic"])
    assert not (tmp_path / "out").exists()


def test_draws_keep_the_share_of_counts(cells):
    counts = cells.adata.X
    left = down_sample_cells(counts, rate=0.1, seed=0)
    assert left.sum() / counts.sum() == pytest.approx(0.1, abs=0.003)
    assert (left.toarray() <= counts.toarray()).all()
    assert (left != down_sample_cells(counts, rate=0.1, seed=0)).nnz == 0
    assert (left != down_sample_cells(counts, rate=0.1, seed=1)).nnz > 0


def test_cells_without_counts_are_left_out_for_all_methods(cells, tiny_model_dir):
    draw = Draw(cells, rate=0.002, seed=0)
    part = draw.measure(DENOISERS["down-sampled"], Setup(tiny_model_dir, tiny_model_dir, 500))
    assert 0 < part["num_left_out"] < 60
    per_cell = part["readings"]["plain"]["per_cell"]["absolute"]
    assert np.isnan(per_cell).sum() == part["num_left_out"]


# --- the methods ---


@pytest.fixture(scope="module")
def shallow(cells):
    left = down_sample_cells(cells.adata.X, rate=0.2, seed=0)
    return anndata.AnnData(left, obs=cells.adata.obs, var=cells.adata.var)


def test_the_gene_mean_is_the_share_of_all_counts(shallow, tiny_model_dir):
    shares = DENOISERS["gene-mean"].predict(shallow, Setup(tiny_model_dir, tiny_model_dir, 5))
    total = np.asarray(shallow.X.sum(axis=0)).ravel()
    np.testing.assert_allclose(shares[7], total / total.sum(), rtol=1e-5)


def test_knn_smoothing_finds_the_cells_own_kind(tiny_model_dir):
    """Two kinds with genes of their own: what is smoothed stays within the kind, and is the kind's mean profile."""
    generator = np.random.default_rng(0)
    profile = np.zeros((2, 40))
    profile[0, :20] = profile[1, 20:] = generator.dirichlet(np.ones(20))
    kind = np.repeat([0, 1], 30)
    adata = anndata.AnnData(csr_matrix(generator.poisson(60 * profile[kind]), dtype=np.float32))
    shares = DENOISERS["knn-smoothing"].predict(adata, Setup(tiny_model_dir, tiny_model_dir, 5))
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    assert shares[kind == 0, 20:].max() == 0
    error = np.abs(shares - profile[kind]).sum(axis=1)
    assert error.mean() < 0.5 * np.abs(shares_of(adata.X) - profile[kind]).sum(axis=1).mean()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "package"), [("magic", "magic"), ("magic-on-shares", "magic"), ("scvi", "scvi")])
def test_methods_of_others_denoise(method, package, cells, shallow, tiny_model_dir):
    pytest.importorskip(package, reason=f"needs {package}, of the extra [enhancement-benchmark]")
    setup = Setup(tiny_model_dir, tiny_model_dir, 5, scvi_epochs=30, device="cpu")
    predicted = DENOISERS[method].predict(shallow, setup)
    assert predicted.shape == shallow.shape
    assert predicted.dtype == np.float32
    np.testing.assert_array_equal(DENOISERS[method].predict(shallow, setup), predicted)
    if DENOISERS[method].scale == "shares":
        np.testing.assert_allclose(predicted.sum(axis=1), 1, rtol=1e-3)
        predicted = np.log1p(predicted * 10_000)
    full, unchanged = log1p_values(cells.adata.X), log1p_values(shallow.X)
    assert expression_recovery(predicted, full)["mae_nonzero"] < expression_recovery(unchanged, full)["mae_nonzero"]


# --- cells and recipes ---


def test_cells_are_chosen_by_their_annotation(file, cells, tmp_path):
    vocabulary = GeneVocabulary.default()
    obs = anndata.read_h5ad(file.path).obs
    kind = obs["cell_type"].value_counts().index[0]
    only = read_cells("one kind", CellFile(file.path, label="cell_type", keep={"cell_type": kind}), vocabulary)
    assert set(only.labels) == {kind}
    assert only.adata.n_obs == (obs["cell_type"] == kind).sum()
    assert cells.adata.n_obs == 60
    assert set(cells.adata.var_names) <= set(vocabulary.symbols)
    assert cells.fingerprint != only.fingerprint
    few_of_file = CellFile(file.path, label="cell_type", max_cells=60)
    assert read_cells("by file", few_of_file, vocabulary).adata.n_obs == 60
    assert read_cells("fewer", few_of_file, vocabulary, max_cells=50).adata.n_obs == 50
    assert read_cells("not more", few_of_file, vocabulary, max_cells=70).adata.n_obs == 60
    again = read_cells("other name", file, vocabulary, max_cells=60)
    assert again.fingerprint == cells.fingerprint
    few = anndata.read_h5ad(file.path)
    few = few[(few.obs["cell_type"] != kind) | (np.cumsum(few.obs["cell_type"] == kind) <= 4)].copy()
    few.write_h5ad(tmp_path / "few.h5ad")
    without_few = read_cells(
        "few", CellFile(tmp_path / "few.h5ad", label="cell_type"), vocabulary, min_cells_per_label=5
    )
    assert set(without_few.labels) == set(obs["cell_type"]) - {kind}
    with pytest.raises(ValueError, match=r"No cells of .* are left: look at label, batch and keep of data set 'none'"):
        read_cells("none", CellFile(file.path, keep={"cell_type": "unicorn"}), vocabulary)
    normalised = anndata.read_h5ad(file.path)[:5].copy()
    normalised.X = normalised.X * 0.5
    normalised.write_h5ad(tmp_path / "normalised.h5ad")
    with pytest.raises(ValueError, match=r"holds \d+\.5; benchmarks take raw counts"):
        read_cells("normalised", CellFile(tmp_path / "normalised.h5ad"), vocabulary)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("enhancement-benchmark", enhancement),
        ("clustering-benchmark", clustering),
        ("mapping-benchmark", mapping),
    ],
)
def test_recipes_name_real_cells(name, module, shared_data):
    recipe = read_recipe(name, settings=module.SETTINGS, folder=shared_data)
    for set_name, cell_file in recipe["data"].items():
        assert cell_file.path.is_file(), set_name
        columns = anndata.read_h5ad(cell_file.path, backed="r").obs.columns
        assert {cell_file.label, cell_file.batch, *cell_file.keep} - {None} <= set(columns)


def test_wrong_recipes_are_named(tmp_path):
    def read(content):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
        return read_recipe(tmp_path / "recipe.yaml", settings=("rates",), folder=tmp_path)

    with pytest.raises(FileNotFoundError, match="no file missing, and no recipe of that name"):
        read_recipe("missing", settings=(), folder=tmp_path)
    with pytest.raises(ValueError, match="names no data sets: it needs `data:`"):
        read({"rates": [0.1]})
    with pytest.raises(ValueError, match=r"no key 'rate' in .*recipe.yaml; did you mean 'rates'\?"):
        read({"data": {"a": {"path": "a.h5ad"}}, "rate": 1})
    with pytest.raises(ValueError, match=r"Data set 'a' has no path; write `a: \{path: file.h5ad\}`"):
        read({"data": {"a": {"label": "cell_type"}}})
    with pytest.raises(ValueError, match=r"no key 'labels' in data set 'a'; did you mean 'label'\?"):
        read({"data": {"a": {"path": "a.h5ad", "labels": "cell_type"}}})


def test_the_command_runs_a_recipe(example_cells, tiny_model_dir, tmp_path):
    recipe = {"data": {"pbmc": {"path": example_cells.name, "gene_column": "symbol"}}, "rates": [0.05], "max_cells": 30}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["benchmark", "enhancement", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]
    arguments += ["--model", str(tiny_model_dir), "--data", str(example_cells.parent), "--no-progress"]
    arguments += ["--method", "down-sampled", "--method", "gene-mean", "--rate", "0.1", "--max-cells", "12"]
    run = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert run.exit_code == 0
    assert run.stdout.strip() == str(tmp_path / "out")
    found = results_of(tmp_path / "out")["data"]["pbmc"]
    assert found["num_cells"] == 12
    assert list(found["rates"]) == ["0.1"]
