"""What a pretraining run is made from: a YAML file or a recipe by name, and options that override single keys."""

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .training_args import ScFoundationTrainingArguments


@dataclass
class PretrainingConfig:
    """A pretraining run.

    Args:
        corpus: folder made by `scfoundation prepare`.
        training: the training arguments; their `output_dir` becomes the model folder.
        model: a preset ("3m", "10m", "100m"), or the folder or Hub id of a model to continue from.
        model_overrides: fields of the model's configuration to set differently.
        gene_table: what a new model knows of genes: nothing ("random", as the original), or which of them go together
            in the corpus ("principal_components", `gene_table.py`).
        attn_implementation: attention backend of the encoder, such as "flash_attention_2"; default: sdpa.
        license: of the weights, as the Hub names it ("cc-by-4.0"), for the model card; that of a model to continue from
            holds for what is made of it.
        overwrite: throw away the run that `output_dir` holds instead of continuing it.
    """

    corpus: str
    training: ScFoundationTrainingArguments
    model: str = "100m"
    model_overrides: dict[str, Any] = field(default_factory=dict)
    gene_table: Literal["random", "principal_components"] = "random"
    attn_implementation: str | None = None
    license: str | None = None
    overwrite: bool = False

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "PretrainingConfig":
        """From one mapping of all keys, those of the training arguments among them.

        Raises: ValueError: for a key that does not exist, with the nearest that does, a value of the wrong type, or a
            missing `corpus` or `output_dir`.
        """
        own_types, training_types = _types_of(cls), _types_of(ScFoundationTrainingArguments)
        del own_types["training"]
        known = own_types | training_types
        for key in settings:
            if key not in known:
                raise ValueError(_unknown_key(key, known))
        for key, meaning in (("corpus", "a folder made by `scfoundation prepare`"), ("output_dir", "a folder to make")):
            if settings.get(key) is None:
                raise ValueError(f"The configuration names no {key}: {meaning}. Add it, or pass --{_as_option(key)}.")
        checked = {key: _check_type(key, value, known[key]) for key, value in settings.items()}
        own = {key: value for key, value in checked.items() if key in own_types}
        training = {key: value for key, value in checked.items() if key in training_types}
        return cls(training=ScFoundationTrainingArguments(**training), **own)


def read_config(source: str | PathLike[str], options: Sequence[str] = ()) -> PretrainingConfig:
    """The run that a file describes.

    Args:
        source: a YAML file of `PretrainingConfig`'s and the training arguments' keys, or the name of a recipe that
            comes with the package, such as "pretrain-3m".
        options: command line options that override keys: `--max-steps 200`, `--max-steps=200`, and `--torch-compile`
            alone for true. Values are read as YAML.
    Raises: FileNotFoundError: if there is no such file or recipe; ValueError: as `PretrainingConfig.from_dict`, or for
        a file that is no mapping.
    """
    text = _read(source)
    settings = yaml.safe_load(text)
    if not isinstance(settings, dict):
        raise ValueError(f"{source} holds no `key: value` lines, but {type(settings).__name__}.")
    return PretrainingConfig.from_dict(settings | parse_options(options))


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Command line options as keys and values."""
    settings: dict[str, Any] = {}
    remaining = list(options)
    while remaining:
        option = remaining.pop(0)
        if not option.startswith("--") or option == "--":
            raise ValueError(f"Expected an option such as --max-steps, got {option!r}.")
        name, has_value, value = option[2:].partition("=")
        if not has_value:
            is_alone = not remaining or remaining[0].startswith("--")
            value = "true" if is_alone else remaining.pop(0)
        settings[name.replace("-", "_")] = yaml.safe_load(value)
    return settings


def recipe_names() -> list[str]:
    """The recipes for pretraining that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in _recipes().iterdir() if file.name.startswith("pretrain-"))


def _recipes() -> Any:
    return resources.files("scfoundation_hf.trainer_scripts").joinpath("recipes")


def _read(source: str | PathLike[str]) -> str:
    if Path(source).is_file():
        return Path(source).read_text(encoding="utf-8")
    if str(source) in recipe_names():
        return _recipes().joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    raise FileNotFoundError(f"There is no file {source}, and no recipe of that name: {', '.join(recipe_names())}.")


def _types_of(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {each.name: hints[each.name] for each in fields(cls) if each.init}


def _as_option(key: str) -> str:
    return key.replace("_", "-")


def _unknown_key(key: str, known: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "see docs/pretraining.md for what there is."
    return f"There is no setting {key!r}; {hint}"


def _check_type(key: str, value: Any, expected: Any) -> Any:
    """The value, if it is of the type. YAML reads 1e-4 as text and no as false: both are taken as they were meant."""
    allowed = _flatten(expected)
    choices = [choice for kind in allowed if get_origin(kind) is Literal for choice in get_args(kind)]
    kinds = tuple(get_origin(kind) or kind for kind in allowed if get_origin(kind) is not Literal)
    is_bool = isinstance(value, bool)
    if value in choices or (isinstance(value, kinds) and (not is_bool or bool in kinds)):
        return value
    if value is False and str in kinds:
        return "no"  # as in eval_strategy: no
    if float in kinds and isinstance(value, int | str) and not is_bool:
        try:
            return value if isinstance(value, int) else float(value)
        except ValueError:
            pass
    wanted = [str(choice) for choice in choices] + [
        "null" if kind is type(None) else kind.__name__ for kind in kinds if not issubclass(kind, Enum)
    ]
    raise ValueError(f"{key} is {value!r}; expected {' or '.join(wanted)}.")


def _flatten(expected: Any) -> list[Any]:
    if get_origin(expected) in (Union, types.UnionType):
        return [kind for part in get_args(expected) for kind in _flatten(part)]
    return [object] if expected is Any else [expected]
