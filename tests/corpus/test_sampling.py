"""A sample is an even share of the cells."""

import numpy as np

from scfoundation_hf.corpus.sampling import sample_cells
from scfoundation_hf.corpus.streaming import CorpusStream


def test_a_sample_is_an_even_share(corpus):
    stream = CorpusStream(corpus, batch_size=16)
    every = {cell for part in sample_cells(stream, 10_000) for cell in part.cell_ids}
    assert len(every) == stream.num_cells
    few = [cell for part in sample_cells(stream, stream.num_cells // 2) for cell in part.cell_ids]
    assert set(few) < every
    assert abs(len(few) - stream.num_cells / 2) < 4 * np.sqrt(stream.num_cells / 4)  # four standard deviations
