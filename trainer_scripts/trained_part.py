"""A classifier cut where training begins: below, what no step changes and is computed once; above, what is trained.

Numbers are those of `ScFoundationForCellClassification` on packed batches, with dropout off below the first trained
weight. `stored_cells.py` keeps what the lower part gives.
"""
# B cells, L tokens, D encoder width, C cell types

from collections.abc import Iterator
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import SequenceClassifierOutput

from scfoundation_hf.inference.cell_job import batch_borders, packed_on
from scfoundation_hf.modeling_scfoundation.attention import prepare_attention
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import (
    ScFoundationForCellClassification,
    ScFoundationModel,
)
from scfoundation_hf.modeling_scfoundation.pooling import pool_packed_cells
from scfoundation_hf.tokenization.data_collator import EncodedCells
from scfoundation_hf.tokenization.prepared_cells import PreparedCells

from .stored_cells import StoredCells

ACTIVATION_BYTES = {"cpu": 2**30, "cuda": 2**33}  # kept for the backward pass at once


class TrainedPart(nn.Module):
    """What a training run changes of a classifier, and all that lies above; its modules are the classifier's own.

    Batches are those of `StoredCells`: the pooled vectors of the frozen encoder, its states at the first trained layer,
    or tokens. Of more than `tokens_per_batch` tokens the encoder computes a part at a time, and again in the backward
    pass, while the head sees all cells of the batch: memory is bounded, batch norm is not changed.

    Args:
        model: a classifier some of whose parameters are frozen (`freeze`, or adapters).
        tokens_per_batch: `None`: what about 1 GiB of activations holds, 8 GiB on a GPU.
    """

    accepts_loss_kwargs = True  # Trainer gives the number of cells of all accumulated batches

    def __init__(self, model: ScFoundationForCellClassification, *, tokens_per_batch: int | None = None) -> None:
        super().__init__()
        encoder = model.scfoundation
        self.frozen = FrozenPart(encoder)
        self.head = model.classifier
        if not self.frozen.has_embeddings:
            self.embeddings = encoder.embeddings
        if not self.frozen.is_whole_encoder:
            self.layers = encoder.encoder.layers[len(self.frozen.layers) :]
            self.norm = encoder.encoder.norm
        # Not the model itself: as a module of this one, its frozen part would be switched to training and saved.
        self._config, self._select_pools, self._compute_loss = model.config, model.pool, model.compute_loss
        self.tokens_per_batch = tokens_per_batch or self._tokens_that_fit()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.head.parameters()).device

    def forward(
        self, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Tensor
    ) -> SequenceClassifierOutput:
        """Score cells: `logits` `(B, C)`, and with labels the configured `loss`."""
        logits = self.head(self.select_pools(self.pool(**inputs)))
        loss = None
        if labels is not None:
            loss = self._compute_loss(logits, labels, num_items_in_batch=num_items_in_batch)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def select_pools(self, pooled: Tensor) -> Tensor:
        """What the head takes of the encoder's pooled vectors."""
        return self._select_pools(pooled)

    def pool(self, pooled: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, **tokens: Tensor) -> Tensor:
        """The encoder's pooled vectors, `(B, 4 * D)`."""
        if pooled is not None:
            return pooled
        assert cu_seq_lens_q is not None
        lengths = cu_seq_lens_q.diff().cpu().numpy()
        borders = batch_borders(lengths, self.tokens_per_batch)
        parts = []
        for first, last in pairwise(borders.tolist()):
            start, stop = int(cu_seq_lens_q[first]), int(cu_seq_lens_q[last])
            part = {name: rows[:, start:stop] for name, rows in tokens.items()}
            own_lens = cu_seq_lens_q[first : last + 1] - start
            if torch.is_grad_enabled() and len(borders) > 2:
                compute = partial(self._pool_part, own_lens, **part)
                parts.append(checkpoint(compute, use_reentrant=False))
            else:
                parts.append(self._pool_part(own_lens, **part))
        return torch.cat(parts)

    def _pool_part(
        self,
        cu_seq_lens: Tensor,
        states: Tensor | None = None,
        input_ids: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        if states is None:
            assert input_ids is not None
            assert values is not None
            if self.frozen.has_embeddings:
                states = self.frozen.states(input_ids, values, cu_seq_lens)
            else:
                states = self.embeddings(input_ids, values)
        if not self.frozen.is_whole_encoder:
            layout = prepare_attention(self._config, states, None, cu_seq_lens)
            for layer in self.layers:
                states = layer(states, layout)
            states = self.norm(states)
        return pool_packed_cells(states, cu_seq_lens)

    def _tokens_that_fit(self) -> int:
        # Of a layer: inputs and outputs of its projections, norms and residual sums, and those of its feed-forward.
        floats = 12 * self._config.hidden_size + 3 * self._config.intermediate_size
        num_layers = max(self._config.num_hidden_layers - len(self.frozen.layers), 1)
        budget = ACTIVATION_BYTES.get(self.device.type, ACTIVATION_BYTES["cpu"])
        return max(budget // (4 * floats * num_layers), 1)


class FrozenPart:
    """What lies below the first weight that trains; no module, so that its dropout stays off.

    Attributes:
        hidden_size: width of the states.
        has_embeddings: whether the embeddings are frozen; else nothing is.
        layers: the encoder layers up to the first that trains.
        is_whole_encoder: whether only the head trains.
    """

    def __init__(self, encoder: ScFoundationModel) -> None:
        self._encoder, self.hidden_size = encoder.eval(), encoder.config.hidden_size
        layers = encoder.encoder.layers
        self.has_embeddings = not _trains(encoder.embeddings)
        self.layers = list(takewhile(lambda layer: not _trains(layer), layers)) if self.has_embeddings else []
        self.is_whole_encoder = len(self.layers) == len(layers) and not _trains(encoder.encoder.norm)

    @torch.no_grad()
    def states(self, input_ids: Tensor, values: Tensor, cu_seq_lens: Tensor) -> Tensor:
        """Packed tokens to their states `(1, L, D)` behind the frozen layers, and behind the norm if all is frozen."""
        states = self._encoder.embeddings(input_ids, values)
        layout = prepare_attention(self._encoder.config, states, None, cu_seq_lens)
        for layer in self.layers:
            states = layer(states, layout)
        return self._encoder.encoder.norm(states) if self.is_whole_encoder else states


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def state_bytes(part: TrainedPart, cells: PreparedCells, used: np.ndarray) -> int:
    """Bytes of the states of these cells at the first trained layer, in float32; 0 where no layer is frozen."""
    if not part.frozen.layers or part.frozen.is_whole_encoder:
        return 0
    return int(cells.token_lengths[used].sum()) * part.frozen.hidden_size * 4


def store_cells(
    part: TrainedPart,
    cells: PreparedCells,
    used: np.ndarray,
    labels: np.ndarray,
    folder: Path,
    *,
    with_states: bool,
    tokens_per_batch: int,
    progress: Any,
) -> StoredCells:
    """Compute what no step changes of each cell, or else store its tokens.

    Args:
        used: rows of the cells, rising.
        labels: `(len(used),)` their classes.
        with_states: store the states at the first trained layer rather than tokens, where layers are frozen.
        tokens_per_batch: computed at once.
        progress: its `update` is told how many cells are done.
    Returns: cells numbered as in `used`.
    """
    frozen = part.frozen
    stored = StoredCells(folder, labels=labels, lengths=None if frozen.is_whole_encoder else cells.token_lengths[used])
    computes = frozen.is_whole_encoder or (with_states and bool(frozen.layers))

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        for encoded in _batches(cells, used, tokens_per_batch):
            if not computes:
                yield {"input_ids": encoded.input_ids, "values": encoded.values}
            else:
                batch = packed_on(part.device, encoded)
                states = frozen.states(batch["input_ids"], batch["values"], batch["cu_seq_lens_q"])
                if frozen.is_whole_encoder:
                    yield {"pooled": pool_packed_cells(states, batch["cu_seq_lens_q"]).float().cpu().numpy()}
                else:
                    yield {"states": states[0].float().cpu().numpy()}
            progress.update(len(encoded))

    stored.fill(blocks())
    return stored


def _batches(cells: PreparedCells, used: np.ndarray, tokens_per_batch: int) -> Iterator[EncodedCells]:
    for start, stop in cells.chunks():
        encoded = cells.encode(start, stop)
        encoded = encoded.select(np.flatnonzero(np.isin(encoded.cell_index, used)))
        for first, last in pairwise(batch_borders(encoded.lengths, tokens_per_batch).tolist()):
            yield encoded.select(np.arange(first, last))


@torch.inference_mode()
def pooled_and_logits(
    part: TrainedPart, cells: StoredCells, chosen: np.ndarray, *, batch_size: int
) -> tuple[np.ndarray, Tensor]:
    """What the head sees of the chosen cells, `(cells, D)` or `(cells, 4 * D)`, and their logits `(cells, C)`."""
    was_training = part.training
    part.eval()
    pooled, logits = [], []
    for start in range(0, len(chosen), batch_size):
        batch = cells.batch(chosen[start : start + batch_size].tolist())
        del batch["labels"]
        batch = {name: tensor.to(part.device) for name, tensor in batch.items()}
        pooled.append(part.select_pools(part.pool(**batch)))
        logits.append(part.head(pooled[-1]).float().cpu())
    part.train(was_training)
    return torch.cat(pooled).float().cpu().numpy(), torch.cat(logits)
