import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.sparse import csc_matrix, csr_array, csr_matrix

from scfoundation_hf.tokenization import anndata_reader
from scfoundation_hf.tokenization.anndata_reader import AnnDataReader

NUM_CELLS, NUM_GENES = 37, 50
STORAGES = {"csr": csr_matrix, "csc": csc_matrix, "dense": lambda dense: dense}


def dense_counts(dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng(3)
    counts = rng.poisson(0.4, size=(NUM_CELLS, NUM_GENES)).astype(dtype)
    counts[5] = 0
    return counts


def make_adata(matrix=None) -> AnnData:
    return AnnData(
        csr_matrix(dense_counts()) if matrix is None else matrix,
        obs=pd.DataFrame(
            {"n_counts": np.arange(NUM_CELLS) + 1.0, "batch": pd.Categorical(["a", "b"] * 18 + ["a"])},
            index=[f"cell{i}" for i in range(NUM_CELLS)],
        ),
        var=pd.DataFrame(
            {"symbol": [f"SYM{i}" for i in range(NUM_GENES)], "length": np.arange(NUM_GENES)},
            index=[f"gene{i}" for i in range(NUM_GENES)],
        ),
    )


@pytest.fixture
def h5ad(tmp_path) -> Path:
    path = tmp_path / "cells.h5ad"
    make_adata().write_h5ad(path)
    return path


def write(adata: AnnData, path: Path, zarr_format: int = 3) -> Path:
    if path.suffix == ".h5ad":
        adata.write_h5ad(path)
        return path
    with anndata.settings.override(zarr_write_format=zarr_format), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what anndata and zarr say while writing is not our reader's
        adata.write_zarr(path)
    return path


def whole(reader: AnnDataReader, max_entries: int) -> np.ndarray:
    ranges = list(reader.chunks(max_entries=max_entries))
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    return np.vstack([reader.read(start, stop).toarray() for start, stop in ranges])


# --- Every way an AnnData is stored gives the same rows ---


@pytest.mark.parametrize("file_format", ["h5ad", "zarr 2", "zarr 3"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_files_of_every_storage(tmp_path, file_format, storage, dtype):
    dense = dense_counts(dtype)
    suffix, zarr_format = file_format[:4], int(file_format[5:] or 3)
    path = write(make_adata(STORAGES[storage](dense)), tmp_path / f"cells.{suffix}", zarr_format)
    with AnnDataReader(path) as reader:
        assert (reader.num_cells, reader.num_columns, reader.path) == (NUM_CELLS, NUM_GENES, path)
        assert list(reader.gene_names[:2]) == ["gene0", "gene1"]
        assert list(reader.cell_names[:2]) == ["cell0", "cell1"]
        for max_entries in (1, 60, 10**9):
            np.testing.assert_array_equal(whole(reader, max_entries), dense)
        rows = reader.read(3, 9)
        assert isinstance(rows, csr_matrix)
        assert rows.dtype == dtype
        assert rows.has_canonical_format
        np.testing.assert_array_equal(rows.toarray(), dense[3:9])
        assert reader.read(4, 4).shape == (0, NUM_GENES)


@pytest.mark.parametrize("storage", [*STORAGES, "csr_array"])
def test_in_memory(storage):
    dense = dense_counts()
    adata = make_adata((STORAGES | {"csr_array": csr_array})[storage](dense))
    reader = AnnDataReader(adata)
    np.testing.assert_array_equal(whole(reader, 60), dense)
    assert reader.path is None


def test_view_in_memory():
    adata = make_adata()[10:20, ::2]
    np.testing.assert_array_equal(whole(AnnDataReader(adata), 9), dense_counts()[10:20, ::2])


@pytest.mark.parametrize("storage", STORAGES)
def test_backed(tmp_path, storage):
    path = write(make_adata(STORAGES[storage](dense_counts())), tmp_path / "cells.h5ad")
    adata = anndata.read_h5ad(path, backed="r")
    with AnnDataReader(adata) as reader:
        np.testing.assert_array_equal(whole(reader, 60), dense_counts())
    assert adata.file.is_open, "the user's AnnData stays open"
    adata.file.close()


def test_view_of_a_backed_anndata_says_how_to_go_on(h5ad):
    adata = anndata.read_h5ad(h5ad, backed="r")
    with pytest.raises(ValueError, match=r"view of the AnnData backed by .*cells.h5ad.*to_memory\(\)"):
        AnnDataReader(adata[:5])
    adata.file.close()


def test_chunks_hold_at_most_the_entries_asked_for(tmp_path):
    for storage, make in STORAGES.items():
        with AnnDataReader(write(make_adata(make(dense_counts())), tmp_path / f"{storage}.h5ad")) as reader:
            for start, stop in reader.chunks(max_entries=120):
                entries = (stop - start) * NUM_GENES if storage == "dense" else reader.read(start, stop).nnz
                assert entries <= 120
            assert len(list(reader.chunks(max_entries=120))) > 3


def test_csc_is_read_in_blocks_of_columns(tmp_path, monkeypatch):
    path = write(make_adata(csc_matrix(dense_counts())), tmp_path / "cells.h5ad")
    monkeypatch.setattr(anndata_reader, "CHUNK_ENTRIES", 40)
    with AnnDataReader(path) as reader:
        np.testing.assert_array_equal(whole(reader, 100), dense_counts())


def test_reading_does_not_change_an_unsorted_matrix_of_the_user():
    matrix = csr_matrix((np.array([1.0, 2.0, 3.0]), np.array([2, 0, 0]), np.array([0, 2, 3])), shape=(2, 3))
    adata = AnnData(matrix)
    before = adata.X.indices.copy()
    assert AnnDataReader(adata).read(0, 2).indices.tolist() == [0, 2, 0]
    np.testing.assert_array_equal(adata.X.indices, before)


def test_only_what_is_needed_is_read(h5ad):
    with h5py.File(h5ad, "r+") as file:
        del file["uns"], file["obsm"]
        file["obs"]["broken"] = np.zeros(3)  # of the wrong length, without an encoding
    with AnnDataReader(h5ad) as reader:
        np.testing.assert_array_equal(reader.read(0, NUM_CELLS).toarray(), dense_counts())


def test_real_files(shared_data):
    for name, shape, dtype in (
        ("baron_pancreas", (175, 12_474), np.float32),
        ("single_cells_5batches", (1408, 28_455), np.int32),
    ):
        adata = anndata.read_h5ad(shared_data / f"{name}.h5ad")
        with AnnDataReader(shared_data / f"{name}.h5ad") as reader:
            assert (reader.num_cells, reader.num_columns) == shape
            rows = reader.read(100, 150)
            assert rows.dtype == dtype
            assert (rows != adata.X[100:150]).nnz == 0
            assert list(reader.gene_names) == list(adata.var_names)


# --- Layers, raw, names ---


def with_layers() -> AnnData:
    adata = make_adata()
    adata.layers["counts"] = csr_matrix(dense_counts() + 1)
    adata.layers["dense"] = dense_counts() * 0.5
    adata.raw = AnnData(
        csr_matrix(np.hstack([dense_counts(), dense_counts()]) * 2),
        obs=adata.obs,
        var=pd.DataFrame({"alias": [f"A{i}" for i in range(100)]}, index=[f"raw{i}" for i in range(100)]),
    )
    return adata


@pytest.mark.parametrize("where", ["memory", ".h5ad", ".zarr", "backed"])
def test_layers_and_raw(tmp_path, where):
    adata = with_layers()
    if where.startswith("."):
        data = write(adata, tmp_path / f"cells{where}")
    elif where == "backed":
        data = anndata.read_h5ad(write(adata, tmp_path / "cells.h5ad"), backed="r")
    else:
        data = adata
    with AnnDataReader(data, layer="counts") as reader:
        np.testing.assert_array_equal(whole(reader, 10**6), dense_counts() + 1)
    with AnnDataReader(data, layer="dense") as reader:
        np.testing.assert_array_equal(whole(reader, 10**6), dense_counts() * 0.5)
    with AnnDataReader(data, layer="raw", gene_column="alias") as reader:
        assert list(reader.gene_names[:2]) == ["A0", "A1"]
        np.testing.assert_array_equal(whole(reader, 100), np.hstack([dense_counts(), dense_counts()]) * 2)
        assert "adata.raw of" in reader.description
    if where == "backed":
        data.file.close()


def test_a_layer_called_raw_comes_before_adata_raw():
    adata = with_layers()
    adata.layers["raw"] = csr_matrix(dense_counts() * 7)
    np.testing.assert_array_equal(whole(AnnDataReader(adata, layer="raw"), 10**6), dense_counts() * 7)


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "object"])
def test_gene_and_obs_columns(h5ad, from_file):
    with AnnDataReader(h5ad if from_file else make_adata(), gene_column="symbol") as reader:
        assert list(reader.gene_names[:2]) == ["SYM0", "SYM1"]
        assert reader.obs_column("n_counts").tolist() == list(range(1, NUM_CELLS + 1))
        assert list(reader.obs_column("batch")[:3]) == ["a", "b", "a"]
        with pytest.raises(KeyError, match=r"no obs column 'total'. Its columns: 'n_counts', 'batch'"):
            reader.obs_column("total")
        assert reader.gene_columns() == {}
    with AnnDataReader(h5ad if from_file else make_adata()) as reader:
        assert list(reader.gene_columns()) == ["symbol"]  # not the numbers of "length"


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "object"])
def test_integer_alternatives(tmp_path, from_file):
    adata = with_layers()
    adata.X = adata.X * 0.5
    data = write(adata, tmp_path / "cells.h5ad") if from_file else adata
    with AnnDataReader(data) as reader:
        assert reader.integer_alternatives() == ["layer='counts'", "layer='raw' (.raw)"]
    with AnnDataReader(data, layer="counts") as reader:
        assert reader.integer_alternatives() == ["layer='raw' (.raw)"]


