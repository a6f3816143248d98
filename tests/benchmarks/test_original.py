"""The baseline computes what our model computes, and what the original computed: only then is its time a comparison."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import pytest
import torch
from harness.original import DenseCell, OriginalModel, dense_cells, through_sdpa
from safetensors.torch import load_file
from torch import Tensor

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.checkpoint_conversion import (
    convert_config,
    convert_tensors,
    read_official_checkpoint,
)
from scfoundation_hf.modeling_scfoundation.losses import masked_mean_squared_error
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.data_collator import as_tensors, pack_cells
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

NUM_GENES, PADDING = 19264, 19266
TOLERANCE = 1e-5  # of values around 1
PARITY_TOLERANCE = 1e-4  # of the largest value, as for our model

ENCODER_PATHS = pytest.mark.parametrize("encoder_path", [nullcontext, through_sdpa], ids=["as-shipped", "sdpa"])
EncoderPath = Callable[[OriginalModel], AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def model(tiny_config: ScFoundationConfig) -> ScFoundationForPreTraining:
    """Norms and biases away from their initial values, so that a forgotten one shows."""
    torch.manual_seed(0)
    model = ScFoundationForPreTraining(tiny_config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def original(model: ScFoundationForPreTraining) -> OriginalModel:
    return OriginalModel(model)


@pytest.fixture(scope="module")
def batch(example_cells: Path) -> dict[str, Any]:
    """Three real cells, packed."""
    cells = ScFoundationTokenizer().prepare(anndata.read_h5ad(example_cells)[:3].copy())
    return as_tensors(pack_cells(cells.encode(0, 3)), "pt")


@pytest.fixture(scope="module")
def masked_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Every third expressed gene hidden, and as many zeros; cells of unequal length, so targets are padded."""
    visible = torch.ones(batch["input_ids"].shape[1], dtype=torch.bool)
    borders = batch["cu_seq_lens_q"].tolist()
    hidden, labels = [], []
    for start, end in pairwise(borders):
        chosen = torch.arange(start, end - 2, 3)
        visible[chosen] = False
        genes = batch["input_ids"][0, start : end - 2]
        zeros = torch.tensor(sorted(set(range(NUM_GENES)) - set(genes.tolist())))[: len(chosen)]
        ids, order = torch.cat([batch["input_ids"][0, chosen], zeros]).sort()
        hidden.append(ids)
        labels.append(torch.cat([batch["values"][0, chosen], torch.zeros(len(zeros))])[order])
    lengths = torch.stack([part.sum() for part in visible.split(batch["cu_seq_lens_q"].diff().tolist())])
    ids = torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True, padding_value=PADDING)
    borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return {
        "input_ids": batch["input_ids"][:, visible],
        "values": batch["values"][:, visible],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
        "masked_ids": ids,
        "target_ids": ids,
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
    }


@ENCODER_PATHS
def test_embeddings_are_ours(model, original, batch, encoder_path: EncoderPath):
    model.scfoundation.add_pooling_layer = True
    with torch.inference_mode(), encoder_path(original):
        ours = model.scfoundation(**batch).pooler_output
        theirs = torch.stack([original.embed(cell) for cell in dense_cells(batch, model.config)])
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@ENCODER_PATHS
def test_gene_embeddings_and_predictions_are_ours(model, original, batch, encoder_path: EncoderPath):
    with torch.inference_mode(), encoder_path(original):
        ours = model(**batch, output_gene_embeddings=True)
        cells = dense_cells(batch, model.config)
        theirs = torch.stack([original.gene_embeddings(cell) for cell in cells])
        predicted = torch.stack([original.enhance(cell) for cell in cells])
    torch.testing.assert_close(ours.gene_embeddings, theirs, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours.predicted_values, predicted, atol=TOLERANCE, rtol=0)


