import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import (
    ScFoundationForPreTraining,
    ScFoundationForPreTrainingOutput,
    ScFoundationModel,
)

# float32 rounding: other batch shapes take other kernels and sum in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
CPU_BACKENDS = ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]  # flex compiles first


@pytest.fixture
def hidden(small_config) -> dict:
    """Two, one, none and two genes hidden of the four cells; targets are these and one more zero gene."""
    padding = small_config.pad_token_id
    return {
        "masked_ids": torch.tensor([[0, 59], [4, padding], [padding, padding], [8, 9]]),
        "target_ids": torch.tensor([[0, 59, 7], [4, 2, padding], [padding, padding, padding], [8, 9, 10]]),
        "labels": torch.tensor([[0.5, 1, 0], [2, 0, -100], [-100, -100, -100], [0, 3, 1]]),
    }


# --- The same numbers for a cell, whatever it comes with -----------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_equals_its_cells_one_by_one(encoder, cells, pad, side):
    with torch.no_grad():
        together = encoder(**pad(cells, side=side, extra=3))
        for row, cell in enumerate(cells):
            alone = encoder(**pad([cell]))
            torch.testing.assert_close(together.pooler_output[row], alone.pooler_output[0], **TOLERANCE)
            size = len(cell["input_ids"])
            states = together.last_hidden_state[row]
            tokens = states[:size] if side == "right" else states[-size:]
            torch.testing.assert_close(tokens, alone.last_hidden_state[0], **TOLERANCE)


def test_the_order_of_cells_does_not_matter(pretraining_model, encoder, cells, pad):
    order = [2, 0, 3, 1]
    shuffled = pad([cells[i] for i in order])
    with torch.no_grad():
        for model, name in ((encoder, "pooler_output"), (pretraining_model, "predicted_values")):
            straight = model(**pad(cells))[name]
            torch.testing.assert_close(model(**shuffled)[name], straight[order], **TOLERANCE)


@pytest.mark.parametrize("side", ["right", "left"])
def test_predictions_of_a_batch_equal_its_cells_one_by_one(pretraining_model, cells, pad, hidden, side):
    with torch.no_grad():
        together = pretraining_model(**pad(cells, side=side, extra=3), **hidden, output_gene_embeddings=True)
        for row, cell in enumerate(cells):
            of_cell = {name: tensor[row : row + 1] for name, tensor in hidden.items()}
            alone = pretraining_model(**pad([cell]), **of_cell, output_gene_embeddings=True)
            for name in ("predicted_values", "gene_embeddings"):
                torch.testing.assert_close(together[name][row], alone[name][0], **TOLERANCE)


@pytest.mark.parametrize("backend", CPU_BACKENDS[:2])
def test_packed_equals_padded(build, small_config, cells, pad, pack, hidden, unpadded, backend):
    reference = build(ScFoundationForPreTraining, small_config, backend="eager")
    model = build(ScFoundationForPreTraining, small_config, backend=backend)
    padded = pad(cells)
    with torch.no_grad():
        expected = reference(**padded, **hidden, output_gene_embeddings=True)
        for batch in (padded, pack(cells)):
            output = model(**batch, **hidden, output_gene_embeddings=True)
            for name in ("loss", "predicted_values", "gene_embeddings"):
                torch.testing.assert_close(output[name], expected[name], **TOLERANCE)
        states = unpadded(expected.last_hidden_state, padded["attention_mask"])
        torch.testing.assert_close(output.last_hidden_state, states, **TOLERANCE)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.filterwarnings("ignore")  # torch's flex_attention compiles, and its compiler warns of itself
def test_packed_embeddings_equal_padded_ones(build, small_config, cells, pad, pack, backend):
    expected = build(ScFoundationModel, small_config, backend="eager")(**pad(cells)).pooler_output
    model = build(ScFoundationModel, small_config, backend=backend)
    batches = [pad(cells), pad(cells, side="left", extra=2), pack(cells)]
    with torch.no_grad():
        for batch in batches[:2] if backend == "flex_attention" else batches:
            torch.testing.assert_close(model(**batch).pooler_output, expected, **TOLERANCE)


