"""The baselines read what the model reads, never what is hidden, and are fitted as well as their definitions allow."""

import anndata
import numpy as np
import pytest
import torch

from scfoundation_hf.evaluation import baselines
from scfoundation_hf.evaluation.baselines import (
    BASELINES,
    GeneMean,
    MatrixFactorisation,
    ScaledProfile,
    TargetMean,
    VisibleCells,
)
from scfoundation_hf.evaluation.expression_errors import error_sums, measures
from scfoundation_hf.tokenization.data_collator import RawCells, ScFoundationReadDepthAwareCollator
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.read_depth import row_totals
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

NUM_GENES = 19264


@pytest.fixture(scope="module")
def matrix(example_cells):
    """Real counts of the deeper half of the example cells, over the vocabulary, in a random order."""
    adata = anndata.read_h5ad(example_cells)
    aligned, _ = GeneVocabulary.default().align(adata.X, adata.var_names)
    totals = row_totals(aligned)
    deep = np.flatnonzero(totals >= np.median(totals))
    return aligned[np.random.default_rng(0).permutation(deep)].astype(np.int64)


def raw_cells(matrix, first, stop, size=50):
    return [
        RawCells([f"cell {i}" for i in range(start, min(start + size, stop))], part.indices, part.data, part.indptr)
        for start in range(first, stop, size)
        for part in [matrix[start : min(start + size, stop)]]
    ]


@pytest.fixture(scope="module")
def training_cells(matrix):
    return raw_cells(matrix, 0, 300)


@pytest.fixture(scope="module")
def other_cells(matrix):
    return raw_cells(matrix, 300, matrix.shape[0])


@pytest.fixture(scope="module")
def collators():
    tokenizer = ScFoundationTokenizer()
    return {name: ScFoundationReadDepthAwareCollator(tokenizer, recipe=name) for name in ("released", "paper")}


@pytest.fixture(scope="module")
def fitted(training_cells, collators):
    """The baselines fitted to the released recipe, by name."""
    few_ranks = {MatrixFactorisation: {"ranks": (2, 8)}}
    made = [kind(**few_ranks.get(kind, {})) for kind in BASELINES]
    return {one.name: one.fit(training_cells, collator=collators["released"]) for one in made}


def mean_squared_error(baseline, cells, collator):
    batches = [collator(part) for part in cells]
    sums = [error_sums(baseline.predict(batch), batch["labels"]) for batch in batches]
    return measures(torch.cat(sums).sum(0))["mse"]


def test_visible_cells_are_the_tokens_of_the_batch(other_cells, collators):
    batch = collators["released"](other_cells[0])
    cells = VisibleCells.from_batch(batch, num_genes=NUM_GENES)
    borders = batch["cu_seq_lens_q"].tolist()
    for cell in (0, 17):
        tokens = slice(borders[cell], borders[cell + 1])
        ids, values = batch["input_ids"][0, tokens].numpy(), batch["values"][0, tokens].numpy()
        expected = np.zeros(NUM_GENES, dtype=np.float32)
        expected[ids[:-2]] = values[:-2]
        np.testing.assert_array_equal(cells.values[cell], expected)
        assert (cells.log10_target_depth[cell], cells.log10_source_depth[cell]) == tuple(values[-2:])
        masked = batch["masked_ids"][cell]
        np.testing.assert_array_equal(np.flatnonzero(cells.is_hidden[cell]), masked[masked < NUM_GENES])
        target = batch["target_ids"][cell].numpy()
        np.testing.assert_array_equal(cells.target_ids[cell][cells.is_target[cell]], target[target < NUM_GENES])
    np.testing.assert_array_equal(cells.is_target, batch["labels"].numpy() != -100)


@pytest.mark.parametrize("kind", BASELINES, ids=[kind.name for kind in BASELINES])
def test_padded_batches_are_predicted_as_packed_ones(kind, fitted, other_cells, collators):
    packed = collators["released"](other_cells[0])
    padded = ScFoundationReadDepthAwareCollator(collators["released"].tokenizer, layout="padded")(other_cells[0])
    predicted = fitted[kind.name].predict(packed)
    torch.testing.assert_close(predicted, fitted[kind.name].predict(padded), rtol=0, atol=0)
    assert predicted.dtype == torch.float32
    assert predicted.shape == packed["target_ids"].shape
    assert (predicted[packed["labels"] == -100] == 0).all()
    assert (predicted >= 0).all()


