"""10x, loom and CSV give the same cells as the AnnData that they were written from."""

import gzip
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from scipy.io import mmwrite
from scipy.sparse import csc_matrix, csr_matrix

from scfoundation_hf.inference.writer import check_output
from scfoundation_hf.tokenization.anndata_reader import AnnDataReader
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer


@pytest.fixture(scope="module")
def cells(example_cells) -> anndata.AnnData:
    return anndata.read_h5ad(example_cells)[::20].copy()


def with_antibodies(cells) -> tuple[csr_matrix, list[str], list[str], list[str]]:
    """Counts, ids, names and kinds, with an antibody in the midst that bears the name of a gene."""
    counts = cells.X.toarray().astype(np.int32)
    ids, names = list(cells.var_names), list(cells.var["symbol"])
    counts = np.insert(counts, 3, 1000, axis=1)
    ids.insert(3, "CD3D-antibody")
    names.insert(3, "CD3D")
    kinds = ["Gene Expression"] * len(ids)
    kinds[3] = "Antibody Capture"
    return csr_matrix(counts), ids, names, kinds


def write_10x_h5(cells, path: Path, *, version: int) -> Path:
    counts, ids, names, kinds = with_antibodies(cells)
    if version == 2:
        is_gene = np.array(kinds) == "Gene Expression"
        counts, ids, names = counts[:, is_gene], np.array(ids)[is_gene], np.array(names)[is_gene]
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(counts, name)
        group["shape"] = counts.shape[::-1]
        group["barcodes"] = np.array(list(cells.obs_names), dtype="S")
        if version == 3:
            for name, column in (("id", ids), ("name", names), ("feature_type", kinds)):
                group[f"features/{name}"] = np.array(column, dtype="S")
        else:
            group["genes"], group["gene_names"] = np.array(ids, dtype="S"), np.array(names, dtype="S")
    return path


def write_matrix_folder(cells, path: Path, *, zipped: bool) -> Path:
    counts, ids, names, kinds = with_antibodies(cells)
    path.mkdir()
    end = ".gz" if zipped else ""

    def open_text(file_path):
        return gzip.open(file_path, "wt") if zipped else file_path.open("w")

    with gzip.open(path / "matrix.mtx.gz", "wb") if zipped else (path / "matrix.mtx").open("wb") as file:
        mmwrite(file, csc_matrix(counts.T), field="integer")
    with open_text(path / f"features.tsv{end}") as file:
        file.writelines("\t".join(line) + "\n" for line in zip(ids, names, kinds, strict=True))
    with open_text(path / f"barcodes.tsv{end}") as file:
        file.writelines(name + "\n" for name in cells.obs_names)
    return path


