"""scFoundation in one screen: cells in, embeddings, predicted expression or cell types out.

Reading order: `embeddings.py`, `encoder.py` (with `attention.py`, `dropout.py`), `pooling.py`; then `decoder.py` (with
`linear_attention.py`), `classification_head.py` and `losses.py`. Batches are padded or packed;
docs/batch-contract.md gives every key.
"""
# B cells, N tokens, G genes, M targets, C cell types, D encoder width, E decoder width

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import (
    ModelOutput,
    TransformersKwargs,
    can_return_tuple,
    merge_with_config_defaults,
)
from transformers.utils.output_capturing import capture_outputs

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig

from .attention import cell_of_token, prepare_attention
from .classification_head import ScFoundationClassificationHead
from .decoder import ScFoundationDecoder, ScFoundationLinearAttention
from .embeddings import ScFoundationBinScores, ScFoundationEmbeddings, ScFoundationValueEmbedding
from .encoder import ScFoundationEncoder, ScFoundationEncoderLayer, ScFoundationSelfAttention
from .linear_attention import draw_orthogonal_projection
from .losses import cell_classification_loss, masked_mean_squared_error
from .pooling import max_of_pooled, pool_cells, pool_packed_cells
from .saving import SavedWithCode

logger = logging.get_logger(__name__)

DECODER_KEYS = (r"^decoder\.", r"^gene_norm\.", r"^prediction_head\.")  # what only ScFoundationForPreTraining reads


@dataclass
class ScFoundationForPreTrainingOutput(ModelOutput):
    """What the decoder says of each cell.

    Args:
        loss: scalar, when `labels` were given.
        predicted_values: `(B, M)` log1p(CP10k) at `target_ids`, 0 at padded targets; `(B, G)` without
            `target_ids`.
        gene_embeddings: `(B, G, E)` context-dependent gene vectors, with `output_gene_embeddings=True`.
        last_hidden_state: `(B, N, D)` encoder output, `(1, L, D)` if packed.
        hidden_states: encoder states before and after each layer, with `output_hidden_states=True`.
        attentions: encoder attention weights, with `output_attentions=True` and the eager backend.
    """

    loss: Tensor | None = None
    predicted_values: Tensor | None = None
    gene_embeddings: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ScFoundationPreTrainedModel(SavedWithCode, PreTrainedModel):
    """What all scFoundation models share: configuration, initialisation, supported backends.

    The class attributes are what `PreTrainedModel` asks of its subclasses, in the form it asks for.
    """

    config: ScFoundationConfig
    base_model_prefix = "scfoundation"
    main_input_name = "input_ids"
    _input_embed_layer = "identity_embedding"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScFoundationEncoderLayer", "ScFoundationDecoderLayer", "ScFoundationValueEmbedding"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ScFoundationEncoderLayer, "attentions": ScFoundationSelfAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        table_std = self.config.embedding_initializer_range
        # Each tensor by the module that holds it: transformers passes over modules without tensors of their own.
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=table_std)
        elif isinstance(module, ScFoundationBinScores):
            # Drawn wide: with small first weights every value would fall into the same mixture of bins.
            init.normal_(module.weight)
            init.normal_(module.bias)
        elif isinstance(module, ScFoundationValueEmbedding):
            init.normal_(module.bin_embeddings)
            init.normal_(module.mask_embedding, std=table_std)
        elif isinstance(module, ScFoundationLinearAttention):
            init.copy_(module.projection, draw_orthogonal_projection(*module.projection.shape))


