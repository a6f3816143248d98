"""Fine-tuning: what is stored is exact, what is frozen stays, what is saved was scored, and bad input is told."""

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from scfoundation_hf.cli import main
from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.inference.annotation import annotate
from scfoundation_hf.inference.calibration import Calibration
from scfoundation_hf.modeling_scfoundation.freezing import freeze
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import (
    ScFoundationForCellClassification,
    ScFoundationForPreTraining,
)
from scfoundation_hf.tokenization.data_collator import as_tensors, pack_cells
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer
from scfoundation_hf.trainer_scripts import finetune as finetuning
from scfoundation_hf.trainer_scripts.finetune import REPORT_FILE, finetune
from scfoundation_hf.trainer_scripts.finetuning_settings import FinetuningSettings, check_packages
from scfoundation_hf.trainer_scripts.trained_part import TrainedPart, pooled_and_logits, store_cells

TYPES = ["CD14+ Monocyte", "CD19+ B", "CD34+"]
# peft 0.21 asks transformers 5.23 in its old words, when it saves too
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def many_cells(example_cells: Path) -> anndata.AnnData:
    """240 cells of three types that are easy to tell apart."""
    data = anndata.read_h5ad(example_cells)
    data = data[data.obs["cell_type"].isin(TYPES)].copy()
    data.obs["cell_type"] = data.obs["cell_type"].astype(str)
    return data


@pytest.fixture(scope="module")
def cells(many_cells: anndata.AnnData) -> anndata.AnnData:
    """72 of them, of 6 donors."""
    rows = np.concatenate([np.flatnonzero(many_cells.obs["cell_type"] == name)[:24] for name in TYPES])
    data = many_cells[np.sort(rows)].copy()
    data.obs["donor"] = [f"donor {number % 6}" for number in range(data.n_obs)]
    return data


