"""Is a model folder whole, and do its parts belong together? Found out from the files' headers, without loading."""

import json
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from scfoundation_hf.configuration.configuration_scfoundation import UNDECLARED_FIELDS, ScFoundationConfig
from scfoundation_hf.modeling_scfoundation import modeling_scfoundation
from scfoundation_hf.modeling_scfoundation.saving import CHECKSUMS_FILE, changed_files
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

VOCABULARY_FILE = ScFoundationTokenizer.vocab_files_names["vocab_file"]


def check_model_folder(folder: str | PathLike[str]) -> ScFoundationConfig:
    """Read the configuration of a folder whose weights, vocabulary and checksums fit it.

    Args:
        folder: written by `save_pretrained` of model and tokenizer, by `scfoundation convert` or by training.
    Raises: FileNotFoundError: for a missing folder or file; ValueError: for another model type, weights that are
        truncated, changed or do not fit the configuration, or a vocabulary that does not, naming what.
    """
    config = read_config(folder)
    check_weights(folder, config)
    check_checksums(folder)
    check_vocabulary(folder, config)
    return config


def read_config(folder: str | PathLike[str]) -> ScFoundationConfig:
    """The configuration of a folder that holds an scFoundation model."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}: it is no model folder made by save_pretrained.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); save the model again.") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type != ScFoundationConfig.model_type:
        raise ValueError(f"{path} describes a model of type {model_type!r}, not {ScFoundationConfig.model_type!r}.")
    return ScFoundationConfig.from_pretrained(folder)


def find_file(model: str | PathLike[str], name: str, *, revision: str | None = None) -> Path | None:
    """A file that lies with a model: in its folder or, for what may be a Hub id, in the repository."""
    if Path(model).is_dir() or str(model).count("/") != 1:
        path = Path(model) / name
        return path if path.is_file() else None
    found = cached_file(
        str(model),
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def unknown_fields(folder: str | PathLike[str]) -> list[str]:
    """Fields of `config.json` that this version gives no meaning."""
    content = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
    known = {*ScFoundationConfig().to_dict(), *ScFoundationConfig.__dataclass_fields__, *UNDECLARED_FIELDS}
    return sorted(set(content) - known)


def weights_files(folder: str | PathLike[str]) -> list[Path]:
    """The safetensors files of the model: one, or the shards that the index names.

    Raises: FileNotFoundError: naming what is missing.
    """
    index = Path(folder) / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [index.with_name(name) for name in shards]
    else:
        paths = [index.with_name(SAFE_WEIGHTS_NAME)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks the weights {', '.join(missing)}; save or download the model again.")
    return paths


def check_weights(folder: str | PathLike[str], config: ScFoundationConfig) -> None:
    """Compare names and shapes in the files with those of the model that `config` describes."""
    found: dict[str, tuple[int, ...]] = {}
    for path in weights_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no complete safetensors file ({error}): it was cut off or damaged. Copy it again."
            ) from error
    expected = _expected_shapes(config)
    problems = [
        f"{len(names)} {label} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for label, names in (
            ("missing", [name for name in expected if name not in found]),
            ("unexpected", [name for name in found if name not in expected]),
            (
                "of another shape",
                [
                    f"{name} {shape} instead of {expected[name]}"
                    for name, shape in found.items()
                    if expected.get(name, shape) != shape
                ],
            ),
        )
        if names
    ]
    if problems:
        raise ValueError(f"The weights in {folder} do not fit its {CONFIG_NAME}: tensors {'; '.join(problems)}.")


def check_checksums(folder: str | PathLike[str]) -> None:
    """Compare the weights with the SHA-256 that the save recorded, if it recorded any.

    Raises: ValueError: naming the files that changed.
    """
    if not (Path(folder) / CHECKSUMS_FILE).is_file():
        return
    changed = changed_files(folder)
    if changed:
        raise ValueError(
            f"{', '.join(changed)} in {folder} changed since the model was saved ({CHECKSUMS_FILE} says otherwise): "
            "copy the folder again, or save the model anew if the change was meant."
        )


def check_vocabulary(folder: str | PathLike[str], config: ScFoundationConfig) -> None:
    """Compare the number of genes of tokenizer and model."""
    path = Path(folder) / VOCABULARY_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {VOCABULARY_FILE}; save the tokenizer there too, with its save_pretrained."
        )
    num_genes = len(GeneVocabulary.from_file(path))
    if num_genes != config.num_genes:
        raise ValueError(
            f"{path} has {num_genes:,} genes, the model {config.num_genes:,}; they do not belong together."
        )


def _expected_shapes(config: ScFoundationConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the model class that the configuration names."""
    name = (config.architectures or ["ScFoundationForPreTraining"])[0]
    model_class = getattr(modeling_scfoundation, name, None)
    if model_class is None:
        raise ValueError(f"{CONFIG_NAME} names the architecture {name!r}, which this version does not have.")
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
