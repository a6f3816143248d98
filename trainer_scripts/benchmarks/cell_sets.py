"""The cells that enhancement, clustering and mapping are measured on: read from any file, over the model's genes."""

import difflib
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from anndata import AnnData
from scipy.sparse import csr_matrix

from scfoundation_hf.tokenization.anndata_reader import AnnDataReader
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.read_depth import first_entry, row_totals, with_data, without_stored_zeros
from scfoundation_hf.tokenization.tokenization_scfoundation import MIN_VOCABULARY_SHARE


@dataclass(frozen=True)
class CellFile:
    """A file of raw counts and what its columns are.

    Args:
        path: anything that `embed` reads.
        label: column of obs with the cell type; cells without one are left out.
        batch: column of obs with donor, run or technology.
        keep: column of obs -> the value of the cells to keep; all others are left out.
        layer, gene_column: as in `embed`.
        max_cells: take at most so many, for a set whose cells cost more than others', also where the benchmark takes
            more.
    """

    path: Path
    label: str | None = None
    batch: str | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    layer: str | None = None
    gene_column: str | None = None
    max_cells: int | None = None


@dataclass(frozen=True)
class CellSet:
    """Cells in memory.

    Attributes:
        name: of the data set.
        adata: `X` CSR float32 counts over those genes of the model's vocabulary that the file has; `obs["cell_type"]`
            and `obs["batch"]`, as text, where the file has them.
        fingerprint: SHA-256 of all of it: the same for the same cells.
    """

    name: str
    adata: AnnData
    fingerprint: str

    @property
    def labels(self) -> np.ndarray:
        """`(cells,)` cell types."""
        return self.adata.obs["cell_type"].to_numpy()

    @property
    def batches(self) -> np.ndarray:
        """`(cells,)` batches."""
        return self.adata.obs["batch"].to_numpy()


def read_cells(
    name: str,
    file: CellFile,
    vocabulary: GeneVocabulary,
    *,
    max_cells: int | None = None,
    min_cells_per_label: int = 1,
    seed: int = 0,
) -> CellSet:
    """The cells of a file that have counts on the vocabulary's genes.

    Args:
        max_cells: take so many of the cells, or what the file says if that is fewer, drawn evenly, in the order of the
            file.
        min_cells_per_label: cells of rarer types are left out, before cells are drawn.
        seed: of the draw.
    Raises: ValueError: for values that are no counts, or no cells left; KeyError: for a missing column;
        FileNotFoundError: for a missing file.
    """
    with AnnDataReader(file.path, layer=file.layer, gene_column=file.gene_column) as reader:
        counts = reader.read(0, reader.num_cells)
        offender = first_entry(counts, ~(counts.data >= 0) | (np.rint(counts.data) != counts.data))
        if offender is not None:
            cell, gene = reader.cell_names[offender.row], reader.gene_names[offender.column]
            raise ValueError(
                f"Cell {cell!r}, gene {gene!r} of {reader.description} holds {offender.value:g}; benchmarks take raw "
                "counts. Choose another layer."
            )
        mapping = vocabulary.map_genes(reader.gene_names)
        mapping.check_vocabulary_share(MIN_VOCABULARY_SHARE)
        columns = {"cell_type": file.label, "batch": file.batch}
        obs = pd.DataFrame(
            {key: pd.Series(reader.obs_column(column)) for key, column in columns.items() if column is not None},
            index=np.arange(reader.num_cells),
        )
        is_kept = obs.notna().all(axis=1).to_numpy()
        for column, value in file.keep.items():
            is_kept &= reader.obs_column(column).astype(str) == str(value)
        names = pd.Index(reader.cell_names.astype(str))
    aligned = mapping.apply(counts.astype(np.float32))
    is_kept &= row_totals(aligned) > 0
    if file.label is not None:
        sizes = obs["cell_type"][is_kept].value_counts()
        is_kept &= obs["cell_type"].map(sizes).fillna(0).to_numpy() >= min_cells_per_label
    rows = np.flatnonzero(is_kept)
    num_cells = min(number for number in (max_cells, file.max_cells, len(rows)) if number is not None)
    if num_cells < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(rows, size=num_cells, replace=False))
    if not len(rows):
        raise ValueError(f"No cells of {file.path} are left: look at label, batch and keep of data set {name!r}.")
    genes = np.unique(mapping.column_to_gene[mapping.column_to_gene >= 0])
    matrix = csr_matrix(aligned[rows][:, genes])
    chosen = obs.iloc[rows].astype(str).set_axis(pd.Index(names[rows]))
    adata = AnnData(matrix, obs=chosen, var=pd.DataFrame(index=[vocabulary.symbols[gene] for gene in genes]))
    if not adata.obs_names.is_unique:
        adata.obs_names_make_unique()
    return CellSet(name, adata, _fingerprint(adata))


def _fingerprint(adata: AnnData) -> str:
    digest = hashlib.sha256()
    for array in (adata.X.data, adata.X.indices, adata.X.indptr):
        digest.update(np.ascontiguousarray(array).data)
    digest.update("\0".join([*adata.var_names, *adata.obs.to_numpy().ravel()]).encode())
    return digest.hexdigest()


def down_sample_cells(counts: csr_matrix, *, rate: float, seed: int) -> csr_matrix:
    """Cells as a shallower sequencing run would have read them: each count ~ Binomial(count, rate).

    A cell may be left without counts.
    Source: paper, Supplementary Note 9.
    """
    generator = np.random.default_rng((seed, round(rate * 1e6)))
    left = generator.binomial(counts.data.astype(np.int64), rate).astype(np.float32)
    return without_stored_zeros(with_data(counts, left))


def read_recipe(source: str | PathLike[str], *, settings: Collection[str], folder: Path) -> dict[str, Any]:
    """What a benchmark is made from: keyword arguments, `data` among them as `CellFile` by name.

    Args:
        source: a YAML file, or the name of a recipe that comes with the package.
        settings: keys that there may be beside `data`.
        folder: what relative paths of data sets begin at.
    Raises: FileNotFoundError: if there is no such file or recipe; ValueError: for an unknown key, or no data sets.
    """
    path: Any = Path(source)
    if not path.is_file():
        path = resources.files("scfoundation_hf.trainer_scripts").joinpath("recipes", f"{source}.yaml")
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {source}, and no recipe of that name comes with the package.")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict) or not isinstance(recipe.get("data"), dict):
        raise ValueError(
            f"{source} names no data sets: it needs `data:` with one entry a set, such as `name: {{path: file}}`."
        )
    _check_keys(recipe, {"data", *settings}, where=str(source))
    recipe["data"] = {name: _cell_file(name, entry, folder) for name, entry in recipe["data"].items()}
    return recipe


def _cell_file(name: str, entry: Any, folder: Path) -> CellFile:
    if not isinstance(entry, dict) or "path" not in entry:
        raise ValueError(f"Data set {name!r} has no path; write `{name}: {{path: file.h5ad}}`.")
    _check_keys(entry, {each.name for each in fields(CellFile)}, where=f"data set {name!r}")
    return CellFile(**entry | {"path": folder / entry["path"]})


def _check_keys(given: Mapping[str, Any], known: Collection[str], *, where: str) -> None:
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there is: {', '.join(sorted(known))}."
            raise ValueError(f"There is no key {key!r} in {where}; {hint}")
