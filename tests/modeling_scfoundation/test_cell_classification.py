"""The cell type classifier: head, losses, class weights, and which parameters train."""

import copy
import json
import math
from pathlib import Path

import anndata
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.classification_head import ScFoundationClassificationHead
from scfoundation_hf.modeling_scfoundation.freezing import ParameterCounts, freeze
from scfoundation_hf.modeling_scfoundation.losses import (
    IGNORED_LABEL,
    capped_class_weights,
    cell_classification_loss,
    class_weights_as_printed,
)
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import (
    ScFoundationForCellClassification,
    ScFoundationForPreTraining,
    ScFoundationModel,
)
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LABELS = torch.tensor([0, 2, 1, 2])
HEAD_TENSORS = {
    "classifier.norm.running_mean",
    "classifier.norm.running_var",
    "classifier.norm.num_batches_tracked",
    "classifier.hidden.weight",
    "classifier.hidden.bias",
    "classifier.output.weight",
    "classifier.output.bias",
}


def with_fields(config: ScFoundationConfig, **fields) -> ScFoundationConfig:
    return ScFoundationConfig(**(config.to_dict() | {"id2label": None, "label2id": None, "num_labels": 3} | fields))


@pytest.fixture
def classifier_config(small_config) -> ScFoundationConfig:
    return with_fields(small_config, num_hidden_layers=3, classifier_hidden_size=12)


@pytest.fixture
def classifier(build, classifier_config) -> ScFoundationForCellClassification:
    """With running statistics as after training: else evaluation would not show batch norm at all."""
    model = build(ScFoundationForCellClassification, classifier_config)
    model.classifier.norm.running_mean.normal_()
    model.classifier.norm.running_var.uniform_(0.5, 2)
    model.classifier.norm.num_batches_tracked.fill_(5)
    return model


# --- The same numbers for a cell, whatever it comes with -----------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", ["max", "all"])
def test_a_batch_equals_its_cells_one_by_one(build, classifier_config, cells, pad, pooling, side):
    model = build(ScFoundationForCellClassification, with_fields(classifier_config, classifier_pooling=pooling))
    with torch.no_grad():
        together = model(**pad(cells, side=side, extra=3)).logits
        assert together.shape == (4, 3)
        for row, cell in enumerate(cells):
            torch.testing.assert_close(together[row], model(**pad([cell])).logits[0], **TOLERANCE)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_packed_equals_padded(build, classifier_config, cells, pad, pack, backend, mode):
    model = build(ScFoundationForCellClassification, classifier_config, backend=backend).train(mode == "train")
    expected = model(**pad(cells), labels=LABELS)
    output = model(**pack(cells), labels=LABELS)
    assert isinstance(output, SequenceClassifierOutput)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-4, atol=1e-4)


def test_the_head_is_the_published_one(classifier, cells, pad):
    """Max over all tokens, T and S too; batch norm without weights; linear, ReLU, linear."""
    head = classifier.classifier
    assert list(head.norm.parameters()) == []
    batch = pad(cells)
    with torch.no_grad():
        states = classifier.scfoundation(**batch).last_hidden_state
        pooled = states.masked_fill(batch["attention_mask"][..., None] == 0, -torch.inf).amax(dim=1)
        normalised = (pooled - head.norm.running_mean) / (head.norm.running_var + 1e-6).sqrt()
        expected = torch.relu(normalised @ head.hidden.weight.T + head.hidden.bias) @ head.output.weight.T
        torch.testing.assert_close(classifier(**batch).logits, expected + head.output.bias, **TOLERANCE)


def test_the_released_sizes():
    with torch.device("meta"):
        head = ScFoundationClassificationHead(ScFoundationConfig(num_labels=10))
        four_pools = ScFoundationClassificationHead(ScFoundationConfig(num_labels=10, classifier_pooling="all"))
    assert head.hidden.weight.shape == (256, 768)
    assert head.output.weight.shape == (10, 256)
    assert head.norm.eps == 1e-6
    assert four_pools.hidden.weight.shape == (256, 4 * 768)


def test_the_head_trains_on_stored_pools(classifier, cells, pad):
    """What a run with a frozen encoder may do: encode once, then train `classifier` alone."""
    with torch.no_grad():
        stored = classifier.pool(classifier.scfoundation(**pad(cells)).pooler_output)
        logits = classifier.classifier(stored)
        output = classifier(**pad(cells), labels=LABELS)
    torch.testing.assert_close(logits, output.logits)
    torch.testing.assert_close(classifier.compute_loss(logits, LABELS), output.loss)


