"""`scfoundation doctor`: what is installed, what the hardware offers, which attention backends really run here."""

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.inference.loading import load_encoder, parse_device
from scfoundation_hf.inference.model_folder import (
    check_checksums,
    check_vocabulary,
    check_weights,
    read_config,
    unknown_fields,
)
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationModel
from scfoundation_hf.modeling_scfoundation.saving import CHECKSUMS_FILE

PACKAGES = (
    "scfoundation-hf",
    "torch",
    "transformers",
    "huggingface-hub",
    "safetensors",
    "datasets",
    "accelerate",
    "anndata",
    "scanpy",
    "peft",
    "xformers",
    "flash-attn",
)
MODEL_FILES = ["*.json", "*.safetensors", "*.tsv", CHECKSUMS_FILE]
BACKENDS = (
    "eager",
    "sdpa",
    "flex_attention",
    "xformers",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
)


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; `passed` is `None` where there is nothing to pass."""

    section: str
    name: str
    result: str
    passed: bool | None = None


def diagnose(model: str | None = None) -> Iterator[Finding]:
    """Look around, and at a model folder if one is given.

    Args:
        model: folder or Hub id to check: configuration, weights, their SHA-256, vocabulary, and that it embeds.
    """
    yield from _versions()
    yield from _devices()
    yield from (_try_backend(backend) for backend in BACKENDS)
    if model is not None:
        yield from _check_folder(model)
        yield _try_model(model)


def _versions() -> Iterator[Finding]:
    yield Finding("Versions", "python", platform.python_version())
    for package in PACKAGES:
        try:
            yield Finding("Versions", package, version(package))
        except PackageNotFoundError:
            yield Finding("Versions", package, "not installed")


def _devices() -> Iterator[Finding]:
    threads = f"{torch.get_num_threads()} threads"
    yield Finding("Devices", "cpu", f"{threads}, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            yield Finding("Devices", f"cuda:{index}", f"{properties.name}, {memory}")
    elif torch.version.cuda is None:
        yield Finding("Devices", "cuda", "this PyTorch was built without CUDA")
    else:
        yield Finding("Devices", "cuda", "no device found")
    if torch.backends.mps.is_available():
        yield Finding("Devices", "mps", "available")


def _try_backend(backend: str) -> Finding:
    """Run a tiny encoder on three packed cells; half precision on a GPU, which the flash kernels want."""
    device = parse_device(None)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def run() -> str:
        config = ScFoundationConfig(
            num_genes=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, num_bins=4
        )
        model = ScFoundationModel(config)
        model.set_attn_implementation(backend)
        model.eval().to(dtype=dtype, device=device)
        cell = torch.tensor([*range(14), config.target_depth_token_id, config.source_depth_token_id])
        borders = torch.tensor([0, 16, 32, 48], dtype=torch.int32, device=device)
        with torch.inference_mode():
            model(
                input_ids=cell.repeat(3)[None].to(device),
                values=torch.ones(1, 48, device=device),
                cu_seq_lens_q=borders,
                cu_seq_lens_k=borders,
                max_length_q=16,
                max_length_k=16,
            )
        return f"on {device.type} in {str(dtype).removeprefix('torch.')}"

    return _attempt("Attention backends", backend, run)


def _check_folder(name: str) -> Iterator[Finding]:
    """What can be said of the files without loading them; nothing of what is no model folder."""
    try:
        folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=MODEL_FILES))
        config = read_config(folder)
    except (OSError, ValueError):
        return  # `_try_model` says why
    unknown = unknown_fields(folder)
    yield Finding(
        "Model", "configuration", f"unknown, so unused: {', '.join(unknown)}" if unknown else "no unknown field"
    )

    def weights() -> str:
        check_weights(folder, config)
        return "complete, and fit the configuration"

    def checksums() -> str:
        check_checksums(folder)
        return f"as {CHECKSUMS_FILE} says"

    def vocabulary() -> str:
        check_vocabulary(folder, config)
        return "fits the model"

    yield _attempt("Model", "weights", weights)
    if (folder / CHECKSUMS_FILE).is_file():
        yield _attempt("Model", "SHA-256", checksums)
    else:
        yield Finding("Model", "SHA-256", f"not recorded when the model was saved (no {CHECKSUMS_FILE})")
    yield _attempt("Model", "vocabulary", vocabulary)


def _try_model(name: str) -> Finding:
    def run() -> str:
        loaded = load_encoder(name)
        config = loaded.model.config
        cell = torch.tensor([[0, 1, 2, config.target_depth_token_id, config.source_depth_token_id]])
        with torch.inference_mode():
            pooled = loaded.model(
                cell.to(loaded.model.device), torch.ones(1, 5, device=loaded.model.device)
            ).pooler_output
        if not torch.isfinite(pooled).all():
            raise ValueError("its embedding of a small cell is not finite; the weights are damaged")
        return (
            f"encoder of {loaded.model.num_parameters():,} parameters, {config.num_genes:,} genes, embeddings of "
            f"{pooled.shape[-1]:,} numbers"
        )

    return _attempt("Model", name, run)


def _attempt(section: str, name: str, run: Callable[[], str]) -> Finding:
    try:
        return Finding(section, name, run(), passed=True)
    except Exception as error:  # whatever a backend throws is what this report is about
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return Finding(section, name, reason[:300], passed=False)
