"""The command `scfoundation`: one subcommand a job, each a thin call of a function with the same arguments."""

import sys
import traceback
import warnings
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from scfoundation_hf.inference.gene_attribution import AttributionMethod
from scfoundation_hf.inference.loading import DtypeName, ValuesDtype
from scfoundation_hf.modeling_scfoundation.checkpoint_conversion import CheckpointKey
from scfoundation_hf.modeling_scfoundation.pooling import PoolingMode
from scfoundation_hf.tokenization.prepared_cells import CountValues, OnEmptyCell, OriginalMode, Values
from scfoundation_hf.trainer_scripts.benchmarks.stored_parts import Remeasure
from scfoundation_hf.trainer_scripts.finetuning_settings import (
    FinetuningDtype,
    FinetuningLoss,
    Freezing,
    PresetName,
    RareClasses,
)

# Arguments and options that several commands share.
Cells = Annotated[Path, typer.Argument(metavar="IN", help="Cells: .h5ad or .zarr, of any size.")]
Model = Annotated[str, typer.Option(metavar="DIR", help="Model folder or Hub id.")]
Layer = Annotated[str | None, typer.Option(help="Layer with the values; default X.")]
GeneColumn = Annotated[
    str | None, typer.Option(help="Column of var with gene symbols or Ensembl ids; default var_names.")
]
ValuesAre = Annotated[Values, typer.Option(help="What the values are.")]
TotalCounts = Annotated[str | None, typer.Option(help="Column of obs with the total counts, for log1p_cp10k.")]
TargetDepth = Annotated[float | None, typer.Option(help="Target depth T as a total count, such as 10000.")]
DepthFold = Annotated[float | None, typer.Option(help="Target depth as a multiple of each cell's own; default: T = S.")]
MinGenes = Annotated[
    int | None, typer.Option(help="Cells with fewer expressed genes get NaN; the paper keeps more than 200.")
]
EmptyCells = Annotated[OnEmptyCell, typer.Option(help="A cell without counts is an error, or gets NaN.")]
OriginalInput = Annotated[
    OriginalMode | None, typer.Option(help="Reproduce another input mode of the original script.")
]
TokensPerBatch = Annotated[int | None, typer.Option(help="Genes computed at once; bounds memory. Default: by device.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: a GPU if there is one.")]
ComputeDtype = Annotated[DtypeName, typer.Option(help="Precision to compute in.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Progress = Annotated[bool, typer.Option(help="Show a progress bar and what became of the genes.")]
CellsPerBatch = Annotated[int | None, typer.Option(help="Cells computed at once; bounds memory. Default: by device.")]

ExportFormat = Literal["code", "onnx", "onnx-int8"]
INTERRUPTED = 130  # what typer makes of Ctrl-C

app = typer.Typer(
    name="scfoundation",
    help="scFoundation, the foundation model of single-cell transcriptomics.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def show_traceback(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """scFoundation, the foundation model of single-cell transcriptomics.

    `scfoundation COMMAND --help` explains a command, with an example.
    """


def _hide_loading(progress: bool) -> None:
    """Without progress bars, hide transformers' own too, of loading weights."""
    if not progress:
        logging.disable_progress_bar()


@app.command()
def embed(
    data: Cells,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Copy of IN with the embeddings added.")],
    model: Model,
    pooling: Annotated[
        PoolingMode, typer.Option(help="all: S, T, max and mean over genes; max: max over all tokens.")
    ] = "all",
    key_added: Annotated[str, typer.Option(help="Name of the result in obsm.")] = "X_scfoundation",
    layer: Layer = None,
    gene_column: GeneColumn = None,
    values: ValuesAre = "counts",
    total_counts: TotalCounts = None,
    target_depth: TargetDepth = None,
    depth_fold: DepthFold = None,
    min_genes: MinGenes = None,
    on_empty_cell: EmptyCells = "error",
    original_mode: OriginalInput = None,
    tokens_per_batch: TokensPerBatch = None,
    device: Device = None,
    dtype: ComputeDtype = "float32",
    overwrite: Overwrite = False,
    progress: Progress = True,
) -> None:
    """Embed every cell of a file into obsm["X_scfoundation"]; a killed run resumes when called again.

    Example: `scfoundation embed cells.h5ad embedded.h5ad --model scfoundation-cell --gene-column symbol`
    """
    from scfoundation_hf.inference.embedding import embed as run

    _hide_loading(progress)
    written = run(
        data,
        model,
        output=output,
        pooling=pooling,
        key_added=key_added,
        layer=layer,
        gene_column=gene_column,
        values=values,
        total_counts=total_counts,
        target_depth=target_depth,
        depth_fold=depth_fold,
        min_genes=min_genes,
        on_empty_cell=on_empty_cell,
        original_mode=original_mode,
        tokens_per_batch=tokens_per_batch,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
    )
    typer.echo(written)


@app.command()
def enhance(
    data: Cells,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The .h5ad or .zarr to write.")],
    model: Model,
    genes: Annotated[
        list[str] | None,
        typer.Option(metavar="GENE", help="Symbol or Ensembl id; may be given several times. Default: all genes."),
    ] = None,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    values: ValuesAre = "counts",
    total_counts: TotalCounts = None,
    target_depth: TargetDepth = None,
    depth_fold: DepthFold = None,
    min_genes: MinGenes = None,
    on_empty_cell: EmptyCells = "error",
    values_dtype: Annotated[ValuesDtype, typer.Option(help="What X is stored as.")] = "float32",
    min_value: Annotated[
        float | None, typer.Option(help="Predictions below become exact zeros, and matrices are sparse.")
    ] = None,
    cells_per_batch: CellsPerBatch = None,
    tokens_per_batch: TokensPerBatch = None,
    device: Device = None,
    dtype: ComputeDtype = "float32",
    overwrite: Overwrite = False,
    progress: Progress = True,
) -> None:
    """Predict the expression of all genes at a deeper read depth; a killed run resumes when called again.

    Example: `scfoundation enhance cells.h5ad enhanced.h5ad --model scfoundation-gene --target-depth 10000`
    """
    from scfoundation_hf.inference.enhancement import enhance as run

    _hide_loading(progress)
    written = run(
        data,
        model,
        output=output,
        genes=genes or None,
        layer=layer,
        gene_column=gene_column,
        values=values,
        total_counts=total_counts,
        target_depth=target_depth,
        depth_fold=depth_fold,
        min_genes=min_genes,
        on_empty_cell=on_empty_cell,
        values_dtype=values_dtype,
        min_value=min_value,
        cells_per_batch=cells_per_batch,
        tokens_per_batch=tokens_per_batch,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
    )
    typer.echo(written)


@app.command("gene-embeddings")
def gene_embeddings(
    data: Cells,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Copy of IN with the gene embeddings added.")],
    model: Model,
    genes: Annotated[list[str], typer.Option(metavar="GENE", help="Symbol or Ensembl id; may be given several times.")],
    key_added: Annotated[str, typer.Option(help="Name of the result in obsm.")] = "X_scfoundation_genes",
    layer: Layer = None,
    gene_column: GeneColumn = None,
    values: ValuesAre = "counts",
    total_counts: TotalCounts = None,
    target_depth: TargetDepth = None,
    depth_fold: DepthFold = None,
    min_genes: MinGenes = None,
    on_empty_cell: EmptyCells = "error",
    original_mode: OriginalInput = None,
    cells_per_batch: CellsPerBatch = None,
    tokens_per_batch: TokensPerBatch = None,
    device: Device = None,
    dtype: ComputeDtype = "float32",
    overwrite: Overwrite = False,
    progress: Progress = True,
) -> None:
    """Embed chosen genes in the context of every cell, into obsm["X_scfoundation_genes"] (cells, genes, numbers).

    Example: `scfoundation gene-embeddings cells.h5ad out.h5ad --model scfoundation-gene --genes CD3D --genes NKG7`
    """
    from scfoundation_hf.inference.gene_embeddings import gene_embeddings as run

    _hide_loading(progress)
    written = run(
        data,
        model,
        genes=genes,
        output=output,
        key_added=key_added,
        layer=layer,
        gene_column=gene_column,
        values=values,
        total_counts=total_counts,
        target_depth=target_depth,
        depth_fold=depth_fold,
        min_genes=min_genes,
        on_empty_cell=on_empty_cell,
        original_mode=original_mode,
        cells_per_batch=cells_per_batch,
        tokens_per_batch=tokens_per_batch,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
    )
    typer.echo(written)


@app.command()
def annotate(
    data: Cells,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Copy of IN with the cell types added.")],
    model: Model,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="INDEX", help="Compare with these labelled cells (`scfoundation index`) instead."),
    ] = None,
    key_added: Annotated[str, typer.Option(help="What the names of all results begin with.")] = "scfoundation",
    num_neighbors: Annotated[int, typer.Option(help="Reference cells that each cell is compared with.")] = 15,
    unassigned: Annotated[
        bool, typer.Option(help='Call cells that the model does not know "unassigned"; else by the best type.')
    ] = True,
    explain: Annotated[
        AttributionMethod | None,
        typer.Option(help="Name the genes that drove each call, by this method; takes longer."),
    ] = None,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    values: ValuesAre = "counts",
    total_counts: TotalCounts = None,
    min_genes: MinGenes = None,
    on_empty_cell: EmptyCells = "error",
    tokens_per_batch: TokensPerBatch = None,
    device: Device = None,
    dtype: ComputeDtype = "float32",
    overwrite: Overwrite = False,
    progress: Progress = True,
) -> None:
    """Name the type of every cell, with probabilities; a killed run resumes when called again.

    Example: `scfoundation annotate cells.h5ad annotated.h5ad --model my-types --gene-column symbol`
    """
    from scfoundation_hf.inference.annotation import annotate as run

    _hide_loading(progress)
    written = run(
        data,
        model,
        output=output,
        reference=reference,
        key_added=key_added,
        num_neighbors=num_neighbors,
        unassigned=unassigned,
        explain=explain,
        layer=layer,
        gene_column=gene_column,
        values=values,
        total_counts=total_counts,
        min_genes=min_genes,
        on_empty_cell=on_empty_cell,
        tokens_per_batch=tokens_per_batch,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
    )
    typer.echo(written)


@app.command()
def index(
    data: Cells,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    model: Model,
    label: Annotated[str, typer.Option(metavar="COLUMN", help="Column of obs with the cell types.")],
    pooling: Annotated[
        PoolingMode,
        typer.Option(help="all: S, T, max and mean over genes; max: max over all tokens, a quarter as large."),
    ] = "all",
    layer: Layer = None,
    gene_column: GeneColumn = None,
    values: ValuesAre = "counts",
    total_counts: TotalCounts = None,
    min_genes: MinGenes = None,
    on_empty_cell: EmptyCells = "error",
    tokens_per_batch: TokensPerBatch = None,
    device: Device = None,
    dtype: ComputeDtype = "float32",
    overwrite: Overwrite = False,
    progress: Progress = True,
) -> None:
    """Embed labelled cells and index them as a reference, for `scfoundation annotate --reference`.

    Example: `scfoundation index labelled.h5ad reference --model scfoundation-cell --label cell_type`
    """
    from scfoundation_hf.inference.reference_index import index_reference as run

    _hide_loading(progress)
    written = run(
        data,
        model,
        label=label,
        output=output,
        pooling=pooling,
        layer=layer,
        gene_column=gene_column,
        values=values,
        total_counts=total_counts,
        min_genes=min_genes,
        on_empty_cell=on_empty_cell,
        tokens_per_batch=tokens_per_batch,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
    )
    typer.echo(written)


@app.command()
def finetune(
    data: Cells,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Model folder to make.")],
    label: Annotated[str, typer.Option(metavar="COLUMN", help="Column of obs with the cell types.")],
    model: Model,
    split_by: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column of obs with the donor or batch: whole ones are held out."),
    ] = None,
    split_column: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of obs that says train, validation or test.")
    ] = None,
    min_cells_per_class: Annotated[int, typer.Option(help="A type of fewer cells is rare.")] = 10,
    rare_classes: Annotated[
        RareClasses, typer.Option(help="Rare types are an error, are left out, or learned all the same.")
    ] = "error",
    preset: Annotated[PresetName, typer.Option(help="Batch, learning rate and loss; paper: the released ones.")] = (
        "default"
    ),
    freezing: Annotated[
        Freezing | None,
        typer.Option(help="What trains beside the head; default: penultimate, the last encoder layer but one."),
    ] = None,
    num_layers: Annotated[int | None, typer.Option(help="Layers that train, for last_n.")] = None,
    pooling: Annotated[
        PoolingMode | None, typer.Option(help="What the head sees of a cell; default: all, or by preset.")
    ] = None,
    loss: Annotated[FinetuningLoss | None, typer.Option(help="Default: cross_entropy, or by preset.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 1e-3; head 3e-3, full 1e-4.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Cells a batch; default 32, or by preset.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Updates at most; default: by the cells, at least 300.")] = None,
    patience: Annotated[int, typer.Option(help="Validations without a better macro F1 before training stops.")] = 10,
    seed: Annotated[int, typer.Option(help="Of split, new weights and order.")] = 0,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    values: ValuesAre = "counts",
    total_counts: TotalCounts = None,
    min_genes: Annotated[
        int | None, typer.Option(help="Cells with fewer expressed genes are left out; the paper keeps more than 200.")
    ] = None,
    on_empty_cell: Annotated[
        OnEmptyCell, typer.Option(help="A cell without counts is an error, or with nan is left out.")
    ] = "error",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="A control: the same network, from random weights.")
    ] = False,
    tokens_per_batch: Annotated[
        int | None, typer.Option(help="Genes whose activations are kept at once; bounds memory. Default: by model.")
    ] = None,
    device: Device = None,
    dtype: Annotated[FinetuningDtype, typer.Option(help="Precision of the training steps.")] = "float32",
    overwrite: Overwrite = False,
    progress: Progress = True,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
    report_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard, none, trackio, ...; repeatable. Default: tensorboard.")
    ] = None,
) -> None:
    """Train a classifier of cell types on labelled cells, and measure it on cells held out.

    OUT/report.html says how well it calls; `scfoundation annotate` calls the types of other cells with it.

    Example: `scfoundation finetune cells.h5ad my-types --label cell_type --split-by donor --model scfoundation-3m`
    """
    from scfoundation_hf.trainer_scripts.finetune import finetune as run

    _hide_loading(progress)
    written = run(
        data,
        output,
        label=label,
        model=model,
        split_by=split_by,
        split_column=split_column,
        min_cells_per_class=min_cells_per_class,
        rare_classes=rare_classes,
        preset=preset,
        freezing=freezing,
        num_layers=num_layers,
        pooling=pooling,
        loss=loss,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_steps=max_steps,
        patience=patience,
        seed=seed,
        layer=layer,
        gene_column=gene_column,
        values=values,
        total_counts=total_counts,
        min_genes=min_genes,
        on_empty_cell=on_empty_cell,
        random_weights=random_weights,
        tokens_per_batch=tokens_per_batch,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
        report=report,
        report_to=report_to or "tensorboard",
    )
    typer.echo(written)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="The released models.ckpt.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    key: Annotated[
        CheckpointKey,
        typer.Option(help="cell: cell embeddings; rde: read-depth enhancement; gene: gene embeddings, expression."),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion.")] = False,
) -> None:
    """Turn the released checkpoint into a folder that `AutoModel.from_pretrained` loads.

    Example: `scfoundation convert models.ckpt scfoundation-cell --key cell`
    """
    from scfoundation_hf.trainer_scripts.convert_checkpoint import convert_checkpoint

    typer.echo(convert_checkpoint(checkpoint, output, key=key, overwrite=overwrite))


