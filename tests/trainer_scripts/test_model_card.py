"""The card says what the folder's files say, and no more."""

import json
import re
import shutil
import sys

import pytest
from huggingface_hub import ModelCard

from scfoundation_hf import ScFoundationConfig, ScFoundationForPreTraining
from scfoundation_hf.corpus.lookup import MEMBERS_FILE, TrainingCells
from scfoundation_hf.trainer_scripts import model_card
from scfoundation_hf.trainer_scripts.model_card import card_of_folder, make_model_card, record_results

MEASURES = {"mae": 0.4, "mse_nonzero": 0.9, "mae_nonzero": 0.7, "mre_nonzero": 0.5, "pearson": 0.81}
MEASURES |= {"pearson_nonzero": 0.62, "mse_zero": 0.1, "mae_zero": 0.2}
REPORT = {
    "base_model": None,
    "settings": {
        "model": "3m",
        "masking": "released",
        "optim": "adamw_torch",
        "learning_rate": 1e-4,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    },
    "corpus": {"train_cells": 21_000},
    "num_parameters": 3_696_445,
    "steps": 1000,
    "cells": 64_000.0,
    "flops": 1.5e15,
    "seconds": 7200.0,
    "num_processes": 1,
    "cells_per_second": 8.9,
    "mfu": 0.31,
    "hardware": "2 cores of x86_64 (cpu)",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "validation": {"eval_loss": 0.25, "eval_num_cells": 500}
    | {f"eval_{name}": value for name, value in MEASURES.items()},
}
MANIFEST = {"sources": [{"name": "hao_pbmc", "num_cells": 980}, {"name": "baron_pancreas", "num_cells": 170}]}
IDS = [f"{number:032x}" for number in range(0, 2**120, 2**117)]


def test_a_pretrained_model(capsys):
    card = make_model_card(REPORT, manifest=MANIFEST, training_cells=TrainingCells.from_ids([("hao_pbmc", IDS)]))
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"mse": 0.25, "mae": 0.4, "pearsonr": 0.81, "mse_nonzero": 0.9, "pearsonr_nonzero": 0.62}
    assert ModelCard(str(card)).data.eval_results == card.data.eval_results  # the metadata are valid YAML
    for phrase in (
        "trained from random weights",
        "| cells in the training split | 21,000 |",
        "2.00 h on 2 cores of x86_64 (cpu), 1 process |",
        "energy was not measured",
        "| hao_pbmc | 980 |",
        "`scfoundation lookup FOLDER cells.h5ad`",
        "8 training cells in `training_cells.safetensors`",
        "| all | 0.2500 | 0.4000 | | 0.810 |",
        "No baseline was computed",
        "## Intended use",
        "## Limits",
        "The code is Apache-2.0.",
    ):
        assert phrase in card.text, phrase
    assert "non-commercial" not in card.text
    assert card.data.license is None  # who publishes the weights has to state it


def test_baselines_and_emissions_are_shown_when_the_report_has_them():
    emissions = {"grams_co2": 12.0, "kwh": 0.04, "source": "wall meter"}
    card = make_model_card(REPORT | {"baselines": {"gene mean": {"mse": 0.5} | MEASURES}, "emissions": emissions})
    assert "| this model | 0.2500 | 0.9000 | 0.810 | 0.620 |" in card.text
    assert "| gene mean | 0.5000 | 0.9000 | 0.810 | 0.620 |" in card.text
    assert "12 g CO2 equivalent, 0.04 kWh (wall meter)" in card.text
    assert card.data.to_dict()["co2_eq_emissions"]["training_type"] == "pre-training"


def test_the_licence_that_a_run_states():
    card = make_model_card(REPORT | {"license": "cc-by-4.0"})
    assert card.data.license == "cc-by-4.0"
    assert "The weights: cc-by-4.0." in card.text


def test_a_run_without_validation():
    card = make_model_card(REPORT | {"validation": None})
    assert card.data.eval_results is None
    assert "## Validation" not in card.text


