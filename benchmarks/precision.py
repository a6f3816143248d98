"""How far a cell's numbers move with its company, its layout, the attention backend and the dtype.

    python benchmarks/precision.py [--preset 100m] [--cells 4]

Real cells of different lengths (the repository's example cells), random weights. Every row is the largest absolute
difference from the same cell computed alone by sdpa in float32; behind it the largest absolute value itself.
"""

import argparse
import copy
import time
from pathlib import Path

import anndata
import numpy as np
import torch

import scfoundation_hf
from scfoundation_hf.tokenization.data_collator import as_tensors, pack_cells

CELLS = Path(__file__).parents[1] / "examples" / "data" / "zheng_facs_pbmc_cut.h5ad"


def draw_cells(num_cells: int) -> anndata.AnnData:
    """Cells from the shortest to the longest of the file."""
    cells = anndata.read_h5ad(CELLS)
    by_length = np.argsort(np.diff(cells.X.indptr))
    return cells[by_length[np.linspace(0, cells.n_obs - 1, num_cells).astype(int)]].copy()


@torch.inference_mode()
def main() -> None:
    """Print one row a way of computing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="100m", choices=["3m", "10m", "100m"])
    parser.add_argument("--cells", type=int, default=4)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = scfoundation_hf.ScFoundationTokenizer()
    config = scfoundation_hf.ScFoundationConfig.from_preset(arguments.preset)
    model = scfoundation_hf.ScFoundationForPreTraining(config).eval()
    model.scfoundation.add_pooling_layer = True
    cells = draw_cells(arguments.cells)
    alone = [tokenizer(cells[row : row + 1].copy()) for row in range(cells.n_obs)]
    padded, reverse = tokenizer(cells), tokenizer(cells[::-1].copy())
    packed = as_tensors(pack_cells(tokenizer.prepare(cells).encode(0, cells.n_obs)), "pt")
    embeddings = torch.cat([model.scfoundation(**batch).pooler_output for batch in alone])
    expression = torch.cat([model(**batch).predicted_values for batch in alone])
    print(
        f"{arguments.preset}, cells of {[batch['input_ids'].shape[1] for batch in alone]} tokens, {time.strftime('%F')}"
    )

    def show(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        difference, scale = (got.float() - expected).abs().max(), expected.abs().max()
        cosine = torch.cosine_similarity(got.float(), expected).min()
        print(f"{what:<44} {difference:.1e} of {scale:.2f}; smallest cosine {cosine:.6f}", flush=True)

    low = copy.deepcopy(model).to(torch.bfloat16)
    for dtype, of_dtype in (("float32", model), ("bfloat16", low)):
        for backend in ("sdpa", "eager"):
            of_dtype.set_attn_implementation(backend)
            encoder = of_dtype.scfoundation
            show(f"embeddings, {dtype}, {backend}, padded", encoder(**padded).pooler_output, embeddings)
            show(f"embeddings, {dtype}, {backend}, packed", encoder(**packed).pooler_output, embeddings)
            show(f"embeddings, {dtype}, {backend}, reversed", encoder(**reverse).pooler_output.flip(0), embeddings)
        of_dtype.set_attn_implementation("sdpa")
        show(f"predicted values, {dtype}, sdpa, padded", of_dtype(**padded).predicted_values, expression)
        show(f"predicted values, {dtype}, sdpa, packed", of_dtype(**packed).predicted_values, expression)


if __name__ == "__main__":
    main()