def _parse_shard(text: str) -> tuple[int, int]:
    index, _, number = text.partition("/")
    if not (index.isdecimal() and number.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not of the form I/N, such as 3/8.")
    return int(index), int(number)


@app.command()
def prepare(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="IN...", help="Cells: .h5ad, .zarr, 10x .h5 or mtx folder, .loom, .csv.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make, or corpus to add to.")],
    obs: Annotated[list[str] | None, typer.Option(help="Column of obs to keep; may be given several times.")] = None,
    validation_by: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of obs, such as the donor, whose values stay together in one split; several: the first that "
            "an input has. Default: each cell by itself."
        ),
    ] = None,
    validation_share: Annotated[
        float | None,
        typer.Option(
            help="Chance to be in the validation split, by a hash; default: 0.02, with --validation-by 0.1.",
            show_default=False,
        ),
    ] = None,
    min_genes: Annotated[
        int, typer.Option(help="Cells with fewer expressed genes are left out; the paper keeps more than 200.")
    ] = 201,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    values: Annotated[CountValues, typer.Option(help="What the values are; TPM and FPKM: expected_counts.")] = "counts",
    shard: Annotated[str, typer.Option(metavar="I/N", help="Prepare only the I-th of N shares of the inputs.")] = "1/1",
    workers: Annotated[int, typer.Option(help="Inputs prepared at a time.")] = 1,
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors", help="Leave out inputs that are refused, with a warning.")
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Turn cell files into a corpus to pretrain on; run again, it goes on with what is not finished.

    Example: `scfoundation prepare cells/*.h5ad my-corpus --obs cell_type --validation-by donor --workers 4`
    """
    from scfoundation_hf.corpus.prepare import prepare as run

    manifest = run(
        inputs,
        output,
        obs=obs or (),
        validation_by=validation_by or (),
        validation_share=validation_share,
        min_genes=min_genes,
        layer=layer,
        gene_column=gene_column,
        values=values,
        shard=_parse_shard(shard),
        workers=workers,
        skip_errors=skip_errors,
        progress=progress,
    )
    typer.echo(manifest)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def pretrain(
    context: typer.Context,
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="YAML file, or a recipe: pretrain-3m, pretrain-10m, pretrain-100m.")
    ],
) -> None:
    """Pretrain a model on a corpus that `scfoundation prepare` made; a killed run goes on when called again.

    Every key of the file is an option too, given behind CONFIG: `--corpus`, `--output-dir`, `--model`, `--max-steps`,
    `--learning-rate`, `--seed`, `--overwrite`, and all others of transformers' TrainingArguments.

    Example: `scfoundation pretrain pretrain-3m --corpus my-corpus --output-dir scfoundation-3m --max-steps 2000`
    """
    from scfoundation_hf.trainer_scripts.pretrain import pretrain as run
    from scfoundation_hf.trainer_scripts.pretraining_config import read_config

    typer.echo(run(read_config(config, context.args)))


@app.command()
def restore(
    output: Annotated[Path, typer.Argument(metavar="CKPT", help="The models.ckpt to write.")],
    cell: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the key cell.")] = None,
    rde: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the key rde.")] = None,
    gene: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the key gene.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Turn converted models back into a checkpoint for the original code.

    Example: `scfoundation restore models.ckpt --cell scfoundation-cell --gene scfoundation-gene`
    """
    from scfoundation_hf.trainer_scripts.restore_checkpoint import restore_checkpoint

    given: dict[CheckpointKey, Path | None] = {"cell": cell, "rde": rde, "gene": gene}
    models = {key: folder for key, folder in given.items() if folder is not None}
    typer.echo(restore_checkpoint(models, output, overwrite=overwrite))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Model folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder, or with --format onnx file, to make.")],
    format: Annotated[
        ExportFormat, typer.Option(help="code: the model with its code; onnx, onnx-int8: the encoder as one file.")
    ] = "code",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Copy a model with its code: `AutoModel.from_pretrained(OUT, trust_remote_code=True)` needs no scfoundation-hf.

    Example: `scfoundation export my-model my-model-for-everyone`
    """
    if format != "code":
        from scfoundation_hf.inference.onnx_export import export_onnx

        typer.echo(
            export_onnx(model, output, weights="int8" if format == "onnx-int8" else "float32", overwrite=overwrite)
        )
        return
    from scfoundation_hf.hub import export as run

    typer.echo(run(model, output, overwrite=overwrite))


@app.command()
def push(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="Model folder.")],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hub; made where needed.")],
    private: Annotated[
        bool | None, typer.Option(help="Whether a new repository is private; default: as the organisation has set.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, made where needed; default main.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="Default: names DIR.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be sent, and what would not.")
    ] = False,
) -> None:
    """Publish a model with tokenizer, code, card and reports on the Hugging Face Hub, in one commit.

    Log in with `hf auth login` or HF_TOKEN. An upload that broke off goes on when called again.

    Example: `scfoundation push my-model my-name/scfoundation-3m --private --dry-run`
    """
    from scfoundation_hf import hub

    if not dry_run:
        commit = hub.push(model, repo_id, private=private, revision=revision, commit_message=commit_message)
        typer.echo(commit.commit_url)
        return
    publication = hub.prepare(model)
    for name, num_bytes in publication.sizes().items():
        typer.echo(f"{num_bytes:>15,}  {name}")
    typer.echo(f"{sum(publication.sizes().values()):>15,}  bytes would go to {repo_id}; nothing was sent.")
    if publication.left_out:
        typer.echo(f"Left out: {', '.join(publication.left_out)}")


@app.command()
def lookup(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Model folder or Hub id.")],
    data: Annotated[Path, typer.Argument(metavar="QUERY", help="Cells: .h5ad or .zarr.")],
    layer: Layer = None,
    gene_column: GeneColumn = None,
    values: ValuesAre = "counts",
) -> None:
    """Say how many cells of a data set the model was trained on, by their fingerprints.

    Example: `scfoundation lookup scfoundation-3m cells.h5ad --gene-column symbol`
    """
    from scfoundation_hf.corpus.lookup import lookup as run

    typer.echo(run(model, data, layer=layer, gene_column=gene_column, values=values))


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="DIR", help="Model folder or Hub id to check too.")] = None,
) -> None:
    """Say what is installed, which devices there are, and which attention backends run here and why not the others.

    Exit code 1 if DIR is given and does not work. Example: `scfoundation doctor scfoundation-cell`
    """
    from scfoundation_hf.doctor import diagnose

    marks = {True: "[green]works[/green]", False: "[red]no[/red]", None: ""}
    console = Console()
    model_failed = False
    for section, findings in groupby(diagnose(model), key=lambda finding: finding.section):
        table = Table.grid(padding=(0, 2, 0, 0))
        for finding in findings:
            table.add_row("", finding.name, marks[finding.passed], finding.result)
            model_failed |= section == "Model" and finding.passed is False
        console.print(f"[bold]{section}[/bold]", table)
    if model_failed:
        raise typer.Exit(1)


benchmark = typer.Typer(help="Measure models against each other and against simple baselines.", no_args_is_help=True)
app.add_typer(benchmark, name="benchmark")
MeasureAnew = Annotated[
    Remeasure,
    typer.Option(help="What OUT has, to be measured again: nothing, what another model was measured for, everything."),
]


@benchmark.command("annotation")
def benchmark_annotation(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to make, or to go on with: results, tables, figure.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="FILE", help="Cells, a YAML file of data sets, or the recipe annotation-benchmark; repeatable."
        ),
    ],
    model: Annotated[
        list[str], typer.Option(metavar="DIR", help="Pretrained model, folder or Hub id; give it again for each model.")
    ],
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of obs with the cell types.")] = None,
    split_by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of obs with the donor or batch, held out whole.")
    ] = None,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Method to measure; repeatable. Default: all (docs/annotation-benchmark.md)."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Splits and repetitions; default 3, or what the YAML says.")] = None,
    max_cells: Annotated[int | None, typer.Option(help="Cells of each data set; default: all.")] = None,
    min_cells_per_type: Annotated[int | None, typer.Option(help="Rarer types are left out; default 10.")] = None,
    exclude_label: Annotated[
        list[str] | None, typer.Option(help='Label that is no type, such as "unlabelled"; repeatable.')
    ] = None,
    freezing: Annotated[
        str | None, typer.Option(help="Of fine-tuning: head, penultimate, lora or full; default: its own.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Of fine-tuning; default: its own.")] = None,
    device: Device = None,
    remeasure: MeasureAnew = "nothing",
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Measure how well models call cell types, beside simple baselines, other tools and random weights.

    Each result is kept as soon as it is there: a killed run goes on when called again.

    Example: `scfoundation benchmark annotation results --data cells.h5ad --label cell_type --split-by donor --model
    scfoundation-3m --seeds 5`
    """
    from scfoundation_hf.trainer_scripts.benchmarks import annotation

    _hide_loading(progress)
    given = {
        "methods": method,
        "seeds": seeds,
        "max_cells": max_cells,
        "min_cells_per_type": min_cells_per_type,
        "exclude_labels": exclude_label,
        "freezing": freezing,
        "max_steps": max_steps,
    }
    arguments = annotation.read_data_sets(data, label=label, split_by=split_by, gene_column=gene_column, layer=layer)
    arguments |= {name: value for name, value in given.items() if value not in (None, [])}
    typer.echo(
        annotation.benchmark_annotation(
            models=model, output=output, device=device, remeasure=remeasure, progress=progress, **arguments
        )
    )


