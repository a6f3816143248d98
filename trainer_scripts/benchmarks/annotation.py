"""Our models against simple baselines and other tools at calling cell types. Also `scfoundation benchmark annotation`.

One harness: all methods get the same cells in the same splits, and are scored by the same function. Every (data set,
method, seed) runs in a process of its own, whose memory is measured, and is a file as soon as it is done.
"""

import argparse
import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_all_start_methods, get_context
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm.auto import tqdm

from scfoundation_hf.corpus.lookup import lookup
from scfoundation_hf.corpus.worker_processes import end_with_parent
from scfoundation_hf.inference.loading import load_encoder
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.read_depth import row_totals
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer
from scfoundation_hf.trainer_scripts.cell_splits import SHARES, split_cells
from scfoundation_hf.trainer_scripts.finetuning_settings import Freezing

from .annotation_report import annotation_tables, draw_annotation
from .annotators import (
    METHODS,
    MODEL_METHODS,
    Annotator,
    Cells,
    FineTuned,
    FrozenEmbeddings,
    measure,
    model_annotators,
    quieten,
)
from .cell_sets import CellFile, CellSet, read_cells, read_recipe
from .methods import check_packages, describe_model, what_weights_are
from .stored_parts import Remeasure, StoredParts

ALL_METHODS = (*METHODS, *MODEL_METHODS)
SETTINGS = ("methods", "seeds", "max_cells", "min_cells_per_type", "exclude_labels", "freezing", "max_steps")
FREEZING: tuple[Freezing, ...] = ("head", "penultimate", "lora", "full")
MEASURES = ("macro_f1", "weighted_f1", "accuracy", "balanced_accuracy", "expected_calibration_error")
COSTS = ("seconds", "cpu_seconds", "peak_memory_bytes")
DRAWS_PER_SPLIT = 20  # among which one with other test cells is looked for
REFERENCE = "pca-regression"  # what fine-tuning must not fall behind
PACKAGES = ("scfoundation-hf", "scikit-learn", "scanpy", "celltypist", "scvi-tools", "torch")


