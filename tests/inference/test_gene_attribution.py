"""Which genes drove a call: what the gradients say, gene by gene, whatever the company."""

import builtins

import anndata
import numpy as np
import pytest
import torch

from scfoundation_hf.inference import gene_attribution
from scfoundation_hf.inference.cell_job import packed_on
from scfoundation_hf.inference.gene_attribution import attribute_genes, strongest_genes
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForCellClassification
from scfoundation_hf.tokenization.data_collator import EncodedCells
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

METHODS = ["gradient_x_input", "integrated_gradients"]


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> ScFoundationForCellClassification:
    torch.manual_seed(0)
    return ScFoundationForCellClassification.from_pretrained(
        tiny_model_dir, num_labels=4, classifier_pooling="all"
    ).eval()


@pytest.fixture(scope="module")
def cells(example_cells) -> EncodedCells:
    prepared = ScFoundationTokenizer().prepare(anndata.read_h5ad(example_cells)[::160].copy(), gene_column="symbol")
    return prepared.encode(0, prepared.num_cells)


def score(model: ScFoundationForCellClassification, batch: dict, called: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        logits = model(**batch).logits
    return (logits - logits.mean(dim=-1, keepdim=True)).gather(1, called[:, None])[:, 0].numpy()


@pytest.mark.parametrize("method", METHODS)
def test_calls_are_the_models_and_depth_tokens_get_nothing(model, cells, method):
    logits, attributions = attribute_genes(model, cells, method=method)
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(**packed_on(model.device, cells)).logits, rtol=0, atol=1e-5)
    assert attributions.dtype == np.float32
    assert attributions.shape == cells.input_ids.shape
    is_gene = cells.input_ids < 19264
    assert not attributions[~is_gene].any()
    assert np.count_nonzero(attributions[is_gene]) > 0.9 * is_gene.sum()


def test_integrated_gradients_add_up_to_what_all_genes_change(model, cells):
    logits, attributions = attribute_genes(model, cells, method="integrated_gradients")
    called = logits.argmax(dim=-1)
    batch = packed_on(model.device, cells)
    without = batch | {"values": batch["values"].masked_fill(batch["input_ids"] < 19264, 0)}
    expected = score(model, batch, called) - score(model, without, called)
    totals = np.add.reduceat(attributions, cells.offsets[:-1])
    np.testing.assert_allclose(totals, expected, rtol=0, atol=0.1 * np.abs(expected).max())


def test_gradient_x_input_is_the_slope_along_the_change_of_one_gene(model, cells):
    """Moving one gene's value embedding a little of the way to that of 0 takes that share of its attribution."""
    one = cells.select([0])
    logits, attributions = attribute_genes(model, one, method="gradient_x_input")
    batch = packed_on(model.device, one)
    embedding = model.scfoundation.embeddings.value_embedding
    token, step = int(np.argmax(np.abs(attributions))), 1e-3

    def move(module, inputs, output):
        zero = module.forward(torch.zeros(1, 1))[0, 0]
        moved = output.clone()
        moved[0, token] += step * (zero - moved[0, token])
        return moved

    handle = embedding.register_forward_hook(move)
    moved = score(model, batch, logits.argmax(dim=-1))
    handle.remove()
    change = score(model, batch, logits.argmax(dim=-1)) - moved
    assert change[0] / step == pytest.approx(attributions[token], rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_company_and_order_do_not_matter(model, cells, method):
    cells = cells.select([0, 1, 2])
    _, together = attribute_genes(model, cells, method=method)
    _, alone = attribute_genes(model, cells.select([2]), method=method)
    np.testing.assert_allclose(together[cells.offsets[2] :], alone, rtol=0, atol=1e-4 * np.abs(alone).max())


def test_frozen_models_are_explained_too_and_nothing_is_left_on_them(model, cells):
    _, expected = attribute_genes(model, cells, method="gradient_x_input")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _, got = attribute_genes(model, cells, method="gradient_x_input")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.scfoundation.embeddings.value_embedding._forward_hooks


def test_the_strongest_genes_are_those_that_speak_for_the_call():
    cells = EncodedCells(
        input_ids=np.array([3, 8, 9, 19264, 19265, 5, 6, 19264, 19265]),
        values=np.ones(9, dtype=np.float32),
        offsets=np.array([0, 5, 9]),
        cell_index=np.arange(2),
    )
    attributions = np.array([0.1, -2, 0.5, 9, 9, -1, 0.2, 9, 9], dtype=np.float32)
    genes, strengths = strongest_genes(cells, attributions, num_genes=2)
    assert genes.tolist() == [[9, 3], [6, -1]]
    np.testing.assert_allclose(strengths, [[0.5, 0.1], [0.2, 0]])


def test_methods_are_checked(model, cells, monkeypatch):
    with pytest.raises(ValueError, match="no explanation 'saliency'; choose gradient_x_input or integrated_gradients"):
        attribute_genes(model, cells, method="saliency")
    plain_import = builtins.__import__

    def without_captum(name, *arguments, **options):
        if name.startswith("captum"):
            raise ImportError(name)
        return plain_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_captum)
    with pytest.raises(ImportError, match="need captum: pip install captum"):
        gene_attribution.check_method("integrated_gradients")
