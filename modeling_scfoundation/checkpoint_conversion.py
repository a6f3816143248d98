"""The released `models.ckpt` and this package's weights, name by name, in both directions.

Used by `scfoundation convert`. The file is a pickle from the internet, so it is only ever read with
`weights_only=True`.
"""

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig

from .modeling_scfoundation import ScFoundationForPreTraining

CheckpointKey = Literal["cell", "rde", "gene"]
CHECKPOINT_KEYS: tuple[CheckpointKey, ...] = get_args(CheckpointKey)
PREFIX = "model."
MASK_NAME = "token_emb.emb_mask.weight"  # the only tensor whose shape differs: (1, D) there, (D,) here

# Original name -> ours. Where one original tensor holds several of ours, its rows are split evenly among
# them. {i} counts layers. A name without parameter stands for its weight and bias.
EMBEDDING_NAMES: dict[str, tuple[str, ...]] = {
    "token_emb.mlp.weight": ("scfoundation.embeddings.value_embedding.bin_scores.weight",),
    "token_emb.mlp.bias": ("scfoundation.embeddings.value_embedding.bin_scores.bias",),
    "token_emb.mlp2.weight": ("scfoundation.embeddings.value_embedding.bin_mixing.weight",),
    "token_emb.mlp2.bias": ("scfoundation.embeddings.value_embedding.bin_mixing.bias",),
    "token_emb.emb.weight": ("scfoundation.embeddings.value_embedding.bin_embeddings",),
    MASK_NAME: ("scfoundation.embeddings.value_embedding.mask_embedding",),
    "pos_emb.weight": ("scfoundation.embeddings.identity_embedding.weight",),
}
ENCODER_LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "encoder.transformer_encoder.{i}.self_attn.in_proj_weight": (
        "scfoundation.encoder.layers.{i}.self_attn.q_proj.weight",
        "scfoundation.encoder.layers.{i}.self_attn.k_proj.weight",
        "scfoundation.encoder.layers.{i}.self_attn.v_proj.weight",
    ),
    "encoder.transformer_encoder.{i}.self_attn.in_proj_bias": (
        "scfoundation.encoder.layers.{i}.self_attn.q_proj.bias",
        "scfoundation.encoder.layers.{i}.self_attn.k_proj.bias",
        "scfoundation.encoder.layers.{i}.self_attn.v_proj.bias",
    ),
    "encoder.transformer_encoder.{i}.self_attn.out_proj": ("scfoundation.encoder.layers.{i}.self_attn.o_proj",),
    "encoder.transformer_encoder.{i}.linear1": ("scfoundation.encoder.layers.{i}.up_proj",),
    "encoder.transformer_encoder.{i}.linear2": ("scfoundation.encoder.layers.{i}.down_proj",),
    "encoder.transformer_encoder.{i}.norm1": ("scfoundation.encoder.layers.{i}.attention_norm",),
    "encoder.transformer_encoder.{i}.norm2": ("scfoundation.encoder.layers.{i}.feed_forward_norm",),
}
DECODER_LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "decoder.performer.net.layers.{i}.0.norm": ("decoder.layers.{i}.attention_norm",),
    "decoder.performer.net.layers.{i}.0.fn.fast_attention.projection_matrix": (
        "decoder.layers.{i}.attention.projection",
    ),
    "decoder.performer.net.layers.{i}.0.fn.to_q": ("decoder.layers.{i}.attention.q_proj",),
    "decoder.performer.net.layers.{i}.0.fn.to_k": ("decoder.layers.{i}.attention.k_proj",),
    "decoder.performer.net.layers.{i}.0.fn.to_v": ("decoder.layers.{i}.attention.v_proj",),
    "decoder.performer.net.layers.{i}.0.fn.to_out": ("decoder.layers.{i}.attention.o_proj",),
    "decoder.performer.net.layers.{i}.1.norm": ("decoder.layers.{i}.feed_forward_norm",),
    "decoder.performer.net.layers.{i}.1.fn.fn.w1": ("decoder.layers.{i}.up_proj",),
    "decoder.performer.net.layers.{i}.1.fn.fn.w2": ("decoder.layers.{i}.down_proj",),
}
OUTPUT_NAMES: dict[str, tuple[str, ...]] = {
    "encoder.norm": ("scfoundation.encoder.norm",),
    "decoder_embed": ("decoder.input_projection",),
    "decoder.norm": ("decoder.norm",),
    "norm": ("gene_norm",),
    "to_final": ("prediction_head",),
}
# In the file, but read by nothing: the vector of padded values (one cell at a time has no padding) and the
# counter of the training-time redraw. Conversion keeps them beside the weights, so that the way back is
# complete.
UNUSED_NAMES = ("token_emb.emb_pad.weight", "decoder.performer.calls_since_last_redraw")


@dataclass(frozen=True)
class OfficialCheckpoint:
    """One of the three models in a `models.ckpt`: config as stored, tensors without the "model." prefix."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_official_checkpoint(path: str | PathLike[str], *, key: CheckpointKey) -> OfficialCheckpoint:
    """Read one model of the released file.

    Args:
        path: `models.ckpt`.
        key: "cell" for cell embeddings, "rde" for read-depth enhancement, "gene" for gene embeddings and
            expression.
    Raises: FileNotFoundError; ValueError: if it is no such checkpoint, naming what was found.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a plain checkpoint: it holds something other than tensors, numbers, text and "
            "dictionaries and could run code when loaded, so it was not loaded. Download the released "
            "models.ckpt again."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a complete PyTorch checkpoint ({error}); download it again.") from error
    if not isinstance(content, dict) or key not in content:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{path} holds no model {key!r}; expected a dictionary with the keys cell, rde and gene, found: "
            f"{found[:200] or 'nothing'}."
        )
    model = content[key]
    if not isinstance(model, dict) or not {"config", "state_dict"} <= model.keys():
        raise ValueError(f"{path}, key {key!r}: expected 'config' and 'state_dict' in it.")
    tensors = model["state_dict"]
    wrong = [name for name in tensors if not name.startswith(PREFIX)]
    if wrong:
        raise ValueError(f"{path}, key {key!r}: tensor names must begin with 'model.'; these do not: {_some(wrong)}.")
    return OfficialCheckpoint(
        config=model["config"],
        tensors={name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()},
    )


