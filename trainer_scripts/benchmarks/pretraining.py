"""Pretrained models against simple baselines on held-out cells. Also `scfoundation benchmark pretraining`.

python -m scfoundation_hf.trainer_scripts.benchmarks.pretraining CORPUS OUT --model RUN [--model RUN ...]
"""
# C cells, B cells of a batch

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from torch import Tensor
from tqdm.auto import tqdm

from scfoundation_hf.corpus.manifest import CorpusManifest, read_duplicates
from scfoundation_hf.corpus.sampling import sample_cells
from scfoundation_hf.corpus.streaming import CorpusStream
from scfoundation_hf.evaluation.baselines import BASELINES, MatrixFactorisation, VisibleCells
from scfoundation_hf.evaluation.expression_errors import SUMS, ExpressionErrors, error_sums, measures
from scfoundation_hf.evaluation.paired_comparison import compare_errors
from scfoundation_hf.inference.loading import parse_device
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.data_collator import ScFoundationReadDepthAwareCollator
from scfoundation_hf.tokenization.read_depth_aware import RECIPES
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer
from scfoundation_hf.trainer_scripts.output_folder import check_output_folder, replacing

from .scaling_figure import draw_scaling, read_curve, with_measured_end
from .stored_parts import without_nan
from .tables import as_markdown

RESULTS_NAME, TABLES_NAME, FIGURE_NAME = "results.json", "tables.md", "scaling"

Predict = Callable[[Mapping[str, Any]], Tensor]


