"""Each fast path of our model, and how it is switched off: for the ablation table.

A path is off inside its context manager, and the numbers stay the same; tests/benchmarks/test_jobs.py holds both. A
new path needs one entry in `FAST_PATHS`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor, nn

from scfoundation_hf.modeling_scfoundation import decoder as decoder_module
from scfoundation_hf.modeling_scfoundation.decoder import (
    ScFoundationDecoder,
    ScFoundationDecoderLayer,
    ScFoundationLinearAttention,
)
from scfoundation_hf.modeling_scfoundation.dropout import ScFoundationDropout
from scfoundation_hf.modeling_scfoundation.linear_attention import favor_attention
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining

from .jobs import JobName

DECODING: tuple[JobName, ...] = ("gene_embeddings", "enhance", "train")


@dataclass(frozen=True)
class FastPath:
    """One of them.

    Attributes:
        name: what it does.
        jobs: in which it plays a part.
        switched_off: the context in which it does not.
        is_random: the numbers are drawn by it, so they are alike only in distribution.
    """

    name: str
    jobs: tuple[JobName, ...]
    switched_off: Callable[[ScFoundationForPreTraining], AbstractContextManager[Any]]
    is_random: bool = False


@contextmanager
def _eager_attention(model: ScFoundationForPreTraining) -> Iterator[None]:
    backend = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(backend)


def _own_zeros(model: ScFoundationForPreTraining) -> AbstractContextManager[Any]:
    return patch.object(ScFoundationLinearAttention, "summarise_with_zeros", lambda *arguments: None)


def _every_position_to_the_end(model: ScFoundationForPreTraining) -> AbstractContextManager[Any]:
    decode = ScFoundationDecoder.forward

    def decode_everything(
        decoder: ScFoundationDecoder, *arguments: Any, target_ids: Tensor | None = None, **options: Any
    ) -> Tensor:
        decoded = decode(decoder, *arguments, **options)
        if target_ids is None:
            return decoded
        return decoded.gather(1, target_ids[..., None].expand(-1, -1, decoded.shape[-1]))

    return patch.object(ScFoundationDecoder, "forward", decode_everything)


def _whole_layers(model: ScFoundationForPreTraining) -> AbstractContextManager[Any]:
    return patch.object(ScFoundationDecoderLayer, "_runs_in_chunks", lambda layer: False)


@contextmanager
def _whole_feature_maps(model: ScFoundationForPreTraining) -> Iterator[None]:
    def attend(query: Tensor, key: Tensor, value: Tensor, projection: Tensor, **options: Any) -> Tensor:
        return favor_attention(query, key, value, projection)

    # Without gradients layers run in chunks, which have no whole maps.
    with _whole_layers(model), patch.object(decoder_module, "streaming_favor_attention", attend):
        yield


def _whole_feed_forward(model: ScFoundationForPreTraining) -> AbstractContextManager[Any]:
    return patch.object(decoder_module, "CPU_WIDE_BUDGET", 2**62)


def _dropout_of_torch(model: ScFoundationForPreTraining) -> AbstractContextManager[Any]:
    return patch.object(ScFoundationDropout, "forward", nn.Dropout.forward)


FAST_PATHS: tuple[FastPath, ...] = (
    FastPath("attention without its weights (SDPA)", ("embed", *DECODING), _eager_attention),
    FastPath("zero genes computed once (first decoder layer)", DECODING, _own_zeros),
    FastPath("only the targets asked (last decoder layer)", ("train",), _every_position_to_the_end),
    FastPath("feature maps streamed", DECODING, _whole_feature_maps),
    FastPath("decoder layers a few positions at a time (without gradients)", DECODING[:2], _whole_layers),
    FastPath("the decoder's feed-forward in chunks (on a CPU)", ("train",), _whole_feed_forward),
    FastPath("dropout's random numbers four at a time (on a CPU)", ("train",), _dropout_of_torch, is_random=True),
)
