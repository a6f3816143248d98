"""A folder, a Hub id or a loaded model -> the model and tokenizer that a job runs with."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from transformers import PreTrainedModel

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import (
    ScFoundationForCellClassification,
    ScFoundationForPreTraining,
    ScFoundationModel,
    ScFoundationPreTrainedModel,
)
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

from .many_processes import ALONE, Processes

ModelSource = str | PathLike[str] | PreTrainedModel
DtypeName = Literal["float32", "bfloat16", "float16"]
ValuesDtype = Literal["float32", "float16"]  # of a stored result
ModelT = TypeVar("ModelT", ScFoundationModel, ScFoundationForPreTraining, ScFoundationForCellClassification)
_PARTS = {
    "ScFoundationModel": "encoder",
    "ScFoundationForPreTraining": "encoder and decoder",
    "ScFoundationForCellClassification": "encoder and classification head",
}
_NO_CLASSIFIER = (
    "has no classification head to name cell types with: fine-tune one (`scfoundation finetune`), or pass reference=, "
    "labelled cells to compare with (`scfoundation index`)."
)
# Fields of a configuration that say where it came from, not what is computed.
_ORIGIN = {"_name_or_path", "architectures", "auto_map", "transformers_version"}
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(DtypeName)}


@dataclass(frozen=True)
class LoadedModel(Generic[ModelT]):
    """What computes, and where it came from."""

    model: ModelT
    tokenizer: ScFoundationTokenizer
    name: str
    revision: str | None

    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights: the same for the same numbers, wherever they came from."""
        return hashlib.sha256(f"{self._configuration()}{self.weights_sha256()}".encode()).hexdigest()

    def configuration_sha256(self) -> str:
        """SHA-256 of the configuration: the same for models of the same sizes and choices."""
        return hashlib.sha256(self._configuration().encode()).hexdigest()

    def _configuration(self) -> str:
        fields = self.model.config.to_dict()
        return json.dumps({name: fields[name] for name in sorted(fields) if name not in _ORIGIN}, sort_keys=True)

    def weights_sha256(self) -> str:
        """SHA-256 of names and values of all tensors, as they are on the device."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load_encoder(
    model: ModelSource,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    processes: Processes = ALONE,
) -> LoadedModel[ScFoundationModel]:
    """Make a model ready to embed.

    Args:
        model: a folder written by `save_pretrained` or `scfoundation convert`, a Hub id, or a loaded scFoundation model
            (which is used where and as it is).
        device: `None`: a GPU if there is one, else the CPU; of several processes each takes its own.
        dtype: `None`: float32, whatever the folder stores; else "float32", "bfloat16", "float16" or a torch dtype.
    Raises: ValueError: if it is no scFoundation model, weights are missing, or tokenizer and model do not fit; OSError:
        if there is no such folder or file.
    """
    if isinstance(model, PreTrainedModel):
        encoder: Any = model if isinstance(model, ScFoundationModel) else getattr(model, "scfoundation", None)
        if not isinstance(encoder, ScFoundationModel):
            raise ValueError(f"A {type(model).__name__} is no scFoundation model; pass one, or a folder or Hub id.")
        return _use_loaded(encoder, device=device, dtype=dtype)
    return _load(model, ScFoundationModel, device=device, dtype=dtype, processes=processes)


def load_with_decoder(
    model: ModelSource,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    processes: Processes = ALONE,
) -> LoadedModel[ScFoundationForPreTraining]:
    """Make a model ready to predict expression; arguments and errors are those of `load_encoder`.

    Raises: ValueError: also for a model without decoder.
    """
    if isinstance(model, PreTrainedModel):
        if not isinstance(model, ScFoundationForPreTraining):
            raise ValueError(
                f"A {type(model).__name__} has no decoder to predict expression with: load the model with "
                "AutoModelForPreTraining, or pass its folder or Hub id."
            )
        return _use_loaded(model, device=device, dtype=dtype)
    return _load(model, ScFoundationForPreTraining, device=device, dtype=dtype, processes=processes)


def load_classifier(
    model: ModelSource,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    processes: Processes = ALONE,
) -> LoadedModel[ScFoundationForCellClassification]:
    """Make a model ready to name cell types; arguments and errors are those of `load_encoder`.

    Raises: ValueError: also for a model without classification head, or whose configuration names no types.
    """
    if isinstance(model, PreTrainedModel):
        if not isinstance(model, ScFoundationForCellClassification):
            raise ValueError(f"A {type(model).__name__} {_NO_CLASSIFIER}")
        return _check_types_named(_use_loaded(model, device=device, dtype=dtype))
    _check_model_type(str(model))
    config = ScFoundationConfig.from_pretrained(str(model))
    if ScFoundationForCellClassification.__name__ not in (config.architectures or []):
        raise ValueError(f"The model in {model} {_NO_CLASSIFIER}")
    loaded = _load(model, ScFoundationForCellClassification, device=device, dtype=dtype, processes=processes)
    return _check_types_named(loaded)


def cell_types_of(model: ScFoundationForCellClassification) -> list[str]:
    """The types that a classifier names, in the order of its logits."""
    names: Any = model.config.id2label
    return [names[number] for number in range(len(names))]


def _check_types_named(
    loaded: LoadedModel[ScFoundationForCellClassification],
) -> LoadedModel[ScFoundationForCellClassification]:
    names = cell_types_of(loaded.model)
    if all(name == f"LABEL_{number}" for number, name in enumerate(names)):
        raise ValueError(
            f"The configuration of {loaded.name} does not say which cell types its {len(names)} classes are "
            f"({names[0]!r}, {names[1]!r}, ...): set id2label and label2id, and save it again."
        )
    return loaded


def _load(
    model: str | PathLike[str],
    model_class: type[ModelT],
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    processes: Processes,
) -> LoadedModel[ModelT]:
    name = str(model)
    _check_model_type(name)
    loaded: Any = model_class.from_pretrained(name, dtype=parse_dtype(dtype) or torch.float32, output_loading_info=True)
    network, info = loaded
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        what = _PARTS[model_class.__name__]
        raise ValueError(
            f"The weights in {name} lack {len(info['missing_keys'])} tensors of the {what} ({missing}, ...); "
            "results would be random. Save or convert the model again."
        )
    return _check_fit(
        LoadedModel(
            model=network.to(processes.share_of(parse_device(device))).eval(),
            tokenizer=ScFoundationTokenizer.from_pretrained(name),
            name=name,
            revision=getattr(network.config, "_commit_hash", None),
        )
    )


@contextmanager
def evaluating(model: ScFoundationPreTrainedModel) -> Iterator[None]:
    """Dropout off, an encoder's pooling on; afterwards the model is as its owner left it."""
    was_training = model.training
    model.eval()
    encoder = model if isinstance(model, ScFoundationModel) else None
    had_pooling = encoder is not None and encoder.add_pooling_layer
    if encoder is not None:
        encoder.add_pooling_layer = True
    try:
        yield
    finally:
        model.train(was_training)
        if encoder is not None:
            encoder.add_pooling_layer = had_pooling


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name.

    Raises: ValueError: for anything but float32, bfloat16 and float16.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"There is no dtype {dtype!r} to run in; choose {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def parse_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is.

    Raises: ValueError: if it is not there, with the devices that are.
    """
    available = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()]
    if device is None:
        return torch.device((*available, "cpu")[0])
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"There is no device {device!r}; here: {', '.join((*available, 'cpu'))}.") from error
    if chosen.type in ("cuda", "mps") and chosen.type not in available:
        raise ValueError(f"The device {device!r} is not available; here: {', '.join((*available, 'cpu'))}.")
    return chosen


def _check_model_type(name: str) -> None:
    path = Path(name)
    looks_like_path = path.is_absolute() or name.startswith(".") or name.count("/") != 1
    if looks_like_path and not path.is_dir():
        raise FileNotFoundError(
            f"There is no model folder {name}. Pass a folder made by save_pretrained or `scfoundation convert`, or a "
            "Hub id (ORG/NAME)."
        )
    config, _ = ScFoundationConfig.get_config_dict(name)
    if config.get("model_type") != ScFoundationConfig.model_type:
        raise ValueError(
            f"{name} holds a model of type {config.get('model_type')!r}, not scFoundation "
            f"({ScFoundationConfig.model_type!r}). An official models.ckpt is made ready by `scfoundation convert`."
        )


def _use_loaded(
    model: ModelT, *, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> LoadedModel[ModelT]:
    if device is not None and parse_device(device).type != model.device.type:
        raise ValueError(f"The loaded model is on {model.device}, not {device}; move it: model.to('{device}').")
    if dtype is not None and parse_dtype(dtype) != model.dtype:
        raise ValueError(f"The loaded model is {model.dtype}, not {dtype}; convert it: model.to({dtype}).")
    name = model.config._name_or_path or type(model).__name__
    revision = getattr(model.config, "_commit_hash", None)
    return _check_fit(LoadedModel(model, ScFoundationTokenizer(), name, revision))


def _check_fit(loaded: LoadedModel[ModelT]) -> LoadedModel[ModelT]:
    num_genes = len(loaded.tokenizer.vocabulary)
    if num_genes != loaded.model.config.num_genes:
        raise ValueError(
            f"The tokenizer of {loaded.name} has {num_genes:,} genes, its model {loaded.model.config.num_genes:,}; "
            "they do not belong together."
        )
    return loaded
