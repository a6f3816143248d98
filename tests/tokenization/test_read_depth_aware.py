"""Each statistical test has a level of 0.001 and a fixed seed, and rejects a law that is a little off (`POWER`)."""

import anndata
import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader

from scfoundation_hf.tokenization import read_depth_aware
from scfoundation_hf.tokenization.data_collator import RawCells, ScFoundationReadDepthAwareCollator
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.read_depth import down_sample
from scfoundation_hf.tokenization.read_depth_aware import CellGenerators, ReadDepthAwareRecipe
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

LEVEL, POWER = 1e-3, 1e-6
NUM_GENES, T, S, PAD = 19_264, 19_264, 19_265, 19_266


@pytest.fixture(scope="module")
def tokenizer():
    return ScFoundationTokenizer()


def raw_cells(path, *, num_cells=None, gene_column=None) -> RawCells:
    adata = anndata.read_h5ad(path)[:num_cells]
    counts, _ = GeneVocabulary.default().align(adata.X, adata.var[gene_column] if gene_column else adata.var_names)
    return RawCells.from_csr(counts, cell_ids=list(adata.obs_names))


@pytest.fixture(scope="module")
def cells(example_cells):
    """48 blood cells, most with a total above 1,000."""
    return raw_cells(example_cells, num_cells=48, gene_column="symbol")


@pytest.fixture(scope="module")
def deep_cells(shared_data):
    """100 cells of lung cancer lines, with tens of thousands of counts."""
    return raw_cells(shared_data / "single_cells_5batches.h5ad", num_cells=100, gene_column="symbol")


def one_cell(gene_ids, counts, cell_id="cell") -> RawCells:
    return RawCells([cell_id], np.asarray(gene_ids), np.asarray(counts), np.array([0, len(gene_ids)]))


def rows_of(cells: RawCells, epoch: int = 0) -> list[dict]:
    rows = []
    for cell_id, start, stop in zip(cells.cell_ids, cells.offsets[:-1], cells.offsets[1:], strict=True):
        gene_ids, counts = cells.gene_ids[start:stop], cells.counts[start:stop]
        rows.append({"cell_id": cell_id, "gene_ids": gene_ids, "counts": counts, "epoch": epoch})
    return rows


def collate(tokenizer, cells, **options) -> list[dict[str, np.ndarray]]:
    """Each cell of the batch without its padding."""
    batch = ScFoundationReadDepthAwareCollator(tokenizer, layout="padded", return_tensors="np", **options)(cells)
    unpadded = []
    for i in range(len(batch["labels"])):
        cell = {}
        for key, values, padding in (
            ("input_ids", "input_ids", PAD),
            ("values", "input_ids", PAD),
            ("masked_ids", "masked_ids", PAD),
            ("target_ids", "target_ids", PAD),
            ("labels", "target_ids", PAD),
        ):
            cell[key] = batch[key][i][batch[values][i] != padding]
        unpadded.append(cell | {key: batch[key][i] for key in ("decoder_ids", "decoder_weights") if key in batch})
    return unpadded