def benchmark_annotation(
    data: Mapping[str, CellFile],
    models: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    *,
    methods: Sequence[str] = ALL_METHODS,
    seeds: int = 3,
    max_cells: int | None = None,
    min_cells_per_type: int = 10,
    exclude_labels: Sequence[str] = (),
    freezing: Freezing | None = None,
    max_steps: int | None = None,
    device: str | None = None,
    remeasure: Remeasure = "nothing",
    progress: bool = True,
) -> Path:
    """Measure how well types of held-out cells are called.

    A seed draws the split (8:1:1, by whole groups where a data set has a `batch` column, with other test cells each
    time as long as there are any) and everything random in a method. Called again with the same output, it goes on with
    what is missing; data sets, models, methods and seeds may be added.

    Args:
        data: data sets by name; each has a `label`.
        models: folders or Hub ids of pretrained models, named by the last part. Each is also run with random weights.
        output: folder to make: `results.json`, `tables.md`, `annotation.svg` and `.png`, and all single results in
            `parts/`.
        methods: of `METHODS` and `MODEL_METHODS`.
        seeds: how many; the results are means over them, with the standard deviation.
        max_cells: of each data set, an even draw; default all.
        min_cells_per_type: cells of rarer types are left out.
        exclude_labels: labels that are no types, such as "unlabelled"; their cells are left out.
        freezing, max_steps: of fine-tuning, as in `finetune`.
        device: of our models; `None`: a GPU if there is one.
        remeasure: of what `output` has: nothing, what was measured with another model, or everything.
        progress: show a progress bar.
    Returns: `output`.
    Raises: ValueError: for unknown methods, a data set without label, batches or types to tell apart, or results in
        `output` of other settings; ImportError: for a method whose package is missing; RuntimeError: at the end, if
        some methods failed, with each of them and why; FileExistsError, FileNotFoundError, KeyError: as the names say.
    """
    _check(data, methods, seeds, freezing)
    names = _names_of(models)
    about_models = {name: describe_model(load_encoder(source, device="cpu")) for name, source in names.items()}
    vocabulary = _common_vocabulary(names)
    parts = StoredParts(Path(output), depends_on={}, remeasure=remeasure)
    choice: dict[str, Any] = {
        "max_cells": max_cells,
        "min_cells_per_type": min_cells_per_type,
        "exclude_labels": list(exclude_labels),
    }
    sets = {name: _read(name, file, vocabulary, **choice) for name, file in data.items()}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        annotators: dict[str, Annotator] = {key: METHODS[key] for key in methods if key in METHODS}
        model_of: dict[str, str] = {}
        weights_of: dict[str, dict[str, str]] = {}
        for name, source in names.items():
            chosen = [method for method in methods if method in MODEL_METHODS]
            ours = model_annotators(
                name,
                source,
                methods=chosen,
                folder=Path(temporary),
                freezing=freezing,
                max_steps=max_steps,
                device=device,
            )
            annotators |= ours
            model_of |= dict.fromkeys(ours, name)
            weights_of |= {key: what_weights_are(each.weights, about_models[name]) for key, each in ours.items()}
        found: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in sets}
        with tqdm(total=len(sets) * seeds * len(annotators), unit=" parts", disable=not progress) as bar:
            for name, cells in sets.items():
                for seed, split in enumerate(draw_splits(cells, seeds)):
                    split_id = _sha256(split.split.tolist())
                    for key, annotator in annotators.items():
                        bar.set_description(f"{name}, {key}")
                        depends_on: dict[str, Any] = {"cells": split.fingerprint, "split": split_id}
                        depends_on |= weights_of.get(key, {})
                        if isinstance(annotator, FineTuned):
                            depends_on |= {"freezing": freezing, "max_steps": max_steps}
                        try:
                            part = parts.get(
                                {"data": name, "method": key, "seed": seed},
                                partial(_measure, annotator, split, seed),
                                depends_on=depends_on,
                            )
                            found[name].setdefault(key, []).append(part)
                        except MethodError as error:
                            failures[f"{name}, {key}, seed {seed}"] = str(error)
                        bar.update()
    if failures:
        listed = "\n".join(f"  {place}: {why}" for place, why in failures.items())
        raise RuntimeError(
            f"{len(failures)} results are missing, the others are in {parts.folder}. Run the same command again once "
            f"this is mended, or leave the method out:\n{listed}"
        )
    results = {
        "settings": {
            "seeds": seeds,
            "shares": list(SHARES),
            **choice,
            "freezing": freezing,
            "max_steps": max_steps,
        },
        "environment": _environment(),
        "models": about_models,
        "methods": {key: {"title": each.title, "model": model_of.get(key)} for key, each in annotators.items()},
        "data": {
            name: describe_set(cells, data[name], names) | summarise(found[name], models=list(names))
            for name, cells in sets.items()
        },
    }
    parts.write_results(results, annotation_tables(results))
    draw_annotation(results, parts.folder / "annotation")
    return parts.folder


class MethodError(RuntimeError):
    """A method ended with an error, or its process was ended."""


def draw_splits(cells: CellSet, number: int) -> list[Cells]:
    """The cells with their splits, by whole batches where the set has them.

    Of few batches, independent draws would often hold out the same ones. A draw with the test cells of an earlier one
    is therefore passed over while there may be others; `number` changes how many splits there are, not the first.

    Raises: ValueError: if fewer than two types have training cells.
    """
    groups = cells.batches if "batch" in cells.adata.obs else None
    fresh: list[np.ndarray] = []
    repeated: list[np.ndarray] = []
    tested: set[bytes] = set()
    for seed in range(number * DRAWS_PER_SPLIT):
        split = split_cells(cells.labels, groups=groups, seed=seed)
        is_repeated = (key := (split == "test").tobytes()) in tested
        (repeated if is_repeated else fresh).append(split)
        tested.add(key)
        if len(fresh) == number:
            break
    splits = (fresh + repeated)[:number]
    for seed, split in enumerate(splits):
        trained = np.unique(cells.labels[split == "train"])
        if len(trained) < 2 or not np.isin(cells.labels[split == "test"], trained).any():
            raise ValueError(
                f"Data set {cells.name!r}, seed {seed}: {len(trained)} types have training cells, and test cells must "
                "be of one of at least two. Split it by another column, or not by one."
            )
    return [Cells(cells.adata, cells.labels, split, cells.fingerprint) for split in splits]


