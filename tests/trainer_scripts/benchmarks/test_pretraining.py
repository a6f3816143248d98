"""The benchmark measures what the Trainer validates, for models and baselines alike, on cells that are held out."""

import json
import shutil
import sys
import xml.etree.ElementTree as ET

import anndata
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForPreTraining
from typer.testing import CliRunner

from scfoundation_hf.cli import app
from scfoundation_hf.corpus.prepare import prepare
from scfoundation_hf.corpus.streaming import CorpusStream
from scfoundation_hf.modeling_scfoundation.losses import masked_mean_squared_error
from scfoundation_hf.tokenization.data_collator import ScFoundationReadDepthAwareCollator
from scfoundation_hf.tokenization.gene_vocabulary import Gene, GeneVocabulary
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer
from scfoundation_hf.trainer_scripts.benchmarks import pretraining
from scfoundation_hf.trainer_scripts.benchmarks.pretraining import benchmark_pretraining, read_groups
from scfoundation_hf.trainer_scripts.benchmarks.scaling_figure import ScalingCurve, draw_scaling, read_curve

BASELINE_NAMES = ["gene mean", "gene mean over targets", "scaled profile", "matrix factorisation"]


@pytest.fixture(scope="module")
def corpus(example_cells, tmp_path_factory):
    """Two files that share 20 cells; a fifth of the cells, by themselves, is held out."""
    folder = tmp_path_factory.mktemp("corpus")
    cells = anndata.read_h5ad(example_cells)
    cells[:130].copy().write_h5ad(folder / "first.h5ad")
    cells[110:240].copy().write_h5ad(folder / "second.h5ad")
    prepare(
        [folder / "first.h5ad", folder / "second.h5ad"],
        folder / "corpus",
        obs=["cell_type"],
        validation_share=0.2,
        progress=False,
    )
    return folder / "corpus"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the Trainer leaves of a run: the logs of its last two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-run"
    for step in (9, 30):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        lines = [{"step": n, "loss": 1.0, "flops": n * 2e12} for n in range(5, step + 1, 5)]
        lines += [{"step": n, "eval_loss": 2.0 - n / 30} for n in (0, 9, 20, 30) if n <= step]
        state = {"global_step": step, "log_history": sorted(lines, key=lambda line: line["step"])}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "pretraining_settings.json").write_text(json.dumps({"masking": "released", "masking_overrides": None}))
    return folder


@pytest.fixture(scope="module")
def measured(tiny_model_dir, corpus, run, tmp_path_factory):
    output = tmp_path_factory.mktemp("measured") / "scaling"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "BASELINES", few_ranks())
        made = benchmark_pretraining(
            [tiny_model_dir],
            corpus,
            output,
            runs=[run],
            recipes=("released", "paper"),
            group_by=["cell_type"],
            progress=False,
        )
    assert made == output
    return output


def few_ranks():
    """The baselines, with a factorisation that suits some hundred cells."""

    def factorisation():
        return pretraining.MatrixFactorisation(ranks=(2, 8))

    return (*pretraining.BASELINES[:3], factorisation)


def test_all_predictors_are_measured_on_the_whole_split(measured, corpus, tiny_model_dir):
    results = json.loads((measured / "results.json").read_text())
    num_cells = CorpusStream(corpus, split="validation", batch_size=8).num_cells
    assert num_cells > 30
    assert list(results["recipes"]) == ["released", "paper"]
    for recipe in results["recipes"].values():
        assert list(recipe["predictors"]) == [*BASELINE_NAMES, tiny_model_dir.name]
        assert recipe["num_cells"] == num_cells
        assert sum(group["num_cells"] for group in recipe["by_group"].values()) == num_cells
        assert len({found["num_targets"] for found in recipe["predictors"].values()}) == 1
        in_bins = [
            sum(value for key, value in found.items() if key.startswith("num_targets_depth_"))
            for found in recipe["predictors"].values()
        ]
        assert set(in_bins) == {recipe["predictors"]["gene mean"]["num_targets"]}


