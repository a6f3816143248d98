"""Cells that were checked and wait to be encoded: what `ScFoundationTokenizer.prepare` gives.

A first pass over the input looks at every value, sums totals and finds lengths, so that a wrong value in the last cell
is told before anything is computed; `encode` then makes the tokens of any range of cells.
"""

import hashlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy.sparse import csr_matrix

from .data_collator import EncodedCells
from .gene_vocabulary import AlignmentReport, GeneMapping, GeneVocabulary
from .matrix_reader import CHUNK_ENTRIES, CellReader
from .read_depth import (
    COUNTS_PER_CELL,
    MAX_LOG1P_CP10K,
    MAX_RECOVERY_RESIDUE,
    Entry,
    are_logged,
    first_entry,
    first_infinite,
    first_nan,
    first_negative,
    first_non_integer,
    log1p_cp10k,
    log10_source_depth,
    log10_target_depth,
    recover_counts,
    row_totals,
    with_data,
    without_stored_zeros,
    working_precision,
)

Values = Literal["counts", "expected_counts", "log1p_cp10k", "recover_counts"]
CountValues = Literal["counts", "expected_counts", "recover_counts"]  # those of them that end as counts
OnEmptyCell = Literal["error", "nan"]
OriginalMode = Literal["normalized_cells", "bulk_raw", "bulk_normalized"]

MIN_COUNTS_KEPT = 0.5
_NAMES_SHOWN = 5
_CP10K_TOLERANCE = 0.01
_SAMPLED_ROWS = 256
_VALUES_MEANING = {
    "counts": "raw integer counts, turned into log1p(counts per 10,000)",
    "expected_counts": "fractional counts as they are, turned into log1p(counts per 10,000)",
    "log1p_cp10k": "log1p(counts per 10,000) as they are, with total counts given",
    "recover_counts": "normalised values, taken back to counts (each cell's smallest value = 1 count), "
    "then turned into log1p(counts per 10,000)",
}
_ORIGINAL_MEANING = {
    "normalized_cells": "log-normalised values as they are; read depth from their sum, as the original's "
    "singlecell, pre_normalized T",
    "bulk_raw": "bulk counts, scaled to the median total of all samples of the file, then log1p; T = S = "
    "log10 of the sum of these logs, as the original's bulk, pre_normalized F",
    "bulk_normalized": "bulk log-normalised values as they are; T = S = their sum, without a logarithm, as "
    "the original's bulk, pre_normalized T",
}


@dataclass(frozen=True)
class InputOptions:
    """How the values are to be taken; validated as far as it can be without the data."""

    layer: str | None
    gene_column: str | None
    values: Values
    total_counts: Any
    target_depth: float | None
    depth_fold: float | None
    min_genes: int | None
    on_empty_cell: OnEmptyCell
    original_mode: OriginalMode | None

    def __post_init__(self) -> None:
        _check_choice("values", self.values, get_args(Values))
        _check_choice("on_empty_cell", self.on_empty_cell, get_args(OnEmptyCell))
        if self.original_mode is not None:
            _check_choice("original_mode", self.original_mode, get_args(OriginalMode))
            for name, is_given in (
                ("values", self.values != "counts"),
                ("total_counts", self.total_counts is not None),
            ):
                if is_given:
                    raise ValueError(
                        f"original_mode={self.original_mode!r} fixes how values and totals are taken: leave {name} out."
                    )
        self._check_depths()
        if self.values == "log1p_cp10k" and self.total_counts is None:
            raise ValueError(
                "values='log1p_cp10k' needs total_counts=, each cell's raw total count (an obs column such "
                "as 'n_counts' or 'total_counts', or an array): the depth is no longer in the values. Where "
                "it is lost, values='recover_counts' may find it again."
            )
        if self.values != "log1p_cp10k" and self.total_counts is not None:
            raise ValueError(
                f"total_counts= goes with values='log1p_cp10k'; with values={self.values!r} the read depth "
                "is summed from the counts themselves, over the vocabulary's genes."
            )
        if self.min_genes is not None and (
            not _is_number(self.min_genes) or self.min_genes != int(self.min_genes) or self.min_genes < 0
        ):
            raise ValueError(f"min_genes must be a whole number of genes, got {self.min_genes!r}.")

    def _check_depths(self) -> None:
        if self.target_depth is not None and self.depth_fold is not None:
            raise ValueError(
                f"target_depth={self.target_depth!r} and depth_fold={self.depth_fold!r} exclude each other: "
                "pass the total count to predict for, or the multiple of each cell's own total."
            )
        for name, depth in (("target_depth", self.target_depth), ("depth_fold", self.depth_fold)):
            if depth is None:
                continue
            if self.original_mode in ("bulk_raw", "bulk_normalized"):
                raise ValueError(f"original_mode={self.original_mode!r} sets T = S: leave {name} out.")
            if not _is_number(depth) or depth <= 0:
                raise ValueError(f"{name} must be a positive number, got {depth!r}.")
        if self.target_depth is not None and self.target_depth < 100:
            raise ValueError(
                f"target_depth={self.target_depth!r} is a total count, not a logarithm: for what the "
                "original calls t4, pass target_depth=10_000. For a multiple of each cell's own total pass "
                "depth_fold."
            )

    @property
    def are_logs(self) -> bool:
        """Whether the input's values are logarithms, which do not add up when duplicate genes are merged."""
        return self.values == "log1p_cp10k" or self.original_mode in ("normalized_cells", "bulk_normalized")


