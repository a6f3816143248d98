import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from transformers import DataCollatorWithPadding

from scfoundation_hf.tokenization.data_collator import (
    EncodedCells,
    RawCells,
    ScFoundationDataCollator,
    ScFoundationPackedDataCollator,
    pack_cells,
    pad_cells,
)
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

PAD = 19266


@pytest.fixture(scope="module")
def tokenizer():
    return ScFoundationTokenizer()


def rows_of(*num_genes: int, labels: bool = False) -> list[dict]:
    rng = np.random.default_rng(1)
    rows = []
    for i, n in enumerate(num_genes):
        ids = [*np.sort(rng.choice(19_264, n, replace=False)).tolist(), 19_264, 19_265]
        row = {"input_ids": ids, "values": rng.uniform(0.1, 5, n + 2).astype(np.float32).tolist()}
        rows.append(row | ({"labels": i % 2} if labels else {}))
    return rows


def test_padded_batch_has_the_contracts_keys_shapes_and_types(tokenizer):
    rows = rows_of(3, 7, 1, labels=True)
    batch = ScFoundationDataCollator(tokenizer)(rows)
    assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
        "input_ids": ((3, 9), torch.int64),
        "values": ((3, 9), torch.float32),
        "attention_mask": ((3, 9), torch.int64),
        "labels": ((3,), torch.int64),
    }
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        assert batch["input_ids"][i].tolist() == row["input_ids"] + [PAD] * (9 - n)
        assert batch["values"][i, :n].tolist() == row["values"]
        assert batch["values"][i, n:].eq(0).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (9 - n)
    assert batch["labels"].tolist() == [0, 1, 0]


def test_packed_batch_has_the_contracts_keys_shapes_and_types():
    rows = rows_of(3, 7, 1, labels=True)
    batch = ScFoundationPackedDataCollator()(rows)
    assert set(batch) == {
        "input_ids",
        "values",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "labels",
    }
    assert batch["input_ids"].shape == batch["values"].shape == (1, 17)
    assert batch["input_ids"].dtype == torch.int64
    assert batch["values"].dtype == torch.float32
    assert batch["input_ids"][0].tolist() == [token for row in rows for token in row["input_ids"]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 5, 14, 17]
    assert batch["cu_seq_lens_q"].dtype == batch["cu_seq_lens_k"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (9, 9)
    assert type(batch["max_length_q"]) is int
    assert batch["labels"].tolist() == [0, 1, 0]


def test_padded_and_packed_hold_the_same_tokens(tokenizer):
    rows = rows_of(4, 1, 9, 2)
    padded, packed = ScFoundationDataCollator(tokenizer)(rows), ScFoundationPackedDataCollator()(rows)
    is_real = padded["attention_mask"].bool()
    for key in ("input_ids", "values"):
        assert torch.equal(padded[key][is_real], packed[key][0])
    assert torch.equal(is_real.sum(dim=1), packed["cu_seq_lens_q"].diff())


@pytest.mark.parametrize(("multiple", "length"), [(1, 9), (8, 16), (9, 9), (64, 64)])
def test_pad_to_multiple_of(tokenizer, multiple, length):
    batch = ScFoundationDataCollator(tokenizer, pad_to_multiple_of=multiple)(rows_of(3, 7))
    assert batch["input_ids"].shape == (2, length)


def test_collators_do_not_change_the_rows(tokenizer):
    rows = rows_of(3, 7, labels=True)
    before = [dict(row) for row in rows]
    ScFoundationDataCollator(tokenizer)(rows)
    ScFoundationPackedDataCollator()(rows)
    assert rows == before


def test_transformers_own_padding_collator_gives_the_same_batch(tokenizer):
    rows = rows_of(3, 7, labels=True)
    ours = ScFoundationDataCollator(tokenizer, pad_to_multiple_of=8)(rows)
    theirs = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)(rows)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


