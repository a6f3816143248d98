"""Batches come together, cell types stay apart, and what cannot be integrated is refused with its place."""

import anndata
import numpy as np
import pytest

import scfoundation_hf.inference.integration as integration
from scfoundation_hf.inference.integration import integrate

pytestmark = pytest.mark.filterwarnings("ignore::ImportWarning")  # umap's, when bbknn imports it


@pytest.fixture
def cells():
    """160 cells of four types, in two batches that differ by a shift smaller than that between types."""
    generator = np.random.default_rng(0)
    types = generator.integers(4, size=160)
    batches = np.where(generator.random(160) < 0.5, "one", "two")
    embedding = generator.normal(scale=0.5, size=(160, 12)) + 6 * np.eye(12)[types]
    embedding[batches == "two", 8:] += 2
    adata = anndata.AnnData(obsm={"X_scfoundation": embedding.astype(np.float32)})
    adata.obs_names = [f"cell{number}" for number in range(160)]
    adata.obs["donor"], adata.obs["cell_type"] = batches, types.astype(str)
    return adata


def shift(places, cells):
    """How far the batches of a type lie apart, mean over types."""
    kinds, batches = cells.obs["cell_type"].to_numpy(), cells.obs["donor"].to_numpy()
    middles = [[places[(kinds == kind) & (batches == name)].mean(0) for name in ("one", "two")] for kind in "0123"]
    return np.mean([np.linalg.norm(first - second) for first, second in middles])


def test_harmony_brings_batches_together(cells):
    pytest.importorskip("harmonypy", reason="needs harmonypy, of the extra [mapping]")
    assert integrate(cells, batch="donor", num_components=10) is cells
    corrected = cells.obsm["X_scfoundation_harmony"]
    assert corrected.shape == (160, 10)
    assert corrected.dtype == np.float32
    assert shift(corrected, cells) < 0.5 * shift(cells.obsm["X_scfoundation"], cells)
    again = integrate(cells.copy(), batch="donor", num_components=10, key_added="again")
    np.testing.assert_array_equal(again.obsm["again"], corrected)


def test_bbknn_joins_batches_where_scanpy_looks_for_it(cells):
    pytest.importorskip("bbknn", reason="needs bbknn, of the extra [mapping]")
    integrate(cells, batch="donor", method="bbknn")
    place = cells.uns["X_scfoundation_bbknn"]
    graph = cells.obsp[place["connectivities_key"]]
    assert graph.shape == cells.obsp[place["distances_key"]].shape == (160, 160)
    donors = cells.obs["donor"].to_numpy()
    for number in range(160):
        assert set(donors[graph[number].indices]) == {"one", "two"}
    assert place["params"]["use_rep"] == "X_scfoundation"


def test_bad_input_is_named(cells):
    pytest.importorskip("harmonypy", reason="needs harmonypy, of the extra [mapping]")
    with pytest.raises(ValueError, match="no method 'scanorama'; choose 'harmony' or 'bbknn'"):
        integrate(cells, batch="donor", method="scanorama")
    with pytest.raises(KeyError, match=r"no obsm\['X_pca'\] \(there is: 'X_scfoundation'\). Make it with"):
        integrate(cells, batch="donor", use_rep="X_pca")
    with pytest.raises(KeyError, match=r"no obs column 'lane'\. Columns: 'donor', 'cell_type'"):
        integrate(cells, batch="lane")
    with pytest.raises(ValueError, match=r"same obs\['donor'\], 'one': there is nothing to integrate"):
        integrate(cells[cells.obs["donor"] == "one"].copy(), batch="donor")
    without = cells.copy()
    without.obsm["X_scfoundation"][3] = np.nan
    with pytest.raises(ValueError, match=r"1 of 160 cells have no embedding .*the first is 'cell3'\)"):
        integrate(without, batch="donor")
    without = cells.copy()
    without.obs.loc["cell5", "donor"] = None
    with pytest.raises(ValueError, match=r"1 cells have no obs\['donor'\] \(the first is 'cell5'\)"):
        integrate(without, batch="donor")


def test_bbknn_needs_some_cells_of_every_batch(cells):
    pytest.importorskip("bbknn", reason="needs bbknn, of the extra [mapping]")
    cells.obs["donor"] = np.where(np.arange(160) < 2, "tiny", "large")
    with pytest.raises(ValueError, match="Batch 'tiny' has 2 cells; BBKNN looks for 3 neighbours"):
        integrate(cells, batch="donor", method="bbknn")


def test_a_missing_package_is_named(cells, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(integration, "import_module", missing)
    with pytest.raises(ImportError, match=r"integrate needs bbknn: pip install bbknn, or 'scfoundation-hf\[mapping\]'"):
        integrate(cells, batch="donor", method="bbknn")