def assert_same_cells(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for key in ("input_ids", "values", "masked_ids", "target_ids", "labels"):
            np.testing.assert_array_equal(a[key], b[key])


def nothing_hidden(**overrides) -> ReadDepthAwareRecipe:
    """As little as a recipe can hide, and never a token."""
    return ReadDepthAwareRecipe(
        hidden_nonzero_probability=0, hidden_zero_probability=1e-3, mask_share=1, random_value_share=0, **overrides
    )


# --- Tokens, targets and labels of real cells ---


@pytest.mark.parametrize("name", ["released", "paper"])
def test_tokens_targets_and_labels_against_the_tokenizer(tokenizer, example_cells, cells, name):
    full = tokenizer(anndata.read_h5ad(example_cells)[:48].copy(), gene_column="symbol", return_tensors="np")
    num_changed = 0
    for i, cell in enumerate(collate(tokenizer, cells, recipe=name)):
        values = np.zeros(NUM_GENES + 3, dtype=np.float32)
        values[full["input_ids"][i]] = full["values"][i]
        ids, targets, masked = cell["input_ids"], cell["target_ids"], cell["masked_ids"]
        assert ids[-2:].tolist() == [T, S]
        for some in (ids, targets, masked):
            assert (np.diff(some) > 0).all()
        np.testing.assert_array_equal(cell["labels"], values[targets])
        assert np.isin(masked, targets).all()
        assert not np.isin(masked, ids).any()
        assert len(masked) < len(targets) if name == "released" else np.array_equal(masked, targets)
        assert cell["values"][-2] == values[S], "T is the depth of the full cell"
        assert cell["values"][-1] <= values[S]
        if cell["values"][-1] == values[S]:  # not down-sampled: what isn't a target is as the tokenizer has it
            is_plain = ~np.isin(ids, targets)
            np.testing.assert_array_equal(cell["values"][is_plain], values[ids[is_plain]])
            num_changed += (cell["values"] != values[ids]).sum()
            expressed = np.flatnonzero(values[:NUM_GENES])
            assert np.isin(expressed, np.union1d(ids, masked)).all()
    assert (num_changed > 0) == (name == "released")


def test_the_input_of_a_down_sampled_cell_is_whole_counts_on_its_own_total(tokenizer, cells):
    matrix = cells.to_csr(NUM_GENES)
    num_shallower = 0
    recipe = nothing_hidden(down_sampling_probability=1)
    for i, cell in enumerate(collate(tokenizer, cells, recipe=recipe)):
        full = matrix[i].toarray()[0]
        total = 10 ** np.float64(cell["values"][-1])
        counts = np.expm1(cell["values"][:-2].astype(np.float64)) * total / 1e4
        np.testing.assert_allclose(counts, np.rint(counts), rtol=1e-4)
        np.testing.assert_allclose(np.rint(counts).sum(), total, rtol=1e-5)
        assert (np.rint(counts) <= full[cell["input_ids"][:-2]]).all()
        assert np.rint(total) == full.sum() if full.sum() < 1000 else total < full.sum()
        num_shallower += total < full.sum()
        # Genes lost to down-sampling are zero genes of the input, with the full cell's value as their label.
        np.testing.assert_allclose(cell["labels"], np.log1p(full[cell["target_ids"]] / full.sum() * 1e4), rtol=1e-6)
    assert 10 < num_shallower < len(cells), "some cells here have less than 1,000 counts"


def test_lost_genes_become_targets_with_their_full_value(tokenizer, cells):
    recipe = ReadDepthAwareRecipe(hidden_zero_probability=0.3, down_sampling_probability=1)
    in_input = [np.union1d(cell["input_ids"], cell["masked_ids"]) for cell in collate(tokenizer, cells, recipe=recipe)]
    lost = [
        (~np.isin(cell["target_ids"], shown)) & (cell["labels"] > 0)
        for cell, shown in zip(collate(tokenizer, cells, recipe=recipe), in_input, strict=True)
    ]
    assert sum(cell.sum() for cell in lost) > 100


def test_tpm_with_down_sampling_off(tokenizer, cells):
    tpm = RawCells(cells.cell_ids, cells.gene_ids, cells.counts * np.float32(0.7), cells.offsets)
    with pytest.raises(ValueError, match=rf"Cell '{cells.cell_ids[0]}' holds 0\.7 at gene id \d+, which is no count"):
        collate(tokenizer, tpm)
    for cell in collate(tokenizer, tpm, recipe=ReadDepthAwareRecipe(down_sampling_probability=0)):
        assert cell["values"][-1] == cell["values"][-2]


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.float16, np.float32, np.float64])
def test_whole_counts_of_any_dtype(tokenizer, cells, dtype):
    typed = RawCells(cells.cell_ids, cells.gene_ids.astype(np.uint16), cells.counts.astype(dtype), cells.offsets)
    for cell, expected in zip(collate(tokenizer, typed), collate(tokenizer, cells), strict=True):
        for key, value in expected.items():
            np.testing.assert_allclose(cell[key], value, rtol=1e-5)


def test_a_batch_has_the_contracts_keys_types_and_padding(tokenizer, cells):
    batch = ScFoundationReadDepthAwareCollator(tokenizer, decoder_positions=2000)(cells)
    num_masked, num_targets = batch["masked_ids"].shape[1], batch["target_ids"].shape[1]
    assert {key: (tuple(v.shape), v.dtype) for key, v in batch.items() if torch.is_tensor(v)} == {
        "input_ids": ((1, int(batch["cu_seq_lens_q"][-1])), torch.int64),
        "values": ((1, int(batch["cu_seq_lens_q"][-1])), torch.float32),
        "cu_seq_lens_q": ((49,), torch.int32),
        "cu_seq_lens_k": ((49,), torch.int32),
        "masked_ids": ((48, num_masked), torch.int64),
        "target_ids": ((48, num_targets), torch.int64),
        "labels": ((48, num_targets), torch.float32),
        "decoder_ids": (tuple(batch["decoder_ids"].shape), torch.int64),
        "decoder_weights": (tuple(batch["decoder_ids"].shape), torch.float32),
    }
    is_padding = batch["target_ids"] == PAD
    assert is_padding.any()
    assert torch.equal(is_padding, batch["labels"] == -100)
    assert torch.equal(is_padding, is_padding.sort(dim=1).values), "on the right"


