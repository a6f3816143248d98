"""What smaller weights cost in accuracy: embeddings of real cells against those of the float32 model.

    python benchmarks/reduced_weights.py [--model DIR | --preset 3m] [--cells 40]

bfloat16: weights stored in 16 bits and computed with in float32. int8: onnxruntime's dynamic quantisation. Errors are
the largest absolute difference over the largest absolute value; "same neighbour" is the share of cells whose nearest
other cell stays the same. Without --model the weights are random, which says less: trained weights have outliers.
"""

import argparse
import tempfile
import time
from pathlib import Path

import anndata
import numpy as np
import torch

import scfoundation_hf
from scfoundation_hf.inference.onnx_export import INPUT_NAMES, export_onnx

CELLS = Path(__file__).parents[1] / "examples" / "data" / "zheng_facs_pbmc_cut.h5ad"


def nearest(embeddings: np.ndarray) -> np.ndarray:
    """The nearest other cell of each, by cosine of the centred embeddings."""
    centred = embeddings - embeddings.mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -1)
    return similarity.argmax(axis=1)


def main() -> None:
    """Print one row a kind of weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; default: random weights")
    parser.add_argument("--preset", default="3m", choices=["3m", "10m", "100m"])
    parser.add_argument("--cells", type=int, default=40)
    arguments = parser.parse_args()
    import onnxruntime

    torch.manual_seed(0)
    if arguments.model:
        model = scfoundation_hf.ScFoundationModel.from_pretrained(arguments.model).eval()
    else:
        model = scfoundation_hf.ScFoundationModel(
            scfoundation_hf.ScFoundationConfig.from_preset(arguments.preset)
        ).eval()
    cells = anndata.read_h5ad(CELLS)
    rows = np.linspace(0, cells.n_obs - 1, arguments.cells).astype(int)
    tokenizer = scfoundation_hf.ScFoundationTokenizer()
    batches = [tokenizer(cells[row : row + 1].copy(), gene_column="symbol") for row in rows]

    def by_torch() -> np.ndarray:
        with torch.inference_mode():
            return torch.cat([model(**batch).pooler_output for batch in batches]).numpy()

    def by_onnx(file: Path) -> np.ndarray:
        session = onnxruntime.InferenceSession(file)
        inputs = [{name: batch[name].numpy() for name in INPUT_NAMES} for batch in batches]
        return np.concatenate([session.run(["pooler_output"], given)[0] for given in inputs])

    expected = by_torch()
    print(f"{arguments.model or arguments.preset + ', random weights'}, {len(rows)} cells, {time.strftime('%F')}")

    def show(what: str, found: np.ndarray, num_bytes: int) -> None:
        error = np.abs(found - expected).max() / np.abs(expected).max()
        cosine = torch.cosine_similarity(torch.from_numpy(found), torch.from_numpy(expected)).min()
        same = (nearest(found) == nearest(expected)).mean()
        print(
            f"{what:<16} {num_bytes / 2**20:7.1f} MiB  error {error:.1e}  smallest cosine {cosine:.6f}  "
            f"same neighbour {same:.0%}",
            flush=True,
        )

    num_weights = sum(tensor.numel() for tensor in model.state_dict().values())
    with tempfile.TemporaryDirectory() as folder:
        for weights in ("float32", "int8"):
            file = export_onnx(model, Path(folder) / f"{weights}.onnx", weights=weights)
            show(f"ONNX, {weights}", by_onnx(file), file.stat().st_size)
    model.to(torch.bfloat16).to(torch.float32)
    show("bfloat16", by_torch(), 2 * num_weights)


if __name__ == "__main__":
    main()