@benchmark.command("pretraining")
def benchmark_pretraining(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="Folder made by `scfoundation prepare`.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make: results, tables, figure.")],
    model: Annotated[list[Path], typer.Option(metavar="DIR", help="Model folder; give it again for each model.")],
    run: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Pretraining run to draw in the figure; repeatable.")
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="How genes are hidden, released or paper; repeatable. Default: released.")
    ] = None,
    group_by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN", help="Column of obs with the donor or batch; default: what --validation-by was."
        ),
    ] = None,
    baseline_cells: Annotated[int, typer.Option(help="Training cells that the baselines are fitted to.")] = 50_000,
    max_cells: Annotated[int | None, typer.Option(help="Validation cells; default: all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Cells a batch.")] = 32,
    seed: Annotated[int, typer.Option(help="Of what is hidden; the Trainer validates with 0.")] = 0,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Measure pretrained models on the held-out cells of a corpus, beside gene means and a matrix factorisation.

    Example: `scfoundation benchmark pretraining my-corpus scaling --model runs/3m --model runs/10m --run runs/3m --run
    runs/10m`
    """
    from scfoundation_hf.trainer_scripts.benchmarks import pretraining

    _hide_loading(progress)
    typer.echo(
        pretraining.benchmark_pretraining(
            model,
            corpus,
            output,
            runs=run or (),
            recipes=recipe or ["released"],
            group_by=group_by or None,
            baseline_cells=baseline_cells,
            max_cells=max_cells,
            batch_size=batch_size,
            seed=seed,
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
    )


# Options of the benchmarks that a recipe describes; those left out are as the recipe has them.
Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file that names the data sets, or a recipe of the package.")
]
DataFolder = Annotated[Path, typer.Option(metavar="DIR", help="Folder that the paths in the recipe begin at.")]
Methods = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Method to measure; repeatable. Default: all.")]
MaxCells = Annotated[int | None, typer.Option(help="Cells of each data set, drawn evenly.")]


@benchmark.command("enhancement")
def benchmark_enhancement(
    recipe: Recipe,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make: results, tables, figure.")],
    model: Model,
    data: DataFolder = Path(),
    method: Methods = None,
    rate: Annotated[list[float] | None, typer.Option(help="Share of the counts to keep; repeatable.")] = None,
    max_cells: MaxCells = None,
    device: Device = None,
    remeasure: MeasureAnew = "nothing",
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Bring down-sampled cells back to depth, beside MAGIC, scVI, kNN smoothing and the gene mean; resumable.

    Example: `scfoundation benchmark enhancement enhancement-benchmark enhancement --model scfoundation-3m --data cells`
    """
    from scfoundation_hf.trainer_scripts.benchmarks import enhancement

    chosen = {"methods": method, "rates": rate, "max_cells": max_cells}
    settings = _read_recipe(recipe, enhancement.SETTINGS, data, chosen)
    typer.echo(
        enhancement.benchmark_enhancement(
            model=model, output=output, device=device, remeasure=remeasure, progress=progress, **settings
        )
    )


