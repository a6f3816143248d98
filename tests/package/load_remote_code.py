"""Load an exported model as somebody without scfoundation-hf does, and write what it computes.

python load_remote_code.py MODEL CELLS.npz OUTPUTS.npz

MODEL is a folder or Hub id; CELLS.npz holds `counts` (cells, genes) and `gene_names`. Needs torch, transformers, numpy,
scipy and safetensors; scfoundation_hf is blocked, so that it makes no difference whether it is installed.
"""

import os
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()


class BlockThePackage:
    """A finder that knows no scfoundation_hf and lets nobody else look for it."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "scfoundation_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(model: str, cells: str, outputs: str, revision: str = "main") -> None:
    sys.meta_path.insert(0, BlockThePackage())
    import numpy as np
    import torch
    import transformers
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForPreTraining,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    options = {"trust_remote_code": True, "revision": revision}
    given = np.load(cells, allow_pickle=True)
    config = AutoConfig.from_pretrained(model, **options)
    assert config.model_type == "scfoundation"
    tokenizer = AutoTokenizer.from_pretrained(model, **options)
    batch = tokenizer(given["counts"], gene_names=given["gene_names"])
    encoder = AutoModel.from_pretrained(model, **options).eval()
    is_classifier = config.architectures == ["ScFoundationForCellClassification"]
    auto_class = AutoModelForSequenceClassification if is_classifier else AutoModelForPreTraining
    whole = auto_class.from_pretrained(model, **options).eval()
    for loaded in (config, tokenizer, encoder, whole):
        assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    with torch.inference_mode():
        pooled = encoder(**batch).pooler_output
        if is_classifier:
            predicted = whole(**batch).logits
        else:
            predicted = whole(**batch, target_ids=batch["input_ids"][:, :5]).predicted_values
    # Saved from there, the code goes along again.
    again = tempfile.mkdtemp()
    whole.save_pretrained(again, include_code=True)
    tokenizer.save_pretrained(again)
    with torch.inference_mode():
        repeated = AutoModel.from_pretrained(again, trust_remote_code=True).eval()(**batch).pooler_output
    assert torch.equal(repeated, pooled)
    for name, make in (("preset", lambda: type(config).from_preset("3m")), ("vocabulary", type(tokenizer))):
        message = ""
        try:
            make()
        except FileNotFoundError as error:
            message = str(error)
        assert "install scfoundation-hf" in message, f"{name}: {message!r}"
    assert "scfoundation_hf" not in sys.modules
    np.savez(outputs, pooled=pooled, predicted=predicted, ids=batch["input_ids"], values=batch["values"])
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: loaded {model} without the package")


if __name__ == "__main__":
    main(*sys.argv[1:])
