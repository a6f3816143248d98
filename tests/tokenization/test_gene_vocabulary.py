"""The published vocabulary and the alignment of counts to it, on real files and on small made-up ones."""

import hashlib
import importlib.util
import json
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scfoundation_hf.tokenization import gene_vocabulary
from scfoundation_hf.tokenization.gene_vocabulary import AlignmentReport, Gene, GeneVocabulary

PUBLISHED_SHA256 = "6037e1bc9b3b48a5112ffdc29261383f747a3c3f8b568a8899b0c69d13565df8"

REAL_FILES = [
    # file, column of var with the names, id type, vocabulary genes found, share of counts kept
    ("baron_pancreas", None, "symbol", 12_381, 0.952),
    ("hao_pbmc", None, "symbol", 19_021, 0.929),
    ("zheng_facs_pbmc", None, "ensembl", 13_429, 0.961),
    ("zheng_facs_pbmc", "symbol", "symbol", 13_524, 0.964),
    ("single_cells_5batches", None, "ensembl", 14_972, 0.849),
    ("corpus/pbmc3k_10x", None, "symbol", 18_752, 0.962),
    ("corpus/pbmc_6samples", None, "symbol", 19_149, 0.928),
    ("corpus/pbmc1k_citeseq_10x", "gene_ids", "ensembl", 19_119, 0.946),
    ("corpus/bone_marrow_aml027_pre", None, "symbol", 11_456, 0.986),
    ("corpus/kidney_immune", None, "symbol", 15_283, 0.894),
    ("corpus/lung_nsclc_immune_scgate", None, "symbol", 15_713, 0.934),
    ("corpus/breast_tumor_copykat", None, "symbol", 18_895, 0.954),
    ("corpus/ipsc_cardiac_day2_scgps", "gene_ids", "ensembl", 14_080, 0.966),
]


@pytest.fixture(scope="module")
def published() -> GeneVocabulary:
    return GeneVocabulary.default()


@pytest.fixture
def small() -> GeneVocabulary:
    """Five genes in no alphabetical order, with every kind of other name."""
    return GeneVocabulary(
        [
            Gene("TP53", "ENSG00000141510", alias_symbols=("p53", "LFS1")),
            Gene("ACTB", "ENSG00000075624", approved_symbol="ACTB"),
            Gene("KMT2A", "ENSG00000118058", previous_symbols=("MLL",)),
            Gene("CD99", "ENSG00000002586", other_ensembl_ids=("ENSG00000292348",)),
            Gene("ARNTL", "ENSG00000133794", approved_symbol="BMAL1"),
        ]
    )


