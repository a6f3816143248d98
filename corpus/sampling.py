"""A part of a corpus small enough to be held in memory."""

import zlib
from os import PathLike

import numpy as np

from scfoundation_hf.tokenization.data_collator import RawCells

from .streaming import CorpusStream

STREAM_BATCH = 256  # cells read at once; which are drawn does not depend on it
READ_PER_DRAWN = 16  # so that the cells drawn come from many places of a large corpus


def sample_cells(corpus: str | PathLike[str], num_cells: int) -> list[RawCells]:
    """About `num_cells` of the training cells, an even draw by a hash of their ids, or all if there are fewer.

    Of a split of more than 16 times as many cells, so many are read, in runs of neighbouring rows drawn from all of it:
    beginning on 50 million cells should not mean reading them.
    """
    stream = CorpusStream(corpus, batch_size=STREAM_BATCH)
    num_to_read = min(stream.num_cells, READ_PER_DRAWN * num_cells)
    share = num_cells / num_to_read
    sample, num_read = [], 0
    for cells in stream:
        # Not the low bits: by these, the baselines split the cells again.
        ranks = np.array([zlib.crc32(str(cell_id).encode()) for cell_id in cells.cell_ids]) / 2**32
        chosen = np.flatnonzero(ranks < share)
        if len(chosen):
            sample.append(cells.select(chosen))
        num_read += len(cells)
        if num_read >= num_to_read:
            break
    return sample
