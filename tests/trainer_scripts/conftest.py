"""A small corpus of real cells, and the settings of a run that takes seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scfoundation_hf.corpus.prepare import prepare
from scfoundation_hf.trainer_scripts.pretraining_config import PretrainingConfig

TINY_MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_head_dim": 8,
    "decoder_num_random_features": 16,
    "decoder_intermediate_size": 16,
    "num_bins": 5,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="session")
def corpus(example_cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example cells, prepared: nearly all to train on and some 25 to validate with."""
    folder = tmp_path_factory.mktemp("corpus")
    prepare([example_cells], folder, validation_share=0.03, progress=False)
    return folder


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a run of eight steps with everything that a run can do: dropout, redrawn features, a switch of positions."""
    return {
        "corpus": str(corpus),
        "output_dir": str(tmp_path / "run"),
        "model": "3m",
        "model_overrides": TINY_MODEL,
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "effective_batch_size": 4,
        "warmup_steps": 2,
        "bf16": False,
        "decoder_positions": 512,
        "all_positions_from": 7,
        "feature_redraw_interval": 3,
        "logging_steps": 3,
        "save_steps": 4,
        "disable_tqdm": True,
    }


@pytest.fixture
def make_config(settings: dict[str, Any]) -> Callable[..., PretrainingConfig]:
    """The run of `settings`, with some of them different."""
    return lambda **changes: PretrainingConfig.from_dict(settings | changes)