def test_flex_attention_takes_no_packed_cells_on_a_cpu(build, small_config, cells, pack):
    model = build(ScFoundationModel, small_config, backend="flex_attention")
    with pytest.raises(ValueError, match="'flex_attention' cannot take packed cells on a CPU; choose sdpa"):
        model(**pack(cells))


def test_switching_the_backend(encoder, cells, pad):
    with torch.no_grad():
        expected = encoder(**pad(cells)).pooler_output
        for backend in ("eager", "sdpa"):
            encoder.set_attn_implementation(backend)
            assert encoder.encoder.layers[0].self_attn.config._attn_implementation == backend
            torch.testing.assert_close(encoder(**pad(cells)).pooler_output, expected, **TOLERANCE)


@pytest.mark.filterwarnings("ignore")
def test_switching_to_xformers_reaches_it(encoder, cells, pad):
    pytest.importorskip("xformers.ops", exc_type=ImportError)
    encoder.set_attn_implementation("xformers")
    with pytest.raises(NotImplementedError, match="xFormers has no attention operator"):
        encoder(**pad(cells))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["xformers", "flash_attention_2", "flex_attention"])
def test_gpu_backends_agree_with_sdpa(build, small_config, cells, pad, pack, backend):
    if backend != "flex_attention":
        pytest.importorskip(
            {"xformers": "xformers.ops", "flash_attention_2": "flash_attn"}[backend], exc_type=ImportError
        )
    dtype = torch.bfloat16 if backend == "flash_attention_2" else torch.float32
    reference = build(ScFoundationModel, small_config).to("cuda", dtype)
    model = build(ScFoundationModel, small_config, backend=backend).to("cuda", dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for batch in (pad(cells), pack(cells)):
        on_gpu = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        with torch.no_grad():
            expected, actual = reference(**on_gpu).pooler_output, model(**on_gpu).pooler_output
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# --- Inputs ----------------------------------------------------------------------------------------------------


def test_the_mask_may_be_left_out(encoder, pretraining_model, cells, pad):
    batch = pad(cells)
    without = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    with torch.no_grad():
        assert torch.equal(encoder(**batch).pooler_output, encoder(**without).pooler_output)
        expected = pretraining_model(**batch).predicted_values
        assert torch.equal(pretraining_model(**without).predicted_values, expected)


def test_what_the_mask_hides_does_not_reach_the_decoder(pretraining_model, cells, pad):
    """Also where padding bears the id of a gene instead of the padding id."""
    batch = pad(cells)
    with torch.no_grad():
        expected = pretraining_model(**batch).predicted_values
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)
        batch["values"] = batch["values"].masked_fill(batch["attention_mask"] == 0, 3.0)
        torch.testing.assert_close(pretraining_model(**batch).predicted_values, expected, **TOLERANCE)


def test_a_packed_batch_is_one_row_without_mask(encoder, cells, pad, pack):
    borders = pack(cells)["cu_seq_lens_q"]
    with pytest.raises(ValueError, match=r"one row of tokens, no attention_mask. Got input_ids of shape \(4, 33\)"):
        encoder(**pad(cells), cu_seq_lens_q=borders)
    with pytest.raises(ValueError, match="and an attention_mask"):
        encoder(**pack(cells), attention_mask=torch.ones(1, 67))


def test_a_cell_without_genes_is_refused_where_it_would_be_pooled(encoder, pretraining_model, cells, pad):
    only_depth_tokens = {name: tensor[-2:] for name, tensor in cells[0].items()}
    with pytest.raises(ValueError, match="Cell 1 of the batch has no expressed gene"):
        encoder(**pad([cells[0], only_depth_tokens]))
    # In pretraining all of a cell's genes may be hidden: the encoder then sees only T and S.
    genes = cells[0]["input_ids"][None, :-2]
    with torch.no_grad():
        output = pretraining_model(**pad([only_depth_tokens]), masked_ids=genes, target_ids=genes)
    assert output.predicted_values.shape == (1, 20)
    assert output.predicted_values.isfinite().all()


def test_hiding_a_gene_changes_what_is_predicted(pretraining_model, cells, pad):
    nothing = pretraining_model(**pad(cells[:1])).predicted_values
    hidden = pretraining_model(**pad(cells[:1]), masked_ids=torch.tensor([[2]])).predicted_values
    assert (nothing - hidden).abs().max() > 1e-3


