import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scfoundation_hf.tokenization.read_depth import (
    MAX_RECOVERY_RESIDUE,
    Entry,
    are_logged,
    down_sample,
    first_infinite,
    first_nan,
    first_negative,
    first_non_integer,
    log1p_cp10k,
    log10_source_depth,
    log10_target_depth,
    recover_counts,
    row_ranges,
    row_totals,
    with_data,
    without_stored_zeros,
    working_precision,
)

COUNTS = np.array([[0, 3, 0, 1], [0, 0, 0, 0], [2, 0, 5, 3]])


def poisson_counts(num_cells: int = 50, num_genes: int = 400) -> csr_matrix:
    rng = np.random.default_rng(0)
    return csr_matrix(rng.poisson(rng.gamma(0.3, 3.0, size=num_genes), size=(num_cells, num_genes)))


@pytest.mark.parametrize("max_entries", [1, 3, 4, 7, 1000])
def test_row_ranges_cover_all_rows_within_the_limit(max_entries):
    matrix = poisson_counts()
    ranges = list(row_ranges(matrix.indptr, max_entries))
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == matrix.shape[0]
    for start, stop in ranges:
        assert stop - start == 1 or matrix[start:stop].nnz <= max_entries


def test_row_ranges_take_as_many_rows_as_fit():
    assert list(row_ranges(np.array([0, 2, 4, 4, 6, 16, 17]), 4)) == [(0, 3), (3, 4), (4, 5), (5, 6)]


def test_row_ranges_refuse_a_limit_below_one():
    with pytest.raises(ValueError, match="at least 1"):
        list(row_ranges(np.array([0, 1]), 0))


def test_row_totals_are_float64_for_float32_and_count_empty_rows():
    totals = row_totals(csr_matrix(COUNTS.astype(np.float32)))
    assert totals.dtype == np.float64
    assert totals.tolist() == [4, 0, 10]


def test_row_totals_do_not_lose_counts_in_float32():
    matrix = csr_matrix(np.array([[2**24, 1, 1]], dtype=np.float32))
    assert row_totals(matrix)[0] == 2**24 + 2


def test_stored_zeros_go_and_the_given_matrix_stays():
    matrix = csr_matrix((np.array([1.0, 0.0, 2.0]), np.array([0, 1, 2]), np.array([0, 3])), shape=(1, 3))
    assert without_stored_zeros(matrix).nnz == 2
    assert matrix.nnz == 3


@pytest.mark.parametrize(
    ("check", "bad"),
    [(first_nan, np.nan), (first_infinite, np.inf), (first_negative, -2.0), (first_non_integer, 1.5)],
    ids=["nan", "infinite", "negative", "non-integer"],
)
def test_checks_find_the_first_offender_behind_an_empty_row(check, bad):
    matrix = COUNTS.astype(np.float64)
    assert check(csr_matrix(matrix)) is None
    matrix[2, 2] = matrix[2, 3] = bad
    found = check(csr_matrix(matrix))
    assert found[:2] == Entry(2, 2, bad)[:2]
    np.testing.assert_equal(found.value, bad)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (np.bool_, np.float64),
        (np.uint8, np.float64),
        (np.int32, np.float64),
        (np.float16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
    ],
)
def test_working_precision(given, taken):
    # float16 is no scipy sparse type, so it can only come as data.
    matrix = with_data(csr_matrix(COUNTS), np.ones(5, dtype=given)) if given != np.float16 else None
    if matrix is None:
        matrix = csr_matrix(COUNTS)
        matrix.data = matrix.data.astype(np.float16)
    assert working_precision(matrix).dtype == taken


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log1p_cp10k_is_the_dense_formula_in_the_same_precision(dtype):
    counts = COUNTS[[0, 2]].astype(dtype)
    totals = counts.sum(axis=1)
    expected = np.log1p(counts / totals[:, None] * dtype(10_000))
    values = log1p_cp10k(csr_matrix(counts), totals.astype(np.float64))
    assert values.dtype == dtype
    np.testing.assert_array_equal(values.toarray(), expected)