def summarise(parts: Mapping[str, Sequence[Mapping[str, Any]]], *, models: Sequence[str]) -> dict[str, Any]:
    """Means and standard deviations over seeds, and our models compared split by split.

    Args:
        parts: by method, one part a seed, in the same order for all.
    Returns: `methods`: by key the measures and costs, each with `mean`, `sd` (None of one seed) and `values`, and
        `per_class_f1`, means over the seeds in which the class has test cells; `comparisons`: by model, differences of
        macro F1 on the same splits.
    """
    methods = {
        key: {measure: _spread([part[measure] for part in of_seeds]) for measure in (*MEASURES, *COSTS)}
        | {"per_class_f1": _per_class_f1(of_seeds)}
        for key, of_seeds in parts.items()
    }
    comparisons: dict[str, dict[str, Any]] = {}
    for model in models:
        pairs = {
            "finetuned - PCA regression": (f"{model}-finetuned", REFERENCE),
            "finetuned - random weights": (f"{model}-finetuned", f"{model}-random-finetuned"),
            "frozen regression - PCA regression": (f"{model}-frozen-regression", REFERENCE),
            "frozen regression - random weights": (f"{model}-frozen-regression", f"{model}-random-frozen-regression"),
        }
        comparisons[model] = {
            title: _spread(
                [ours["macro_f1"] - theirs["macro_f1"] for ours, theirs in zip(parts[one], parts[other], strict=True)]
            )
            for title, (one, other) in pairs.items()
            if one in parts and other in parts
        }
    first = next(iter(parts.values()))
    cells = [{**part["num_cells"], "not_scored": part["num_not_scored"]} for part in first]
    return {"methods": methods, "comparisons": comparisons, "splits": cells}


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    if any(value is None for value in values):
        return {"mean": None, "sd": None, "values": list(values)}
    numbers = np.array(values, dtype=np.float64)
    sd = float(numbers.std(ddof=1)) if len(numbers) > 1 else None
    return {"mean": float(numbers.mean()), "sd": sd, "values": numbers.tolist()}


