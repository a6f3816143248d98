"""`gene_embeddings`: the decoder's vectors of chosen genes, beside everything else of the AnnData."""

import json

import anndata
import numpy as np
import pytest
import torch

from scfoundation_hf.inference.gene_embeddings import gene_embeddings
from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

OPTIONS = {"gene_column": "symbol", "progress": False, "genes": ["NKG7", "ENSG00000167286", "INS"]}
KEY = "X_scfoundation_genes"


@pytest.fixture
def cells(example_cells) -> anndata.AnnData:
    return anndata.read_h5ad(example_cells)[::100].copy()  # 8 cells


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> ScFoundationForPreTraining:
    return ScFoundationForPreTraining.from_pretrained(tiny_model_dir).eval()


def test_genes_are_embedded_as_the_model_embeds_them(cells, model):
    result = gene_embeddings(cells, model, depth_fold=2, **OPTIONS)
    assert result is cells
    assert cells.obsm[KEY].shape == (8, 3, 8)
    assert cells.obsm[KEY].dtype == np.float32
    tokenizer = ScFoundationTokenizer()
    positions = [tokenizer.vocabulary.index(gene) for gene in ("NKG7", "CD3D", "INS")]
    for i in range(8):
        batch = tokenizer(cells[i : i + 1], gene_column="symbol", depth_fold=2)
        with torch.inference_mode():
            expected = model(**batch, output_gene_embeddings=True).gene_embeddings[0, positions]
        np.testing.assert_allclose(cells.obsm[KEY][i], expected, rtol=0, atol=1e-5)
    settings = json.loads(cells.uns["scfoundation"][KEY])["settings"]
    assert settings["genes"] == ["NKG7", "CD3D", "INS"]
    assert settings["depth_fold"] == 2
    assert cells.obs[f"{KEY}_counts_kept"].between(0.5, 1).all()
    assert cells[:3].copy().obsm[KEY].shape == (3, 3, 8)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.filterwarnings("ignore:Consolidated metadata|zarr v3 autosharding|Writing zarr v2")
def test_a_file_gives_what_memory_gives(cells, model, tmp_path, suffix):
    source = tmp_path / f"in{suffix}"
    cells.write_zarr(source) if suffix == ".zarr" else cells.write_h5ad(source)
    output = gene_embeddings(source, model, output=tmp_path / f"out{suffix}", cells_per_batch=3, **OPTIONS)
    written = anndata.read_zarr(output) if suffix == ".zarr" else anndata.read_h5ad(output)
    expected = gene_embeddings(cells[::-1].copy(), model, **OPTIONS)
    np.testing.assert_allclose(written.obsm[KEY], expected.obsm[KEY][::-1], rtol=0, atol=1e-5)
    assert (written.X != cells.X).nnz == 0
    written.write_h5ad(tmp_path / "again.h5ad")
    np.testing.assert_array_equal(anndata.read_h5ad(tmp_path / "again.h5ad").obsm[KEY], written.obsm[KEY])


def test_genes_and_arguments_are_checked(cells, model):
    with pytest.raises(ValueError, match="does not hold 'Actb'"):
        gene_embeddings(cells, model, **{**OPTIONS, "genes": ["Actb"]})
    with pytest.raises(TypeError, match="gene_embeddings takes an AnnData or the path of one, not a list"):
        gene_embeddings([1], model, genes=["CD4"])
    with pytest.raises(ValueError, match="cells_per_batch is 0"):
        gene_embeddings(cells, model, cells_per_batch=0, **OPTIONS)
