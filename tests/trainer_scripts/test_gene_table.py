"""Profiles of genes say which go together, and take the place of what was drawn for genes only."""

import numpy as np
import pytest
import torch

from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig
from scfoundation_hf.corpus.sampling import sample_cells
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.trainer_scripts import gene_table
from scfoundation_hf.trainer_scripts.gene_table import begin_with_principal_components, gene_profiles

from .conftest import TINY_MODEL

NUM_GENES = 19264


@pytest.fixture(scope="module")
def cells(corpus):
    return sample_cells(corpus, 10_000)


def make_model(**sizes):
    torch.manual_seed(0)
    return ScFoundationForPreTraining(ScFoundationConfig.from_preset("3m", **TINY_MODEL | sizes))


def test_profiles_are_standardised_and_the_first_follows_the_mean(cells):
    profiles = gene_profiles(cells, num_genes=NUM_GENES, rank=20)
    assert profiles.shape == (NUM_GENES, 21)
    np.testing.assert_allclose(profiles.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(profiles.std(axis=0), 1, rtol=1e-9)
    num_expressed = sum(np.bincount(part.gene_ids, minlength=NUM_GENES) for part in cells)
    expressed = num_expressed > 0
    assert profiles[expressed, 0].min() > profiles[~expressed, 0].max()


def test_genes_that_go_together_have_near_profiles(cells):
    profiles = gene_profiles(cells, num_genes=NUM_GENES, rank=20)
    directions = profiles[:, 1:] / np.linalg.norm(profiles[:, 1:], axis=1, keepdims=True)
    ids = {symbol: number for number, symbol in enumerate(GeneVocabulary.default().symbols)}

    def cosine(first, second):
        return directions[ids[first]] @ directions[ids[second]]

    for near, far in [(("CD3D", "CD3E"), ("CD3D", "LYZ")), (("CD79A", "MS4A1"), ("CD79A", "NKG7"))]:
        assert cosine(*near) > 0.5 > cosine(*far), (near, far)


def test_only_rows_of_genes_and_the_first_columns_are_replaced(corpus, monkeypatch):
    monkeypatch.setattr(gene_table, "MAX_RANK", 11)
    model = make_model()
    drawn = model.get_input_embeddings().weight.detach().clone()
    begin_with_principal_components(model, str(corpus))
    table = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(table[NUM_GENES:], drawn[NUM_GENES:], rtol=0, atol=0)
    torch.testing.assert_close(table[:, 12:], drawn[:, 12:], rtol=0, atol=0)
    torch.testing.assert_close(table[:NUM_GENES, :12].std(dim=0), torch.full((12,), 0.2), rtol=1e-3, atol=0)
    assert model.get_input_embeddings().weight.requires_grad
    again = make_model()
    begin_with_principal_components(again, str(corpus))
    torch.testing.assert_close(again.get_input_embeddings().weight.detach(), table, rtol=0, atol=0)


def test_too_few_cells_are_refused(corpus, monkeypatch):
    monkeypatch.setattr(gene_table, "MAX_CELLS", 10)
    with pytest.raises(ValueError, match=r"takes 15 components of more training cells than that, .* has \d+; prepare"):
        begin_with_principal_components(make_model(), str(corpus))