def test_hidden_states_and_tuples(classifier, cells, pad):
    with torch.no_grad():
        output = classifier(**pad(cells), output_hidden_states=True)
        assert len(output.hidden_states) == 4
        (logits,) = classifier(**pad(cells), return_dict=False)
    assert torch.equal(logits, output.logits)


# --- One cell and batch norm -----------------------------------------------------------------------------------------


def test_a_training_batch_of_one_cell_never_reaches_batch_norm(classifier, cells, pad):
    seen = []
    classifier.classifier.norm.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    classifier.train()
    statistics = copy.deepcopy(dict(classifier.classifier.norm.named_buffers()))
    output = classifier(**pad(cells[:1]), labels=LABELS[:1])
    output.loss.backward()
    assert seen == []
    for name, statistic in classifier.classifier.norm.named_buffers():
        assert torch.equal(statistic, statistics[name]), name
    assert all(parameter.grad.isfinite().all() for parameter in classifier.classifier.parameters())
    with torch.no_grad():
        torch.testing.assert_close(output.logits, classifier.eval()(**pad(cells[:1])).logits)  # no dropout here
        classifier.train()(**pad(cells))
    assert seen == [1, 4]  # in evaluation and of four cells: as ever
    assert classifier.classifier.norm.num_batches_tracked == 6


def test_a_first_training_batch_of_one_cell_is_refused(build, classifier_config, cells, pad, pack):
    model = build(ScFoundationForCellClassification, classifier_config).train()
    for batch in (pad(cells[:1]), pack(cells[:1])):
        with pytest.raises(
            ValueError, match="has 1 cell, and batch norm has seen no other yet: train on batches of at"
        ):
            model(**batch)
    with torch.no_grad():
        model.eval()(**pad(cells[:1]))
        model.train()(**pad(cells[:2]))
        model(**pad(cells[:1]))


# --- Losses ----------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [-1.0, 3.0, 0.0], [0.2, 0.1, 0.0]])
WEIGHTS = [1.0, 2.0, 6.0]


def test_cross_entropy_is_torchs():
    loss = cell_classification_loss(LOGITS, LABELS)
    torch.testing.assert_close(loss, functional.cross_entropy(LOGITS, LABELS))


def test_weighted_cross_entropy_by_hand():
    losses = [
        math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(LOGITS.tolist(), LABELS, strict=True)
    ]
    of_label = [1 / 3, 6 / 3, 2 / 3, 6 / 3]  # the weights have a mean of 3
    expected = sum(weight * loss for weight, loss in zip(of_label, losses, strict=True)) / 4
    loss = cell_classification_loss(LOGITS, LABELS, kind="weighted_cross_entropy", class_weights=WEIGHTS)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    sums = functional.cross_entropy(LOGITS, LABELS, weight=torch.tensor(WEIGHTS) / 3, reduction="sum")
    torch.testing.assert_close(loss, sums / 4)