def test_numpy_rows_and_tensor_rows_are_taken_too(tokenizer):
    rows = rows_of(3, 7)
    expected = ScFoundationDataCollator(tokenizer)(rows)
    for convert in (np.asarray, torch.tensor):
        batch = ScFoundationDataCollator(tokenizer)([{k: convert(v) for k, v in row.items()} for row in rows])
        assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_rows_of_a_padded_batch_lose_their_padding(tokenizer):
    rows = rows_of(3, 7)
    padded = ScFoundationDataCollator(tokenizer, return_tensors="np")(rows)
    again = EncodedCells.from_rows([{key: value[i] for key, value in padded.items()} for i in range(2)])
    assert again.lengths.tolist() == [5, 9]
    assert [again.row(i)["input_ids"].tolist() for i in range(2)] == [row["input_ids"] for row in rows]


def test_selected_cells_are_those_cells_in_that_order():
    rows = rows_of(4, 1, 9, 2)
    cells = EncodedCells.from_rows(rows)
    chosen = cells.select([2, 0, 2])
    assert len(chosen) == 3
    assert chosen.cell_index.tolist() == [2, 0, 2]
    for i, j in enumerate([2, 0, 2]):
        np.testing.assert_array_equal(chosen.row(i)["input_ids"], rows[j]["input_ids"])
        np.testing.assert_array_equal(chosen.row(i)["values"], np.float32(rows[j]["values"]))
    assert chosen.offsets.tolist() == [0, 11, 17, 28]
    assert cells.row(-1)["input_ids"].tolist() == rows[3]["input_ids"]
    assert len(cells.select([])) == 0


def test_a_cell_that_is_not_there():
    with pytest.raises(IndexError, match="There are 1 cells; no cell 1"):
        EncodedCells.from_rows(rows_of(2)).row(1)


def test_max_length_never_truncates():
    cells = EncodedCells.from_rows(rows_of(4))
    assert pad_cells(cells, pad_token_id=PAD, max_length=10)["input_ids"].shape == (1, 10)
    with pytest.raises(ValueError, match="6 tokens, more than max_length=5"):
        pad_cells(cells, pad_token_id=PAD, max_length=5)


def test_no_cells():
    with pytest.raises(ValueError, match="at least one cell"):
        EncodedCells.from_rows([])
    nothing = EncodedCells.from_rows(rows_of(4)).select([])
    for make in (lambda: pad_cells(nothing, pad_token_id=PAD), lambda: pack_cells(nothing)):
        with pytest.raises(ValueError, match="at least one cell"):
            make()


def test_a_row_without_values_says_what_a_row_is():
    with pytest.raises(ValueError, match="Row 1 has no 'values', only \\['input_ids'\\]"):
        EncodedCells.from_rows([*rows_of(2), {"input_ids": [1, 2]}])


def test_a_row_with_fewer_values_than_ids():
    with pytest.raises(ValueError, match=r"shape \(3,\) and 'values' \(2,\)"):
        EncodedCells.from_rows([{"input_ids": [5, 19_264, 19_265], "values": [1.0, 2.0]}])


def test_labels_of_some_cells_only(tokenizer):
    rows = rows_of(2, 3, labels=True)
    del rows[1]["labels"]
    with pytest.raises(ValueError, match="Row 1 has no 'labels'"):
        ScFoundationDataCollator(tokenizer)(rows)


def test_labels_that_are_no_numbers(tokenizer):
    rows = [row | {"labels": "B cell"} for row in rows_of(2, 3)]
    with pytest.raises(ValueError, match="one number a cell, got 'B cell'"):
        ScFoundationPackedDataCollator()(rows)


def test_unknown_return_tensors():
    with pytest.raises(ValueError, match="'pt' or 'np', got 'tf'"):
        ScFoundationPackedDataCollator(return_tensors="tf")(rows_of(2))


# --- Cells that are not tokenised yet ---


def raw_rows() -> list[dict]:
    return [
        {"cell_id": "a", "gene_ids": [3, 9], "counts": [1, 2], "source": "blood.h5ad"},
        {"cell_id": "b", "gene_ids": [0], "counts": [4.0], "epoch": 2},
    ]


def test_raw_cells_from_rows():
    cells = RawCells.from_rows(raw_rows())
    assert len(cells) == 2
    assert cells.lengths.tolist() == [2, 1]
    assert cells.cell_ids == ["a", "b"]
    assert cells.epochs.tolist() == [0, 2]
    assert cells.to_csr(10).toarray().tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 0, 2], [4] + [0] * 9]


def test_raw_cells_from_a_matrix():
    matrix = csr_matrix(([2, 1, 0, 4], [9, 3, 5, 0], [0, 3, 4]), shape=(2, 10))  # unsorted, with a stored zero
    cells = RawCells.from_csr(matrix, cell_ids=["a", "b"], epochs=3)
    assert cells.gene_ids.tolist() == [3, 9, 0]
    assert cells.counts.tolist() == [1, 2, 4]
    assert cells.offsets.tolist() == [0, 2, 3]
    assert cells.epochs == 3
    assert (cells.to_csr(10) != matrix).nnz == 0
    assert matrix.indices.tolist() == [9, 3, 5, 0], "the given matrix stays"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"cell_id": "c", "gene_ids": [1]}, r"Row 2 has no 'counts', only \['cell_id', 'gene_ids'\]"),
        ({"gene_ids": [1], "counts": [1]}, "Row 2 has no 'cell_id'"),
        ({"cell_id": "c", "gene_ids": [1, 2], "counts": [1]}, r"shape \(2,\) and 'counts' \(1,\)"),
        ({"cell_id": "c", "gene_ids": [], "counts": []}, r"Row 2: 'gene_ids' has shape \(0,\).*at least one"),
    ],
)
def test_rows_that_are_no_raw_cells(row, message):
    with pytest.raises(ValueError, match=message):
        RawCells.from_rows([*raw_rows(), row])


def test_no_raw_rows():
    with pytest.raises(ValueError, match="at least one cell"):
        RawCells.from_rows([])


@pytest.mark.parametrize(
    ("gene_ids", "counts", "offsets", "message"),
    [
        ([1, 2], [1], [0, 1], "There are 2 gene_ids for 1 counts"),
        ([1, 2], [1, 1], [0, 1], r"offsets must lead from 0 to the 2 counts in 2 numbers for 1 cells"),
        ([1, 2], [1, 1], [0, 1, 2], "got 3 numbers from"),
        ([1.0, 2.0], [1, 1], [0, 2], "gene_ids must be integers and counts real numbers, got float64 and int64"),
        ([1, 2], ["1", "1"], [0, 2], "got int64 and <U1"),
    ],
)
def test_raw_cells_that_do_not_fit(gene_ids, counts, offsets, message):
    with pytest.raises(ValueError, match=message):
        RawCells(["a"], np.array(gene_ids), np.array(counts), np.array(offsets))


@pytest.mark.parametrize(
    ("gene_ids", "counts", "message"),
    [
        ([1, 10], [1, 1], "Cell 'b': gene id 10 is none of the 10 genes"),
        ([-1, 2], [1, 1], "Cell 'b': gene id -1 is none of the 10 genes"),
        ([5, 4], [1, 1], "Cell 'b': gene id 4 is not above the id before it"),
        ([5, 5], [1, 1], "Cell 'b': gene id 5 is not above the id before it"),
        ([4, 5], [1, -2], "Cell 'b': gene id 5 has the count -2"),
        ([4, 5], [0, 1], "Cell 'b': gene id 4 has the count 0"),
        ([4, 5], [np.nan, 1], "Cell 'b': gene id 4 has the count nan"),
        ([4, 5], [1, np.inf], "Cell 'b': gene id 5 has the count inf"),
        ([], [], "Cell 'b' has no counts: leave it out"),
    ],
)
def test_raw_cells_of_wrong_genes_or_counts(gene_ids, counts, message):
    offsets = np.array([0, 1, 1 + len(gene_ids)])
    cells = RawCells(["a", "b"], np.array([7, *gene_ids]), np.array([1, *counts]), offsets)
    with pytest.raises(ValueError, match=message):
        cells.to_csr(10)
