"""Context-dependent vectors of chosen genes in each cell: `scfoundation_hf.gene_embeddings`."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData

from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.data_collator import EncodedCells
from scfoundation_hf.tokenization.prepared_cells import OnEmptyCell, OriginalMode, Values

from .cell_job import CellJob, check_at_least_one, check_data, packed_on
from .enhancement import default_cells_per_batch, find_genes
from .loading import ModelSource, evaluating, load_with_decoder
from .many_processes import ALONE, Processes
from .writer import check_output


def gene_embeddings(
    data: AnnData | str | PathLike[str],
    model: ModelSource,
    *,
    genes: Sequence[str],
    output: str | PathLike[str] | None = None,
    key_added: str = "X_scfoundation_genes",
    layer: str | None = None,
    gene_column: str | None = None,
    values: Values = "counts",
    total_counts: np.ndarray | str | None = None,
    target_depth: float | None = None,
    depth_fold: float | None = None,
    min_genes: int | None = None,
    on_empty_cell: OnEmptyCell = "error",
    original_mode: OriginalMode | None = None,
    cells_per_batch: int | None = None,
    tokens_per_batch: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> AnnData | Path:
    """Embed chosen genes in the context of every cell, whether the cell expresses them or not.

    Adds `obsm[key_added]`, float32 `(cells, genes, decoder_hidden_size)` (512 for the 100M model), the genes in the
    order given; `obs[key_added + "_counts_kept"]` and `uns["scfoundation"][key_added]` as `embed` does, the latter with
    the genes' symbols under `settings`, `genes`. `adata.obsm[key_added][:, 0]` is the first gene in all cells.

    Args:
        genes: symbols or Ensembl ids. A result takes 2 KB a cell and gene (100M model).
        cells_per_batch, tokens_per_batch: bound what is computed at once. `None`: by device. The decoder computes
            19,264 vectors a cell, whichever genes are chosen.
        data, model, output, key_added, layer, gene_column, values, total_counts, target_depth, depth_fold,
            min_genes, on_empty_cell, original_mode, device, dtype, overwrite, progress: as in `embed`; the model needs
            its decoder.
    Returns: the same AnnData, or the written path, a copy of the input with the results added.
    Raises: ValueError: for input that cannot be right, saying which cell, gene or column and what to do; OSError: for
        files that are missing, broken or in the way.
    Source: `model/get_embedding.py` of the original, output_type "gene".
    """
    source, target = check_data(data, output, verb="gene_embeddings")
    processes = ALONE if source is None else Processes.from_environment()
    with processes.speaking_once():
        if source is not None and target is not None and source.exists():  # the reader words a missing one better
            check_output(source, target, overwrite=overwrite)
        check_at_least_one(cells_per_batch=cells_per_batch, tokens_per_batch=tokens_per_batch)
        loaded = load_with_decoder(model, device=device, dtype=dtype, processes=processes)
        vocabulary = loaded.tokenizer.vocabulary
        gene_ids = find_genes(vocabulary, genes)
        prepared = loaded.tokenizer.prepare(
            data,
            layer=layer,
            gene_column=gene_column,
            values=values,
            total_counts=total_counts,
            target_depth=target_depth,
            depth_fold=depth_fold,
            min_genes=min_genes,
            on_empty_cell=on_empty_cell,
            original_mode=original_mode,
        )
        with prepared, evaluating(loaded.model):
            job = CellJob(
                loaded,
                prepared,
                compute=lambda cells: _embed_genes(loaded.model, cells, gene_ids),
                row_shape=(len(gene_ids), loaded.model.config.decoder_hidden_size),
                dtype=np.dtype(np.float32),
                settings={"genes": [vocabulary.symbols[gene] for gene in gene_ids]},
                tokens_per_batch=tokens_per_batch,
                cells_per_batch=cells_per_batch or default_cells_per_batch(loaded.model.device),
                verb="Embedding genes",
                past="embedded",
                show_progress=progress,
                processes=processes,
            )
            return job.add_to(data, key_added=key_added, source=source, target=target, overwrite=overwrite)


@torch.inference_mode()
def _embed_genes(model: ScFoundationForPreTraining, cells: EncodedCells, gene_ids: np.ndarray) -> np.ndarray:
    """Gene vectors, float32 `(cells, genes, E)`."""
    vectors = model(**packed_on(model.device, cells), output_gene_embeddings=True).gene_embeddings
    return vectors[:, torch.from_numpy(gene_ids).to(model.device)].float().cpu().numpy()