def write_loom(cells, path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["matrix"] = np.log1p(cells.X.toarray().T)
        file["layers/counts"] = cells.X.toarray().T
        file["row_attrs/Gene"] = np.array(list(cells.var["symbol"]), dtype="S")
        file["row_attrs/Accession"] = np.array(list(cells.var_names), dtype="S")
        file["col_attrs/CellID"] = np.array(list(cells.obs_names), dtype="S")
        file["col_attrs/cell_type"] = np.array(list(cells.obs["cell_type"]), dtype="S")
        file["col_attrs/embedding"] = np.zeros((cells.n_obs, 2))
    return path


def write_text(cells, path: Path) -> Path:
    table = cells.to_df()
    table.columns = list(cells.var["symbol"])
    table.to_csv(path, sep="\t" if ".tsv" in path.name else ",")
    return path


WRITERS = {
    "10x h5, version 3": lambda cells, folder: write_10x_h5(cells, folder / "cells.h5", version=3),
    "10x h5, version 2": lambda cells, folder: write_10x_h5(cells, folder / "cells.h5", version=2),
    "10x mtx": lambda cells, folder: write_matrix_folder(cells, folder / "cells", zipped=False),
    "10x mtx.gz": lambda cells, folder: write_matrix_folder(cells, folder / "cells", zipped=True),
    "loom": lambda cells, folder: write_loom(cells, folder / "cells.loom"),
    "csv": lambda cells, folder: write_text(cells, folder / "cells.csv"),
    "tsv.gz": lambda cells, folder: write_text(cells, folder / "cells.tsv.gz"),
    "AnnData called .h5": lambda cells, folder: cells.write_h5ad(folder / "cells.h5") or folder / "cells.h5",
}


@pytest.mark.parametrize("kind", WRITERS)
def test_same_cells(cells, tmp_path, kind):
    path = WRITERS[kind](cells, tmp_path)
    options = {"layer": "counts"} if kind == "loom" else {}
    options |= {"gene_column": "symbol"} if "AnnData" in kind else {}
    with AnnDataReader(path, **options) as reader:
        assert list(reader.cell_names) == list(cells.obs_names)
        assert list(reader.gene_names) == list(cells.var["symbol"]), "without the antibody"
        ranges = list(reader.chunks(max_entries=20_000))
        assert len(ranges) > 1
        rows = np.vstack([reader.read(start, stop).toarray() for start, stop in ranges])
        np.testing.assert_array_equal(rows, cells.X.toarray())
    expected = ScFoundationTokenizer()(cells, gene_column="symbol")
    tokenised = ScFoundationTokenizer()(path, **options)
    assert (expected["input_ids"] == tokenised["input_ids"]).all()


def test_columns(cells, tmp_path):
    with AnnDataReader(write_10x_h5(cells, tmp_path / "cells.h5", version=3), gene_column="gene_ids") as reader:
        assert list(reader.gene_names) == list(cells.var_names)
    with AnnDataReader(write_loom(cells, tmp_path / "cells.loom"), gene_column="Accession") as reader:
        assert list(reader.gene_names) == list(cells.var_names)
        assert list(reader.obs_column("cell_type")) == list(cells.obs["cell_type"])
        with pytest.raises(KeyError, match=r"no obs column 'embedding'.*'cell_type'"):
            reader.obs_column("embedding")
        assert reader.integer_alternatives() == ["layer='counts'"]


def damage(path: Path, what: str) -> None:
    with h5py.File(path, "r+") as file:
        if what == "no indptr":
            del file["matrix/indptr"]
        elif what == "column out of range":
            file["matrix/indices"][5] = 10**6


@pytest.mark.parametrize(
    ("what", "message"),
    [("no indptr", r"cells.h5 lacks a part of its format"), ("column out of range", r"Rows \[0, .*not within the")],
)
def test_damaged_10x_h5(cells, tmp_path, what, message):
    path = write_10x_h5(cells, tmp_path / "cells.h5", version=3)
    damage(path, what)
    with pytest.raises(ValueError, match=message), AnnDataReader(path) as reader:
        reader.read(0, reader.num_cells)


def test_other_hdf5(tmp_path):
    for name, message in (
        ("cells.h5", r"cells.h5 is no 10x HDF5 file of one genome and no AnnData: it holds something"),
        ("cells.loom", r"cells.loom is no loom file: it has no matrix and no row_attrs"),
    ):
        with h5py.File(tmp_path / name, "w") as file:
            file["something"] = 1
        with pytest.raises(ValueError, match=message):
            AnnDataReader(tmp_path / name)


def test_loom_without_names(cells, tmp_path):
    path = write_loom(cells, tmp_path / "cells.loom")
    with h5py.File(path, "r+") as file:
        del file["row_attrs/Gene"], file["row_attrs/Accession"]
    with pytest.raises(ValueError, match=r"does not name its genes: none of Gene, var_names, Accession"):
        AnnDataReader(path)


def test_damaged_matrix_folder(cells, tmp_path):
    path = write_matrix_folder(cells, tmp_path / "cells", zipped=False)
    text = (path / "barcodes.tsv").read_text()
    (path / "barcodes.tsv").write_text(text + "one-more\n")
    with pytest.raises(ValueError, match=r"matrix.mtx is .* 41 barcodes|matrix.mtx is .* barcodes beside it"):
        AnnDataReader(path)
    (path / "matrix.mtx").write_bytes((path / "matrix.mtx").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"matrix.mtx could not be read"):
        AnnDataReader(path)
    (path / "barcodes.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"has none of barcodes.tsv.gz, barcodes.tsv"):
        AnnDataReader(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", r"no header line with genes"),
        (",ACTB,CD3D\nc1,1,2\nc2,1,many\n", r"gene 'CD3D' has values that are no numbers"),
        (",ACTB,CD3D\nc1,1,2,3\n", r"its rows have 3 values, its header 2 genes"),
        (",ACTB,CD3D\n", r"no table of numbers"),
    ],
)
def test_tables_that_are_none(tmp_path, text, message):
    path = tmp_path / "cells.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        AnnDataReader(path)


def test_results_are_not_written_into_other_formats(tmp_path):
    with pytest.raises(ValueError, match=r"cells.loom can be read, but results are written into .h5ad or .zarr only"):
        check_output(tmp_path / "cells.loom", tmp_path / "out.loom", overwrite=False)
