"""Fixtures that every test may use: real cells, the parity set, tiny models with random weights."""

import os

# Before transformers is imported: nothing in the tests may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anndata import AnnData

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


def _shared(folder: str) -> Path:
    path = SHARED / folder
    if not path.is_dir():
        pytest.skip(f"needs the project's shared folder {folder} beside the clone, which is not part of it")
    return path


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of this checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def write_copy() -> Callable[[AnnData, Path], Path]:
    """Write cells to a path that ends in .h5ad or .zarr, and give it back; what zarr says of its formats is ignored."""

    def write(cells: AnnData, path: Path) -> Path:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Writing zarr v2|Consolidated metadata")
            cells.write_zarr(path) if path.suffix == ".zarr" else cells.write_h5ad(path)
        return path

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real human cells: shared/data, or skip."""
    return _shared("data")


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Inputs, weights and outputs of the original code: shared/reference/parity, or skip."""
    return _shared("reference/parity")


@pytest.fixture(scope="session")
def example_cells() -> Path:
    """The cut of real cells that the repository ships."""
    return REPOSITORY / "examples" / "data" / "zheng_facs_pbmc_cut.h5ad"


@pytest.fixture(scope="session")
def tiny_config() -> ScFoundationConfig:
    """All 19,264 genes, everything else as small as it gets."""
    return ScFoundationConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_head_dim=8,
        decoder_intermediate_size=16,
        num_bins=5,
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_config: ScFoundationConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model with random weights, tokenizer included."""
    from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
    from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    ScFoundationForPreTraining(tiny_config).save_pretrained(folder)
    ScFoundationTokenizer().save_pretrained(folder)
    return folder