def benchmark_pretraining(
    models: Sequence[str | PathLike[str]],
    corpus: str | PathLike[str],
    output: str | PathLike[str],
    *,
    runs: Sequence[str | PathLike[str]] = (),
    recipes: Sequence[str] = ("released",),
    group_by: Sequence[str] | None = None,
    baseline_cells: int = 50_000,
    max_cells: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Measure models and baselines on the validation split of a corpus, in the same genes hidden from all of them.

    Args:
        models: folders of pretrained models, with tokenizers; they are named by the folders' names.
        corpus: folder made by `scfoundation prepare`. The baselines are fitted to its training split.
        output: folder to make: `results.json`, `tables.md`, and `scaling.svg` and `.png` if there are `runs`.
        runs: folders of pretraining runs, finished or not, whose validation losses are drawn against FLOPs. The curve
            of one that is among `models` ends with what is measured here.
        recipes: ways of hiding genes, "released" and "paper"; the figure shows the baselines of the first.
        group_by: obs columns kept by `prepare` (donor, batch) that tell groups of cells apart within a file; the first
            that a cell has decides. Default: those of them that the corpus was split by.
        baseline_cells: training cells that the baselines are fitted to, an even draw held in memory (12 kB a cell of
            2,000 genes); the whole split if it has fewer.
        max_cells: validation cells; default all. Those first in the split, so not an even draw.
        batch_size: cells a batch.
        seed: of what is hidden, as epoch 0; 0 is what the Trainer validates with.
        device: of the models; default: a GPU if there is one.
        overwrite: replace an earlier output.
        progress: show progress bars.
    Returns: `output`.
    Raises: ValueError: if the models have different vocabularies or the same name, or for an unknown recipe or column;
        FileExistsError, FileNotFoundError: as the names say.
    """
    target = Path(output)
    check_output_folder(target, maker="this benchmark", made_file=RESULTS_NAME, overwrite=overwrite)
    for recipe in recipes:
        if recipe not in RECIPES:
            raise ValueError(f"There is no recipe {recipe!r}; choose {', '.join(RECIPES)}.")
    folders = _named_folders(models)
    tokenizer = _common_tokenizer(folders)
    curves = [read_curve(run) for run in runs]
    validation = CorpusStream(corpus, split="validation", batch_size=batch_size)
    groups = read_groups(corpus, columns=group_by)
    training_cells = sample_cells(corpus, baseline_cells)
    chosen_device = parse_device(device)
    loaded = {name: _load(folder, chosen_device) for name, folder in folders.items()}
    results: dict[str, Any] = {
        "corpus": {
            "fingerprint": validation.manifest.fingerprint("validation"),
            "training_cells_of_baselines": sum(map(len, training_cells)),
        },
        "settings": {
            "seed": seed,
            "group_by": None if group_by is None else list(group_by),
            "max_cells": max_cells,
            "baseline_cells": baseline_cells,
        },
        "models": {name: {"num_parameters": model.num_parameters()} for name, model in loaded.items()},
        "recipes": {},
    }
    for recipe in recipes:
        collator = ScFoundationReadDepthAwareCollator(tokenizer, recipe=recipe, seed=seed)
        fitted = [make().fit(training_cells, collator=collator) for make in BASELINES]
        predictors: dict[str, Predict] = {baseline.name: baseline.predict for baseline in fitted}
        predictors |= {name: _predict_with(model) for name, model in loaded.items()}
        cells = CellErrors(predictors, collator, progress=progress).measure(validation, max_cells=max_cells)
        results["recipes"][recipe] = cells.summarise(groups, models=list(loaded), seed=seed)
        ranks = [baseline.rank for baseline in fitted if isinstance(baseline, MatrixFactorisation)]
        results["recipes"][recipe]["rank_of_factorisation"] = ranks[0]
    first = results["recipes"][recipes[0]]["predictors"]
    curves = [
        with_measured_end(curve, run, first[curve.name]["mse"])
        if curve.masking == recipes[0] and folders.get(curve.name) == Path(run).resolve()
        else curve
        for curve, run in zip(curves, runs, strict=True)
    ]
    results["runs"] = [
        {"name": curve.name, "flops": curve.flops.tolist(), "losses": curve.losses.tolist()} for curve in curves
    ]
    with replacing(target) as folder:
        content = json.dumps(without_nan(results), indent=1, allow_nan=False)
        (folder / RESULTS_NAME).write_text(content + "\n", encoding="utf-8")
        (folder / TABLES_NAME).write_text(as_markdown(results), encoding="utf-8")
        if curves:
            comparable = all(curve.masking == recipes[0] for curve in curves)
            levels = {name: first[name]["mse"] for name in first if name not in loaded} if comparable else {}
            draw_scaling(curves, levels, folder / FIGURE_NAME)
    return target


class CellErrors:
    """The errors of several predictors in every cell of a stream, from one pass over it.

    Args:
        predictors: what predicts a batch, by name.
        collator: makes the batches.
        progress: show a progress bar.
    """

    def __init__(
        self,
        predictors: Mapping[str, Predict],
        collator: ScFoundationReadDepthAwareCollator,
        *,
        progress: bool = False,
    ) -> None:
        self.predictors = predictors
        self.collator = collator
        self.progress = progress
        self.cell_ids: list[str] = []
        self.log10_depths = torch.empty(0, dtype=torch.float64)
        self.sums: dict[str, Tensor] = {}

    def measure(self, stream: CorpusStream, *, max_cells: int | None = None) -> "CellErrors":
        """Go through the cells; `sums` then has `(C, 2, 9)` `error_sums` for each predictor."""
        num_cells = stream.num_cells if max_cells is None else min(max_cells, stream.num_cells)
        sums: dict[str, list[Tensor]] = {name: [] for name in self.predictors}
        depths = []
        num_genes = self.collator.tokenizer.target_depth_token_id
        with tqdm(total=num_cells, unit="cells", disable=not self.progress) as bar:
            for cells in stream:
                left = num_cells - len(self.cell_ids)
                if left <= 0:
                    break
                taken = cells.select(np.arange(min(left, len(cells))))
                batch = self.collator(taken)
                for name, predict in self.predictors.items():
                    sums[name].append(error_sums(predict(batch), batch["labels"]))
                visible = VisibleCells.from_batch(batch, num_genes=num_genes)
                depths.append(torch.from_numpy(visible.log10_source_depth))
                self.cell_ids += [str(cell_id) for cell_id in taken.cell_ids]
                bar.update(len(taken))
        self.log10_depths = torch.cat(depths)
        self.sums = {name: torch.cat(parts) for name, parts in sums.items()}
        return self

    def summarise(self, groups: Mapping[str, str], *, models: Sequence[str], seed: int) -> dict[str, Any]:
        """Measures of every predictor, in all and by group, and each model compared with the best baseline.

        Args:
            groups: the group of each cell id.
            models: which of the predictors are models; the others are baselines.
            seed: of the bootstrap.
        """
        group_of_cell = np.array([groups[cell_id] for cell_id in self.cell_ids])
        predictors, by_group = {}, {}
        for name, sums in self.sums.items():
            errors = ExpressionErrors()
            errors.add_cells(sums, self.log10_depths)
            predictors[name] = errors.compute()
        for group in np.unique(group_of_cell).tolist():
            members = torch.from_numpy(group_of_cell == group)
            by_group[group] = {"num_cells": int(members.sum())} | {
                name: measures(sums[members].sum(0)) for name, sums in self.sums.items()
            }
        squared = {name: sums[:, :, SUMS.index("squared")].sum(dim=1).numpy() for name, sums in self.sums.items()}
        comparisons = {
            name: {
                baseline: asdict(
                    compare_errors(squared[name], squared[baseline], groups=group_of_cell.tolist(), seed=seed)
                )
                for baseline in self.sums
                if baseline not in models
            }
            for name in models
        }
        return {
            "num_cells": len(self.cell_ids),
            "predictors": predictors,
            "by_group": by_group,
            "comparisons": comparisons,
        }


def read_groups(corpus: str | PathLike[str], *, columns: Sequence[str] | None = None) -> dict[str, str]:
    """The group of every validation cell by its `cell_id`: its input file, and the first of the obs columns it has.

    Files go by their names without folder and suffix, unless two share one.

    Args:
        columns: default: those kept ones that the corpus was split by.
    Raises: ValueError: if the corpus has no such column, with those it has.
    """
    manifest = CorpusManifest.read(corpus)
    kept = manifest.settings["obs"]
    if columns is None:
        columns = [column for column in manifest.settings["validation_by"] if column in kept]
    for column in columns:
        if column not in kept:
            raise ValueError(
                f"{corpus} has no obs column {column!r}, only: {', '.join(kept) or 'none'}. Prepare it with --obs "
                f"{column}."
            )
    filesystem, root = fsspec.core.url_to_fs(str(corpus))
    shards = [shard for shard in manifest.shards if shard.split == "validation"]
    paths = sorted({shard.source for shard in shards})
    stems = Counter(Path(path).stem for path in paths)
    names = {path: Path(path).stem if stems[Path(path).stem] == 1 else path for path in paths}
    groups: dict[str, str] = {}
    for shard in shards:
        with filesystem.open(f"{root}/{shard.path}", "rb") as file:
            rows = pq.read_table(file, columns=["cell_id", *columns]).to_pylist()
        repeated: set[int] = set()  # rows that hold a cell of another source, which is kept there
        if shard.duplicates is not None:
            duplicates = read_duplicates(corpus, shard.duplicates)
            repeated = set(duplicates["row"][duplicates["shard"] == shard.number].tolist())
        for number, row in enumerate(rows):
            if number not in repeated:
                values = (row[column] for column in columns if row[column] is not None)
                groups[row["cell_id"]] = ", ".join([names[shard.source], *islice(values, 1)])
    return groups


def _load(folder: Path, device: torch.device) -> ScFoundationForPreTraining:
    model: torch.nn.Module = ScFoundationForPreTraining.from_pretrained(folder, dtype=torch.float32)
    model = model.to(device).eval()
    assert isinstance(model, ScFoundationForPreTraining)
    return model


def _predict_with(model: ScFoundationForPreTraining) -> Predict:
    def predict(batch: Mapping[str, Any]) -> Tensor:
        inputs = {
            key: value.to(model.device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
            if key != "labels"
        }
        with torch.inference_mode():
            predicted = model(**inputs).predicted_values
        assert predicted is not None
        return predicted

    return predict


def _named_folders(models: Sequence[str | PathLike[str]]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for model in models:
        folder = Path(model).resolve()
        if folder.name in folders:
            raise ValueError(f"{folders[folder.name]} and {folder} have the same name; rename one of them.")
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no config.json, so it is no model folder.")
        folders[folder.name] = folder
    if not folders:
        raise ValueError("There is no model to measure; name at least one.")
    return folders


def _common_tokenizer(folders: Mapping[str, Path]) -> ScFoundationTokenizer:
    tokenizers = {name: ScFoundationTokenizer.from_pretrained(folder) for name, folder in folders.items()}
    first, *others = tokenizers
    for other in others:
        if tokenizers[other].vocabulary.symbols != tokenizers[first].vocabulary.symbols:
            raise ValueError(f"{first} and {other} have different gene vocabularies; measure them apart.")
    return tokenizers[first]


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", action="append", required=True, dest="models")
    parser.add_argument("--run", action="append", default=[], dest="runs")
    parser.add_argument("--recipe", action="append", choices=tuple(RECIPES), dest="recipes")
    parser.add_argument("--group-by", action="append")
    parser.add_argument("--max-cells", type=int)
    parser.add_argument("--device")
    parser.add_argument("--overwrite", action="store_true")
    arguments = vars(parser.parse_args())
    recipes = arguments.pop("recipes") or ["released"]
    print(
        benchmark_pretraining(
            arguments.pop("models"), arguments.pop("corpus"), arguments.pop("output"), recipes=recipes, **arguments
        )
    )


if __name__ == "__main__":
    main()