# --- The laws ---


def test_ratio_of_read_depths_is_beta_distributed(tokenizer, deep_cells):
    def p_values(**rate):
        recipe = nothing_hidden(down_sampling_probability=1, **rate)
        depths = [
            cell["values"][-2:].astype(np.float64)
            for epoch in range(15)
            for cell in collate(tokenizer, rows_of(deep_cells, epoch), recipe=recipe)
        ]
        ratios = 10 ** np.array([source - target for target, source in depths])
        return stats.kstest(ratios, stats.beta(2, 2).cdf).pvalue

    assert p_values() > LEVEL
    assert p_values(down_sampling_rate_alpha=1, down_sampling_rate_beta=1) < POWER


def test_half_of_the_cells_are_down_sampled(tokenizer, cells):
    totals = np.add.reduceat(cells.counts, cells.offsets[:-1])

    def p_value(**overrides):
        is_shallower = np.array(
            [
                [
                    cell["values"][-1] < cell["values"][-2]
                    for cell in collate(tokenizer, rows_of(cells, epoch), **overrides)
                ]
                for epoch in range(60)
            ]
        )
        assert not is_shallower[:, totals < 1000].any()
        num_deep = is_shallower[:, totals >= 1000].size
        return stats.binomtest(int(is_shallower.sum()), num_deep, 0.5).pvalue

    assert p_value(recipe=nothing_hidden()) > LEVEL
    assert p_value(recipe=nothing_hidden(down_sampling_probability=0.6)) < POWER


def test_down_sampled_counts_are_binomial(deep_cells):
    counts = deep_cells.counts[: deep_cells.offsets[1]]
    rate, num_draws = 0.3, 200

    def p_values(draw):
        rng = np.random.default_rng(5)
        draws = np.array([draw(rng) for _ in range(num_draws)])
        scores = (draws - counts * rate) / np.sqrt(counts * rate * (1 - rate))
        fourth_moment = 3 + (1 - 6 * rate * (1 - rate)) / (counts * rate * (1 - rate))
        variance = (num_draws * (fourth_moment - 1)).sum()
        return (
            2 * stats.norm.sf(abs(scores.sum()) / np.sqrt(scores.size)),
            2 * stats.norm.sf(abs((scores**2 - 1).sum()) / np.sqrt(variance)),
        )

    assert min(p_values(lambda rng: down_sample(counts, rate=rate, generator=rng))) > LEVEL
    assert p_values(lambda rng: down_sample(counts, rate=rate + 0.01, generator=rng))[0] < POWER
    assert p_values(lambda rng: rng.poisson(counts * rate))[1] < POWER


@pytest.fixture(scope="module")
def synthetic_cells() -> RawCells:
    """200 cells of 500 to 1,500 genes, in which every gene has a count of its own."""
    rng = np.random.default_rng(7)
    sizes = rng.integers(500, 1500, 200)
    return RawCells(
        np.arange(200),
        np.concatenate([np.sort(rng.choice(NUM_GENES, size, replace=False)) for size in sizes]),
        np.concatenate([rng.permutation(size) + 1 for size in sizes]),
        np.concatenate([[0], np.cumsum(sizes)]),
    )