def test_x_is_an_alternative_to_a_layer():
    assert AnnDataReader(with_layers(), layer="dense").integer_alternatives()[0] == "X (leave layer out)"


# --- Each bad input: one clear message ---


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nothing\.h5ad"):
        AnnDataReader(tmp_path / "nothing.h5ad")


def test_unknown_suffix(tmp_path):
    path = tmp_path / "counts.parquet"
    path.write_text("cell,ACTB\n")
    with pytest.raises(ValueError, match=r"counts.parquet is of no known format .*\.h5ad, \.zarr"):
        AnnDataReader(path)


def test_no_hdf5(tmp_path):
    path = tmp_path / "cells.h5ad"
    path.write_text("cell,ACTB\n")
    with pytest.raises(ValueError, match=r"cells.h5ad is no HDF5 file.*b'cell,ACT'"):
        AnnDataReader(path)


@pytest.mark.parametrize("share", [0.5, 0.98])
def test_truncated(h5ad, share):
    content = h5ad.read_bytes()
    h5ad.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"cells.h5ad is truncated .* Copy or download it again"):
        AnnDataReader(h5ad)


def test_a_folder_called_h5ad(tmp_path):
    (tmp_path / "cells.h5ad").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        AnnDataReader(tmp_path / "cells.h5ad")


