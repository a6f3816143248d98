"""Real cells of about a given number of expressed genes, as the jobs take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata
import numpy as np
from scipy.sparse import csr_matrix, vstack

from scfoundation_hf.tokenization.data_collator import EncodedCells
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED_CELLS = REPOSITORY / "examples" / "data" / "zheng_facs_pbmc_cut.h5ad"
MAX_LENGTH_ERROR = 0.1


@dataclass(frozen=True)
class CountedCells:
    """Raw counts of real cells over the vocabulary's genes, of all files together.

    Attributes:
        counts: `(cells, genes)` CSR.
        files: names of the files they come from.
    """

    counts: csr_matrix
    files: tuple[str, ...]

    @property
    def num_expressed(self) -> np.ndarray:
        """`(cells,)` expressed genes of each cell."""
        return np.diff(self.counts.indptr)

    def near(self, num_genes: int, *, num_cells: int) -> "CountedCells":
        """The cells nearest to `num_genes` expressed genes, nearest first; repeated in turn where there are too few.

        Raises: ValueError: if not even one is within 10 %.
        """
        distance = np.abs(self.num_expressed - num_genes)
        order = np.argsort(distance, kind="stable")[:num_cells]
        order = order[distance[order] <= MAX_LENGTH_ERROR * num_genes]
        if not len(order):
            nearest = self.num_expressed[np.argmin(distance)]
            raise ValueError(
                f"No cell in {', '.join(self.files)} has about {num_genes:,} expressed genes; the nearest has "
                f"{nearest:,}. Pass files with such cells (--data), or leave {num_genes} out of --genes."
            )
        return CountedCells(self.counts[np.resize(order, num_cells)], self.files)

    def mixed(self, num_cells: int, *, seed: int = 0) -> "CountedCells":
        """Cells drawn at random from all files, short and long."""
        rows = np.random.default_rng(seed).choice(self.counts.shape[0], num_cells)
        return CountedCells(self.counts[rows], self.files)

    def as_anndata(self) -> anndata.AnnData:
        """As a user's file holds them."""
        adata = anndata.AnnData(self.counts)
        adata.var_names = list(GeneVocabulary.default().symbols)
        return adata

    @cached_property
    def encoded(self) -> EncodedCells:
        """Tokens, with T = S."""
        prepared = ScFoundationTokenizer().prepare(self.as_anndata())
        return prepared.encode(0, self.counts.shape[0])


def read_cells(paths: Sequence[Path], *, max_cells_per_file: int = 2_000) -> CountedCells:
    """Cells of these .h5ad files of raw counts, aligned to the vocabulary; a folder stands for the files in it.

    Args:
        max_cells_per_file: evenly spaced cells are taken from larger files.
    Raises: FileNotFoundError: naming what is not there, or a folder without .h5ad files.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.h5ad")) if path.is_dir() else [path]
        if not found or not all(file.is_file() for file in found):
            raise FileNotFoundError(
                f"{path} is no .h5ad file and no folder with .h5ad files; pass real cells (--data)."
            )
        files += found
    vocabulary = GeneVocabulary.default()
    parts, names = [], []
    for file in files:
        adata = anndata.read_h5ad(file)
        rows = np.linspace(0, adata.n_obs - 1, min(adata.n_obs, max_cells_per_file)).astype(int)
        mapping = vocabulary.map_genes(adata.var_names)
        if mapping.num_matched_genes < len(vocabulary) / 4:
            continue  # saved with variable genes only: not what these jobs are timed on
        parts.append(mapping.apply(csr_matrix(adata.X[rows])).astype(np.float32))
        names.append(file.name)
    if not parts:
        raise ValueError(
            f"None of {', '.join(map(str, files))} holds a quarter of the vocabulary's genes; pass files with all "
            "genes (--data)."
        )
    return CountedCells(csr_matrix(vstack(parts)), tuple(names))
