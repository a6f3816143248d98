"""The original's own code, run from a checkout that the user names; it is no part of this project.

git clone https://github.com/biomap-research/scFoundation, pip install einops local-attention, then
`python benchmarks/speed.py --original scFoundation`.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.checkpoint_conversion import restore_original_tensors
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining

from .original import MASK_VALUE, PAD_VALUE, DenseCell


def is_expressible(config: ScFoundationConfig) -> bool:
    """Whether the original's code can build this model: its feed-forwards are always four times as wide as the rest."""
    widths = (
        (config.hidden_size, config.intermediate_size),
        (config.decoder_hidden_size, config.decoder_intermediate_size),
    )
    return all(intermediate == 4 * width for width, intermediate in widths)


class CheckoutModel(nn.Module):
    """The original's model with the weights of ours, for one cell at a time, as `OriginalModel` computes it.

    Args:
        model: gives configuration and weights; parameters are copies.
        folder: a checkout of biomap-research/scFoundation.
    Raises: FileNotFoundError: if the folder is none; ImportError: naming a package that the original's code needs.
    """

    def __init__(self, model: ScFoundationForPreTraining, folder: Path) -> None:
        super().__init__()
        config = self.config = model.config
        encoder = {
            "hidden_dim": config.hidden_size,
            "depth": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "dim_head": config.hidden_size // config.num_attention_heads,
            "module_type": "transformer",
        }
        decoder = {
            "hidden_dim": config.decoder_hidden_size,
            "depth": config.decoder_num_hidden_layers,
            "heads": config.decoder_num_attention_heads,
            "dim_head": config.decoder_head_dim,
            "module_type": "performer",
        }
        original_config = {
            "model": "mae_autobin",
            "seq_len": config.num_positions,
            "n_class": int(PAD_VALUE) + 1,
            "pad_token_id": PAD_VALUE,
            "mask_token_id": MASK_VALUE,
            "bin_num": config.num_bins,
            "bin_alpha": config.bin_alpha,
            "encoder": encoder,
            "decoder": decoder,
        }
        self.model = _import_from(folder).select_model(original_config)
        unused = {
            "token_emb.emb_pad.weight": torch.zeros(1, config.hidden_size),
            "decoder.performer.calls_since_last_redraw": torch.tensor(0),
        }
        self.model.load_state_dict(restore_original_tensors(model.state_dict(), unused, config))
        self.to(model.device).train(model.training)

    def embed(self, cell: DenseCell) -> Tensor:
        """Cell embedding `(4 * D,)`: [S, T, max over genes, mean over genes]."""
        _, positions = _visible(cell)
        values = cell.values[:, positions[0]]
        embedded = self.model.token_emb(values[..., None], output_weight=0) + self.model.pos_emb(positions)
        tokens = self.model.encoder(embedded, padding_mask=values == PAD_VALUE)[0]
        genes = tokens[:-2]
        return torch.cat([tokens[-1], tokens[-2], genes.max(dim=0).values, genes.mean(dim=0)])

    def gene_embeddings(self, cell: DenseCell) -> Tensor:
        """Gene embeddings `(G, E)`."""
        head, self.model.to_final = self.model.to_final, None  # as the original's own script has it
        try:
            return self._forward(cell)[: self.config.num_genes]
        finally:
            self.model.to_final = head

    def enhance(self, cell: DenseCell) -> Tensor:
        """Predicted log1p(CP10k) of all genes, `(G,)`."""
        return self._forward(cell)[: self.config.num_genes]

    def loss(self, cell: DenseCell) -> Tensor:
        """Mean squared error at the targets, a scalar."""
        assert cell.labels is not None
        return nn.functional.mse_loss(self._forward(cell)[cell.target_ids], cell.labels)

    def _forward(self, cell: DenseCell) -> Tensor:
        is_visible, positions = _visible(cell)
        values = cell.values[:, positions[0]]
        shown = cell.values if cell.is_hidden is None else cell.values.masked_fill(cell.is_hidden, MASK_VALUE)
        return self.model(
            x=values,
            padding_label=values == PAD_VALUE,
            encoder_position_gene_ids=positions,
            encoder_labels=is_visible,
            decoder_data=shown,
            mask_gene_name=False,
            mask_labels=None,
            decoder_position_gene_ids=torch.arange(shown.shape[1], device=shown.device)[None],
            decoder_data_padding_labels=torch.zeros_like(shown, dtype=torch.bool),
        )[0]


def _visible(cell: DenseCell) -> tuple[Tensor, Tensor]:
    """Which positions the encoder sees, `(1, S)`, and their numbers, `(1, L)`."""
    is_visible = cell.values > 0
    if cell.is_hidden is not None:
        is_visible = is_visible & ~cell.is_hidden
    return is_visible, is_visible.nonzero()[:, 1][None]


def _import_from(folder: Path) -> Any:
    """The package `pretrainmodels` of a checkout."""
    code = folder / "model"
    if not (code / "pretrainmodels" / "select_model.py").is_file():
        raise FileNotFoundError(
            f"{folder} is no checkout of the original: it has no model/pretrainmodels/select_model.py. Pass the folder "
            "that `git clone https://github.com/biomap-research/scFoundation` makes."
        )
    sys.path.insert(0, str(code.resolve()))
    try:
        return importlib.import_module("pretrainmodels")
    except ImportError as error:
        raise ImportError(
            f"The original's code in {folder} needs {error.name}, which is not installed: pip install einops "
            "local-attention."
        ) from error
    finally:
        sys.path.remove(str(code.resolve()))
