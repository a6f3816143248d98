"""Does "unassigned" find cell types that nobody taught? Each type is left out in turn, then shown.

    python benchmarks/unknown_cell_types.py --model DIR [--data FILE --label COLUMN --gene-column COLUMN]
        [--methods neighbors classifier] [--types TYPE ...] [--freezing head] [--output FILE.json]

Of the other types 8 in 10 cells are the reference ("neighbors", `ReferenceIndex`) or the training and validation cells
("classifier", `finetune` then `annotate`); the last fifth are the known cells asked for, beside all cells of the type
left out. AUROC says how well confidence and distance tell the two apart (0.5: not at all), the shares how many of each
are called unassigned at the threshold that the method sets without having seen an unknown cell.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from anndata import AnnData
from sklearn.metrics import roc_auc_score

from scfoundation_hf.inference.annotation import UNASSIGNED, annotate
from scfoundation_hf.inference.embedding import embed
from scfoundation_hf.inference.reference_index import ReferenceIndex
from scfoundation_hf.trainer_scripts.cell_splits import split_cells
from scfoundation_hf.trainer_scripts.finetune import finetune

CELLS = Path(__file__).parents[1] / "examples" / "data" / "zheng_facs_pbmc_cut.h5ad"


def scores(is_unknown: np.ndarray, *, is_unassigned: np.ndarray, **doubts: np.ndarray) -> dict[str, float]:
    """AUROC of each measure of doubt, and the share of unknown and known cells called unassigned."""
    areas = {f"auroc_{name}": float(roc_auc_score(is_unknown, doubt)) for name, doubt in doubts.items()}
    shares = {"unknown": is_unassigned[is_unknown], "known": is_unassigned[~is_unknown]}
    return areas | {f"unassigned_{name}": float(cells.mean()) for name, cells in shares.items()}


def by_neighbors(cells: AnnData, types: np.ndarray, splits: np.ndarray, left_out: str) -> dict[str, float]:
    """A reference without the type, asked for the type and the test cells of the others."""
    embeddings, is_unknown = cells.obsm["X_scfoundation"], types == left_out
    is_reference, is_asked = ~is_unknown & (splits != "test"), is_unknown | (splits == "test")
    index = ReferenceIndex.build(embeddings[is_reference], types[is_reference])
    probabilities, distances = index.call(embeddings[is_asked])
    return scores(
        is_unknown[is_asked],
        is_unassigned=distances > index.unassigned_above(),
        confidence=-probabilities.max(axis=1),
        distance=distances,
    )


def by_classifier(
    cells: AnnData, types: np.ndarray, splits: np.ndarray, left_out: str, *, label: str, model: str, **options: Any
) -> dict[str, float]:
    """A classifier fine-tuned without the type, asked likewise."""
    is_unknown = types == left_out
    taught, asked = cells[~is_unknown & (splits != "test")].copy(), cells[is_unknown | (splits == "test")].copy()
    taught.obs["split"] = splits[~is_unknown & (splits != "test")]
    gene_column = options.pop("gene_column")
    with tempfile.TemporaryDirectory() as folder:
        classifier = finetune(
            taught,
            Path(folder) / "classifier",
            label=label,
            model=model,
            split_column="split",
            gene_column=gene_column,
            report=False,
            report_to="none",
            progress=False,
            **options,
        )
        annotate(asked, classifier, gene_column=gene_column, progress=False)
    return scores(
        asked.obs[label].astype(str).to_numpy() == left_out,
        is_unassigned=(asked.obs["scfoundation_cell_type"] == UNASSIGNED).to_numpy(),
        confidence=-asked.obs["scfoundation_confidence"].to_numpy(),
    )


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a method and type left out."""
    cells = anndata.read_h5ad(arguments.data)
    types = cells.obs[arguments.label].astype(str).to_numpy()
    splits = split_cells(types, shares=(0.7, 0.1, 0.2), seed=arguments.seed)
    if "neighbors" in arguments.methods:
        embed(cells, arguments.model, gene_column=arguments.gene_column, progress=False)
    for left_out in arguments.types or sorted(set(types)):
        if "neighbors" in arguments.methods:
            yield {"method": "neighbors", "left_out": left_out, **by_neighbors(cells, types, splits, left_out)}
        if "classifier" in arguments.methods:
            measured = by_classifier(
                cells,
                types,
                splits,
                left_out,
                label=arguments.label,
                model=arguments.model,
                gene_column=arguments.gene_column,
                freezing=arguments.freezing,
                max_steps=arguments.max_steps,
                seed=arguments.seed,
            )
            yield {"method": "classifier", "left_out": left_out, **measured}


def main() -> None:
    """Print a Markdown table, the mean over types last; write the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pretrained model")
    parser.add_argument("--data", type=Path, default=CELLS)
    parser.add_argument("--label", default="cell_type")
    parser.add_argument("--gene-column", default=None)
    parser.add_argument(
        "--methods", nargs="+", default=["neighbors", "classifier"], choices=["neighbors", "classifier"]
    )
    parser.add_argument("--types", nargs="+", help="types to leave out; default: each")
    parser.add_argument("--freezing", help="of finetune")
    parser.add_argument("--max-steps", type=int, help="of finetune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    arguments = parser.parse_args()
    columns = ["auroc_confidence", "auroc_distance", "unassigned_unknown", "unassigned_known"]
    print("| method | type left out | " + " | ".join(column.replace("_", " ") for column in columns) + " |")
    print("| --- | --- |" + " --- |" * len(columns))
    rows = []

    def show(method: str, left_out: str, values: dict[str, float]) -> None:
        numbers = " | ".join(f"{values[column]:.2f}" if column in values else "" for column in columns)
        print(f"| {method} | {left_out} | {numbers} |", flush=True)

    for row in measure(arguments):
        rows.append(row)
        show(row["method"], row["left_out"], row)
    for method in arguments.methods:
        of_method = [row for row in rows if row["method"] == method]
        means = {name: np.mean([row[name] for row in of_method]) for name in columns if name in of_method[0]}
        show(method, "mean", means)
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"arguments": vars(arguments), "rows": rows}, indent=2, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