def test_the_error_of_a_model_is_its_loss(measured, corpus, tiny_model_dir):
    """On all cells as one batch, with the draws that the Trainer validates with."""
    tokenizer = ScFoundationTokenizer()
    model = AutoModelForPreTraining.from_pretrained(tiny_model_dir).eval()
    (cells,) = CorpusStream(corpus, split="validation", batch_size=1000)
    for recipe, found in json.loads((measured / "results.json").read_text())["recipes"].items():
        batch = ScFoundationReadDepthAwareCollator(tokenizer, recipe=recipe, seed=0)(cells)
        labels = batch.pop("labels")
        with torch.no_grad():
            loss = masked_mean_squared_error(model(**batch).predicted_values, labels)
        assert found["predictors"][tiny_model_dir.name]["mse"] == pytest.approx(float(loss), rel=1e-5)


def test_the_baselines_beat_an_untrained_model(measured, tiny_model_dir):
    for recipe in json.loads((measured / "results.json").read_text())["recipes"].values():
        pairs = recipe["comparisons"][tiny_model_dir.name]
        assert list(pairs) == BASELINE_NAMES
        for baseline, pair in pairs.items():
            own, other = (recipe["predictors"][name]["mse"] for name in (tiny_model_dir.name, baseline))
            assert pair["ratio"] == pytest.approx(own / other, rel=1e-9)
            assert 1 < pair["low"] < pair["ratio"] < pair["high"]
            assert pair["ratios"].keys() == recipe["by_group"].keys()


def test_the_tables_hold_the_figures(measured, tiny_model_dir):
    tables = (measured / "tables.md").read_text()
    released = json.loads((measured / "results.json").read_text())["recipes"]["released"]
    for name, found in released["predictors"].items():
        (row,) = [
            line for line in tables.split("### ")[1].splitlines() if line.startswith((f"| {name} |", f"| **{name}"))
        ][:1]
        assert f"| {found['mse']:.3f} | {found['mse_nonzero']:.3f} |" in row
    for block in tables.split("\n\n"):
        widths = {line.count(" | ") for line in block.splitlines() if line.startswith("| ")}
        assert len(widths) <= 1
    assert f"**{tiny_model_dir.name}** (0.3M) | gene mean |" in tables


def test_groups_are_files_and_values_of_the_column(corpus):
    stream = CorpusStream(corpus, split="validation", batch_size=1000)
    (cells,) = stream
    by_file, by_type = read_groups(corpus), read_groups(corpus, columns=["cell_type"])
    assert sorted(by_file) == sorted(by_type) == sorted(cells.cell_ids)
    assert set(by_file.values()) == {"first", "second"}
    assert all(by_type[cell].startswith(f"{by_file[cell]}, ") for cell in by_type)


def test_groups_are_what_the_corpus_was_split_by(example_cells, tmp_path):
    """Of the columns that were kept; a file without the first column goes by the second."""
    cells = anndata.read_h5ad(example_cells)[:40].copy()
    cells.obs["donor"] = np.repeat(["a", "b"], 20)
    cells[:30].copy().write_h5ad(tmp_path / "with.h5ad")
    del cells.obs["donor"]
    cells[30:].copy().write_h5ad(tmp_path / "without.h5ad")
    inputs = [tmp_path / "with.h5ad", tmp_path / "without.h5ad"]
    columns = {"obs": ["donor", "subpop"], "validation_by": ["donor", "subpop"]}
    prepare(inputs, tmp_path / "corpus", validation_share=1, progress=False, **columns)
    found = set(read_groups(tmp_path / "corpus").values())
    assert found == {"with, a", "with, b", *(f"without, {one}" for one in cells.obs["subpop"][30:])}
    assert set(read_groups(tmp_path / "corpus", columns=[]).values()) == {"with", "without"}


def test_files_of_the_same_name_keep_their_folders(example_cells, tmp_path):
    cells = anndata.read_h5ad(example_cells)
    for number, part in enumerate((cells[:20], cells[20:40])):
        (tmp_path / str(number)).mkdir()
        part.copy().write_h5ad(tmp_path / str(number) / "cells.h5ad")
    inputs = sorted(tmp_path.glob("*/cells.h5ad"))
    prepare(inputs, tmp_path / "corpus", validation_share=1, progress=False)
    assert set(read_groups(tmp_path / "corpus").values()) == {str(path) for path in inputs}


