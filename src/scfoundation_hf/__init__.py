"""scFoundation for transformers, datasets and AnnData.

Importing this package registers the model with the Auto classes of transformers, so that `AutoModel.from_pretrained`
finds it. Everything else is imported when it is first asked for.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, AutoTokenizer

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import (
    ScFoundationForPreTraining,
    ScFoundationModel,
)
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

if TYPE_CHECKING:
    from scfoundation_hf.inference.embedding import embed
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

__version__ = _version("scfoundation-hf")

_LAZY = {
    "AlignmentReport": "scfoundation_hf.tokenization.gene_vocabulary",
    "GeneVocabulary": "scfoundation_hf.tokenization.gene_vocabulary",
    "RawCells": "scfoundation_hf.tokenization.data_collator",
    "ReadDepthAwareRecipe": "scfoundation_hf.tokenization.read_depth_aware",
    "ScFoundationDataCollator": "scfoundation_hf.tokenization.data_collator",
    "ScFoundationPackedDataCollator": "scfoundation_hf.tokenization.data_collator",
    "ScFoundationReadDepthAwareCollator": "scfoundation_hf.tokenization.data_collator",
    "as_dataset": "scfoundation_hf.tokenization.tokenization_scfoundation",
    "convert_checkpoint": "scfoundation_hf.trainer_scripts.convert_checkpoint",
    "embed": "scfoundation_hf.inference.embedding",
}

__all__ = [
    "AlignmentReport",
    "GeneVocabulary",
    "RawCells",
    "ReadDepthAwareRecipe",
    "ScFoundationConfig",
    "ScFoundationDataCollator",
    "ScFoundationForPreTraining",
    "ScFoundationModel",
    "ScFoundationPackedDataCollator",
    "ScFoundationReadDepthAwareCollator",
    "ScFoundationTokenizer",
    "__version__",
    "as_dataset",
    "convert_checkpoint",
    "embed",
]

AutoConfig.register(ScFoundationConfig.model_type, ScFoundationConfig, exist_ok=True)
AutoModel.register(ScFoundationConfig, ScFoundationModel, exist_ok=True)
AutoModelForPreTraining.register(ScFoundationConfig, ScFoundationForPreTraining, exist_ok=True)
AutoTokenizer.register(ScFoundationConfig, ScFoundationTokenizer, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
