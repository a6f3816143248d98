"""A sample is an even share of the cells."""

import numpy as np

from scfoundation_hf.corpus import sampling
from scfoundation_hf.corpus.sampling import sample_cells
from scfoundation_hf.corpus.streaming import CorpusStream


def test_a_sample_is_an_even_share(corpus):
    num_cells = CorpusStream(corpus, batch_size=16).num_cells
    every = {cell for part in sample_cells(corpus, 10_000) for cell in part.cell_ids}
    assert len(every) == num_cells
    few = [cell for part in sample_cells(corpus, num_cells // 2) for cell in part.cell_ids]
    assert set(few) < every
    assert abs(len(few) - num_cells / 2) < 4 * np.sqrt(num_cells / 4)  # four standard deviations


def test_of_a_large_corpus_only_a_part_is_read(corpus, monkeypatch):
    """Cells are then drawn from the beginning of the shuffled order."""
    monkeypatch.setattr(sampling, "READ_PER_DRAWN", 2)
    monkeypatch.setattr(sampling, "STREAM_BATCH", 8)
    stream = CorpusStream(corpus, batch_size=8)
    num_cells = stream.num_cells // 4
    read = [cell for _, batch in zip(range(-(-2 * num_cells // 8)), stream, strict=False) for cell in batch.cell_ids]
    assert len(read) < stream.num_cells
    drawn = [cell for part in sample_cells(corpus, num_cells) for cell in part.cell_ids]
    assert set(drawn) < set(read)
    assert abs(len(drawn) - len(read) / 2) < 4 * np.sqrt(len(read) / 4)
