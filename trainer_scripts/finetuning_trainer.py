"""Trainer for a part of a classifier on stored cells: stops early on macro F1, keeps the best weights, logs."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback

from scfoundation_hf.evaluation.annotation_scores import annotation_scores

from .stored_cells import StoredCells
from .trained_part import TrainedPart

BEST_METRIC = "macro_f1"


def make_trainer(
    part: TrainedPart,
    cells: StoredCells,
    settings: Mapping[str, Any],
    *,
    train: np.ndarray,
    validation: np.ndarray,
    classes: Sequence[str],
    device: torch.device,
    checkpoints: Path,
    logs: Path,
    report_to: Sequence[str],
    progress: bool,
) -> Trainer:
    """A Trainer whose `train()` leaves the best weights in `part`.

    Args:
        cells: what batches are made from.
        settings: from `FinetuningSettings.complete`.
        train, validation: numbers of the cells in `cells`.
        classes: names of the classes.
        checkpoints: folder for the best weights so far; nobody needs it afterwards.
        logs: folder of TensorBoard's files.
        report_to: as in transformers' TrainingArguments.
    """
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        seed=settings["seed"],
        max_steps=settings["max_steps"],
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["gradient_accumulation_steps"],
        learning_rate=settings["learning_rate"],
        warmup_steps=0.1,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        max_grad_norm=1.0,
        bf16=settings["dtype"] == "bfloat16",
        use_cpu=device.type == "cpu",
        eval_strategy="steps",
        eval_steps=settings["eval_steps"],
        logging_steps=settings["eval_steps"],
        save_strategy="best",
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model=BEST_METRIC,
        greater_is_better=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        report_to=[logger for logger in report_to if logger not in ("none", "tensorboard")],
        disable_tqdm=not progress,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would cut a packed batch anywhere
    callbacks: list[TrainerCallback] = [EarlyStoppingCallback(settings["patience"]), _KeepOnlyTheBest()]
    if "tensorboard" in report_to:
        from torch.utils.tensorboard import SummaryWriter

        callbacks.append(TensorBoardCallback(SummaryWriter(str(logs))))

    def score(predicted: EvalPrediction) -> dict[str, float]:
        called = np.argmax(predicted.predictions, axis=-1)
        scores = annotation_scores(
            [classes[number] for number in np.asarray(predicted.label_ids)], [classes[number] for number in called]
        )
        return {name: scores[name] for name in (BEST_METRIC, "accuracy", "balanced_accuracy")}

    trainer = Trainer(
        part,
        arguments,
        data_collator=cells.batch,
        train_dataset=train.tolist(),
        eval_dataset=validation.tolist(),
        compute_metrics=score,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # what Trainer has instead of progress bars
    return trainer


class _KeepOnlyTheBest(TrainerCallback):
    """Removes older checkpoints; save_total_limit=1 would too, but warns where several are saved within a second."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert args.output_dir is not None  # transformers fills it in
        for checkpoint in Path(args.output_dir).glob("checkpoint-*"):
            if checkpoint.name != f"checkpoint-{state.best_global_step}":
                shutil.rmtree(checkpoint)


def history(trainer: Trainer) -> dict[str, list[list[float]]]:
    """`training`: step and loss; `validation`: step, loss and macro F1."""
    lines = trainer.state.log_history
    return {
        "training": [[line["step"], line["loss"]] for line in lines if "loss" in line],
        "validation": [
            [line["step"], line["eval_loss"], line[f"eval_{BEST_METRIC}"]] for line in lines if "eval_loss" in line
        ],
    }