def test_damaged_values(tmp_path):
    path = tmp_path / "cells.h5ad"
    make_adata().write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(content)
    with (
        AnnDataReader(path) as reader,
        pytest.raises(ValueError, match=r"Rows \[0, 5\) of X of .*cells.h5ad could not be read .* damaged"),
    ):
        reader.read(0, 5)


def test_column_numbers_beyond_the_genes(h5ad):
    with h5py.File(h5ad, "r+") as file:
        file["X/indices"][0] = NUM_GENES + 5
    with (
        AnnDataReader(h5ad) as reader,
        pytest.raises(ValueError, match=r"cells.h5ad could not be read .* damaged"),
    ):
        reader.read(0, 5)


def test_hdf5_that_is_no_anndata(tmp_path):
    path = tmp_path / "cells.h5ad"
    with h5py.File(path, "w") as file:
        file["matrix/data"] = [1, 2]
    with pytest.raises(ValueError, match=r"holds no AnnData: it has no obs and no var, but matrix.*Cell Ranger"):
        AnnDataReader(path)


def test_zarr_that_is_no_anndata(tmp_path):
    (tmp_path / "cells.zarr").mkdir()
    with pytest.raises(ValueError, match=r"cells.zarr is no zarr group"):
        AnnDataReader(tmp_path / "cells.zarr")