def test_what_comes_from_the_official_weights_stays_non_commercial(tmp_path):
    (tmp_path / "original_config.json").write_text("{}")
    card = make_model_card(REPORT | {"base_model": "scfoundation-cell"}, base_folder=tmp_path)
    assert card.data.license_name == "scfoundation-model-license-non-commercial"
    assert "**non-commercial research only**" in card.text
    assert "continued from `scfoundation-cell`" in card.text


def test_the_licence_of_any_other_base_model_is_passed_on(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Base\n")
    card = make_model_card(REPORT | {"base_model": "base"}, base_folder=tmp_path)
    assert card.data.license == "cc-by-4.0"
    assert make_model_card(REPORT | {"base_model": "base"}, base_folder=tmp_path / "none").data.license is None


def test_the_card_of_a_folder_is_made_of_its_files(tiny_model_dir, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    assert "How these weights were made is not recorded" in card_of_folder(folder).text
    (folder / "training_report.json").write_text(json.dumps(REPORT))
    (folder / "data_manifest.json").write_text(json.dumps(MANIFEST))
    TrainingCells.from_ids([("hao_pbmc", IDS)]).save(folder / MEMBERS_FILE)
    card = card_of_folder(folder)
    assert "| baron_pancreas | 170 |" in card.text
    assert "8 training cells" in card.text
    monkeypatch.setattr(sys, "argv", ["model_card", str(folder)])
    model_card.main()
    assert capsys.readouterr().out == f"{card}\n"


@pytest.fixture
def measured(tiny_model_dir, tmp_path) -> tuple:
    """A model folder with a report, and results that name it."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    (folder / "training_report.json").write_text(json.dumps(REPORT))
    predictors = {"model": {"mse": 0.2} | MEASURES, "gene mean": {"mse": 0.7} | MEASURES}
    content = {"models": {"model": {}}, "recipes": {"released": {"num_cells": 1435, "predictors": predictors}}}
    results = tmp_path / "results.json"
    results.write_text(json.dumps(content))
    return folder, results


def test_the_results_of_a_benchmark_are_taken_into_report_and_card(measured, monkeypatch, capsys):
    folder, results = measured
    monkeypatch.setattr(sys, "argv", ["model_card", str(folder), "--results", str(results)])
    model_card.main()
    text = capsys.readouterr().out
    assert "Hidden genes of 1,435 cells" in text
    assert "| this model | 0.2000 | 0.9000 | 0.810 | 0.620 |" in text
    assert "| gene mean | 0.7000 | 0.9000 | 0.810 | 0.620 |" in text
    assert ModelCard.load(folder / "README.md").content == text.removesuffix("\n")
    assert json.loads((folder / "training_report.json").read_text())["steps"] == REPORT["steps"]


def test_results_of_something_else_are_not_taken(measured, tmp_path):
    folder, results = measured
    with pytest.raises(ValueError, match="no recipe 'paper', only: released"):
        record_results(folder, results, recipe="paper")
    with pytest.raises(ValueError, match="no model 'other', only: model"):
        record_results(folder.rename(tmp_path / "other"), results)
    bare = shutil.copytree(tmp_path / "other", tmp_path / "again" / "model")
    (bare / "training_report.json").unlink()
    with pytest.raises(ValueError, match=r"has no training_report\.json"):
        record_results(bare, results)


def test_the_number_of_parameters_is_that_of_the_model(tiny_model_dir, tiny_config):
    num_parameters = ScFoundationForPreTraining(ScFoundationConfig.from_pretrained(tiny_model_dir)).num_parameters()
    assert f"{num_parameters:,} parameters" in card_of_folder(tiny_model_dir).text


@pytest.mark.parametrize(
    "changes", [{}, {"validation": None}, {"base_model": "x"}], ids=["plain", "no validation", "base"]
)
def test_no_part_of_the_template_is_left_in_the_card(changes):
    text = str(make_model_card(REPORT | changes, manifest=MANIFEST))
    assert not re.search(r"\{\{|\}\}|\{%|%\}|None|Undefined", text)