def convert_config(original: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ScFoundationConfig:
    """Our configuration of an original model.

    Args:
        original: the stored config, `model_config.mae_autobin` and `dataset_config.rnaseq`.
        tensors: its tensors, for the sizes that the config does not hold (feed-forward widths, random
            features).
    Raises: ValueError: if it describes another architecture, or lacks a key or tensor, naming it.
    """
    try:
        flat = {**original["model_config"]["mae_autobin"], **original["dataset_config"]["rnaseq"]}
        encoder, decoder = flat["encoder"], flat["decoder"]
        kinds = (encoder["module_type"], decoder["module_type"])
        if kinds != ("transformer", "performer"):
            raise ValueError(
                f"The checkpoint has a {kinds[0]} encoder and a {kinds[1]} decoder; only transformer and "
                "performer, as released, can be converted."
            )
        return ScFoundationConfig(
            num_genes=flat["seq_len"] - 2,
            hidden_size=encoder["hidden_dim"],
            num_hidden_layers=encoder["depth"],
            num_attention_heads=encoder["heads"],
            intermediate_size=len(tensors["encoder.transformer_encoder.0.linear1.bias"]),
            decoder_hidden_size=decoder["hidden_dim"],
            decoder_num_hidden_layers=decoder["depth"],
            decoder_num_attention_heads=decoder["heads"],
            decoder_head_dim=decoder["dim_head"],
            decoder_num_random_features=len(
                tensors["decoder.performer.net.layers.0.0.fn.fast_attention.projection_matrix"]
            ),
            decoder_intermediate_size=len(tensors["decoder.performer.net.layers.0.1.fn.fn.w1.bias"]),
            num_bins=flat["bin_num"],
            bin_alpha=flat["bin_alpha"],
        )
    except KeyError as error:
        raise ValueError(f"The checkpoint lacks {error}; it is not a released scFoundation model.") from error


def convert_tensors(original: Mapping[str, Tensor], config: ScFoundationConfig) -> dict[str, Tensor]:
    """Our state dict, of `ScFoundationForPreTraining`, from the original's tensors.

    Args:
        original: names without "model.".
        config: from `convert_config`.
    Raises: ValueError: if any name is missing, left over, or of another shape, with the list of them.
    """
    with torch.device("meta"):
        expected = ScFoundationForPreTraining(config).state_dict()
    name_table = dict(iterate_names(config))
    missing = [name for name in (*name_table, *UNUSED_NAMES) if name not in original]
    unexpected = [name for name in original if name not in name_table and name not in UNUSED_NAMES]
    converted: dict[str, Tensor] = {}
    wrong_shapes = []
    for name, our_names in name_table.items():
        if name not in original:
            continue
        tensor = original[name][0] if name == MASK_NAME else original[name]
        rows, *rest = expected[our_names[0]].shape
        if tensor.shape != (rows * len(our_names), *rest):
            wrong_shapes.append(f"{name} {tuple(tensor.shape)}, expected {(rows * len(our_names), *rest)}")
            continue
        # Cloned, so that no part keeps the whole, or the file's memory map, alive.
        parts = (part.clone() for part in tensor.split(rows))
        converted.update(zip(our_names, parts, strict=True))
    problems = [
        f"{label}: {_some(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong_shapes))
        if names
    ]
    if problems:
        raise ValueError("The checkpoint does not fit the model its config describes. " + "; ".join(problems) + ".")
    return converted


def restore_original_tensors(
    state_dict: Mapping[str, Tensor], unused: Mapping[str, Tensor], config: ScFoundationConfig
) -> dict[str, Tensor]:
    """The original's tensors, without "model.", from ours: the inverse of `convert_tensors`.

    Args:
        state_dict: of `ScFoundationForPreTraining`.
        unused: the tensors named in `UNUSED_NAMES`.
    """
    restored = dict(unused)
    for name, our_names in iterate_names(config):
        tensor = torch.cat([state_dict[our_name] for our_name in our_names])
        restored[name] = tensor[None] if name == MASK_NAME else tensor
    return restored


def iterate_names(config: ScFoundationConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The name table for a model of this many layers: (original name, our names)."""
    tables = (
        (EMBEDDING_NAMES, range(1)),
        (ENCODER_LAYER_NAMES, range(config.num_hidden_layers)),
        (DECODER_LAYER_NAMES, range(config.decoder_num_hidden_layers)),
        (OUTPUT_NAMES, range(1)),
    )
    for table, layers in tables:
        for i in layers:
            for original, ours in table.items():
                yield from _with_parameters(original.format(i=i), tuple(name.format(i=i) for name in ours))


def _with_parameters(original: str, ours: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A module's name stands for its weight and bias; a tensor's for itself."""
    if original.endswith((".weight", ".bias", "in_proj_weight", "in_proj_bias", "projection_matrix")):
        yield original, ours
        return
    for parameter in ("weight", "bias"):
        yield f"{original}.{parameter}", tuple(f"{name}.{parameter}" for name in ours)


def _some(names: list[str], limit: int = 20) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
