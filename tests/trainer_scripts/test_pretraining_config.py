"""A run is described by a file, a recipe or options; what cannot be meant is refused with the nearest that can."""

import pytest

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.trainer_scripts.pretraining_config import parse_options, read_config, recipe_names

PLACES = ["--corpus", "cells", "--output-dir", "run"]


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        (tmp_path / "config.yaml").write_text(text)
        return tmp_path / "config.yaml"

    return write


def test_options_override_the_file(config_file):
    path = config_file(
        "corpus: cells\noutput_dir: run\nmax_steps: 10\nlearning_rate: 1e-3\nmodel_overrides: {num_bins: 7}\n"
    )
    config = read_config(
        path, ["--max-steps", "20", "--seed=3", "--overwrite", "--report-to", "[tensorboard]", "--eval-strategy", "no"]
    )
    assert (config.corpus, config.training.output_dir, config.model) == ("cells", "run", "100m")
    assert (config.training.max_steps, config.training.seed, config.overwrite) == (20, 3, True)
    assert config.training.learning_rate == 1e-3  # text to YAML
    assert config.training.report_to == ["tensorboard"]
    assert config.training.eval_strategy == "no"  # which YAML reads as false
    assert config.model_overrides == {"num_bins": 7}


def test_options_are_read_as_yaml():
    options = ["--bf16", "--model-overrides", "{hidden_size: 16}", "--tokens-per-batch", "null", "--max-grad-norm=0.5"]
    assert parse_options(options) == {
        "bf16": True,
        "model_overrides": {"hidden_size": 16},
        "tokens_per_batch": None,
        "max_grad_norm": 0.5,
    }


@pytest.mark.parametrize("name", ["pretrain-3m", "pretrain-10m", "pretrain-100m"])
def test_recipes_are_complete(name):
    assert name in recipe_names()
    config = read_config(name, PLACES)
    assert config.model == name.removeprefix("pretrain-")
    ScFoundationConfig.from_preset(config.model)
    args = config.training
    assert 0 < args.warmup_steps < args.max_steps
    assert args.eval_strategy == "steps"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("max_step: 10", PLACES, "no setting 'max_step'; did you mean 'max_steps'"),
        ("model: 3m", [*PLACES, "--learning-rates", "1"], "no setting 'learning_rates'; did you mean 'learning_rate'"),
        ("xyzzy: 1", PLACES, "no setting 'xyzzy'; see docs/pretraining.md"),
        ("max_steps: many", PLACES, "max_steps is 'many'; expected int"),
        ("bf16: 3", PLACES, "bf16 is 3; expected bool"),
        ("max_steps: true", PLACES, "max_steps is True; expected int"),
        ("learning_rate: fast", PLACES, "learning_rate is 'fast'; expected float"),
        ("masking: original", PLACES, "masking is 'original'; expected released or paper"),
        ("tokens_per_batch: many", PLACES, "tokens_per_batch is 'many'; expected int or null"),
        ("model: 3m", ["--corpus", "cells"], "names no output_dir: a folder to make. .* --output-dir"),
        ("model: 3m", ["--output-dir", "run"], "names no corpus: a folder made by `scfoundation prepare`"),
        ("- 3m", PLACES, "holds no `key: value` lines, but list"),
        ("model: 3m", ["max-steps", "3"], "Expected an option such as --max-steps, got 'max-steps'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(config_file, text, options, message):
    with pytest.raises(ValueError, match=message):
        read_config(config_file(text), options)


def test_a_missing_file_names_the_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.yaml, and no recipe of that name: pretrain-100m"):
        read_config(tmp_path / "nowhere.yaml")
