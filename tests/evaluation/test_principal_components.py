"""Gene means and components of real cells, from parts, are those of all cells at once."""

import anndata
import numpy as np
import pytest
from sklearn.decomposition import PCA

from scfoundation_hf.evaluation.principal_components import log1p_matrices, mean_values, principal_components
from scfoundation_hf.tokenization.data_collator import RawCells
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.read_depth import log1p_cp10k, row_totals

NUM_GENES = 19264


@pytest.fixture(scope="module")
def counts(example_cells):
    """200 real cells over the vocabulary."""
    adata = anndata.read_h5ad(example_cells)[:200]
    aligned, _ = GeneVocabulary.default().align(adata.X, adata.var_names)
    return aligned.astype(np.float64)


@pytest.fixture(scope="module")
def values(counts):
    return log1p_cp10k(counts, row_totals(counts))


def test_parts_give_the_values_and_means_of_all_cells(counts, values):
    parts = [
        RawCells([str(i) for i in range(part.shape[0])], part.indices, part.data.astype(np.int64), part.indptr)
        for part in (counts[:70], counts[70:])
    ]
    matrices = list(log1p_matrices(parts, NUM_GENES))
    assert [matrix.shape for matrix in matrices] == [(70, NUM_GENES), (130, NUM_GENES)]
    assert abs(matrices[1] - values[70:]).max() < 1e-12
    expected = np.asarray(values.mean(axis=0)).ravel()
    np.testing.assert_allclose(mean_values(lambda: parts, NUM_GENES), expected, rtol=0, atol=1e-12)


def test_components_are_those_of_the_full_decomposition(values):
    few_genes = values[:, :3000]
    parts = [few_genes[:70], few_genes[70:]]
    means = np.asarray(few_genes.mean(axis=0)).ravel()
    loadings, variances, total = principal_components(lambda: parts, means, rank=4)
    expected = PCA(4, svd_solver="full").fit(few_genes.toarray())
    np.testing.assert_allclose(variances, expected.explained_variance_ * 199 / 200, rtol=1e-3)
    np.testing.assert_allclose(np.abs(np.sum(loadings * expected.components_.T, axis=0)), 1, atol=5e-3)
    np.testing.assert_allclose(total, few_genes.toarray().var(axis=0).sum(), rtol=1e-10)
    np.testing.assert_allclose(loadings.T @ loadings, np.eye(4), atol=1e-10)


def test_refuses_more_components_than_cells(values):
    with pytest.raises(ValueError, match="3 cells of 19,264 genes do not have 4 components; pass lower ranks"):
        principal_components(lambda: [values[:3]], np.zeros(NUM_GENES), rank=4)