def test_loss_and_gradients_are_ours(model, masked_batch):
    original = OriginalModel(model)
    model.zero_grad()
    output = model(**masked_batch)
    for cell, (predicted, labels) in enumerate(zip(output.predicted_values, masked_batch["labels"], strict=True)):
        loss = original.loss(dense_cells(masked_batch, model.config)[cell])
        expected = masked_mean_squared_error(predicted[None], labels[None])
        torch.testing.assert_close(loss, expected, atol=TOLERANCE, rtol=0)
        (loss / len(output.predicted_values)).backward()
        (expected / len(output.predicted_values)).backward(retain_graph=True)
    ours, theirs = dict(model.named_parameters()), dict(original.named_parameters())
    pairs = {
        "scfoundation.embeddings.value_embedding.bin_embeddings": "value_embedding.bin_embeddings",
        "scfoundation.embeddings.value_embedding.mask_embedding": "value_embedding.mask_embedding",
        "scfoundation.embeddings.identity_embedding.weight": "identity_embedding.weight",
        "scfoundation.encoder.layers.0.up_proj.weight": "encoder_layers.0.linear1.weight",
        "scfoundation.encoder.layers.1.self_attn.o_proj.weight": "encoder_layers.1.self_attn.out_proj.weight",
        "decoder.input_projection.weight": "input_projection.weight",
        "decoder.layers.0.attention.q_proj.weight": "decoder_layers.0.attention.q_proj.weight",
        "decoder.layers.0.attention.k_proj.weight": "decoder_layers.0.attention.k_proj.weight",
        "decoder.layers.1.down_proj.weight": "decoder_layers.1.down_proj.weight",
        "prediction_head.weight": "prediction_head.weight",
    }
    for our_name, name in pairs.items():
        difference = (ours[our_name].grad - theirs[name].grad).norm() / theirs[name].grad.norm()
        assert difference < 1e-4, (our_name, float(difference))


def test_the_fast_path_is_taken_and_switched_off(original, batch):
    """The two rows of every table are two computations: only one of them calls the fused layer."""
    cell = dense_cells(batch, original.config)[0]

    def fused_calls() -> int:
        with torch.inference_mode(), torch.profiler.profile() as profile:
            original.embed(cell)
        return sum(event.count for event in profile.key_averages() if "transformer_encoder_layer_fwd" in event.key)

    assert fused_calls() == original.config.num_hidden_layers
    with through_sdpa(original):
        assert fused_calls() == 0
    assert torch.backends.mha.get_fastpath_enabled()


# --- Against what the original itself computed -------------------------------------------------------------------


@pytest.fixture(scope="module")
def parity(parity_dir: Path) -> dict[str, dict[str, Tensor]]:
    return {name: load_file(parity_dir / f"{name}.safetensors") for name in ("inputs", "outputs")}


def parity_original(parity_dir: Path, key: str) -> OriginalModel:
    checkpoint = read_official_checkpoint(parity_dir / "models.ckpt", key=key)
    config = convert_config(checkpoint.config, checkpoint.tensors)
    model = ScFoundationForPreTraining(config).eval()
    model.load_state_dict(convert_tensors(checkpoint.tensors, config))
    return OriginalModel(model)


def assert_as_the_original(theirs: Tensor, reference: Tensor) -> None:
    assert float((theirs - reference).abs().max() / reference.abs().max()) < PARITY_TOLERANCE


def test_embeddings_are_the_originals(parity_dir, parity):
    inputs, original = parity["inputs"], parity_original(parity_dir, "cell")
    depth = inputs["total_counts"].log10()[:, None]
    values = torch.cat([inputs["lognorm"], depth, depth], dim=1)
    with torch.inference_mode():
        theirs = torch.stack([original.embed(DenseCell(row[None])) for row in values])
    assert_as_the_original(theirs, parity["outputs"]["cell_F_f1_all"])


def test_predictions_are_the_originals(parity_dir, parity):
    inputs, original = parity["inputs"], parity_original(parity_dir, "gene")
    values = torch.cat([inputs["lognorm"], inputs["tokens_expr_F_t4"]], dim=1)
    masked = torch.cat([inputs["lognorm"][:2], inputs["masked_T_S"]], dim=1)
    is_hidden = inputs["masked_mask"].bool()
    with torch.inference_mode():
        enhanced = torch.stack([original.enhance(DenseCell(row[None])) for row in values])
        decoded = torch.cat([original.decode(DenseCell(masked[i : i + 1], is_hidden[i : i + 1])) for i in range(2)])
        predicted = original.prediction_head(decoded).squeeze(-1)
    assert_as_the_original(enhanced, parity["outputs"]["expr_single_F_t4"])
    assert_as_the_original(predicted, parity["outputs"]["masked_pred"])


def test_sdpa_without_dropout_is_put_back(tiny_config):
    original = OriginalModel(ScFoundationForPreTraining(tiny_config))
    attention = original.encoder_layers[0].self_attn
    with through_sdpa(original):
        assert attention.dropout == 0
    assert attention.dropout == tiny_config.attention_probs_dropout_prob > 0
