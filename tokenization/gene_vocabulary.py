"""The 19,264 genes of scFoundation and the alignment of any count matrix to them.

Counts and gene names come in as `anndata_reader` found them; counts over the vocabulary's genes, in the order
that the pretrained weights rely on, go out to the tokenizer, with a report of what happened to the genes.
This file is exported to the Hub with the tokenizer: it imports numpy and scipy only.
"""

import functools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import sparse

IdType = Literal["auto", "symbol", "ensembl"]

COLUMNS = (
    "symbol",
    "ensembl_id",
    "other_ensembl_ids",
    "approved_symbol",
    "previous_symbols",
    "alias_symbols",
)

ENSEMBL_ID = re.compile(r"(ENSG\d{11})(?:\.\d+)?(?:_PAR_Y)?")
MADE_UNIQUE = re.compile(r"(.+)-[1-9]\d*")  # what anndata's var_names_make_unique appends
MOUSE_ID = re.compile(r"ENSMUSG\d{11}(\.\d+)?")
MOUSE_SYMBOL = re.compile(r"[A-Z][a-z][a-z0-9-]*")

# Entries handled at once: bounds the temporary memory, about 60 bytes an entry.
ENTRIES_PER_BLOCK = 2**18


class Gene(NamedTuple):
    """One row of the vocabulary file: the published symbol and every other unambiguous name of the gene."""

    symbol: str
    ensembl_id: str | None = None
    other_ensembl_ids: tuple[str, ...] = ()
    approved_symbol: str | None = None
    previous_symbols: tuple[str, ...] = ()
    alias_symbols: tuple[str, ...] = ()


