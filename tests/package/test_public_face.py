"""What `import scfoundation_hf` promises."""

import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoTokenizer

import scfoundation_hf


def test_the_auto_classes_know_the_model(tiny_model_dir):
    assert type(AutoConfig.from_pretrained(tiny_model_dir)) is scfoundation_hf.ScFoundationConfig
    assert type(AutoModel.from_pretrained(tiny_model_dir)) is scfoundation_hf.ScFoundationModel
    assert type(AutoModelForPreTraining.from_pretrained(tiny_model_dir)) is scfoundation_hf.ScFoundationForPreTraining
    assert type(AutoTokenizer.from_pretrained(tiny_model_dir)) is scfoundation_hf.ScFoundationTokenizer


@pytest.mark.parametrize("name", scfoundation_hf.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(scfoundation_hf, name)
    assert name in dir(scfoundation_hf)
    if name != "__version__":
        assert value.__doc__


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="has no attribute 'enhance_everything'"):
        scfoundation_hf.enhance_everything  # noqa: B018


def test_importing_is_light():
    script = (
        "import sys, scfoundation_hf; "
        "print([m for m in ('anndata', 'datasets', 'scanpy', 'xformers', 'h5py', 'zarr') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