# --- Targets and loss --------------------------------------------------------------------------------------------


def test_targets_pick_from_all_genes_and_are_zero_at_padding(pretraining_model, cells, pad, hidden, small_config):
    with torch.no_grad():
        everything = pretraining_model(**pad(cells), masked_ids=hidden["masked_ids"]).predicted_values
        picked = pretraining_model(**pad(cells), **hidden).predicted_values
    assert everything.shape == (4, small_config.num_genes)
    for row, targets in enumerate(hidden["target_ids"]):
        for column, target in enumerate(targets.tolist()):
            expected = 0.0 if target == small_config.pad_token_id else everything[row, target].item()
            assert picked[row, column].item() == pytest.approx(expected, abs=1e-6)


def test_depth_tokens_can_be_targets_too(pretraining_model, cells, pad, small_config):
    with torch.no_grad():
        everything = torch.arange(small_config.num_positions).expand(4, -1)
        all_positions = pretraining_model(**pad(cells), target_ids=everything).predicted_values
        genes = pretraining_model(**pad(cells)).predicted_values
    torch.testing.assert_close(all_positions[:, :-2], genes, **TOLERANCE)
    assert (all_positions[:, -2] - all_positions[:, -3]).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", [-100, 63], ids=["negative", "beyond-padding"])
def test_targets_that_are_no_position_are_refused(pretraining_model, cells, pad, wrong):
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        pretraining_model(**pad(cells[:1]), target_ids=torch.tensor([[0, wrong]]))


def test_loss_is_the_mean_over_valid_targets(pretraining_model, cells, pad, hidden):
    with torch.no_grad():
        output = pretraining_model(**pad(cells), **hidden)
        valid = hidden["labels"] != -100
        squares = (output.predicted_values - hidden["labels"]).square()[valid]
        torch.testing.assert_close(output.loss, squares.mean())
        of_more = pretraining_model(**pad(cells), **hidden, num_items_in_batch=20).loss
        torch.testing.assert_close(of_more, squares.sum() / 20)


def test_labels_of_every_gene_need_no_targets(pretraining_model, cells, pad, small_config):
    labels = torch.rand(4, small_config.num_genes)
    with torch.no_grad():
        output = pretraining_model(**pad(cells), labels=labels)
    torch.testing.assert_close(output.loss, (output.predicted_values - labels).square().mean())


def test_labels_must_have_the_shape_of_the_targets(pretraining_model, cells, pad, hidden):
    with pytest.raises(ValueError, match=r"labels have shape \(4, 2\), predictions \(4, 3\)"):
        pretraining_model(**pad(cells), target_ids=hidden["target_ids"], labels=hidden["labels"][:, :2])


def test_predictions_at_targets_equal_those_of_all_genes(pretraining_model, cells, pad, hidden):
    """Asked for few genes, the last layer computes only those."""
    targets = hidden["target_ids"][:, :2].where(hidden["target_ids"][:, :2] < 60, 5)
    with torch.no_grad():
        few = pretraining_model(**pad(cells), masked_ids=hidden["masked_ids"], target_ids=targets).predicted_values
        every = pretraining_model(**pad(cells), masked_ids=hidden["masked_ids"]).predicted_values
    torch.testing.assert_close(few, every.gather(1, targets), **TOLERANCE)


