"""A part of a corpus small enough to be held in memory."""

import zlib

import numpy as np

from scfoundation_hf.tokenization.data_collator import RawCells

from .streaming import CorpusStream


def sample_cells(stream: CorpusStream, num_cells: int) -> list[RawCells]:
    """About `num_cells` of the cells, an even draw by a hash of their ids, or all if there are fewer."""
    share = num_cells / stream.num_cells
    sample = []
    for cells in stream:
        # Not the low bits: by these, the baselines split the cells again.
        ranks = np.array([zlib.crc32(str(cell_id).encode()) for cell_id in cells.cell_ids]) / 2**32
        chosen = np.flatnonzero(ranks < share)
        if len(chosen):
            sample.append(cells.select(chosen))
    return sample
