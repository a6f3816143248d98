"""The `Trainer` of pretraining: batches from a corpus, validation weighted by targets, checkpoints that resume exactly.

The loop, the optimizer, logging and the distributed back ends are transformers' own; each method here says what it
does differently and why.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from scfoundation_hf.corpus.streaming import CorpusLoader, CorpusStream
from scfoundation_hf.evaluation.expression_errors import ExpressionErrors
from scfoundation_hf.evaluation.flops import batch_training_flops, tokens_per_cell
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.data_collator import ScFoundationReadDepthAwareCollator

from .callbacks import RandomFeatureRedraw, ShortPrinter, ShortProgress
from .throughput import Work, measure_matrix_rate
from .training_args import ScFoundationTrainingArguments

UNFINISHED = "unfinished"  # folder that a checkpoint is written in before it gets its name
PROGRESS_NAME = "progress_{process_index}.json"


class ScFoundationTrainer(Trainer):
    """Pretrain a `ScFoundationForPreTraining` on a corpus.

    Args:
        model: the model.
        args: the training arguments.
        data_collator: makes the batches; its seed, recipe and layout are used as they are, `decoder_positions` is
            that of `args`. Its tokenizer is saved with the model.
        train_dataset: the training split of this process: one that another process reads too is trained on twice.
        eval_dataset: the validation split of this process, or several by name.
        **kwargs: further arguments of `Trainer`.
    """

    args: ScFoundationTrainingArguments
    data_collator: ScFoundationReadDepthAwareCollator

    def __init__(
        self,
        model: ScFoundationForPreTraining,
        args: ScFoundationTrainingArguments,
        *,
        data_collator: ScFoundationReadDepthAwareCollator,
        train_dataset: CorpusStream | None = None,
        eval_dataset: CorpusStream | dict[str, CorpusStream] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        del model.config.use_cache  # the parent writes it into the configuration, which has no such field
        for long, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortPrinter)):
            if self.pop_callback(long) is not None:  # the parent chose one of the two
                self.add_callback(short)
        self.add_callback(RandomFeatureRedraw(interval=args.feature_redraw_interval, seed=args.seed))
        self.add_callback(_Bookkeeping(self))
        self.work_done = Work()  # of this process, since the first step of the run
        self.matrix_rate = 0.0  # floating-point operations a second of all processes, once training began
        self._work_logged = Work()
        self._step_began = 0.0
        self._batches: TrainingBatches | None = None
        self._resumed: dict[str, Any] | None = None

    # --- Data ---

    @property
    def train_stream(self) -> CorpusStream:
        """The training split of this process."""
        if not isinstance(self.train_dataset, CorpusStream):
            raise ValueError(f"Training needs a CorpusStream as train_dataset, got {self.train_dataset!r}.")
        return self.train_dataset

    def get_train_dataloader(self) -> Any:
        """The endless batches of this process, at the position of the checkpoint when resuming.

        Not the parent's: accelerate would share the stream out among processes, and it knows its share already.
        """
        self._batches = TrainingBatches(self)
        return self._batches

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The validation batches of this process, with the same genes hidden in every run and at every step."""
        if isinstance(eval_dataset, str):
            assert isinstance(self.eval_dataset, dict)
            eval_dataset = self.eval_dataset[eval_dataset]
        stream = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(stream, CorpusStream):
            raise ValueError(f"Validation needs a CorpusStream as eval_dataset, got {stream!r}.")
        collator = replace(self.data_collator, seed=self.args.eval_seed, decoder_positions=None)
        return self.make_loader(stream, collator)

    def make_loader(self, stream: CorpusStream, collator: ScFoundationReadDepthAwareCollator) -> CorpusLoader:
        """Batches of a stream, loaded as the arguments say."""
        args = self.args
        return CorpusLoader(
            stream,
            collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            prefetch_factor=args.dataloader_prefetch_factor,
            # Without one of its own, each new loader would move the random state that dropout draws from.
            generator=torch.Generator(),
        )

    # --- Steps ---

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """As the parent; the clock of the step starts here, so that waiting for data counts."""
        self._step_began = perf_counter()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As the parent, and count what was computed."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        lengths = tokens_per_cell(inputs)
        self.work_done += Work(len(lengths), int(lengths.sum()), self.floating_point_ops(inputs))
        return loss

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> Any:
        """Of a forward and backward pass, by our own formula: a multiple of the parameters would miss the decoder."""
        return batch_training_flops(self.accelerator.unwrap_model(self.model).config, inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent, with the throughput since the last line added to the lines of training."""
        if "loss" in logs:
            done = self.total_work()
            logs |= (done - self._work_logged).rates(matrix_rate=self.matrix_rate)
            logs |= {"cells_seen": done.cells, "flops": done.flops}
            self._work_logged = done
        super().log(logs, start_time)

    def total_work(self) -> Work:
        """What all processes computed together; the seconds are the mean. Every process must call it."""
        own = torch.tensor(list(asdict(self.work_done).values()), dtype=torch.float64, device=self.args.device)
        cells, tokens, flops, seconds = self.accelerator.reduce(own, reduction="sum").tolist()
        return Work(cells, tokens, flops, seconds / self.args.world_size)

    # --- Validation ---

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Errors over all targets of all processes; the parent would average over batches of unequal size.

        The loss is the mean squared error; `ExpressionErrors` gives the rest.
        """
        assert self.model is not None
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        errors, num_cells = ExpressionErrors(), 0
        for batch in islice(dataloader, None, None, self._eval_stride(dataloader)):
            inputs = self._prepare_inputs(batch)
            labels = inputs.pop("labels")
            with torch.no_grad():
                predicted = model(**inputs).predicted_values
            errors.update(predicted, labels, log10_source_depth(inputs))
            num_cells += len(labels)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        totals = torch.cat([errors.sums.flatten(), torch.tensor([num_cells], dtype=torch.float64)])
        totals = self.accelerator.reduce(totals.to(self.args.device), reduction="sum").cpu()
        errors.sums = totals[:-1].view_as(errors.sums)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in errors.compute().items()}
        metrics[f"{metric_key_prefix}_loss"] = metrics.pop(f"{metric_key_prefix}_mse")
        metrics[f"{metric_key_prefix}_num_cells"] = int(totals[-1])
        no_values: Any = None  # 100,000 cells of them would be gigabytes
        return EvalLoopOutput(predictions=no_values, label_ids=None, metrics=metrics, num_samples=int(totals[-1]))

    def _eval_stride(self, dataloader: CorpusLoader) -> int:
        """Every how many batches one is used: the split lies source by source, so its beginning would be one-sided."""
        if self.args.max_eval_cells is None:
            return 1
        cells = len(dataloader) * self.args.per_device_eval_batch_size * self.args.world_size
        return max(round(cells / self.args.max_eval_cells), 1)

    # --- Checkpoints ---

    @property
    def run_folder(self) -> Path:
        """Where checkpoints and the model go."""
        assert self.args.output_dir is not None  # transformers fills it in
        return Path(self.args.output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        """A folder of its own while a checkpoint is being written: see `_save_checkpoint`."""
        return str(self.run_folder / UNFINISHED)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the parent, with the place in the data; the checkpoint gets its name only when it is whole."""
        name = f"checkpoint-{self.state.global_step}"
        run, unfinished = self.run_folder, Path(self._get_output_dir(trial))
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        progress = unfinished / name / PROGRESS_NAME.format(process_index=self.args.process_index)
        progress.write_text(json.dumps(self._progress()) + "\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(run / f"checkpoint-{self.state.best_global_step}")
                self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
            _flush(unfinished / name)
            shutil.rmtree(run / name, ignore_errors=True)  # of a run that went on from an earlier checkpoint
            (unfinished / name).rename(run / name)
            unfinished.rmdir()
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _progress(self) -> dict[str, Any]:
        """What this process needs, beside the weights, to go on as if nothing had happened."""
        assert self._batches is not None
        return {
            "data": self._batches.state_dict(),
            "work_done": asdict(self.work_done),
            "work_logged": asdict(self._work_logged),
            "loss_since_logged": self._tr_loss.item(),
            "step_last_logged": self._globalstep_last_logged,
        }

    def _init_training_state(self, max_steps: Any, *args: Any) -> tuple[int, int]:
        """As the parent; when resuming, also go to the checkpoint's place in the data."""
        started_from = super()._init_training_state(max_steps, *args)
        checkpoint = args[-2]
        if checkpoint is not None:
            self._restore_progress(Path(checkpoint))
        if self.state.global_step >= max_steps:
            return sys.maxsize, 0  # the parent would train a step more before it looked
        return started_from

    def _restore_progress(self, checkpoint: Path) -> None:
        path = checkpoint / PROGRESS_NAME.format(process_index=self.args.process_index)
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no {path.name}, so it was not written by {self.args.world_size} processes of this "
                "trainer; resume with as many processes as wrote it."
            )
        progress = json.loads(path.read_text(encoding="utf-8"))
        assert self._batches is not None
        self._batches.load_state_dict(progress["data"])
        self.work_done = Work(**progress["work_done"])
        self._work_logged = Work(**progress["work_logged"])
        self._resumed = progress

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As the parent, without its pickle of the training arguments: nothing here reads it, and nobody should."""
        super()._save(output_dir, state_dict)
        Path(output_dir or self.run_folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)


class TrainingBatches:
    """The endless training batches of one process.

    What the decoder is shown changes at the step that the arguments name, also when workers have batches of the old
    kind in store: those are made again.
    """

    def __init__(self, trainer: ScFoundationTrainer) -> None:
        self._trainer = trainer
        self._shown = self._positions_shown()
        self._loader = self._make_loader()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:  # the loader stops at the end of each epoch
            if self._shown != self._positions_shown():
                place, self._shown = self._loader.state_dict(), self._positions_shown()
                self._loader = self._make_loader()
                self._loader.load_state_dict(place)
            for batch in self._loader:
                yield batch
                if self._shown != self._positions_shown():
                    break

    def state_dict(self) -> dict[str, Any]:
        """The place in the data after the last batch that was handed out."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place. Raises: ValueError: if it belongs to another corpus, order or number of processes."""
        self._loader.load_state_dict(state)

    def _positions_shown(self) -> int | None:
        return self._trainer.args.decoder_positions_at(self._trainer.state.global_step)

    def _make_loader(self) -> CorpusLoader:
        trainer = self._trainer
        collator = replace(trainer.data_collator, decoder_positions=self._shown)
        return trainer.make_loader(trainer.train_stream, collator)