def test_hiding_a_visible_gene_shows_it_hidden(pretraining_model, cells, pad, small_config):
    """The encoder has seen its value, the decoder sees the mask embedding, in a batch as alone."""
    batch = pad(cells)
    masked = batch["input_ids"][:, :1]
    with torch.no_grad():
        together = pretraining_model(**batch, masked_ids=masked).predicted_values
        assert not torch.allclose(together, pretraining_model(**batch).predicted_values, atol=1e-4)
        for row, cell in enumerate(cells):
            alone = pretraining_model(**pad([cell]), masked_ids=masked[row : row + 1]).predicted_values
            torch.testing.assert_close(together[row], alone[0], **TOLERANCE)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_decoder_shown_every_position_by_name(pretraining_model, cells, pad, pack, hidden, small_config, layout):
    batch = {**(pad(cells) if layout == "padded" else pack(cells)), **hidden}
    every_id = torch.arange(small_config.num_positions).repeat(4, 1)
    expected = gradients(pretraining_model, batch)
    shown = gradients(
        pretraining_model, batch | {"decoder_ids": every_id, "decoder_weights": torch.ones(every_id.shape)}
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(shown[name], gradient, msg=name, **TOLERANCE)


@pytest.mark.parametrize("request_all", [{"target_ids": None, "labels": None}, {"output_gene_embeddings": True}])
def test_a_decoder_shown_a_part_cannot_answer_for_all(pretraining_model, cells, pad, hidden, small_config, request_all):
    every_id = torch.arange(small_config.num_positions).repeat(4, 1)
    with pytest.raises(ValueError, match="give target_ids and leave output_gene_embeddings"):
        pretraining_model(**pad(cells), **(hidden | request_all), decoder_ids=every_id)


# --- Outputs -------------------------------------------------------------------------------------------------------


def test_shapes_of_the_batch_contract(encoder, pretraining_model, cells, pad, pack, small_config):
    with torch.no_grad():
        padded, packed = encoder(**pad(cells)), encoder(**pack(cells))
        assert isinstance(padded, BaseModelOutputWithPooling)
        assert padded.last_hidden_state.shape == (4, 33, 32)
        assert packed.last_hidden_state.shape == (1, 67, 32)
        assert padded.pooler_output.shape == packed.pooler_output.shape == (4, 4 * 32)
        for batch in (pad(cells), pack(cells)):
            output = pretraining_model(**batch, output_gene_embeddings=True)
            assert isinstance(output, ScFoundationForPreTrainingOutput)
            assert output.predicted_values.shape == (4, small_config.num_genes)
            assert output.gene_embeddings.shape == (4, small_config.num_genes, 24)
            assert output.loss is None
        assert pretraining_model(**pad(cells)).gene_embeddings is None


def test_no_pooling_layer_no_pooled_output(build, small_config, cells, pad):
    torch.manual_seed(0)
    model = ScFoundationModel(small_config, add_pooling_layer=False).eval()
    assert model(**pad(cells)).pooler_output is None


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_hidden_states_and_attentions(build, small_config, cells, pad, pack, layout):
    batch = pad(cells) if layout == "padded" else pack(cells)
    rows, length = batch["input_ids"].shape
    for model_class in (ScFoundationModel, ScFoundationForPreTraining):
        model = build(model_class, small_config, backend="eager")
        with torch.no_grad():
            output = model(**batch, output_hidden_states=True, output_attentions=True)
        assert len(output.hidden_states) == small_config.num_hidden_layers + 1
        assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
        embeddings = model.base_model.embeddings(batch["input_ids"], batch["values"])
        assert torch.equal(output.hidden_states[0], embeddings)
        assert [weights.shape for weights in output.attentions] == [(rows, 2, length, length)] * 2
        if layout == "packed":  # no weight between tokens of different cells
            cell_of_token = torch.repeat_interleave(torch.arange(4), batch["cu_seq_lens_q"].diff())
            elsewhere = cell_of_token[:, None] != cell_of_token
            assert not output.attentions[0][0, :, elsewhere].any()
        else:
            assert not output.attentions[0].permute(0, 3, 1, 2)[batch["attention_mask"] == 0].any()


def test_asking_sdpa_for_attention_weights_warns(encoder, cells, pad, caplog):
    from scfoundation_hf.modeling_scfoundation import modeling_scfoundation

    modeling_scfoundation.logger.warning_once.cache_clear()
    modeling_scfoundation.logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        output = encoder(**pad(cells), output_attentions=True)
    modeling_scfoundation.logger.removeHandler(caplog.handler)
    assert output.attentions == ()
    assert "'sdpa' does not return attention weights" in caplog.text


def test_tuples_instead_of_dataclasses(encoder, pretraining_model, cells, pad):
    with torch.no_grad():
        states, pooled = encoder(**pad(cells), return_dict=False)
        assert torch.equal(pooled, encoder(**pad(cells)).pooler_output)
        predicted, last = pretraining_model(**pad(cells), return_dict=False)
    assert predicted.shape == (4, 60)
    assert last.shape == states.shape


# --- Training ------------------------------------------------------------------------------------------------------


def gradients(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_every_parameter_learns(pretraining_model, cells, pad, hidden):
    got = gradients(pretraining_model, {**pad(cells), **hidden})
    assert all(gradient.any() for gradient in got.values())
    assert set(got) == {name for name, _ in pretraining_model.named_parameters()}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its new name is newer than 5.17
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(
    pretraining_model, cells, pad, pack, hidden, layout, use_reentrant
):
    batch = {**(pad(cells) if layout == "padded" else pack(cells)), **hidden}
    plain = gradients(pretraining_model, batch)
    pretraining_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    pretraining_model.train()  # dropout is 0 here
    checkpointed = gradients(pretraining_model, batch)
    assert checkpointed.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], msg=name, **TOLERANCE)


