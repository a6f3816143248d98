"""`make demo`: real human cells embedded through `AutoModel`, in a few minutes on two CPU cores.

The model is NOT trained: it has the published architecture at the 3M size and random weights. So this shows that every
part works, not what scFoundation knows: expect the picture to follow read depth, which even random weights see, and the
most distinct types at best. For embeddings that mean something, convert the released weights (see the README).
"""

import argparse
from pathlib import Path

import anndata
import matplotlib
import numpy as np
import scanpy as sc
import torch
from transformers import AutoModel, AutoTokenizer

import scfoundation_hf

matplotlib.use("Agg")
CELLS = Path(__file__).parent / "data" / "zheng_facs_pbmc_cut.h5ad"
TITLE = "800 sorted blood cells, embedded by a model of the 3M size with RANDOM weights (not trained)"


def make_model(folder: Path) -> Path:
    """Save an untrained model of the 3M size, with its tokenizer, as a released one would be."""
    torch.manual_seed(0)
    config = scfoundation_hf.ScFoundationConfig.from_preset("3m")
    scfoundation_hf.ScFoundationForPreTraining(config).save_pretrained(folder)
    scfoundation_hf.ScFoundationTokenizer().save_pretrained(folder)
    return folder


def show_auto_classes(folder: Path) -> None:
    """The transformers way: tokenizer and model by name, a batch in, embeddings out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(anndata.read_h5ad(CELLS)[:8], gene_column="symbol")
    with torch.inference_mode():
        output = model(**batch)
    print(f"AutoModel -> {type(model).__name__}: {tuple(batch['input_ids'].shape)} tokens in,", end=" ")
    print(f"pooler_output {tuple(output.pooler_output.shape)} out")


def draw(embedded: Path, picture: Path) -> None:
    """Neighbours and a UMAP of the embeddings, coloured by the true labels and by read depth."""
    cells = anndata.read_h5ad(embedded)
    cells.obs["log10 total counts"] = np.log10(np.asarray(cells.X.sum(axis=1)).ravel())
    cells.obsm["X_pca_of_embedding"] = sc.pp.pca(cells.obsm["X_scfoundation"], n_comps=30, random_state=0)
    sc.pp.neighbors(cells, use_rep="X_pca_of_embedding", random_state=0)
    sc.tl.umap(cells, random_state=0)
    figure = sc.pl.umap(
        cells,
        color=["cell_type", "log10 total counts"],
        title=["the ten sorted types", "read depth (log10 total counts)"],
        show=False,
        return_fig=True,
        wspace=0.75,
        frameon=False,
    )
    figure.suptitle(TITLE, fontsize=11, y=1.04)
    figure.savefig(picture, dpi=110, bbox_inches="tight")


def main() -> None:
    """Make the model, embed the cells, draw them; everything is written under the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    output = parser.parse_args().output
    output.mkdir(exist_ok=True)
    print(__doc__)
    model = make_model(output / "untrained-3m")
    show_auto_classes(model)
    embedded = scfoundation_hf.embed(CELLS, model, output=output / "embedded.h5ad", overwrite=True)
    report = anndata.read_h5ad(embedded).uns["scfoundation"]["X_scfoundation"]
    (output / "report.json").write_text(report + "\n", encoding="utf-8")
    draw(embedded, output / "umap.png")
    for path in sorted(output.iterdir()):
        print(f"  {path}")


if __name__ == "__main__":
    main()