@benchmark.command("clustering")
def benchmark_clustering(
    recipe: Recipe,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make: results, tables, figures.")],
    model: Model,
    data: DataFolder = Path(),
    method: Methods = None,
    fold: Annotated[list[float] | None, typer.Option(help="T / S of the embeddings; repeatable.")] = None,
    max_cells: MaxCells = None,
    device: Device = None,
    remeasure: MeasureAnew = "nothing",
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Cluster embeddings at growing target depths, beside denoised expression, against cell types; resumable.

    Example: `scfoundation benchmark clustering clustering-benchmark clustering --model scfoundation-3m --data cells`
    """
    from scfoundation_hf.trainer_scripts.benchmarks import clustering

    chosen = {"methods": method, "folds": fold, "max_cells": max_cells}
    settings = _read_recipe(recipe, clustering.SETTINGS, data, chosen)
    typer.echo(
        clustering.benchmark_clustering(
            model=model, output=output, device=device, remeasure=remeasure, progress=progress, **settings
        )
    )


@benchmark.command("mapping")
def benchmark_mapping(
    recipe: Recipe,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make: results, tables, figures.")],
    model: Model,
    data: DataFolder = Path(),
    method: Methods = None,
    max_cells: MaxCells = None,
    device: Device = None,
    remeasure: MeasureAnew = "nothing",
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Bring batches into one space with Harmony, BBKNN and scVI, and score it as scIB does; resumable.

    Example: `scfoundation benchmark mapping mapping-benchmark mapping --model scfoundation-3m --data cells`
    """
    from scfoundation_hf.trainer_scripts.benchmarks import mapping

    settings = _read_recipe(recipe, mapping.SETTINGS, data, {"methods": method, "max_cells": max_cells})
    typer.echo(
        mapping.benchmark_mapping(
            model=model, output=output, device=device, remeasure=remeasure, progress=progress, **settings
        )
    )


def _read_recipe(recipe: str, known: tuple[str, ...], folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a benchmark: what the recipe says, and what is chosen here instead."""
    from scfoundation_hf.trainer_scripts.benchmarks.cell_sets import read_recipe

    logging.disable_progress_bar()  # a model is loaded for every part
    settings = read_recipe(recipe, settings=known, folder=folder)
    return settings | {key: value for key, value in chosen.items() if value is not None and value != []}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; an error is one message on stderr and exit code 1, with `--debug` a traceback."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments  # taken anywhere on the line: people add it behind the command that failed
    arguments = [argument for argument in arguments if argument != "--debug"]
    warnings.showwarning = _show_warning
    try:
        exit_code = app(arguments, standalone_mode=False, prog_name="scfoundation")
    except Exception as error:
        if debug:
            traceback.print_exc()
        sys.exit(_report(error))
    if exit_code == INTERRUPTED:
        typer.echo("Interrupted. The work resumes when the same command is run again.", err=True)
    sys.exit(exit_code or 0)


def _report(error: Exception) -> int:
    """Say what went wrong; returns the exit code."""
    show = getattr(error, "show", None)
    if callable(show):  # wrong usage, which click words and lays out itself
        show()
        return int(getattr(error, "exit_code", 2))
    # str() of a KeyError is the repr of its message
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    typer.echo(f"Error: {str(message) or type(error).__name__}", err=True)
    return 1


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"Warning: {message}", err=True)


if __name__ == "__main__":
    main()