def _per_class_f1(parts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    by_class: dict[str, list[float]] = {}
    for part in parts:
        for name, scores in part["per_class"].items():
            if scores["support"]:
                by_class.setdefault(name, []).append(scores["f1"])
    return {name: float(np.mean(values)) for name, values in sorted(by_class.items())}


def describe_set(cells: CellSet, file: CellFile, models: Mapping[str, str]) -> dict[str, Any]:
    """What a data set holds, how it is split, and the share of it that each model was pretrained on (None: unknown)."""
    types, counts = np.unique(cells.labels, return_counts=True)
    seen: dict[str, float | None] = {}
    for name, source in models.items():
        try:
            seen[name] = lookup(source, cells.adata).num_found / cells.adata.n_obs
        except FileNotFoundError:  # whoever trained it did not say
            seen[name] = None
    return {
        "file": Path(file.path).name,
        "num_cells": cells.adata.n_obs,
        "num_genes": cells.adata.n_vars,
        "median_counts": float(np.median(row_totals(cells.adata.X))),
        "types": dict(zip(types.tolist(), counts.tolist(), strict=True)),
        "held_out_by": file.batch,
        "num_batches": len(np.unique(cells.batches)) if file.batch is not None else None,
        "share_seen_in_pretraining": seen,
    }


def _measure(annotator: Annotator, cells: Cells, seed: int) -> dict[str, Any]:
    if isinstance(annotator, FrozenEmbeddings):
        _in_new_process(annotator.store.compute, cells, seed=seed)
    return _in_new_process(measure, annotator, cells, seed=seed)


def _in_new_process(function: Callable[..., Any], *arguments: Any, seed: int) -> Any:
    """The result of a function that runs alone, so that the process's peak of memory is its own."""
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    context.set_forkserver_preload([measure.__module__])  # seconds of imports are paid once, not by every method
    with ProcessPoolExecutor(1, mp_context=context, initializer=_begin_process) as pool:
        try:
            return pool.submit(function, *arguments, seed=seed).result()
        except BrokenProcessPool as error:
            raise MethodError(
                "its process ended without a result: if nothing above says why, the system ended it for lack of memory"
            ) from error
        except Exception as error:
            raise MethodError(f"{type(error).__name__}: {error}") from error


def _begin_process() -> None:
    end_with_parent()
    quieten()


def _check(data: Mapping[str, CellFile], methods: Sequence[str], seeds: int, freezing: str | None) -> None:
    for method in methods:
        if method not in ALL_METHODS:
            raise ValueError(f"There is no method {method!r}; choose among {', '.join(ALL_METHODS)}.")
    needed = {f"method {method!r}": METHODS[method].package for method in methods if method in METHODS}
    check_packages(needed, extra="annotation-benchmark")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; it must be at least 1.")
    if freezing not in (None, *FREEZING):
        raise ValueError(f"There is no freezing {freezing!r} to compare with; choose {', '.join(FREEZING)}.")
    for name, file in data.items():
        if file.label is None:
            raise ValueError(f"Data set {name!r} has no label: name the column of obs with the cell types.")


def _names_of(models: Sequence[str | PathLike[str]]) -> dict[str, str]:
    names: dict[str, str] = {}
    for model in models:
        source = str(model)
        name = Path(source).resolve().name if Path(source).is_dir() else source.rsplit("/", 1)[-1]
        if name in names:
            raise ValueError(f"{names[name]} and {source} are both named {name!r}; rename a folder.")
        names[name] = source
    return names


def _common_vocabulary(models: Mapping[str, str]) -> GeneVocabulary:
    vocabularies = {name: ScFoundationTokenizer.from_pretrained(source).vocabulary for name, source in models.items()}
    first = next(iter(vocabularies.values()), GeneVocabulary.default())
    for name, vocabulary in vocabularies.items():
        if vocabulary != first:
            raise ValueError(f"{name} has another gene vocabulary than {next(iter(models))}; compare them apart.")
    return first


def _read(
    name: str,
    file: CellFile,
    vocabulary: GeneVocabulary,
    *,
    max_cells: int | None,
    min_cells_per_type: int,
    exclude_labels: Sequence[str],
) -> CellSet:
    cells = read_cells(name, file, vocabulary, max_cells=max_cells, min_cells_per_label=min_cells_per_type)
    is_typed = ~np.isin(cells.labels, list(exclude_labels))
    types = np.unique(cells.labels[is_typed])
    if len(types) < 2:
        raise ValueError(
            f"Data set {name!r} has {len(types)} types of at least {min_cells_per_type} cells; telling types apart "
            "takes two."
        )
    fingerprint = _sha256([cells.fingerprint, cells.adata.obs_names[is_typed].tolist()])
    return CellSet(name, cells.adata[is_typed].copy(), fingerprint)


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _environment() -> dict[str, str]:
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # of a method that is not measured
            continue
    return versions


def read_data_sets(
    sources: Sequence[str | PathLike[str]],
    *,
    label: str | None = None,
    split_by: str | None = None,
    gene_column: str | None = None,
    layer: str | None = None,
) -> dict[str, Any]:
    """Arguments of `benchmark_annotation`: `data`, and the settings that recipes make.

    Args:
        sources: files of cells, named by their stems; YAML files, whose paths begin at the current folder, and names of
            recipes that come with the package.
        label, split_by, gene_column, layer: of the files of cells.
    Raises: ValueError: for two data sets of one name; and as `read_recipe`.
    """
    settings: dict[str, Any] = {}
    data: dict[str, CellFile] = {}
    for source in sources:
        path = Path(source)
        if path.suffix in (".yaml", ".yml") or not (path.suffix or path.exists()):
            recipe = read_recipe(source, settings=SETTINGS, folder=Path())
            found = recipe.pop("data")
            settings |= recipe
        else:
            found = {path.stem: CellFile(path, label=label, batch=split_by, gene_column=gene_column, layer=layer)}
        for name in found:
            if name in data:
                raise ValueError(f"Two data sets are named {name!r}; rename a file, or name them in a YAML file.")
        data |= found
    return {"data": data, **settings}


def main() -> None:
    """Measure the data sets of a recipe from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file, or the name of a recipe that comes with the package")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", action="append", required=True, dest="models")
    parser.add_argument("--device")
    parser.add_argument("--remeasure", choices=get_args(Remeasure), default="nothing")
    arguments = vars(parser.parse_args())
    print(benchmark_annotation(**read_data_sets([arguments.pop("recipe")]), **arguments))


if __name__ == "__main__":
    main()
