"""ScFoundationTokenizer: cells in, the batch contract out.

AnnData, matrix or DataFrame -> reader (chunks of CSR, gene names) -> GeneVocabulary (columns to genes) -> read_depth
(values, T, S) -> data_collator (padded or packed). `prepare` checks every value in a first pass; `PreparedCells.encode`
makes the tokens in a second, for any range of cells. Calling the tokenizer does both and pads.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer

from scfoundation_hf.configuration.code_export import save_code

from .data_collator import EncodedCells, as_tensors, collect_labels, pad_cells
from .gene_vocabulary import GeneVocabulary
from .matrix_reader import CellReader, MatrixReader
from .prepared_cells import InputOptions, OnEmptyCell, OriginalMode, PreparedCells, Values

# AnnData, a path to .h5ad or .zarr, a (cells, genes) matrix, or a DataFrame. Not spelled out, because this file also
# runs from the Hub, where neither anndata nor pandas need be installed.
CellData = Any

MIN_VOCABULARY_SHARE = 0.05
# File and class, for people who load with trust_remote_code=True; the second place is for a fast tokenizer.
AUTO_MAP = {"AutoTokenizer": ["tokenization_scfoundation.ScFoundationTokenizer", None]}


class ScFoundationTokenizer(PreTrainedTokenizer):
    """Turns cells into the batch every scFoundation model takes.

    A token is an expressed gene with its value, log1p(counts per 10,000); the two last tokens of a cell are T
    (the depth to predict for) and S (the depth it was read at), log10 of a total count over the vocabulary's
    genes.

    Args:
        vocab_file: a gene vocabulary (TSV); left out, the published 19,264 genes.
    """

    vocab_files_names = {"vocab_file": "gene_vocabulary.tsv"}  # noqa: RUF012 (Transformers' own class attribute)
    model_input_names = ["input_ids", "values", "attention_mask"]  # noqa: RUF012

    vocabulary: GeneVocabulary

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        *,
        target_depth_token: str = "<T>",
        source_depth_token: str = "<S>",
        pad_token: str = "<pad>",
        **kwargs: Any,
    ) -> None:
        """See the class; the other arguments are those that Transformers saves and gives back."""
        if kwargs.get("padding_side", "right") != "right":
            raise ValueError("Cells are padded on the right: T and S are their last two real tokens.")
        # from_pretrained gives the two depth tokens back under this name.
        given_back = kwargs.pop("model_specific_special_tokens", None) or {}
        target_depth_token = given_back.get("target_depth_token", target_depth_token)
        source_depth_token = given_back.get("source_depth_token", source_depth_token)
        self.vocabulary = GeneVocabulary.default() if vocab_file is None else GeneVocabulary.from_file(Path(vocab_file))
        special = (str(target_depth_token), str(source_depth_token), str(pad_token))
        self._tokens = (*self.vocabulary.symbols, *special)
        self._token_to_id = {token: i for i, token in enumerate(self._tokens)}
        super().__init__(
            target_depth_token=target_depth_token,
            source_depth_token=source_depth_token,
            pad_token=pad_token,
            **kwargs,
        )

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Hook of `from_pretrained`: a folder without its vocabulary must not get the published one."""
        if kwargs.get("vocab_file") is None:
            raise ValueError(
                f"The tokenizer's folder has no {cls.vocab_files_names['vocab_file']}, which says what gene "
                "each id is. Save the tokenizer again with save_pretrained; ScFoundationTokenizer() is the "
                "published vocabulary."
            )
        return kwargs

    @property
    def target_depth_token_id(self) -> int:
        """T's id: the first after the genes."""
        return len(self.vocabulary)

    @property
    def source_depth_token_id(self) -> int:
        """S's id."""
        return len(self.vocabulary) + 1

    @property
    def vocab_size(self) -> int:
        """Genes, T, S and padding."""
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        """Each gene symbol, `<T>`, `<S>` and `<pad>` with its id."""
        return dict(self._token_to_id)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the gene vocabulary as TSV; returns its path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / (prefix + self.vocab_files_names["vocab_file"])
        self.vocabulary.save(path)
        return (str(path),)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        include_code: bool | None = None,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Save vocabulary and settings; returns the files.

        Args:
            save_directory: folder, made where needed.
            include_code: copy the tokenizer's code too, so that `AutoTokenizer.from_pretrained(save_directory,
                trust_remote_code=True)` works without this package. `None`: if the tokenizer came with code, or
                was saved with it before.
            *args, **kwargs: further arguments of `PreTrainedTokenizerBase.save_pretrained`.
        """
        if include_code is True:
            self.init_kwargs["auto_map"] = dict(AUTO_MAP)
        elif include_code is False:
            self.init_kwargs.pop("auto_map", None)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        files = super()._save_pretrained(save_directory, *args, **kwargs)
        if "auto_map" not in self.init_kwargs:
            return files
        return (*files, *map(str, save_code(type(self), save_directory)))

    def _convert_token_to_id(self, token: str) -> int:
        if token not in self._token_to_id:
            raise KeyError(f"{token!r} is no gene symbol of this vocabulary, nor one of its special tokens.")
        return self._token_to_id[token]

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._tokens):
            raise IndexError(f"No token has the id {index}; ids are 0 to {len(self._tokens) - 1}.")
        return self._tokens[index]

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        raise TypeError("This tokenizer takes cells, not text: tokenizer(adata) or tokenizer(counts, gene_names=...).")

    def __call__(
        self,
        data: CellData,
        *,
        gene_names: Sequence[str] | np.ndarray | None = None,
        layer: str | None = None,
        gene_column: str | None = None,
        values: Values = "counts",
        total_counts: Any = None,
        target_depth: float | None = None,
        depth_fold: float | None = None,
        min_genes: int | None = None,
        on_empty_cell: OnEmptyCell = "error",
        original_mode: OriginalMode | None = None,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
    ) -> BatchEncoding:
        """Tokenise cells into one padded batch. For files larger than memory, see `prepare`.

        Args:
            data: an AnnData (also backed), a path to .h5ad or .zarr, a (cells, genes) matrix, dense or
                sparse, with `gene_names`, or a DataFrame (cells x genes).
            gene_names: one gene symbol or Ensembl id a column; for a matrix only.
            layer: the AnnData layer that holds the values; left out, X. "raw" is `adata.raw` unless a layer
                bears that name.
            gene_column: the column of var that holds symbols or Ensembl ids; left out, var_names.
            values: what the values are. "counts": raw integers. "expected_counts": fractional counts, used as
                they are. "log1p_cp10k": log1p(counts per 10,000), used as they are, with `total_counts`.
                "recover_counts": normalised values, logged or not, taken back to counts with each cell's
                smallest value as one count.
            total_counts: each cell's total count, for "log1p_cp10k": an obs column or an array.
            target_depth: total count to predict for (10_000 is the original's t4), at least 100. Excludes
                `depth_fold`.
            depth_fold: multiple of each cell's own total to predict for (the original's f2 is 2, its a5 is
                1e5). Neither: the cell's own depth, T = S.
            min_genes: least number of expressed vocabulary genes; cells with fewer are left out, with a
                warning. The paper keeps cells with more than 200: `min_genes=201`.
            on_empty_cell: "error", or "nan": cells without counts on vocabulary genes are left out, with a
                warning.
            original_mode: reproduce the original script's handling of normalised cells or bulk samples.
                Excludes `values` and `total_counts`; the bulk modes also exclude `target_depth` and
                `depth_fold`.
            padding: True or "longest"; False leaves cells of different lengths (with `return_tensors=None`).
            return_tensors: "pt", "np", or None for Python lists.
        Returns: `input_ids` int64, `values` float32 and `attention_mask` int64, each (cells, tokens).
        Raises: ValueError, KeyError, FileNotFoundError: naming what is wrong and how to mend it.
        """
        _check_padding(padding, return_tensors)
        prepared = self.prepare(
            data,
            gene_names=gene_names,
            layer=layer,
            gene_column=gene_column,
            values=values,
            total_counts=total_counts,
            target_depth=target_depth,
            depth_fold=depth_fold,
            min_genes=min_genes,
            on_empty_cell=on_empty_cell,
            original_mode=original_mode,
        )
        with prepared:
            prepared.warn_left_out()
            cells = prepared.encode(0, prepared.num_cells)
        return self._batch(cells, {}, padding=padding, return_tensors=return_tensors)

    def prepare(
        self,
        data: CellData,
        *,
        gene_names: Sequence[str] | np.ndarray | None = None,
        layer: str | None = None,
        gene_column: str | None = None,
        values: Values = "counts",
        total_counts: Any = None,
        target_depth: float | None = None,
        depth_fold: float | None = None,
        min_genes: int | None = None,
        on_empty_cell: OnEmptyCell = "error",
        original_mode: OriginalMode | None = None,
    ) -> PreparedCells:
        """Check all of the input, in bounded memory: lengths, depths and report before anything is tokenised.

        Takes what `__call__` takes. Cells are then encoded in ranges of any size, in any order:

            prepared = tokenizer.prepare("cells.h5ad")
            print(prepared.describe())
            for start, stop in prepared.chunks():
                cells = prepared.encode(start, stop)
        """
        options = InputOptions(
            layer=layer,
            gene_column=gene_column,
            values=values,
            total_counts=total_counts,
            target_depth=target_depth,
            depth_fold=depth_fold,
            min_genes=min_genes,
            on_empty_cell=on_empty_cell,
            original_mode=original_mode,
        )
        reader = _open_reader(data, gene_names=gene_names, layer=layer, gene_column=gene_column)
        try:
            try:
                mapping = self.vocabulary.map_genes(reader.gene_names)
                mapping.check_vocabulary_share(MIN_VOCABULARY_SHARE)
            except ValueError as error:
                raise ValueError(f"{error}{self._better_gene_column(reader)}") from error
            return PreparedCells(reader, self.vocabulary, mapping, options)
        except BaseException:
            reader.close()
            raise

    def pad(
        self,
        encoded_inputs: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad tokenised one-cell rows, with any `labels`; Trainer's default collator calls this.

        Args:
            encoded_inputs: rows `{"input_ids", "values", "labels"?}`, or one dictionary of lists of these.
            padding: True or "longest", "max_length" with `max_length`, or False.
            pad_to_multiple_of: round the length up to a multiple of this.
            return_tensors: "pt", "np", or None for Python lists.
        """
        if padding_side not in (None, "right"):
            raise ValueError("Cells are padded on the right: T and S are their last two real tokens.")
        if isinstance(encoded_inputs, Mapping):
            columns = dict(encoded_inputs)
            keys = [key for key in columns if key in ("input_ids", "values", "attention_mask", "labels", "label")]
            rows = [dict(zip(keys, row, strict=True)) for row in zip(*(columns[key] for key in keys), strict=True)]
        else:
            rows = [dict(row) for row in encoded_inputs]
        for row in rows:
            if "label" in row:
                row["labels"] = row.pop("label")
        _check_padding(padding, return_tensors)
        if (padding == "max_length") != (max_length is not None):
            raise ValueError("padding='max_length' and max_length= go together.")
        batch = self._batch(
            EncodedCells.from_rows(rows),
            collect_labels(rows),
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors,
        )
        if return_attention_mask is False:
            del batch["attention_mask"]
        return batch

    def _batch(
        self,
        cells: EncodedCells,
        labels: Mapping[str, np.ndarray],
        *,
        padding: bool | str,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None,
    ) -> BatchEncoding:
        if padding is False or padding == "do_not_pad":
            rows = [cells.row(i) for i in range(len(cells))]
            ragged: dict[str, Any] = {key: [row[key].tolist() for row in rows] for key in ("input_ids", "values")}
            ragged["attention_mask"] = [[1] * len(row["input_ids"]) for row in rows]
            return BatchEncoding(ragged | {key: value.tolist() for key, value in labels.items()})
        batch = dict(labels) | pad_cells(
            cells,
            pad_token_id=self.pad_token_id,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        if return_tensors is None:
            return BatchEncoding({key: value.tolist() for key, value in batch.items()})
        return BatchEncoding(as_tensors(batch, return_tensors))

    def _better_gene_column(self, reader: CellReader) -> str:
        """What to add to the too-few-genes error: the gene column that would match best, if one would."""
        matches = {
            name: len(np.unique(mapped[mapped >= 0]))
            for name, names in reader.gene_columns().items()
            for mapped in [self.vocabulary.map_genes(names).column_to_gene]
        }
        if not matches:
            return ""
        best = max(matches, key=lambda name: matches[name])
        if matches[best] < MIN_VOCABULARY_SHARE * len(self.vocabulary):
            return f" Neither would any of the other name columns match: {', '.join(matches)}."
        return f" gene_column={best!r} would match {matches[best]:,} genes: pass that."


def as_dataset(
    data: CellData,
    tokenizer: ScFoundationTokenizer,
    *,
    label: str | None = None,
    gene_names: Sequence[str] | np.ndarray | None = None,
    layer: str | None = None,
    gene_column: str | None = None,
    values: Values = "counts",
    total_counts: Any = None,
    target_depth: float | None = None,
    depth_fold: float | None = None,
    min_genes: int | None = None,
    on_empty_cell: OnEmptyCell = "error",
    original_mode: OriginalMode | None = None,
) -> Any:
    """A `datasets.Dataset` of tokenised cells, `{"input_ids", "values", "labels"?}`, in the input's order.

    The rows lie in memory as Arrow, 8 bytes a token. Cells that are left out are counted in a warning.

    Args:
        data: what the tokenizer takes.
        label: an obs column; its sorted values become the classes of `labels` (a `datasets.ClassLabel`).
        gene_names, layer, gene_column, values, total_counts, target_depth, depth_fold, min_genes,
            on_empty_cell, original_mode: as in `ScFoundationTokenizer.__call__`.
    """
    try:
        import datasets
        import pyarrow  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError("as_dataset makes a datasets.Dataset: pip install datasets") from error

    prepared = tokenizer.prepare(
        data,
        gene_names=gene_names,
        layer=layer,
        gene_column=gene_column,
        values=values,
        total_counts=total_counts,
        target_depth=target_depth,
        depth_fold=depth_fold,
        min_genes=min_genes,
        on_empty_cell=on_empty_cell,
        original_mode=original_mode,
    )
    with prepared:
        prepared.warn_left_out()
        features = {
            "input_ids": datasets.List(datasets.Value("int32")),
            "values": datasets.List(datasets.Value("float32")),
        }
        labels = None
        if label is not None:
            class_names, labels = prepared.class_labels(label)
            features["labels"] = datasets.ClassLabel(names=class_names)
        schema = datasets.Features(features).arrow_schema
        tables = []
        for start, stop in prepared.chunks():
            cells = prepared.encode(start, stop)
            offsets = pyarrow.array(cells.offsets, type=pyarrow.int32())
            columns = [
                pyarrow.ListArray.from_arrays(offsets, pyarrow.array(cells.input_ids, type=pyarrow.int32())),
                pyarrow.ListArray.from_arrays(offsets, pyarrow.array(cells.values)),
            ]
            if labels is not None:
                columns.append(pyarrow.array(labels[cells.cell_index], type=pyarrow.int64()))
            tables.append(pyarrow.Table.from_arrays(columns, schema=schema))
    return datasets.Dataset(
        datasets.table.InMemoryTable(pyarrow.concat_tables(tables)),
        info=datasets.DatasetInfo(features=datasets.Features(features)),
        fingerprint=datasets.fingerprint.generate_random_fingerprint(),  # the default would hash every token
    )


def _open_reader(
    data: CellData,
    *,
    gene_names: Sequence[str] | np.ndarray | None,
    layer: str | None,
    gene_column: str | None,
) -> CellReader:
    if isinstance(data, CellReader):
        return data
    pandas, anndata = sys.modules.get("pandas"), sys.modules.get("anndata")
    is_anndata = anndata is not None and isinstance(data, anndata.AnnData)
    if is_anndata or isinstance(data, str | os.PathLike):
        if gene_names is not None:
            raise ValueError("An AnnData brings its gene names: choose the column of var with gene_column=.")
        try:  # absolute, and guarded: the copy of this file on the Hub travels without the reader
            from scfoundation_hf.tokenization.anndata_reader import AnnDataReader
        except ImportError as error:
            raise ImportError(
                "Reading an AnnData needs the scfoundation-hf package: pip install scfoundation-hf. Without "
                "it, pass the matrix: tokenizer(adata.X, gene_names=adata.var_names)."
            ) from error
        return AnnDataReader(data, layer=layer, gene_column=gene_column)
    for name, option in (("layer", layer), ("gene_column", gene_column)):
        if option is not None:
            raise ValueError(f"{name}={option!r} chooses within an AnnData, but the input is a {type(data).__name__}.")
    if pandas is not None and isinstance(data, pandas.DataFrame):
        if gene_names is not None:
            raise ValueError("A DataFrame brings its gene names, its columns: leave gene_names out.")
        return MatrixReader.from_dataframe(data)
    if gene_names is None:
        raise ValueError("A matrix does not say which gene each column is: pass gene_names=, symbols or Ensembl ids.")
    return MatrixReader(data, gene_names)


def _check_padding(padding: bool | str, return_tensors: str | None) -> None:
    choices = (True, False, "longest", "max_length", "do_not_pad")
    if padding not in choices:
        raise ValueError(f"padding must be one of {choices}, got {padding!r}.")
    if padding in (False, "do_not_pad") and return_tensors is not None:
        raise ValueError(
            "Cells differ in length, so without padding there is no tensor: pass return_tensors=None for "
            "lists, or take the packed form from ScFoundationPackedDataCollator."
        )