class ScFoundationModel(ScFoundationPreTrainedModel):
    """The encoder: embeds cells from their expressed genes."""

    # A folder written by a model with a head holds that too, which this class does not need.
    _keys_to_ignore_on_load_unexpected = [*DECODER_KEYS, r"^classifier\."]  # noqa: RUF012

    def __init__(self, config: ScFoundationConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = ScFoundationEmbeddings(config)
        self.encoder = ScFoundationEncoder(config)
        self.add_pooling_layer = add_pooling_layer
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode cells.

        Args:
            input_ids: `(B, N)` int64, expressed genes, then T, S and padding; `(1, L)` if packed.
            values: `(B, N)` float32, log1p(CP10k) of genes, log10 counts at T and S; `(1, L)` if packed.
            attention_mask: `(B, N)`, 1 for real tokens; left out: all but the padding id.
            cu_seq_lens_q: `(B + 1,)` borders of the cells, only for a packed batch; `max_length_q` may go
                with it.
        Returns: `last_hidden_state` `(B, N, D)`, `pooler_output` `(B, 4 * D)` = [S, T, max, mean over genes];
            hidden states and attentions on request.
        Raises: ValueError: if a cell has no expressed gene, or a packed batch has several rows or a mask.
        """
        cu_seq_lens = kwargs.get("cu_seq_lens_q")
        if cu_seq_lens is not None and (len(input_ids) != 1 or attention_mask is not None):
            raise ValueError(
                "cu_seq_lens_q announces a packed batch: one row of tokens, no attention_mask. Got input_ids "
                f"of shape {tuple(input_ids.shape)} {'without' if attention_mask is None else 'and an'} "
                "attention_mask."
            )
        if kwargs.get("output_attentions") and self.config._attn_implementation != "eager":
            logger.warning_once(
                f"The attention backend {self.config._attn_implementation!r} does not return attention weights, "
                "so `attentions` will be empty; call model.set_attn_implementation('eager') first."
            )
        if attention_mask is None:
            attention_mask = input_ids.ne(self.config.num_positions).long()  # padding's id is the one behind all
        embeddings = self.embeddings(input_ids, values)
        layout = prepare_attention(
            self.config, embeddings, attention_mask, cu_seq_lens, max_length=kwargs.get("max_length_q")
        )
        last_hidden_state = self.encoder(embeddings, layout)
        pooled = None
        if self.add_pooling_layer and cu_seq_lens is not None:
            pooled = pool_packed_cells(last_hidden_state, cu_seq_lens)
        elif self.add_pooling_layer:
            pooled = pool_cells(last_hidden_state, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=pooled)


class ScFoundationForPreTraining(ScFoundationPreTrainedModel):
    """Encoder and decoder: predicts the expression of every gene, hidden or not, at the target depth."""

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__(config)
        self.scfoundation = ScFoundationModel(config, add_pooling_layer=False)
        self.decoder = ScFoundationDecoder(config)
        self.gene_norm = nn.LayerNorm(config.decoder_hidden_size, eps=config.layer_norm_eps)
        self.prediction_head = nn.Linear(config.decoder_hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        masked_ids: Tensor | None = None,
        target_ids: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_ids: Tensor | None = None,
        decoder_weights: Tensor | None = None,
        output_gene_embeddings: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ScFoundationForPreTrainingOutput:
        """Predict expression.

        Args:
            input_ids: `(B, N)` int64, visible expressed genes, then T, S and padding; `(1, L)` if packed.
            values: `(B, N)` float32, log1p(CP10k) of genes, log10 counts at T and S; `(1, L)` if packed.
            attention_mask: `(B, N)`, 1 for real tokens; left out: all but the padding id.
            masked_ids: `(B, K)` genes hidden from the encoder and shown to the decoder as the mask embedding.
            target_ids: `(B, M)` positions whose value is wanted, padded with the padding id; left out: all
                genes.
            labels: float32 of the shape of `target_ids`, or `(B, G)` without; -100 where there is none.
            decoder_ids: `(B, P)` rising: show the decoder these positions only, all visible, hidden and target
                ones among them; the RDA collator draws them. Predictions then approximate those from all.
            decoder_weights: float32 `(B, P)` how often each of them counts as a key.
            output_gene_embeddings: return the decoder's vector of every gene.
            num_items_in_batch: divisor of the loss, when it is a part of a larger batch.
            cu_seq_lens_q: `(B + 1,)` borders of the cells, only for a packed batch.
        Raises: ValueError: if `decoder_ids` come without `target_ids`, or with `output_gene_embeddings`.
        """
        if decoder_ids is not None and (target_ids is None or output_gene_embeddings):
            raise ValueError(
                "decoder_ids shows the decoder a part of the genes, so it cannot predict or embed all of them: "
                "give target_ids and leave output_gene_embeddings, or leave decoder_ids."
            )
        encoded = self.scfoundation(input_ids, values, attention_mask, **kwargs)
        if attention_mask is not None:  # what the mask hides from the encoder must not reach a gene of the decoder
            input_ids = input_ids.masked_fill(attention_mask == 0, self.config.num_positions)
        every_gene = output_gene_embeddings or target_ids is None
        decoded = self._decode(
            encoded.last_hidden_state,
            input_ids,
            masked_ids,
            kwargs.get("cu_seq_lens_q"),
            target_ids=None if every_gene else target_ids,
            decoder_ids=decoder_ids,
            decoder_weights=decoder_weights,
        )
        gene_embeddings = self.gene_norm(decoded[:, : self.config.num_genes] if every_gene else decoded)
        predicted_values = self.prediction_head(gene_embeddings).squeeze(-1)
        if target_ids is not None:
            is_padding = target_ids.eq(self.config.num_positions)
            if every_gene:
                predicted_values = predicted_values.gather(1, target_ids.masked_fill(is_padding, 0))
            predicted_values = predicted_values.masked_fill(is_padding, 0)
        loss = None
        if labels is not None:
            loss = masked_mean_squared_error(
                predicted_values, labels, num_items_in_batch=kwargs.get("num_items_in_batch")
            )
        return ScFoundationForPreTrainingOutput(
            loss=loss,
            predicted_values=predicted_values,
            gene_embeddings=gene_embeddings if output_gene_embeddings else None,
            last_hidden_state=encoded.last_hidden_state,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _decode(
        self,
        encoder_states: Tensor,
        input_ids: Tensor,
        masked_ids: Tensor | None,
        cu_seq_lens: Tensor | None,
        *,
        target_ids: Tensor | None,
        decoder_ids: Tensor | None,
        decoder_weights: Tensor | None,
    ) -> Tensor:
        """Decoder states of all positions, `(B, G + 2, E)`, or of the targets, `(B, M, E)`."""
        embeddings = self.scfoundation.embeddings
        padding_id = self.config.num_positions
        every_id = torch.arange(self.config.num_positions, device=input_ids.device)[None]
        # The identity enters encoded tokens a second time here; the pretrained weights rely on it.
        placed_states = encoder_states + embeddings.identity_embedding(input_ids)
        placed_ids = input_ids
        if cu_seq_lens is not None:
            placed_states, placed_ids = _unpack(placed_states, input_ids, cu_seq_lens, padding_id=padding_id)
        if masked_ids is not None:
            is_hidden = torch.zeros(len(placed_ids), padding_id + 1, dtype=torch.bool, device=input_ids.device)
            is_hidden = is_hidden.scatter(1, masked_ids, True)
            placed_ids = placed_ids.masked_fill(is_hidden.gather(1, placed_ids), padding_id)
            placed_states = torch.cat([placed_states, embeddings(masked_ids, None)], dim=1)
            placed_ids = torch.cat([placed_ids, masked_ids], dim=1)
        if target_ids is not None:
            target_ids = target_ids.masked_fill(target_ids.eq(padding_id), 0)
        return self.decoder(
            zero_states=embeddings(every_id, torch.zeros(1, 1, device=input_ids.device))[0],
            placed_states=placed_states,
            placed_ids=placed_ids,
            target_ids=target_ids,
            decoder_ids=decoder_ids,
            decoder_weights=decoder_weights,
        )


def _unpack(states: Tensor, input_ids: Tensor, cu_seq_lens: Tensor, *, padding_id: int) -> tuple[Tensor, Tensor]:
    """Packed tokens `(1, L, D)` and `(1, L)` with one row a cell: `(B, N, D)` and `(B, N)`, padded."""
    cells = cell_of_token(cu_seq_lens, input_ids.shape[1])
    slots = torch.arange(input_ids.shape[1], device=input_ids.device) - cu_seq_lens.long()[cells]
    shape = (len(cu_seq_lens) - 1, int(cu_seq_lens.diff().max()))
    padded_states = states.new_zeros((*shape, states.shape[-1])).index_put((cells, slots), states[0])
    padded_ids = input_ids.new_full(shape, padding_id).index_put((cells, slots), input_ids[0])
    return padded_states, padded_ids


class ScFoundationForCellClassification(ScFoundationPreTrainedModel):
    """Encoder and classification head: names the type of each cell.

    A folder written by `ScFoundationForPreTraining` or `ScFoundationModel` loads into it; only the head is new then.

    Raises: ValueError: for fewer than two classes, or class weights that do not fit loss and classes.
    """

    _keys_to_ignore_on_load_unexpected = list(DECODER_KEYS)  # noqa: RUF012
    # Batch norm divides differences by a spread that may be small beside the values: bfloat16 has too few digits.
    _keep_in_fp32_modules_strict = ["classifier"]  # noqa: RUF012

    def __init__(self, config: ScFoundationConfig) -> None:
        super().__init__(config)
        if config.num_labels is None or config.num_labels < 2:
            raise ValueError(
                f"num_labels is {config.num_labels}, but telling cell types apart takes at least 2; set num_labels or "
                "id2label to the types to choose from."
            )
        config.validate_classification()  # `from_pretrained` sets fields one by one, behind the config's own check
        self.scfoundation = ScFoundationModel(config)
        self.classifier = ScFoundationClassificationHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Score cell types.

        Args:
            input_ids: `(B, N)` int64, expressed genes, then T, S and padding; `(1, L)` if packed.
            values: `(B, N)` float32, log1p(CP10k) of genes, log10 counts at T and S; `(1, L)` if packed.
            attention_mask: `(B, N)`, 1 for real tokens; left out: all but the padding id.
            labels: `(B,)` int64, places in `config.id2label`; -100 for cells without a label.
            num_items_in_batch: divisor of the loss, when it is a part of a larger batch.
            cu_seq_lens_q: `(B + 1,)` borders of the cells, only for a packed batch.
        Returns: `logits` `(B, C)`; `loss` with `labels`; hidden states and attentions on request.
        Raises: ValueError: if a cell has no expressed gene, a label is no class, or the first training batch has one
            cell.
        """
        encoded = self.scfoundation(input_ids, values, attention_mask, **kwargs)
        logits = self.classifier(self.pool(encoded.pooler_output))
        loss = None
        if labels is not None:
            loss = self.compute_loss(logits, labels, num_items_in_batch=kwargs.get("num_items_in_batch"))
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )

    def pool(self, pooler_output: Tensor) -> Tensor:
        """What `classifier` takes of the encoder's `pooler_output` `(B, 4 * D)`: all of it, or the max `(B, D)`."""
        return pooler_output if self.config.classifier_pooling == "all" else max_of_pooled(pooler_output)

    def compute_loss(self, logits: Tensor, labels: Tensor, *, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The configured loss of `(B, C)` logits and `(B,)` labels, as `cell_classification_loss` has it."""
        return cell_classification_loss(
            logits,
            labels,
            kind=self.config.classification_loss,
            class_weights=self.config.class_weights,
            focal_gamma=self.config.focal_gamma,
            num_items_in_batch=num_items_in_batch,
        )


__all__ = [
    "ScFoundationForCellClassification",
    "ScFoundationForPreTraining",
    "ScFoundationModel",
    "ScFoundationPreTrainedModel",
]
