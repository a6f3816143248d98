"""The released `models.ckpt` -> a folder for `AutoModel.from_pretrained`. Also `scfoundation convert`.

python -m scfoundation_hf.trainer_scripts.convert_checkpoint models.ckpt scfoundation-cell --key cell
"""

import argparse
import json
from os import PathLike
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file

from scfoundation_hf.modeling_scfoundation.checkpoint_conversion import (
    CHECKPOINT_KEYS,
    UNUSED_NAMES,
    CheckpointKey,
    convert_config,
    convert_tensors,
    read_official_checkpoint,
)
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.modeling_scfoundation.saving import share_weights
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

from .model_card import OFFICIAL_LICENCE, TAGS
from .output_folder import check_output_folder, replacing

PURPOSES = {
    "cell": "cell embeddings",
    "rde": "cell embeddings after read-depth enhancement",
    "gene": "gene embeddings and predicted expression",
}
ORIGINAL_CONFIG_FILE = "original_config.json"
UNUSED_TENSORS_FILE = "original_unused_tensors.safetensors"
CARD = """---
{metadata}
---

# scFoundation, `{key}` weights, converted

The released scFoundation model for {purpose}: {parameters:,} parameters, converted from key `{key}` of the official
`models.ckpt` by scfoundation-hf. The numbers are those of the released file; only names and format have changed.

## Licence of the weights: non-commercial

The original authors license these weights for **non-commercial research only**, separately from their Apache-2.0 code.
The [licence of the weights]({license_link}) binds whoever uses or passes on this folder. scfoundation-hf ships no
weights; you converted your own copy.

## Use

```python
import scfoundation_hf

adata = scfoundation_hf.embed(adata, "path/to/this/folder")  # adds adata.obsm["X_scfoundation"]
```

## Files

- `model.safetensors`, `config.json`: weights and configuration for transformers
- `gene_vocabulary.tsv`, `tokenizer_config.json`: the tokenizer
- `original_config.json`: the configuration stored in the official file, unchanged
- `original_unused_tensors.safetensors`: what the official file holds beside the model, kept for the way back

## Citation

Hao, M. et al. Large-scale foundation model on single-cell transcriptomics. Nature Methods 21, 1481-1491 (2024).
https://doi.org/10.1038/s41592-024-02305-7
"""


def convert_checkpoint(
    checkpoint: str | PathLike[str],
    output: str | PathLike[str],
    *,
    key: CheckpointKey,
    overwrite: bool = False,
) -> Path:
    """Convert one of the three released models to a safetensors folder with tokenizer, original config and card.

    Args:
        checkpoint: the official `models.ckpt`; read without running any code in it.
        output: folder to make; it appears only when complete.
        key: "cell" for cell embeddings, "rde" for read-depth enhancement, "gene" for gene embeddings and expression.
        overwrite: replace a folder made by an earlier conversion.
    Returns: the folder.
    Raises: ValueError: if the file is no such checkpoint or any tensor does not fit, with the names; FileNotFoundError,
        FileExistsError: as the names say.
    """
    if key not in CHECKPOINT_KEYS:
        raise ValueError(f"There is no key {key!r}; choose {', '.join(CHECKPOINT_KEYS)}.")
    target = Path(output)
    check_output_folder(target, maker="a conversion", made_file=ORIGINAL_CONFIG_FILE, overwrite=overwrite)
    original = read_official_checkpoint(checkpoint, key=key)
    config = convert_config(original.config, original.tensors)
    tokenizer = ScFoundationTokenizer()
    if config.num_genes != len(tokenizer.vocabulary):
        raise ValueError(
            f"The checkpoint has {config.num_genes:,} genes, the published vocabulary {len(tokenizer.vocabulary):,}."
        )
    model = ScFoundationForPreTraining(config)
    model.load_state_dict(convert_tensors(original.tensors, config))

    with replacing(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        stored_config = json.dumps(original.config, indent=2, ensure_ascii=False)
        (folder / ORIGINAL_CONFIG_FILE).write_text(stored_config + "\n", encoding="utf-8")
        unused = {name: original.tensors[name].contiguous() for name in UNUSED_NAMES}
        save_file(unused, folder / UNUSED_TENSORS_FILE)
        _make_card(key, model.num_parameters()).save(folder / "README.md")
        share_weights(folder)
    return target


def _make_card(key: CheckpointKey, num_parameters: int) -> ModelCard:
    metadata = ModelCardData(**OFFICIAL_LICENCE, library_name="transformers", tags=TAGS)
    content = CARD.format(
        metadata=metadata.to_yaml(),
        key=key,
        purpose=PURPOSES[key],
        parameters=num_parameters,
        license_link=OFFICIAL_LICENCE["license_link"],
    )
    return ModelCard(content)


def main() -> None:
    """Convert from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--key", choices=CHECKPOINT_KEYS, required=True)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    print(convert_checkpoint(arguments.checkpoint, arguments.output, key=arguments.key, overwrite=arguments.overwrite))


if __name__ == "__main__":
    main()
