"""A small vocabulary, a model far from its initial values, and cells of unequal length."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining, ScFoundationModel

Cell = dict[str, Tensor]
Batch = dict[str, Any]


@pytest.fixture
def small_config() -> ScFoundationConfig:
    return ScFoundationConfig(
        num_genes=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_head_dim=16,
        decoder_intermediate_size=40,
        num_bins=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


@pytest.fixture
def build() -> Callable[..., Any]:
    """Build a model and move all its parameters, norms and biases too, away from their initial values."""

    def build(model_class: type, config: ScFoundationConfig, *, backend: str = "sdpa") -> Any:
        torch.manual_seed(0)
        model = model_class._from_config(config, attn_implementation=backend)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()

    return build


@pytest.fixture
def encoder(build: Callable[..., Any], small_config: ScFoundationConfig) -> ScFoundationModel:
    return build(ScFoundationModel, small_config)


@pytest.fixture
def pretraining_model(build: Callable[..., Any], small_config: ScFoundationConfig) -> ScFoundationForPreTraining:
    return build(ScFoundationForPreTraining, small_config)


@pytest.fixture
def cells(small_config: ScFoundationConfig) -> list[Cell]:
    """Cells of 20, 1, 31 and 7 genes; the first gene and the last are expressed in some."""
    generator = torch.Generator().manual_seed(1)
    depth_tokens = torch.tensor([small_config.target_depth_token_id, small_config.source_depth_token_id])
    made = []
    for num_genes in (20, 1, 31, 7):
        genes = torch.randperm(small_config.num_genes, generator=generator)[:num_genes].sort().values
        values = 0.1 + 5 * torch.rand(num_genes + 2, generator=generator)
        made.append({"input_ids": torch.cat([genes, depth_tokens]), "values": values})
    return made


@pytest.fixture
def pad(small_config: ScFoundationConfig) -> Callable[..., Batch]:
    def pad(cells: list[Cell], *, side: str = "right", extra: int = 0) -> Batch:
        length = max(len(cell["input_ids"]) for cell in cells) + extra
        input_ids = torch.full((len(cells), length), small_config.pad_token_id)
        values = torch.zeros(len(cells), length)
        for row, cell in enumerate(cells):
            size = len(cell["input_ids"])
            place = slice(0, size) if side == "right" else slice(length - size, length)
            input_ids[row, place] = cell["input_ids"]
            values[row, place] = cell["values"]
        mask = (input_ids != small_config.pad_token_id).long()
        return {"input_ids": input_ids, "values": values, "attention_mask": mask}

    return pad


@pytest.fixture
def pack() -> Callable[[list[Cell]], Batch]:
    def pack(cells: list[Cell]) -> Batch:
        lengths = torch.tensor([len(cell["input_ids"]) for cell in cells])
        borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return {
            "input_ids": torch.cat([cell["input_ids"] for cell in cells])[None],
            "values": torch.cat([cell["values"] for cell in cells])[None],
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": int(lengths.max()),
            "max_length_k": int(lengths.max()),
        }

    return pack


@pytest.fixture
def unpadded() -> Callable[[Tensor, Tensor], Tensor]:
    """The real tokens of a padded batch in one row, `(1, tokens, D)`, as a packed batch has them."""
    return lambda states, attention_mask: states[attention_mask.bool()][None]