class _Bookkeeping(TrainerCallback):
    """What must happen at moments for which `Trainer` has no method."""

    def __init__(self, trainer: ScFoundationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.accelerator.wait_for_everyone()
        rate = torch.tensor(measure_matrix_rate(args.device, torch.bfloat16 if args.bf16 else torch.float32))
        trainer.matrix_rate = float(trainer.accelerator.reduce(rate.to(args.device), reduction="sum"))
        # Each process has its own dropout; the parent starts all of them alike.
        set_seed(args.seed + args.process_index)
        if trainer._resumed is not None:
            # Else the first loss logged after resuming would be a mean over fewer steps.
            trainer._tr_loss += trainer._resumed["loss_since_logged"]
            trainer._globalstep_last_logged = trainer._resumed["step_last_logged"]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.work_done += Work(seconds=perf_counter() - trainer._step_began)
        # The parent sees one endless epoch; this is how often the corpus was gone through.
        state.epoch = trainer.work_done.cells * args.world_size / trainer.train_stream.num_cells


def log10_source_depth(batch: Mapping[str, Any]) -> Tensor:
    """S of each cell of a padded or packed batch, `(B,)`: the value of its last token."""
    if "cu_seq_lens_q" in batch:
        return batch["values"][0, batch["cu_seq_lens_q"][1:].long() - 1]
    last = batch["attention_mask"].sum(dim=1, keepdim=True) - 1
    return batch["values"].gather(1, last).squeeze(1)


def _flush(folder: Path) -> None:
    """Have the files on disk before their folder gets its name, so that a power cut leaves no half of them."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