def test_fewer_cells_and_other_batches(tiny_model_dir, corpus, tmp_path, monkeypatch):
    """How cells are cut into batches does not matter; `max_cells` takes the first."""
    monkeypatch.setattr(pretraining, "BASELINES", few_ranks())
    found = [
        json.loads(
            (
                benchmark_pretraining(
                    [tiny_model_dir], corpus, tmp_path / str(size), max_cells=12, batch_size=size, progress=False
                )
                / "results.json"
            ).read_text()
        )["recipes"]["released"]
        for size in (5, 12)
    ]
    assert [one["num_cells"] for one in found] == [12, 12]
    for name, figures in found[0]["predictors"].items():
        defined = {key: value for key, value in figures.items() if value is not None}
        others = {key: found[1]["predictors"][name][key] for key in defined}
        assert defined == pytest.approx(others, rel=1e-5)


# --- The figure ---


def test_the_curve_is_validation_loss_by_flops(run):
    """Of the last checkpoint, in order of steps; step 9 lies between two lines of the log, step 0 before any FLOPs."""
    curve = read_curve(run)
    assert (curve.name, curve.masking) == ("tiny-run", "released")
    np.testing.assert_allclose(curve.flops, [18e12, 40e12, 60e12])
    np.testing.assert_allclose(curve.losses, [2 - 9 / 30, 2 - 20 / 30, 1])