@pytest.mark.parametrize("kind", BASELINES, ids=[kind.name for kind in BASELINES])
def test_labels_do_not_reach_a_prediction(kind, fitted, other_cells, collators):
    batch = collators["released"](other_cells[0])
    predicted = fitted[kind.name].predict(batch)
    without_labels = {key: value for key, value in batch.items() if key != "labels"}
    torch.testing.assert_close(fitted[kind.name].predict(without_labels), predicted, rtol=0, atol=0)


def test_gene_means_are_those_of_all_full_cells(fitted, matrix):
    dense = matrix[:300].toarray().astype(np.float64)
    expected = np.log1p(dense / dense.sum(1, keepdims=True) * 1e4).mean(0)
    np.testing.assert_allclose(fitted["gene mean"].means, expected, rtol=1e-12)


def test_target_means_are_those_of_the_draws(fitted, training_cells, collators):
    """With one cell of the gene's mean beside them, which decides alone for a gene that was never asked for."""
    prior, found = fitted["gene mean"].means, fitted["gene mean over targets"].means
    labels_of_gene: dict[int, list[float]] = {}
    for part in training_cells:
        batch = collators["released"](part)
        for ids, labels in zip(batch["target_ids"].tolist(), batch["labels"].tolist(), strict=True):
            for gene, label in zip(ids, labels, strict=True):
                labels_of_gene.setdefault(gene, []).append(label)
    labels_of_gene.pop(NUM_GENES + 2)  # padding
    never = sorted(set(range(NUM_GENES)) - labels_of_gene.keys())
    np.testing.assert_array_equal(found[never], prior[never])
    for gene in sorted(labels_of_gene)[::200]:
        assert found[gene] == pytest.approx(np.mean([prior[gene], *labels_of_gene[gene]]), rel=1e-6)


def test_they_get_better_in_order_on_cells_not_seen(fitted, other_cells, collators):
    errors = {name: mean_squared_error(one, other_cells, collators["released"]) for name, one in fitted.items()}
    assert list(errors) == ["gene mean", "gene mean over targets", "scaled profile", "matrix factorisation"]
    assert errors["gene mean over targets"] < 0.8 * errors["gene mean"]
    assert errors["scaled profile"] < errors["gene mean over targets"]
    assert errors["matrix factorisation"] < errors["scaled profile"]


def synthetic(rank, num_cells=400, seed=0):
    """A factorisation that was given its loadings, and batches of cells that follow them exactly."""
    generator = np.random.default_rng(seed)
    factorisation = MatrixFactorisation(ranks=(rank,))
    factorisation.num_genes = 60
    factorisation.means = generator.uniform(2, 4, 60)
    factorisation.loadings = np.linalg.qr(generator.normal(size=(60, rank)))[0]
    factorisation.variances = np.full(rank, 1.0)
    factorisation.total_variance = rank + 1e-9
    values = factorisation.means + generator.normal(size=(num_cells, rank)) @ factorisation.loadings.T
    is_hidden = generator.random(values.shape) < 0.3
    cells = VisibleCells(
        values=np.where(is_hidden, 0, values),
        is_hidden=is_hidden,
        target_ids=np.tile(np.arange(60), (num_cells, 1)),
        is_target=is_hidden,
        log10_target_depth=np.full(num_cells, 4.0),
        log10_source_depth=np.full(num_cells, 4.0),
    )
    return factorisation, cells, values


def test_coordinates_come_from_visible_genes_alone():
    """Cells of exactly rank 3 are found again at their hidden genes; counting those as zeros would not do."""
    factorisation, cells, values = synthetic(rank=3)
    np.testing.assert_allclose(factorisation._estimates(cells)[3], values, atol=1e-6)


def test_the_scaled_profile_fits_the_visible_genes_best():
    """The factor of a cell that is 1.7 times the profile is 1.7, whatever is hidden."""
    profile = ScaledProfile()
    _, cells, _ = synthetic(rank=1)
    profile.means = np.random.default_rng(1).uniform(0, 4, 60)
    scaled = VisibleCells(**{**vars(cells), "values": np.where(cells.is_hidden, 0, 1.7 * profile.means)})
    np.testing.assert_allclose(profile._estimates(scaled)[0], np.tile(1.7 * profile.means, (400, 1)))


