"""`make demo`: real human cells embedded through `AutoModel`, in a few minutes on two CPU cores.

The model is examples/reference-model: the published architecture at the 3M size, pretrained for minutes on sixteen
thousand cells, not on the paper's fifty million, and on none of these. It shows that every part works and what so small
a model sees; for embeddings to rely on, convert the released weights (see the README).
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
EXAMPLES = Path(__file__).parent
CELLS = EXAMPLES / "data" / "zheng_facs_pbmc_cut.h5ad"
MODEL = EXAMPLES / "reference-model"
TITLE = "800 sorted blood cells, embedded by the small reference model, which has not seen them"


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
    """Embed the cells and draw them; everything is written under the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    output = parser.parse_args().output
    output.mkdir(exist_ok=True)
    print(__doc__)
    show_auto_classes(MODEL)
    embedded = scfoundation_hf.embed(CELLS, MODEL, output=output / "embedded.h5ad", overwrite=True)
    report = anndata.read_h5ad(embedded).uns["scfoundation"]["X_scfoundation"]
    (output / "report.json").write_text(report + "\n", encoding="utf-8")
    draw(embedded, output / "umap.png")
    for path in sorted(output.iterdir()):
        print(f"  {path}")


if __name__ == "__main__":
    main()
