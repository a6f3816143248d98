"""A part of a corpus small enough to be held in memory."""

import zlib
from os import PathLike

import numpy as np

from scfoundation_hf.tokenization.data_collator import RawCells

from .streaming import CorpusStream

STREAM_BATCH = 256  # cells read at once; which are drawn does not depend on it


def sample_cells(corpus: str | PathLike[str], num_cells: int) -> list[RawCells]:
    """About `num_cells` of the training cells, an even draw by a hash of their ids, or all if there are fewer.

    The whole split is read.
    """
    stream = CorpusStream(corpus, batch_size=STREAM_BATCH)
    share = num_cells / stream.num_cells
    sample = []
    for cells in stream:
        # Not the low bits: by these, the baselines split the cells again.
        ranks = np.array([zlib.crc32(str(cell_id).encode()) for cell_id in cells.cell_ids]) / 2**32
        chosen = np.flatnonzero(ranks < share)
        if len(chosen):
            sample.append(cells.select(chosen))
    return sample
