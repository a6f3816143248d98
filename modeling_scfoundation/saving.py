"""What a save adds to transformers' own: the SHA-256 of the weights and, when asked for, the code that runs them."""

import hashlib
import os
from os import PathLike
from pathlib import Path
from typing import Any

from scfoundation_hf.configuration.code_export import save_code

# Auto class -> file and class, for people who load with trust_remote_code=True. The tokenizer names its own.
AUTO_MAP = {
    "AutoConfig": "configuration_scfoundation.ScFoundationConfig",
    "AutoModel": "modeling_scfoundation.ScFoundationModel",
    "AutoModelForPreTraining": "modeling_scfoundation.ScFoundationForPreTraining",
    "AutoModelForSequenceClassification": "modeling_scfoundation.ScFoundationForCellClassification",
}
HUB_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")

CHECKSUMS_FILE = "SHA256SUMS"  # the format of coreutils: `sha256sum --check SHA256SUMS` reads it too


class SavedWithCode:
    """`save_pretrained` of all scFoundation models; mixed into `PreTrainedModel`."""

    def save_pretrained(
        self: Any,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        include_code: bool | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save weights, their SHA-256 (`SHA256SUMS`) and configuration.

        Args:
            save_directory: folder, made where needed.
            is_main_process: whether this process writes.
            include_code: copy the model's code too, so that `AutoModel.from_pretrained(save_directory,
                trust_remote_code=True)` works without this package. `None`: if the model came with code, or was saved
                with it before.
            push_to_hub: upload what was saved, to `repo_id` or a repository of the folder's name.
            *args, **kwargs: further arguments of `PreTrainedModel.save_pretrained` and `push_to_hub`.
        """
        hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        if include_code is None:
            include_code = hasattr(self.config, "auto_map")
        if include_code:
            self.config.auto_map = dict(AUTO_MAP)
        elif hasattr(self.config, "auto_map"):
            del self.config.auto_map
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)  # type: ignore[misc]
        if not is_main_process:
            return
        if include_code:
            save_code(type(self), save_directory)
        share_weights(save_directory)
        record_checksums(save_directory)
        if push_to_hub:  # not by `super`, which would upload before the rest is there
            token = kwargs.get("token")
            self.push_to_hub(hub_options.pop("repo_id", Path(save_directory).name), token=token, **hub_options)


def record_checksums(folder: str | PathLike[str]) -> Path:
    """Write the SHA-256 of every safetensors file of `folder` into its `SHA256SUMS`; returns that file."""
    path = Path(folder) / CHECKSUMS_FILE
    unfinished = path.with_name(f".{CHECKSUMS_FILE}.unfinished")
    unfinished.write_text(checksums(folder), encoding="utf-8", newline="\n")
    return unfinished.replace(path)


def checksums(folder: str | PathLike[str]) -> str:
    """One line for each safetensors file of `folder`: SHA-256, two spaces, name."""
    return "".join(f"{sha256_of(file)}  {file.name}\n" for file in sorted(Path(folder).glob("*.safetensors")))


def changed_files(folder: str | PathLike[str]) -> list[str]:
    """Names of the files that are not what `SHA256SUMS` says: changed since they were saved, or gone.

    Raises: FileNotFoundError: if the folder has no `SHA256SUMS`; ValueError: for a line of another form.
    """
    path = Path(folder) / CHECKSUMS_FILE
    changed = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        digest, separator, name = line.partition("  ")
        if len(digest) != 64 or not separator or Path(name).name != name:
            raise ValueError(f"{path}, line {number}: expected '<SHA-256>  <file name>', found {line[:100]!r}.")
        file = path.with_name(name)
        if not file.is_file() or sha256_of(file) != digest:
            changed.append(name)
    return changed


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share_weights(folder: str | PathLike[str]) -> None:
    """Give the safetensors files the permissions of ordinary new ones; safetensors writes for its owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for file in Path(folder).glob("*.safetensors"):
        file.chmod(0o666 & ~umask)
