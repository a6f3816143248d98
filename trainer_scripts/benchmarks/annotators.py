"""Ways to call cell types that the annotation benchmark compares: simple ones, other tools, and our models.

All learn from the training cells only, genes chosen and scaled included, and may choose among a few settings by macro
F1 on the validation cells, as fine-tuning chooses when to stop. None sees the labels of test cells.
"""
# C cells, K classes, D features

import contextlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import import_module
from inspect import signature
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Protocol, get_args

import numpy as np
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from transformers.utils.logging import disable_progress_bar

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.evaluation.annotation_scores import annotation_scores
from scfoundation_hf.inference.annotation import annotate
from scfoundation_hf.inference.embedding import embed
from scfoundation_hf.tokenization.read_depth import log1p_cp10k, row_totals
from scfoundation_hf.trainer_scripts.finetune import REPORT_FILE, finetune
from scfoundation_hf.trainer_scripts.finetuning_settings import Freezing
from scfoundation_hf.trainer_scripts.throughput import peak_memory_bytes

from .methods import Weights, save_random_weights

REGULARISATION = (0.001, 0.01, 0.1, 1.0, 10.0)  # scikit-learn's C, of which validation chooses
NUM_NEIGHBORS = (5, 15, 30)
NUM_VARIABLE_GENES, NUM_COMPONENTS = 2_000, 50
FEWER_COMPONENTS = (10, 20)  # for distances: of few cells, the last of 50 components are noise
MAX_SCALED = 10.0  # standard deviations, as scanpy's and CellTypist's own recipes clip
# Epochs of scVI, then scANVI: the fewest, and in a small data set more, up to the most, until the updates are reached.
SCVI_EPOCHS, SCANVI_EPOCHS = (100, 400), (20, 80)  # scVI's own number is 400 below 20,000 cells
SCVI_UPDATES, SCANVI_UPDATES = 1_000, 200
SCVI_BATCH = 128


@dataclass(frozen=True)
class Cells:
    """The cells of one data set, split once for all methods.

    Attributes:
        adata: `X` CSR float32 counts `(C, G)`.
        labels: `(C,)` cell types.
        split: `(C,)` "train", "validation" or "test".
        fingerprint: the same for the same counts and labels.
    """

    adata: AnnData
    labels: np.ndarray
    split: np.ndarray
    fingerprint: str

    def rows(self, *splits: str) -> np.ndarray:
        """`(C,)` whether each cell is of one of these splits."""
        return np.isin(self.split, splits)

    @cached_property
    def values(self) -> csr_matrix:
        """`(C, G)` float32 log1p(counts per 10,000)."""
        return log1p_cp10k(self.adata.X, row_totals(self.adata.X))


@dataclass(frozen=True)
class Cost:
    """What a computation took.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of all threads; says more than the clock where other programs run.
        peak_memory_bytes: the most that the process held, libraries and cells included; None where the system does not
            tell.
    """

    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int | None

    @classmethod
    def since(cls, began: float, cpu_began: float) -> "Cost":
        """From what `perf_counter` and `process_time` said at the start, up to now."""
        return cls(perf_counter() - began, process_time() - cpu_began, peak_memory_bytes(torch.device("cpu")))

    def after(self, first: "Cost") -> "Cost":
        """The cost of both, one after the other."""
        peaks = [peak for peak in (self.peak_memory_bytes, first.peak_memory_bytes) if peak is not None]
        return Cost(self.seconds + first.seconds, self.cpu_seconds + first.cpu_seconds, max(peaks) if peaks else None)


@dataclass(frozen=True)
class Calls:
    """What a method says of the test cells.

    Attributes:
        classes: K names, each with training cells.
        probabilities: `(test cells, K)`; the largest is the call.
        chosen: settings chosen on the validation cells.
        done_before: what was computed for several methods at once, and stored.
    """

    classes: list[str]
    probabilities: np.ndarray
    chosen: Mapping[str, float] = field(default_factory=dict)
    done_before: Cost | None = None

    def predicted(self) -> np.ndarray:
        """`(test cells,)` the most probable class of each."""
        return np.array(self.classes, dtype=object)[self.probabilities.argmax(axis=1)]


class Annotator(Protocol):
    """A method to call cell types."""

    @property
    def title(self) -> str:
        """Its name in tables."""

    @property
    def package(self) -> str | None:
        """What it needs beside our own dependencies; imported before the clock runs."""

    def fit_predict(self, cells: Cells, *, seed: int) -> Calls:
        """Learn from training cells, choose on validation cells, call the test cells."""


