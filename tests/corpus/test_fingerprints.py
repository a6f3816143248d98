"""A cell's name depends on its genes and counts, and on nothing else."""

import hashlib

import anndata
import numpy as np
from scipy.sparse import csr_matrix

from scfoundation_hf.corpus.fingerprints import cell_ids
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary


def aligned(path) -> csr_matrix:
    cells = anndata.read_h5ad(path)[:50]
    return GeneVocabulary.default().align(cells.X, cells.var["symbol"])[0]


def test_definition():
    genes, counts = np.array([3, 17, 19263], dtype="<i4"), np.array([1, 70000, 2])
    matrix = csr_matrix((counts, genes, [0, 3]), shape=(1, 19264))
    whole = hashlib.blake2b(genes.tobytes() + counts.astype("<i8").tobytes(), digest_size=16).hexdigest()
    assert cell_ids(matrix) == [whole]
    fractions = np.array([1.0, 2.5, 0.1])
    matrix = csr_matrix((fractions, genes, [0, 3]), shape=(1, 19264))
    stored = fractions.astype("<f4").astype("<f8")
    assert cell_ids(matrix) == [hashlib.blake2b(genes.tobytes() + stored.tobytes(), digest_size=16).hexdigest()]


def test_storage_does_not_matter(example_cells):
    counts = aligned(example_cells)
    names = cell_ids(counts)
    assert len(set(names)) == len(names) == 50
    for dtype in (np.int32, np.int64, np.float32, np.float64, np.uint16):
        assert cell_ids(counts.astype(dtype)) == names
    order = np.random.default_rng(0).permutation(50)
    assert cell_ids(counts[order]) == [names[i] for i in order]
    reversed_entries = counts.tocoo()
    shuffled = csr_matrix(counts.shape, dtype=counts.dtype)
    shuffled.indptr, shuffled.indices, shuffled.data = counts.indptr, counts.indices.copy(), counts.data.copy()
    for start, stop in zip(counts.indptr, counts.indptr[1:], strict=False):
        shuffled.indices[start:stop] = counts.indices[start:stop][::-1]
        shuffled.data[start:stop] = counts.data[start:stop][::-1]
    assert reversed_entries.nnz == shuffled.nnz
    assert cell_ids(shuffled) == names
    with_zeros = csr_matrix(
        (np.append(counts.data, 0), np.append(counts.indices, 5), [*counts.indptr[:-1], counts.nnz + 1])
    )
    assert cell_ids(with_zeros) == names


def test_what_matters(example_cells):
    counts = aligned(example_cells)[:1]
    changed_count, changed_gene = counts.copy(), counts.copy()
    changed_count.data[7] += 1
    changed_gene.indices[-1] += 1
    assert len({*cell_ids(counts), *cell_ids(changed_count), *cell_ids(changed_gene)}) == 3


def test_one_fractional_cell_leaves_the_others_their_names(example_cells):
    counts = aligned(example_cells).astype(np.float64)
    names = cell_ids(counts)
    counts.data[counts.indptr[3]] += 0.25
    assert [old == new for old, new in zip(names, cell_ids(counts), strict=True)].count(False) == 1
