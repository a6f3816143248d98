"""A gene table to begin with that knows which genes go together, from principal components of training cells.

Drawn at random, the table tells genes apart and nothing else, and a small model spends most of a short training on
learning which of them resemble each other. That much is in the cells' principal components, which take seconds.
"""
# G genes, R rank

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState  # type: ignore[import-untyped]
from accelerate.utils import broadcast  # type: ignore[import-untyped]

from scfoundation_hf.corpus.sampling import sample_cells
from scfoundation_hf.evaluation.principal_components import log1p_matrices, mean_values, principal_components
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.data_collator import RawCells

MAX_CELLS = 6_000
MAX_RANK = 127
PROFILE_STD = 0.2


@torch.no_grad()
def begin_with_principal_components(model: ScFoundationForPreTraining, corpus: str) -> None:
    """Replace the model's freshly drawn gene table by profiles of the genes in the training split of a corpus.

    The first columns, at most 128, take `gene_profiles` of at most 6,000 cells at a standard deviation of 0.2; the
    others stay as they are, and so do the rows of T, S and padding. Of several processes, all of which call this, one
    computes the profiles and sends them to the others.

    Raises: ValueError: if the training split has no more cells than the profiles have components.
    """
    embeddings: Any = model.get_input_embeddings()
    table: torch.Tensor = embeddings.weight
    num_genes = model.config.num_genes
    rank = min(MAX_RANK, model.config.hidden_size - 1)
    state = PartialState()
    profiles = torch.empty(num_genes, 1 + rank, dtype=table.dtype, device=state.device)
    if state.is_main_process:
        cells = _training_cells(corpus, more_than=rank)
        profiles.copy_(torch.from_numpy(gene_profiles(cells, num_genes=num_genes, rank=rank)))
    table[:num_genes, : 1 + rank] = PROFILE_STD * broadcast(profiles).to(table.device)


def _training_cells(corpus: str, *, more_than: int) -> list[RawCells]:
    cells = sample_cells(corpus, MAX_CELLS)
    num_cells = sum(map(len, cells))
    if num_cells <= more_than:
        raise ValueError(
            f"gene_table principal_components takes {more_than} components of more training cells than that, and "
            f"{corpus} has {num_cells:,}; prepare more cells, or leave gene_table at random."
        )
    return cells


def gene_profiles(cells: Sequence[RawCells], *, num_genes: int, rank: int) -> np.ndarray:
    """What is known of each gene from some cells: `(G, 1 + R)` float64, columns of mean 0 and standard deviation 1.

    The first column is the gene's mean log1p(CP10k), the others its loadings on the cells' principal components. A few
    genes have most of both, so each column is standardised, compressed to sign(x) log(1 + |x|), and standardised again.

    Args:
        rank: components, fewer than there are cells.
    """
    means = mean_values(lambda: cells, num_genes)
    loadings, _, _ = principal_components(lambda: log1p_matrices(cells, num_genes), means, rank=rank)
    columns = _standardised(np.column_stack([means, loadings]))
    return _standardised(np.sign(columns) * np.log1p(np.abs(columns)))


def _standardised(columns: np.ndarray) -> np.ndarray:
    return (columns - columns.mean(axis=0)) / columns.std(axis=0)
