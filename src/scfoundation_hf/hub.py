"""Publishing: a model folder with its code, for people with and without this package, on disk or on the Hub."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME

from scfoundation_hf.configuration.code_export import flat_code
from scfoundation_hf.inference.model_folder import check_model_folder
from scfoundation_hf.modeling_scfoundation import saving
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationModel
from scfoundation_hf.tokenization import tokenization_scfoundation
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer
from scfoundation_hf.trainer_scripts.model_card import card_of_folder
from scfoundation_hf.trainer_scripts.output_folder import check_output_folder, replacing

# Weights, data and text. Not what torch.save writes (training_args.bin, optimizer.pt): those are pickles.
PUBLISHED_SUFFIXES = {".csv", ".json", ".jsonl", ".md", ".npy", ".png", ".safetensors", ".svg", ".tsv", ".txt", ".yaml"}
PUBLISHED_NAMES = {saving.CHECKSUMS_FILE, "LICENSE", "NOTICE"}
CARD_FILE = "README.md"


@dataclass(frozen=True)
class Publication:
    """What is published of a model folder.

    Args:
        files: name -> the file, or its new content where export or push write one.
        left_out: names of what stays behind: pickles, checkpoints, hidden files.
    """

    files: dict[str, Path | bytes]
    left_out: list[str]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by name."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def prepare(folder: str | PathLike[str]) -> Publication:
    """Check a model folder and gather what its publication holds; the folder is not changed.

    That is weights, configuration, tokenizer and documents as they are, the code, `auto_map` in both configurations,
    `SHA256SUMS`, and a model card where there is none. The same folder gives the same bytes.

    Raises: FileNotFoundError, ValueError: if the folder is incomplete, damaged or no scFoundation model.
    """
    folder = Path(folder)
    check_model_folder(folder)
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(folder.iterdir()):
        is_published = path.suffix in PUBLISHED_SUFFIXES or path.name in PUBLISHED_NAMES
        if path.is_file() and is_published and not path.name.startswith("."):
            files[path.name] = path
        else:
            left_out.append(path.name + ("/" if path.is_dir() else ""))
    code = {**flat_code(ScFoundationModel), **flat_code(ScFoundationTokenizer)}
    files |= {name: source.encode() for name, source in code.items()}
    files[CONFIG_NAME] = _with_auto_map(folder / CONFIG_NAME, saving.AUTO_MAP)
    files[TOKENIZER_CONFIG_FILE] = _with_auto_map(folder / TOKENIZER_CONFIG_FILE, tokenization_scfoundation.AUTO_MAP)
    if saving.CHECKSUMS_FILE not in files:
        files[saving.CHECKSUMS_FILE] = saving.checksums(folder).encode()
    if CARD_FILE not in files:
        files[CARD_FILE] = str(card_of_folder(folder)).encode()
    return Publication(files=dict(sorted(files.items())), left_out=[name for name in left_out if name not in files])


def export(model: str | PathLike[str], output: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a copy of a model folder that `AutoModel.from_pretrained(..., trust_remote_code=True)` loads anywhere.

    There it needs torch, transformers, numpy, scipy and safetensors, but not this package.

    Args:
        model: folder with model and tokenizer.
        output: folder to make; it appears only when complete.
        overwrite: replace an earlier export.
    Returns: the folder.
    Raises: as `prepare`; FileExistsError: if `output` exists, and with `overwrite`, if it is no export.
    """
    target = Path(output)
    if target.exists() and target.resolve() == Path(model).resolve():
        raise ValueError(f"{target} is the model itself; choose another output.")
    check_output_folder(target, maker="an export", made_file="modeling_scfoundation.py", overwrite=overwrite)
    publication = prepare(model)
    with replacing(target) as folder:
        for name, content in publication.files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
    return target


def push(
    model: str | PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Publish a model folder on the Hub, in one commit: model, tokenizer, code, card, reports.

    The folder is not changed. After an interruption, the same call sends only what had not arrived.

    Args:
        model: folder with model and tokenizer.
        repo_id: ORG/NAME; the repository is made where needed.
        private: whether a new repository is private; `None`: as the organisation has set.
        revision: branch to commit to, made where needed; `None`: main.
        commit_message: `None`: names the model's folder.
        token: `None`: the one of `hf auth login` or HF_TOKEN.
    Raises: as `prepare`; PermissionError: if the Hub refuses the token; ConnectionError: if the Hub cannot be reached
        or the upload breaks off.
    """
    publication = prepare(model)
    api = HfApi(token=token, library_name="scfoundation-hf")
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in publication.files.items()
    ]
    with _explained_errors(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload {Path(model).resolve().name}",
            revision=revision,
        )


def _with_auto_map(path: Path, auto_map: dict[str, Any]) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}; save the tokenizer there, with its save_pretrained."
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    return (json.dumps({**content, "auto_map": auto_map}, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


@contextmanager
def _explained_errors(repo_id: str) -> Iterator[None]:
    """Say what a failed request means for the user."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise PermissionError(
                f"The Hub refuses to write to {repo_id} ({status}): log in with `hf auth login`, or set HF_TOKEN to a "
                "token that may write there."
            ) from error
        raise ConnectionError(f"The Hub answered {status} for {repo_id}: {error.server_message or error}") from error
    except (ValueError, TypeError):
        raise
    except Exception as error:  # the client's own errors: httpx or httpx2, by the version of huggingface_hub
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__  # type: ignore[assignment]
        raise ConnectionError(
            f"The upload to {repo_id} broke off ({error} {cause if cause is not error else ''}). Nothing was "
            "committed and no local file was changed; the same command sends what had not arrived."
        ) from error