def align_loosely(vocabulary, counts, names, **options):
    """Without the warning about few genes, which small examples always cause."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*subset of genes", category=UserWarning)
        return vocabulary.align(counts, names, **options)


def names_of(adata: anndata.AnnData, column: str | None) -> pd.Index | pd.Series:
    return adata.var_names if column is None else adata.var[column]


# The published list


def test_published_symbols_are_the_published_list_in_its_order(published):
    assert len(published) == len(published.symbols) == len(published.ensembl_ids) == 19_264
    assert hashlib.sha256("\n".join(published.symbols).encode()).hexdigest() == PUBLISHED_SHA256
    assert list(published.symbols) != sorted(published.symbols)
    assert published.symbols[0] == "A1BG"
    assert published.index("A1BG") == 0
    assert published.index("TP53") == published.symbols.index("TP53")
    assert "TP53" in published
    assert "MLL" not in published


def test_published_names_lead_to_one_gene_each(published):
    known_ids = [identifier for identifier in published.ensembl_ids if identifier]
    assert len(known_ids) == len(set(known_ids)) == 19_209
    assert all(gene_vocabulary.ENSEMBL_ID.fullmatch(identifier)[1] == identifier for identifier in known_ids)
    others = [
        name
        for gene in published.genes
        for name in {gene.approved_symbol, *gene.previous_symbols, *gene.alias_symbols} - {gene.symbol, None}
    ]
    assert len(others) == len(set(others))
    assert not set(others) & set(published.symbols)
    assert not [name for name in others if name.isdigit() or name.startswith("ENSG0")]


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("MLL", "KMT2A"),
        ("FAM46C", "TENT5C"),
        ("IL8", "CXCL8"),
        ("CD20", "MS4A1"),
        ("p53", "TP53"),
        ("BMAL1", "ARNTL"),
        ("ENSG00000133794", "ARNTL"),
        ("ENSG00000112096", "SOD2"),
        ("ENSG00000291237", "SOD2"),
        ("ENSG00000069712", "KIAA1107"),
        ("ENSG00000189195", "BTBD8"),
    ],
)
def test_published_other_names(published, name, symbol):
    mapping = published.map_genes([name])
    assert mapping.column_to_gene.tolist() == [published.index(symbol)]


@pytest.mark.parametrize("name", ["TAZ", "SARS", "SEPT2", "225", "NOT-A-GENE"])
def test_published_list_resolves_no_ambiguous_name(published, name):
    # TAZ: TAFAZZIN before, and an alias of WWTR1. SARS: SARS1 before, and an alias of SARS2.
    mapping = published.map_genes([name, "TP53"])
    assert mapping.column_to_gene.tolist() == [-1, published.index("TP53")]
    assert mapping.dropped == [name]


def test_default_is_cached_and_written_as_it_is_shipped(published, tmp_path):
    assert GeneVocabulary.default() is published
    shipped = Path(gene_vocabulary.__file__).parent / "vocabulary" / "gene_vocabulary.tsv"
    published.save(tmp_path / "copy.tsv")
    assert (tmp_path / "copy.tsv").read_bytes() == shipped.read_bytes()


def test_code_without_its_data_says_where_the_vocabulary_is(tmp_path):
    copy = tmp_path / "gene_vocabulary.py"  # as transformers lays out code from the Hub
    copy.write_bytes(Path(gene_vocabulary.__file__).read_bytes())
    spec = importlib.util.spec_from_file_location("gene_vocabulary_from_the_hub", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(FileNotFoundError, match="from_file"):
        module.GeneVocabulary.default()


# Files


def test_file_round_trip(small, tmp_path):
    small.save(tmp_path / "genes.tsv")
    again = GeneVocabulary.from_file(tmp_path / "genes.tsv")
    assert again == small
    assert hash(again) == hash(small)
    assert again.genes == small.genes
    assert again != GeneVocabulary(reversed(small.genes))
    again.save(str(tmp_path / "again.tsv"))
    assert (tmp_path / "again.tsv").read_bytes() == (tmp_path / "genes.tsv").read_bytes()


def write(path: Path, *rows: str, header: str = "\t".join(gene_vocabulary.COLUMNS)) -> Path:
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param([], "no gene follows", id="no genes"),
        pytest.param(["A\t\t\t\t\t", "B\t\t\t"], "line 3: 4 cells where the header has 6", id="short line"),
        pytest.param(["\t\t\t\t\t"], "line 2: the symbol is empty", id="empty symbol"),
        pytest.param(["A" + "\t" * 5, "B" + "\t" * 5, "A" + "\t" * 5], r"line 4.*symbol 'A'.*line 2", id="symbol"),
        pytest.param(
            ["A\tENSG00000000001\t\t\t\t", "B\t\tENSG00000000001\t\t\t"],
            "line 3.*Ensembl id.*line 2",
            id="id",
        ),
        pytest.param(["A\t\t\t\tX|Y\t", "B\t\t\t\t\tZ|Y"], r"line 3 \('B'\): name 'Y'.*line 2", id="alias"),
        pytest.param(
            ["A\t\t\t\tB\t", "B\t\t\t\t\t"],
            "line 2.*'B' is itself the symbol of.*line 3",
            id="alias is symbol",
        ),
    ],
)
def test_bad_files_name_the_line(tmp_path, rows, message):
    path = write(tmp_path / "genes.tsv", *rows)
    with pytest.raises(ValueError, match=message) as error:
        GeneVocabulary.from_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("header", ["", "symbol\tensembl_id", "gene_name\tindex"])
def test_file_without_the_columns_is_refused(tmp_path, header):
    path = write(tmp_path / "genes.tsv", "A\tB", header=header)
    with pytest.raises(ValueError, match=r"line 1: missing column.*alias_symbols"):
        GeneVocabulary.from_file(path)


def test_no_genes_and_unwritable_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one gene"):
        GeneVocabulary([])
    with pytest.raises(ValueError, match=r"gene 1 .*'A' already belongs to gene 0"):
        GeneVocabulary([Gene("A"), Gene("A")])
    with pytest.raises(ValueError, match="holds a tab"):
        GeneVocabulary([Gene("A", alias_symbols=("B|C",))]).save(tmp_path / "genes.tsv")


def test_index_of_other_names_helps(small):
    assert [small.index(symbol) for symbol in small.symbols] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match="another name of 'KMT2A'"):
        small.index("MLL")
    with pytest.raises(KeyError, match="not among the vocabulary's 5"):
        small.index("GAPDH")


# Names


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("ENSG00000141510", "TP53"),
        ("ENSG00000141510.18", "TP53"),
        ("ENSG00000002586_PAR_Y", "CD99"),
        ("ENSG00000002586.20_PAR_Y", "CD99"),
        ("ENSG00000292348.1", "CD99"),
        ("ENSG0000014151", None),
        ("ENSG00000141510.x", None),
        ("ENSMUSG00000059552", None),
        ("tp53", None),
        ("BMAL1", "ARNTL"),
        ("LFS1", "TP53"),
    ],
)
def test_names_are_resolved_one_by_one(small, name, symbol):
    mapping = small.map_genes([name])
    assert mapping.column_to_gene.tolist() == [-1 if symbol is None else small.index(symbol)]
    assert mapping.dropped == ([name] if symbol is None else [])


def test_id_type_is_found_or_forced(small):
    names = ["TP53", "ENSG00000075624", "MLL"]
    assert small.map_genes(names).column_to_gene.tolist() == [0, 1, 2]
    assert small.map_genes(names).id_type == "mixed"
    assert small.map_genes(names, id_type="symbol").column_to_gene.tolist() == [0, -1, 2]
    assert small.map_genes(names, id_type="symbol").id_type == "symbol"
    assert small.map_genes(names, id_type="ensembl").column_to_gene.tolist() == [-1, 1, -1]
    # What was found counts: a few loci without a symbol do not make a file of symbols a mixed one.
    assert small.map_genes(["TP53", "ENSG00000999999"]).id_type == "symbol"
    assert small.map_genes(["ENSG00000999999"]).id_type == "ensembl"
    with pytest.raises(ValueError, match="id_type is 'entrez'"):
        small.map_genes(names, id_type="entrez")


def test_exact_symbol_wins_and_its_other_names_are_summed(small):
    counts = np.array([[1, 2, 4, 8, 16, 9]])
    names = ["MLL", "KMT2A", "ACTB", "p53", "ACTB", "GAPDH"]
    aligned, report = align_loosely(small, counts, names)
    assert aligned.toarray().tolist() == [[8, 4 + 16, 1 + 2, 0, 0]]
    assert report.renamed == {"MLL": "KMT2A", "p53": "TP53"}
    assert report.summed == {"ACTB": ["ACTB", "ACTB"], "KMT2A": ["MLL", "KMT2A"]}
    assert report.missing == ["CD99", "ARNTL"]
    assert report.dropped == ["GAPDH"]
    assert report.num_matched_genes == 3
    assert report.counts_kept == 31 / 40


def test_names_made_unique_by_anndata_are_columns_of_the_same_gene(small):
    names = pd.Index(["TP53", "TP53", "TP53", "MLL", "MLL", "ENSG00000075624"])
    names = anndata.utils.make_index_unique(names)
    assert "TP53-2" in names
    aligned, report = align_loosely(small, np.array([[1, 2, 4, 8, 16, 32]]), names)
    assert aligned.toarray().tolist() == [[7, 32, 24, 0, 0]]
    assert report.summed == {"TP53": ["TP53", "TP53-1", "TP53-2"], "KMT2A": ["MLL", "MLL-1"]}
    assert report.renamed == {"MLL": "KMT2A", "MLL-1": "KMT2A"}


def test_suffix_alone_makes_no_duplicate():
    vocabulary = GeneVocabulary([Gene("NKX2"), Gene("NKX2-1"), Gene("ACTB")])
    # NKX2-1 is a gene of its own; ACTB-1 has no ACTB beside it; the suffix of GAPDH-1 leads to no gene.
    mapping = vocabulary.map_genes(["NKX2", "NKX2-1", "ACTB-1", "GAPDH", "GAPDH-1"])
    assert mapping.column_to_gene.tolist() == [0, 1, -1, -1, -1]


@pytest.mark.parametrize(
    "as_container",
    [
        list,
        tuple,
        np.array,
        lambda names: np.array(names, dtype=object),
        pd.Index,
        lambda names: pd.Series(names, dtype="category"),
        lambda names: pd.Series(names, index=range(5, 8), dtype="string"),
        lambda names: pd.array(names, dtype="string[pyarrow]"),
        lambda names: pd.Index(names, dtype=pd.ArrowDtype(pyarrow.string())),
        pyarrow.array,
        lambda names: pyarrow.chunked_array([names[:1], names[1:]]),
    ],
    ids=[
        "list",
        "tuple",
        "str_array",
        "object_array",
        "index",
        "category",
        "string",
        "arrow",
        "arrow_index",
        "pyarrow",
        "chunked",
    ],
)
def test_any_container_of_names(small, as_container):
    assert small.map_genes(as_container(["MLL", "nothing", "TP53"])).column_to_gene.tolist() == [2, -1, 0]


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA, 7, b"TP53"], ids=repr)
def test_missing_names_are_refused_by_column(small, missing):
    with pytest.raises(ValueError, match=r"name of column 1 is missing or no text: .*gene_column="):
        small.map_genes(["TP53", missing, "ACTB"])


@pytest.mark.parametrize("names", [["0", "1", "2"], range(3), np.arange(3), pd.RangeIndex(3), ["0.0", "1.0"]], ids=repr)
def test_positions_are_not_names(small, names):
    with pytest.raises(ValueError, match=r"positions are not names.*gene_column="):
        small.map_genes(names)


def test_no_names_and_one_string_are_refused(small):
    with pytest.raises(ValueError, match="No gene names"):
        small.map_genes([])
    with pytest.raises(ValueError, match="single string 'TP53'"):
        small.map_genes("TP53")


# Counts


@pytest.mark.parametrize(
    "layout",
    [
        sparse.csr_matrix,
        sparse.csc_matrix,
        sparse.coo_matrix,
        sparse.csr_array,
        sparse.csc_array,
        sparse.coo_array,
        np.asarray,
        np.asfortranarray,
    ],
    ids=lambda layout: layout.__name__,
)
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_every_layout_and_dtype_gives_the_same(small, layout, dtype):
    dense = np.array([[1, 0, 3, 4], [0, 0, 0, 0], [0, 6, 7, 8]], dtype=dtype)
    counts = layout(dense)
    aligned, report = align_loosely(small, counts, ["ARNTL", "GAPDH", "TP53", "ACTB"])
    assert type(aligned) is sparse.csr_matrix
    assert aligned.dtype == dtype
    assert aligned.indices.dtype == aligned.indptr.dtype == np.int32
    assert aligned.toarray().tolist() == [[3, 4, 0, 0, 1], [0, 0, 0, 0, 0], [7, 8, 0, 0, 0]]
    assert aligned.indices.tolist() == [0, 1, 4, 0, 1]
    unchanged = counts if isinstance(counts, np.ndarray) else counts.toarray()
    assert np.array_equal(unchanged, dense)
    np.testing.assert_array_equal(report.counts_kept_per_cell, [1, np.nan, 15 / 21])


def test_untidy_csr_becomes_canonical(small):
    """Unsorted, doubled and stored-zero entries, 64-bit indices, spare room behind the last entry."""
    counts = sparse.csr_matrix((2, 4), dtype=np.float32)
    counts.data = np.array([1, 2, 4, 0, 5, -5, 99], dtype=np.float32)
    counts.indices = np.array([3, 0, 3, 1, 2, 2, 0], dtype=np.int64)
    counts.indptr = np.array([0, 4, 6], dtype=np.int64)
    aligned, report = align_loosely(small, counts, ["CD99", "ACTB", "KMT2A", "TP53"])
    assert aligned.toarray().tolist() == [[5, 0, 0, 2, 0], [0, 0, 0, 0, 0]]
    assert aligned.nnz == 2
    assert aligned.has_canonical_format
    assert counts.indices.tolist() == [3, 0, 3, 1, 2, 2, 0]
    assert report.counts_kept == 1


def test_zeros_stored_in_the_input_are_left_out(small):
    counts = sparse.csr_matrix((np.array([0, 3, 0, 5]), np.array([0, 1, 0, 1]), np.array([0, 2, 4])), shape=(2, 2))
    aligned, _ = align_loosely(small, counts, ["TP53", "ACTB"])
    assert aligned.data.tolist() == [3, 5]
    assert aligned.indices.tolist() == [1, 1]


def test_result_is_canonical_when_checked_afresh(published):
    rng = np.random.default_rng(0)
    names = [*rng.permutation(published.symbols), "MLL", "IL8"]
    counts = sparse.random(50, len(names), density=0.05, format="csr", rng=rng)
    aligned, _ = published.align(counts, names)
    afresh = sparse.csr_matrix((aligned.data, aligned.indices, aligned.indptr), shape=aligned.shape)
    assert afresh.has_canonical_format
    assert np.all(aligned.data)


def test_sums_that_leave_a_narrow_dtype_are_refused(small):
    counts = np.array([[100, 100]], dtype=np.int8)
    with pytest.raises(ValueError, match=r"sum to 200, more than int8 holds.*int32"):
        align_loosely(small, counts, ["TP53", "p53"])
    aligned, _ = align_loosely(small, np.array([[100, 27]], dtype=np.int8), ["TP53", "p53"])
    assert aligned.toarray().tolist() == [[127, 0, 0, 0, 0]]


def test_blocks_of_rows_do_not_show(published, monkeypatch):
    rng = np.random.default_rng(1)
    names = [*rng.permutation(published.symbols)[:15_000], "MLL", "KMT2A-1", "nothing"]
    counts = sparse.random(40, len(names), density=0.02, format="csr", rng=rng)
    counts = sparse.vstack([counts[:10], sparse.csr_matrix((5, len(names))), counts[10:]], format="csr")
    mapping = published.map_genes(names)
    whole, totals = mapping.apply(counts), mapping.cell_totals(counts)
    monkeypatch.setattr(gene_vocabulary, "ENTRIES_PER_BLOCK", 500)  # one or two rows
    assert len(list(gene_vocabulary._row_blocks(counts.indptr))) > 20
    assert (mapping.apply(counts) != whole).nnz == 0
    for one, other in zip(mapping.cell_totals(counts), totals, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    chunks = [mapping.apply(counts[start : start + 7]) for start in range(0, counts.shape[0], 7)]
    assert (sparse.vstack(chunks) != whole).nnz == 0


def test_chunks_report_what_the_whole_reports(small):
    counts = np.array([[1, 0, 3], [0, 0, 0], [0, 6, 8], [2, 2, 2]], dtype=np.float32)
    names = ["ARNTL", "GAPDH", "TP53"]
    _, whole = align_loosely(small, counts, names)
    mapping = small.map_genes(names)
    totals = [mapping.cell_totals(counts[start : start + 2]) for start in (0, 2)]
    total, kept = (np.concatenate(parts) for parts in zip(*totals, strict=True))
    np.testing.assert_array_equal(kept, np.asarray(mapping.apply(counts).sum(axis=1)).ravel())
    assert mapping.report(total, kept) == whole


def test_totals_do_not_lose_digits_of_float32(small):
    counts = np.array([[2**24, 1]], dtype=np.float32)
    counts_total, counts_kept = small.map_genes(["TP53", "ACTB"]).cell_totals(counts)
    assert counts_total.tolist() == counts_kept.tolist() == [2**24 + 1]


def test_nan_of_a_dropped_column_stays_outside(small):
    counts_total, counts_kept = small.map_genes(["TP53", "GAPDH"]).cell_totals(np.array([[3, np.nan]]))
    assert counts_kept.tolist() == [3]
    assert np.isnan(counts_total).all()


def test_full_width_matrix_in_another_order_is_reordered(published):
    rng = np.random.default_rng(2)
    order = rng.permutation(len(published))
    counts = sparse.random(20, len(published), density=0.1, format="csr", rng=rng)
    aligned, report = published.align(counts[:, order], [published.symbols[gene] for gene in order])
    assert (aligned != counts).nnz == 0
    assert report.missing == report.dropped == []
    assert report.counts_kept == 1


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_order_of_columns_does_not_matter(data):
    vocabulary = GeneVocabulary.default()
    pool = [
        "TP53",
        "p53",
        "LFS1",
        "MLL",
        "KMT2A",
        "ENSG00000141510.18",
        "ACTB",
        "ACTB-1",
        "nothing",
        "BMAL1",
        "GAPDH",
    ]
    names = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=12))
    counts = np.array(
        data.draw(
            st.lists(st.lists(st.integers(0, 50), min_size=len(names), max_size=len(names)), min_size=1, max_size=4)
        )
    )
    order = data.draw(st.permutations(range(len(names))))
    options = {"min_vocabulary_share": 0, "min_counts_kept": 0}
    one, report = align_loosely(vocabulary, counts, names, **options)
    other, permuted_report = align_loosely(
        vocabulary, sparse.csr_matrix(counts[:, order]), [names[column] for column in order], **options
    )
    assert (one != other).nnz == 0
    assert report.counts_kept_summary == permuted_report.counts_kept_summary
    assert report.renamed == permuted_report.renamed
    assert report.missing == permuted_report.missing
    assert sorted(report.dropped) == sorted(permuted_report.dropped)
    assert {key: sorted(columns) for key, columns in report.summed.items()} == {
        key: sorted(columns) for key, columns in permuted_report.summed.items()
    }


# Refusals


@pytest.mark.parametrize(
    ("counts", "names", "message"),
    [
        (np.ones((2, 3)), ["TP53", "ACTB"], "counts has 3 columns, but there are 2 gene names"),
        (np.ones((0, 2)), ["TP53", "ACTB"], "there are no cells"),
        (sparse.csr_matrix((2, 0)), [], "there are no genes"),
        (np.ones(2), ["TP53", "ACTB"], "two dimensions"),
        (np.ones((1, 1), dtype=bool), ["TP53"], "counts are bool"),
        (np.ones((1, 1), dtype=np.float16), ["TP53"], "counts are float16"),
        (np.ones((1, 1), dtype=object), ["TP53"], "counts are object"),
    ],
    ids=["width", "no cells", "no genes", "one dimension", "bool", "half", "object"],
)
def test_counts_that_cannot_be_aligned(small, counts, names, message):
    with pytest.raises(ValueError, match=message):
        small.align(counts, names)


def test_tables_are_not_counts(small):
    with pytest.raises(TypeError, match="counts is a DataFrame"):
        small.align(pd.DataFrame({"TP53": [1]}), ["TP53"])


@pytest.mark.parametrize("option", ["min_vocabulary_share", "min_counts_kept"])
def test_thresholds_are_shares(small, option):
    with pytest.raises(ValueError, match=f"{option} is 5; expected a share"):
        small.align(np.ones((1, 3)), ["TP53", "ACTB", "KMT2A"], **{option: 5})


def test_too_few_genes_says_what_was_found_and_what_to_do(published):
    names = ["TP53", "LINC-X", "LINC-Y"]
    with pytest.raises(ValueError, match=r"Only 1 of the vocabulary's 19,264 genes") as error:
        published.align(np.ones((2, 3)), names)
    for part in (
        "'LINC-X', 'LINC-Y'",
        "'Actb'",
        "ENSMUSG",
        "gene_column=",
        "id_type=",
        "at least 5%",
        "variable genes",
    ):
        assert part in str(error.value)
    assert "look like mouse" not in str(error.value)


@pytest.mark.parametrize(
    "names",
    [["Actb", "Gapdh", "Cd3e", "Trp53"], ["ENSMUSG00000029580", "ENSMUSG00000057666.19"]],
    ids=["symbols", "ids"],
)
def test_mouse_names_are_recognised(published, names):
    with pytest.raises(ValueError, match=r"look like mouse names .*human orthologs.*gene_column="):
        published.align(np.ones((1, len(names))), names)


def test_ids_read_as_symbols_are_recognised(published):
    ids = [identifier for identifier in published.ensembl_ids[:2000] if identifier]
    with pytest.raises(ValueError, match='Most unmatched names are Ensembl ids: pass id_type="auto"'):
        published.align(np.ones((1, len(ids))), ids, id_type="symbol")


def test_too_few_counts_kept_is_over_the_whole_matrix(small):
    names = ["TP53", "ACTB", "KMT2A", "GAPDH"]
    one_bad_cell = np.array([[1, 0, 0, 99], [100, 50, 50, 0]])
    _, report = small.align(one_bad_cell, names)
    assert report.counts_kept == 201 / 300
    assert report.counts_kept_per_cell.tolist() == [0.01, 1]
    with pytest.raises(ValueError, match=r"Only 1.0% of all counts.*at least 50%.*3 of the.*'GAPDH'.*gene_column="):
        small.align(one_bad_cell[:1], names)
    _, allowed = small.align(one_bad_cell[:1], names, min_counts_kept=0.01)
    assert allowed.counts_kept == 0.01


def test_under_half_of_the_vocabulary_is_a_warning(small):
    with pytest.warns(UserWarning, match=r"Only 2 of .*read depth is computed from a subset of genes") as caught:
        small.align(np.ones((1, 2)), ["TP53", "ACTB"])
    assert caught[0].filename == __file__
    small.align(np.ones((1, 3)), ["TP53", "ACTB", "KMT2A"])  # 3 of 5: warnings are errors here


def test_no_counts_have_none_to_lose(small):
    aligned, report = small.align(sparse.csr_matrix((3, 4)), ["TP53", "ACTB", "KMT2A", "GAPDH"])
    assert aligned.shape == (3, 5)
    assert aligned.nnz == 0
    assert np.isnan(report.counts_kept)
    assert np.isnan(report.counts_kept_per_cell).all()
    assert "no counts" in str(report)
    assert "cells without counts: 3" in str(report)
    again = AlignmentReport.from_json(report.to_json())
    assert np.isnan(again.counts_kept)
    assert again.to_json() == report.to_json()


# Reports


def test_report_prints_and_survives_json(small):
    counts = np.array([[1, 2, 4, 8], [0, 0, 0, 0], [5, 0, 0, 5]])
    names = ["MLL", "KMT2A", "TP53", "GAPDH"]
    _, report = align_loosely(small, counts, names, id_type="symbol", min_counts_kept=0.4)
    text = str(report)
    for part in (
        "2 of 5 genes found (40.0%) in 4 columns of gene symbols",
        "48.0% of all counts kept (per cell: min 46.7%, median 48.3%, max 50.0%); cells without counts: 1",
        "renamed 1: MLL -> KMT2A",
        "summed 1: KMT2A = MLL + KMT2A",
        "missing 3: ACTB, CD99, ARNTL",
        "dropped 1: GAPDH",
    ):
        assert part in text
    content = json.loads(report.to_json())
    assert content["counts_kept_summary"] == {
        "num_cells": 3,
        "num_empty_cells": 1,
        "min": 7 / 15,
        "median": (7 / 15 + 0.5) / 2,
        "max": 0.5,
    }
    assert "counts_kept_per_cell" not in content
    again = AlignmentReport.from_json(report.to_json())
    assert again == report
    assert again.counts_kept_per_cell is None
    assert str(again) == text


# Real files


@pytest.mark.parametrize(("file", "column", "id_type", "num_matched", "counts_kept"), REAL_FILES)
def test_real_files(published, shared_data, file, column, id_type, num_matched, counts_kept):
    adata = anndata.read_h5ad(shared_data / f"{file}.h5ad")
    aligned, report = published.align(adata.X, names_of(adata, column))
    assert aligned.shape == (adata.n_obs, 19_264)
    assert aligned.dtype == adata.X.dtype
    assert report.id_type == id_type
    assert report.num_matched_genes == num_matched
    assert report.num_input_genes == adata.n_vars
    assert report.counts_kept == pytest.approx(counts_kept, abs=5e-4)
    assert len(report.missing) == 19_264 - num_matched
    total = np.asarray(adata.X.sum(axis=1, dtype=np.float64)).ravel()
    kept = np.asarray(aligned.sum(axis=1, dtype=np.float64)).ravel()
    np.testing.assert_allclose(report.counts_kept_per_cell, kept / total, rtol=1e-6)
    # One gene looked up by hand, if it has one column under its own symbol.
    if id_type == "symbol":
        column_of = pd.Index(names_of(adata, column).astype(str))
        for symbol in ("MALAT1", "ACTB", "B2M", "RPLP0"):
            if symbol in published and column_of.tolist().count(symbol) == 1 and symbol not in report.summed:
                theirs = adata.X[:, column_of.get_loc(symbol)].toarray()
                assert theirs.any()
                assert np.array_equal(aligned[:, published.index(symbol)].toarray(), theirs)


@pytest.mark.parametrize(
    ("file", "ids", "symbols"),
    [
        ("corpus/pbmc1k_citeseq_10x", "gene_ids", "gene_symbol"),
        ("corpus/ipsc_cardiac_day2_scgps", "gene_ids", None),
        ("single_cells_5batches", None, "symbol"),
    ],
)
def test_ids_and_symbols_of_a_file_agree(published, shared_data, file, ids, symbols):
    adata = anndata.read_h5ad(shared_data / f"{file}.h5ad")
    by_id = published.map_genes(names_of(adata, ids)).column_to_gene
    by_symbol = published.map_genes(names_of(adata, symbols)).column_to_gene
    found_by_both = (by_id >= 0) & (by_symbol >= 0)
    assert found_by_both.sum() > 14_000
    assert np.array_equal(by_id[found_by_both], by_symbol[found_by_both])
    total = np.asarray(adata.X.sum(axis=0, dtype=np.float64)).ravel()
    assert total[(by_id >= 0) != (by_symbol >= 0)].sum() < 0.002 * total.sum()


def test_a_file_of_variable_genes_warns(published, shared_data):
    adata = anndata.read_h5ad(shared_data / "kang_ifnb.h5ad")
    with pytest.warns(UserWarning, match=r"Only 1,250 of the vocabulary's 19,264 genes .*\(6.5%\): read depth"):
        _, report = published.align(adata.X, adata.var["ensembl"])
    assert report.counts_kept == pytest.approx(0.933, abs=5e-4)


def test_a_file_of_a_targeted_panel_is_refused(published, shared_data):
    adata = anndata.read_h5ad(shared_data / "papalexi_thp1.h5ad")
    with pytest.raises(ValueError, match=r"Only 258 of .*299 gene names .*First unmatched: 'CTD-2196E14.4'"):
        published.align(adata.X, adata.var_names)