@pytest.fixture(scope="module")
def deep_model_dir(tiny_config: ScFoundationConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four encoder layers, with dropout: the released sizes have it."""
    folder = tmp_path_factory.mktemp("deep-model")
    fields = tiny_config.to_dict() | {
        "num_hidden_layers": 4,
        "hidden_dropout_prob": 0.3,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(1)
    ScFoundationForPreTraining(ScFoundationConfig(**fields)).save_pretrained(folder)
    ScFoundationTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(cells, tiny_model_dir, tmp_path) -> Callable[..., Path]:
    """A run of seconds, with some arguments different."""
    options = {
        "label": "cell_type",
        "model": tiny_model_dir,
        "gene_column": "symbol",
        "max_steps": 4,
        "batch_size": 16,
        "progress": False,
        "report": False,
        "report_to": "none",
        "device": "cpu",
    }

    def start(data: Any = None, output: str = "out", **changes: Any) -> Path:
        return finetune(cells if data is None else data, tmp_path / output, **(options | changes))

    return start


@pytest.fixture
def scored(monkeypatch) -> Callable[..., None]:
    """Lets validations give these macro F1s, rather than what a few steps of a tiny model come to."""

    def give(*macro_f1: float) -> None:
        scores = iter(macro_f1)
        monkeypatch.setattr(
            "scfoundation_hf.trainer_scripts.finetuning_trainer.annotation_scores",
            lambda *_: dict.fromkeys(("macro_f1", "accuracy", "balanced_accuracy"), next(scores)),
        )

    return give


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / REPORT_FILE).read_text())


def load(folder: Path) -> ScFoundationForCellClassification:
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


@torch.no_grad()
def logits_of(model: ScFoundationForCellClassification, cells: anndata.AnnData) -> torch.Tensor:
    return model(**ScFoundationTokenizer()(cells, gene_column="symbol")).logits


# --- The whole of it -------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_was_scored(run, many_cells):
    folder = run(many_cells, max_steps=150, learning_rate=1e-2, freezing="head", pooling="all", patience=30)
    report = read_report(folder)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "calibration.json",
        "config.json",
        REPORT_FILE,
        "gene_vocabulary.tsv",
        "model.safetensors",
        "tokenizer_config.json",
    }
    model = load(folder)
    assert list(model.config.id2label.values()) == TYPES
    assert isinstance(AutoTokenizer.from_pretrained(folder), ScFoundationTokenizer)
    for split, scores in report["scores"].items():
        held_out = many_cells[report["splits"][split]].copy()
        called = logits_of(model, held_out).argmax(dim=1).tolist()
        confusion = np.zeros((3, 3), dtype=int)
        np.add.at(confusion, (held_out.obs["cell_type"].map(TYPES.index).tolist(), called), 1)
        assert confusion.tolist() == scores["confusion_matrix"]
        annotated = annotate(held_out, folder, gene_column="symbol", progress=False)
        assert annotated.obs["scfoundation_best_cell_type"].tolist() == [TYPES[number] for number in called]
        assert (held_out.obs["scfoundation_cell_type"] == "unassigned").mean() == scores["share_unassigned"]
    assert report["scores"]["test"]["macro_f1"] > 0.6  # chance: a third
    assert Calibration.load(folder).temperature == report["calibration"]["temperature"]


def test_the_report_says_what_was_done(run, cells, tiny_model_dir):
    report = read_report(run(split_by="donor"))
    donors = {split: set(cells.obs.loc[names, "donor"]) for split, names in report["splits"].items()}
    assert [len(donors[split]) for split in ("train", "validation", "test")] == [4, 1, 1]
    assert len(set().union(*donors.values())) == 6
    assert report["base_model"] == str(tiny_model_dir)
    assert report["classes"][TYPES[0]]["train"] == 16
    assert report["steps"] == 4
    assert [line[0] for line in report["history"]["validation"]] == [1, 2, 3, 4]
    best = max(report["history"]["validation"], key=lambda line: line[2])
    assert report["best_step"] == best[0]
    assert report["num_trained_parameters"] < report["num_parameters"]
    assert report["peak_memory_bytes"] > 2**20
    assert report["input"]["gene_column"] == "symbol"


def test_the_same_seed_gives_the_same_model(run):
    first, again, other = (load(run(output=f"o{n}", seed=seed)).state_dict() for n, seed in enumerate((1, 1, 2)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.hidden.weight"], other["classifier.hidden.weight"])


def test_a_file_is_read_as_an_anndata_is(run, cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    from_file, from_memory = load(run(tmp_path / "cells.h5ad", "file")), load(run(output="memory"))
    for name, tensor in from_memory.state_dict().items():
        assert torch.equal(tensor, from_file.state_dict()[name]), name


# --- Frozen and trained ----------------------------------------------------------------------------------------------

HEAD = ("classifier.",)
MODES = {
    "head": ({"freezing": "head"}, HEAD, ["pooled"]),
    "last_1": (
        {"freezing": "last_n", "num_layers": 1},
        (*HEAD, "scfoundation.encoder.layers.3.", "scfoundation.encoder.norm."),
        ["states"],
    ),
    "penultimate": ({"freezing": "penultimate"}, (*HEAD, "scfoundation.encoder.layers.2."), ["states"]),
    "last_4": (
        {"freezing": "last_n", "num_layers": 4},
        (*HEAD, "scfoundation.encoder."),
        ["input_ids", "values"],
    ),
    "full": ({"freezing": "full"}, ("",), ["input_ids", "values"]),
}


@pytest.mark.parametrize("mode", MODES)
def test_only_what_should_train_changes(run, scored, deep_model_dir, mode):
    options, trained, stored = MODES[mode]
    scored(0.1, 0.2, 0.3, 0.4)
    folder = run(model=deep_model_dir, learning_rate=1e-2, **options)
    assert read_report(folder)["frozen_part"]["stored"] == stored
    before = ScFoundationForPreTraining.from_pretrained(deep_model_dir).state_dict()
    after = load(folder).state_dict()
    changed = {name for name in after if name in before and not torch.equal(before[name], after[name])}
    unread = {"scfoundation.embeddings.value_embedding.mask_embedding"}  # the decoder's
    assert changed - unread == {name for name in after if name in before and name.startswith(trained)} - unread


def test_the_default_is_penultimate_and_of_one_layer_the_last(run, cells, tiny_config, tmp_path):
    assert read_report(run())["settings"]["freezing"] == "penultimate"
    shallow = ScFoundationConfig(**(tiny_config.to_dict() | {"num_hidden_layers": 1}))
    ScFoundationForPreTraining(shallow).save_pretrained(tmp_path / "shallow")
    ScFoundationTokenizer().save_pretrained(tmp_path / "shallow")
    settings = read_report(run(output="o", model=tmp_path / "shallow"))["settings"]
    assert (settings["freezing"], settings["num_layers"]) == ("last_n", 1)


def parts_of(
    model_dir: Path, cells: anndata.AnnData, folder: Path, mode: str, **options: Any
) -> tuple[ScFoundationForCellClassification, TrainedPart, Any, dict[str, Any]]:
    """Classifier, its trained part, the stored cells, and the same cells as a packed batch with labels."""
    torch.manual_seed(0)
    model = ScFoundationForCellClassification.from_pretrained(model_dir, num_labels=3)
    freeze(model, MODES[mode][0]["freezing"], n=MODES[mode][0].get("num_layers"))
    part = TrainedPart(model, **options)
    labels = cells.obs["cell_type"].map(TYPES.index).to_numpy()
    used = np.arange(1, cells.n_obs, 3)
    with ScFoundationTokenizer().prepare(cells, gene_column="symbol") as prepared:
        stored = store_cells(
            part,
            prepared,
            used,
            labels[used],
            folder,
            with_states=True,
            tokens_per_batch=3000,
            progress=SimpleNamespace(update=lambda number: None),
        )
        encoded = prepared.encode(0, cells.n_obs).select(used)
    batch = as_tensors(pack_cells(encoded), "pt") | {"labels": torch.from_numpy(labels[used])}
    return model, part, stored, batch


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("tokens_per_batch", [None, 2000], ids=["at-once", "in-parts"])
@pytest.mark.parametrize("mode", MODES)
def test_stored_cells_give_the_models_own_numbers(deep_model_dir, cells, tmp_path, mode, tokens_per_batch):
    model, part, stored, batch = parts_of(deep_model_dir, cells, tmp_path, mode, tokens_per_batch=tokens_per_batch)
    assert stored.array_names == MODES[mode][2]
    pooled, logits = pooled_and_logits(part, stored, np.arange(len(stored)), batch_size=5)
    with torch.no_grad():
        expected = model.eval()(**batch)
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
        seen = model.pool(model.scfoundation(**{k: v for k, v in batch.items() if k != "labels"}).pooler_output)
    torch.testing.assert_close(torch.from_numpy(pooled), seen, rtol=1e-4, atol=1e-5)

    without_dropout(model)
    model.train()
    model(**batch).loss.backward()
    expected_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert expected_gradients
    statistics = {name: tensor.clone() for name, tensor in model.classifier.norm.named_buffers()}
    model.zero_grad()
    model.classifier.norm.reset_running_stats()
    part.train()(**stored.batch(range(len(stored)))).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-5, msg=name)
    for name, tensor in model.classifier.norm.named_buffers():  # of all cells of the batch, once
        torch.testing.assert_close(tensor, statistics[name], rtol=1e-4, atol=1e-5, msg=name)


def test_stored_cells_come_in_the_order_asked_for(deep_model_dir, cells, tmp_path):
    _, _, stored, batch = parts_of(deep_model_dir, cells, tmp_path, "penultimate")
    some = stored.batch([5, 0, 7])
    assert some["labels"].tolist() == batch["labels"][[5, 0, 7]].tolist()
    lengths = batch["cu_seq_lens_q"].diff()
    assert some["cu_seq_lens_q"].diff().tolist() == lengths[[5, 0, 7]].tolist()
    torch.testing.assert_close(some["states"][:, lengths[5] : lengths[5] + lengths[0]], stored.batch([0])["states"])


def test_dropout_is_off_in_the_frozen_part_alone(deep_model_dir, cells, tmp_path):
    model, part, _, _ = parts_of(deep_model_dir, cells, tmp_path, "penultimate")
    part.train()
    layers = model.scfoundation.encoder.layers
    assert [layer.dropout.training for layer in layers] == [False, False, True, True]
    assert not model.scfoundation.embeddings.training


def test_without_room_for_states_the_frozen_part_runs_in_every_step(run, deep_model_dir, monkeypatch):
    with_states = run(output="stored", model=deep_model_dir)
    monkeypatch.setattr(finetuning.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    without = run(output="computed", model=deep_model_dir)
    assert read_report(with_states)["frozen_part"]["stored"] == ["states"]
    assert read_report(without)["frozen_part"]["stored"] == ["input_ids", "values"]
    assert read_report(without)["frozen_part"]["layers"] == 2
    expected, found = load(with_states).state_dict(), load(without).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


def test_a_training_batch_of_one_cell_never_reaches_batch_norm(run, monkeypatch):
    seen: list[tuple[bool, int]] = []
    forward = nn.BatchNorm1d.forward

    def noting(self, batch):
        seen.append((self.training, len(batch)))
        return forward(self, batch)

    monkeypatch.setattr(nn.BatchNorm1d, "forward", noting)
    # 60 cells train: 59 and a rest of one, twice.
    report = read_report(run(batch_size=59, max_steps=4, freezing="head"))
    assert sum(counts["train"] for counts in report["classes"].values()) == 60
    assert report["steps"] == 4
    assert [number for is_training, number in seen if is_training] == [59, 59]


def test_training_stops_when_validation_does_not_gain(run):
    report = read_report(run(max_steps=300, patience=2, learning_rate=1e-9, freezing="head"))
    validations = report["history"]["validation"]
    assert report["settings"]["eval_steps"] == 10
    assert report["steps"] < 300
    best = next(index for index, line in enumerate(validations) if line[0] == report["best_step"])
    assert len(validations) == best + 1 + 2


def test_the_best_weights_are_kept_not_the_last(run, scored):
    scored(0.1, 0.9, 0.2, 0.3)
    kept = run(output="kept", learning_rate=1e-2, freezing="full")
    assert read_report(kept)["best_step"] == 2
    scored(0.1, 0.9, 0.2)
    stopped = run(output="stopped", learning_rate=1e-2, freezing="full", patience=1)  # a step later
    assert (read_report(stopped)["best_step"], read_report(stopped)["steps"]) == (2, 3)
    scored(0.1, 0.2, 0.3, 0.4)
    last = load(run(output="last", learning_rate=1e-2, freezing="full")).state_dict()
    expected, found = load(stopped).state_dict(), load(kept).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert found["classifier.norm.num_batches_tracked"] == 2
    assert not torch.equal(last["classifier.output.weight"], found["classifier.output.weight"])


# --- LoRA ------------------------------------------------------------------------------------------------------------


@peft_warns
def test_adapters_are_saved_loaded_and_merged(run, scored, cells, tiny_model_dir):
    peft = pytest.importorskip("peft")
    scored(0.1, 0.2, 0.3, 0.4)
    folder = run(freezing="lora", learning_rate=1e-2)
    merged = load(folder)
    assert not any("lora" in name for name in merged.state_dict())
    assert not (folder / "adapter" / "model.safetensors").exists()
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, config=merged.config)
    adapted = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    expected = logits_of(merged, cells[:12])
    torch.testing.assert_close(logits_of(adapted, cells[:12]), expected, rtol=1e-4, atol=1e-4)
    pretrained = ScFoundationForPreTraining.from_pretrained(tiny_model_dir).state_dict()
    changed = {n for n, tensor in merged.state_dict().items() if n in pretrained and not tensor.equal(pretrained[n])}
    assert changed == {
        f"scfoundation.encoder.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qkvo"
    }
    merged_again = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(merged_again, cells[:12]), expected, rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tiny_model_dir
    )


# --- Choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        ("cross_entropy", "cross_entropy"),
        ("weighted_as_printed", "weighted_cross_entropy"),
        ("weighted_capped", "weighted_cross_entropy"),
        ("focal", "focal"),
    ],
)
def test_losses(run, cells, loss, kind):
    unequal = cells[(cells.obs["cell_type"] != TYPES[0]) | (np.arange(cells.n_obs) % 2 == 0)].copy()
    config = load(run(unequal, loss=loss, max_steps=1, min_cells_per_class=5)).config
    assert config.classification_loss == kind
    if loss == "weighted_capped":
        assert config.class_weights[0] > config.class_weights[1] == config.class_weights[2]
    elif loss == "weighted_as_printed":
        assert config.class_weights == pytest.approx([1 / 3] * 3)
    else:
        assert config.class_weights is None


def test_the_paper_preset(run):
    settings = read_report(run(preset="paper", max_steps=1, batch_size=None))["settings"]
    assert {key: settings[key] for key in ("learning_rate", "batch_size", "gradient_accumulation_steps")} == {
        "learning_rate": 1e-3,
        "batch_size": 64,
        "gradient_accumulation_steps": 5,
    }
    assert settings["freezing"] == "penultimate"
    assert (settings["pooling"], settings["loss"]) == ("max", "weighted_as_printed")


def settings_of(**changes: Any) -> FinetuningSettings:
    fields: dict[str, Any] = dict.fromkeys(inspect.signature(FinetuningSettings).parameters)
    fields |= {"preset": "default", "dtype": "float32", "patience": 5, "seed": 0}
    return FinetuningSettings(**(fields | changes))


@pytest.mark.parametrize(
    ("num_cells", "preset", "freezing", "steps"),
    [
        (140, "default", "full", 300),
        (960, "default", "full", 300),
        (3_200, "default", "full", 1_000),
        (3_200, "default", "head", 5_000),
        (3_200, "paper", "full", 300),
    ],
)
def test_steps_follow_from_the_number_of_cells(num_cells, preset, freezing, steps):
    settings = settings_of(preset=preset, freezing=freezing).complete(
        num_training_cells=num_cells, num_encoder_layers=3
    )
    assert settings["max_steps"] == steps
    assert settings["eval_steps"] == -(-steps // 30)


@pytest.mark.parametrize(("freezing", "rate"), [("full", 1e-4), ("head", 3e-3), ("lora", 1e-3)])
def test_learning_rates(freezing, rate):
    known = {"num_training_cells": 100, "num_encoder_layers": 3}
    assert settings_of(freezing=freezing).complete(**known)["learning_rate"] == rate
    assert settings_of(freezing=freezing, preset="paper").complete(**known)["learning_rate"] == 1e-3
    assert settings_of(freezing=freezing, learning_rate=0.1).complete(**known)["learning_rate"] == 0.1


def test_pooling_and_bfloat16(run):
    model = load(run(pooling="max", dtype="bfloat16"))
    assert model.classifier.hidden.weight.shape == (256, 16)
    assert model.dtype == torch.float32
    assert load(run(output="all", max_steps=1)).classifier.hidden.weight.shape == (256, 4 * 16)


def test_random_weights_are_the_control(run, tiny_model_dir):
    pretrained = ScFoundationForPreTraining.from_pretrained(tiny_model_dir).state_dict()
    # Not the seed that the tiny model itself was drawn with.
    drawn = load(run(output="drawn", random_weights=True, freezing="head", seed=3)).state_dict()
    kept = load(run(output="kept", freezing="head", seed=3)).state_dict()
    name = "scfoundation.embeddings.identity_embedding.weight"
    assert torch.equal(kept[name], pretrained[name])
    assert not torch.equal(drawn[name], pretrained[name])


def test_a_loaded_model_stays_as_it_is(run, scored, tiny_model_dir):
    scored(0.1, 0.2, 0.3, 0.4)
    model = ScFoundationForPreTraining.from_pretrained(tiny_model_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model=model, freezing="full", learning_rate=1e-2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_classifier_gets_a_new_head(run, cells):
    first = run(output="first", loss="weighted_capped", freezing="head")
    two_types = cells[cells.obs["cell_type"] != TYPES[0]].copy()
    second = load(run(two_types, "second", model=first, freezing="head"))
    assert list(second.config.id2label.values()) == TYPES[1:]
    assert second.config.class_weights is None


def test_the_licence_of_the_weights_is_passed_on(run, tiny_model_dir, tmp_path):
    official = tmp_path / "official"
    shutil.copytree(tiny_model_dir, official)
    (official / "original_config.json").write_text("{}")
    first = run(output="first", model=official, max_steps=1)
    second = run(output="second", model=first, max_steps=1)
    control = run(output="control", model=official, max_steps=1, random_weights=True)
    for folder in (first, second):
        assert "scfoundation-model-license-non-commercial" in (folder / "README.md").read_text()
        assert "**non-commercial research only**" in (folder / "README.md").read_text()
    assert "non-commercial" not in (control / "README.md").read_text()


# --- Labels ----------------------------------------------------------------------------------------------------------


def relabelled(cells: anndata.AnnData, **columns: Any) -> anndata.AnnData:
    changed = cells.copy()
    for name, values in columns.items():
        changed.obs[name] = values
    return changed


def test_cells_without_a_label_are_left_out_with_a_warning(run, cells):
    types = cells.obs["cell_type"].astype(object).to_numpy().copy()
    types[[0, 5]] = None
    types[7] = np.nan
    with pytest.warns(UserWarning, match="Left out of fine-tuning on 'cell_type': 3 cells without 'cell_type'"):
        report = read_report(run(relabelled(cells, cell_type=types)))
    assert report["left_out"] == {"without 'cell_type'": 3}
    assert not set(cells.obs_names[[0, 5, 7]]) & {name for names in report["splits"].values() for name in names}
    assert sum(map(len, report["splits"].values())) == cells.n_obs - 3


def test_no_labels_at_all(run, cells):
    with pytest.raises(KeyError, match="cell_class"):
        run(label="cell_class")
    with pytest.raises(ValueError, match="No cell has a 'cell_type'; fine-tuning learns from labelled cells"):
        run(relabelled(cells, cell_type=np.nan))


def test_one_type_only(run, cells):
    with pytest.raises(ValueError, match=r"'cell_type' holds one type, 'T cell'.*; telling types apart takes at least"):
        run(relabelled(cells, cell_type="T cell"))


def with_rare_types(cells: anndata.AnnData) -> anndata.AnnData:
    types = cells.obs["cell_type"].to_numpy().copy()
    types[0], types[1:4] = "alone", "few"
    return relabelled(cells, cell_type=types)


def test_rare_types_are_an_error_by_default(run, cells):
    message = r"2 types of 'cell_type' have fewer than min_cells_per_class=10 cells: alone \(1\), few \(3\)\. Leave"
    with pytest.raises(ValueError, match=message):
        run(with_rare_types(cells))


def test_rare_types_dropped(run, cells):
    with pytest.warns(UserWarning, match="Left out of fine-tuning on 'cell_type': 4 cells of a rare type"):
        report = read_report(run(with_rare_types(cells), rare_classes="drop"))
    assert list(report["classes"]) == TYPES
    assert report["left_out"] == {"of a rare type": 4}


def test_rare_types_kept(run, cells):
    with pytest.warns(UserWarning, match=r"Learned from very few cells, as told: alone \(1\), few \(3\)"):
        folder = run(with_rare_types(cells), rare_classes="keep")
    classes = read_report(folder)["classes"]
    assert classes["alone"] == {"train": 1, "validation": 0, "test": 0}
    assert classes["few"] == {"train": 1, "validation": 1, "test": 1}
    assert "alone" in load(folder).config.label2id


def test_only_rare_types(run, cells):
    with pytest.raises(ValueError, match="holds no type, once rare types are left out"):
        run(min_cells_per_class=1000, rare_classes="drop")
    some = cells[:4].copy()
    some.obs["cell_type"] = ["a", "a", "b", "b"]
    with pytest.raises(ValueError, match="No cell is left to validate with: every type has fewer than 3 cells"):
        run(some, rare_classes="keep")


def test_a_type_that_only_held_out_cells_have(run, cells):
    splits = np.array(["train", "train", "validation", "test"] * 18)
    types = cells.obs["cell_type"].to_numpy().copy()
    types[2], types[3], types[7] = "new", "new", "other"
    changed = relabelled(cells, cell_type=types, split=splits)
    with pytest.warns(UserWarning, match=r"3 cells of a type without training cells\. Without training cells in this"):
        report = read_report(run(changed, split_column="split", rare_classes="keep", min_cells_per_class=1))
    assert report["types_without_training_cells"] == {"new": 2, "other": 1}
    assert list(report["classes"]) == TYPES
    assert [len(report["splits"][split]) for split in ("train", "validation", "test")] == [36, 17, 16]


def test_a_split_column_without_validation_and_without_test(run, cells):
    report = read_report(run(relabelled(cells, split=["train", "test"] * 36), split_column="split"))
    assert [len(report["splits"][split]) for split in ("train", "validation", "test")] == [32, 4, 36]
    report = read_report(run(relabelled(cells, split=["train", "validation"] * 36), output="o", split_column="split"))
    assert set(report["scores"]) == {"validation"}


@pytest.mark.parametrize(
    ("columns", "options", "error", "message"),
    [
        ({"split": "training"}, {"split_column": "split"}, ValueError, "'split' holds 'training'; split_column takes"),
        ({"split": "test"}, {"split_column": "split"}, ValueError, "The column 'split' has no 'train'"),
        ({"split": None}, {"split_column": "split"}, ValueError, "72 labelled cells have no 'split', the first"),
        ({"donor": None}, {"split_by": "donor"}, ValueError, "72 labelled cells have no 'donor', the first"),
        ({"donor": "a"}, {"split_by": "donor"}, ValueError, r"The groups have 1 value \(a\)"),
        ({}, {"split_by": "batch"}, KeyError, "batch"),
        ({}, {"split_by": "donor", "split_column": "donor"}, ValueError, "exclude each other; give one"),
        ({}, {"rare_classes": "merge"}, ValueError, "no rare_classes 'merge'; choose error, drop, keep"),
    ],
)
def test_impossible_splits_are_told(run, cells, columns, options, error, message):
    with pytest.raises(error, match=message):
        run(relabelled(cells, **columns), **options)


def test_training_cells_of_one_type(run, cells):
    splits = np.where(cells.obs["cell_type"] == TYPES[0], "train", "validation")
    with pytest.raises(ValueError, match="'cell_type' of the training cells holds one type, 'CD14\\+ Monocyte'"):
        run(relabelled(cells, split=splits), split_column="split")


def test_too_few_genes(run, cells):
    with pytest.raises(ValueError, match="genes"):
        run(cells[:, :300].copy())


# --- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "best"}, "no preset 'best' to fine-tune with; choose default, paper"),
        ({"freezing": "all"}, "no freezing 'all' to fine-tune with; choose head, last_n, penultimate, lora, full"),
        ({"pooling": "mean"}, "no pooling 'mean'"),
        ({"loss": "hinge"}, "no loss 'hinge'"),
        ({"dtype": "float16"}, "no dtype 'float16' to fine-tune with; choose float32, bfloat16"),
        ({"num_layers": 2}, "num_layers is 2, but only freezing='last_n' takes a number of layers"),
        ({"freezing": "last_n"}, "'last_n' needs n from 1 to the encoder's 2 layers; n is None"),
        ({"freezing": "last_n", "num_layers": 3}, "n is 3"),
        ({"batch_size": 1}, "batch_size is 1; batch norm takes at least 2 cells a batch"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"max_steps": 0}, "max_steps is 0; it must be at least 1"),
        ({"patience": 0}, "patience is 0"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"device": "tpu"}, "no device 'tpu'"),
    ],
)
def test_impossible_options_are_told(run, options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_a_gpu_by_number_is_refused(run, monkeypatch):
    monkeypatch.setattr(
        "scfoundation_hf.trainer_scripts.finetuning_settings.parse_device", lambda _: torch.device("cuda:1")
    )
    with pytest.raises(ValueError, match="not on cuda:1: set CUDA_VISIBLE_DEVICES=1 and pass device='cuda'"):
        run()


def test_missing_packages_are_told_before_anything_is_computed():
    with pytest.raises(ImportError, match=r"report=True needs nopackage: pip install 'scfoundation-hf\[train\]'"):
        check_packages({"torch": "nothing", "nopackage": "report=True"})


def test_what_is_at_the_output_is_replaced_only_if_told(run, tmp_path):
    folder = run(max_steps=1)
    with pytest.raises(FileExistsError, match="overwrite"):
        run(max_steps=1)
    assert run(max_steps=2, overwrite=True) == folder
    assert read_report(folder)["steps"] == 2
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="was not made by fine-tuning"):
        run(output="mine", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_nothing_is_left_after_an_error(run, monkeypatch, tmp_path):
    monkeypatch.setattr(finetuning, "make_finetuning_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    assert list(tmp_path.iterdir()) == []


# --- What people read ------------------------------------------------------------------------------------------------


def test_the_report_is_one_file_and_the_logs_are_tensorboards(run, cells):
    pytest.importorskip("umap")
    pytest.importorskip("tensorboard")
    cells = relabelled(cells, cell_type=cells.obs["cell_type"].str.replace("CD34+", "<CD34 & co>", regex=False))
    folder = run(cells, report=True, report_to="tensorboard")
    page = (folder / "report.html").read_text()
    assert len(re.findall("<svg", page)) == 3
    assert len(re.findall("<img", page)) == 1
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:|#)", page)  # nothing is fetched
    assert "&lt;CD34 &amp; co&gt;" in page
    assert "<CD34" not in page
    assert next((folder / "logs").iterdir()).name.startswith("events.out.tfevents")
    one_map = (run(cells, "head", report=True, freezing="head") / "report.html").read_text()
    assert "The encoder was not trained, so there is one map" in one_map
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "cell-type-annotation" in card
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert f"| {TYPES[0]} | 20 | 2 |" in "".join(rows)
    assert "\n\n| CD" not in card  # one table, not one a row


def test_the_command(cells, tiny_model_dir, tmp_path, capsys):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    arguments = [tmp_path / "cells.h5ad", tmp_path / "out", "--label", "cell_type", "--model", tiny_model_dir]
    options = ["--gene-column", "symbol", "--max-steps", "2", "--no-progress", "--no-report", "--report-to", "none"]
    with pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in ["finetune", *arguments, *options]])
    out, err = capsys.readouterr()
    assert not exit_info.value.code, err
    assert out.strip() == str(tmp_path / "out")
    assert list(load(tmp_path / "out").config.id2label.values()) == TYPES


def test_every_argument_has_an_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "Example:" in plain
    for name in set(inspect.signature(finetune).parameters) - {"data", "output"}:
        assert f"--{name.replace('_', '-')}" in plain, name
