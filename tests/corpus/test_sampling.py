"""A sample is an even share of the cells."""

import numpy as np

from scfoundation_hf.corpus.sampling import sample_cells
from scfoundation_hf.corpus.streaming import CorpusStream


def test_a_sample_is_an_even_share(corpus):
    num_cells = CorpusStream(corpus, batch_size=16).num_cells
    every = {cell for part in sample_cells(corpus, 10_000) for cell in part.cell_ids}
    assert len(every) == num_cells
    few = [cell for part in sample_cells(corpus, num_cells // 2) for cell in part.cell_ids]
    assert set(few) < every
    assert abs(len(few) - num_cells / 2) < 4 * np.sqrt(num_cells / 4)  # four standard deviations
