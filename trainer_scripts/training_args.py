"""`TrainingArguments` with the released recipe as defaults, and the choices that only this model's pretraining has."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from scfoundation_hf.tokenization.data_collator import Layout

Masking = Literal["released", "paper"]


@dataclass
class ScFoundationTrainingArguments(TrainingArguments):
    """Arguments of pretraining; all others are those of `transformers.TrainingArguments`.

    The defaults are the released recipe: AdamW, learning rate 1e-4 after a warm-up of 9,766 steps, no weight decay,
    gradients clipped at 1, bf16, 1,024 cells a step over all devices. Its schedule after the warm-up is not published;
    ours stays constant. A short run needs a shorter warm-up: see `recipes/`.

    Source: `training_hyperparameter.txt` of biomap-research/scFoundation; 9,766 x 1,024 cells are 10.0 million, which
    is why we read its batch of 128 x 8 as the whole and not as one device's.
    """

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Cells of a micro-batch of a process."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Cells of a validation batch of a process."})
    effective_batch_size: int | None = field(
        default=1024,
        metadata={
            "help": "Cells of an optimizer step over all processes. Sets gradient_accumulation_steps; null leaves it "
            "as it is given."
        },
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a micro-batch: it then holds fewer cells than per_device_train_batch_size where "
            "cells are rich. Needs effective_batch_size null, as cells a step then vary."
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate after the warm-up."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Course of the learning rate, by transformers' names."}
    )
    warmup_steps: float = field(
        default=9766, metadata={"help": "Steps of linear warm-up, or their share of all steps if below 1."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Norm at which gradients are clipped."})
    bf16: bool = field(default=True, metadata={"help": "Compute in bfloat16; weights stay float32."})

    masking: Masking = field(default="released", metadata={"help": "Which genes are hidden: see docs/pretraining.md."})
    masking_overrides: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Fields of ReadDepthAwareRecipe to set differently, as {down_sampling_probability: 0} for TPM or "
            "FPKM."
        },
    )
    layout: Layout = field(
        default="packed", metadata={"help": "packed: cells end to end without padding; padded: one row a cell."}
    )
    feature_redraw_interval: int = field(
        default=1000, metadata={"help": "Steps between draws of new random features for the decoder; 0: never."}
    )
    decoder_positions: int | None = field(
        default=None,
        metadata={
            "help": "Positions the decoder is shown in training: all visible and hidden genes and some of the zero "
            "ones, weighted so that their sum is unbiased. Default: all. Validation always shows all."
        },
    )
    all_positions_from: float | None = field(
        default=None,
        metadata={
            "help": "Step from which on the decoder is shown all positions, or share of all steps if below 1; only "
            "with decoder_positions."
        },
    )
    max_eval_cells: int | None = field(
        default=None,
        metadata={
            "help": "About how many cells of the validation split are used, spread over all of it; default: all."
        },
    )
    eval_seed: int = field(
        default=0,
        metadata={"help": "Seed of what is hidden in validation, the same in every run so that runs compare."},
    )

    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Leave losses that are no numbers out of the log. They should be seen, and looking for them makes "
            "a GPU wait in every step."
        },
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps between two lines of the log."})
    eval_steps: float | None = field(default=1000, metadata={"help": "Steps between two validations."})
    save_steps: float = field(default=1000, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "As in transformers; every weight is used in every step."}
    )
    ignore_data_skip: bool = field(
        default=True,
        metadata={"help": "Always true: a resumed run goes to its place in the data without reading what came before."},
    )

    def __post_init__(self) -> None:
        """Check the arguments against each other and find the accumulation steps."""
        if not torch.accelerator.is_available():
            self.use_cpu = True  # bf16 runs on the CPU too, but transformers wants to be told that the CPU is meant
        if not self.ignore_data_skip:
            raise ValueError(
                "ignore_data_skip is False, but the corpus goes to its saved position by itself; leave it out."
            )
        if self.all_positions_from is not None and self.decoder_positions is None:
            raise ValueError(
                f"all_positions_from is {self.all_positions_from}, but without decoder_positions the decoder is "
                "always shown all positions; set decoder_positions or leave it out."
            )
        for name in ("feature_redraw_interval", "all_positions_from"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative.")
        super().__post_init__()
        self._set_accumulation()

    def _set_accumulation(self) -> None:
        if self.effective_batch_size is None:
            return
        if self.tokens_per_batch is not None:
            raise ValueError(
                f"With tokens_per_batch {self.tokens_per_batch} the cells of a step vary, so they cannot be "
                f"effective_batch_size {self.effective_batch_size}; set it to null and give "
                "gradient_accumulation_steps."
            )
        micro_batch = self.per_device_train_batch_size * self.world_size
        steps, rest = divmod(self.effective_batch_size, micro_batch)
        if rest or not steps:
            raise ValueError(
                f"effective_batch_size {self.effective_batch_size} is not a multiple of per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x {self.world_size} processes; change one of them."
            )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} x {micro_batch} cells a micro-batch "
                f"do not make effective_batch_size {self.effective_batch_size}; leave one of them out (null)."
            )
        self.gradient_accumulation_steps = steps

    def decoder_positions_at(self, step: int) -> int | None:
        """Positions the decoder is shown in the step after `step` completed ones; `None`: all."""
        if self.all_positions_from is None:
            return self.decoder_positions
        start = self.all_positions_from
        if start < 1:
            start = round(start * self.max_steps)
        return self.decoder_positions if step < start else None