# --- What no model is needed for ---


@dataclass(frozen=True)
class MajorityClass:
    """The most frequent type of the training cells, with the shares of all types as probabilities."""

    title: str = "majority class"
    package: str | None = None

    def fit_predict(self, cells: Cells, *, seed: int) -> Calls:
        """See `Annotator.fit_predict`."""
        classes, counts = np.unique(cells.labels[cells.rows("train")], return_counts=True)
        num_test = int(cells.rows("test").sum())
        return Calls(classes.tolist(), np.tile(counts / counts.sum(), (num_test, 1)))


@dataclass(frozen=True)
class GeneRegression:
    """Logistic regression on log1p(counts per 10,000) of all genes."""

    title: str = "logistic regression, all genes"
    package: str | None = None

    def fit_predict(self, cells: Cells, *, seed: int) -> Calls:
        """See `Annotator.fit_predict`."""
        return by_regression(cells.values, cells)


@dataclass(frozen=True)
class PcaRegression:
    """Logistic regression on principal components of variable genes."""

    title: str = "logistic regression, PCA"
    package: str | None = "scanpy"

    def fit_predict(self, cells: Cells, *, seed: int) -> Calls:
        """See `Annotator.fit_predict`."""
        return by_regression(principal_components(cells, seed=seed), cells)


@dataclass(frozen=True)
class PcaNeighbors:
    """Votes of the nearest training cells among principal components of variable genes, 10, 20 or all 50 of them."""

    title: str = "kNN, PCA"
    package: str | None = "scanpy"

    def fit_predict(self, cells: Cells, *, seed: int) -> Calls:
        """See `Annotator.fit_predict`."""
        components = principal_components(cells, seed=seed)
        numbers = [number for number in FEWER_COMPONENTS if number < components.shape[1]] + [components.shape[1]]
        return by_neighbors(components, cells, metric="euclidean", widths=numbers)


def by_regression(features: np.ndarray | csr_matrix, cells: Cells) -> Calls:
    """Calls of multinomial logistic regression on `(C, D)` features, its L2 penalty chosen on the validation cells."""
    train, validation, test = (cells.rows(split) for split in ("train", "validation", "test"))
    best_score, best = -1.0, None
    regression = LogisticRegression(max_iter=1000, warm_start=True)  # each penalty starts from the stronger one before
    for strength in REGULARISATION:
        regression.set_params(C=strength).fit(features[train], cells.labels[train])
        score = _macro_f1(cells.labels[validation], regression.predict(features[validation]))
        if score > best_score:
            probabilities = regression.predict_proba(features[test])
            best_score, best = score, Calls(regression.classes_.tolist(), probabilities, {"C": strength})
    assert best is not None
    return best


def by_neighbors(features: np.ndarray, cells: Cells, *, metric: str, widths: Sequence[int] | None = None) -> Calls:
    """Calls by vote of the nearest training cells in `(C, D)` features.

    How many vote is chosen on the validation cells, and how many of the first features are looked at, if there are
    `widths` to choose from.
    """
    train, validation, test = (cells.rows(split) for split in ("train", "validation", "test"))
    best_score, best = -1.0, None
    for width in widths or [features.shape[1]]:
        near = features[:, :width]
        for num_neighbors in (number for number in NUM_NEIGHBORS if number <= train.sum()):
            voters = KNeighborsClassifier(num_neighbors, metric=metric).fit(near[train], cells.labels[train])
            score = _macro_f1(cells.labels[validation], voters.predict(near[validation]))
            if score > best_score:
                chosen = {"neighbors": num_neighbors} | ({"components": width} if widths else {})
                best_score, best = score, Calls(voters.classes_.tolist(), voters.predict_proba(near[test]), chosen)
    assert best is not None, "types of enough cells for training have more cells than the fewest neighbours"
    return best


def _macro_f1(labels: np.ndarray, calls: np.ndarray) -> float:
    return float(annotation_scores(labels.tolist(), calls.tolist())["macro_f1"])