def treatments(tokenizer, cells, **options) -> dict[str, np.ndarray]:
    """What became of the genes of cells whose counts all differ, per cell, and where the random values came from."""
    matrix = cells.to_csr(NUM_GENES)
    sums = {f"{kind} {what}": [] for kind in ("nonzero", "zero") for what in ("all", "masked", "random", "same")}
    zero_ranks, donor_ranks, zero_donor_ranks = [], [], []
    for i, cell in enumerate(collate(tokenizer, cells, **options)):
        genes, counts = matrix[i].indices, matrix[i].data
        expected = np.zeros(NUM_GENES, dtype=np.float32)
        expected[genes] = np.log1p(counts / counts.sum() * 1e4)
        sums["nonzero all"].append(len(genes))
        sums["zero all"].append(NUM_GENES - len(genes))
        zeros = np.flatnonzero(expected == 0)
        zero_targets = np.intersect1d(cell["target_ids"], zeros)
        zero_ranks.append((np.searchsorted(zeros, zero_targets) + 0.5) / len(zeros))
        sums["zero masked"].append(np.isin(zero_targets, cell["masked_ids"]).sum())
        zero_tokens = np.isin(zero_targets, cell["input_ids"])
        sums["zero random"].append(zero_tokens.sum())
        sums["zero same"].append(len(zero_targets) - sums["zero masked"][-1] - zero_tokens.sum())
        targets = np.intersect1d(cell["target_ids"], genes)
        sums["nonzero masked"].append(np.isin(targets, cell["masked_ids"]).sum())
        shown = np.zeros(NUM_GENES + 2, dtype=np.float32)
        shown[cell["input_ids"]] = cell["values"]
        visible = np.intersect1d(targets, cell["input_ids"])
        is_random = ~np.isclose(shown[visible], expected[visible], rtol=1e-5)
        sums["nonzero random"].append(is_random.sum())
        sums["nonzero same"].append((~is_random).sum())
        by_value = np.argsort(expected[genes])
        for tokens, ranks in ((visible[is_random], donor_ranks), (zero_targets[zero_tokens], zero_donor_ranks)):
            sources = by_value[np.searchsorted(expected[genes][by_value], shown[tokens] * (1 - 1e-6))]
            np.testing.assert_allclose(expected[genes[sources]], shown[tokens], rtol=1e-5)
            assert (genes[sources] != tokens).all(), "not a gene's own value"
            ranks.append((sources + 0.5) / len(genes))
    ranks = {"zero ranks": zero_ranks, "donor ranks": donor_ranks, "zero donor ranks": zero_donor_ranks}
    return {key: np.array(value) for key, value in sums.items()} | {k: np.concatenate(v) for k, v in ranks.items()}


@pytest.fixture(scope="module")
def drawn(tokenizer, synthetic_cells):
    return treatments(tokenizer, synthetic_cells, recipe=ReadDepthAwareRecipe(down_sampling_probability=0))


@pytest.mark.parametrize(("kind", "probability"), [("nonzero", 0.3), ("zero", 0.03)])
def test_numbers_of_hidden_genes_are_binomial(drawn, kind, probability):
    num_genes = drawn[f"{kind} all"]
    num_targets = sum(drawn[f"{kind} {what}"] for what in ("masked", "random", "same"))

    def p_values(num_targets, probability):
        scores = (num_targets - num_genes * probability) / np.sqrt(num_genes * probability * (1 - probability))
        squares = (scores**2).sum()
        of_spread = 2 * min(stats.chi2(len(scores)).sf(squares), stats.chi2(len(scores)).cdf(squares))
        return 2 * stats.norm.sf(abs(scores.sum()) / np.sqrt(len(scores))), of_spread

    assert min(p_values(num_targets, probability)) > LEVEL
    assert p_values(num_targets, probability * 1.04)[0] < POWER
    assert p_values(np.rint(num_genes * probability), probability)[1] < POWER, "a fixed share has no spread"


@pytest.mark.parametrize("kind", ["nonzero", "zero"])
def test_shares_of_masked_random_and_unchanged_targets(drawn, kind):
    found = np.array([drawn[f"{kind} {what}"].sum() for what in ("masked", "random", "same")])
    for shares, is_law in (((0.8, 0.1, 0.1), True), ((0.82, 0.09, 0.09), False), ((0.8, 0.12, 0.08), False)):
        p_value = stats.chisquare(found, np.array(shares) * found.sum()).pvalue
        assert p_value > LEVEL if is_law else p_value < POWER


@pytest.mark.parametrize("what", ["zero ranks", "donor ranks", "zero donor ranks"])
def test_hidden_zeros_and_lenders_of_random_values_are_drawn_evenly(drawn, what):
    assert len(drawn[what]) > 5000
    assert stats.kstest(drawn[what], "uniform").pvalue > LEVEL
    assert stats.kstest(drawn[what] ** 1.15, "uniform").pvalue < POWER


def test_paper_masks_all_that_it_hides_and_ten_times_the_zeros(tokenizer, synthetic_cells):
    recipe = ReadDepthAwareRecipe.from_name("paper", down_sampling_probability=0)
    drawn = treatments(tokenizer, synthetic_cells, recipe=recipe)
    for kind in ("nonzero", "zero"):
        assert drawn[f"{kind} random"].sum() == drawn[f"{kind} same"].sum() == 0
        p_value = stats.binomtest(int(drawn[f"{kind} masked"].sum()), int(drawn[f"{kind} all"].sum()), 0.3).pvalue
        assert p_value > LEVEL