def test_the_rank_is_chosen_by_the_tenth(training_cells, collators):
    """Of ranks that differ as much as these, the one that also predicts other cells better."""
    collator = collators["released"]
    factorisation = MatrixFactorisation(ranks=(1, 8)).fit(training_cells, collator=collator)
    assert factorisation.rank in (1, 8)
    errors = {
        rank: mean_squared_error(
            MatrixFactorisation(ranks=(rank,)).fit(training_cells, collator=collator), tenth, collator
        )
        for rank in (1, 8)
        for tenth in [list(baselines._split(training_cells, in_fold=True))]
    }
    assert factorisation.rank == min(errors, key=errors.__getitem__)


def test_the_regression_is_least_squares():
    """Against numpy on all terms at once, for hidden and shown targets apart."""
    generator = np.random.default_rng(0)
    _, cells, _ = synthetic(rank=2)
    shown = generator.random(cells.is_target.shape) < 0.2
    cells = VisibleCells(**{**vars(cells), "is_target": cells.is_hidden | shown})
    estimates, target_means = generator.normal(2, 1, (400, 60)), generator.uniform(0, 3, 60)
    labels = np.abs(0.5 * estimates + target_means + 0.3 * cells.values + generator.normal(0, 0.1, (400, 60)))
    regression = baselines._Regression()
    for rows in (slice(0, 150), slice(150, 400)):
        part = VisibleCells(**{name: array[rows] for name, array in vars(cells).items()})
        regression.add(part, estimates[rows], target_means, labels[rows])
    predicted = regression.predict(cells, estimates, target_means)
    residues = 0.0
    inputs = baselines._Regression._inputs(cells, estimates, target_means)
    for kind in (cells.is_hidden & cells.is_target, ~cells.is_hidden & cells.is_target):
        terms = baselines._terms_up_to_degree_2(inputs[kind])
        coefficients = np.linalg.lstsq(terms, labels[kind], rcond=None)[0]
        np.testing.assert_allclose(predicted[kind], terms @ coefficients, atol=1e-6)
        residues += np.sum((terms @ coefficients - labels[kind]) ** 2)
    assert regression.sum_of_squared_errors() == pytest.approx(residues, rel=1e-6)


def test_a_deeper_cell_than_any_fitted_is_taken_to_the_border(fitted, other_cells, collators):
    batch = collators["released"](other_cells[0])
    deeper = batch | {"values": batch["values"].clone()}
    is_depth = batch["input_ids"] >= NUM_GENES
    deeper["values"][is_depth] = 9.0
    predicted, further = fitted["scaled profile"].predict(deeper), dict(deeper, values=deeper["values"].clone())
    further["values"][is_depth] = 12.0
    torch.testing.assert_close(fitted["scaled profile"].predict(further), predicted, rtol=0, atol=0)


def test_the_split_shares_out_each_cell_once(training_cells):
    kept = [list(baselines._split(training_cells, in_fold=in_fold)) for in_fold in (True, False)]
    ids = [sorted(cell_id for part in parts for cell_id in part.cell_ids) for parts in kept]
    assert sorted(ids[0] + ids[1]) == sorted(cell_id for part in training_cells for cell_id in part.cell_ids)
    assert 0 < len(ids[0]) < 0.2 * 300
    whole = {
        cell_id: part.to_csr(NUM_GENES)[i].toarray()
        for part in training_cells
        for i, cell_id in enumerate(part.cell_ids)
    }
    for part in kept[0]:
        for i, cell_id in enumerate(part.cell_ids):
            np.testing.assert_array_equal(part.to_csr(NUM_GENES)[i].toarray(), whole[cell_id])


def test_epochs_follow_their_cells(training_cells):
    part = training_cells[0]
    numbered = RawCells(part.cell_ids, part.gene_ids, part.counts, part.offsets, epochs=np.arange(len(part)))
    chosen = numbered.select(np.array([3, 7]))
    assert chosen.epochs.tolist() == [3, 7]


@pytest.mark.parametrize("kind", [GeneMean, TargetMean, ScaledProfile], ids=lambda kind: kind.name)
def test_refuses_a_stream_used_up(kind, training_cells, collators):
    used_up = iter(training_cells)
    list(used_up)
    with pytest.raises(ValueError, match="no training cells to learn from, or it was given an iterator"):
        kind().fit(used_up, collator=collators["released"])


def test_refuses_too_few_cells(matrix, collators):
    with pytest.raises(ValueError, match="42 cells of 19,264 genes do not have 64 components; pass lower ranks"):
        MatrixFactorisation().fit(raw_cells(matrix[:44], 0, 44), collator=collators["released"])
    with pytest.raises(ValueError, match="none of them fell into the tenth for scaled profile"):
        ScaledProfile().fit(raw_cells(matrix, 0, 1), collator=collators["released"])