class GeneVocabulary:
    """An ordered list of genes, the names each is known by, and the alignment of counts to it.

    Args:
        genes: the genes in the order of the model's gene ids. No name may belong to two genes.
    Raises: ValueError: if there is no gene, or a symbol, Ensembl id or other name occurs twice.
    """

    def __init__(self, genes: Iterable[Gene]) -> None:
        """Index the names of `genes`."""
        self._fill(tuple(genes), where=lambda row: f"gene {row}")

    def _fill(self, genes: tuple[Gene, ...], *, where: Callable[[int], str]) -> None:
        if not genes:
            raise ValueError("A gene vocabulary needs at least one gene.")
        self.genes = genes
        self.symbols: tuple[str, ...] = tuple(gene.symbol for gene in genes)
        self.ensembl_ids: tuple[str | None, ...] = tuple(gene.ensembl_id for gene in genes)
        self._position_of_symbol: dict[str, int] = {}
        self._position_of_other_name: dict[str, int] = {}
        self._position_of_ensembl_id: dict[str, int] = {}

        def claim(name: str, row: int, positions: dict[str, int], kind: str) -> None:
            owner = positions.setdefault(name, row)
            if owner != row:
                raise ValueError(
                    f"{where(row)} ({genes[row].symbol!r}): {kind} {name!r} already belongs to "
                    f"{where(owner)} ({genes[owner].symbol!r}); a name must lead to one gene."
                )

        for row, gene in enumerate(genes):
            if not gene.symbol:
                raise ValueError(f"{where(row)}: the symbol is empty.")
            claim(gene.symbol, row, self._position_of_symbol, "symbol")
            for ensembl_id in (gene.ensembl_id, *gene.other_ensembl_ids):
                if ensembl_id:
                    claim(ensembl_id, row, self._position_of_ensembl_id, "Ensembl id")
        for row, gene in enumerate(genes):
            for name in (gene.approved_symbol, *gene.previous_symbols, *gene.alias_symbols):
                if name and name != gene.symbol:
                    owner = self._position_of_symbol.get(name)
                    if owner is not None:
                        raise ValueError(
                            f"{where(row)} ({gene.symbol!r}): the other name {name!r} is itself the symbol "
                            f"of {where(owner)}; a name must lead to one gene."
                        )
                    claim(name, row, self._position_of_other_name, "name")

    @classmethod
    def default(cls) -> "GeneVocabulary":
        """The published vocabulary, read once.

        Raises: FileNotFoundError: where this file was copied without its data, as code on the Hub is; there
            a tokenizer brings its own copy for `from_file`.
        """
        return _published_vocabulary()

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "GeneVocabulary":
        """Read a vocabulary: tab-separated, one gene a line, several names in one cell joined by `|`.

        Raises: ValueError: naming file and line, for missing columns, a line of another width, no genes, or a
            name that two genes claim.
        """
        with Path(path).open(encoding="utf-8") as file:
            lines = file.read().split("\n")
        header = lines[0].split("\t")
        missing = [column for column in COLUMNS if column not in header]
        if missing:
            raise ValueError(
                f"{path}, line 1: missing column(s) {', '.join(missing)}; expected the tab-separated columns "
                f"{', '.join(COLUMNS)}, found {lines[0][:200]!r}."
            )
        if lines[-1] == "":
            lines.pop()
        genes = []
        for number, line in enumerate(lines[1:], start=2):
            cells = line.split("\t")
            if len(cells) != len(header):
                raise ValueError(f"{path}, line {number}: {len(cells)} cells where the header has {len(header)}.")
            row = dict(zip(header, cells, strict=True))
            genes.append(
                Gene(
                    symbol=row["symbol"],
                    ensembl_id=row["ensembl_id"] or None,
                    other_ensembl_ids=_split_names(row["other_ensembl_ids"]),
                    approved_symbol=row["approved_symbol"] or None,
                    previous_symbols=_split_names(row["previous_symbols"]),
                    alias_symbols=_split_names(row["alias_symbols"]),
                )
            )
        if not genes:
            raise ValueError(f"{path}: the header is there but no gene follows it.")
        vocabulary = cls.__new__(cls)
        vocabulary._fill(tuple(genes), where=lambda row: f"{path}, line {row + 2}")
        return vocabulary

    def save(self, path: str | PathLike[str]) -> None:
        """Write the vocabulary as `from_file` reads it; the same vocabulary gives the same bytes."""
        lines = ["\t".join(COLUMNS)]
        for gene in self.genes:
            cells = ["|".join(cell) if isinstance(cell, tuple) else cell or "" for cell in gene]
            lines.append("\t".join(cells))
            num_names = sum(len(cell) if isinstance(cell, tuple) else bool(cell) for cell in gene)
            if len(re.findall(r"[^\t\n\r|]+", lines[-1])) != num_names:
                raise ValueError(f"A name of {gene!r} is empty or holds a tab, a line break or '|'.")
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")

    def __len__(self) -> int:
        """Number of genes."""
        return len(self.genes)

    def __contains__(self, symbol: object) -> bool:
        """Whether `symbol` is a vocabulary symbol; other names of its genes are not."""
        return symbol in self._position_of_symbol

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same genes, names included, in the same order."""
        return isinstance(other, GeneVocabulary) and self.genes == other.genes

    def __hash__(self) -> int:
        """Hash of the symbols."""
        return hash(self.symbols)

    def __repr__(self) -> str:
        """Size, first and last symbol."""
        return f"{type(self).__name__}({len(self):,} genes, {self.symbols[0]!r} to {self.symbols[-1]!r})"

    def index(self, symbol: str) -> int:
        """Position (the model's gene id) of a vocabulary symbol.

        Raises: KeyError: for any other name; the message names the symbol if it is a gene's other name.
        """
        position = self._position_of_symbol.get(symbol)
        if position is not None:
            return position
        known, _ = self._find(symbol, "auto") if isinstance(symbol, str) else (-1, "symbol")
        if known >= 0:
            raise KeyError(f"{symbol!r} is no vocabulary symbol, but another name of {self.symbols[known]!r}.")
        raise KeyError(
            f"{symbol!r} is not among the vocabulary's {len(self):,} human gene symbols "
            f"({', '.join(map(repr, self.symbols[:3]))}, ...)."
        )

    def _find(self, name: str, id_type: IdType) -> tuple[int, str]:
        """Position of the gene called `name` or -1, and as what the name was looked up."""
        ensembl_id = ENSEMBL_ID.fullmatch(name) if id_type != "symbol" else None
        if ensembl_id:
            return self._position_of_ensembl_id.get(ensembl_id[1], -1), "ensembl"
        if id_type == "ensembl":
            return -1, "symbol"
        position = self._position_of_symbol.get(name)
        if position is None:
            position = self._position_of_other_name.get(name, -1)
        return position, "symbol"

    def map_genes(self, gene_names: Any, *, id_type: IdType = "auto") -> "GeneMapping":
        """Find each column's gene from its name: the part of the alignment that needs no counts.

        An exact vocabulary symbol wins; then other names that are unambiguous over all of HGNC. `ENSG` and
        eleven digits, with or without a version and `_PAR_Y`, is an Ensembl id. `NAME-1`, as anndata's
        `var_names_make_unique` writes it, is a further column of `NAME` where `NAME` is a column too and
        `NAME-1` is no known name.

        Args:
            gene_names: one name a column: a list, an array or a pandas/pyarrow array, Series or Index.
            id_type: `"auto"` decides for each name; the other two look names up as nothing else.
        Raises: ValueError: for no names, a missing name, or positions ('0', '1', ...) in the place of names.
        """
        if id_type not in ("auto", "symbol", "ensembl"):
            raise ValueError(f"id_type is {id_type!r}; expected 'auto', 'symbol' or 'ensembl'.")
        names = _as_gene_names(gene_names)
        all_names = set(names)
        column_to_gene = np.full(len(names), -1, dtype=np.int32)
        columns_of_gene: dict[int, list[str]] = {}
        renamed: dict[str, str] = {}
        dropped: list[str] = []
        found_types: set[str] = set()
        for column, name in enumerate(names):
            known_name = name
            position, found_type = self._find(name, id_type)
            if position < 0:
                made_unique = MADE_UNIQUE.fullmatch(name)
                if made_unique and made_unique[1] in all_names:
                    known_name = made_unique[1]
                    position, found_type = self._find(known_name, id_type)
            if position < 0:
                dropped.append(name)
                continue
            column_to_gene[column] = position
            columns_of_gene.setdefault(position, []).append(name)
            found_types.add(found_type)
            if found_type == "symbol" and known_name != self.symbols[position]:
                renamed[name] = self.symbols[position]
        if id_type == "auto":
            types = found_types or {self._find(name, "auto")[1] for name in names}
            found = "mixed" if len(types) == 2 else types.pop()
        else:
            found = id_type
        column_to_gene.setflags(write=False)
        return GeneMapping(
            column_to_gene=column_to_gene,
            num_vocabulary_genes=len(self),
            id_type=found,
            renamed=renamed,
            summed={
                self.symbols[position]: columns
                for position, columns in sorted(columns_of_gene.items())
                if len(columns) > 1
            },
            missing=[symbol for row, symbol in enumerate(self.symbols) if row not in columns_of_gene],
            dropped=dropped,
        )

    def align(
        self,
        counts: Any,
        gene_names: Any,
        *,
        id_type: IdType = "auto",
        min_vocabulary_share: float = 0.05,
        min_counts_kept: float = 0.5,
    ) -> tuple[sparse.csr_matrix, "AlignmentReport"]:
        """Counts over the vocabulary's genes, in its order, and what happened to each gene on the way.

        Columns are matched by name whatever their number and order (`map_genes` says how); several columns of
        one gene are summed, genes without a column are zero, all other columns are dropped. Values are not
        judged here: negative or non-integer counts are the tokenizer's to refuse.

        Args:
            counts: `(cells, columns)`, a scipy sparse matrix or array, or a NumPy array. Not changed.
            gene_names: `(columns,)`.
            min_vocabulary_share: least share of the vocabulary's genes that must have a column.
            min_counts_kept: least share of all counts, over the whole matrix, that must be kept.
        Returns: `(cells, genes)` CSR of the dtype of `counts`, indices sorted, no stored zeros; the report.
        Raises: ValueError: if names and columns differ in number, there are no cells or no columns, or one of
            the two shares is too low.
        Source: replaces the gene selection of `model/get_embedding.py` of biomap-research/scFoundation, which
            aligns by name only below 19,264 columns and takes the order of wider matrices on trust.
        """
        matrix = _as_csr(counts)
        mapping = self.map_genes(gene_names, id_type=id_type)
        mapping._checked(matrix)
        mapping.check_vocabulary_share(min_vocabulary_share)
        counts_total, counts_kept = mapping.cell_totals(matrix)
        mapping.check_counts_kept(counts_total, counts_kept, min_counts_kept)
        return mapping.apply(matrix), mapping.report(counts_total, counts_kept)


@dataclass(frozen=True, eq=False)
class GeneMapping:
    """Which vocabulary gene each column of a file is. Made once a file, applied to each chunk of its cells.

    Attributes:
        column_to_gene: `(columns,)` int32, the gene's position in the vocabulary or -1.
        id_type: as what names were found: `"symbol"`, `"ensembl"` or `"mixed"`.
        renamed: name in the file -> vocabulary symbol, for symbols known by another name.
        summed: vocabulary symbol -> the names of its columns, where there are several.
        missing: vocabulary symbols without a column.
        dropped: names of columns that are no gene of the vocabulary.
    """

    column_to_gene: np.ndarray
    num_vocabulary_genes: int
    id_type: str
    renamed: dict[str, str] = field(repr=False)
    summed: dict[str, list[str]] = field(repr=False)
    missing: list[str] = field(repr=False)
    dropped: list[str] = field(repr=False)

    @property
    def num_input_genes(self) -> int:
        """Columns of the file."""
        return len(self.column_to_gene)

    @property
    def num_matched_genes(self) -> int:
        """Vocabulary genes that have at least one column."""
        return self.num_vocabulary_genes - len(self.missing)

    def check_vocabulary_share(self, minimum: float) -> None:
        """Refuse a file with too few of the vocabulary's genes; warn where under half of them are present.

        Raises: ValueError: if less than `minimum` (a share, 0 to 1) of the vocabulary has a column.
        """
        _check_share("min_vocabulary_share", minimum)
        share = self.num_matched_genes / self.num_vocabulary_genes
        if share < minimum:
            raise ValueError(
                f"Only {self._matched()} ({share:.1%}); at least {minimum:.0%} are needed "
                f"(min_vocabulary_share of GeneVocabulary.align). {self._advice()} If the file was cut down to "
                "variable genes, use the full count matrix."
            )
        if share < 0.5:
            warnings.warn(
                f"Only {self._matched()} ({share:.1%}): read depth is computed from a subset of genes, and "
                "the model sees the others as not expressed. If the file was cut down to variable genes, use "
                "the full count matrix.",
                UserWarning,
                stacklevel=3,  # the caller of align
            )

    def check_counts_kept(self, counts_total: np.ndarray, counts_kept: np.ndarray, minimum: float) -> None:
        """Refuse a file most of whose counts fall on genes outside the vocabulary.

        The share is over all cells together. A file without any counts has none to lose and passes.

        Raises: ValueError: if less than `minimum` (a share, 0 to 1) of all counts is kept.
        """
        _check_share("min_counts_kept", minimum)
        share = _share(counts_total, counts_kept)
        if share < minimum:
            raise ValueError(
                f"Only {share:.1%} of all counts fall on genes of the vocabulary; at least {minimum:.0%} are "
                f"needed (min_counts_kept of GeneVocabulary.align). Matched: {self._matched()}. {self._advice()}"
            )

    def cell_totals(self, counts: Any) -> tuple[np.ndarray, np.ndarray]:
        """Each cell's total over all columns and over the columns that are kept: two `(cells,)` float64."""
        matrix = self._checked(counts)
        is_kept = self.column_to_gene >= 0
        counts_total = np.zeros(matrix.shape[0])
        counts_kept = np.zeros(matrix.shape[0])
        for first, last, start, stop in _row_blocks(matrix.indptr):
            row_starts = matrix.indptr[first : last + 1] - start
            values = matrix.data[start:stop].astype(np.float64)
            counts_total[first:last] = _sum_rows(values, row_starts)
            # Not multiplied by 0: a NaN in a dropped column is not the vocabulary's.
            values[~is_kept[matrix.indices[start:stop]]] = 0
            counts_kept[first:last] = _sum_rows(values, row_starts)
        return counts_total, counts_kept

    def apply(self, counts: Any) -> sparse.csr_matrix:
        """`(cells, columns)` counts as `(cells, genes)`: columns moved, summed or dropped.

        Works through blocks of rows straight into the result: besides it only a few tens of MB are needed.

        Returns: CSR of the dtype of `counts`, indices sorted, no duplicates, no stored zeros; int32 indices
            where they fit.
        Raises: ValueError: if `counts` has another number of columns than this mapping, or a sum does not fit
            a dtype of 8 or 16 bits.
        """
        matrix = self._checked(counts)
        num_cells, num_entries = matrix.shape[0], int(matrix.indptr[-1])
        index_dtype = sparse.get_index_dtype(maxval=max(num_entries, self.num_vocabulary_genes))
        # Upper bounds, cut to size below: pages never written to are never taken from the system.
        data = np.empty(num_entries, dtype=matrix.dtype)
        indices = np.empty(num_entries, dtype=index_dtype)
        indptr = np.zeros(num_cells + 1, dtype=index_dtype)
        filled = 0
        for first, last, start, stop in _row_blocks(matrix.indptr):
            genes = self.column_to_gene[matrix.indices[start:stop]]
            values = matrix.data[start:stop]
            kept = np.flatnonzero((genes >= 0) & (values != 0))
            block_indptr = np.searchsorted(kept, matrix.indptr[first : last + 1] - start)
            block = sparse.csr_matrix(
                (values[kept], genes[kept], block_indptr), shape=(last - first, self.num_vocabulary_genes)
            )
            if not block.has_sorted_indices:
                # There and back are two counting sorts: three times faster than sorting each row.
                block = block.tocsc().tocsr()
            if not block.has_canonical_format:
                block = _sum_duplicates(block)
            end = filled + block.nnz
            data[filled:end] = block.data
            indices[filled:end] = block.indices
            indptr[first + 1 : last + 1] = filled + block.indptr[1:].astype(index_dtype)
            filled = end
        data.resize(filled, refcheck=False)  # in place: no second copy
        indices.resize(filled, refcheck=False)
        aligned = sparse.csr_matrix((data, indices, indptr), shape=(num_cells, self.num_vocabulary_genes))
        aligned.has_canonical_format = True
        return aligned

    def report(self, counts_total: np.ndarray, counts_kept: np.ndarray) -> "AlignmentReport":
        """The report of a file whose cells have these totals before and after alignment (`cell_totals`)."""
        total = np.asarray(counts_total, dtype=np.float64)
        kept = np.asarray(counts_kept, dtype=np.float64)
        per_cell = np.full(total.shape, np.nan)
        np.divide(kept, total, out=per_cell, where=total != 0)
        return AlignmentReport(
            num_input_genes=self.num_input_genes,
            num_vocabulary_genes=self.num_vocabulary_genes,
            num_matched_genes=self.num_matched_genes,
            id_type=self.id_type,
            renamed=self.renamed,
            summed=self.summed,
            missing=self.missing,
            dropped=self.dropped,
            counts_kept=_share(total, kept),
            counts_kept_per_cell=per_cell,
            counts_kept_summary=_summarise(per_cell),
        )

    def _checked(self, counts: Any) -> Any:
        matrix = _as_csr(counts)
        if matrix.shape[1] != self.num_input_genes:
            raise ValueError(
                f"counts has {matrix.shape[1]:,} columns, but there are {self.num_input_genes:,} gene names; "
                "pass one name a column, in the order of the columns."
            )
        return matrix

    def _matched(self) -> str:
        return (
            f"{self.num_matched_genes:,} of the vocabulary's {self.num_vocabulary_genes:,} genes are among "
            f"the {self.num_input_genes:,} gene names"
        )

    def _advice(self) -> str:
        names = self.dropped
        num_mouse = sum(bool(MOUSE_ID.fullmatch(name) or MOUSE_SYMBOL.fullmatch(name)) for name in names)
        num_ensembl = sum(bool(ENSEMBL_ID.fullmatch(name)) for name in names)
        parts = []
        if names:
            parts.append(f"First unmatched: {', '.join(repr(name) for name in names[:5])}.")
        mouse = "mouse symbols look like 'Actb' and mouse ids like 'ENSMUSG00000029580'"
        if num_mouse > len(names) / 2:
            parts.append(
                f"These look like mouse names ({mouse}); the vocabulary is human: replace them by their "
                "human orthologs first."
            )
        else:
            parts.append(f"Expected human symbols like 'ACTB' or ids like 'ENSG00000075624' ({mouse}).")
        if self.id_type == "symbol" and num_ensembl > len(names) / 2:
            parts.append('Most unmatched names are Ensembl ids: pass id_type="auto" or "ensembl".')
        parts.append(
            "If the gene names are in a column of adata.var, pass gene_column=<that column>; "
            'id_type="symbol" or "ensembl" of GeneVocabulary.align fixes how names are read.'
        )
        return " ".join(parts)


@dataclass(frozen=True)
class AlignmentReport:
    """What happened to a file's genes and counts: printable, and JSON for `uns`.

    Attributes:
        num_input_genes: columns of the file.
        num_vocabulary_genes: genes of the vocabulary.
        num_matched_genes: vocabulary genes with at least one column.
        id_type: as what names were found: `"symbol"`, `"ensembl"` or `"mixed"`.
        renamed: name in the file -> vocabulary symbol, for symbols known by another name.
        summed: vocabulary symbol -> the names of its columns, where there are several.
        missing: vocabulary symbols without a column.
        dropped: names of columns that are no gene of the vocabulary.
        counts_kept: share of all counts that fall on the vocabulary; NaN if there are no counts.
        counts_kept_per_cell: `(cells,)` the same for each cell, NaN without counts; None once read from JSON.
        counts_kept_summary: number of cells and of those without counts; min, median, max of the shares.
    """

    num_input_genes: int
    num_vocabulary_genes: int
    num_matched_genes: int
    id_type: str
    renamed: dict[str, str]
    summed: dict[str, list[str]]
    missing: list[str]
    dropped: list[str]
    counts_kept: float
    counts_kept_per_cell: np.ndarray | None = field(default=None, compare=False, repr=False)
    counts_kept_summary: dict[str, float | None] | None = None

    def __str__(self) -> str:
        """A few lines for a person; the first names only of each list."""
        share = self.num_matched_genes / self.num_vocabulary_genes
        names = {"symbol": "gene symbols", "ensembl": "Ensembl ids", "mixed": "gene symbols and Ensembl ids"}
        lines = [
            f"{self.num_matched_genes:,} of {self.num_vocabulary_genes:,} genes found ({share:.1%}) "
            f"in {self.num_input_genes:,} columns of {names[self.id_type]}",
            "no counts" if math.isnan(self.counts_kept) else f"{self.counts_kept:.1%} of all counts kept",
        ]
        summary = self.counts_kept_summary
        if summary and summary["median"] is not None:
            low, middle, high = (f"{summary[key]:.1%}" for key in ("min", "median", "max"))
            lines[1] += f" (per cell: min {low}, median {middle}, max {high})"
        if summary and summary["num_empty_cells"]:
            lines[1] += f"; cells without counts: {summary['num_empty_cells']:,}"
        details = {
            "renamed": [f"{name} -> {symbol}" for name, symbol in self.renamed.items()],
            "summed": [f"{symbol} = {' + '.join(columns)}" for symbol, columns in self.summed.items()],
            "missing": self.missing,
            "dropped": self.dropped,
        }
        for what, entries in details.items():
            shown = ", ".join(entries[:4]) + (", ..." if len(entries) > 4 else "")
            lines.append(f"{what} {len(entries):,}" + (f": {shown}" if entries else ""))
        return "\n  ".join(lines)

    def to_json(self) -> str:
        """Everything but the per-cell shares, of which the summary is kept; NaN becomes null."""
        content = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        del content["counts_kept_per_cell"]
        if math.isnan(self.counts_kept):
            content["counts_kept"] = None
        return json.dumps(content, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "AlignmentReport":
        """The report that `to_json` wrote, without the per-cell shares."""
        content = json.loads(text)
        if content["counts_kept"] is None:
            content["counts_kept"] = math.nan
        return cls(**content)


@functools.cache
def _published_vocabulary() -> GeneVocabulary:
    path = Path(__file__).parent / "vocabulary" / "gene_vocabulary.tsv"
    if not path.is_file():
        raise FileNotFoundError(
            f"The published gene vocabulary is not at {path}. Code loaded from the Hub comes without it: "
            "read the tokenizer's own copy with GeneVocabulary.from_file, or install scfoundation-hf."
        )
    return GeneVocabulary.from_file(path)


def _split_names(cell: str) -> tuple[str, ...]:
    return tuple(cell.split("|")) if cell else ()


def _as_gene_names(gene_names: Any) -> list[str]:
    if isinstance(gene_names, (str, bytes)):
        raise ValueError(f"gene_names is the single string {gene_names!r}; pass one name a column.")
    # Makes Python strings of what NumPy, pandas (Index, Series, any dtype) and pyarrow hold.
    names = list(np.asarray(gene_names, dtype=object) if hasattr(gene_names, "__array__") else gene_names)
    if not names:
        raise ValueError("No gene names: counts have no columns. Pass a matrix with at least one gene.")
    if all(_is_number(name) for name in names):
        raise ValueError(
            f"The gene names are numbers ({', '.join(repr(str(name)) for name in names[:3])}...): positions "
            "are not names, and genes are matched by name only. Pass gene_column=<column of adata.var with "
            "symbols or Ensembl ids>, or name the columns."
        )
    for column, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(
                f"The gene name of column {column} is missing or no text: {name!r}. Every column needs a "
                "symbol or Ensembl id; drop such columns, or pass gene_column=<another column of adata.var>."
            )
    return names


def _is_number(name: object) -> bool:
    if isinstance(name, (int, float, np.integer, np.floating)):
        return not math.isnan(name)
    return isinstance(name, str) and re.fullmatch(r"\d+(\.0)?", name) is not None


def _as_csr(counts: Any) -> Any:
    is_sparse = sparse.issparse(counts)
    if not (is_sparse or isinstance(counts, np.ndarray)):
        raise TypeError(f"counts is a {type(counts).__name__}; expected a scipy sparse matrix or a NumPy array.")
    if counts.ndim != 2:
        raise ValueError(f"counts has shape {counts.shape}; expected two dimensions, (cells, genes).")
    for count, what in zip(counts.shape, ("cells", "genes"), strict=True):
        if count == 0:
            raise ValueError(f"counts has shape {counts.shape}: there are no {what} in it.")
    if counts.dtype.kind not in "iuf" or counts.dtype == np.float16:
        raise ValueError(f"counts are {counts.dtype}; expected integers, float32 or float64.")
    return counts if is_sparse and counts.format == "csr" else sparse.csr_matrix(counts)


def _row_blocks(indptr: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """First and last row (exclusive) of each block, and the entries between them."""
    first, num_rows = 0, len(indptr) - 1
    while first < num_rows:
        limit = int(indptr[first]) + ENTRIES_PER_BLOCK
        last = max(first + 1, int(np.searchsorted(indptr, limit, side="right")) - 1)
        yield first, last, int(indptr[first]), int(indptr[last])
        first = last


def _sum_rows(values: np.ndarray, row_starts: np.ndarray) -> np.ndarray:
    sums = np.zeros(len(row_starts) - 1)
    is_filled = row_starts[1:] > row_starts[:-1]  # reduceat does not know empty rows
    if is_filled.any():
        sums[is_filled] = np.add.reduceat(values, row_starts[:-1][is_filled])
    return sums


def _sum_duplicates(block: Any) -> Any:
    dtype = block.dtype
    is_narrow = dtype.kind in "iu" and dtype.itemsize < 4
    if is_narrow:
        block = block.astype(np.int64)
    block.sum_duplicates()
    block.eliminate_zeros()
    if is_narrow:
        limits = np.iinfo(dtype)
        if block.nnz and (block.data.max() > limits.max or block.data.min() < limits.min):
            raise ValueError(
                f"The counts of several columns of one gene sum to {block.data.max():,}, more than {dtype} "
                "holds; pass counts.astype('int32')."
            )
        block = block.astype(dtype)
    return block


def _share(counts_total: np.ndarray, counts_kept: np.ndarray) -> float:
    total = float(np.sum(counts_total, dtype=np.float64))
    return float(np.sum(counts_kept, dtype=np.float64)) / total if total else math.nan


def _summarise(per_cell: np.ndarray) -> dict[str, float | None]:
    known = per_cell[~np.isnan(per_cell)]
    return {
        "num_cells": len(per_cell),
        "num_empty_cells": len(per_cell) - len(known),
        "min": float(known.min()) if known.size else None,
        "median": float(np.median(known)) if known.size else None,
        "max": float(known.max()) if known.size else None,
    }


def _check_share(argument: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{argument} is {value!r}; expected a share between 0 and 1.")
