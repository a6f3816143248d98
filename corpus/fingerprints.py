"""Names of cells made from their counts: equal cells get equal names, whatever file, format or order they came in.

`prepare` writes them as `cell_id`: duplicates across sources share one, the validation split hashes it, and the
collator seeds each cell's random draws with it.
"""

import hashlib
from itertools import pairwise

import numpy as np
from scipy.sparse import csr_matrix

from scfoundation_hf.tokenization.read_depth import without_stored_zeros

DIGEST_BYTES = 16


def cell_ids(counts: csr_matrix) -> list[str]:
    """One name a cell, 32 hexadecimal digits, from its expressed genes and their counts alone.

    BLAKE2b (16 bytes) of the gene ids as little-endian int32, followed by the counts: as int64 where all counts of the
    cell are whole numbers, else as float64 of their float32 roundings, the precision in which shards keep them. The
    matrix's dtype, stored zeros and the order in which entries are stored do not matter.

    Args:
        counts: `(cells, genes)`, aligned to the vocabulary (`GeneVocabulary.align`).
    """
    return [digest.hex() for digest in cell_digests(counts)]


def cell_digests(counts: csr_matrix) -> list[bytes]:
    """The same names as 16 raw bytes each."""
    counts = without_stored_zeros(counts)
    if not counts.has_canonical_format:
        counts = counts.copy()
        counts.sum_duplicates()
    genes = counts.indices.astype("<i4")
    whole = counts.data.astype("<i8")
    is_fraction = whole != counts.data
    has_fraction = np.zeros(counts.shape[0], dtype=bool)
    has_fraction[np.searchsorted(counts.indptr, np.flatnonzero(is_fraction), side="right") - 1] = True
    fractional = counts.data.astype("<f4").astype("<f8") if has_fraction.any() else whole
    offsets = counts.indptr.tolist()
    digests = []
    for cell, (start, stop) in enumerate(pairwise(offsets)):
        digest = hashlib.blake2b(genes[start:stop].data, digest_size=DIGEST_BYTES)
        digest.update((fractional if has_fraction[cell] else whole)[start:stop].data)
        digests.append(digest.digest())
    return digests
