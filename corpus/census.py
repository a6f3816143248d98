"""Cells of the CELLxGENE Census, through its own package, one of its datasets at a time.

`prepare` takes `census:VERSION/DATASET_ID` as an input; `census_datasets` lists them. The Census is a SOMA experiment
in the cloud, so this needs the network; everything behind `open_census` also works on a local experiment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from scipy.sparse import csr_matrix

from scfoundation_hf.tokenization.matrix_reader import CHUNK_ENTRIES, canonical, check_shape
from scfoundation_hf.tokenization.read_depth import row_ranges

PREFIX = "census:"
ORGANISM = "homo_sapiens"
MEASUREMENT = "RNA"
GENE_ID_COLUMN = "feature_id"
PRIMARY_DATA = "is_primary_data == True"  # each cell once, in the dataset that it was first published in
_ENTRIES_PER_CELL = 4_000  # expected where the number is not noted


def census_datasets(version: str, *, value_filter: str = PRIMARY_DATA) -> list[str]:
    """The human datasets of a Census release, as inputs of `prepare`; those with cells that pass the filter.

    Args:
        version: a release such as "2025-11-08". "stable" and "latest" move on, so that a corpus could not be resumed.
        value_filter: a SOMA filter over obs, such as `is_primary_data == True and tissue_general == 'lung'`. It
            chooses datasets; of these, all primary cells are taken.
    Raises: ImportError: without cellxgene-census. ValueError: for a version that moves.
    """
    with open_census(version) as experiment:
        table = experiment.obs.read(column_names=["dataset_id"], value_filter=value_filter).concat()
    return [f"{PREFIX}{version}/{name}" for name in sorted(set(table.column("dataset_id").to_pylist()))]


@contextmanager
def open_census(version: str) -> Iterator[Any]:
    """The human experiment of a release, a `tiledbsoma.Experiment`."""
    if version in ("stable", "latest"):
        raise ValueError(
            f"census:{version} is another release every few months or weeks; name one by its date, such as "
            "census:2025-11-08 (cellxgene_census.get_census_version_directory() lists them)."
        )
    try:
        import cellxgene_census  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("Reading the CELLxGENE Census needs its package: pip install cellxgene-census") from error
    with cellxgene_census.open_soma(census_version=version) as census:
        yield census["census_data"][ORGANISM]


@contextmanager
def open_census_dataset(name: str, *, layer: str | None, gene_column: str | None) -> Iterator["SomaReader"]:
    """The primary cells of `census:VERSION/DATASET_ID`.

    Raises: ValueError: for a name of another form, or a dataset without primary human cells.
    """
    version, _, dataset = name.removeprefix(PREFIX).partition("/")
    if not (version and dataset) or "'" in dataset:
        raise ValueError(f"{name} is not of the form census:VERSION/DATASET_ID; census_datasets() lists the names.")
    with open_census(version) as experiment:
        yield SomaReader(
            experiment,
            name=name,
            value_filter=f"dataset_id == '{dataset}' and {PRIMARY_DATA}",
            layer="raw" if layer is None else layer,
            gene_column=GENE_ID_COLUMN if gene_column is None else gene_column,
        )


class SomaReader:
    """Cells of a SOMA experiment that pass a filter, as a `CellReader`.

    Args:
        experiment: an open `tiledbsoma.Experiment`; it stays the caller's.
        name: for messages.
        value_filter: over obs; None takes all cells.
        layer: of the measurement's X.
        gene_column: column of var with gene symbols or Ensembl ids.
        measurement: which of the experiment's.
    Raises: KeyError: for a layer or column that is not there; ValueError: if no cell passes.
    """

    path: Path | None = None

    def __init__(
        self,
        experiment: Any,
        *,
        name: str,
        value_filter: str | None = None,
        layer: str = "raw",
        gene_column: str = GENE_ID_COLUMN,
        measurement: str = MEASUREMENT,
    ) -> None:
        """Find the cells and the genes; counts are read later."""
        self._name, self._obs, self._var = name, experiment.obs, experiment.ms[measurement].var
        layers = experiment.ms[measurement].X
        if layer not in layers:
            raise KeyError(f"{name} has no layer {layer!r}. Its layers: {', '.join(map(repr, sorted(layers)))}.")
        self._matrix = layers[layer]
        self.description = f"layer {layer!r} of {name}"
        columns = ["soma_joinid"] + ["nnz"] * ("nnz" in self._obs.keys())  # noqa: SIM118 (a SOMA frame, no dict)
        cells = self._obs.read(column_names=columns, value_filter=value_filter).concat().sort_by("soma_joinid")
        self._joinids = cells.column("soma_joinid").to_numpy()
        self._num_entries = cells.column("nnz").to_numpy() if "nnz" in columns else None
        self._gene_column = gene_column
        self._gene_joinids = self._var_column("soma_joinid")
        self.gene_names = self._var_column(gene_column)
        self.cell_names = self._joinids.astype(str).astype(object)
        self.num_cells, self.num_columns = len(self._joinids), len(self.gene_names)
        check_shape(self.description, self.num_cells, self.num_columns)

    def read(self, start: int, stop: int) -> csr_matrix:
        """Rows [start, stop)."""
        joinids = self._joinids[start:stop]
        entries = self._matrix.read((pa.array(joinids),)).tables().concat()
        rows = np.searchsorted(joinids, entries.column("soma_dim_0").to_numpy())
        columns = np.searchsorted(self._gene_joinids, entries.column("soma_dim_1").to_numpy())
        data = entries.column("soma_data").to_numpy()
        return canonical(csr_matrix((data, (rows, columns)), shape=(stop - start, self.num_columns)))

    def chunks(self, *, max_entries: int = CHUNK_ENTRIES) -> Iterator[tuple[int, int]]:
        """Consecutive row ranges of at most `max_entries` entries, as far as obs says how many a cell has."""
        lengths = np.full(self.num_cells, _ENTRIES_PER_CELL) if self._num_entries is None else self._num_entries
        return row_ranges(np.concatenate([[0], np.cumsum(lengths)]), max_entries)

    def obs_column(self, name: str) -> np.ndarray:
        """One column of obs. KeyError: naming the columns there are."""
        if name not in self._obs.keys():  # noqa: SIM118
            raise KeyError(f"{self._name} has no obs column {name!r}. Its columns: {', '.join(self._obs.keys())}.")
        table = self._obs.read((pa.array(self._joinids),), column_names=["soma_joinid", name]).concat()
        column = table.sort_by("soma_joinid").column(name).to_pylist()
        return np.array(column, dtype=object)

    def integer_alternatives(self) -> list[str]:
        """Not looked for: it would mean reading from the cloud."""
        return []

    def gene_columns(self) -> dict[str, np.ndarray]:
        """Other columns of var that hold text."""
        fields = {field.name: field.type for field in self._var.schema}
        texts = (pa.string(), pa.large_string())
        return {
            name: self._var_column(name)
            for name, type_ in fields.items()
            if type_ in texts and name != self._gene_column
        }

    def close(self) -> None:
        """The experiment is the caller's."""

    def _var_column(self, name: str) -> np.ndarray:
        if name not in self._var.keys():  # noqa: SIM118
            raise KeyError(
                f"{self._name} has no gene_column {name!r} in var. Its columns: {', '.join(self._var.keys())}."
            )
        names = list(dict.fromkeys(["soma_joinid", name]))
        table = self._var.read(column_names=names).concat().sort_by("soma_joinid")
        values = table.column(name).to_pylist()
        return np.array(values, dtype=np.int64 if name == "soma_joinid" else object)
