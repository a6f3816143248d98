"""Floating-point operations of the model, from its configuration and what a batch holds: for MFU and cost estimates.

A multiply-add counts as two. Element-wise work (norms, activations, exponentials, softmax) is left out, as is
customary; so is what is computed once a batch instead of once a cell. Every argument that counts something may be an
array, one entry a cell.
"""
# n tokens of a cell, S positions of the decoder, D encoder width, E decoder width, F random features, K bins

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.losses import IGNORED_LABEL

Algebra = Literal["plain", "reduced"]
Count = int | np.ndarray
Flops = float | np.ndarray

NUM_DEPTH_TOKENS = 2  # T and S
BACKWARD_SHARE = 2  # each product of the forward pass has two in the backward pass


def encoder_flops(config: ScFoundationConfig, num_genes: Count) -> Flops:
    """Of embedding and encoding a cell of `num_genes` visible expressed genes."""
    n, D = _exact(num_genes) + NUM_DEPTH_TOKENS, config.hidden_size
    projections = 8 * D * D + 4 * D * config.intermediate_size
    layer = n * (projections + 4 * n * D)
    return n * _value_embedding_flops(config) + config.num_hidden_layers * layer


def decoder_flops(
    config: ScFoundationConfig,
    *,
    num_positions: Count | None = None,
    num_zeros: Count = 0,
    num_targets: Count | None = None,
) -> Flops:
    """Of decoding a cell and predicting `num_targets` genes, or as many as are left out.

    With the last two arguments left at their defaults, this is the plain computation of every position in every
    layer.

    Args:
        num_positions: positions the decoder is shown; default all genes, T and S.
        num_zeros: those of them that hold a zero gene, whose rows up to the first layer's sums over keys are the same
            in every cell and come from a table.
        num_targets: predicted positions, the only ones whose queries, feed-forward and head the last layer computes.
    """
    S = _exact(config.num_positions if num_positions is None else num_positions)
    targets = S if num_targets is None else _exact(num_targets)
    D, E = config.hidden_size, config.decoder_hidden_size
    inner = config.decoder_num_attention_heads * config.decoder_head_dim
    num_heads, F = config.decoder_num_attention_heads, config.decoder_num_random_features
    assert F is not None  # the configuration fills it in
    projection, features = 2 * E * inner, 2 * inner * F  # of one of q, k, v or o; of one of q and k
    summary = 2 * inner * F + num_heads * F  # sums over keys of feature x value, and of features
    readout = 2 * inner * F + 2 * num_heads * F  # their products with a query's features
    feed_forward = 4 * E * config.decoder_intermediate_size

    embedding = _value_embedding_flops(config) + 2 * D * E
    keys = 2 * projection + features + summary
    queries = projection + features
    after_attention = readout + projection + feed_forward
    num_layers = config.decoder_num_hidden_layers
    every_position = S * (embedding + num_layers * (keys + queries + after_attention))
    from_table = _exact(num_zeros) * (embedding + keys + queries)
    not_asked_for = (S - targets) * (queries + after_attention)
    return every_position - from_table - not_asked_for + targets * 2 * E


def training_step_flops(
    config: ScFoundationConfig,
    *,
    num_genes: Count,
    num_masked: Count,
    num_targets: Count,
    num_positions: Count | None = None,
    algebra: Algebra = "reduced",
) -> Flops:
    """Of the forward and backward pass of a cell, without what activation checkpointing computes again.

    Args:
        num_genes: visible expressed genes.
        num_masked: genes hidden behind the mask embedding.
        num_targets: genes whose value is predicted.
        num_positions: positions the decoder is shown; default all.
        algebra: "plain": every position through every layer; "reduced": the same numbers from fewer rows, which is
            what our decoder computes.
    """
    if algebra == "plain":
        decoder = decoder_flops(config, num_positions=num_positions)
    else:
        S = config.num_positions if num_positions is None else num_positions
        num_zeros = S - NUM_DEPTH_TOKENS - num_genes - num_masked
        decoder = decoder_flops(config, num_positions=S, num_zeros=num_zeros, num_targets=num_targets)
    return (1 + BACKWARD_SHARE) * (encoder_flops(config, num_genes) + decoder)


def batch_training_flops(config: ScFoundationConfig, batch: Mapping[str, Any]) -> float:
    """`training_step_flops` of all cells of a batch, padded or packed, by what is in it."""
    counts: dict[str, Any] = {
        "num_genes": tokens_per_cell(batch) - NUM_DEPTH_TOKENS,
        "num_masked": _count(batch["masked_ids"] != config.pad_token_id),
        "num_targets": _count(batch["labels"] != IGNORED_LABEL),
    }
    shown = batch.get("decoder_ids")
    num_positions = None if shown is None else shown.shape[1]
    return float(np.sum(training_step_flops(config, num_positions=num_positions, **counts)))


def tokens_per_cell(batch: Mapping[str, Any]) -> np.ndarray:
    """`(B,)` int64 tokens of each cell of a padded or packed batch, T and S included."""
    if "cu_seq_lens_q" in batch:
        return batch["cu_seq_lens_q"].diff().cpu().numpy().astype(np.int64)
    return _count(batch["attention_mask"] != 0)


def _exact(count: Count) -> Flops:
    """As float64, exact to 2^53: products of int32 lengths, as attention kernels take them, would overflow."""
    return np.asarray(count, dtype=np.float64) if isinstance(count, np.ndarray) else float(count)


def _count(is_real: torch.Tensor) -> np.ndarray:
    return is_real.sum(dim=1).cpu().numpy()


def _value_embedding_flops(config: ScFoundationConfig) -> int:
    K = config.num_bins
    return 2 * (K + K * K + K * config.hidden_size)