def test_a_recipe_with_changes_is_no_recipe_of_that_name(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    settings = {"masking": "released", "masking_overrides": {"mask_share": 1.0, "random_value_share": 0.0}}
    (tmp_path / "run" / "pretraining_settings.json").write_text(json.dumps(settings))
    assert read_curve(tmp_path / "run").masking is None


def test_the_curve_of_a_measured_run_ends_with_what_was_measured(run, tiny_model_dir, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "BASELINES", few_ranks())
    folder = tmp_path / "finished"
    shutil.copytree(run, folder)
    shutil.copytree(tiny_model_dir, folder, dirs_exist_ok=True)
    arguments = {"runs": [folder, run], "max_cells": 2, "progress": False}
    for name, report, ends in (("with", {"flops": 60e12}, [18e12, 40e12, 60e12]), ("without", None, None)):
        if report is None:
            (folder / "training_report.json").unlink()
        else:
            (folder / "training_report.json").write_text(json.dumps(report))
        made = benchmark_pretraining([folder], corpus, tmp_path / name, **arguments)
        results = json.loads((made / "results.json").read_text())
        ours, other = results["runs"]
        assert other["losses"] == read_curve(run).losses.tolist(), "no model of this call"
        if ends is None:
            assert ours["losses"] == other["losses"]
        else:
            np.testing.assert_allclose(ours["flops"], ends)
            assert ours["losses"][:2] == other["losses"][:2]
            assert ours["losses"][2] == results["recipes"]["released"]["predictors"]["finished"]["mse"]


def test_the_figure_is_the_same_each_time(run, tmp_path):
    curves = [read_curve(run), ScalingCurve("other", np.array([1e13, 5e13]), np.array([1.8, 0.9]), "released")]
    for number in range(2):
        draw_scaling(curves, {"gene mean": 1.1, "matrix factorisation": 0.95}, tmp_path / f"figure-{number}")
    for suffix in ("svg", "png"):
        first, second = ((tmp_path / f"figure-{number}.{suffix}").read_bytes() for number in range(2))
        assert first == second
    assert ET.parse(tmp_path / "figure-0.svg").getroot().tag.endswith("svg")
    with Image.open(tmp_path / "figure-0.png") as image:
        assert image.size == (1280, 800)


def test_baselines_are_drawn_for_runs_of_the_same_recipe_only(run, tiny_model_dir, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "BASELINES", few_ranks())
    drawn = []
    monkeypatch.setattr(pretraining, "draw_scaling", lambda curves, levels, path: drawn.append(levels))
    for recipe in ("released", "paper"):
        benchmark_pretraining(
            [tiny_model_dir], corpus, tmp_path / recipe, runs=[run], recipes=[recipe], max_cells=2, progress=False
        )
    assert list(drawn[0]) == BASELINE_NAMES
    assert drawn[1] == {}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"step": 5, "loss": 1.0}, {"step": 5, "eval_loss": 1.0}], r"no line about computation \(flops\)"),
        ([{"step": 5, "loss": 1.0, "flops": 1e12}], r"no line about validation \(eval_loss\)"),
    ],
    ids=["no-flops", "no-validation"],
)
def test_refuses_a_log_without_a_curve(lines, message, tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text(json.dumps({"log_history": lines}))
    with pytest.raises(ValueError, match=message):
        read_curve(tmp_path)


def test_refuses_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint-"):
        read_curve(tmp_path)


# --- What is refused before anything is computed ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipes": ["papers"]}, "no recipe 'papers'; choose released, paper"),
        ({"group_by": ["cell_type", "donor"]}, "no obs column 'donor', only: cell_type. Prepare it with --obs donor"),
    ],
    ids=["recipe", "column"],
)
def test_refuses_settings(options, message, tiny_model_dir, corpus, tmp_path):
    with pytest.raises(ValueError, match=message):
        benchmark_pretraining([tiny_model_dir], corpus, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_refuses_models_that_cannot_stand_side_by_side(tiny_model_dir, corpus, tmp_path):
    with pytest.raises(ValueError, match="have the same name; rename one"):
        benchmark_pretraining([tiny_model_dir, tiny_model_dir], corpus, tmp_path / "out")
    with pytest.raises(ValueError, match="no model to measure"):
        benchmark_pretraining([], corpus, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        benchmark_pretraining([tmp_path], corpus, tmp_path / "out")
    genes = list(GeneVocabulary.default().genes)
    genes[0] = Gene("NOTAGENE")
    GeneVocabulary(genes).save(tmp_path / "genes.tsv")
    other = tmp_path / "other-genes"
    AutoModelForPreTraining.from_pretrained(tiny_model_dir).save_pretrained(other)
    ScFoundationTokenizer(tmp_path / "genes.tsv").save_pretrained(other)
    with pytest.raises(ValueError, match="other-genes have different gene vocabularies"):
        benchmark_pretraining([tiny_model_dir, other], corpus, tmp_path / "out")


def test_replaces_only_what_it_made(tiny_model_dir, corpus, tmp_path):
    existing = tmp_path / "existing"
    existing.mkdir()
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        benchmark_pretraining([tiny_model_dir], corpus, existing)
    with pytest.raises(FileExistsError, match="was not made by this benchmark"):
        benchmark_pretraining([tiny_model_dir], corpus, existing, overwrite=True)
    with pytest.raises(FileNotFoundError, match="does not exist; make it first"):
        benchmark_pretraining([tiny_model_dir], corpus, tmp_path / "missing" / "out")


# --- The command ---


def test_the_commands_pass_everything_on(tiny_model_dir, corpus, run, tmp_path, monkeypatch, capsys):
    calls = []

    def record(*arguments, **options):
        calls.append((arguments, options))
        return "made"

    # The command imports the module when it runs, so that both find the same function here.
    monkeypatch.setattr(pretraining, "benchmark_pretraining", record)
    command = f"{corpus} {tmp_path / 'out'} --model {tiny_model_dir} --run {run} --group-by cell_type --max-cells 20"
    result = CliRunner().invoke(app, ["benchmark", "pretraining", *command.split(), "--recipe", "paper"])
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(sys, "argv", ["pretraining", *command.split(), "--recipe", "paper"])
    pretraining.main()
    assert capsys.readouterr().out.endswith("made\n")
    for (models, given_corpus, output), options in calls:
        assert [str(model) for model in models] == [str(tiny_model_dir)]
        assert (str(given_corpus), output) == (str(corpus), tmp_path / "out")
        assert [str(one) for one in options["runs"]] == [str(run)]
        assert (options["recipes"], options["group_by"], options["max_cells"]) == (["paper"], ["cell_type"], 20)
