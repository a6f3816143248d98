"""Which parameters a fine-tuning run trains, by name."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast, get_args

from torch import nn

from .modeling_scfoundation import ScFoundationModel, ScFoundationPreTrainedModel

FreezingMode = Literal["head", "last_n", "penultimate", "full"]
FREEZING_MODES: tuple[FreezingMode, ...] = get_args(FreezingMode)


class ParameterCounts(NamedTuple):
    """How many numbers a model learns, and how many it has."""

    trainable: int
    total: int


def freeze(model: ScFoundationPreTrainedModel, mode: FreezingMode, *, n: int | None = None) -> ParameterCounts:
    """Let a part of the model train, freeze the rest, and count both; whatever was frozen before.

    Frozen is what has `requires_grad=False`; dropout in frozen layers still follows `model.train()`. All that lies
    outside the encoder is the head, and trains in every mode.

    Args:
        model: the encoder with a head, as `ScFoundationForCellClassification`.
        mode: what trains beside the head. "head": nothing. "last_n": the last `n` encoder layers and the norm behind
            them. "penultimate": the last encoder layer but one, `encoder.layers[-2]`, and nothing else of the
            encoder, neither the norm nor the embeddings; the released script's choice. "full": everything.
        n: how many layers, for "last_n" only.
    Raises: ValueError: for an unknown mode, a model without head, an `n` that is missing, not asked for or beyond the
        encoder's layers, or a penultimate layer where there is one layer.
    Source: `model/finetune_model.py` of biomap-research/scFoundation, which sets `requires_grad` for
        `encoder.transformer_encoder[-2]` alone and, with its default `frozenmore=True`, freezes the embeddings too.
    """
    backbone = cast("ScFoundationModel", model.base_model)
    if backbone is model:
        raise ValueError(
            f"{type(model).__name__} is the encoder alone, without a head to train; take a model with one, such as "
            "ScFoundationForCellClassification."
        )
    trained = _trained_modules(backbone, mode, n)
    model.requires_grad_(True)
    backbone.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    return count_parameters(model)


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Count the parameters of a model, and those of them that train."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return ParameterCounts(sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes))


def _trained_modules(backbone: ScFoundationModel, mode: FreezingMode, n: int | None) -> Sequence[nn.Module]:
    layers = backbone.encoder.layers
    if mode not in FREEZING_MODES:
        raise ValueError(f"There is no freezing mode {mode!r}; choose one of {', '.join(FREEZING_MODES)}.")
    if n is not None and mode != "last_n":
        raise ValueError(f"n is {n}, but the freezing mode {mode!r} takes none; leave n out, or choose 'last_n'.")
    if mode == "head":
        return []
    if mode == "full":
        return [backbone]
    if mode == "penultimate":
        if len(layers) < 2:
            raise ValueError(
                "The encoder has 1 layer, so none is the last but one; choose 'last_n' with n=1, 'head' or 'full'."
            )
        return [layers[-2]]
    if n is None or not 1 <= n <= len(layers):
        raise ValueError(f"The freezing mode 'last_n' needs n from 1 to the encoder's {len(layers)} layers; n is {n}.")
    return [*layers[-n:], backbone.encoder.norm]
