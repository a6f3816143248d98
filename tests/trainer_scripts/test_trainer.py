"""A step's gradient does not depend on how its cells are dealt out, validation counts targets, resuming is exact."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from scfoundation_hf.evaluation.expression_errors import ExpressionErrors
from scfoundation_hf.tokenization.data_collator import ScFoundationReadDepthAwareCollator
from scfoundation_hf.trainer_scripts.pretrain import load_model, open_corpus
from scfoundation_hf.trainer_scripts.trainer import ScFoundationTrainer, log10_source_depth

from .conftest import TINY_MODEL, WITHOUT_DROPOUT


def make_trainer(config, **arguments):
    torch.manual_seed(config.training.seed)
    model, tokenizer = load_model(config)
    train, validation = open_corpus(config)
    collator = ScFoundationReadDepthAwareCollator(tokenizer, seed=config.training.seed, layout=config.training.layout)
    return ScFoundationTrainer(
        model, config.training, data_collator=collator, train_dataset=train, eval_dataset=validation, **arguments
    )


def losses(trainer):
    return [(line["step"], line["loss"]) for line in trainer.state.log_history if "loss" in line]


class Recorder(TrainerCallback):
    """Notes what `note` returns after each step; raises after step `stop`."""

    def __init__(self, *, note=lambda: None, stop=None):
        self.notes, self.note, self.stop = [], note, stop

    def on_step_end(self, args, state, control, **kwargs):
        self.notes.append(self.note())

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            raise InterruptedError


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_accumulated_micro_batches_give_the_gradient_of_the_whole(make_config, tmp_path, layout):
    results = []
    for size in (8, 2):
        config = make_config(
            output_dir=str(tmp_path / str(size)),
            per_device_train_batch_size=size,
            effective_batch_size=8,
            model_overrides=TINY_MODEL | WITHOUT_DROPOUT,
            layout=layout,
            decoder_positions=None,  # how many are shown depends on the richest cell of the micro-batch
            all_positions_from=None,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
        )
        trainer = make_trainer(config)
        trainer.train()
        assert trainer.args.gradient_accumulation_steps == 8 // size
        results.append((losses(trainer), trainer.model.state_dict()))
    (losses_at_once, at_once), (losses_in_parts, in_parts) = results
    # Cells differ in their numbers of targets, so that a mean of means would be off by far more.
    assert losses_in_parts == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses_at_once]
    torch.testing.assert_close(in_parts, at_once, rtol=0, atol=1e-6)


def test_validation_is_weighted_by_targets(make_config, tmp_path):
    metrics = {}
    for size in (7, 64):
        config = make_config(
            output_dir=str(tmp_path), per_device_eval_batch_size=size, eval_strategy="steps", eval_steps=4
        )
        trainer = make_trainer(config)
        metrics[size] = trainer.evaluate()
    for key in ("eval_loss", "eval_mae_zero", "eval_mre_nonzero", "eval_pearson_nonzero", "eval_mse_depth_3.0_to_3.5"):
        assert metrics[7][key] == pytest.approx(metrics[64][key], rel=1e-5)
    assert metrics[7]["eval_num_cells"] == trainer.eval_dataset.num_cells

    errors = ExpressionErrors()
    for batch in trainer.get_eval_dataloader():
        assert "decoder_ids" not in batch  # validation shows all positions, whatever training shows
        with torch.no_grad():
            predicted = trainer.model(**batch).predicted_values
        errors.update(predicted, batch["labels"], log10_source_depth(batch))
    assert metrics[64]["eval_loss"] == pytest.approx(errors.compute()["mse"], rel=1e-6)

    trainer = make_trainer(make_config(per_device_eval_batch_size=2, max_eval_cells=8, eval_strategy="steps"))
    assert trainer.evaluate()["eval_num_cells"] == pytest.approx(8, abs=2)


def test_depth_is_the_value_of_the_last_token():
    values = torch.tensor([[0.5, 0.25, 3.5, 3.25], [1.0, 2.5, 2.0, 0.0]])
    padded = {"values": values, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    packed = {"values": values.flatten()[None, :7], "cu_seq_lens_q": torch.tensor([0, 4, 7], dtype=torch.int32)}
    for batch in (padded, packed):
        assert log10_source_depth(batch).tolist() == [3.25, 2.0]


def test_all_positions_are_shown_from_the_step_on_that_was_asked_for(make_config):
    config = make_config(all_positions_from=0.5, dataloader_num_workers=1, save_strategy="no")
    trainer = make_trainer(config)
    shown = []
    forward = trainer.model.forward
    trainer.model.forward = lambda **batch: (shown.append("decoder_ids" in batch), forward(**batch))[1]
    trainer.train()
    assert shown == [True] * 8 + [False] * 8  # two micro-batches a step


def test_a_loss_that_is_no_number_is_seen(make_config):
    """transformers would log the mean of the other steps."""
    trainer = make_trainer(make_config(save_strategy="no", logging_steps=1, max_steps=2))
    torch.nn.init.constant_(trainer.model.get_input_embeddings().weight, float("nan"))
    trainer.train()
    assert all(math.isnan(loss) for _, loss in losses(trainer))
    assert len(losses(trainer)) == 2


def test_the_log_tells_how_fast_it_went_and_how_far(make_config):
    trainer = make_trainer(make_config(save_strategy="no", logging_steps=4))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["cells_seen"] for line in lines] == [16, 32]
    assert 0 < lines[0]["flops"] < lines[1]["flops"] == trainer.work_done.flops
    assert lines[1]["epoch"] == pytest.approx(32 / trainer.train_stream.num_cells)
    for line in lines:
        assert line["cells_per_second"] > 0
        assert line["tokens_per_second"] > 100 * line["cells_per_second"]
        assert 0 < line["mfu"] < 1


@pytest.mark.parametrize("workers", [0, 2], ids=["same-workers", "other-workers"])
def test_a_resumed_run_ends_as_one_left_alone(make_config, settings, tmp_path, workers):
    alone = make_trainer(make_config(output_dir=str(tmp_path / "alone")))
    alone.train()

    interrupted = make_trainer(make_config(), callbacks=[Recorder(stop=6)])
    with pytest.raises(InterruptedError):
        interrupted.train()
    run = Path(settings["output_dir"])
    assert [folder.name for folder in run.glob("checkpoint-*")] == ["checkpoint-4"]
    torch.manual_seed(12345)
    resumed = make_trainer(make_config(dataloader_num_workers=workers))
    resumed.train(resume_from_checkpoint=str(run / "checkpoint-4"))

    assert losses(resumed) == losses(alone)  # step 6 averages over steps on both sides of the cut
    torch.testing.assert_close(resumed.model.state_dict(), alone.model.state_dict(), rtol=0, atol=0)
    assert resumed.work_done.cells == alone.work_done.cells == 32


def test_a_checkpoint_gets_its_name_when_it_is_whole(make_config, settings, monkeypatch):
    trainer = make_trainer(make_config())
    monkeypatch.setattr(trainer, "_progress", lambda: 1 / 0)  # the last that is written
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    run = Path(settings["output_dir"])
    assert not list(run.glob("checkpoint-*"))
    assert (run / "unfinished" / "checkpoint-4" / "model.safetensors").is_file()
    make_trainer(make_config()).train()
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    assert not list(run.rglob("training_args.bin"))  # a pickle that nothing reads


def test_the_best_checkpoint_is_kept_and_loaded(make_config, settings, monkeypatch):
    config = make_config(
        eval_strategy="steps", eval_steps=2, save_steps=2, save_total_limit=1, load_best_model_at_end=True
    )
    trainer = make_trainer(config)
    validation_losses = iter([3.0, 1.0, 2.0, 2.0])
    evaluate = trainer.evaluation_loop

    def worse_and_worse(*args, **kwargs):
        output = evaluate(*args, **kwargs)
        output.metrics["eval_loss"] = next(validation_losses)
        return output

    monkeypatch.setattr(trainer, "evaluation_loop", worse_and_worse)
    trainer.train()
    best = Path(settings["output_dir"]) / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    state = json.loads((best.parent / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    stored = load_file(best / "model.safetensors")
    torch.testing.assert_close(trainer.model.state_dict(), stored, rtol=0, atol=0)


def test_a_checkpoint_of_another_order_or_number_of_processes_is_refused(make_config, settings):
    trainer = make_trainer(make_config(max_steps=4))
    trainer.train()
    checkpoint = Path(settings["output_dir"]) / "checkpoint-4"
    with pytest.raises(ValueError, match=r"another order of its cells.*seed was 42, is 7"):
        make_trainer(make_config(seed=7)).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "progress_0.json").unlink()
    with pytest.raises(ValueError, match=r"has no progress_0\.json, so it was not written by 1 processes"):
        make_trainer(make_config()).train(resume_from_checkpoint=str(checkpoint))


def test_data_of_another_kind_is_refused(make_config):
    config = make_config()
    model, tokenizer = load_model(config)
    trainer = ScFoundationTrainer(
        model, config.training, data_collator=ScFoundationReadDepthAwareCollator(tokenizer), train_dataset=[1, 2]
    )
    with pytest.raises(ValueError, match=r"needs a CorpusStream as train_dataset, got \[1, 2\]"):
        trainer.train()
    with pytest.raises(ValueError, match="needs a CorpusStream as eval_dataset, got None"):
        trainer.get_eval_dataloader()


def test_the_configuration_is_left_as_it_was(make_config):
    config = make_config(save_strategy="no", max_steps=1, all_positions_from=None)
    model, tokenizer = load_model(config)
    before = model.config.to_dict()
    trainer = ScFoundationTrainer(
        model,
        config.training,
        data_collator=ScFoundationReadDepthAwareCollator(tokenizer),
        train_dataset=open_corpus(config)[0],
    )
    trainer.train()
    assert model.config.to_dict() == before
