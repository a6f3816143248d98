"""Our model against the stored outputs of the original, batch in, numbers out.

Batches are built here from the parity set's own values, so that a difference lies in the model and not in the
tokenizer. Every tolerance is relative to the largest absolute value of the reference.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from scfoundation_hf.modeling_scfoundation import decoder as decoder_module
from scfoundation_hf.modeling_scfoundation.checkpoint_conversion import (
    UNUSED_NAMES,
    convert_config,
    convert_tensors,
    read_official_checkpoint,
    restore_original_tensors,
)
from scfoundation_hf.modeling_scfoundation.linear_attention import FEATURE_EPSILON, favor_attention
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining, ScFoundationModel
from scfoundation_hf.modeling_scfoundation.pooling import max_of_pooled

NUM_GENES = 19264
TARGET, SOURCE, PADDING = 19264, 19265, 19266
OUTPUT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4  # relative L2; the original's own float32 is 1.3e-5 from its float64


@pytest.fixture(scope="module")
def inputs(parity_dir: Path) -> dict[str, Tensor]:
    return load_file(parity_dir / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(parity_dir: Path) -> dict[str, Tensor]:
    return load_file(parity_dir / "outputs.safetensors")


@pytest.fixture(scope="module")
def pretraining_models(parity_dir: Path) -> dict[str, ScFoundationForPreTraining]:
    models = {}
    for key in ("cell", "rde", "gene"):
        checkpoint = read_official_checkpoint(parity_dir / "models.ckpt", key=key)
        config = convert_config(checkpoint.config, checkpoint.tensors)
        models[key] = ScFoundationForPreTraining(config).eval()
        models[key].load_state_dict(convert_tensors(checkpoint.tensors, config))
    return models


@pytest.fixture(scope="module")
def encoders(pretraining_models) -> dict[str, ScFoundationModel]:
    encoders = {}
    for key, model in pretraining_models.items():
        encoders[key] = ScFoundationModel(model.config).eval()
        encoders[key].load_state_dict(model.scfoundation.state_dict())
    return encoders


def batch_of(values: Tensor, target: Tensor, source: Tensor, hidden: Tensor | None = None) -> dict[str, Tensor]:
    """The padded batch of dense rows `(B, G)`; genes where `hidden` is true are left out."""
    rows = []
    for i, row in enumerate(values):
        visible = row > 0 if hidden is None else (row > 0) & ~hidden[i]
        genes = visible.nonzero().flatten()
        rows.append(
            (
                torch.cat([genes, torch.tensor([TARGET, SOURCE])]),
                torch.cat([row[genes], target[i : i + 1], source[i : i + 1]]),
            )
        )
    input_ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=PADDING)
    padded = torch.nn.utils.rnn.pad_sequence([row for _, row in rows], batch_first=True)
    return {"input_ids": input_ids, "values": padded, "attention_mask": (input_ids != PADDING).long()}


def ragged(mask: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Positions where `mask` is true, padded to `(B, K)`, and the values there, padded with -100."""
    positions = [row.nonzero().flatten() for row in mask]
    ids = torch.nn.utils.rnn.pad_sequence(positions, batch_first=True, padding_value=PADDING)
    if values is None:
        return ids, None
    there = [row[position] for row, position in zip(values, positions, strict=True)]
    return ids, torch.nn.utils.rnn.pad_sequence(there, batch_first=True, padding_value=-100)


def difference(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return float((ours - reference).abs().max() / reference.abs().max())


# T of each `tgthighres` of the original, from log10 of the total.
TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "a5": lambda log10_total: log10_total + 5,
    "f1": lambda log10_total: log10_total,
    "f2": lambda log10_total: log10_total + torch.log10(torch.tensor(2.0)),
    "t4": lambda log10_total: torch.full_like(log10_total, 4.0),
}


def assert_cells_match(encoder: ScFoundationModel, batch: dict[str, Tensor], reference: Tensor) -> None:
    with torch.no_grad():
        pooled = encoder(**batch).pooler_output
    ours = pooled if reference.shape == pooled.shape else max_of_pooled(pooled)
    assert difference(ours, reference) < OUTPUT_TOLERANCE


