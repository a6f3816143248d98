"""What the benchmarks of methods share: what a method may need, what its results depend on, and the random control."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.inference.loading import LoadedModel
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

from .cell_sets import CellSet

DISTRIBUTIONS = {
    "magic": "magic-impute",
    "scvi": "scvi-tools",
    "scib_metrics": "scib-metrics",
    "sklearn": "scikit-learn",
}  # by module, where they have another name


Weights = Literal["trained", "random"]


@dataclass(frozen=True)
class Setup:
    """What methods may need beside the cells.

    Attributes:
        model: folder of the model, and of one with the same sizes and new weights.
        depth_fold: T / S that is asked for.
        seed: of methods that draw.
        scvi_epochs: `None`: scVI's own number.
        device: of our model and scVI; `None`: a GPU if there is one.
        scvi_models: models of scVI trained on these cells, by batch column, with the seconds of training; methods that
            read the same one train it once. `None`: each trains its own.
    """

    model: Path
    random_weights: Path
    depth_fold: float
    seed: int = 0
    scvi_epochs: int | None = None
    device: str | None = None
    scvi_models: dict[str | None, tuple[Any, float]] | None = None


class Method(Protocol):
    """What a benchmark has to know of a method."""

    @property
    def package(self) -> str | None:
        """What must be installed for it."""

    @property
    def weights(self) -> Weights | None:
        """Which weights of our network it computes with, if it does."""


def check_packages(needs: Mapping[str, str | None], *, extra: str) -> None:
    """Refuse what cannot run here.

    Args:
        needs: what -> the module that it needs, if any.
        extra: of this package that brings them all.
    Raises: ImportError: naming both.
    """
    for what, module in needs.items():
        if module is not None and find_spec(module) is None:
            distribution = DISTRIBUTIONS.get(module, module)
            raise ImportError(
                f"{what} needs {distribution}: pip install {distribution}, or 'scfoundation-hf[{extra}]'."
            )


def check_methods(methods: Sequence[str], known: Mapping[str, Method], *, extra: str) -> None:
    """Refuse methods that there are not, or whose package is missing.

    Args:
        known: by name, with `package`.
        extra: that brings all packages.
    Raises: ValueError, ImportError.
    """
    for method in methods:
        if method not in known:
            raise ValueError(f"There is no method {method!r}; choose among {', '.join(known)}.")
    needs = {f"The method {method!r}": known[method].package for method in methods}
    check_packages(needs | {"Drawing": "matplotlib"}, extra=extra)


def describe_model(loaded: LoadedModel[Any]) -> dict[str, Any]:
    """Name, number of parameters, and the fingerprints of the whole and of the configuration."""
    return {
        "name": Path(loaded.name).name,
        "num_parameters": loaded.model.num_parameters(),
        "fingerprint": loaded.fingerprint(),
        "configuration": loaded.configuration_sha256(),
    }


def what_changes(
    cells: CellSet, method: Method, *, about_the_model: Mapping[str, Any], scvi_epochs: int | None
) -> dict[str, Any]:
    """What a method's results depend on beside its own choices.

    Args:
        about_the_model: of `describe_model`.
    """
    depends_on: dict[str, Any] = {"cells": cells.fingerprint, **what_weights_are(method.weights, about_the_model)}
    if method.package == "scvi":
        depends_on["scvi_epochs"] = scvi_epochs
    return depends_on


def what_weights_are(weights: Weights | None, about_the_model: Mapping[str, Any]) -> dict[str, str]:
    """What results that were computed with these weights depend on.

    Random ones hang on the sizes alone, so that the control outlives a change of model.
    """
    match weights:
        case "trained":
            return {"model": about_the_model["fingerprint"]}
        case "random":
            return {"configuration": about_the_model["configuration"]}
        case None:
            return {}


def save_random_weights(model: Path, folder: Path, *, seed: int) -> Path:
    """A model of the same sizes with new weights, and its tokenizer: the control of what pretraining brings."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = ScFoundationConfig.from_pretrained(model)
        ScFoundationForPreTraining(config).save_pretrained(folder)
    ScFoundationTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder
