import copy
import json
import pickle
import re
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from safetensors.numpy import load_file
from scipy.sparse import csc_matrix, csr_matrix
from transformers import AutoTokenizer, PreTrainedTokenizer

from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.matrix_reader import MatrixReader
from scfoundation_hf.tokenization.prepared_cells import PreparedCells
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer, as_dataset

NUM_GENES = 19_264
T, S, PAD = 19_264, 19_265, 19_266
SYMBOLS = GeneVocabulary.default().symbols


@pytest.fixture(scope="module")
def tokenizer() -> ScFoundationTokenizer:
    return ScFoundationTokenizer()


@pytest.fixture(scope="module")
def parity(parity_dir) -> dict[str, np.ndarray]:
    return load_file(parity_dir / "inputs.safetensors")


@pytest.fixture(scope="module")
def baron(shared_data) -> AnnData:
    return anndata.read_h5ad(shared_data / "baron_pancreas.h5ad")


def full_width(cells: list[dict[str, float]], dtype=np.float32) -> csr_matrix:
    """Cells over the whole vocabulary from {symbol: count}."""
    matrix = np.zeros((len(cells), NUM_GENES), dtype=dtype)
    for row, cell in enumerate(cells):
        for symbol, count in cell.items():
            matrix[row, SYMBOLS.index(symbol)] = count
    return csr_matrix(matrix)


def named(cells: list[dict[str, float]], dtype=np.float32, **layers: list[dict[str, float]]) -> AnnData:
    adata = AnnData(
        full_width(cells, dtype),
        obs=pd.DataFrame(index=[f"cell{i}" for i in range(len(cells))]),
        var=pd.DataFrame(index=list(SYMBOLS)),
    )
    for name, layer in layers.items():
        adata.layers[name] = full_width(layer, dtype)
    return adata


CELLS = [{"ACTB": 3, "CD4": 1}, {"ACTB": 5, "GAPDH": 4, "MT-CO1": 11}]


def tokens_of(batch, i: int) -> tuple[np.ndarray, np.ndarray]:
    is_real = batch["attention_mask"][i].bool()
    return batch["input_ids"][i][is_real].numpy(), batch["values"][i][is_real].numpy()


def assert_same_cells(one, other):
    for field in ("input_ids", "values", "offsets", "cell_index"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def encode_all(prepared: PreparedCells):
    return prepared.encode(0, prepared.num_cells)


# --- The batch contract, and the original's numbers ---


def test_batch_contract(tokenizer):
    batch = tokenizer(full_width(CELLS), gene_names=SYMBOLS)
    assert list(batch) == ["input_ids", "values", "attention_mask"]
    assert [batch[key].dtype for key in batch] == [torch.int64, torch.float32, torch.int64]
    ids = [[SYMBOLS.index(symbol) for symbol in sorted(cell, key=SYMBOLS.index)] for cell in CELLS]
    assert batch["input_ids"].tolist() == [[*ids[0], T, S, PAD], [*ids[1], T, S]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    values = {
        symbol: np.log1p(np.float32(count) / np.float32(4) * np.float32(1e4)) for symbol, count in CELLS[0].items()
    }
    expected = [values[SYMBOLS[i]] for i in ids[0]] + [np.log10(4), np.log10(4), 0]
    np.testing.assert_array_equal(batch["values"][0], np.float32(expected))


def test_values_and_depths_are_the_originals_to_the_last_bit(tokenizer, parity):
    batch = tokenizer(parity["counts"], gene_names=SYMBOLS, target_depth=10_000)
    for i in range(4):
        ids, values = tokens_of(batch, i)
        np.testing.assert_array_equal(ids, [*np.flatnonzero(parity["counts"][i]), T, S])
        np.testing.assert_array_equal(values[:-2], parity["lognorm"][i][ids[:-2]])
        np.testing.assert_array_equal(values[-2:], parity["tokens_expr_F_t4"][i])


def test_depth_fold_gives_the_originals_f2(tokenizer, parity):
    batch = tokenizer(parity["counts"][:2], gene_names=SYMBOLS, depth_fold=2)
    np.testing.assert_allclose([tokens_of(batch, i)[1][-2:] for i in range(2)], parity["masked_T_S"], atol=1e-7)


def test_depths_left_alone_are_equal(tokenizer):
    batch = tokenizer(full_width(CELLS), gene_names=SYMBOLS)
    for i, total in enumerate([4, 20]):
        assert tokens_of(batch, i)[1][-2:].tolist() == [np.float32(np.log10(total))] * 2


def test_depth_is_summed_over_aligned_genes_only(tokenizer):
    matrix = np.hstack([full_width(CELLS).toarray(), [[1.0], [2.0]]])
    prepared = tokenizer.prepare(csr_matrix(matrix), gene_names=[*SYMBOLS, "NOT-A-GENE"])
    assert prepared.total_counts.tolist() == [4, 20]
    np.testing.assert_allclose(prepared.counts_kept_per_cell, [4 / 5, 20 / 22])
    assert encode_all(prepared).row(1)["values"][-1] == np.float32(np.log10(20))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64, np.float64])
def test_integers_of_every_type_give_the_same_batch(tokenizer, dtype):
    expected = tokenizer(full_width(CELLS, np.float64), gene_names=SYMBOLS)
    batch = tokenizer(full_width(CELLS, dtype), gene_names=SYMBOLS)
    assert torch.equal(batch["values"], expected["values"])


def test_small_integer_types_do_not_overflow_when_duplicates_are_summed(tokenizer):
    matrix = np.hstack([full_width([{"ACTB": 200}], np.uint8).toarray(), np.array([[200]], dtype=np.uint8)])
    prepared = tokenizer.prepare(matrix, gene_names=[*SYMBOLS, "ACTB"])
    assert prepared.total_counts.tolist() == [400]
    assert prepared.num_expressed_genes.tolist() == [1]