# --- One draw a seed, epoch and cell ---


def test_a_cell_has_the_same_draw_in_any_batch_order_layout_and_form(tokenizer, cells):
    expected = collate(tokenizer, cells)
    rows = rows_of(cells)
    assert_same_cells(collate(tokenizer, rows), expected)
    assert_same_cells(collate(tokenizer, rows[::-1])[::-1], expected)
    assert_same_cells([cell for row in rows for cell in collate(tokenizer, [row])], expected)
    assert_same_cells(collate(tokenizer, cells, decoder_positions=3000), expected)
    packed = ScFoundationReadDepthAwareCollator(tokenizer, return_tensors="np")(cells)
    padded = ScFoundationReadDepthAwareCollator(tokenizer, return_tensors="np", layout="padded")(cells)
    is_real = padded["attention_mask"].astype(bool)
    for key in ("input_ids", "values"):
        np.testing.assert_array_equal(packed[key][0], padded[key][is_real])
    np.testing.assert_array_equal(np.diff(packed["cu_seq_lens_q"]), is_real.sum(axis=1))
    for key in ("masked_ids", "target_ids", "labels"):
        np.testing.assert_array_equal(packed[key], padded[key])


@pytest.mark.parametrize("change", ["seed", "epoch", "cell_id"])
def test_another_seed_epoch_or_id_is_another_draw(tokenizer, cells, change):
    row = rows_of(cells)[0]
    (expected,) = collate(tokenizer, [row])
    if change == "seed":
        (other,) = collate(tokenizer, [row], seed=1)
    else:
        (other,) = collate(tokenizer, [row | {change: 1}])
    assert len(np.intersect1d(expected["target_ids"], other["target_ids"])) < 0.5 * len(expected["target_ids"])


def test_epochs_of_a_batch(tokenizer, cells):
    mixed = RawCells(cells.cell_ids, cells.gene_ids, cells.counts, cells.offsets, np.arange(48) % 2)
    by_epoch = [collate(tokenizer, rows_of(cells, epoch)) for epoch in (0, 1)]
    assert_same_cells(collate(tokenizer, mixed), [by_epoch[i % 2][i] for i in range(48)])


def test_the_stream_of_a_cell_is_the_philox_stream_that_is_documented():
    generators = CellGenerators(seed=3, cell_ids=[5 + (7 << 64)], epochs=2)
    expected = np.random.Generator(np.random.Philox(key=np.array([3, 2], dtype=np.uint64), counter=[0, 1, 5, 7]))
    first = generators.of(0, stream=1).random(10)
    np.testing.assert_array_equal(first, expected.random(10))
    np.testing.assert_array_equal(generators.of(0, stream=1).random(10), first)


def test_strings_are_hashed_with_all_their_digits():
    ids = ["f" * 31 + "0", "f" * 31 + "1", np.str_("f" * 31 + "0")]
    generators = CellGenerators(seed=0, cell_ids=ids, epochs=0)
    first = [generators.of(i, stream=0).random() for i in range(3)]
    assert first[0] == first[2] != first[1]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_any_number_of_workers_gives_the_same_batches(tokenizer, cells, num_workers):
    collator = ScFoundationReadDepthAwareCollator(tokenizer, decoder_positions=2000)
    rows = rows_of(cells)
    expected = [collator(rows[start : start + 6]) for start in range(0, 48, 6)]
    batches = list(DataLoader(rows, batch_size=6, collate_fn=collator, num_workers=num_workers))
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key, value in other.items():
            assert torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(value))


# --- Cells at the edge ---


class LowestDraws:
    """A generator whose uniforms are 0, as single precision gives once in 16 million draws."""

    def random(self, out=None, dtype=None):
        if out is None:
            return 0.0
        out[:] = 0

    def standard_exponential(self, out, dtype):
        out[:] = 1


def test_the_lowest_draw_is_no_target_where_the_chance_is_none(monkeypatch, tokenizer, cells):
    monkeypatch.setattr(CellGenerators, "of", lambda self, cell, *, stream: LowestDraws())
    recipe = ReadDepthAwareRecipe(hidden_nonzero_probability=0, down_sampling_probability=0)
    for cell, genes in zip(collate(tokenizer, cells, recipe=recipe), cells.to_csr(NUM_GENES), strict=True):
        assert len(cell["target_ids"]) > 0
        assert not np.isin(cell["target_ids"], genes.indices).any()


