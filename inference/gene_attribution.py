"""Which genes drove a call: how much of the called type's logit comes from each expressed gene.

Two methods, both over the value embedding, from "this gene has the value 0" to what was measured; gene identities, T
and S stay as they are. Gradient x input takes one backward pass and is exact where the model is linear in between.
Integrated gradients (Sundararajan et al. 2017, by captum) follow the whole way: their sum over all genes is the
difference of the score between the cell and one whose genes all have the value 0.
"""
# B cells, L tokens of all cells, D width, C cell types

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForCellClassification
from scfoundation_hf.tokenization.data_collator import EncodedCells, as_tensors, pad_cells

from .cell_job import packed_on

AttributionMethod = Literal["gradient_x_input", "integrated_gradients"]
INTEGRATION_STEPS = 32


def attribute_genes(
    model: ScFoundationForCellClassification, cells: EncodedCells, *, method: AttributionMethod
) -> tuple[Tensor, np.ndarray]:
    """What each token adds to the score of its cell's best type.

    The score is the type's logit less the mean of all types' logits, since only differences of logits count.

    Args:
        model: in evaluation.
    Returns: logits `(B, C)` on the model's device; attributions float32 `(L,)`, one for each of `cells.input_ids`, 0 at
        T and S.
    Raises: ValueError: for another method; ImportError: for integrated gradients without captum.
    """
    check_method(method)
    if method == "gradient_x_input":
        return _gradient_x_input(model, cells)
    with torch.inference_mode():
        logits = model(**packed_on(model.device, cells)).logits
    return logits, _integrated_gradients(model, cells, called=logits.argmax(dim=-1).clone())


def check_method(method: AttributionMethod) -> None:
    """Refuse a method that there is not, or whose package is missing.

    Raises: ValueError, ImportError.
    """
    if method not in get_args(AttributionMethod):
        raise ValueError(f"There is no explanation {method!r}; choose {' or '.join(get_args(AttributionMethod))}.")
    if method == "integrated_gradients":
        _layer_integrated_gradients()


def strongest_genes(cells: EncodedCells, attributions: np.ndarray, *, num_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """The genes that spoke most for each cell's call, strongest first.

    Returns: gene ids int64 and attributions float32, each `(B, num_genes)`; -1 and 0 where a cell has fewer genes with
        an attribution above 0.
    """
    genes = np.full((len(cells), num_genes), -1)
    strengths = np.zeros((len(cells), num_genes), dtype=np.float32)
    for cell, (start, stop) in enumerate(zip(cells.offsets[:-1], cells.offsets[1:] - 2, strict=True)):  # but T and S
        order = np.argsort(-attributions[start:stop], kind="stable")[:num_genes]
        order = order[attributions[start:stop][order] > 0]
        genes[cell, : len(order)] = cells.input_ids[start:stop][order]
        strengths[cell, : len(order)] = attributions[start:stop][order]
    return genes, strengths


def _centered(logits: Tensor) -> Tensor:
    return logits - logits.mean(dim=-1, keepdim=True)


def _gradient_x_input(model: ScFoundationForCellClassification, cells: EncodedCells) -> tuple[Tensor, np.ndarray]:
    batch = packed_on(model.device, cells)
    value_embedding = model.scfoundation.embeddings.value_embedding
    with torch.enable_grad(), _as_leaf(value_embedding) as embedded:
        logits = model(**batch).logits
        score = _centered(logits).max(dim=-1).values.sum()  # a cell's score depends on its own tokens only
        (gradient,) = torch.autograd.grad(score, embedded)
    with torch.no_grad():
        difference = embedded[0] - value_embedding(_without_genes(batch["values"], batch["input_ids"], model))
    return logits.detach(), (gradient * difference).sum(dim=-1)[0].float().cpu().numpy()


def _integrated_gradients(
    model: ScFoundationForCellClassification, cells: EncodedCells, *, called: Tensor
) -> np.ndarray:
    padded = as_tensors(pad_cells(cells, pad_token_id=model.config.num_positions), "pt")
    batch = {key: tensor.to(model.device) for key, tensor in padded.items()}  # captum repeats rows, one a cell

    def score(values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return _centered(model(input_ids=input_ids, values=values, attention_mask=attention_mask).logits)

    integrate = _layer_integrated_gradients()(score, model.scfoundation.embeddings.value_embedding)
    attributions = integrate.attribute(
        batch["values"],
        baselines=_without_genes(batch["values"], batch["input_ids"], model),
        target=called,
        additional_forward_args=(batch["input_ids"], batch["attention_mask"]),
        n_steps=INTEGRATION_STEPS,
        internal_batch_size=len(cells),  # one step at a time
    )
    return attributions.sum(dim=-1)[batch["attention_mask"].bool()].float().cpu().numpy()


def _without_genes(values: Tensor, input_ids: Tensor, model: ScFoundationForCellClassification) -> Tensor:
    """The values with 0 for every gene, T and S as they are."""
    return values.masked_fill(input_ids < model.config.num_genes, 0)


@contextmanager
def _as_leaf(module: nn.Module) -> Iterator[list[Tensor]]:
    """Within, what the module gives is cut from what it was made of, and collected, to be differentiated by."""
    given: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        given.append(output.detach().requires_grad_())
        return given[-1]

    handle = module.register_forward_hook(cut)
    try:
        yield given
    finally:
        handle.remove()


def _layer_integrated_gradients() -> Any:
    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError as error:
        raise ImportError("Integrated gradients need captum: pip install captum.") from error
    return LayerIntegratedGradients