def test_depths():
    totals = np.array([1.0, 0.0, 5000.0])
    np.testing.assert_array_equal(log10_source_depth(totals), [0, np.nan, np.log10(5000)])
    np.testing.assert_array_equal(log10_target_depth(totals, target_depth=10_000), [4, np.nan, 4])
    np.testing.assert_allclose(log10_target_depth(totals, depth_fold=1e5), [5, np.nan, np.log10(5e8)])
    np.testing.assert_array_equal(log10_target_depth(totals), log10_source_depth(totals))


def test_down_sampling_keeps_a_share_of_the_counts_and_never_adds_any():
    counts = poisson_counts().data
    left = down_sample(counts, rate=0.2, generator=np.random.default_rng(1))
    assert left.dtype == np.int64
    assert (left <= counts).all()
    assert left.sum() == pytest.approx(0.2 * counts.sum(), rel=0.1)
    np.testing.assert_array_equal(down_sample(counts, rate=1, generator=np.random.default_rng(1)), counts)
    assert down_sample(counts[:0], rate=0.5, generator=np.random.default_rng(1)).size == 0


def test_down_sampling_that_leaves_nothing_leaves_the_cell_unchanged():
    counts = np.array([2, 1])
    np.testing.assert_array_equal(down_sample(counts, rate=0, generator=np.random.default_rng(1)), counts)


@pytest.mark.parametrize("is_logged", [True, False], ids=["log1p", "scaled"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_counts_are_recovered_and_logs_recognised(is_logged, dtype):
    counts = poisson_counts()
    assert all(counts[i].data.min() == 1 for i in range(counts.shape[0])), "the method's premise"
    scaled = counts.multiply(1e4 / counts.sum(axis=1)).tocsr()
    values = (with_data(scaled, np.log1p(scaled.data)) if is_logged else scaled).astype(dtype)
    assert are_logged(values) is is_logged
    recovered, residues = recover_counts(values, is_logged=is_logged)
    assert (recovered != counts).nnz == 0
    assert residues.max() < 0.01


def test_recovery_shows_values_that_are_no_scaled_counts():
    _, residues = recover_counts(csr_matrix(np.sqrt(poisson_counts().toarray())), is_logged=False)
    assert residues.max() > MAX_RECOVERY_RESIDUE


def test_recovery_takes_raw_counts_as_they_are():
    counts = poisson_counts().astype(np.float64)
    assert are_logged(counts) is False
    assert (recover_counts(counts, is_logged=False)[0] != counts).nnz == 0


def test_recovery_skips_empty_cells():
    recovered, _ = recover_counts(csr_matrix(COUNTS * 0.5), is_logged=False)
    assert recovered[:2].toarray().tolist() == [[0, 3, 0, 1], [0, 0, 0, 0]]


def test_recovery_of_infinite_logs_is_refused_not_returned():
    _, residues = recover_counts(csr_matrix(np.array([[1.0, 5000.0]])), is_logged=True)
    assert residues.max() == np.inf


def test_pbmc68k_counts_are_recovered(recwarn):
    scanpy = pytest.importorskip("scanpy")
    adata = scanpy.datasets.pbmc68k_reduced()  # an old file: reading it warns of that
    recwarn.clear()
    values = csr_matrix(adata.raw.X)
    # What the file's authors divided by is in obs, so the true counts are known.
    true = np.rint(np.expm1(values.toarray()) * adata.obs["n_counts"].to_numpy()[:, None] / 1e4)
    assert are_logged(values)
    recovered, residues = recover_counts(values, is_logged=True)
    has_one = np.array([row[row > 0].min() == 1 for row in true])
    assert has_one.all()
    np.testing.assert_array_equal(recovered.toarray(), true)
    # The file keeps three decimals; dividing by the smallest value alone would leave residues up to 0.112.
    assert residues.max() < 0.05