def test_packed_and_padded_gradients_agree(pretraining_model, cells, pad, pack, hidden):
    padded = gradients(pretraining_model, {**pad(cells), **hidden})
    packed = gradients(pretraining_model, {**pack(cells), **hidden})
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_pretraining_loss_falls(small_config, cells, pad, pack, hidden, layout):
    torch.manual_seed(0)
    model = ScFoundationForPreTraining(small_config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = {**(pad(cells) if layout == "padded" else pack(cells)), **hidden}
    losses = []
    for _ in range(20):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_encoder_trains_through_its_pooled_output(small_config, cells, pad):
    """What a classification head does."""
    torch.manual_seed(0)
    model = ScFoundationModel(small_config).train()
    head = torch.nn.Linear(4 * small_config.hidden_size, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for _ in range(20):
        logits = head(model(**pad(cells)).pooler_output)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- Precision -----------------------------------------------------------------------------------------------------


def test_bfloat16_stays_close_and_keeps_float32_where_promised(pretraining_model, cells, pad, monkeypatch):
    from scfoundation_hf.modeling_scfoundation import linear_attention

    with torch.no_grad():
        exact = pretraining_model(**pad(cells))
        half = copy.deepcopy(pretraining_model).bfloat16()
        dtypes = set()
        project = linear_attention._project

        def watch(states, projection):
            logits, half_square = project(states, projection)
            dtypes.add(logits.dtype)
            return logits, half_square

        monkeypatch.setattr(linear_attention, "_project", watch)
        value_dtypes = []
        half.scfoundation.embeddings.value_embedding.register_forward_hook(
            lambda module, inputs, output: value_dtypes.append(output.dtype)
        )
        output = half(**pad(cells))
    assert dtypes == {torch.float32}
    assert set(value_dtypes) == {torch.float32}
    assert output.predicted_values.dtype == output.last_hidden_state.dtype == torch.bfloat16
    scale = exact.predicted_values.abs().max()
    assert (output.predicted_values.float() - exact.predicted_values).abs().max() < 0.05 * scale


def test_autocast_trains(pretraining_model, cells, pad, hidden):
    exact = pretraining_model(**pad(cells), **hidden).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pretraining_model(**pad(cells), **hidden).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.05)
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all() for parameter in pretraining_model.parameters()
    )


# --- Saving, loading, placing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [ScFoundationModel, ScFoundationForPreTraining])
def test_save_and_load(build, small_config, cells, pad, tmp_path: Path, model_class):
    model = build(model_class, small_config)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert model.state_dict().keys() == loaded.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(**pad(cells))[0], model(**pad(cells))[0])


def test_the_encoder_loads_from_a_pretraining_folder_without_a_word(
    pretraining_model, cells, pad, tmp_path: Path, capsys, caplog
):
    pretraining_model.save_pretrained(tmp_path)
    capsys.readouterr()
    with caplog.at_level(logging.WARNING):
        encoder, report = ScFoundationModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert caplog.text == ""
    assert "decoder" not in "".join(capsys.readouterr())
    with torch.no_grad():
        states = pretraining_model(**pad(cells)).last_hidden_state
        assert torch.equal(encoder(**pad(cells)).last_hidden_state, states)


