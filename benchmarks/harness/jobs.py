"""The jobs that are timed: embed, gene embeddings, enhance and a training step, ours and the original's.

A `Case` says what is computed, a `Variant` by whom and how; `build_model` and `make_call` make of both something that
can be called again and again.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.evaluation.flops import (
    NUM_DEPTH_TOKENS,
    Algebra,
    batch_training_flops,
    decoder_flops,
    encoder_flops,
    tokens_per_cell,
    training_step_flops,
)
from scfoundation_hf.inference.cell_job import TOKENS_PER_BATCH
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.data_collator import (
    RawCells,
    ScFoundationReadDepthAwareCollator,
    as_tensors,
    pack_cells,
)
from scfoundation_hf.tokenization.read_depth_aware import ReadDepthAwareRecipe
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

from .cells import CountedCells
from .checkout import CheckoutModel
from .original import OriginalModel, dense_cells, through_sdpa

JobName = Literal["embed", "gene_embeddings", "enhance", "train"]
JOBS: tuple[JobName, ...] = get_args(JobName)
DtypeName = Literal["float32", "bfloat16"]
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)
LEARNING_RATE, MAX_GRADIENT_NORM = 1e-4, 1.0
MAX_CELLS_PER_CALL = 64
DECODED_CELLS_PER_CALL = {"cpu": 2, "cuda": 16}
# Passes over the weights: forward, backward and the gradients; AdamW reads four and writes three numbers a weight.
WEIGHT_PASSES = {"embed": 1, "gene_embeddings": 1, "enhance": 1, "train": 10}


@dataclass(frozen=True)
class Variant:
    """One way of computing a job.

    Attributes:
        name: as tables call it.
        implementation: "ours", the baseline "original", or "checkout", the original's own code.
        dtype: of the matrix products. In training bfloat16 means autocast over float32 weights.
        encoder_path: what the original runs in, made of its model.
        checkout: folder of the original's code.
        checkpointing: in training, compute activations again for the gradients instead of keeping them.
    """

    name: str
    implementation: Literal["ours", "original", "checkout"]
    dtype: DtypeName = "float32"
    encoder_path: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
    checkout: Path | None = None
    checkpointing: bool = False

    def weight_dtype(self, job: JobName) -> torch.dtype:
        """Training keeps float32 weights."""
        return torch.float32 if job == "train" else getattr(torch, self.dtype)

    def model_key(self, job: JobName) -> tuple[str, torch.dtype]:
        """Variants of one key can share a model, and its optimizer."""
        return self.implementation, self.weight_dtype(job)


AS_SHIPPED = Variant("original, as shipped", "original")
WITH_SDPA = Variant("original, with SDPA", "original", encoder_path=through_sdpa)


def variants(
    dtypes: Sequence[DtypeName], *, checkpointing: bool = False, checkout: Path | None = None
) -> list[Variant]:
    """Ours in each dtype, in the last also with checkpointing, then the original as shipped and with SDPA."""
    ours = [Variant(f"ours, {dtype}", "ours", dtype) for dtype in dtypes]
    if checkpointing:
        ours.append(Variant(f"ours, {dtypes[-1]}, checkpointing", "ours", dtypes[-1], checkpointing=True))
    checked_out = [Variant("original's own code, as shipped", "checkout", checkout=checkout)] if checkout else []
    return [*ours, AS_SHIPPED, WITH_SDPA, *checked_out]


@dataclass(frozen=True)
class Case:
    """What is computed.

    Attributes:
        size: name of the configuration.
        config: the model's sizes.
        job: what to do with the cells.
        num_genes: expressed genes a cell, about.
        cells: as many cells as the largest call takes.
        cells_per_call: how many of them one call of ours takes; in training the batch size.
        original_cells_per_call: how many the original goes through, one at a time.
    """

    size: str
    config: ScFoundationConfig
    job: JobName
    num_genes: int
    cells: CountedCells = field(repr=False)
    cells_per_call: int
    original_cells_per_call: int = 1

    def num_cells(self, variant: Variant) -> int:
        """Cells in one call."""
        return self.cells_per_call if variant.implementation == "ours" else self.original_cells_per_call

    def batch(self, num_cells: int) -> dict[str, Any]:
        """The first cells as a packed batch; in training with hidden genes and labels."""
        if self.job != "train":
            return as_tensors(pack_cells(self.cells.encoded.select(range(num_cells))), "pt")
        counts = self.cells.counts[:num_cells]
        raw = RawCells(np.arange(num_cells), counts.indices, counts.data, counts.indptr.astype(np.int64))
        # Without down-sampling, so that a cell keeps the number of genes that the table says.
        recipe = ReadDepthAwareRecipe.from_name("released", down_sampling_probability=0)
        return ScFoundationReadDepthAwareCollator(ScFoundationTokenizer(), recipe=recipe)(raw)


def cells_per_call(job: JobName, *, num_genes: int, device: torch.device, batch_size: int) -> int:
    """As many cells as our own jobs would compute at once."""
    if job == "train":
        return batch_size
    if job == "embed":
        budget = TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"])
        return min(max(budget // (num_genes + NUM_DEPTH_TOKENS), 1), MAX_CELLS_PER_CALL)
    return DECODED_CELLS_PER_CALL.get(device.type, DECODED_CELLS_PER_CALL["cuda"])


# --- What it costs -------------------------------------------------------------------------------------------------


def flops_per_cell(case: Case, *, algebra: Algebra) -> float:
    """Of the cells of one call, mean.

    Args:
        algebra: "plain": every position through every layer, as the original; "reduced": the least that gives the
            same numbers, the floor that shares are quoted of.
    """
    config, batch = case.config, case.batch(case.cells_per_call)
    num_genes = tokens_per_cell(batch) - NUM_DEPTH_TOKENS
    if case.job == "embed":
        return float(np.mean(encoder_flops(config, num_genes)))
    if case.job == "train":
        if algebra == "reduced":
            return batch_training_flops(config, batch) / case.cells_per_call
        plain = training_step_flops(config, num_genes=num_genes, num_masked=0, num_targets=0, algebra="plain")
        return float(np.mean(plain))
    num_zeros = config.num_genes - num_genes if algebra == "reduced" else 0
    return float(np.mean(encoder_flops(config, num_genes) + decoder_flops(config, num_zeros=num_zeros)))


def least_bytes_per_cell(case: Case, *, num_parameters: int, dtype: DtypeName) -> float:
    """What must come from memory at least: the weights once a pass over them, and the results.

    Activations are left out: how much of them stays in caches is the implementation's choice.
    """
    bytes_per_number = 4 if case.job == "train" or dtype == "float32" else 2
    config = case.config
    results = {
        "embed": 4 * config.hidden_size,
        "gene_embeddings": config.num_genes * config.decoder_hidden_size,
        "enhance": config.num_genes,
        "train": 0,
    }[case.job]
    return bytes_per_number * (num_parameters * WEIGHT_PASSES[case.job] / case.cells_per_call + results)


def used_parameters(case: Case) -> int:
    """Weights that the job reads, identity table included."""
    with torch.device("meta"):
        model = ScFoundationForPreTraining(case.config)
    part = model.scfoundation if case.job == "embed" else model
    return sum(parameter.numel() for parameter in part.parameters())


# --- Models and calls ----------------------------------------------------------------------------------------------


def build_model(case: Case, variant: Variant, device: torch.device) -> nn.Module:
    """The model of a variant, with the same random weights for all of them.

    Without dropout on attention weights, as the baseline with SDPA: no form that saves memory takes it on a CPU.
    """
    torch.manual_seed(0)
    config = copy.deepcopy(case.config)
    config.attention_probs_dropout_prob = 0.0
    ours = ScFoundationForPreTraining(config).train(case.job == "train")
    if variant.implementation == "original":
        return OriginalModel(ours).to(device)
    if variant.implementation == "checkout":
        assert variant.checkout is not None
        return CheckoutModel(ours, variant.checkout).to(device)
    ours.scfoundation.add_pooling_layer = case.job == "embed"
    return ours.to(device=device, dtype=variant.weight_dtype(case.job))


def build_optimizer(model: nn.Module, case: Case, variant: Variant) -> torch.optim.Optimizer | None:
    """AdamW with its state in place, for a training step like any but the first; `None` for other jobs."""
    if case.job != "train":
        return None
    fused = variant.implementation == "ours"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=fused)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # moves nothing
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def make_call(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, case: Case, variant: Variant, device: torch.device
) -> Callable[[], Tensor]:
    """The job on its cells as a function, which returns what it computed; in training the loss."""
    batch = case.batch(case.num_cells(variant))
    batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    if variant.implementation == "ours":
        assert isinstance(model, ScFoundationForPreTraining)
        return _our_call(model, optimizer, batch, case, variant)
    assert isinstance(model, OriginalModel | CheckoutModel)
    return _original_call(model, optimizer, batch, case, variant)


def _our_call(
    model: ScFoundationForPreTraining,
    optimizer: torch.optim.Optimizer | None,
    batch: dict[str, Any],
    case: Case,
    variant: Variant,
) -> Callable[[], Tensor]:
    if optimizer is None:
        compute = {
            "embed": lambda: model.scfoundation(**batch).pooler_output,
            "gene_embeddings": lambda: model(**batch, output_gene_embeddings=True).gene_embeddings,
            "enhance": lambda: model(**batch).predicted_values,
        }[case.job]
        return torch.inference_mode()(compute)

    def step() -> Tensor:
        _set_checkpointing(model, variant.checkpointing)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=variant.dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()
        _update(model, optimizer)
        return loss.detach()

    return step


def _original_call(
    model: OriginalModel | CheckoutModel,
    optimizer: torch.optim.Optimizer | None,
    batch: dict[str, Any],
    case: Case,
    variant: Variant,
) -> Callable[[], Tensor]:
    cells = dense_cells(batch, case.config)
    if optimizer is None:
        compute = getattr(model, case.job)

        @torch.inference_mode()
        def run() -> Tensor:
            with variant.encoder_path(model):
                return torch.stack([compute(cell) for cell in cells])

        return run
    num_targets = batch["target_ids"].ne(case.config.pad_token_id).sum(dim=1)
    shares = num_targets / num_targets.sum()

    def step() -> Tensor:
        losses = []
        with variant.encoder_path(model):
            for cell, share in zip(cells, shares, strict=True):
                loss = model.loss(cell) * share
                loss.backward()
                losses.append(loss.detach())
        _update(model, optimizer)
        return torch.stack(losses).sum()

    return step


def _set_checkpointing(model: ScFoundationForPreTraining, is_on: bool) -> None:
    """Variants share a model, so each call says what it wants."""
    verb = "enable" if is_on else "disable"
    # Renamed since transformers 5.17.
    switch = getattr(model, f"activation_checkpointing_{verb}", None) or getattr(
        model, f"gradient_checkpointing_{verb}"
    )
    switch()


def _update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