class PreparedCells:
    """Checked input, ready to be encoded in any order and chunking. `ScFoundationTokenizer.prepare` makes it.

    Attributes:
        num_cells, cell_names: of the input, cells left out included; all arrays below have one entry for
            each.
        report: what happened to the genes.
        settings: how the values were taken and what the first pass found; JSON-able.
        counts_kept_per_cell: share of a cell's counts that lie on vocabulary genes; NaN for a cell without
            counts.
        num_expressed_genes: vocabulary genes with a value above 0.
        total_counts: float64, over the aligned genes (as given by the user with `values="log1p_cp10k"`).
        log10_target_depth, log10_source_depth: float64, T and S; NaN for empty cells.
        is_empty, is_below_min_genes, is_kept: `is_kept` is neither; only those cells are tokenised.
        token_lengths: int64, expressed genes plus T and S.
    """

    def __init__(
        self, reader: CellReader, vocabulary: GeneVocabulary, mapping: GeneMapping, options: InputOptions
    ) -> None:
        """Run the first pass; `ScFoundationTokenizer.prepare` gathers the arguments."""
        self.num_cells = reader.num_cells
        self.cell_names = reader.cell_names
        self._reader, self._vocabulary, self._mapping, self._options = reader, vocabulary, mapping, options
        self._merges_columns = bool(mapping.summed)
        self._is_logged = options.values == "recover_counts" and self._find_if_logged()
        self._given_totals = self._read_total_counts()
        self._bulk_median: float | None = None
        self._largest_residue = 0.0
        self._first_pass()

    # --- First pass: every value is checked, nothing is tokenised ---

    def _first_pass(self) -> None:
        n = self.num_cells
        counts_in_input, counts_kept, aligned_totals = np.zeros(n), np.zeros(n), np.zeros(n)
        self.num_expressed_genes = np.zeros(n, dtype=np.int64)
        for start, stop in self.chunks():
            values = self._checked_rows(start, stop)
            in_input, kept = self._mapping.cell_totals(self._as_counts(values))
            counts_in_input[start:stop], counts_kept[start:stop] = in_input, kept
            if self._options.values == "log1p_cp10k":
                self._check_cp10k_totals(in_input, start)
            aligned = self._align(values)
            aligned_totals[start:stop] = row_totals(aligned)
            self.num_expressed_genes[start:stop] = np.diff(aligned.indptr)

        self._mapping.check_counts_kept(counts_in_input, counts_kept, MIN_COUNTS_KEPT)
        self.report: AlignmentReport = self._mapping.report(counts_in_input, counts_kept)
        assert self.report.counts_kept_per_cell is not None  # only a report read from JSON lacks it
        self.counts_kept_per_cell = self.report.counts_kept_per_cell

        self.token_lengths = self.num_expressed_genes + 2
        self.is_empty = self.num_expressed_genes == 0
        self.is_below_min_genes = ~self.is_empty & (self.num_expressed_genes < (self._options.min_genes or 0))
        self.is_kept = ~(self.is_empty | self.is_below_min_genes)
        self._check_cells_left()

        self.total_counts = aligned_totals if self._given_totals is None else self._given_totals
        if self._given_totals is not None:
            self._check_given_totals(self._given_totals)
        self._find_depths()
        self.settings = self._describe_settings()

    def _checked_rows(self, start: int, stop: int) -> csr_matrix:
        """Rows in working precision, refused if any value is impossible; counts where they were recovered."""
        rows = working_precision(self._reader.read(start, stop))
        for kind, offender in (
            ("is not a number (NaN)", first_nan(rows)),
            ("is infinite", first_infinite(rows)),
            ("is negative", first_negative(rows)),
        ):
            if offender is not None:
                raise ValueError(
                    f"{self._locate(offender, start)}, which {kind}. "
                    + (
                        "Scaled or centred values can't be used: pass the counts (layer=)."
                        if offender.value < 0
                        else "Mend or drop the cell or gene first."
                    )
                    + self._where_integers_are()
                )
        if self._options.original_mode is not None:
            return rows
        match self._options.values:
            case "counts":
                if (offender := first_non_integer(rows)) is not None:
                    raise ValueError(self._not_counts(offender, start))
            case "log1p_cp10k":
                self._check_logs(rows, start)
            case "recover_counts":
                rows, residues = recover_counts(rows, is_logged=self._is_logged)
                self._check_recovery(rows, residues, start)
        return rows

    def _align(self, values: csr_matrix) -> csr_matrix:
        """Over the vocabulary's genes, without stored zeros; duplicates are summed as counts, logs too."""
        aligned = self._mapping.apply(values)
        if not (self._options.are_logs and self._merges_columns):
            return aligned
        with np.errstate(over="ignore"):
            merged = self._mapping.apply(with_data(values, np.expm1(values.data)))
            is_merged = np.zeros(len(self._vocabulary), dtype=bool)
            is_merged[[self._vocabulary.index(symbol) for symbol in self._mapping.summed]] = True
            data = np.where(is_merged[aligned.indices], np.log1p(merged.data), aligned.data)
        if not np.isfinite(data).all():
            raise ValueError(
                f"{self._reader.description} holds values up to {values.data.max():g}, too large to be "
                f"logarithms, while {self._how_taken()} was asked for."
            )
        return with_data(aligned, data.astype(aligned.dtype))

    def _as_counts(self, matrix: csr_matrix) -> csr_matrix:
        """On a linear scale, for the share of counts kept; original modes keep their own scale."""
        return with_data(matrix, np.expm1(matrix.data)) if self._options.values == "log1p_cp10k" else matrix

    def _find_depths(self) -> None:
        options = self._options
        if options.original_mode == "bulk_normalized":
            self.log10_source_depth = self.total_counts.copy()
        elif options.original_mode == "bulk_raw":
            self._bulk_median = float(np.median(self.total_counts[self.total_counts > 0]))
            sums = np.zeros(self.num_cells)
            for start, stop in self.chunks():  # the median is known only after the first pass
                sums[start:stop] = row_totals(self._values(start, stop))
            self.log10_source_depth = log10_source_depth(sums)
        else:
            self.log10_source_depth = log10_source_depth(self.total_counts)
        if options.original_mode in ("bulk_raw", "bulk_normalized"):
            self.log10_target_depth = self.log10_source_depth.copy()
        else:
            self.log10_target_depth = log10_target_depth(
                self.total_counts, target_depth=options.target_depth, depth_fold=options.depth_fold
            )
        # Given totals may say that a cell has counts while its values say that it has none.
        self.log10_source_depth[self.is_empty] = self.log10_target_depth[self.is_empty] = np.nan

    # --- Second pass ---

    def chunks(self, *, max_entries: int = CHUNK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Consecutive ranges of cells that together are all, each of at most `max_entries` stored entries."""
        return self._reader.chunks(max_entries=max_entries)

    def encode(self, start: int, stop: int) -> EncodedCells:
        """The tokens of the kept cells in [start, stop), whose rows are in `EncodedCells.cell_index`.

        Reads the rows again; the result does not depend on how the input is cut into ranges.
        """
        if not 0 <= start <= stop <= self.num_cells:
            raise ValueError(f"Cells [{start}, {stop}) of {self.num_cells:,} were asked for.")
        values = self._values(start, stop)
        kept = np.flatnonzero(self.is_kept[start:stop])
        if len(kept) < stop - start:
            values = values[kept]
        cell_index = kept + start
        offsets = np.concatenate([[0], np.cumsum(self.token_lengths[cell_index])]).astype(np.int64)
        source, target = offsets[1:] - 1, offsets[1:] - 2
        is_gene = np.ones(offsets[-1], dtype=bool)
        is_gene[source] = is_gene[target] = False
        input_ids = np.empty(offsets[-1], dtype=np.int64)
        token_values = np.empty(offsets[-1], dtype=np.float32)
        input_ids[is_gene], token_values[is_gene] = values.indices, values.data
        num_genes = len(self._vocabulary)
        input_ids[target], token_values[target] = num_genes, self.log10_target_depth[cell_index]
        input_ids[source], token_values[source] = num_genes + 1, self.log10_source_depth[cell_index]
        return EncodedCells(input_ids, token_values, offsets, cell_index)

    def counts(self, start: int, stop: int) -> csr_matrix:
        """The aligned counts of the cells in [start, stop), `(cells, genes)`, those not kept included.

        Raises: ValueError: if the values are not counts but logarithms, or a bulk or normalised original mode.
        """
        if self._options.are_logs or self._options.original_mode is not None:
            raise ValueError(f"The input holds no counts but {self._how_taken()}.")
        return self._align(self._checked_rows(start, stop))

    def obs_column(self, name: str) -> np.ndarray:
        """One column of obs, `(cells,)`. KeyError: naming the columns there are."""
        return self._reader.obs_column(name)

    def _values(self, start: int, stop: int) -> csr_matrix:
        """What stands at the gene tokens, in the input's precision."""
        aligned = self._align(self._checked_rows(start, stop))
        if self._options.are_logs:
            return aligned
        totals = self.total_counts[start:stop]
        return log1p_cp10k(aligned, totals, scale=self._bulk_median or COUNTS_PER_CELL)

    # --- What is said about it ---

    def describe(self) -> str:
        """How the values were taken and what happened to the cells and genes, in a few lines for people."""
        options, kept = self._options, self.is_kept
        if options.original_mode in ("bulk_raw", "bulk_normalized"):
            target = "T = S"
        elif options.target_depth is not None:
            target = f"T = log10 of target depth {options.target_depth:,.0f}"
        elif options.depth_fold is not None:
            target = f"T = log10 of {options.depth_fold:g} times each cell's own total"
        else:
            target = "T = S, each cell's own depth"
        lines = [
            f"Input: {self.num_cells:,} cells x {self._reader.num_columns:,} genes, {self._reader.description}",
            f"Values: {self._how_taken()}",
            f"Read depth: median total {np.median(self.total_counts[kept]):,.6g} over the vocabulary's genes; {target}",
            f"Cells: {kept.sum():,} tokenised, median {np.median(self.num_expressed_genes[kept]):,.0f} expressed genes",
        ]
        if options.values == "recover_counts":
            lines.insert(
                2,
                f"Recovered counts: {'log1p undone, ' * self._is_logged}largest residue {self._largest_residue:.2g}",
            )
        lines += [f"Left out: {line}" for line in self._left_out()]
        return "\n".join([*lines, str(self.report)])

    def __repr__(self) -> str:
        """The description, for printing."""
        return f"<PreparedCells>\n{self.describe()}"

    def warn_left_out(self) -> None:
        """One UserWarning that counts the cells left out and names the first; none if there are none."""
        if lines := self._left_out():
            warnings.warn(
                f"{self.num_cells - self.is_kept.sum():,} of {self.num_cells:,} cells are left out: "
                f"{'; '.join(lines)}.",
                UserWarning,
                stacklevel=3,
            )

    def class_labels(self, column: str) -> tuple[list[str], np.ndarray]:
        """The sorted values of an obs column, and `(cells,)` which of them each cell has (-1: left out).

        Raises: KeyError: no such column. ValueError: a cell that is kept has no label.
        """
        given = self._reader.obs_column(column)
        is_missing = np.array([entry is None or entry != entry for entry in given])  # None, NaN
        if (unlabelled := is_missing & self.is_kept).any():
            raise ValueError(
                f"{unlabelled.sum():,} cells have no {column!r}: {self._names(unlabelled)}. Take the "
                "labelled cells only."
            )
        classes, numbers = np.unique(given[self.is_kept], return_inverse=True)
        labels = np.full(self.num_cells, -1, dtype=np.int64)
        labels[self.is_kept] = numbers
        return [str(name) for name in classes], labels

    def close(self) -> None:
        """Let go of the input file; `encode` needs it open."""
        self._reader.close()

    def __enter__(self) -> "PreparedCells":
        """The cells; leaving the block closes their file."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def _how_taken(self) -> str:
        values, mode = self._options.values, self._options.original_mode
        if mode is not None:
            return f"{_ORIGINAL_MEANING[mode]} (original_mode={mode!r})"
        return f"{_VALUES_MEANING[values]} (values={values!r})"

    def _left_out(self) -> list[str]:
        lines = []
        if self.is_empty.any():
            lines.append(f"{self.is_empty.sum():,} without counts on vocabulary genes ({self._names(self.is_empty)})")
        if self.is_below_min_genes.any():
            lines.append(
                f"{self.is_below_min_genes.sum():,} with fewer than min_genes={self._options.min_genes} "
                f"expressed genes ({self._names(self.is_below_min_genes)})"
            )
        return lines

    def _describe_settings(self) -> dict[str, Any]:
        options = self._options
        settings: dict[str, Any] = {
            "layer": options.layer,
            "gene_column": options.gene_column,
            "values": options.values if options.original_mode is None else None,
            "original_mode": options.original_mode,
            "target_depth": _plain(options.target_depth),
            "depth_fold": _plain(options.depth_fold),
            "min_genes": _plain(options.min_genes),
            "on_empty_cell": options.on_empty_cell,
            "num_cells": self.num_cells,
            "num_empty_cells": int(self.is_empty.sum()),
            "num_cells_below_min_genes": int(self.is_below_min_genes.sum()),
        }
        if self._given_totals is not None:
            digest = hashlib.sha256(self._given_totals.tobytes()).hexdigest()[:16]
            source = f"obs column {options.total_counts!r}" if isinstance(options.total_counts, str) else "array"
            settings["total_counts"] = f"{source}, sha256 {digest}"
        if options.values == "recover_counts":
            settings["recovered_from_log1p"] = self._is_logged
            settings["largest_recovery_residue"] = self._largest_residue
        if self._bulk_median is not None:
            settings["bulk_median_total"] = self._bulk_median
        return settings

    # --- Checks and their messages ---

    def _locate(self, entry: Entry, start: int) -> str:
        cell, gene = self.cell_names[start + entry.row], self._reader.gene_names[entry.column]
        return f"Cell {cell!r}, gene {gene!r} of {self._reader.description} holds {entry.value:g}"

    def _where_integers_are(self) -> str:
        alternatives = self._reader.integer_alternatives()
        return f" Integers are in {' and in '.join(alternatives)}: pass that." if alternatives else ""

    def _names(self, is_meant: np.ndarray) -> str:
        names = [str(name) for name in self.cell_names[np.flatnonzero(is_meant)[:_NAMES_SHOWN]]]
        more = int(is_meant.sum()) - len(names)
        return ", ".join(names) + (f" and {more:,} more" if more else "")

    def _not_counts(self, offender: Entry, start: int) -> str:
        return (
            f"{self._locate(offender, start)}, but values='counts' takes raw integer "
            f"counts.{self._where_integers_are()} Otherwise say what the values are: "
            "values='expected_counts' for fractional counts (RSEM, alevin, SoupX), values='log1p_cp10k' for "
            "log1p(counts per 10,000) whose total counts you have (total_counts=), values='recover_counts' "
            "for normalised values whose totals are lost."
        )

    def _check_logs(self, rows: csr_matrix, start: int) -> None:
        if (offender := first_entry(rows, rows.data > MAX_LOG1P_CP10K + 1e-3)) is not None:
            raise ValueError(
                f"{self._locate(offender, start)}, but log1p(counts per 10,000) can't exceed "
                f"{MAX_LOG1P_CP10K:.2f}. These look like raw counts (values='counts') or like another "
                "normalisation (values='recover_counts')."
            )

    def _check_cp10k_totals(self, totals: np.ndarray, start: int) -> None:
        if (too_large := totals > COUNTS_PER_CELL * (1 + _CP10K_TOLERANCE)).any():
            cell = int(np.argmax(too_large))
            raise ValueError(
                f"The values of cell {self.cell_names[start + cell]!r} of {self._reader.description} come "
                f"from {totals[cell]:,.0f} counts, more than the 10,000 of values='log1p_cp10k': they were "
                "scaled to another total, or hold raw counts. Pass the raw counts, or "
                "values='recover_counts'."
            )

    def _check_recovery(self, counts: csr_matrix, residues: np.ndarray, start: int) -> None:
        self._largest_residue = max(self._largest_residue, float(residues.max(initial=0.0)))
        if (offender := first_entry(counts, residues > MAX_RECOVERY_RESIDUE)) is not None:
            cell, gene = self.cell_names[start + offender.row], self._reader.gene_names[offender.column]
            residue = residues[np.argmax(residues > MAX_RECOVERY_RESIDUE)]
            raise ValueError(
                f"values='recover_counts' failed: with the smallest value of cell {cell!r} taken as one "
                f"count, gene {gene!r} is {residue:.2g} counts away from a whole number (allowed: "
                f"{MAX_RECOVERY_RESIDUE}). The values were transformed in another way, or the genes with one "
                f"count were removed.{self._where_integers_are()} Pass the raw counts, or "
                "values='log1p_cp10k' with total_counts=."
            )

    def _check_cells_left(self) -> None:
        if self.is_empty.any() and self._options.on_empty_cell == "error":
            raise ValueError(
                f"{self.is_empty.sum():,} of {self.num_cells:,} cells have no counts on the vocabulary's "
                f"genes: {self._names(self.is_empty)}. Remove them, or pass on_empty_cell='nan' to leave "
                "them out."
            )
        if not self.is_kept.any():
            raise ValueError(f"No cell of {self.num_cells:,} is left to tokenise: {'; '.join(self._left_out())}.")

    def _find_if_logged(self) -> bool:
        for start in range(0, self.num_cells, _SAMPLED_ROWS):
            rows = self._reader.read(start, min(start + _SAMPLED_ROWS, self.num_cells))
            rows = without_stored_zeros(working_precision(rows))
            # Impossible values are the first pass's business; they can't tell anything here.
            if rows.nnz and np.isfinite(rows.data).all() and rows.data.min() > 0:
                return are_logged(rows)
        return False

    def _read_total_counts(self) -> np.ndarray | None:
        given = self._options.total_counts
        if given is None:
            return None
        if isinstance(given, str):
            what, given = f"total_counts={given!r}", self._reader.obs_column(given)
        else:
            what = "total_counts"
            if hasattr(given, "to_numpy"):
                self._check_order(given)
        try:
            totals = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what} must hold one number a cell ({error}).") from error
        if totals.shape != (self.num_cells,):
            raise ValueError(f"{what} has shape {totals.shape}; expected one total a cell, ({self.num_cells},).")
        return totals

    def _check_order(self, totals: Any) -> None:
        """A Series that names the same cells in another order would be taken for the wrong cells."""
        names, expected = [str(name) for name in totals.index], [str(name) for name in self.cell_names]
        if names != expected and sorted(names) == sorted(expected):
            raise ValueError(
                "total_counts is a Series whose cells stand in another order than the input's: reorder it with .loc."
            )

    def _check_given_totals(self, totals: np.ndarray) -> None:
        # A cell without counts may well have a total of 0 or NaN; it is left out for being empty.
        is_bad = ~self.is_empty & ~(np.isfinite(totals) & (totals > 0))
        if is_bad.any():
            cell = int(np.argmax(is_bad))
            raise ValueError(
                f"total_counts must be positive and finite, but holds {totals[cell]:g} for cell "
                f"{self.cell_names[cell]!r} ({is_bad.sum():,} such cells)."
            )
        kept = self.is_kept
        if (totals[kept] < self.num_expressed_genes[kept]).all():
            raise ValueError(
                "total_counts can't be raw total counts: in every cell they are below the number of "
                f"expressed genes (cell {self.cell_names[kept][0]!r}: {totals[kept][0]:g} for "
                f"{self.num_expressed_genes[kept][0]:,} genes). Are they logarithms?"
            )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _plain(number: Any) -> Any:
    """A NumPy scalar as the Python number that JSON takes."""
    return number.item() if isinstance(number, np.generic) else number
