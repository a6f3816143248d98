"""From expression or an embedding to clusters, as scanpy's tutorial goes, with as many clusters as there are labels."""
# C cells, G genes

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

NUM_VARIABLE_GENES, NUM_COMPONENTS, NUM_NEIGHBORS = 2000, 50, 15
RESOLUTIONS = (0.001, 20.0)
MAX_STEPS = 30


@dataclass(frozen=True)
class Clusters:
    """A clustering.

    Attributes:
        of_cell: `(C,)` int64.
        resolution: of Leiden, that gave it.
    """

    of_cell: np.ndarray
    resolution: float

    @property
    def number(self) -> int:
        """How many clusters there are."""
        return len(np.unique(self.of_cell))


def variable_genes(values: np.ndarray) -> np.ndarray:
    """`(C, 2000)` values of the most variable genes of `(C, G)` log1p(counts per 10,000)."""
    import scanpy as sc

    values = values[:, values.std(axis=0) > 0]
    if values.shape[1] <= NUM_VARIABLE_GENES:
        return values
    with _scanpy_noise_ignored():
        found = sc.pp.highly_variable_genes(AnnData(values), n_top_genes=NUM_VARIABLE_GENES, inplace=False)
    return values[:, found["highly_variable"].to_numpy()]


def components_of_expression(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Principal components of the most variable genes, `(C, 50)`, from `(C, G)` log1p(counts per 10,000).

    Source: scanpy, "Preprocessing and clustering": 2,000 variable genes, PCA without scaling.
    """
    import scanpy as sc

    chosen = variable_genes(values)
    with _scanpy_noise_ignored():
        return np.asarray(
            sc.pp.pca(chosen, n_comps=min(NUM_COMPONENTS, *(n - 1 for n in chosen.shape)), random_state=seed)
        )


def neighbor_graph(places: np.ndarray, *, seed: int = 0) -> AnnData:
    """Cells with scanpy's graph of 15 neighbours in a space of `(C, dimensions)`."""
    import scanpy as sc

    adata = AnnData(obs=pd.DataFrame(index=[str(cell) for cell in range(len(places))]), obsm={"X": places})
    with _scanpy_noise_ignored():
        sc.pp.neighbors(adata, n_neighbors=min(NUM_NEIGHBORS, len(places) - 1), use_rep="X", random_state=seed)
    return adata


def leiden(graph: AnnData, num_clusters: int, *, seed: int = 0, neighbors_key: str | None = None) -> Clusters:
    """The Leiden clustering whose number of clusters is nearest to `num_clusters`, by bisection of the resolution."""
    import scanpy as sc

    low, high = RESOLUTIONS
    best: Clusters | None = None
    for _ in range(MAX_STEPS):
        resolution = (low * high) ** 0.5
        with _scanpy_noise_ignored():
            sc.tl.leiden(
                graph,
                resolution=resolution,
                random_state=seed,
                neighbors_key=neighbors_key,
                flavor="igraph",
                n_iterations=2,
                directed=False,
            )
        found = Clusters(graph.obs["leiden"].to_numpy().astype(np.int64), resolution)
        if best is None or abs(found.number - num_clusters) < abs(best.number - num_clusters):
            best = found
        if found.number == num_clusters:
            break
        low, high = (resolution, high) if found.number < num_clusters else (low, resolution)
    assert best is not None
    return best


def umap(graph: AnnData, *, seed: int = 0, neighbors_key: str | None = None) -> np.ndarray:
    """UMAP of a graph, `(C, 2)`."""
    import scanpy as sc

    with _scanpy_noise_ignored():
        sc.tl.umap(graph, random_state=seed, neighbors_key=neighbors_key)
    return np.asarray(graph.obsm["X_umap"])


def connectivity_of_labels(connectivities: csr_matrix, labels: np.ndarray) -> float:
    """Share of a label's cells in its largest connected part of the graph, mean over labels.

    Source: "graph connectivity" of scIB (Luecken et al. 2022), on any graph.
    """
    shares = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        _, part = connected_components(connectivities[members][:, members], directed=False)
        shares.append(np.bincount(part).max() / len(members))
    return float(np.mean(shares))


@contextmanager
def _scanpy_noise_ignored() -> Iterator[None]:
    """Without warnings of packages about each other, which nobody here can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=ImportWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*n_jobs value.*overridden.*")
        warnings.filterwarnings("ignore", message="Graph is not fully connected")  # types may lie apart
        yield
