"""What the tests of several benchmarks share."""

import shutil
from pathlib import Path

import pytest
import torch

from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining


@pytest.fixture
def trained_further(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with other weights, in a folder of the same name."""
    folder = tmp_path / "further" / tiny_model_dir.name
    shutil.copytree(tiny_model_dir, folder)
    model = ScFoundationForPreTraining.from_pretrained(folder)
    with torch.no_grad():
        model.scfoundation.encoder.norm.weight *= 2
    model.save_pretrained(folder)
    return folder