def test_only_the_ratios_of_weights_count():
    options = {"kind": "weighted_cross_entropy"}
    loss = cell_classification_loss(LOGITS, LABELS, class_weights=WEIGHTS, **options)
    torch.testing.assert_close(cell_classification_loss(LOGITS, LABELS, class_weights=[10, 20, 60], **options), loss)
    equal = cell_classification_loss(LOGITS, LABELS, class_weights=[1 / 3] * 3, **options)
    torch.testing.assert_close(equal, functional.cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_focal_by_hand(gamma, weights):
    probabilities = LOGITS.softmax(dim=1)[range(4), LABELS]
    scale = torch.tensor([1.0, 6.0, 2.0, 6.0]) / 3 if weights else torch.ones(4)
    expected = (-scale * (1 - probabilities) ** gamma * probabilities.log()).mean()
    loss = cell_classification_loss(LOGITS, LABELS, kind="focal", class_weights=weights, focal_gamma=gamma)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_has_a_gradient_where_a_cell_is_surely_right(gamma):
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    cell_classification_loss(logits, torch.tensor([0]), kind="focal", focal_gamma=gamma).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["cross_entropy", "weighted_cross_entropy", "focal"])
def test_parts_of_a_batch_add_up_and_unlabelled_cells_do_not_count(kind):
    options = {"kind": kind, "class_weights": None if kind == "cross_entropy" else WEIGHTS}
    whole = cell_classification_loss(LOGITS, LABELS, **options)
    parts = [
        cell_classification_loss(LOGITS[i : i + 2], LABELS[i : i + 2], num_items_in_batch=4, **options) for i in (0, 2)
    ]
    torch.testing.assert_close(sum(parts), whole)
    logits = torch.cat([LOGITS, torch.rand(2, 3)])
    labels = torch.cat([LABELS, torch.full((2,), IGNORED_LABEL)])
    torch.testing.assert_close(cell_classification_loss(logits, labels, **options), whole)
    assert cell_classification_loss(logits[4:], labels[4:], **options) == 0
    half = cell_classification_loss(LOGITS.bfloat16(), LABELS, num_items_in_batch=torch.tensor(4), **options)
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    "fields",
    [{}, {"classification_loss": "weighted_cross_entropy", "class_weights": WEIGHTS}, {"classification_loss": "focal"}],
    ids=["cross-entropy", "weighted", "focal"],
)
def test_the_model_takes_its_loss_from_the_configuration(build, classifier_config, cells, pad, fields):
    model = build(ScFoundationForCellClassification, with_fields(classifier_config, **fields))
    output = model(**pad(cells), labels=LABELS)
    kind, weights = fields.get("classification_loss", "cross_entropy"), fields.get("class_weights")
    expected = cell_classification_loss(output.logits, LABELS, kind=kind, class_weights=weights)
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(**pad(cells), labels=LABELS, num_items_in_batch=8).loss, expected / 2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3, 1, 1]), r"label of cell 1 of the batch is 3; .* classes 0 to 2 \(num_labels 3\)"),
        (torch.tensor([0, 1, 1, -1]), "label of cell 3 of the batch is -1"),
        (
            torch.tensor([0, 1]),
            r"labels are torch.int64 of shape \(2,\); expected one int64 class a cell, shape \(4,\)",
        ),
        (torch.rand(4), "labels are torch.float32"),
    ],
    ids=["beyond", "negative", "shape", "dtype"],
)
def test_labels_that_are_no_classes_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        cell_classification_loss(LOGITS, labels)


# --- Class weights ---------------------------------------------------------------------------------------------------


def test_class_weights_as_printed():
    # max A / A: 1, 10, 100, 200; B: 50, 50, 100, 200; sum 400
    assert class_weights_as_printed([1000, 100, 10, 5]) == pytest.approx([0.125, 0.125, 0.25, 0.5])
    assert class_weights_as_printed([1000, 20]) == [0.5, 0.5]


def test_capped_class_weights():
    # B: 1, 10, 50, 50; sum 111
    assert capped_class_weights([1000, 100, 10, 5]) == pytest.approx([1 / 111, 10 / 111, 50 / 111, 50 / 111])
    assert capped_class_weights([30, 30]) == [0.5, 0.5]


@pytest.mark.parametrize("weights_of", [class_weights_as_printed, capped_class_weights])
def test_a_class_without_cells_has_no_weight(weights_of):
    with pytest.raises(ValueError, match="Class 1 of 3 has 0 cells, so it has no weight; leave out its label"):
        weights_of([4, 0, 2])


# --- Configuration ---------------------------------------------------------------------------------------------------


def test_fields_survive_json(tmp_path: Path):
    config = ScFoundationConfig(
        id2label={0: "B cell", 1: "T cell"},
        label2id={"B cell": 0, "T cell": 1},
        classifier_pooling="all",
        classification_loss="focal",
        class_weights=[1, 2.5],
        focal_gamma=1,
    )
    config.save_pretrained(tmp_path)
    loaded = ScFoundationConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.id2label[1] == "T cell"


def test_a_file_written_before_these_fields_reads_as_the_defaults(tmp_path: Path):
    ScFoundationConfig(num_genes=50).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    for field in (
        "classifier_pooling",
        "classifier_hidden_size",
        "classification_loss",
        "class_weights",
        "focal_gamma",
    ):
        del stored[field]
    path.write_text(json.dumps(stored))
    version = {"transformers_version": None}
    assert ScFoundationConfig.from_pretrained(tmp_path).to_dict() | version == (
        ScFoundationConfig(num_genes=50).to_dict() | version
    )


