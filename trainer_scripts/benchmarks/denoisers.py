"""Methods that make deeper cells of shallow ones, under one interface: ours, those of others, and trivial ones.

A method sees the shallow counts of all cells of a data set and nothing else. It answers on one of two scales: values
are log1p(counts per 10,000) as they are; shares are each gene's part of a cell's RNA, which `values_of` turns into
log1p(10,000 x share), what an endlessly deep cell would show, or into the mean of what a cell of the target depth
shows.
"""
# C cells, G genes

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from anndata import AnnData
from scipy.sparse import csr_matrix

from scfoundation_hf.evaluation.expected_expression import expected_log1p_cp10k
from scfoundation_hf.inference.enhancement import enhance
from scfoundation_hf.tokenization.read_depth import COUNTS_PER_CELL, log1p_cp10k, row_totals

from .methods import Setup, Weights

Reading = Literal["plain", "at target depth"]
KNN_NEIGHBORS = 15
KNN_COMPONENTS = 10
SCVI_LATENT = 10


@dataclass(frozen=True)
class Denoiser:
    """A method.

    Attributes:
        title: its name in tables and figures.
        scale: what `predict` answers in, "log1p_cp10k" or "shares".
        predict: counts of the shallow cells, with all genes of the data set -> `(C, G)` float32.
        package: what must be installed for it.
        weights: which weights of our network it computes with, if it does.
    """

    title: str
    scale: Literal["log1p_cp10k", "shares"]
    predict: Callable[[AnnData, Setup], np.ndarray]
    package: str | None = None
    weights: Weights | None = None


def plain_values(denoiser: Denoiser, predicted: np.ndarray) -> np.ndarray:
    """Predictions as `(C, G)` log1p(CP10k), of shares those of an endlessly deep cell."""
    return predicted if denoiser.scale == "log1p_cp10k" else np.log1p(predicted * np.float32(COUNTS_PER_CELL))


def values_of(denoiser: Denoiser, predicted: np.ndarray, depths: np.ndarray) -> dict[Reading, np.ndarray]:
    """Predictions as `(C, G)` log1p(CP10k), of shares under both readings.

    Args:
        depths: `(C,)` target depths as total counts.
    """
    readings: dict[Reading, np.ndarray] = {"plain": plain_values(denoiser, predicted)}
    if denoiser.scale == "shares":
        readings["at target depth"] = expected_log1p_cp10k(predicted, depths)
    return readings


def shares_of(counts: csr_matrix) -> np.ndarray:
    """`(C, G)` float32: each gene's part of the cell's counts."""
    return csr_matrix(counts.multiply(1 / row_totals(counts)[:, None]), dtype=np.float32).toarray()


def log1p_values(counts: csr_matrix) -> np.ndarray:
    """`(C, G)` float32 log1p(counts per 10,000)."""
    return log1p_cp10k(counts.astype(np.float32), row_totals(counts)).toarray()


def _keep(cells: AnnData, setup: Setup) -> np.ndarray:
    return log1p_values(cells.X)


def _gene_mean(cells: AnnData, setup: Setup) -> np.ndarray:
    """All cells added up: the same profile for every cell."""
    totals = np.asarray(cells.X.sum(axis=0, dtype=np.float64)).ravel()
    return np.broadcast_to((totals / totals.sum()).astype(np.float32), cells.shape)


def _knn_smoothing(cells: AnnData, setup: Setup) -> np.ndarray:
    """Counts added up over growing neighbourhoods, each found on what the last one smoothed.

    Source: Wagner, Yan and Yanai, K-nearest neighbor smoothing for high-throughput single-cell RNA-Seq data, 2018,
    version 2: distances between 10 principal components of Freeman-Tukey transformed, median-normalised counts.
    """
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    counts = csr_matrix(cells.X, dtype=np.float64)
    num_neighbors = min(KNN_NEIGHBORS, cells.n_obs - 1)
    smoothed, step = counts, 0
    while True:
        step += 1
        neighbors = min(2**step - 1, num_neighbors)
        totals = row_totals(smoothed)
        normalised = smoothed.multiply(np.median(totals) / totals[:, None]).toarray()
        transformed = np.sqrt(normalised) + np.sqrt(normalised + 1)
        components = PCA(min(KNN_COMPONENTS, *transformed.shape), svd_solver="randomized", random_state=setup.seed)
        places = components.fit_transform(transformed)
        nearest = NearestNeighbors(n_neighbors=neighbors + 1).fit(places).kneighbors(places, return_distance=False)
        rows = np.repeat(np.arange(cells.n_obs), neighbors + 1)
        smoothed = csr_matrix((np.ones(len(rows)), (rows, nearest.ravel())), shape=(cells.n_obs,) * 2) @ counts
        if neighbors == num_neighbors:
            return shares_of(smoothed)