def test_one_gene_stays_visible(tokenizer):
    for seed in range(30):
        (cell,) = collate(tokenizer, one_cell([7], [3]), seed=seed)
        assert cell["input_ids"][cell["input_ids"] < NUM_GENES].size >= 1
        assert 7 in cell["input_ids"]
        assert np.isclose(cell["values"][cell["input_ids"] == 7], np.log1p(1e4))
        np.testing.assert_allclose(cell["values"][-2:], np.log10(3), rtol=1e-6)


def test_where_all_would_be_hidden_one_stays(tokenizer, cells):
    recipe = ReadDepthAwareRecipe.from_name("paper", hidden_nonzero_probability=1, hidden_zero_probability=0)
    for cell in collate(tokenizer, cells, recipe=recipe):
        assert len(cell["input_ids"]) == 3
        assert cell["input_ids"][0] not in cell["target_ids"]
        assert len(cell["target_ids"]) > 50


def test_where_nothing_was_drawn_one_gene_is_hidden(tokenizer, cells):
    recipe = ReadDepthAwareRecipe(hidden_nonzero_probability=1e-9, hidden_zero_probability=0)
    for cell in collate(tokenizer, cells, recipe=recipe):
        assert len(cell["target_ids"]) == 1
        assert cell["masked_ids"] == cell["target_ids"]
        assert cell["labels"] > 0
    (cell,) = collate(tokenizer, one_cell([7], [3]), recipe=recipe)
    assert cell["target_ids"].tolist() == [7], "hidden, nothing would be left to see"
    assert cell["input_ids"].tolist() == [7, T, S]
    assert len(cell["masked_ids"]) == 0


def test_random_values_come_from_another_gene_of_the_same_cell_if_there_is_one(tokenizer):
    recipe = ReadDepthAwareRecipe(
        hidden_nonzero_probability=1, hidden_zero_probability=0, mask_share=0, random_value_share=1
    )
    cells = RawCells(["a", "b"], np.array([7, 9, 7]), np.array([1, 3, 3]), np.array([0, 2, 3]))
    two_genes, one_gene = collate(tokenizer, cells, recipe=recipe)
    np.testing.assert_allclose(two_genes["values"][:2], np.log1p([7500, 2500]), rtol=1e-6)
    assert one_gene["target_ids"].tolist() == [7]
    np.testing.assert_allclose(one_gene["values"][0], np.log1p(1e4), rtol=1e-6)


def test_nothing_left_after_down_sampling_leaves_the_cell_unchanged(tokenizer):
    counts = np.array([2, 1])
    assert down_sample(counts, rate=1e-12, generator=np.random.default_rng(0)) is counts
    recipe = nothing_hidden(down_sampling_probability=1, min_total_to_down_sample=0, down_sampling_rate_alpha=1e-3)
    (cell,) = collate(tokenizer, one_cell([3, 5], counts), recipe=recipe)
    assert cell["input_ids"].tolist() == [3, 5, T, S]
    assert cell["values"][-1] == cell["values"][-2]


def test_a_cell_that_expresses_every_gene(tokenizer):
    every_gene = one_cell(np.arange(NUM_GENES), np.arange(NUM_GENES) + 1)
    recipe = ReadDepthAwareRecipe(down_sampling_probability=0)
    (cell,) = collate(tokenizer, every_gene, recipe=recipe, decoder_positions=100)
    assert 5_500 < len(cell["target_ids"]) < 6_000
    assert cell["decoder_ids"].tolist() == list(range(NUM_GENES + 2))
    assert (cell["decoder_weights"] == 1).all()


def test_a_batch_without_masked_genes(tokenizer, cells):
    recipe = ReadDepthAwareRecipe(mask_share=0, random_value_share=0)
    batch = ScFoundationReadDepthAwareCollator(tokenizer, recipe=recipe)(cells)
    assert batch["masked_ids"].shape == (48, 0)
    assert batch["target_ids"].shape == batch["labels"].shape


# --- Positions the decoder is shown ---