WEIGHTED = {"classification_loss": "weighted_cross_entropy"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (WEIGHTED, "'weighted_cross_entropy' needs class_weights, one for each class"),
        ({"class_weights": [1, 1, 1]}, "the loss 'cross_entropy' uses none; choose 'weighted_cross_entropy' or"),
        ({"class_weights": [1, 2], **WEIGHTED}, r"2 class_weights for 3 classes \(num_labels\)"),
        ({"class_weights": [1, 0, 1], **WEIGHTED}, "weight of class 1 is 0; class_weights must be above 0"),
        ({"class_weights": [1, 1, math.inf], **WEIGHTED}, "weight of class 2 is inf"),
        ({"focal_gamma": -1.0}, "focal_gamma is -1.0; it must be a number of at least 0"),
        ({"classifier_hidden_size": 0}, "classifier_hidden_size is 0; it must be at least 1"),
    ],
    ids=["none", "unused", "too-few", "zero", "infinite", "gamma", "hidden-size"],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ScFoundationConfig(num_labels=3, **fields)


@pytest.mark.parametrize("field", ["classifier_pooling", "classification_loss"])
def test_unknown_choices_are_refused(field):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        ScFoundationConfig(**{field: "mean"})


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="no classification loss 'hinge'; choose one of cross_entropy, weighted_cross"):
        cell_classification_loss(LOGITS, LABELS, kind="hinge")


def test_fields_set_while_loading_are_checked_too(pretraining_model, tmp_path: Path):
    pretraining_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 class_weights for 3 classes"):
        ScFoundationForCellClassification.from_pretrained(tmp_path, num_labels=3, class_weights=[1.0, 2.0], **WEIGHTED)


def test_one_class_is_refused(small_config):
    with pytest.raises(ValueError, match="num_labels is 1, but telling cell types apart takes at least 2"):
        ScFoundationForCellClassification(with_fields(small_config, num_labels=1))


# --- Saving and loading ----------------------------------------------------------------------------------------------


def test_save_and_load(classifier, cells, pad, tmp_path: Path):
    classifier.config.id2label = {0: "B", 1: "T", 2: "NK"}
    classifier.config.label2id = {"B": 0, "T": 1, "NK": 2}
    classifier.save_pretrained(tmp_path)
    loaded, report = ScFoundationForCellClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.id2label == classifier.config.id2label
    assert loaded.classifier.norm.num_batches_tracked == 5
    with torch.no_grad():
        assert torch.equal(loaded(**pad(cells)).logits, classifier(**pad(cells)).logits)


@pytest.mark.parametrize("source", [ScFoundationForPreTraining, ScFoundationModel])
def test_a_pretrained_folder_lacks_only_the_head(build, small_config, cells, pad, tmp_path: Path, source):
    pretrained = build(source, small_config)
    pretrained.save_pretrained(tmp_path)
    model, report = ScFoundationForCellClassification.from_pretrained(
        tmp_path, num_labels=3, classifier_pooling="all", output_loading_info=True
    )
    assert set(report.pop("missing_keys")) == HEAD_TENSORS
    assert not any(report.values())
    with torch.no_grad():
        states = pretrained(**pad(cells)).last_hidden_state
        assert torch.equal(model.scfoundation(**pad(cells)).last_hidden_state, states)
    norm = model.classifier.norm
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
    assert torch.equal(norm.running_var, torch.ones(4 * 32))
    assert 0.015 < model.classifier.hidden.weight.std() < 0.025
    assert model.classifier.output.weight.shape == (3, 256)


def test_the_encoder_loads_from_a_fine_tuned_folder(classifier, cells, pad, tmp_path: Path):
    classifier.save_pretrained(tmp_path)
    encoder, report = ScFoundationModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        assert torch.equal(encoder(**pad(cells)).pooler_output, classifier.scfoundation(**pad(cells)).pooler_output)


def test_the_head_stays_float32_in_a_bfloat16_model(classifier, cells, pad, tmp_path: Path):
    classifier.save_pretrained(tmp_path)
    half = ScFoundationForCellClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.classifier.parameters()} == {torch.float32}
    assert half.classifier.norm.running_mean.dtype == torch.float32
    assert half.scfoundation.encoder.norm.weight.dtype == torch.bfloat16
    with torch.no_grad():
        exact = classifier(**pad(cells)).logits
        logits = half(**pad(cells)).logits
        all_cast = half.bfloat16()(**pad(cells)).logits  # the head too, as asked
    assert (logits.dtype, all_cast.dtype) == (torch.float32, torch.bfloat16)
    for rounded in (logits, all_cast):
        assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_autocast_trains(classifier, cells, pad):
    classifier.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = classifier(**pad(cells), labels=LABELS).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in classifier.parameters())


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_it_traces_without_a_graph_break(classifier, cells, pad):
    torch.compiler.reset()
    compiled = torch.compile(classifier, fullgraph=True, backend="eager")
    with torch.no_grad():
        output, expected = compiled(**pad(cells), labels=LABELS), classifier(**pad(cells), labels=LABELS)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.compiler.reset()