@pytest.mark.parametrize("pooling", ["all", "max"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("values", ["F", "T"], ids=["from-counts", "from-log-values"])
def test_cell_embeddings(encoders, inputs, outputs, values, target, pooling):
    # With log values the original takes the depth from their sum, not from the counts.
    total = inputs["total_counts"] if values == "F" else inputs["lognorm"].sum(dim=1)
    batch = batch_of(inputs["lognorm"], TARGETS[target](total.log10()), total.log10())
    assert_cells_match(encoders["cell"], batch, outputs[f"cell_{values}_{target}_{pooling}"])


@pytest.mark.parametrize(
    ("key", "target", "name"), [("cell", "f1", "cell_A_f1_all"), ("rde", "a5", "cell_rde_F_a5_all")]
)
def test_cell_embeddings_of_other_modes(encoders, inputs, outputs, key, target, name):
    depth = inputs["total_counts"].log10()
    assert_cells_match(encoders[key], batch_of(inputs["lognorm"], TARGETS[target](depth), depth), outputs[name])


@pytest.mark.parametrize("pooling", ["all", "max"])
@pytest.mark.parametrize("mode", ["F", "T"], ids=["normalised-here", "as-given"])
def test_bulk_embeddings(encoders, inputs, outputs, mode, pooling):
    values = torch.zeros(4, NUM_GENES)
    values[:, inputs[f"bulk_{mode}_genes"].long()] = inputs[f"bulk_{mode}_values"]
    if mode == "F":  # every row scaled to the rows' median total, then log1p; depth is log10 of the sum of those
        totals = values.double().sum(dim=1)
        values = torch.log1p(values.double() / totals[:, None] * torch.quantile(totals, 0.5)).float()
        depth = values.sum(dim=1).log10()
    else:  # no logarithm at all
        depth = values.sum(dim=1)
    assert_cells_match(encoders["cell"], batch_of(values, depth, depth), outputs[f"bulk_{mode}_{pooling}"])


def test_gene_embeddings(pretraining_models, inputs, outputs):
    depth = inputs["total_counts"][:2].log10()
    with torch.no_grad():
        output = pretraining_models["gene"](
            **batch_of(inputs["lognorm"][:2], depth, depth), output_gene_embeddings=True
        )
    ours = output.gene_embeddings[:, inputs["gene_positions"].long()]
    assert difference(ours, outputs["gene_F_f1"]) < OUTPUT_TOLERANCE


@pytest.fixture(scope="module")
def predicted_expression(pretraining_models, inputs) -> Tensor:
    """All four cells in one batch."""
    depth = inputs["tokens_expr_F_t4"]
    with torch.no_grad():
        batch = batch_of(inputs["lognorm"], depth[:, 0], depth[:, 1])
        return pretraining_models["gene"](**batch).predicted_values


def test_predicted_expression(predicted_expression, outputs):
    assert difference(predicted_expression, outputs["expr_single_F_t4"]) < OUTPUT_TOLERANCE


# --- The masked forward: predictions, loss, gradients -------------------------------------------------------------


@pytest.fixture(scope="module")
def masked_batch(inputs) -> dict[str, Tensor]:
    mask = inputs["masked_mask"].bool()[:, :NUM_GENES]
    batch = batch_of(inputs["lognorm"][:2], inputs["masked_T_S"][:, 0], inputs["masked_T_S"][:, 1], mask)
    return {**batch, "masked_ids": ragged(mask)[0]}


def test_masked_predictions_at_all_positions(pretraining_models, masked_batch, outputs):
    """T and S included: the original predicts a value there too."""
    everything = torch.arange(NUM_GENES + 2).expand(2, -1)
    with torch.no_grad():
        ours = pretraining_models["gene"](**masked_batch, target_ids=everything).predicted_values
    assert difference(ours, outputs["masked_pred"]) < OUTPUT_TOLERANCE


def loss_of(model: ScFoundationForPreTraining, masked_batch: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    mask = inputs["masked_mask"].bool()[:, :NUM_GENES]
    target_ids, labels = ragged(mask, inputs["lognorm"][:2])
    return model(**masked_batch, target_ids=target_ids, labels=labels).loss


def original_gradients(model: ScFoundationForPreTraining, loss: Tensor) -> dict[str, Tensor]:
    """Our gradients under the original's names."""
    model.zero_grad()
    loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    buffers = {name: torch.zeros_like(buffer) for name, buffer in model.named_buffers()}
    return restore_original_tensors({**ours, **buffers}, dict.fromkeys(UNUSED_NAMES, torch.zeros(1)), model.config)


def largest_gradient_difference(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Largest relative L2 difference over the parameters whose gradient is not rounding noise."""
    largest = 0.0
    for name, expected in reference.items():
        original = name.removeprefix("grad.")
        if name == original:
            continue
        if original in UNUSED_NAMES:
            assert not expected.any(), original
            continue
        assert ours[original].shape == expected.shape, original
        if expected.norm() < 1e-6:  # key biases: softmax does not see them
            assert ours[original].norm() < 1e-5, original
            continue
        largest = max(largest, float((ours[original] - expected).norm() / expected.norm()))
    return largest


@pytest.fixture(scope="module")
def reference_gradients(parity_dir: Path) -> dict[str, Tensor]:
    return load_file(parity_dir / "masked_gradients.safetensors")


def test_masked_loss_and_gradients(pretraining_models, masked_batch, inputs, reference_gradients, parity_dir):
    model = pretraining_models["gene"]
    loss = loss_of(model, masked_batch, inputs)
    assert loss.item() == pytest.approx(1.3034823, rel=1e-6)
    ours = original_gradients(model, loss)
    stored = [name for name in reference_gradients if name.startswith("grad.")]
    assert len(stored) > 50
    assert largest_gradient_difference(ours, reference_gradients) < GRADIENT_TOLERANCE
    rows = reference_gradients["grad_rows.pos_emb.index"].long()
    expected = reference_gradients["grad_rows.pos_emb.weight"]
    assert (ours["pos_emb.weight"][rows] - expected).norm() / expected.norm() < GRADIENT_TOLERANCE
    # Parameters too large to be stored are compared by their norm.
    for name, norm in json.loads((parity_dir / "facts.json").read_text())["masked"]["gradient_l2_norms"].items():
        if norm is not None and norm > 1e-6:
            assert float(ours[name].norm()) == pytest.approx(norm, rel=GRADIENT_TOLERANCE), name


def with_constant_stabiliser(query: Tensor, key: Tensor, value: Tensor, projection: Tensor, **_: None) -> Tensor:
    """`favor_attention`, but no gradient flows through the key stabiliser G."""

    def project(states: Tensor) -> tuple[Tensor, Tensor]:
        scaled = states * states.shape[-1] ** -0.25
        return scaled @ projection.T, scaled.square().sum(dim=-1, keepdim=True) / 2

    query_logits, query_half_square = project(query)
    key_logits, key_half_square = project(key)
    stabiliser = key_logits.amax(dim=(1, 2, 3), keepdim=True).detach()
    query_features = torch.exp(query_logits - query_half_square - query_logits.amax(-1, keepdim=True)) + FEATURE_EPSILON
    key_features = torch.exp(key_logits - key_half_square - stabiliser) + FEATURE_EPSILON
    numerator = query_features @ (key_features.transpose(-1, -2) @ value)
    return numerator / (query_features @ key_features.sum(dim=2)[..., None])


@pytest.mark.parametrize(("attention", "agrees"), [(favor_attention, True), (with_constant_stabiliser, False)])
def test_gradients_flow_through_the_key_stabiliser(
    pretraining_models, masked_batch, inputs, reference_gradients, monkeypatch, attention, agrees
):
    """G is no mere shift that cancels: beside the constant 1e-4 it scales the answer, so its gradient counts."""
    monkeypatch.setattr(decoder_module, "streaming_favor_attention", attention)
    monkeypatch.setattr(decoder_module, "LARGEST_SUBTRACTED_LOGIT", -torch.inf)  # the first layer too
    model = pretraining_models["gene"]
    loss = loss_of(model, masked_batch, inputs)
    assert loss.item() == pytest.approx(1.3034823, rel=1e-6)
    found = largest_gradient_difference(original_gradients(model, loss), reference_gradients)
    assert (found < GRADIENT_TOLERANCE) == agrees, found


# --- What we do not match, on purpose --------------------------------------------------------------------------------


def test_the_originals_batched_expression_differs(predicted_expression, outputs):
    """Its stabiliser spans the batch; ours is per cell. Cell 2 holds the batch's largest key in every layer."""
    per_cell = (predicted_expression - outputs["expr_batch_F_t4"]).abs().amax(dim=1)
    assert per_cell.max().item() == pytest.approx(2.8e-4, rel=0.1)
    assert per_cell[2] < 1e-5
    assert (per_cell[[0, 1, 3]] > 5e-5).all()
    assert difference(predicted_expression, outputs["expr_batch_F_t4"]) > OUTPUT_TOLERANCE


def test_the_originals_batched_gene_embeddings_differ(pretraining_models, inputs, outputs):
    depth = inputs["total_counts"].log10()
    with torch.no_grad():
        model = pretraining_models["gene"]
        together = model(**batch_of(inputs["lognorm"], depth, depth), output_gene_embeddings=True).gene_embeddings
    ours = together[:2, inputs["gene_positions"].long()]
    assert difference(ours, outputs["gene_F_f1"]) < OUTPUT_TOLERANCE  # as its cells one at a time
    assert difference(ours, outputs["genebatch_A_f1"]) > OUTPUT_TOLERANCE


def test_the_originals_batched_masked_forward_differs(pretraining_models, masked_batch, outputs):
    with torch.no_grad():
        ours = pretraining_models["gene"](**masked_batch).predicted_values
    assert difference(ours, outputs["masked_pred"][:, :NUM_GENES]) < OUTPUT_TOLERANCE
    assert difference(ours, outputs["masked_pred_batch_of_2"][:, :NUM_GENES]) > OUTPUT_TOLERANCE


def test_the_originals_dropped_target_token_is_kept(encoders, inputs, outputs):
    """With T = 0 the original drops the token and pools the last gene in its place; here T is always a token."""
    depth = inputs["total_counts"].log10()
    quirk = outputs["cell_quirk_F_t0_all"]
    batch = batch_of(inputs["lognorm"], torch.zeros(4), depth)
    with torch.no_grad():
        ours = encoders["cell"](**batch).pooler_output
    assert difference(ours, quirk) > 0.05
    # The same tokens give the original's numbers, pooled by its positions: the last gene stands for T.
    for row in range(4):
        keep = batch["attention_mask"][row].bool() & (batch["input_ids"][row] != TARGET)
        cell = {name: tensor[row : row + 1, keep] for name, tensor in batch.items()}
        with torch.no_grad():
            assert difference(encoders["cell"](**cell).pooler_output[0], quirk[row]) < OUTPUT_TOLERANCE