def test_tables_as_old_anndata_stored_them(h5ad):
    with h5py.File(h5ad, "r+") as file:
        del file["obs"]
        file["obs"] = np.zeros(NUM_CELLS, dtype=[("index", "S8")])
    with pytest.raises(ValueError, match=r"obs is not stored as anndata 0.7.*anndata.read_h5ad"):
        AnnDataReader(h5ad)


def test_unknown_layer_names_those_there_are(tmp_path):
    path = write(with_layers(), tmp_path / "cells.h5ad")
    with pytest.raises(KeyError, match=r"no layer 'umis'. Its layers: 'counts', 'dense'; layer='raw' is adata.raw"):
        AnnDataReader(path, layer="umis")
    with pytest.raises(KeyError, match=r"the AnnData has no layer 'umis'. Its layers: none\."):
        AnnDataReader(make_adata(), layer="umis")


def test_unknown_gene_column_names_those_there_are(h5ad):
    with pytest.raises(KeyError, match=r"no gene_column 'name' in var. Its columns: 'symbol', 'length'"):
        AnnDataReader(h5ad, gene_column="name")


@pytest.mark.parametrize("suffix", ["", ".h5ad", ".zarr"])
def test_no_x(tmp_path, suffix):
    adata = with_layers()
    adata.X = None
    data = write(adata, tmp_path / f"cells{suffix}") if suffix else adata
    with pytest.raises(ValueError, match=r"has no X. Pass layer='counts' or layer='dense' or layer='raw'"):
        AnnDataReader(data)


@pytest.mark.parametrize("suffix", ["", ".h5ad"])
@pytest.mark.parametrize(("rows", "columns", "what"), [(0, 50, "cells"), (37, 0, "genes")])
def test_no_cells_and_no_genes(tmp_path, suffix, rows, columns, what):
    adata = make_adata()[:rows, :columns].copy()
    data = write(adata, tmp_path / f"cells{suffix}") if suffix else adata
    with pytest.raises(ValueError, match=f"There are no {what} in X of .* {rows} x {columns}"):
        AnnDataReader(data)


def test_obs_of_another_length(h5ad):
    with h5py.File(h5ad, "r+") as file:
        file["X"].attrs["shape"] = [NUM_CELLS - 1, NUM_GENES]
    with pytest.raises(ValueError, match=r"is 36 x 50, but there are 37 cells in obs.*damaged"):
        AnnDataReader(h5ad)


def test_values_that_are_no_numbers():
    adata = make_adata()
    adata.layers["text"] = np.full(adata.shape, "a")
    with pytest.raises(ValueError, match="layer 'text' of the AnnData holds <U1, not real numbers"):
        AnnDataReader(adata, layer="text")


def test_rows_that_are_not_there(h5ad):
    with AnnDataReader(h5ad) as reader, pytest.raises(ValueError, match=r"Rows \[0, 38\) of 37"):
        reader.read(0, 38)


def test_a_refused_file_is_closed_again(h5ad):
    with pytest.raises(KeyError) as error:  # which keeps the reader alive
        AnnDataReader(h5ad, layer="umis")
    with h5py.File(h5ad, "r+") as file:  # HDF5 locks open files
        assert "X" in file
    del error