# --- Every way in gives the same cells ---


def test_matrix_dataframe_and_anndata_agree(tokenizer, baron):
    dense = baron.X.toarray()
    genes = list(baron.var_names)
    expected = encode_all(tokenizer.prepare(baron))
    frame = pd.DataFrame(dense, index=baron.obs_names, columns=genes)
    for prepared in (
        tokenizer.prepare(baron.X, gene_names=genes),
        tokenizer.prepare(csc_matrix(baron.X), gene_names=genes),
        tokenizer.prepare(dense, gene_names=genes),
        tokenizer.prepare(frame),
        tokenizer.prepare(pd.DataFrame.sparse.from_spmatrix(baron.X, index=baron.obs_names, columns=genes)),
    ):
        assert_same_cells(encode_all(prepared), expected)
    assert tokenizer.prepare(frame).cell_names.tolist() == baron.obs_names.tolist()


@pytest.mark.parametrize("storage", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_files_and_backed_agree_with_memory(tokenizer, baron, tmp_path, storage, dtype):
    matrix = {"csr": csr_matrix, "csc": csc_matrix, "dense": lambda m: m.toarray()}[storage](baron.X.astype(dtype))
    adata = AnnData(matrix, obs=baron.obs, var=baron.var)
    expected = encode_all(tokenizer.prepare(adata))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with tokenizer.prepare(tmp_path / "cells.h5ad") as prepared:
        assert_same_cells(encode_all(prepared), expected)
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert_same_cells(encode_all(tokenizer.prepare(backed)), expected)
    backed.file.close()


def test_zarr_agrees_with_memory(tokenizer, baron, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the writer
        baron.write_zarr(tmp_path / "cells.zarr")
    with tokenizer.prepare(str(tmp_path / "cells.zarr")) as prepared:
        assert_same_cells(encode_all(prepared), encode_all(tokenizer.prepare(baron)))


def test_column_order_does_not_matter(tokenizer, baron):
    order = np.random.default_rng(0).permutation(baron.n_vars)
    assert_same_cells(encode_all(tokenizer.prepare(baron[:, order])), encode_all(tokenizer.prepare(baron)))


def test_ensembl_ids_and_symbols_agree_through_gene_column(tokenizer, shared_data):
    path = shared_data / "zheng_facs_pbmc.h5ad"
    with tokenizer.prepare(path) as by_id, tokenizer.prepare(path, gene_column="symbol") as by_symbol:
        assert by_id.settings["gene_column"] is None
        assert by_symbol.settings["gene_column"] == "symbol"
        shared = np.corrcoef(by_id.total_counts, by_symbol.total_counts)[0, 1]
        assert shared > 0.999


@pytest.mark.parametrize("max_entries", [1, 5_000, 10**9])
def test_chunked_equals_whole(tokenizer, baron, max_entries, monkeypatch):
    whole = tokenizer.prepare(baron)
    expected = encode_all(whole)
    monkeypatch.setattr(PreparedCells.chunks, "__kwdefaults__", {"max_entries": max_entries})
    chunked = tokenizer.prepare(baron)
    for name in ("total_counts", "num_expressed_genes", "token_lengths", "counts_kept_per_cell", "is_kept"):
        np.testing.assert_array_equal(getattr(chunked, name), getattr(whole, name))
    assert chunked.settings == whole.settings
    parts = [chunked.encode(start, stop) for start, stop in chunked.chunks()]
    assert (len(parts) > 1) == (max_entries < 10**9)
    np.testing.assert_array_equal(np.concatenate([part.input_ids for part in parts]), expected.input_ids)
    np.testing.assert_array_equal(np.concatenate([part.values for part in parts]), expected.values)
    np.testing.assert_array_equal(np.concatenate([part.cell_index for part in parts]), np.arange(baron.n_obs))


def test_a_cell_is_the_same_alone_and_among_others(tokenizer, baron):
    prepared = tokenizer.prepare(baron)
    among, alone = encode_all(prepared).row(17), tokenizer.prepare(baron[17]).encode(0, 1).row(0)
    for key in among:
        np.testing.assert_array_equal(among[key], alone[key])


def test_token_lengths_are_known_before_encoding(tokenizer, baron):
    prepared = tokenizer.prepare(baron)
    assert prepared.token_lengths.dtype == np.int64
    np.testing.assert_array_equal(prepared.token_lengths, encode_all(prepared).lengths)


def test_stored_zeros_are_not_expressed(tokenizer):
    matrix = full_width([{"ACTB": 3, "CD4": 1}])
    matrix.data[matrix.indices == SYMBOLS.index("CD4")] = 0
    assert tokenizer(matrix, gene_names=SYMBOLS)["input_ids"].tolist() == [[SYMBOLS.index("ACTB"), T, S]]
    assert matrix.nnz == 2, "the user's matrix is not changed"


def test_the_input_is_not_changed(tokenizer, baron):
    before = baron.X.copy()
    tokenizer.prepare(baron, values="recover_counts").encode(0, 20)
    tokenizer(baron)
    assert (before != baron.X).nnz == 0


# --- Ways to take the values ---


def lognormed(matrix: csr_matrix, target: float = 1e4) -> csr_matrix:
    scaled = csr_matrix(matrix.multiply(target / matrix.sum(axis=1)))
    scaled.data = np.log1p(scaled.data)
    return scaled.astype(np.float32)


def test_expected_counts_are_used_as_they_are(tokenizer):
    cells = [{"ACTB": 2.5, "CD4": 0.25}]
    _, values = tokens_of(tokenizer(full_width(cells), gene_names=SYMBOLS, values="expected_counts"), 0)
    assert values[-1] == np.float32(np.log10(2.75))
    expected = np.log1p(np.float32([2.5, 0.25]) / np.float32(2.75) * np.float32(1e4))
    np.testing.assert_array_equal(np.sort(values[:-2]), np.sort(expected))


def test_log1p_cp10k_takes_values_and_totals_as_given(tokenizer, baron):
    adata = baron.copy()
    adata.X = lognormed(baron.X)
    adata.obs["n_counts"] = np.asarray(baron.X.sum(axis=1)).ravel()
    cells = encode_all(tokenizer.prepare(adata, values="log1p_cp10k", total_counts="n_counts", target_depth=10_000))
    for i in (0, 100):
        row = cells.row(i)
        np.testing.assert_allclose(row["values"][-2:], [4, np.log10(adata.obs["n_counts"].iloc[i])], rtol=1e-6)
    by_array = tokenizer.prepare(
        adata, values="log1p_cp10k", total_counts=adata.obs["n_counts"].to_numpy(), target_depth=10_000
    )
    assert_same_cells(encode_all(by_array), cells)
    assert set(np.concatenate([cells.row(i)["values"][:-2] for i in range(175)])) <= set(adata.X.data) | set(
        cells.values[np.isin(cells.input_ids, [SYMBOLS.index(symbol) for symbol in by_array.report.summed])]
    )


def test_duplicates_of_log_values_are_summed_as_counts(tokenizer):
    counts = np.hstack([full_width([{"ACTB": 3, "CD4": 6}], np.float64).toarray(), [[1.0]]])
    logs = np.log1p(counts / 10 * 1e4)
    prepared = tokenizer.prepare(logs, gene_names=[*SYMBOLS, "ACTB"], values="log1p_cp10k", total_counts=np.array([10]))
    row = encode_all(prepared).row(0)
    value = row["values"][row["input_ids"] == SYMBOLS.index("ACTB")]
    np.testing.assert_allclose(value, np.log1p(4 / 10 * 1e4), rtol=1e-6)
    np.testing.assert_allclose(prepared.counts_kept_per_cell, 1)


@pytest.mark.parametrize("is_logged", [True, False], ids=["log1p", "scaled"])
def test_recovered_counts_equal_the_counts(tokenizer, baron, is_logged):
    adata = baron.copy()
    adata.X = lognormed(baron.X)
    if not is_logged:
        adata.X.data = np.expm1(adata.X.data)
    assert all(baron.X[i].data.min() == 1 for i in range(baron.n_obs)), "the method's premise"
    prepared = tokenizer.prepare(adata, values="recover_counts")
    expected = tokenizer.prepare(baron)
    np.testing.assert_array_equal(prepared.total_counts, expected.total_counts)
    np.testing.assert_allclose(encode_all(prepared).values, encode_all(expected).values, atol=1e-6)
    assert prepared.settings["recovered_from_log1p"] is is_logged
    assert 0 < prepared.settings["largest_recovery_residue"] < 0.01
    assert "largest residue" in prepared.describe()


def test_recovery_of_anything_else_is_refused(tokenizer, baron):
    adata = baron.copy()
    adata.X.data = np.sqrt(adata.X.data)
    with pytest.raises(
        ValueError,
        match=r"'recover_counts' failed: .* of cell '.*' taken as one count, gene '.*' is .* counts away from a",
    ):
        tokenizer.prepare(adata, values="recover_counts")


def test_layer(tokenizer):
    adata = named([{"ACTB": 0.5}], counts=[{"ACTB": 3}])
    batch = tokenizer(adata, layer="counts")
    assert tokens_of(batch, 0)[1][-1] == np.float32(np.log10(3))
    with pytest.raises(KeyError, match=r"no layer 'umis'. Its layers: 'counts'"):
        tokenizer(adata, layer="umis")


# --- The original's modes (original-computation.md section 7) ---


def test_normalized_cells_takes_depth_from_the_sum_of_logs(tokenizer, parity):
    lognorm = parity["lognorm"]
    prepared = tokenizer.prepare(lognorm, gene_names=SYMBOLS, original_mode="normalized_cells", depth_fold=1e5)
    sums = lognorm.astype(np.float64).sum(axis=1)
    cells = encode_all(prepared)
    for i in range(4):
        row = cells.row(i)
        np.testing.assert_array_equal(row["values"][:-2], lognorm[i][lognorm[i] > 0])
        np.testing.assert_allclose(row["values"][-2:], [np.log10(sums[i]) + 5, np.log10(sums[i])], rtol=1e-6)
    fixed = tokenizer.prepare(lognorm, gene_names=SYMBOLS, original_mode="normalized_cells", target_depth=10_000)
    np.testing.assert_array_equal(fixed.log10_target_depth, 4)


def bulk(parity, kind: str) -> np.ndarray:
    samples = np.zeros((4, NUM_GENES), dtype=np.float32)
    samples[:, parity[f"bulk_{kind}_genes"]] = parity[f"bulk_{kind}_values"]
    return samples


def test_bulk_raw_scales_to_the_median_of_the_file(tokenizer, parity):
    samples = bulk(parity, "F").astype(np.float64)
    totals = samples.sum(axis=1)
    expected = np.log1p(samples / totals[:, None] * np.median(totals))
    prepared = tokenizer.prepare(samples, gene_names=SYMBOLS, original_mode="bulk_raw")
    cells = encode_all(prepared)
    for i in range(4):
        row = cells.row(i)
        np.testing.assert_allclose(row["values"][:-2], expected[i][expected[i] > 0], rtol=1e-6)
        np.testing.assert_allclose(row["values"][-2:], np.log10(expected[i].sum()), rtol=1e-6)
    assert prepared.settings["bulk_median_total"] == pytest.approx(np.median(totals))
    assert_same_cells(prepared.encode(1, 2), cells.select([1]))


def test_bulk_raw_is_scanpys_normalisation(tokenizer, parity):
    scanpy = pytest.importorskip("scanpy")
    samples = bulk(parity, "F")
    adata = AnnData(samples.copy())
    scanpy.pp.normalize_total(adata)
    scanpy.pp.log1p(adata)
    cells = encode_all(tokenizer.prepare(samples, gene_names=SYMBOLS, original_mode="bulk_raw"))
    for i in range(4):
        np.testing.assert_allclose(cells.row(i)["values"][:-2], adata.X[i][adata.X[i] > 0], rtol=2e-6)


def test_bulk_raw_leaves_empty_samples_out_of_the_median(tokenizer, parity):
    samples = np.vstack([bulk(parity, "F"), np.zeros((3, NUM_GENES), dtype=np.float32)])
    options = {"gene_names": SYMBOLS, "original_mode": "bulk_raw"}
    with_empty = tokenizer.prepare(samples, on_empty_cell="nan", **options)
    without = tokenizer.prepare(samples[:4], **options)
    assert_same_cells(encode_all(with_empty), encode_all(without))


def test_bulk_normalized_takes_the_plain_sum(tokenizer, parity):
    samples = bulk(parity, "T")
    cells = encode_all(tokenizer.prepare(samples, gene_names=SYMBOLS, original_mode="bulk_normalized"))
    for i in range(4):
        np.testing.assert_array_equal(cells.row(i)["values"][:-2], samples[i][samples[i] > 0])
        np.testing.assert_allclose(cells.row(i)["values"][-2:], samples[i].sum(dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"original_mode": "bulk_raw", "target_depth": 10_000},
            "'bulk_raw' sets T = S: leave target_depth out",
        ),
        (
            {"original_mode": "bulk_normalized", "depth_fold": 2},
            "'bulk_normalized' sets T = S: leave depth_fold out",
        ),
        ({"original_mode": "bulk_raw", "values": "expected_counts"}, "leave values out"),
        ({"original_mode": "normalized_cells", "total_counts": [4, 20]}, "leave total_counts out"),
        ({"original_mode": "bulk"}, "original_mode must be one of 'normalized_cells', 'bulk_raw'"),
        ({"values": "logs"}, "values must be one of 'counts', 'expected_counts'"),
        ({"on_empty_cell": "skip"}, "on_empty_cell must be one of 'error', 'nan'"),
        ({"target_depth": 4}, "target_depth=4 is a total count, not a logarithm.*10_000"),
        ({"target_depth": 99.9}, "total count, not a logarithm"),
        ({"target_depth": 10_000, "depth_fold": 2}, "exclude each other"),
        ({"target_depth": -1}, "target_depth must be a positive number, got -1"),
        ({"depth_fold": 0}, "depth_fold must be a positive number, got 0"),
        ({"depth_fold": float("nan")}, "depth_fold must be a positive number"),
        ({"depth_fold": True}, "depth_fold must be a positive number"),
        ({"min_genes": 0.5}, "min_genes must be a whole number"),
        ({"min_genes": -1}, "min_genes must be a whole number"),
        ({"values": "log1p_cp10k"}, "needs total_counts="),
        ({"total_counts": [4, 20]}, "total_counts= goes with values='log1p_cp10k'"),
        ({"layer": "counts"}, "layer='counts' chooses within an AnnData"),
        ({"gene_column": "symbol"}, "gene_column='symbol' chooses within an AnnData"),
        ({"padding": "left"}, "padding must be one of"),
        ({"padding": False}, "return_tensors=None for lists"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_go_together(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(full_width(CELLS), gene_names=SYMBOLS, **options)


def test_target_depth_of_a_hundred_is_a_count(tokenizer):
    assert tokens_of(tokenizer(full_width(CELLS), gene_names=SYMBOLS, target_depth=100), 0)[1][-2] == 2


# --- Bad values: each with the cell, the gene, the value ---


@pytest.mark.parametrize("values", ["counts", "expected_counts", "recover_counts", "log1p_cp10k", "bulk_raw"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (-2, r"holds -2, which is negative. Scaled or centred values"),
        (np.nan, r"holds nan, which is not a number \(NaN\)"),
        (np.inf, r"holds inf, which is infinite"),
    ],
    ids=["negative", "nan", "infinite"],
)
def test_impossible_values(tokenizer, bad, message, values):
    adata = named([*CELLS, {"ACTB": 1, "CD4": bad}])
    options = {"original_mode": values} if values == "bulk_raw" else {"values": values}
    if values == "log1p_cp10k":
        options["total_counts"] = [1000, 1000, 1000]
        adata.X.data = np.minimum(adata.X.data, 9) if np.isfinite(bad) else adata.X.data
    with pytest.raises(ValueError, match=f"Cell 'cell2', gene 'CD4' of X of the AnnData {message}"):
        tokenizer(adata, **options)


def test_impossible_values_of_genes_outside_the_vocabulary(tokenizer):
    matrix = np.hstack([full_width(CELLS).toarray(), [[0.0], [np.nan]]])
    with pytest.raises(ValueError, match="Cell '1', gene 'NOT-A-GENE' of the matrix holds nan"):
        tokenizer(matrix, gene_names=[*SYMBOLS, "NOT-A-GENE"])


def test_non_integers_name_the_layer_that_holds_integers(tokenizer):
    adata = named([{"ACTB": 1.5, "CD4": 1}], umis=[{"ACTB": 3, "CD4": 2}], other=[{"ACTB": 0.1}])
    adata.raw = named([{"ACTB": 3}])
    message = re.escape(
        "Cell 'cell0', gene 'ACTB' of X of the AnnData holds 1.5, but values='counts' takes raw integer"
    )
    with pytest.raises(ValueError, match=message) as error:
        tokenizer(adata)
    assert "Integers are in layer='umis' and in layer='raw' (.raw): pass that" in str(error.value)
    for way in ("'expected_counts'", "'log1p_cp10k'", "'recover_counts'"):
        assert way in str(error.value)
    assert tokenizer(adata, layer="raw")["input_ids"].tolist() == [[SYMBOLS.index("ACTB"), T, S]]


def test_log_values_taken_for_counts(tokenizer, baron):
    adata = AnnData(lognormed(baron.X), obs=baron.obs, var=baron.var)
    with pytest.raises(ValueError, match=r"holds .*, but values='counts' .*values='log1p_cp10k' .*'recover_counts'"):
        tokenizer(adata)


def test_counts_taken_for_log_values(tokenizer):
    with pytest.raises(
        ValueError, match=r"gene 'MT-CO1' .* holds 11, but log1p\(counts per 10,000\) can't exceed 9.21"
    ):
        tokenizer(named(CELLS), values="log1p_cp10k", total_counts=[4, 20])


def test_logs_of_another_scale_taken_for_cp10k(tokenizer, baron):
    adata = AnnData(lognormed(baron.X, target=1.2e4), obs=baron.obs, var=baron.var)
    with pytest.raises(ValueError, match=r"come from 12,000 counts, more than the 10,000 of values='log1p_cp10k'"):
        tokenizer(adata, values="log1p_cp10k", total_counts=np.asarray(baron.X.sum(axis=1)).ravel())


@pytest.mark.parametrize(
    ("total_counts", "message"),
    [
        ([1000.0], r"has shape \(1,\); expected one total a cell, \(2,\)"),
        ([[1000.0], [1000.0]], r"has shape \(2, 1\)"),
        ([1000.0, np.nan], r"holds nan for cell 'cell1' \(1 such cells\)"),
        ([0.0, 1000.0], "holds 0 for cell 'cell0'"),
        ([-5.0, 1000.0], "holds -5 for cell 'cell0'"),
        ([np.inf, 1000.0], "holds inf for cell 'cell0'"),
        (["many", "few"], "must hold one number a cell"),
        (
            [1.9, 2.9],
            r"below the number of expressed genes \(cell 'cell0': 1.9 for 2 genes\). Are they logarithms",
        ),
    ],
    ids=["too few", "2-d", "nan", "zero", "negative", "infinite", "text", "logs"],
)
def test_bad_total_counts(tokenizer, total_counts, message):
    adata = named([{"ACTB": 5.5, "CD4": 5.5}, {"ACTB": 5.5, "GAPDH": 1, "MT-CO1": 2}])
    with pytest.raises(ValueError, match=message):
        tokenizer(adata, values="log1p_cp10k", total_counts=total_counts)


def test_total_counts_of_a_column_that_is_not_there(tokenizer):
    with pytest.raises(KeyError, match=r"no obs column 'n_counts'. Its columns: none"):
        tokenizer(named(CELLS), values="log1p_cp10k", total_counts="n_counts")
    with pytest.raises(KeyError, match="the matrix has no obs columns"):
        tokenizer(full_width(CELLS), gene_names=SYMBOLS, values="log1p_cp10k", total_counts="n_counts")


def test_total_counts_in_another_order(tokenizer):
    totals = pd.Series([1000.0, 2000.0], index=["cell1", "cell0"])
    with pytest.raises(ValueError, match="another order"):
        tokenizer(named(CELLS), values="log1p_cp10k", total_counts=totals)


# --- Cells without counts, cells with few genes ---

SPARSE_CELLS = [{"ACTB": 3, "CD4": 1}, {}, {"GAPDH": 1}, {}, {"ACTB": 5, "GAPDH": 4, "MT-CO1": 11}]


def test_empty_cells_are_an_error_by_name(tokenizer):
    with pytest.raises(ValueError, match=r"2 of 5 cells have no counts .*: cell1, cell3. .*on_empty_cell='nan'"):
        tokenizer(named(SPARSE_CELLS))


def test_counts_outside_the_vocabulary_only_make_a_cell_empty(tokenizer):
    matrix = np.hstack([full_width([*CELLS, {}]).toarray(), [[0.0], [0.0], [7.0]]])
    with pytest.raises(ValueError, match="1 of 3 cells have no counts on the vocabulary's genes: 2"):
        tokenizer(matrix, gene_names=[*SYMBOLS, "NOT-A-GENE"])


def test_empty_cells_left_out_with_one_warning(tokenizer):
    with pytest.warns(UserWarning, match=r"2 of 5 cells are left out: 2 without counts .*\(cell1, cell3\)") as caught:
        batch = tokenizer(named(SPARSE_CELLS), on_empty_cell="nan")
    assert len(caught) == 1
    assert batch["input_ids"].shape[0] == 3
    prepared = tokenizer.prepare(named(SPARSE_CELLS), on_empty_cell="nan")
    assert prepared.is_empty.tolist() == [False, True, False, True, False]
    assert prepared.is_kept.tolist() == [True, False, True, False, True]
    assert encode_all(prepared).cell_index.tolist() == [0, 2, 4]
    assert prepared.encode(1, 2).cell_index.tolist() == []
    assert np.isnan(prepared.log10_source_depth).tolist() == prepared.is_empty.tolist()
    assert np.isnan(prepared.counts_kept_per_cell).tolist() == prepared.is_empty.tolist()
    assert "2 without counts" in prepared.describe()
    assert prepared.settings["num_empty_cells"] == 2


def test_empty_cells_have_no_depth_whatever_their_given_totals(tokenizer):
    adata = named([{"ACTB": 5.5}, {}, {}, {}])
    options = {"values": "log1p_cp10k", "target_depth": 10_000, "on_empty_cell": "nan"}
    prepared = tokenizer.prepare(adata, total_counts=[1000, 0, np.nan, 1000], **options)
    np.testing.assert_array_equal(prepared.log10_source_depth, [3, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(prepared.log10_target_depth, [4, np.nan, np.nan, np.nan])


def test_a_total_of_one_is_a_cell(tokenizer):
    ids, values = tokens_of(tokenizer(named([{"GAPDH": 1}])), 0)
    assert ids.tolist() == [SYMBOLS.index("GAPDH"), T, S]
    np.testing.assert_array_equal(values, np.float32([np.log1p(1e4), 0, 0]))


def test_few_genes_left_out_with_one_warning(tokenizer):
    with pytest.warns(
        UserWarning, match=r"4 of 5 .*2 without counts .*2 with fewer than min_genes=3 .*cell0, cell2"
    ) as caught:
        batch = tokenizer(named(SPARSE_CELLS), min_genes=3, on_empty_cell="nan")
    assert len(caught) == 1
    assert tokens_of(batch, 0)[0].tolist()[-2:] == [T, S]
    assert batch["input_ids"].shape == (1, 5)
    prepared = tokenizer.prepare(named(SPARSE_CELLS), min_genes=3, on_empty_cell="nan")
    assert prepared.is_below_min_genes.tolist() == [True, False, True, False, False]
    assert prepared.settings["num_cells_below_min_genes"] == 2
    assert "fewer than min_genes=3" in repr(prepared)


def test_min_genes_is_the_least_number_that_stays(tokenizer):
    prepared = tokenizer.prepare(named(CELLS), min_genes=2)
    assert prepared.is_kept.all()


def test_min_genes_counts_vocabulary_genes(tokenizer):
    matrix = np.hstack([full_width(CELLS).toarray(), np.ones((2, 1))])
    with pytest.warns(UserWarning, match="1 of 2 cells are left out"):
        tokenizer(matrix, gene_names=[*SYMBOLS, "NOT-A-GENE"], min_genes=3)


def test_no_cell_left(tokenizer):
    with pytest.raises(ValueError, match="No cell of 2 is left to tokenise: 2 with fewer than min_genes=201"):
        tokenizer(named(CELLS), min_genes=201)


def test_only_empty_cells(tokenizer):
    with pytest.raises(ValueError, match="No cell of 2 is left to tokenise: 2 without counts"):
        tokenizer(named([{}, {}]), on_empty_cell="nan")


# --- Inputs that are no cells ---


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (np.zeros((0, NUM_GENES)), {"gene_names": SYMBOLS}, "There are no cells in the matrix"),
        (np.zeros((2, 0)), {"gene_names": []}, "There are no genes in the matrix"),
        (
            np.ones(NUM_GENES),
            {"gene_names": SYMBOLS},
            r"got shape \(19264,\). For one cell, pass counts\[None, :\]",
        ),
        (np.ones((2, 5)), {"gene_names": SYMBOLS}, "gene_names has 19,264 names, the matrix 5 columns"),
        (np.ones((3, 2)), {"gene_names": ["a", "b", "c"]}, "pass matrix.T, cells are rows"),
        (np.ones((2, 5)), {}, "pass gene_names="),
        (
            np.full((2, 5), "x"),
            {"gene_names": list("abcde")},
            "Expected a matrix of real numbers, got dtype <U1",
        ),
        (pd.DataFrame({"ACTB": [1], "type": ["T cell"]}), {}, r"DataFrame of numbers.*\['int64', 'object'\]"),
        (pd.DataFrame({"ACTB": [1]}), {"gene_names": ["CD4"]}, "leave gene_names out"),
        (named(CELLS), {"gene_names": SYMBOLS}, "gene_column="),
    ],
    ids=[
        "no cells",
        "no genes",
        "1-d",
        "names",
        "transposed",
        "no names",
        "text",
        "mixed",
        "frame+names",
        "adata+names",
    ],
)
def test_bad_inputs(tokenizer, data, options, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(data, **options)


def test_cell_names_of_a_matrix_reader():
    reader = MatrixReader(np.ones((2, 3)), ["a", "b", "c"], ["x", "y"])
    assert reader.cell_names.tolist() == ["x", "y"]
    with pytest.raises(ValueError, match="cell_names has 1 names, the matrix 2 rows"):
        MatrixReader(np.ones((2, 3)), ["a", "b", "c"], ["x"])


def test_missing_file(tokenizer):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.h5ad"):
        tokenizer("nowhere.h5ad")


def test_too_few_genes_in_pbmc68k(tokenizer, recwarn):
    scanpy = pytest.importorskip("scanpy")
    adata = scanpy.datasets.pbmc68k_reduced()
    recwarn.clear()
    with pytest.raises(ValueError, match=r"Only \d+ of the vocabulary's 19,264 genes"):
        tokenizer(adata)


def test_mouse_symbols(tokenizer):
    adata = named(CELLS)
    adata.var_names = [name.capitalize() for name in SYMBOLS]
    with pytest.raises(ValueError, match="mouse symbols look like 'Actb'"):
        tokenizer(adata)


def test_names_in_another_column_are_pointed_out(tokenizer):
    adata = named(CELLS)
    adata.var["feature_name"] = list(SYMBOLS)
    adata.var["biotype"] = "protein_coding"
    adata.var_names = [f"feature_{i}x" for i in range(NUM_GENES)]
    with pytest.raises(ValueError, match="gene_column='feature_name' would match 19,264 genes: pass that"):
        tokenizer(adata)
    assert tokenizer(adata, gene_column="feature_name")["input_ids"].shape == (2, 5)
    adata.var_names = [str(i) for i in range(NUM_GENES)]
    with pytest.raises(ValueError, match=r"gene names are numbers.*gene_column='feature_name' would match"):
        tokenizer(adata)
    del adata.var["feature_name"]
    with pytest.raises(ValueError, match="Neither would any of the other name columns match: biotype"):
        tokenizer(adata)


def test_few_genes_warn_that_depth_comes_from_a_subset(tokenizer, shared_data):
    with pytest.warns(UserWarning, match="read depth is computed from"):
        prepared = tokenizer.prepare(shared_data / "kang_ifnb.h5ad")
    prepared.close()


def test_a_refused_file_is_closed(tokenizer, tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "cells.h5ad"
    named([{"ACTB": 1.5}]).write_h5ad(path)
    with pytest.raises(ValueError, match=r"holds 1.5") as error:  # which keeps the reader alive
        tokenizer(path)
    with h5py.File(path, "r+") as file:  # HDF5 locks open files
        assert "X" in file
    del error


def test_encode_of_cells_that_are_not_there(tokenizer):
    with pytest.raises(ValueError, match=r"Cells \[0, 3\) of 2"):
        tokenizer.prepare(named(CELLS)).encode(0, 3)


# --- What is said ---


def test_description_says_how_the_values_were_taken(tokenizer):
    text = tokenizer.prepare(named(CELLS), depth_fold=2).describe()
    for part in (
        "2 cells x 19,264 genes, X of the AnnData",
        "raw integer counts, turned into log1p(counts per 10,000) (values='counts')",
        "median total 12 over the vocabulary's genes; T = log10 of 2 times each cell's own total",
        "2 tokenised",
        "19,264 of 19,264 genes found",
    ):
        assert part in text
    assert "target depth 10,000" in tokenizer.prepare(named(CELLS), target_depth=10_000).describe()
    assert "T = S" in tokenizer.prepare(named(CELLS)).describe()
    assert "pre_normalized F" in tokenizer.prepare(named(CELLS), original_mode="bulk_raw").describe()


def test_settings_are_json_and_tell_total_counts_apart(tokenizer):
    adata = named([{"ACTB": 5.5, "CD4": 5.5}])
    settings = [
        tokenizer.prepare(adata, values="log1p_cp10k", total_counts=np.array(totals), min_genes=np.int64(1)).settings
        for totals in ([1000], [1000], [1001])
    ]
    assert json.loads(json.dumps(settings)) == settings
    assert settings[0] == settings[1] != settings[2]


# --- A Transformers tokenizer ---


def test_vocabulary_and_special_tokens(tokenizer):
    vocab = tokenizer.get_vocab()
    assert len(vocab) == len(tokenizer) == tokenizer.vocab_size == 19_267
    assert [vocab[symbol] for symbol in SYMBOLS] == list(range(NUM_GENES))
    assert (vocab["<T>"], vocab["<S>"], vocab["<pad>"]) == (T, S, PAD)
    assert (tokenizer.target_depth_token_id, tokenizer.source_depth_token_id, tokenizer.pad_token_id) == (
        T,
        S,
        PAD,
    )
    assert sorted(tokenizer.all_special_ids) == [T, S, PAD]
    assert tokenizer.model_input_names == ["input_ids", "values", "attention_mask"]
    assert isinstance(tokenizer, PreTrainedTokenizer)


def test_tokens_and_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["ACTB", "<S>"]) == [SYMBOLS.index("ACTB"), S]
    assert tokenizer.convert_ids_to_tokens([SYMBOLS.index("ACTB"), T]) == ["ACTB", "<T>"]
    assert tokenizer.decode([SYMBOLS.index("ACTB"), T, S], skip_special_tokens=True) == "ACTB"
    with pytest.raises(KeyError, match="'Actb' is no gene symbol"):
        tokenizer.convert_tokens_to_ids("Actb")
    with pytest.raises(IndexError, match="No token has the id 19267"):
        tokenizer.convert_ids_to_tokens(19_267)
    with pytest.raises(TypeError, match="takes cells, not text"):
        tokenizer.tokenize("ACTB")


def assert_same_tokenizer(one, other):
    assert type(one) is type(other)
    assert one.vocabulary == other.vocabulary
    assert one.get_vocab() == other.get_vocab()
    assert one.special_tokens_map == other.special_tokens_map
    for key, value in one(named(CELLS)).items():
        assert torch.equal(value, other(named(CELLS))[key])


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "first")
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [
        "gene_vocabulary.tsv",
        "tokenizer_config.json",
    ]
    loaded = ScFoundationTokenizer.from_pretrained(tmp_path / "first")
    assert_same_tokenizer(tokenizer, loaded)
    loaded.save_pretrained(tmp_path / "second")
    assert_same_tokenizer(tokenizer, ScFoundationTokenizer.from_pretrained(tmp_path / "second"))
    vocabularies = [(tmp_path / name / "gene_vocabulary.tsv").read_bytes() for name in ("first", "second")]
    assert vocabularies[0] == vocabularies[1]
    configs = [json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("first", "second")]
    for key in ("is_local", "local_files_only"):  # Transformers notes where it loaded from
        del configs[1][key]
    assert configs[0] == configs[1]


def test_depth_tokens_of_other_names_are_kept(tmp_path):
    ScFoundationTokenizer(target_depth_token="[T]").save_pretrained(tmp_path)
    loaded = ScFoundationTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 19_267
    assert (loaded.target_depth_token, loaded.convert_ids_to_tokens(T)) == ("[T]", "[T]")


def test_copies_and_worker_processes_get_the_same_tokenizer(tokenizer):
    assert_same_tokenizer(tokenizer, copy.deepcopy(tokenizer))
    assert_same_tokenizer(tokenizer, pickle.loads(pickle.dumps(tokenizer)))


def test_auto_tokenizer_by_class_name(tokenizer, tmp_path):
    # AutoTokenizer finds the class by the name in tokenizer_config.json among those registered.
    from transformers import AutoConfig

    from scfoundation_hf.configuration.configuration_scfoundation import ScFoundationConfig

    AutoConfig.register(ScFoundationConfig.model_type, ScFoundationConfig, exist_ok=True)
    AutoTokenizer.register(ScFoundationConfig, slow_tokenizer_class=ScFoundationTokenizer, exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    assert_same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(tmp_path))


def test_a_vocabulary_of_ones_own_moves_the_special_ids(tmp_path):
    GeneVocabulary(GeneVocabulary.default().genes[:100]).save(tmp_path / "genes.tsv")
    small = ScFoundationTokenizer(tmp_path / "genes.tsv")
    assert (small.target_depth_token_id, small.source_depth_token_id, small.pad_token_id) == (100, 101, 102)
    small.save_pretrained(tmp_path / "saved")
    loaded = ScFoundationTokenizer.from_pretrained(tmp_path / "saved")
    assert len(loaded) == 103
    matrix = np.zeros((2, 100))
    matrix[0, :3] = matrix[1, :1] = 1
    batch = loaded(matrix, gene_names=SYMBOLS[:100])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 100, 101], [0, 100, 101, 102, 102]]


def test_a_folder_without_its_vocabulary_does_not_get_the_published_one(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "gene_vocabulary.tsv").unlink()
    with pytest.raises((ValueError, OSError), match=r"gene_vocabulary\.tsv|Can't load tokenizer"):
        ScFoundationTokenizer.from_pretrained(tmp_path)


def test_left_padding_is_refused(tokenizer):
    with pytest.raises(ValueError, match="padded on the right"):
        ScFoundationTokenizer(padding_side="left")
    with pytest.raises(ValueError, match="padded on the right"):
        tokenizer.pad([{"input_ids": [0, T, S], "values": [1.0, 2.0, 2.0]}], padding_side="left")


@pytest.mark.parametrize("return_tensors", ["np", None])
def test_other_return_types(tokenizer, return_tensors):
    expected = tokenizer(named(CELLS))
    batch = tokenizer(named(CELLS), return_tensors=return_tensors)
    for key, value in expected.items():
        assert isinstance(batch[key], np.ndarray if return_tensors == "np" else list)
        np.testing.assert_array_equal(np.asarray(batch[key]), value.numpy())
    with pytest.raises(ValueError, match="'pt' or 'np', got 'tf'"):
        tokenizer(named(CELLS), return_tensors="tf")


def test_without_padding_cells_are_lists_that_pad_joins(tokenizer):
    ragged = tokenizer(named(CELLS), padding=False, return_tensors=None)
    assert [len(ids) for ids in ragged["input_ids"]] == [4, 5]
    padded, expected = tokenizer.pad(ragged, return_tensors="pt"), tokenizer(named(CELLS))
    assert all(torch.equal(padded[key], expected[key]) for key in expected)


def test_pad_options(tokenizer):
    rows = [{"input_ids": [0, T, S], "values": [1.0, 2.0, 2.0], "label": 1}]
    batch = tokenizer.pad(rows, padding="max_length", max_length=6, return_tensors="np")
    assert batch["input_ids"].tolist() == [[0, T, S, PAD, PAD, PAD]]
    assert batch["labels"].tolist() == [1]
    assert tokenizer.pad(rows, pad_to_multiple_of=8, return_tensors="pt")["values"].shape == (1, 8)
    assert "attention_mask" not in tokenizer.pad(rows, return_attention_mask=False, return_tensors="pt")
    assert "label" in rows[0], "the rows are not changed"
    with pytest.raises(ValueError, match="go together"):
        tokenizer.pad(rows, padding="max_length")


# --- Datasets ---


def test_as_dataset(tokenizer, baron, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr(PreparedCells.chunks, "__kwdefaults__", {"max_entries": 50_000})
    dataset = as_dataset(baron, tokenizer, label="cell_type")
    assert dataset.column_names == ["input_ids", "values", "labels"]
    classes = dataset.features["labels"].names
    assert classes == sorted(set(baron.obs["cell_type"]))
    assert [classes[i] for i in dataset["labels"]] == list(baron.obs["cell_type"])
    cells = encode_all(tokenizer.prepare(baron))
    for i in (0, 100, 174):
        assert dataset[i]["input_ids"] == cells.row(i)["input_ids"].tolist()
        assert dataset[i]["values"] == cells.row(i)["values"].tolist()


def test_as_dataset_leaves_cells_out_with_a_warning(tokenizer):
    pytest.importorskip("datasets")
    adata = named(SPARSE_CELLS)
    adata.obs["kind"] = ["b", None, "a", "b", "a"]
    with pytest.warns(UserWarning, match="3 of 5 cells are left out"):
        dataset = as_dataset(adata, tokenizer, label="kind", min_genes=2, on_empty_cell="nan")
    assert dataset.features["labels"].names == ["a", "b"]
    assert dataset["labels"][:] == [1, 0]
    assert "labels" not in as_dataset(named(CELLS), tokenizer).column_names


def test_as_dataset_refuses_missing_labels(tokenizer):
    pytest.importorskip("datasets")
    adata = named(CELLS)
    adata.obs["kind"] = ["b", None]
    with pytest.raises(ValueError, match="1 cells have no 'kind': cell1"):
        as_dataset(adata, tokenizer, label="kind")
    with pytest.raises(KeyError, match=r"no obs column 'cell_type'. Its columns: 'kind'"):
        as_dataset(adata, tokenizer, label="cell_type")
