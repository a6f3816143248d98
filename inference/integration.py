"""Cells of several batches in one space: embeddings plus Harmony or BBKNN, `scfoundation_hf.integrate`."""
# C cells, D dimensions

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal, get_args

import numpy as np
from anndata import AnnData
from scipy.sparse import csr_matrix

IntegrationMethod = Literal["harmony", "bbknn"]
NEIGHBORS_PER_BATCH = 3  # of BBKNN


def integrate(
    adata: AnnData,
    *,
    batch: str,
    method: IntegrationMethod = "harmony",
    use_rep: str = "X_scfoundation",
    key_added: str | None = None,
    num_components: int = 50,
    seed: int = 0,
) -> AnnData:
    """Bring the batches of embedded cells together.

    The embedding is first taken to its principal components. "harmony" adds the corrected components as
    `obsm[key_added]`, float32 `(cells, num_components)`. "bbknn" joins each cell with its nearest neighbours in every
    batch: a graph where scanpy looks for one, so that `sc.tl.umap(adata, neighbors_key=key_added)` and `sc.tl.leiden`
    take it; there are no coordinates.

    Args:
        adata: holds `obsm[use_rep]`, for instance from `embed`; written in place.
        batch: column of `obs` with the batch (donor, run, technology) of each cell.
        method: "harmony" (needs harmonypy) or "bbknn" (needs bbknn).
        use_rep: the embedding in `obsm`.
        key_added: name of the result; `None`: `use_rep` and the method, such as "X_scfoundation_harmony".
        num_components: principal components kept, at most.
        seed: of the principal components and Harmony.
    Returns: the same AnnData.
    Raises: ImportError: without the package; KeyError: if `obsm` or `obs` has no such entry; ValueError: for an unknown
        method, cells without embedding or batch, or fewer than two batches.
    """
    if method not in get_args(IntegrationMethod):
        raise ValueError(
            f"There is no method {method!r}; choose {' or '.join(map(repr, get_args(IntegrationMethod)))}."
        )
    package = _import_extra("harmonypy" if method == "harmony" else "bbknn.matrix")
    components = _principal_components(_embedding(adata, use_rep), num_components, seed=seed)
    batches = _batches(adata, batch)
    key = f"{use_rep}_{method}" if key_added is None else key_added
    if method == "harmony":
        adata.obsm[key] = _harmony(package, components, batches, seed=seed)
    else:
        distances, connectivities = _bbknn(package.bbknn, components, batches)
        adata.obsp[f"{key}_distances"], adata.obsp[f"{key}_connectivities"] = distances, connectivities
        adata.uns[key] = {
            "distances_key": f"{key}_distances",
            "connectivities_key": f"{key}_connectivities",
            "params": {
                "method": "umap",
                "metric": "euclidean",
                "n_neighbors": NEIGHBORS_PER_BATCH * len(np.unique(batches)),
                "use_rep": use_rep,
            },
        }
    return adata


def _import_extra(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"integrate needs {package}: pip install {package}, or 'scfoundation-hf[mapping]'."
        ) from error


def _embedding(adata: AnnData, use_rep: str) -> np.ndarray:
    if use_rep not in adata.obsm:
        there_is = ", ".join(map(repr, adata.obsm)) or "none"
        raise KeyError(f"There is no obsm[{use_rep!r}] (there is: {there_is}). Make it with scfoundation_hf.embed.")
    embedding = np.asarray(adata.obsm[use_rep], dtype=np.float32)
    is_missing = ~np.isfinite(embedding).all(axis=1)
    if is_missing.any():
        first = adata.obs_names[int(np.argmax(is_missing))]
        raise ValueError(
            f"{is_missing.sum():,} of {len(embedding):,} cells have no embedding in obsm[{use_rep!r}] (the first is "
            f"{first!r}). Leave them out: adata[~np.isnan(adata.obsm[{use_rep!r}]).any(axis=1)].copy()."
        )
    return embedding


def _batches(adata: AnnData, batch: str) -> np.ndarray:
    if batch not in adata.obs:
        raise KeyError(f"There is no obs column {batch!r}. Columns: {', '.join(map(repr, adata.obs)) or 'none'}.")
    is_missing = adata.obs[batch].isna().to_numpy()
    if is_missing.any():
        first = adata.obs_names[int(np.argmax(is_missing))]
        raise ValueError(f"{is_missing.sum():,} cells have no obs[{batch!r}] (the first is {first!r}); leave them out.")
    batches = adata.obs[batch].astype(str).to_numpy()
    if len(np.unique(batches)) < 2:
        raise ValueError(f"All cells have the same obs[{batch!r}], {batches[0]!r}: there is nothing to integrate.")
    return batches


def _principal_components(embedding: np.ndarray, num_components: int, *, seed: int) -> np.ndarray:
    from sklearn.decomposition import PCA  # comes with harmonypy and bbknn

    most = min(num_components, embedding.shape[0] - 1, embedding.shape[1])
    return PCA(most, random_state=seed).fit_transform(embedding)


def _harmony(harmonypy: Any, components: np.ndarray, batches: np.ndarray, *, seed: int) -> np.ndarray:
    import pandas as pd

    found = harmonypy.run_harmony(
        components, pd.DataFrame({"batch": batches}), ["batch"], random_state=seed, verbose=False
    )
    return np.asarray(found.Z_corr, dtype=np.float32)


def _bbknn(bbknn: Callable[..., Any], components: np.ndarray, batches: np.ndarray) -> tuple[csr_matrix, csr_matrix]:
    names, sizes = np.unique(batches, return_counts=True)
    if sizes.min() < NEIGHBORS_PER_BATCH:
        raise ValueError(
            f"Batch {names[sizes.argmin()]!r} has {sizes.min()} cells; BBKNN looks for {NEIGHBORS_PER_BATCH} "
            "neighbours in every batch. Leave the batch out, or join it with another."
        )
    distances, connectivities, _ = bbknn(
        components,
        batches,
        n_pcs=components.shape[1],
        neighbors_within_batch=NEIGHBORS_PER_BATCH,
        computation="cKDTree",
    )
    return csr_matrix(distances), csr_matrix(connectivities)
