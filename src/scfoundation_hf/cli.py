"""The command `scfoundation`: one subcommand a job, each a thin call of a function with the same arguments."""

import sys
import traceback
import warnings
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from scfoundation_hf.inference.loading import DtypeName
from scfoundation_hf.modeling_scfoundation.checkpoint_conversion import CheckpointKey
from scfoundation_hf.modeling_scfoundation.pooling import PoolingMode
from scfoundation_hf.tokenization.prepared_cells import OnEmptyCell, OriginalMode, Values

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


@app.command()
def embed(
    data: Annotated[Path, typer.Argument(metavar="IN", help="Cells: .h5ad or .zarr, of any size.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Copy of IN with the embeddings added.")],
    model: Annotated[str, typer.Option(metavar="DIR", help="Model folder or Hub id.")],
    pooling: Annotated[
        PoolingMode, typer.Option(help="all: S, T, max and mean over genes; max: max over all tokens.")
    ] = "all",
    key_added: Annotated[str, typer.Option(help="Name of the result in obsm.")] = "X_scfoundation",
    layer: Annotated[str | None, typer.Option(help="Layer with the values; default X.")] = None,
    gene_column: Annotated[
        str | None, typer.Option(help="Column of var with gene symbols or Ensembl ids; default var_names.")
    ] = None,
    values: Annotated[Values, typer.Option(help="What the values are.")] = "counts",
    total_counts: Annotated[
        str | None, typer.Option(help="Column of obs with the total counts, for log1p_cp10k.")
    ] = None,
    target_depth: Annotated[float | None, typer.Option(help="Target depth T as a total count, such as 10000.")] = None,
    depth_fold: Annotated[
        float | None, typer.Option(help="Target depth as a multiple of each cell's own; default: T = S.")
    ] = None,
    min_genes: Annotated[
        int | None, typer.Option(help="Cells with fewer expressed genes get NaN; the paper keeps more than 200.")
    ] = None,
    on_empty_cell: Annotated[
        OnEmptyCell, typer.Option(help="A cell without counts is an error, or gets NaN.")
    ] = "error",
    original_mode: Annotated[
        OriginalMode | None, typer.Option(help="Reproduce another input mode of the original script.")
    ] = None,
    tokens_per_batch: Annotated[
        int | None, typer.Option(help="Genes computed at once; bounds memory. Default: by device.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: a GPU if there is one.")] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Precision to compute in.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar and what became of the genes.")] = True,
) -> None:
    """Embed every cell of a file into obsm["X_scfoundation"]; a killed run resumes when called again.

    Example: `scfoundation embed cells.h5ad embedded.h5ad --model scfoundation-cell --gene-column symbol`
    """
    from transformers.utils import logging

    from scfoundation_hf.inference.embedding import embed as run

    if not progress:
        logging.disable_progress_bar()  # transformers' own, while it loads weights
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
            model_failed |= section == "Model" and not finding.passed
        console.print(f"[bold]{section}[/bold]", table)
    if model_failed:
        raise typer.Exit(1)


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
        typer.echo("Interrupted. `scfoundation embed` resumes when the same command is run again.", err=True)
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
