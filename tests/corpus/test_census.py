"""The Census adapter on a local SOMA experiment that is laid out as the Census is; the Census needs the network."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import anndata
import numpy as np
import pytest

from scfoundation_hf.corpus import census
from scfoundation_hf.corpus.census import SomaReader, census_datasets, open_census
from scfoundation_hf.corpus.manifest import CorpusManifest
from scfoundation_hf.corpus.prepare import InputRefusedError, prepare

tiledbsoma = pytest.importorskip("tiledbsoma", reason="needs tiledbsoma, which cellxgene-census brings along")
tiledbsoma_io = pytest.importorskip("tiledbsoma.io")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def cells(example_cells) -> anndata.AnnData:
    cells = anndata.read_h5ad(example_cells)[:120].copy()
    cells.X = cells.X.astype(np.float32)
    cells.obs["dataset_id"] = ["first"] * 70 + ["second"] * 50
    cells.obs["is_primary_data"] = [True] * 60 + [False] * 10 + [True] * 50
    cells.obs["donor_id"] = [f"d{i % 3}" for i in range(120)]
    cells.obs["nnz"] = np.asarray((cells.X > 0).sum(axis=1)).ravel()
    cells.var["feature_id"] = list(cells.var_names)
    cells.var["feature_name"] = list(cells.var["symbol"])
    cells.uns = {}
    return cells


@pytest.fixture(scope="module")
def experiment_uri(cells, tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("soma") / "homo_sapiens")
    tiledbsoma_io.from_anndata(uri, cells, measurement_name="RNA", X_layer_name="raw")
    return uri


@pytest.fixture
def local_census(experiment_uri, monkeypatch) -> None:
    @contextmanager
    def open_local(version: str) -> Iterator:
        assert version == "2025-11-08"
        with tiledbsoma.Experiment.open(experiment_uri) as experiment:
            yield experiment

    monkeypatch.setattr(census, "open_census", open_local)


@pytest.mark.parametrize("with_nnz", [True, False])
def test_rows(cells, experiment_uri, with_nnz, monkeypatch):
    with tiledbsoma.Experiment.open(experiment_uri) as experiment:
        reader = SomaReader(experiment, name="census", value_filter="dataset_id == 'second'")
        if not with_nnz:
            reader._num_entries = None
        assert (reader.num_cells, reader.num_columns) == (50, cells.n_vars)
        assert list(reader.gene_names) == list(cells.var["feature_id"])
        ranges = list(reader.chunks(max_entries=20_000))
        assert len(ranges) > 1
        rows = np.vstack([reader.read(start, stop).toarray() for start, stop in ranges])
        np.testing.assert_array_equal(rows, cells.X[70:].toarray())
        assert list(reader.obs_column("donor_id")) == list(cells.obs["donor_id"][70:])
        assert "feature_name" in reader.gene_columns()
        with pytest.raises(KeyError, match=r"census has no obs column 'sex'. Its columns: .*donor_id"):
            reader.obs_column("sex")
        with pytest.raises(KeyError, match=r"census has no layer 'normalized'. Its layers: 'raw'"):
            SomaReader(experiment, name="census", layer="normalized")
        with pytest.raises(KeyError, match=r"census has no gene_column 'symbols' in var"):
            SomaReader(experiment, name="census", gene_column="symbols")


def test_prepare(cells, local_census, tmp_path):
    inputs = census_datasets("2025-11-08")
    assert inputs == ["census:2025-11-08/first", "census:2025-11-08/second"]
    prepare(inputs, tmp_path / "census", obs=["donor_id"], validation_share=0, progress=False)
    manifest = CorpusManifest.read(tmp_path / "census")
    assert [source["num_cells_in_input"] for source in manifest.sources] == [60, 50], "primary data only"
    before = (tmp_path / "census" / "manifest.json").stat().st_mtime_ns
    prepare(inputs, tmp_path / "census", obs=["donor_id"], validation_share=0, progress=False)
    assert (tmp_path / "census" / "manifest.json").stat().st_mtime_ns == before

    cells[cells.obs["is_primary_data"]].copy().write_h5ad(tmp_path / "cells.h5ad")
    prepare([tmp_path / "cells.h5ad"], tmp_path / "file", obs=["donor_id"], validation_share=0, progress=False)
    from_file = CorpusManifest.read(tmp_path / "file")
    assert sum(shard.num_entries for shard in manifest.shards) == from_file.shards[0].num_entries


def test_refused(local_census, tmp_path):
    for name, message in (
        ("census:2025-11-08", r"census:2025-11-08 is not of the form census:VERSION/DATASET_ID"),
        ("census:2025-11-08/third", r"There are no cells in layer 'raw' of census:2025-11-08/third"),
    ):
        with pytest.raises(InputRefusedError, match=message):
            prepare([name], tmp_path / "corpus", progress=False)


def test_releases_that_move_are_refused():
    with pytest.raises(ValueError, match=r"census:stable is another release"), open_census("stable"):
        pass


def test_the_package_is_called_as_it_wants_to_be(monkeypatch):
    """With a stand-in for the package, since the real one goes to the network."""
    import sys

    @contextmanager
    def open_soma(*, census_version: str) -> Iterator[dict]:
        yield {"census_data": {"homo_sapiens": f"experiment of {census_version}"}}

    monkeypatch.setitem(sys.modules, "cellxgene_census", SimpleNamespace(open_soma=open_soma))
    with open_census("2025-11-08") as experiment:
        assert experiment == "experiment of 2025-11-08"
    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    with pytest.raises(ImportError, match="pip install cellxgene-census"), open_census("2025-11-08"):
        pass