def principal_components(cells: Cells, *, seed: int) -> np.ndarray:
    """`(C, 50)`: of the 2,000 most variable genes, scaled; genes, scale and components are those of training cells."""
    train = cells.rows("train")
    chosen = cells.values[:, variable_genes(cells)].toarray()
    scaled = np.clip(StandardScaler().fit(chosen[train]).transform(chosen), -MAX_SCALED, MAX_SCALED)
    num_components = min(NUM_COMPONENTS, *(size - 1 for size in scaled[train].shape))
    pca = PCA(num_components, svd_solver="randomized", random_state=seed).fit(scaled[train])
    return pca.transform(scaled)


def variable_genes(cells: Cells) -> np.ndarray:
    """`(G,)` bool: the most variable genes among training cells, as scanpy finds them by default."""
    import scanpy

    training = AnnData(cells.values[cells.rows("train")])
    number = min(NUM_VARIABLE_GENES, training.n_vars)
    found = scanpy.pp.highly_variable_genes(training, n_top_genes=number, inplace=False)
    return found["highly_variable"].to_numpy()


# --- Other tools ---


@dataclass(frozen=True)
class CellTypist:
    """CellTypist's own training with its defaults: one logistic regression a type on all genes, scaled and clipped."""

    title: str = "CellTypist"
    package: str | None = "celltypist"

    def fit_predict(self, cells: Cells, *, seed: int) -> Calls:
        """See `Annotator.fit_predict`."""
        import celltypist

        celltypist.logger.set_level(logging.ERROR)
        values = AnnData(cells.values, obs=cells.adata.obs, var=cells.adata.var)
        train = cells.rows("train")
        with _one_vs_rest():
            model = celltypist.train(values[train].copy(), labels=cells.labels[train])
        table = celltypist.annotate(values[cells.rows("test")].copy(), model=model).probability_matrix
        return Calls([str(name) for name in table.columns], table.to_numpy())


class OneVsRestRegression(LogisticRegression):
    """What `LogisticRegression(multi_class="ovr")` was until scikit-learn 1.8, for a package that still asks for it."""

    def __init__(self, *, C: float, solver: str, max_iter: int, n_jobs: int | None, multi_class: str) -> None:
        super().__init__(C=C, solver=solver, max_iter=max_iter)
        self.n_jobs, self.multi_class = n_jobs, multi_class

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "OneVsRestRegression":
        """One regression a class against all others."""
        one = LogisticRegression(C=self.C, solver=self.solver, max_iter=self.max_iter)
        fitted = OneVsRestClassifier(one, n_jobs=self.n_jobs).fit(X, y)
        self.classes_ = fitted.classes_
        self.coef_ = np.concatenate([each.coef_ for each in fitted.estimators_])
        self.intercept_ = np.concatenate([each.intercept_ for each in fitted.estimators_])
        return self


@contextlib.contextmanager
def _one_vs_rest() -> Iterator[None]:
    """CellTypist 1.7 passes `multi_class`, which scikit-learn 1.8 took out; its default training fails without."""
    training: Any = sys.modules["celltypist.train"]  # the attribute of that name is the function
    theirs = training.LogisticRegression
    if "multi_class" not in signature(theirs).parameters:
        training.LogisticRegression = OneVsRestRegression
    try:
        yield
    finally:
        training.LogisticRegression = theirs