def test_decoder_positions_hold_all_that_matters_and_weigh_the_rest(tokenizer, cells):
    drawn = collate(tokenizer, cells, decoder_positions=4000)
    for cell in drawn:
        ids, weights = cell["decoder_ids"], cell["decoder_weights"]
        assert ids.shape == weights.shape == (4000,)
        assert (ids.dtype, weights.dtype) == (np.int64, np.float32)
        assert (np.diff(ids) > 0).all()
        needed = np.union1d(cell["input_ids"], cell["target_ids"])
        is_needed = np.isin(ids, needed)
        assert is_needed.sum() == len(needed)
        assert (weights[is_needed] == 1).all()
        assert len(np.unique(weights[~is_needed])) == 1
        np.testing.assert_allclose(weights.sum(), NUM_GENES + 2, rtol=1e-5)
    assert not np.array_equal(drawn[0]["decoder_ids"], drawn[1]["decoder_ids"])
    again = collate(tokenizer, cells, decoder_positions=4000)
    np.testing.assert_array_equal(again[3]["decoder_ids"], drawn[3]["decoder_ids"])


def test_shown_zeros_are_drawn_evenly(tokenizer, cells):
    ranks = []
    for cell in collate(tokenizer, cells, decoder_positions=3000):
        zeros = np.setdiff1d(np.arange(NUM_GENES), np.union1d(cell["input_ids"], cell["target_ids"]))
        shown = cell["decoder_ids"][cell["decoder_weights"] > 1]
        ranks.append((np.searchsorted(zeros, shown) + 0.5) / len(zeros))
    ranks = np.concatenate(ranks)
    assert stats.kstest(ranks, "uniform").pvalue > LEVEL
    assert stats.kstest(ranks**1.05, "uniform").pvalue < POWER


def test_shown_zeros_come_from_a_stream_of_their_own(tokenizer, cells):
    (cell,) = collate(tokenizer, [rows_of(cells)[0] | {"cell_id": 5}], decoder_positions=3000)
    taken = set(cell["input_ids"]) | set(cell["target_ids"])
    generator = np.random.Generator(np.random.Philox(key=np.zeros(2, dtype=np.uint64), counter=[0, 1, 5, 0]))
    while len(taken) < 3000:
        taken |= set(generator.integers(NUM_GENES + 2, size=3000 - len(taken), dtype=np.int32))
    np.testing.assert_array_equal(cell["decoder_ids"], sorted(taken))


def test_every_set_of_positions_is_drawn_equally_often():
    generator = np.random.default_rng(11)
    found: dict[tuple, int] = {}
    for _ in range(6000):
        is_taken = np.array([False, True, False, False, False, True, False])
        read_depth_aware._draw_some(is_taken, 2, generator)
        assert is_taken[[1, 5]].all()
        drawn = tuple(i for i in np.flatnonzero(is_taken).tolist() if i not in (1, 5))
        found[drawn] = found.get(drawn, 0) + 1
    assert set(map(len, found)) == {2}
    assert len(found) == 10
    assert stats.chisquare(list(found.values())).pvalue > LEVEL


@pytest.mark.parametrize("probability", [0, 1e-12, 0.03, 0.3, 0.9, 1])
def test_marks_are_each_gene_with_its_probability(probability):
    """Numbers and places: the genes marked in 2,000 cells, binomial for each cell and for each gene."""
    num_cells, num_genes = 2000, 50
    number = read_depth_aware._num_marks(num_genes, probability)
    waits = np.random.default_rng(3).standard_exponential((num_cells, number), dtype=np.float32)
    marks = read_depth_aware._marks(waits, num_genes, probability)
    assert (np.diff(marks, axis=1) > 0).all()
    is_marked = np.zeros((num_cells, num_genes + 1), dtype=bool)
    np.put_along_axis(is_marked, np.minimum(marks, num_genes), True, axis=1)
    is_marked = is_marked[:, :num_genes]
    if probability in (0, 1e-12, 1):
        assert (is_marked == (probability == 1)).all()
        return
    assert stats.binomtest(int(is_marked.sum()), is_marked.size, probability).pvalue > LEVEL
    assert stats.binomtest(int(is_marked.sum()), is_marked.size, probability * 0.85).pvalue < POWER
    for axis in (0, 1):
        counts, draws = is_marked.sum(axis=axis), is_marked.shape[axis]
        squares = ((counts - draws * probability) ** 2).sum() / (draws * probability * (1 - probability))
        law = stats.chi2(len(counts))
        assert 2 * min(law.sf(squares), law.cdf(squares)) > LEVEL


