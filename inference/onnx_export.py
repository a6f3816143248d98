"""The encoder as an exported graph: `torch.export`, and ONNX for runtimes without PyTorch. Padded batches only."""

import contextlib
import importlib
import tempfile
import warnings
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationModel

from .loading import ModelSource, evaluating, load_encoder
from .writer import check_free

OnnxWeights = Literal["float32", "int8"]
INPUT_NAMES = ["input_ids", "values", "attention_mask"]
OUTPUT_NAMES = ["pooler_output", "last_hidden_state"]
TOLERANCE = 1e-4  # of the largest value: the graph computes what the model does


class ExportableEncoder(nn.Module):
    """The encoder with tensors in and out; cells and tokens may be of any number.

    `forward` takes `input_ids`, `values` and `attention_mask`, `(B, N)`, and gives `pooler_output` `(B, 4 * D)` and
    `last_hidden_state` `(B, N, D)`.
    """

    def __init__(self, encoder: ScFoundationModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, values: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embed the cells of a padded batch."""
        output = self.encoder(input_ids, values, attention_mask)
        return output.pooler_output, output.last_hidden_state


def export_encoder(model: ModelSource) -> torch.export.ExportedProgram:
    """The encoder as a graph of torch operators, for any number of cells and tokens; on the CPU, in float32.

    Cells without an expressed gene are not refused in the graph; the tokenizer refuses them.
    """
    encoder = load_encoder(model, device=None if isinstance(model, nn.Module) else "cpu").model
    sizes = {0: torch.export.Dim("cells"), 1: torch.export.Dim("tokens", min=3)}
    with evaluating(encoder):
        return torch.export.export(
            ExportableEncoder(encoder), _example_batch(encoder), dynamic_shapes=(sizes, sizes, sizes)
        )


def export_onnx(
    model: ModelSource, output: str | PathLike[str], *, weights: OnnxWeights = "float32", overwrite: bool = False
) -> Path:
    """Write the encoder as an ONNX file, and compare what onnxruntime makes of it with the model.

    Args:
        model: folder, Hub id or loaded scFoundation model.
        output: the .onnx file to write; it appears only when it was checked.
        weights: "int8": matrices as 8-bit integers (onnxruntime's dynamic quantisation), a quarter of the size, with
            the loss of accuracy that docs/interoperation.md gives.
        overwrite: replace an existing file.
    Returns: the file. Its inputs are those of the tokenizer, its outputs `pooler_output` and `last_hidden_state`.
    Raises: FileExistsError; ImportError: without the extra `onnx`; ValueError: if the file computes something else.
    """
    target = Path(output)
    check_free(target, overwrite=overwrite)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _import(name)
    encoder = load_encoder(model, device=None if isinstance(model, nn.Module) else "cpu").model
    program = export_encoder(encoder)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        file = Path(temporary) / "encoder.onnx"
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13's exporter against its own tree library
            written = torch.onnx.export(
                program, (), dynamo=True, input_names=INPUT_NAMES, output_names=OUTPUT_NAMES, verbose=False
            )
        assert written is not None
        written.save(file, external_data=False)
        _check(file, encoder)
        if weights == "int8":
            quantised = file.with_name("int8.onnx")
            _import("onnxruntime.quantization").quantize_dynamic(file, quantised)
            file = quantised
        return file.replace(target)


def _check(file: Path, encoder: ScFoundationModel) -> None:
    """Compare onnxruntime with the model on a batch of another shape than the one that was traced."""
    batch = _example_batch(encoder, num_cells=3, num_tokens=9)
    session = _import("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs = {name: tensor.numpy() for name, tensor in zip(INPUT_NAMES, batch, strict=True)}
    found = session.run(["pooler_output"], inputs)[0]
    with torch.inference_mode(), evaluating(encoder):
        expected = encoder(*batch).pooler_output.numpy()
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCE:
        raise ValueError(
            f"The ONNX file does not compute what the model does: it is {error:.1g} of the largest value off."
        )


def _example_batch(
    encoder: ScFoundationModel, num_cells: int = 2, num_tokens: int = 7
) -> tuple[Tensor, Tensor, Tensor]:
    """Cells of different lengths, the first one full."""
    config = encoder.config
    input_ids = torch.full((num_cells, num_tokens), config.num_positions)
    for cell in range(num_cells):
        length = max(num_tokens - cell, 3)
        genes = torch.arange(length - 2) * 2 + cell
        depths = torch.tensor([config.target_depth_token_id, config.source_depth_token_id])
        input_ids[cell, :length] = torch.cat([genes, depths])
    attention_mask = input_ids.ne(config.num_positions).long()
    values = torch.linspace(0.5, 4, input_ids.numel()).view_as(input_ids) * attention_mask
    return input_ids, values, attention_mask


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"Writing ONNX needs {name}: pip install 'scfoundation-hf[onnx]'.") from error
