"""From token states to one vector a cell."""
# B cells, N tokens, D width

from typing import Literal

import torch
from torch import Tensor

PoolingMode = Literal["all", "max"]


def pool_cells(hidden_states: Tensor, attention_mask: Tensor, *, mode: PoolingMode = "all") -> Tensor:
    """Summarise each cell of a padded batch by its two depth tokens and the max and mean over its genes.

    Args:
        hidden_states: `(B, N, D)` encoder output; T and S sit at the last two *unpadded* positions.
        attention_mask: `(B, N)`, 1 for real tokens.
        mode: "all" concatenates [S, T, max over genes, mean over genes]; "max" is the max over all tokens.
    Returns: `(B, 4 * D)` for "all", `(B, D)` for "max".
    Raises: ValueError: if a cell has no expressed gene, naming its row.
    Source: `model/get_embedding.py` of biomap-research/scFoundation, which pools one cell at a time and so
        never meets padding.
    """
    real = attention_mask.bool()
    rank_from_end = real.flip(1).cumsum(1).flip(1)  # 1 for the last real token, 2 for the one before
    is_gene = real & (rank_from_end > 2)
    _check_every_cell_has_genes(is_gene.sum(dim=1))
    rows = torch.arange(real.shape[0], device=real.device)  # not len(): it would fix the number of cells in an export
    source_depth = hidden_states[rows, (real & (rank_from_end == 1)).int().argmax(dim=1)]
    target_depth = hidden_states[rows, (real & (rank_from_end == 2)).int().argmax(dim=1)]
    gene_max = hidden_states.masked_fill(~is_gene[..., None], -torch.inf).amax(dim=1)
    gene_sum = hidden_states.masked_fill(~is_gene[..., None], 0).sum(dim=1, dtype=torch.float32)
    gene_mean = (gene_sum / is_gene.sum(dim=1, keepdim=True)).to(hidden_states.dtype)
    return _combine(source_depth, target_depth, gene_max, gene_mean, mode)


def pool_packed_cells(hidden_states: Tensor, cu_seq_lens: Tensor, *, mode: PoolingMode = "all") -> Tensor:
    """`pool_cells` for a packed batch.

    Args:
        hidden_states: `(1, L, D)` encoder output of all cells in a row.
        cu_seq_lens: `(B + 1,)` borders of the cells.
    Returns and raises: as `pool_cells`.
    """
    tokens = hidden_states[0]
    borders = cu_seq_lens.long()
    num_genes = borders.diff() - 2
    _check_every_cell_has_genes(num_genes)
    # Lengths of genes and depth tokens in turn: segment 2 i holds the genes of cell i, segment 2 i + 1 its T
    # and S.
    lengths = torch.stack([num_genes, torch.full_like(num_genes, 2)], dim=1).flatten()
    gene_max = torch.segment_reduce(tokens.float(), "max", lengths=lengths, axis=0)[::2].to(tokens.dtype)
    gene_mean = torch.segment_reduce(tokens.float(), "mean", lengths=lengths, axis=0)[::2].to(tokens.dtype)
    return _combine(tokens[borders[1:] - 1], tokens[borders[1:] - 2], gene_max, gene_mean, mode)


def max_of_pooled(pooled: Tensor) -> Tensor:
    """The max over all tokens, `(B, D)`, from what `mode="all"` gave, `(B, 4 * D)`."""
    source_depth, target_depth, gene_max, _ = pooled.chunk(4, dim=-1)
    return torch.maximum(torch.maximum(source_depth, target_depth), gene_max)


def _combine(
    source_depth: Tensor, target_depth: Tensor, gene_max: Tensor, gene_mean: Tensor, mode: PoolingMode
) -> Tensor:
    pooled = torch.cat([source_depth, target_depth, gene_max, gene_mean], dim=-1)
    if mode == "all":
        return pooled
    if mode == "max":
        return max_of_pooled(pooled)
    raise ValueError(f"There is no pooling mode {mode!r}; choose 'all' or 'max'.")


def _check_every_cell_has_genes(num_genes: Tensor) -> None:
    if torch.compiler.is_compiling():
        return  # asking would split the graph; the tokenizer has refused such cells already
    if bool((num_genes < 1).any()):
        row = int((num_genes < 1).nonzero()[0])
        raise ValueError(
            f"Cell {row} of the batch has no expressed gene (its tokens are T and S at most), so there is "
            "nothing to pool; leave such cells out (the tokenizer does so with on_empty_cell='nan')."
        )
