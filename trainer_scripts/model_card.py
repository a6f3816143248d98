"""The model card of a model folder, filled in from what lies in it: configuration, training report, data manifest.

python -m scfoundation_hf.trainer_scripts.model_card FOLDER [--results results.json] > model_card.md
"""

import argparse
import json
from collections.abc import Mapping
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.corpus.lookup import MANIFEST_FILE, MEMBERS_FILE, TrainingCells
from scfoundation_hf.corpus.whole_files import write_json
from scfoundation_hf.inference.model_folder import find_file
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining

REPORT_FILE = "training_report.json"
ORIGINAL_CONFIG_FILE = "original_config.json"  # only `scfoundation convert` writes it
TAGS = ["biology", "single-cell", "transcriptomics", "scfoundation"]
# The weights that `scfoundation convert` makes, and all that is trained from them.
OFFICIAL_LICENCE: dict[str, Any] = {
    "license": "other",
    "license_name": "scfoundation-model-license-non-commercial",
    "license_link": "https://github.com/biomap-research/scFoundation/blob/main/MODEL_LICENSE",
}
METRICS = {
    "mse": ("Mean squared error", "eval_loss"),
    "mae": ("Mean absolute error", "eval_mae"),
    "pearsonr": ("Pearson correlation", "eval_pearson"),
    "mse_nonzero": ("Mean squared error over expressed genes", "eval_mse_nonzero"),
    "pearsonr_nonzero": ("Pearson correlation over expressed genes", "eval_pearson_nonzero"),
}


def make_model_card(
    report: Mapping[str, Any],
    *,
    base_folder: Path | None = None,
    manifest: Mapping[str, Any] | None = None,
    training_cells: TrainingCells | None = None,
) -> ModelCard:
    """A card with the run's figures.

    Args:
        report: what `pretrain` writes as `training_report.json`. Two entries may be added to it: `baselines`, name ->
            the measures of `ExpressionErrors`, shown beside the model's; `emissions`, `{"grams_co2", "kwh", "source"}`.
        base_folder: the model that this one continues from; what its card says of the licence holds for both.
        manifest: of the corpus, whose `sources` are listed.
        training_cells: the fingerprints that ship with the model.
    """
    stated: dict[str, Any] = {} if base_folder is None else licence_of(base_folder)
    if not stated and report.get("license"):
        stated = {"license": report["license"]}
    if report.get("emissions"):
        stated["co2_eq_emissions"] = _emissions(report)
    validation = report.get("validation") or {}
    data = ModelCardData(
        library_name="transformers",
        tags=TAGS,
        base_model=report["base_model"],
        model_name=f"scFoundation, {report['num_parameters']:,} parameters",
        eval_results=[
            EvalResult(
                task_type="read-depth-aware-modelling",
                task_name="Expression of hidden genes, log1p(counts per 10,000)",
                dataset_type="custom",
                dataset_name="validation split of the training corpus",
                metric_type=metric,
                metric_name=name,
                metric_value=round(validation[key], 6),
            )
            for metric, (name, key) in METRICS.items()
            if key in validation
        ]
        or None,
        **stated,
    )
    return _fill(data, **{"training_cells": training_cells, "manifest": manifest, "baselines": None} | dict(report))


def card_of_folder(folder: str | PathLike[str]) -> ModelCard:
    """The card of a model folder that has none: of its training if there is a report, else of what the files say."""
    folder = Path(folder)
    members = TrainingCells.load(folder / MEMBERS_FILE) if (folder / MEMBERS_FILE).is_file() else None
    manifest = _read(folder / MANIFEST_FILE)
    is_official = (folder / ORIGINAL_CONFIG_FILE).is_file()
    if (report := _read(folder / REPORT_FILE)) is not None:
        return make_model_card(
            report, base_folder=folder if is_official else None, manifest=manifest, training_cells=members
        )
    with torch.device("meta"):
        model = ScFoundationForPreTraining(ScFoundationConfig.from_pretrained(folder))
    licence: dict[str, Any] = OFFICIAL_LICENCE if is_official else {}
    data = ModelCardData(library_name="transformers", tags=TAGS, **licence)
    return _fill(
        data,
        num_parameters=model.num_parameters(),
        base_model=None,
        steps=None,
        validation=None,
        manifest=manifest,
        training_cells=members,
    )


def record_results(folder: str | PathLike[str], results: str | PathLike[str], *, recipe: str = "released") -> None:
    """Take what `benchmark_pretraining` measured of a model and of the baselines into its report and its card.

    Args:
        folder: folder of a pretrained model that was among those measured.
        results: the `results.json`.
        recipe: which of the recipes measured.
    Raises: ValueError: if the model or the recipe was not measured, or the model is no pretrained one.
    """
    folder, results = Path(folder).resolve(), Path(results)
    measured = json.loads(results.read_text(encoding="utf-8"))
    if recipe not in measured["recipes"]:
        raise ValueError(f"{results} has no recipe {recipe!r}, only: {', '.join(measured['recipes'])}.")
    predictors = measured["recipes"][recipe]["predictors"]
    if folder.name not in measured["models"]:
        raise ValueError(f"{results} has no model {folder.name!r}, only: {', '.join(measured['models'])}.")
    report = _read(folder / REPORT_FILE)
    if report is None:
        raise ValueError(f"{folder} has no {REPORT_FILE}, so nothing says how its model was pretrained.")
    own = {f"eval_{name}": value for name, value in predictors[folder.name].items()}
    own["eval_loss"] = own.pop("eval_mse")
    own["eval_num_cells"] = measured["recipes"][recipe]["num_cells"]
    report["validation"] = own
    report["baselines"] = {name: values for name, values in predictors.items() if name not in measured["models"]}
    write_json(folder / REPORT_FILE, report)
    card_of_folder(folder).save(folder / "README.md")


def _fill(data: ModelCardData, **values: Any) -> ModelCard:
    template = resources.files("scfoundation_hf.trainer_scripts").joinpath("model_card_template.md")
    is_official = data.to_dict().get("license_name") == OFFICIAL_LICENCE["license_name"]
    return ModelCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        is_official=is_official,
        licence=data.to_dict().get("license"),
        licence_link=OFFICIAL_LICENCE["license_link"],
        **values,
    )


def licence_of(model: str | PathLike[str]) -> dict[str, Any]:
    """What the card of a model, a folder or Hub id, says of its licence; the official one's is known without a card."""
    if find_file(model, ORIGINAL_CONFIG_FILE) is not None:
        return OFFICIAL_LICENCE
    card = find_file(model, "README.md")
    if card is None:
        return {}
    stated = ModelCard.load(card).data.to_dict()
    return {key: stated[key] for key in ("license", "license_name", "license_link") if key in stated}


def _emissions(report: Mapping[str, Any]) -> dict[str, Any]:
    """In the form the Hub reads."""
    return {
        "emissions": report["emissions"]["grams_co2"],
        "source": report["emissions"]["source"],
        "training_type": "fine-tuning" if report["base_model"] else "pre-training",
        "hardware_used": report["hardware"],
    }


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main() -> None:
    """Print the card of a folder, with the results of a benchmark taken into the folder first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, help="of `scfoundation benchmark pretraining`")
    arguments = parser.parse_args()
    if arguments.results is not None:
        record_results(arguments.folder, arguments.results)
    print(card_of_folder(arguments.folder))


if __name__ == "__main__":
    main()
