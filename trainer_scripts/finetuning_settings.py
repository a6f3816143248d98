"""The choices of a fine-tuning run: what a preset gives, what the user sets, and what follows from the data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

from scfoundation_hf.configuration.configuration_scfoundation import ClassificationLoss
from scfoundation_hf.inference.loading import parse_device
from scfoundation_hf.modeling_scfoundation.losses import capped_class_weights, class_weights_as_printed
from scfoundation_hf.modeling_scfoundation.pooling import PoolingMode

Freezing = Literal["head", "last_n", "penultimate", "lora", "full"]
FinetuningLoss = Literal["cross_entropy", "weighted_as_printed", "weighted_capped", "focal"]
FinetuningDtype = Literal["float32", "bfloat16"]
PresetName = Literal["default", "paper"]
RareClasses = Literal["error", "drop", "keep"]

MIN_STEPS = 300
EPOCHS = 10  # where max_steps is not given
HEAD_EPOCHS = 50  # steps of a head alone cost next to nothing
VALIDATIONS = 30  # at most, in a run that is not stopped early


@dataclass(frozen=True)
class Preset:
    """Training choices that go together.

    Args:
        learning_rates: by freezing, where they differ from `learning_rate`.
    """

    learning_rate: float
    batch_size: int
    gradient_accumulation_steps: int
    pooling: PoolingMode
    loss: FinetuningLoss
    learning_rates: Mapping[Freezing, float] = field(default_factory=dict)


PRESETS: dict[PresetName, Preset] = {
    "default": Preset(1e-3, 32, 1, "all", "cross_entropy", {"head": 3e-3, "full": 1e-4}),
    # Learning rate, batch, accumulation, pooling: the released script. Loss: Methods, "Cell type annotation".
    "paper": Preset(1e-3, 64, 5, "max", "weighted_as_printed"),
}


@dataclass(frozen=True)
class FinetuningSettings:
    """How a classifier is trained; `finetune` says what each field means. `None`: still to be found out.

    Raises: ValueError: for choices that do not exist or cannot work.
    """

    preset: PresetName
    freezing: Freezing | None
    num_layers: int | None
    pooling: PoolingMode | None
    loss: FinetuningLoss | None
    learning_rate: float | None
    batch_size: int | None
    max_steps: int | None
    patience: int
    seed: int
    random_weights: bool
    tokens_per_batch: int | None
    dtype: FinetuningDtype

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("preset", self.preset, get_args(PresetName)),
            ("freezing", self.freezing or "head", get_args(Freezing)),
            ("pooling", self.pooling or "all", get_args(PoolingMode)),
            ("loss", self.loss or "focal", get_args(FinetuningLoss)),
            ("dtype", self.dtype, get_args(FinetuningDtype)),
        ):
            if value not in choices:
                raise ValueError(f"There is no {name} {value!r} to fine-tune with; choose {', '.join(choices)}.")
        if self.num_layers is not None and self.freezing != "last_n":
            raise ValueError(f"num_layers is {self.num_layers}, but only freezing='last_n' takes a number of layers.")
        if self.batch_size is not None and self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}; batch norm takes at least 2 cells a batch.")
        if self.learning_rate is not None and not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0.")

    def complete(self, *, num_training_cells: int, num_encoder_layers: int) -> dict[str, Any]:
        """All choices, with those that follow from preset, data and encoder; JSON-able."""
        preset = PRESETS[self.preset]
        freezing: Freezing = self.freezing or ("penultimate" if num_encoder_layers > 1 else "last_n")
        num_layers = 1 if self.freezing is None and freezing == "last_n" else self.num_layers
        batch_size = self.batch_size or preset.batch_size
        max_steps = self.max_steps
        if max_steps is None:
            cells_per_step = batch_size * preset.gradient_accumulation_steps
            epochs = HEAD_EPOCHS if freezing == "head" else EPOCHS
            max_steps = max(MIN_STEPS, math.ceil(epochs * num_training_cells / cells_per_step))
        default_rate = preset.learning_rates.get(freezing, preset.learning_rate)
        return vars(self) | {
            "freezing": freezing,
            "num_layers": num_layers,
            "pooling": self.pooling or preset.pooling,
            "loss": self.loss or preset.loss,
            "learning_rate": self.learning_rate or default_rate,
            "batch_size": batch_size,
            "gradient_accumulation_steps": preset.gradient_accumulation_steps,
            "max_steps": max_steps,
            "eval_steps": math.ceil(max_steps / VALIDATIONS),
        }


def loss_fields(loss: FinetuningLoss, class_counts: list[int]) -> dict[str, Any]:
    """The fields of `ScFoundationConfig` that make this loss, with weights from the training cells of each type."""
    kind: ClassificationLoss = "focal" if loss == "focal" else "cross_entropy"
    weights = None
    if loss == "weighted_as_printed":
        kind, weights = "weighted_cross_entropy", class_weights_as_printed(class_counts)
    elif loss == "weighted_capped":
        kind, weights = "weighted_cross_entropy", capped_class_weights(class_counts)
    return {"classification_loss": kind, "class_weights": weights}


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device to train on.

    Raises: ValueError: if it is not there, or is one of several GPUs by number, which Trainer does not take.
    """
    chosen = parse_device(device)
    if chosen.index:
        raise ValueError(
            f"Fine-tuning runs on the first GPU that it sees, not on {chosen}: set CUDA_VISIBLE_DEVICES={chosen.index} "
            "and pass device='cuda'."
        )
    return chosen


def check_packages(needed: Mapping[str, str]) -> None:
    """Refuse to begin what a missing package would end.

    Args:
        needed: package -> the option that needs it.
    Raises: ImportError: naming package, option and how to install it.
    """
    for package, option in needed.items():
        if find_spec(package) is None:
            raise ImportError(f"{option} needs {package}: pip install 'scfoundation-hf[train]', or choose otherwise.")
