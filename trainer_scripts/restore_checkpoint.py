"""Converted models -> a `models.ckpt` for the original code. Also `scfoundation restore`.

python -m scfoundation_hf.trainer_scripts.restore_checkpoint models.ckpt --cell scfoundation-cell
"""

import argparse
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from scfoundation_hf.inference.model_folder import check_weights, read_config, weights_files
from scfoundation_hf.inference.writer import check_free
from scfoundation_hf.modeling_scfoundation.checkpoint_conversion import (
    CHECKPOINT_KEYS,
    PREFIX,
    CheckpointKey,
    restore_original_tensors,
)

from .convert_checkpoint import ORIGINAL_CONFIG_FILE, UNUSED_TENSORS_FILE


def restore_checkpoint(
    models: Mapping[CheckpointKey, str | PathLike[str]], output: str | PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write what the original code loads: for each key the stored config and every tensor, to the bit.

    Args:
        models: key -> folder made by `scfoundation convert`, or trained from one; then with that folder's
            `original_config.json` and `original_unused_tensors.safetensors` beside the weights.
        output: the file to write; it appears only when complete.
        overwrite: replace an existing file.
    Returns: the file.
    Raises: FileNotFoundError: for a folder without the two files, or a missing folder; FileExistsError; ValueError: for
        no models, or weights that do not fit their configuration.
    """
    target = Path(output)
    if not models:
        raise ValueError(f"No model was given to write to {target}: name a folder for cell, rde or gene.")
    check_free(target, overwrite=overwrite)
    content = {key: _original(Path(models[key])) for key in CHECKPOINT_KEYS if key in models}
    unfinished = target.with_name(f".{target.name}.unfinished")
    torch.save(content, unfinished)
    return unfinished.replace(target)


def _original(folder: Path) -> dict[str, Any]:
    """Config and tensors of one model as the original stores them."""
    config = read_config(folder)
    if config.architectures != ["ScFoundationForPreTraining"]:
        raise ValueError(
            f"{folder} holds a {', '.join(config.architectures or ['model'])}; the original's checkpoint needs encoder "
            "and decoder, so a ScFoundationForPreTraining."
        )
    check_weights(folder, config)
    for name in (ORIGINAL_CONFIG_FILE, UNUSED_TENSORS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}, which `scfoundation convert` writes; copy it from the converted model that "
                "this one was trained from."
            )
    tensors = {name: tensor for file in weights_files(folder) for name, tensor in load_file(file).items()}
    restored = restore_original_tensors(tensors, load_file(folder / UNUSED_TENSORS_FILE), config)
    return {
        "config": json.loads((folder / ORIGINAL_CONFIG_FILE).read_text(encoding="utf-8")),
        "state_dict": {PREFIX + name: tensor for name, tensor in restored.items()},
    }


def main() -> None:
    """Restore from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    for key in CHECKPOINT_KEYS:
        parser.add_argument(f"--{key}", type=Path)
    parser.add_argument("--overwrite", action="store_true")
    arguments = vars(parser.parse_args())
    models: dict[CheckpointKey, Path] = {key: arguments[key] for key in CHECKPOINT_KEYS if arguments[key]}
    print(restore_checkpoint(models, arguments["output"], overwrite=arguments["overwrite"]))


if __name__ == "__main__":
    main()
