"""scFoundation for transformers, datasets and AnnData.

Importing this package registers the model with the Auto classes of transformers, so that `AutoModel.from_pretrained`
finds it. Everything else is imported when it is first asked for.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import (
    ScFoundationForCellClassification,
    ScFoundationForPreTraining,
    ScFoundationModel,
)
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

if TYPE_CHECKING:
    from scfoundation_hf.corpus.lookup import lookup
    from scfoundation_hf.corpus.streaming import CorpusLoader, CorpusStream, load_corpus
    from scfoundation_hf.inference.annotation import annotate
    from scfoundation_hf.inference.calibration import Calibration
    from scfoundation_hf.inference.embedding import embed
    from scfoundation_hf.inference.enhancement import enhance
    from scfoundation_hf.inference.gene_embeddings import gene_embeddings
    from scfoundation_hf.inference.integration import integrate
    from scfoundation_hf.inference.onnx_export import export_onnx
    from scfoundation_hf.inference.reference_index import ReferenceIndex, index_reference
    from scfoundation_hf.modeling_scfoundation.freezing import freeze
    from scfoundation_hf.tokenization.data_collator import (
        RawCells,
        ScFoundationDataCollator,
        ScFoundationPackedDataCollator,
        ScFoundationReadDepthAwareCollator,
    )
    from scfoundation_hf.tokenization.gene_vocabulary import AlignmentReport, GeneVocabulary
    from scfoundation_hf.tokenization.read_depth_aware import ReadDepthAwareRecipe
    from scfoundation_hf.tokenization.tokenization_scfoundation import as_dataset
    from scfoundation_hf.trainer_scripts.convert_checkpoint import convert_checkpoint
    from scfoundation_hf.trainer_scripts.finetune import finetune
    from scfoundation_hf.trainer_scripts.pretrain import pretrain
    from scfoundation_hf.trainer_scripts.trainer import ScFoundationTrainer
    from scfoundation_hf.trainer_scripts.training_args import ScFoundationTrainingArguments

__version__ = _version("scfoundation-hf")

_LAZY = {
    "AlignmentReport": "scfoundation_hf.tokenization.gene_vocabulary",
    "Calibration": "scfoundation_hf.inference.calibration",
    "CorpusLoader": "scfoundation_hf.corpus.streaming",
    "CorpusStream": "scfoundation_hf.corpus.streaming",
    "GeneVocabulary": "scfoundation_hf.tokenization.gene_vocabulary",
    "RawCells": "scfoundation_hf.tokenization.data_collator",
    "ReadDepthAwareRecipe": "scfoundation_hf.tokenization.read_depth_aware",
    "ReferenceIndex": "scfoundation_hf.inference.reference_index",
    "ScFoundationDataCollator": "scfoundation_hf.tokenization.data_collator",
    "ScFoundationPackedDataCollator": "scfoundation_hf.tokenization.data_collator",
    "ScFoundationReadDepthAwareCollator": "scfoundation_hf.tokenization.data_collator",
    "ScFoundationTrainer": "scfoundation_hf.trainer_scripts.trainer",
    "ScFoundationTrainingArguments": "scfoundation_hf.trainer_scripts.training_args",
    "annotate": "scfoundation_hf.inference.annotation",
    "as_dataset": "scfoundation_hf.tokenization.tokenization_scfoundation",
    "convert_checkpoint": "scfoundation_hf.trainer_scripts.convert_checkpoint",
    "embed": "scfoundation_hf.inference.embedding",
    "enhance": "scfoundation_hf.inference.enhancement",
    "export_onnx": "scfoundation_hf.inference.onnx_export",
    "finetune": "scfoundation_hf.trainer_scripts.finetune",
    "freeze": "scfoundation_hf.modeling_scfoundation.freezing",
    "gene_embeddings": "scfoundation_hf.inference.gene_embeddings",
    "index_reference": "scfoundation_hf.inference.reference_index",
    "integrate": "scfoundation_hf.inference.integration",
    "load_corpus": "scfoundation_hf.corpus.streaming",
    "lookup": "scfoundation_hf.corpus.lookup",
    "pretrain": "scfoundation_hf.trainer_scripts.pretrain",
}

__all__ = [
    "AlignmentReport",
    "Calibration",
    "CorpusLoader",
    "CorpusStream",
    "GeneVocabulary",
    "RawCells",
    "ReadDepthAwareRecipe",
    "ReferenceIndex",
    "ScFoundationConfig",
    "ScFoundationDataCollator",
    "ScFoundationForCellClassification",
    "ScFoundationForPreTraining",
    "ScFoundationModel",
    "ScFoundationPackedDataCollator",
    "ScFoundationReadDepthAwareCollator",
    "ScFoundationTokenizer",
    "ScFoundationTrainer",
    "ScFoundationTrainingArguments",
    "__version__",
    "annotate",
    "as_dataset",
    "convert_checkpoint",
    "embed",
    "enhance",
    "export_onnx",
    "finetune",
    "freeze",
    "gene_embeddings",
    "index_reference",
    "integrate",
    "load_corpus",
    "lookup",
    "pretrain",
]

AutoConfig.register(ScFoundationConfig.model_type, ScFoundationConfig, exist_ok=True)
AutoModel.register(ScFoundationConfig, ScFoundationModel, exist_ok=True)
AutoModelForPreTraining.register(ScFoundationConfig, ScFoundationForPreTraining, exist_ok=True)
AutoModelForSequenceClassification.register(ScFoundationConfig, ScFoundationForCellClassification, exist_ok=True)
AutoTokenizer.register(ScFoundationConfig, ScFoundationTokenizer, exist_ok=True)

import_module("scfoundation_hf.inference.annotation_pipeline")  # registers pipeline("cell-annotation")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
