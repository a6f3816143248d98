"""What happens between the steps of pretraining: new random features for the decoder, and lines on the screen."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from scfoundation_hf.modeling_scfoundation.decoder import ScFoundationLinearAttention
from scfoundation_hf.modeling_scfoundation.linear_attention import draw_orthogonal_projection


def redraw_random_features(model: nn.Module, *, seed: int, step: int) -> None:
    """Draw new random features for each layer of linear attention: a function of (seed, step, layer) alone.

    So every process draws the same, and a resumed run what it would have drawn anyway.
    """
    layers = [module for module in model.modules() if isinstance(module, ScFoundationLinearAttention)]
    for number, layer in enumerate(layers):
        entropy = np.random.SeedSequence((seed, step, number)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(entropy >> 1))  # torch takes 63 bits
        num_features, head_dim = layer.projection.shape
        layer.projection.copy_(draw_orthogonal_projection(num_features, head_dim, generator=generator))


class RandomFeatureRedraw(TrainerCallback):
    """Redraw the decoder's random features every `interval` steps; 0: never.

    At the beginning of a step, so that what is validated and saved are the features that the weights were trained
    with; the last step is followed by no draw.
    """

    def __init__(self, *, interval: int, seed: int) -> None:
        self.interval, self.seed = interval, seed

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Redraw, if it is time."""
        if self.interval and state.global_step and state.global_step % self.interval == 0:
            redraw_random_features(kwargs["model"], seed=self.seed, step=state.global_step)


class _ShortLines(TrainerCallback):
    """Shows what of the log fits on a screen: errors by read depth go to the log alone."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = {key: value for key, value in (logs or {}).items() if "_depth_" not in key and "num_targets" not in key}
        super().on_log(args, state, control, logs=shown, **kwargs)


class ShortProgress(_ShortLines, ProgressCallback):
    """The progress bar of transformers, with short lines."""


class ShortPrinter(_ShortLines, PrinterCallback):
    """The printed lines of transformers, where there is no progress bar, kept short."""