def test_decoder_positions_grow_where_a_cell_needs_more(tokenizer, cells):
    drawn = collate(tokenizer, cells, decoder_positions=10)
    needed = [len(np.union1d(cell["input_ids"], cell["target_ids"])) for cell in drawn]
    assert len(drawn[0]["decoder_ids"]) == max(needed) + 256
    everything = collate(tokenizer, cells, decoder_positions=10**6)
    assert all(cell["decoder_ids"].tolist() == list(range(NUM_GENES + 2)) for cell in everything)
    assert all((cell["decoder_weights"] == 1).all() for cell in everything)


# --- Through the model ---


def test_both_layouts_give_the_model_the_same_loss(tokenizer, cells, tiny_model_dir):
    from scfoundation_hf.modeling_scfoundation.modeling_scfoundation import ScFoundationForPreTraining

    model = ScFoundationForPreTraining.from_pretrained(tiny_model_dir).eval()
    few = RawCells.from_rows(rows_of(cells)[:4])
    losses = {}
    for layout in ("packed", "padded"):
        batch = ScFoundationReadDepthAwareCollator(tokenizer, layout=layout)(few)
        with torch.no_grad():
            losses[layout] = model(**batch).loss
    assert losses["packed"].isfinite()
    torch.testing.assert_close(losses["packed"], losses["padded"], atol=1e-6, rtol=1e-5)
    batch = ScFoundationReadDepthAwareCollator(
        tokenizer, recipe=ReadDepthAwareRecipe(mask_share=0, random_value_share=0)
    )(few)
    with torch.no_grad():
        assert model(**batch).loss.isfinite()


# --- Recipes ---


def test_the_released_recipe_is_the_default(tokenizer):
    assert ReadDepthAwareRecipe.from_name("released") == ReadDepthAwareRecipe()
    assert ScFoundationReadDepthAwareCollator(tokenizer).recipe == ReadDepthAwareRecipe()
    paper = ReadDepthAwareRecipe.from_name("paper")
    assert (paper.hidden_nonzero_probability, paper.hidden_zero_probability, paper.mask_share) == (0.3, 0.3, 1)
    assert ReadDepthAwareRecipe.from_name("paper", mask_share=0.8).mask_share == 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_zero_probability": 1.5}, r"hidden_zero_probability must be between 0 and 1, got 1\.5"),
        ({"down_sampling_probability": -0.1}, r"down_sampling_probability must be between 0 and 1, got -0\.1"),
        ({"mask_share": "0.8"}, r"mask_share must be a number, got '0\.8'"),
        ({"mask_share": float("nan")}, "mask_share must be between 0 and 1, got nan"),
        ({"mask_share": 0.95}, r"mask_share 0\.95 and random_value_share 0\.1 .* together 1\.05"),
        ({"hidden_zero_probability": 0, "hidden_nonzero_probability": 0}, "both 0, so there is nothing to predict"),
        ({"min_total_to_down_sample": -1}, "min_total_to_down_sample must be a total count, 0 or more, got -1"),
        ({"down_sampling_rate_beta": 0}, "down_sampling_rate_beta must be above 0 and finite, got 0"),
        ({"gamma": 0.5}, "has no 'gamma'. Its fields: hidden_nonzero_probability, .*down_sampling_probability"),
    ],
)
def test_recipes_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ReadDepthAwareRecipe.from_name("released", **options)


def test_unknown_recipe(tokenizer):
    with pytest.raises(ValueError, match="no recipe 'original'; choose one of released, paper"):
        ScFoundationReadDepthAwareCollator(tokenizer, recipe="original")


# --- What is no batch of cells ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, r"seed must be an integer between 0 and 2\*\*64 - 1, got -1"),
        ({"layout": "ragged"}, "layout must be 'packed' or 'padded', got 'ragged'"),
        ({"decoder_positions": 0}, "decoder_positions must be at least 1, or left out, got 0"),
    ],
)
def test_collator_settings_out_of_range(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        ScFoundationReadDepthAwareCollator(tokenizer, **options)


@pytest.mark.parametrize(
    ("cell_ids", "epochs", "message"),
    [
        ([-1], 0, r"string or an integer between 0 and 2\*\*128 - 1, got -1"),
        ([1.5], 0, r"got 1\.5"),
        (["a"], -1, "An epoch is -1; epochs count from 0"),
        (["a"], np.array([0, 1]), "There are 2 epochs for 1 cells"),
    ],
)
def test_ids_and_epochs_out_of_range(cell_ids, epochs, message):
    with pytest.raises(ValueError, match=message):
        CellGenerators(seed=0, cell_ids=cell_ids, epochs=epochs)