@dataclass(frozen=True)
class ScAnvi:
    """scANVI after scVI on the variable genes' counts, from training cells alone and without a batch key.

    scANVI is mostly trained with the unlabelled query cells and their batches. Here it meets test cells, and with held
    out donors their batches, for the first time when it calls them, as all other methods do.
    """

    title: str = "scANVI"
    package: str | None = "scvi"

    def fit_predict(self, cells: Cells, *, seed: int) -> Calls:
        """See `Annotator.fit_predict`."""
        import scvi

        scvi.settings.seed = seed
        scvi.settings.verbosity = logging.ERROR
        counts = cells.adata[:, variable_genes(cells)].copy()
        counts.obs["cell_type"] = cells.labels
        train = counts[cells.rows("train")].copy()
        # A last batch of one cell cannot pass batch norm.
        batch_size = next(size for size in range(SCVI_BATCH, 1, -1) if train.n_obs % size != 1)
        batches = -(-train.n_obs // batch_size)
        chosen = {
            "scvi_epochs": int(np.clip(-(-SCVI_UPDATES // batches), *SCVI_EPOCHS)),
            "scanvi_epochs": int(np.clip(-(-SCANVI_UPDATES // batches), *SCANVI_EPOCHS)),
        }
        options: dict[str, Any] = {"train_size": 1.0, "batch_size": batch_size, "enable_progress_bar": False}
        scvi.model.SCVI.setup_anndata(train, labels_key="cell_type")
        autoencoder = scvi.model.SCVI(train)
        autoencoder.train(max_epochs=chosen["scvi_epochs"], **options)
        classifier = scvi.model.SCANVI.from_scvi_model(autoencoder, unlabeled_category="unlabelled")
        classifier.train(max_epochs=chosen["scanvi_epochs"], **options)
        test = counts[cells.rows("test")].copy()
        test.obs["cell_type"] = train.obs["cell_type"].iloc[0]  # any type: the label is not looked at
        table = classifier.predict(test, soft=True)
        return Calls([str(name) for name in table.columns], table.to_numpy(), chosen)


# --- Our model ---


@dataclass(frozen=True)
class PretrainedModel:
    """A model of ours, or one of its sizes with random weights, the control.

    Attributes:
        source: folder or Hub id of the pretrained model.
        weights: its own, or new ones drawn by the seed.
        device: `None`: a GPU if there is one.
    """

    source: str
    weights: Weights
    device: str | None

    @contextlib.contextmanager
    def folder(self, seed: int) -> Iterator[str]:
        """Where the model with these weights can be loaded from."""
        if self.weights == "trained":
            yield self.source
            return
        with tempfile.TemporaryDirectory() as temporary:
            yield str(save_random_weights(Path(self.source), Path(temporary) / "random-weights", seed=seed))


@dataclass(frozen=True)
class EmbeddingStore:
    """Embeddings that several methods and seeds share, with what they cost, in files.

    Attributes:
        name: of the model, for the files.
        folder: of the files.
    """

    model: PretrainedModel
    name: str
    folder: Path

    def compute(self, cells: Cells, *, seed: int) -> None:
        """Embed all cells of a data set, unless that was done."""
        path = self._path(cells, seed)
        if path.is_file():
            return
        began, cpu_began = perf_counter(), process_time()
        embedded = cells.adata.copy()
        with self.model.folder(seed) as source:
            embed(embedded, source, device=self.model.device, progress=False)
        cost = Cost.since(began, cpu_began)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, embeddings=embedded.obsm["X_scfoundation"], cost=json.dumps(asdict(cost)))
        temporary.replace(path)

    def read(self, cells: Cells, *, seed: int) -> tuple[np.ndarray, Cost]:
        """`(C, 4 * hidden_size)` float32 embeddings that were computed, and what that cost."""
        with np.load(self._path(cells, seed)) as stored:
            return stored["embeddings"], Cost(**json.loads(str(stored["cost"])))

    def _path(self, cells: Cells, seed: int) -> Path:
        weights = f"random-{seed}" if self.model.weights == "random" else "pretrained"
        return self.folder / f"{cells.fingerprint}-{self.name}-{weights}.npz"


def regress_on_embeddings(embeddings: np.ndarray, cells: Cells) -> Calls:
    """`by_regression` on embeddings, each number scaled by the training cells."""
    return by_regression(StandardScaler().fit(embeddings[cells.rows("train")]).transform(embeddings), cells)


def vote_by_embeddings(embeddings: np.ndarray, cells: Cells) -> Calls:
    """`by_neighbors` by the cosine of embeddings."""
    return by_neighbors(embeddings, cells, metric="cosine")


@dataclass(frozen=True)
class FrozenEmbeddings:
    """A simple classifier on the embeddings of the model as it is; `store` has them before `fit_predict` is called."""

    title: str
    store: EmbeddingStore
    classify: Callable[[np.ndarray, Cells], Calls]
    package: str | None = None

    @property
    def weights(self) -> Weights:
        """Of the model behind the embeddings."""
        return self.store.model.weights

    def fit_predict(self, cells: Cells, *, seed: int) -> Calls:
        """See `Annotator.fit_predict`."""
        embeddings, cost = self.store.read(cells, seed=seed)
        return replace(self.classify(embeddings, cells), done_before=cost)


@dataclass(frozen=True)
class FineTuned:
    """`finetune` on training and validation cells, then `annotate` on the test cells.

    Attributes:
        freezing, max_steps: as in `finetune`; all else is its default.
    """

    title: str
    model: PretrainedModel
    freezing: Freezing | None = None
    max_steps: int | None = None
    package: str | None = None

    @property
    def weights(self) -> Weights:
        """That fine-tuning starts from."""
        return self.model.weights

    def fit_predict(self, cells: Cells, *, seed: int) -> Calls:
        """See `Annotator.fit_predict`."""
        known, test = (cells.adata[cells.rows(*splits)].copy() for splits in (("train", "validation"), ("test",)))
        known.obs["cell_type"] = cells.labels[cells.rows("train", "validation")]
        known.obs["split"] = cells.split[cells.rows("train", "validation")]
        with tempfile.TemporaryDirectory() as temporary:
            folder = finetune(
                known,
                Path(temporary) / "model",
                label="cell_type",
                model=self.model.source,
                split_column="split",
                rare_classes="keep",  # the benchmark has left out what is too rare, for all methods alike
                freezing=self.freezing,
                max_steps=self.max_steps,
                random_weights=self.weights == "random",
                seed=seed,
                device=self.model.device,
                progress=False,
                report=False,
                report_to="none",
            )
            record = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
            annotate(test, folder, unassigned=False, device=self.model.device, progress=False)
            names: Any = ScFoundationConfig.from_pretrained(folder).id2label
        # The table's own column names have "/" replaced.
        probabilities = test.obsm["scfoundation_probabilities"].to_numpy()
        return Calls([names[number] for number in range(len(names))], probabilities, {"step": record["best_step"]})


# --- What there is, and what it costs ---


METHODS: dict[str, Annotator] = {
    "majority": MajorityClass(),
    "pca-regression": PcaRegression(),
    "gene-regression": GeneRegression(),
    "pca-neighbors": PcaNeighbors(),
    "celltypist": CellTypist(),
    "scanvi": ScAnvi(),
}
MODEL_METHODS = {
    "frozen-regression": "frozen + logistic regression",
    "frozen-neighbors": "frozen + kNN",
    "finetuned": "fine-tuned",
}


def model_annotators(
    name: str,
    source: str,
    *,
    methods: Sequence[str],
    folder: Path,
    freezing: Freezing | None = None,
    max_steps: int | None = None,
    device: str | None = None,
) -> dict[str, FrozenEmbeddings | FineTuned]:
    """What is done with a model of ours, and with random weights of its sizes, by keys that name the model.

    Args:
        methods: of `MODEL_METHODS`.
        folder: for embeddings.
        freezing, max_steps: of fine-tuning.
    """
    annotators: dict[str, FrozenEmbeddings | FineTuned] = {}
    for method in methods:
        for weights in get_args(Weights):
            model = PretrainedModel(source, weights, device)
            is_random = weights == "random"
            title = f"{name}{', random weights' * is_random}: {MODEL_METHODS[method]}"
            key = f"{name}-{'random-' * is_random}{method}"
            if method == "finetuned":
                annotators[key] = FineTuned(title, model, freezing, max_steps)
            else:
                classify = regress_on_embeddings if method == "frozen-regression" else vote_by_embeddings
                annotators[key] = FrozenEmbeddings(title, EmbeddingStore(model, name, folder), classify)
    return annotators


def quieten() -> None:
    """No progress bars and notes of libraries."""
    disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def measure(annotator: Annotator, cells: Cells, *, seed: int) -> dict[str, Any]:
    """Scores of a method on the test cells, and what it cost; JSON-able.

    Test cells of a type without training cells are not scored: no method here can call them. Warnings are kept, not
    shown: there are hundreds of runs.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if annotator.package is not None:
            import_module(annotator.package)
        began, cpu_began = perf_counter(), process_time()
        calls = annotator.fit_predict(cells, seed=seed)
        cost = Cost.since(began, cpu_began)
    if calls.done_before is not None:
        cost = cost.after(calls.done_before)
    labels = cells.labels[cells.rows("test")]
    is_scored = np.isin(labels, np.unique(cells.labels[cells.rows("train")]))
    scores = annotation_scores(
        labels[is_scored].tolist(),
        calls.predicted()[is_scored].tolist(),
        calls.probabilities[is_scored],
        classes=calls.classes,
    )
    return {
        **scores,
        **asdict(cost),
        "chosen": dict(calls.chosen),
        "num_cells": {split: int(cells.rows(split).sum()) for split in ("train", "validation", "test")},
        "num_not_scored": int((~is_scored).sum()),
        "warnings": sorted({f"{each.category.__name__}: {each.message}" for each in caught}),
    }