# --- Freezing --------------------------------------------------------------------------------------------------------

HEAD = ("classifier.",)
LAST = ("scfoundation.encoder.layers.2.", "scfoundation.encoder.norm.")


@pytest.mark.parametrize(
    ("mode", "n", "trained"),
    [
        ("head", None, HEAD),
        ("last_n", 1, (*HEAD, *LAST)),
        ("last_n", 2, (*HEAD, *LAST, "scfoundation.encoder.layers.1.")),
        ("penultimate", None, (*HEAD, "scfoundation.encoder.layers.1.")),
        ("full", None, ("",)),
    ],
    ids=["head", "last_1", "last_2", "penultimate", "full"],
)
def test_exactly_the_named_parameters_get_gradients(classifier, cells, pad, mode, n, trained):
    freeze(classifier, "head")  # what was frozen before does not matter
    counts = freeze(classifier, mode, n=n)
    classifier.train()(**pad(cells), labels=LABELS).loss.backward()
    expected = {name for name, _ in classifier.named_parameters() if name.startswith(trained)}
    # What nobody reads has no gradient: the mask embedding is the decoder's.
    expected -= {"scfoundation.embeddings.value_embedding.mask_embedding"}
    assert {name for name, tensor in classifier.named_parameters() if tensor.grad is not None} == expected
    sizes = {name: tensor.numel() for name, tensor in classifier.named_parameters()}
    assert counts == ParameterCounts(
        sum(size for name, size in sizes.items() if name.startswith(trained)), sum(sizes.values())
    )


@pytest.mark.parametrize(
    ("mode", "n", "message"),
    [
        ("lower", None, "no freezing mode 'lower'; choose one of head, last_n, penultimate, full"),
        ("last_n", None, "'last_n' needs n from 1 to the encoder's 3 layers; n is None"),
        ("last_n", 0, "n is 0"),
        ("last_n", 4, "n is 4"),
        ("head", 1, "n is 1, but the freezing mode 'head' takes none"),
    ],
)
def test_impossible_freezing_is_refused(classifier, mode, n, message):
    before = [parameter.requires_grad for parameter in classifier.parameters()]
    with pytest.raises(ValueError, match=message):
        freeze(classifier, mode, n=n)
    assert [parameter.requires_grad for parameter in classifier.parameters()] == before


def test_freezing_needs_a_head_and_a_penultimate_layer(encoder, small_config):
    with pytest.raises(ValueError, match="ScFoundationModel is the encoder alone, without a head to train"):
        freeze(encoder, "head")
    shallow = ScFoundationForCellClassification(with_fields(small_config, num_hidden_layers=1))
    with pytest.raises(ValueError, match="The encoder has 1 layer, so none is the last but one"):
        freeze(shallow, "penultimate")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its new name is newer than 5.17
def test_freezing_and_gradient_checkpointing(classifier, cells, pad):
    freeze(classifier, "penultimate")
    classifier.train()
    gradients = []
    for _ in range(2):
        classifier.zero_grad()
        classifier(**pad(cells), labels=LABELS).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in classifier.named_parameters() if p.grad is not None})
        classifier.gradient_checkpointing_enable()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name, **TOLERANCE)


# --- Real cells ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["head", "penultimate", "full"])
def test_a_training_step_lowers_the_loss_on_real_cells(tiny_config, tiny_model_dir, example_cells, mode):
    cells = anndata.read_h5ad(example_cells)[::50].copy()
    types = cells.obs["cell_type"].astype("category").cat
    batch = dict(ScFoundationTokenizer()(cells, gene_column="symbol"))
    batch["labels"] = torch.tensor(types.codes.to_numpy(), dtype=torch.int64)
    model = ScFoundationForCellClassification.from_pretrained(
        tiny_model_dir,
        num_labels=len(types.categories),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).train()
    freeze(model, mode)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[0] == pytest.approx(math.log(len(types.categories)), rel=0.1)  # a new head knows nothing