def test_missing_weights_are_drawn_as_in_a_new_model(encoder, small_config, tmp_path: Path):
    encoder.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model, report = ScFoundationForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    missing = set(report["missing_keys"])
    assert {name.split(".")[0] for name in missing} == {"decoder", "gene_norm", "prediction_head"}
    assert "decoder.layers.0.attention.projection" in missing
    assert_freshly_drawn(model, only=missing)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.state_dict()[f"scfoundation.{name}"], tensor)


def assert_freshly_drawn(model: ScFoundationForPreTraining, *, only: set[str] | None = None) -> None:
    """Every tensor of a new model has the spread that the configuration asks for; none is left as it lay in memory."""
    config = model.config
    for name, tensor in model.state_dict().items():
        if only is not None and name not in only:
            continue
        assert tensor.device.type == "cpu", name
        if "norm" in name:
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("weight")))), name
        elif name.endswith("projection"):
            lengths = tensor.norm(dim=1)
            assert 0.5 * math.sqrt(config.decoder_head_dim) < lengths.mean() < 2 * math.sqrt(config.decoder_head_dim)
        elif any(part in name for part in ("identity_embedding", "bin_embeddings", "mask_embedding", "bin_scores")):
            assert 0.4 < tensor.std() < 1.6, name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            assert 0.5 * config.initializer_range < tensor.std() < 1.5 * config.initializer_range, name


def test_a_new_model_is_drawn_as_configured(small_config):
    torch.manual_seed(0)
    assert_freshly_drawn(ScFoundationForPreTraining(small_config))


def test_initialisation_after_meta_device_leaves_nothing_out(small_config):
    with torch.device("meta"):
        model = ScFoundationForPreTraining(small_config)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(torch.nan)
    torch.manual_seed(0)
    model.init_weights()
    assert_freshly_drawn(model)


def test_initialisation_repeats_under_a_seed(small_config):
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(ScFoundationForPreTraining(small_config).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_device_map_and_dtype(pretraining_model, cells, pad, tmp_path: Path):
    pretraining_model.save_pretrained(tmp_path)
    placed = ScFoundationForPreTraining.from_pretrained(tmp_path, device_map="cpu")
    with torch.no_grad():
        assert torch.equal(placed(**pad(cells))[0], pretraining_model(**pad(cells))[0])
    half = ScFoundationForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.config.dtype == torch.bfloat16


def test_the_gene_table_is_the_input_embedding_and_cannot_be_resized(encoder, pretraining_model, small_config):
    assert encoder.get_input_embeddings() is encoder.embeddings.identity_embedding
    assert pretraining_model.get_input_embeddings() is pretraining_model.scfoundation.embeddings.identity_embedding
    replacement = torch.nn.Embedding(small_config.vocab_size, small_config.hidden_size)
    encoder.set_input_embeddings(replacement)
    assert encoder.embeddings.identity_embedding is replacement
    with pytest.raises(AttributeError, match="vocab_size"):
        pretraining_model.resize_token_embeddings(70)


# --- Compilation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("model_class", [ScFoundationModel, ScFoundationForPreTraining])
def test_a_padded_batch_compiles_to_one_graph(build, small_config, cells, pad, model_class, fresh_compiler):
    model = build(model_class, small_config)
    compiled = torch.compile(model, fullgraph=True)
    name = "pooler_output" if model_class is ScFoundationModel else "predicted_values"
    with torch.no_grad():
        for batch in (pad(cells), pad(cells[:2], extra=1)):
            torch.testing.assert_close(compiled(**batch)[name], model(**batch)[name], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_both_models_trace_without_a_graph_break(build, small_config, cells, pad, hidden, fresh_compiler):
    for model_class, inputs in ((ScFoundationModel, {}), (ScFoundationForPreTraining, hidden)):
        model = build(model_class, small_config)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(**pad(cells), **inputs)[0], model(**pad(cells), **inputs)[0])


def test_every_preset_default_is_what_a_bare_model_uses():
    with torch.device("meta"):
        model = ScFoundationForPreTraining(ScFoundationConfig())
    assert model.decoder.layers[0].attention.projection.shape == (266, 64)
    assert len(model.scfoundation.encoder.layers) == 12
    assert len(model.decoder.layers) == 6
