"""From the original's own inputs, through conversion, tokenizer and `embed`, to the original's stored outputs.

`test_model_parity.py` compares the model alone; here the way in is under test too: alignment, values, T and S.
"""

from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining, AutoTokenizer

import scfoundation_hf
from scfoundation_hf.tokenization.data_collator import as_tensors, pack_cells

RELATIVE_TOLERANCE = 1e-4  # of the largest absolute value; the original's own rounding is about 1e-6

DEPTHS = {
    "a5": {"depth_fold": 1e5},
    "f1": {},
    "f2": {"depth_fold": 2},
    "t4": {"target_depth": 10_000},
}


def assert_matches(actual, expected: torch.Tensor) -> None:
    actual = torch.as_tensor(actual)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= RELATIVE_TOLERANCE * expected.abs().max()


@pytest.fixture(scope="module")
def inputs(parity_dir) -> dict[str, torch.Tensor]:
    return load_file(parity_dir / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(parity_dir) -> dict[str, torch.Tensor]:
    return load_file(parity_dir / "outputs.safetensors")


@pytest.fixture(scope="module")
def models(parity_dir, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    return {
        key: scfoundation_hf.convert_checkpoint(parity_dir / "models.ckpt", folder / key, key=key)
        for key in ("cell", "rde", "gene")
    }


def as_anndata(values: torch.Tensor, genes: torch.Tensor | None = None) -> anndata.AnnData:
    """An AnnData over all vocabulary genes, columns shuffled: order must not matter."""
    symbols = np.array(scfoundation_hf.GeneVocabulary.default().symbols)
    full = np.zeros((len(values), len(symbols)), dtype=np.float32)
    full[:, slice(None) if genes is None else genes.long()] = values
    shuffled = np.random.default_rng(0).permutation(len(symbols))
    cells = anndata.AnnData(full[:, shuffled])
    cells.var_names = symbols[shuffled]
    return cells


def embed(cells: anndata.AnnData, model: Path, **options) -> torch.Tensor:
    scfoundation_hf.embed(cells, model, progress=False, **options)
    return torch.from_numpy(cells.obsm["X_scfoundation"])


@pytest.mark.parametrize("pooling", ["all", "max"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_raw_counts(models, inputs, outputs, depth, pooling):
    got = embed(as_anndata(inputs["counts"]), models["cell"], pooling=pooling, **DEPTHS[depth])
    assert_matches(got, outputs[f"cell_F_{depth}_{pooling}"])


@pytest.mark.parametrize("pooling", ["all", "max"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_normalized_cells_as_the_original_takes_them(models, inputs, outputs, depth, pooling):
    options = {"original_mode": "normalized_cells", "pooling": pooling, **DEPTHS[depth]}
    got = embed(as_anndata(inputs["lognorm"]), models["cell"], **options)
    assert_matches(got, outputs[f"cell_T_{depth}_{pooling}"])


def test_normalized_cells_with_their_totals(models, inputs, outputs):
    cells = as_anndata(inputs["lognorm"])
    cells.obs["n_counts"] = inputs["total_counts"].numpy()
    got = embed(cells, models["cell"], values="log1p_cp10k", total_counts="n_counts")
    assert_matches(got, outputs["cell_A_f1_all"])


def test_counts_recovered_from_normalized_cells_give_what_the_counts_give(models, inputs, outputs):
    got = embed(as_anndata(inputs["lognorm"]), models["cell"], values="recover_counts")
    assert_matches(got, outputs["cell_F_f1_all"])


def test_the_read_depth_enhancement_model(models, inputs, outputs):
    got = embed(as_anndata(inputs["counts"]), models["rde"], depth_fold=1e5)
    assert_matches(got, outputs["cell_rde_F_a5_all"])


@pytest.mark.parametrize("pooling", ["all", "max"])
@pytest.mark.parametrize(("mode", "letter"), [("bulk_raw", "F"), ("bulk_normalized", "T")])
def test_bulk_samples(models, inputs, outputs, mode, letter, pooling):
    samples = as_anndata(inputs[f"bulk_{letter}_values"], inputs[f"bulk_{letter}_genes"])
    got = embed(samples, models["cell"], original_mode=mode, pooling=pooling)
    assert_matches(got, outputs[f"bulk_{letter}_{pooling}"])


def test_predicted_expression_and_gene_embeddings(models, inputs, outputs):
    tokenizer = AutoTokenizer.from_pretrained(models["gene"])
    model = AutoModelForPreTraining.from_pretrained(models["gene"]).eval()
    cells = as_anndata(inputs["counts"])
    with torch.inference_mode():
        expression = model(**tokenizer(cells, target_depth=10_000)).predicted_values
        genes = model(**tokenizer(cells[:2].copy()), output_gene_embeddings=True).gene_embeddings
    assert_matches(expression, outputs["expr_single_F_t4"])
    assert_matches(genes[:, inputs["gene_positions"].long()], outputs["gene_F_f1"])


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_cell_is_the_same_alone_batched_reordered_and_packed(models, inputs, backend):
    tokenizer = AutoTokenizer.from_pretrained(models["gene"])
    model = AutoModelForPreTraining.from_pretrained(models["gene"]).eval()
    model.scfoundation.add_pooling_layer = True
    cells = as_anndata(inputs["counts"])
    order = [3, 1, 0, 2]
    packed = as_tensors(pack_cells(tokenizer.prepare(cells).encode(0, len(cells))), "pt")
    alone = [tokenizer(cells[[row]].copy()) for row in range(len(cells))]
    with torch.inference_mode():
        embeddings = torch.cat([model.scfoundation(**batch).pooler_output for batch in alone])
        expression = torch.cat([model(**batch).predicted_values for batch in alone])
        model.set_attn_implementation(backend)
        for batch, rows in (
            (tokenizer(cells), slice(None)),
            (tokenizer(cells[order].copy()), order),
            (packed, slice(None)),
        ):
            for got, expected in (
                (model.scfoundation(**batch).pooler_output, embeddings[rows]),
                (model(**batch).predicted_values, expression[rows]),
            ):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_total_of_one_keeps_its_depth_tokens(models):
    """The original drops S there (log10 of 1 is 0) and then fails, or pools the wrong columns."""
    counts = torch.zeros(1, 19264)
    counts[0, 100] = 1
    got = embed(as_anndata(counts), models["cell"])
    assert torch.isfinite(got).all()
    source_depth, target_depth, gene_max, gene_mean = got.chunk(4, dim=-1)
    assert not torch.equal(source_depth, target_depth)
    torch.testing.assert_close(gene_max, gene_mean)  # one gene: its maximum is its mean


def test_a_dropped_target_depth_is_the_documented_difference(models, inputs, outputs):
    """The original's t0: T is dropped, the last gene stands in its place. Ours asks for a total count instead."""
    with pytest.raises(ValueError, match="not a logarithm"):
        embed(as_anndata(inputs["counts"]), models["cell"], target_depth=1)
    width = outputs["cell_quirk_F_t0_all"].shape[1] // 4
    nearest = embed(as_anndata(inputs["counts"]), models["cell"], target_depth=100)
    quirk = outputs["cell_quirk_F_t0_all"]
    assert (nearest - quirk)[:, width : 2 * width].abs().max() > 0.1
