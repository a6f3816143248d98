"""`transformers.pipeline("cell-annotation", model=DIR)`: cells in, their types and scores out.

The form transformers' users know, for scripts and services.
"""

from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import ChunkPipeline

from scfoundation_hf.tokenization.data_collator import as_tensors, pack_cells
from scfoundation_hf.tokenization.tokenization_scfoundation import CellData

from .calibration import Calibration

TASK = "cell-annotation"
ENTRIES_PER_BATCH = 8_192


class CellAnnotationPipeline(ChunkPipeline):
    """Names the type of each cell with a fine-tuned `ScFoundationForCellClassification`.

    Takes what the tokenizer takes: an AnnData, a .h5ad or .zarr path, a matrix with `gene_names=`, a DataFrame; or a
    list of these. Any option of the tokenizer may be given with it (`gene_column=`, `layer=`, `values=`, ...). `top_k`
    asks for the best k types of each cell.

    Gives one entry a cell, in order: `{"label", "score"}`, or with `top_k` a list of them; None for cells that are
    left out (`on_empty_cell="nan"`, `min_genes`). Scores are calibrated where the model's folder holds a
    `calibration.json`, and then those of `annotate`; the verdict "unassigned" is given by `annotate` only.
    """

    _load_tokenizer: Any = True
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False

    @cached_property
    def _calibration(self) -> Calibration:
        return Calibration.load(self.model) or Calibration(temperature=1.0, unassigned_below=0.0)

    def _sanitize_parameters(self, top_k: int | None = None, **input_options: Any) -> tuple[dict, dict, dict]:
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1.")
        return input_options, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, cells: CellData, **input_options: Any) -> Any:  # type: ignore[override]
        """Packed batches; of each, which of its cells are kept."""
        assert self.tokenizer is not None
        with self.tokenizer.prepare(cells, **input_options) as prepared:
            for start, stop in prepared.chunks(max_entries=ENTRIES_PER_BATCH):
                encoded = prepared.encode(start, stop)
                batch = as_tensors(pack_cells(encoded), "pt") if len(encoded) else {}
                yield {
                    "batch": batch,
                    "is_kept": torch.from_numpy(prepared.is_kept[start:stop]),
                    "is_last": stop == prepared.num_cells,
                }

    def _forward(self, model_inputs: dict[str, Any], **_: Any) -> Any:  # type: ignore[override]
        batch = model_inputs.pop("batch")
        logits = self.model(**batch).logits if batch else torch.empty(0, len(self.model.config.id2label or {}))
        return {**model_inputs, "logits": logits}

    def postprocess(self, model_outputs: Any, top_k: int | None = None) -> list[Any]:  # type: ignore[override]
        """Logits to types and scores."""
        names: Any = self.model.config.id2label
        results: list[Any] = []
        for output in model_outputs:
            scores, classes = self._calibration.probabilities(output["logits"]).sort(dim=-1, descending=True)
            ranked = [
                [{"label": names[int(number)], "score": float(score)} for number, score in zip(*cell, strict=True)]
                for cell in zip(classes[:, : top_k or 1], scores[:, : top_k or 1], strict=True)
            ]
            kept = iter(ranked if top_k is not None else [best for (best,) in ranked])
            results += [next(kept) if is_kept else None for is_kept in output["is_kept"].tolist()]
        return results


if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=CellAnnotationPipeline, pt_model=AutoModelForSequenceClassification, type="text"
    )