def _magic(cells: AnnData, setup: Setup) -> np.ndarray:
    """MAGIC as its authors run it, on square roots of normalised counts; squared again, to counts per 10,000."""
    shares = shares_of(cells.X)
    roots = _diffuse(np.sqrt(shares * COUNTS_PER_CELL), shares, setup)
    return np.log1p(np.maximum(roots, 0) ** 2)


def _magic_on_shares(cells: AnnData, setup: Setup) -> np.ndarray:
    """MAGIC's diffusion, found on square roots as before, of the shares themselves.

    The mean of square roots is far below the root of the mean where most counts are 0; the mean of shares is not.
    """
    shares = shares_of(cells.X)
    return _diffuse(shares, shares, setup)


def _diffuse(values: np.ndarray, shares: np.ndarray, setup: Setup) -> np.ndarray:
    """Values after MAGIC's default number of steps along its graph of the cells."""
    import magic

    with _quiet():
        operator = magic.MAGIC(random_state=setup.seed, verbose=0).fit(np.sqrt(shares * COUNTS_PER_CELL))
    for _ in range(operator.t):
        values = operator.diff_op @ values
    return np.asarray(values, dtype=np.float32)


def _scvi(cells: AnnData, setup: Setup) -> np.ndarray:
    """scVI's denoised expression, the decoded shares, mean of 10 draws of the latent space."""
    model = fit_scvi(cells, setup)
    shares = np.zeros(cells.shape, dtype=np.float32)
    with _quiet():
        shares[:, cells.var_names.isin(model.adata.var_names)] = model.get_normalized_expression(
            n_samples=10, return_numpy=True
        )
    return shares


def fit_scvi(cells: AnnData, setup: Setup, *, batch: str | None = None) -> Any:
    """scVI with its default settings, trained on the cells' counts; genes without any count are left out."""
    models = {} if setup.scvi_models is None else setup.scvi_models
    if batch not in models:
        start = perf_counter()
        models[batch] = (_train_scvi(cells, setup, batch), perf_counter() - start)
    return models[batch][0]


def _train_scvi(cells: AnnData, setup: Setup, batch: str | None) -> Any:
    with _quiet():
        import scvi

        scvi.settings.seed = setup.seed
        counted = cells[:, np.asarray(cells.X.sum(axis=0)).ravel() > 0].copy()
        scvi.model.SCVI.setup_anndata(counted, batch_key=batch)
        model = scvi.model.SCVI(counted, n_latent=SCVI_LATENT)
        model.train(
            max_epochs=setup.scvi_epochs,
            accelerator="cpu" if setup.device == "cpu" else "auto",
            enable_progress_bar=False,
            logger=False,
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what other packages say of themselves and of versions they expect."""
    loggers = [
        logging.getLogger(name) for name in ("scvi", "lightning.pytorch", "lightning.fabric.utilities.seed", "jax")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _ours(cells: AnnData, setup: Setup) -> np.ndarray:
    return _enhance(cells, setup, setup.model)


def _ours_with_random_weights(cells: AnnData, setup: Setup) -> np.ndarray:
    return _enhance(cells, setup, setup.random_weights)


def _enhance(cells: AnnData, setup: Setup, model: Path) -> np.ndarray:
    enhanced = enhance(
        cells,
        model,
        genes=list(cells.var_names),
        depth_fold=setup.depth_fold,
        device=setup.device,
        progress=False,
    )
    assert isinstance(enhanced, AnnData)
    return np.asarray(enhanced.X)


DENOISERS: dict[str, Denoiser] = {
    "down-sampled": Denoiser("down-sampled data", "log1p_cp10k", _keep),
    "gene-mean": Denoiser("gene mean", "shares", _gene_mean),
    "knn-smoothing": Denoiser("kNN smoothing", "shares", _knn_smoothing, package="sklearn"),
    "magic": Denoiser("MAGIC", "log1p_cp10k", _magic, package="magic"),
    "magic-on-shares": Denoiser("MAGIC on shares", "shares", _magic_on_shares, package="magic"),
    "scvi": Denoiser("scVI", "shares", _scvi, package="scvi"),
    "random-weights": Denoiser("random weights", "log1p_cp10k", _ours_with_random_weights, weights="random"),
    "scfoundation": Denoiser("scFoundation", "log1p_cp10k", _ours, weights="trained"),
}
