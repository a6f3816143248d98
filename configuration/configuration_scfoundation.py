"""Sizes and constants of scFoundation, for the tokenizer (how many genes) and every module of the model.

Imports nothing of this package, so that the tokenizer and the model can share it and nothing else.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

PRESETS = ("3m", "10m", "100m")
# What transformers, of one version or another, puts into any config without declaring it as a field.
UNDECLARED_FIELDS = (
    "_commit_hash",
    "attn_implementation",
    "auto_map",
    "quantization_config",
    "tie_word_embeddings",
    "torch_dtype",
)

ClassificationLoss = Literal["cross_entropy", "weighted_cross_entropy", "focal"]

logger = logging.get_logger(__name__)


@strict
class ScFoundationConfig(PreTrainedConfig):
    """Configuration of the scFoundation encoder and decoder; the defaults are the released 100M model.

    `from_preset` gives the named sizes. "100m" is the released checkpoint (119.3 million parameters, 104.5 of
    them outside the gene table); "10m" (9.8) and "3m" (3.0) are ours, as the paper's are unpublished.

    Args:
        num_genes: genes of the vocabulary. Ids `0 .. num_genes - 1` are genes, then come T (target depth), S
            (source depth) and padding.
        hidden_size: width of the encoder, of the gene table and of the value bins.
        num_hidden_layers: encoder layers.
        num_attention_heads: encoder heads; a head is `hidden_size / num_attention_heads` wide.
        intermediate_size: width of the encoder's feed-forward layers.
        hidden_act: activation of the encoder's feed-forward layers.
        hidden_dropout_prob: dropout after the encoder's attention and in its feed-forward layers.
        attention_probs_dropout_prob: dropout on the encoder's attention weights.
        decoder_hidden_size: width of the decoder.
        decoder_num_hidden_layers: decoder layers.
        decoder_num_attention_heads: decoder heads.
        decoder_head_dim: width of a decoder head, independent of the decoder's width.
        decoder_num_random_features: random features of the decoder's linear attention; `None`:
            `int(d * ln d)` for heads of width d, which is 266 for the released model.
        decoder_intermediate_size: width of the decoder's feed-forward layers.
        decoder_hidden_act: activation of the decoder's feed-forward layers.
        num_bins: bins of the value embedding.
        bin_alpha: weight of the residual path in the value embedding's bin scores.
        layer_norm_eps: epsilon of every layer norm.
        initializer_range: standard deviation of freshly drawn projections.
        embedding_initializer_range: standard deviation of the freshly drawn gene table and mask embedding; 1, as
            the original draws all its tables. The value embedding is always drawn at 1.
        pad_token_id: id of padding; always `num_genes + 2`.
        classifier_pooling: what the classification head sees of a cell: "max" over all tokens, as the released
            fine-tuning script, or "all", the four concatenated pools [S, T, max, mean over genes].
        classifier_hidden_size: width of the classification head's hidden layer.
        classification_loss: "cross_entropy", "weighted_cross_entropy" (needs `class_weights`) or "focal".
        class_weights: one weight for each class, in the order of `id2label`; only their ratios count.
        focal_gamma: how much the focal loss takes from cells that are sure and right.

    Raises: ValueError: for sizes that do not fit each other, naming both.
    Source: the config inside the released `models.ckpt`, key by key in
        `modeling_scfoundation/checkpoint_conversion.py`.
    """

    model_type = "scfoundation"

    num_genes: int = 19264
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "relu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 6
    decoder_num_attention_heads: int = 8
    decoder_head_dim: int = 64
    decoder_num_random_features: int | None = None
    decoder_intermediate_size: int = 2048
    decoder_hidden_act: str = "gelu"
    num_bins: int = 100
    bin_alpha: float | int = 1.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    embedding_initializer_range: float = 1.0
    pad_token_id: int | None = None
    classifier_pooling: Literal["all", "max"] = "max"
    classifier_hidden_size: int = 256
    classification_loss: ClassificationLoss = "cross_entropy"
    class_weights: list[float | int] | None = None
    focal_gamma: float | int = 2.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other fields, then check them."""
        if self.decoder_num_random_features is None:
            head_dim = max(self.decoder_head_dim, 1)  # 0 is refused below, in words
            self.decoder_num_random_features = int(head_dim * math.log(head_dim))
        if self.pad_token_id is None:
            self.pad_token_id = self.num_genes + 2
        self.validate_sizes()  # `strict` would too, and again before saving, but wraps the ValueError
        unknown = [name for name in kwargs if not (hasattr(type(self), name) or name in UNDECLARED_FIELDS)]
        if unknown:
            logger.warning_once(
                f"The scFoundation configuration has no field(s) {', '.join(sorted(unknown))}: kept, but used by "
                "nothing. Correct the spelling, or use the version of scfoundation-hf that wrote them."
            )
        super().__post_init__(**kwargs)
        self.validate_classification()  # behind `super`, which counts the labels

    @property
    def target_depth_token_id(self) -> int:
        """Id of T, the log10 total count that is asked for."""
        return self.num_genes

    @property
    def source_depth_token_id(self) -> int:
        """Id of S, the log10 total count that was measured."""
        return self.num_genes + 1

    @property
    def num_positions(self) -> int:
        """Positions the decoder sees: all genes, T and S."""
        return self.num_genes + 2

    @property
    def vocab_size(self) -> int:
        """Rows of the identity table: all genes, T, S and padding."""
        return self.num_genes + 3

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "ScFoundationConfig":
        """The configuration of a named size: "100m" as released, "10m" and "3m" of our own choice.

        Args:
            name: "3m", "10m" or "100m", in any case.
            **overrides: fields to set differently.
        Raises: ValueError: if there is no such preset; FileNotFoundError: where this file was copied without the
            presets, as code on the Hub is.
        Source: 100m: the released checkpoint. The paper names 3, 10 and 100 million parameters (Fig. 2a) but
            its code gives the sizes of the last only, so the two smaller ones are ours.
        """
        if name.lower() not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
        preset = Path(__file__).with_name("presets") / f"{name.lower()}.json"
        if not preset.is_file():
            raise FileNotFoundError(
                f"The preset is not at {preset}. Code loaded from the Hub comes without presets: "
                "install scfoundation-hf."
            )
        return cls(**{**json.loads(preset.read_text(encoding="utf-8")), **overrides})

    def validate_sizes(self) -> None:
        """Refuse sizes that cannot make a model."""
        positive = (
            "num_genes",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "decoder_hidden_size",
            "decoder_num_hidden_layers",
            "decoder_num_attention_heads",
            "decoder_head_dim",
            "decoder_num_random_features",
            "decoder_intermediate_size",
            "num_bins",
            "classifier_hidden_size",
        )
        for field in positive:
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} cannot be split into num_attention_heads "
                f"{self.num_attention_heads} heads of equal width; make one a multiple of the other."
            )
        if self.pad_token_id != self.num_genes + 2:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}, but with num_genes {self.num_genes} padding is always "
                f"{self.num_genes + 2} (genes, then T, S and padding); leave pad_token_id out."
            )
        for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 0 and below 1.")

    def validate_classification(self) -> None:
        """Refuse a classification loss that does not fit its weights, or weights that do not fit the labels."""
        assert self.num_labels is not None  # 2 unless told otherwise
        check_class_weights(self.classification_loss, self.class_weights, num_classes=self.num_labels)
        if not (math.isfinite(self.focal_gamma) and self.focal_gamma >= 0):
            raise ValueError(f"focal_gamma is {self.focal_gamma}; it must be a number of at least 0.")


def check_class_weights(loss: ClassificationLoss, class_weights: Sequence[float] | None, *, num_classes: int) -> None:
    """Refuse class weights that the loss does not take or that do not fit the classes, with a ValueError."""
    if loss not in get_args(ClassificationLoss):
        raise ValueError(
            f"There is no classification loss {loss!r}; choose one of {', '.join(get_args(ClassificationLoss))}."
        )
    if class_weights is None:
        if loss == "weighted_cross_entropy":
            raise ValueError(
                "The loss 'weighted_cross_entropy' needs class_weights, one for each class; compute them from the "
                "classes' cell counts (losses.py), or choose 'cross_entropy'."
            )
        return
    if loss == "cross_entropy":
        raise ValueError(
            "class_weights are given, but the loss 'cross_entropy' uses none; choose 'weighted_cross_entropy' or "
            "'focal', or leave them out."
        )
    if len(class_weights) != num_classes:
        raise ValueError(
            f"There are {len(class_weights)} class_weights for {num_classes} classes (num_labels); give one for each."
        )
    for index, weight in enumerate(class_weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"The weight of class {index} is {weight}; class_weights must be above 0 and finite.")


__all__ = ["PRESETS", "ClassificationLoss", "ScFoundationConfig", "check_class_weights"]
