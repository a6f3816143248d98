"""Batches straight from cell files: the same cells as everywhere, each once an epoch."""

import sys
from collections import Counter
from itertools import chain

import anndata
import numpy as np
import pytest
from torch.utils.data import DataLoader

from scfoundation_hf.corpus.fingerprints import cell_ids
from scfoundation_hf.tokenization.data_collator import ScFoundationReadDepthAwareCollator
from scfoundation_hf.tokenization.gene_vocabulary import GeneVocabulary
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

pytest.importorskip("scdataset", reason="needs scdataset (extra `loaders`)")
from scfoundation_hf.corpus.cell_files import CellFilesStream


def stream(sources, **options) -> CellFilesStream:
    return CellFilesStream(
        sources, **{"batch_size": 16, "block_size": 8, "fetch_factor": 4, "gene_column": "symbol"} | options
    )


def flat(batches) -> list[str]:
    return list(chain.from_iterable(batches))


def names(batches) -> list[list[str]]:
    return [list(cells.cell_ids) for cells in batches]


@pytest.fixture(scope="module")
def expected(sources) -> Counter:
    found: Counter = Counter()
    for path in sources:
        cells = anndata.read_h5ad(path)
        aligned, _ = GeneVocabulary.default().align(cells.X, cells.var["symbol"])
        found.update(cell_ids(aligned[np.diff(aligned.indptr) > 200]))
    return found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_cell_once(sources, expected, num_workers):
    loader = DataLoader(stream(sources), batch_size=None, num_workers=num_workers)
    batches = names(loader)
    assert Counter(flat(batches)) == expected, "duplicates included"
    assert max(map(len, batches)) <= 16


def test_processes_share(sources, expected):
    shares = [flat(names(stream(sources, process_index=index, num_processes=2))) for index in range(2)]
    assert Counter(shares[0] + shares[1]) == expected
    assert min(map(len, shares)) > 300


def test_epochs(sources):
    cells = stream(sources)
    first, again = names(cells), names(cells)
    assert first == again
    cells.set_epoch(1)
    batches = list(cells)
    assert names(batches) != first
    assert {cells.epochs for cells in batches} == {1}
    assert names(stream(sources, seed=1)) != first


def test_contents_and_collator(sources):
    cells = anndata.read_h5ad(sources[0])
    aligned, _ = GeneVocabulary.default().align(cells.X, cells.var["symbol"])
    row_of = {name: row for row, name in enumerate(cell_ids(aligned))}
    for batch in stream(sources[:1]):
        np.testing.assert_array_equal(
            batch.to_csr(19_264).toarray(), aligned[[row_of[name] for name in batch.cell_ids]].toarray()
        )
    collated = ScFoundationReadDepthAwareCollator(ScFoundationTokenizer())(batch)
    assert len(collated["labels"]) == len(batch)


def test_fractions(sources, tmp_path):
    cells = anndata.read_h5ad(sources[0])
    cells.X = cells.X * np.float32(0.3)
    cells.write_h5ad(tmp_path / "tpm.h5ad")
    with pytest.raises(ValueError, match=r"Cell '.*', gene '.*' of X of .*tpm.h5ad holds 0.3.*non-negative integers"):
        list(stream([tmp_path / "tpm.h5ad"]))
    assert sum(map(len, stream([tmp_path / "tpm.h5ad"], values="expected_counts"))) > 300
    cells.X = -cells.X
    cells.write_h5ad(tmp_path / "tpm.h5ad")
    with pytest.raises(ValueError, match=r"holds -0.*'expected_counts' are non-negative\. "):
        list(stream([tmp_path / "tpm.h5ad"], values="expected_counts"))


def test_what_cannot_be(sources, monkeypatch):
    with pytest.raises(ValueError, match=r"paths must be one or more paths in a list"):
        stream("cells.h5ad")
    with pytest.raises(ValueError, match=r"values must be one of 'counts', 'expected_counts'"):
        stream(sources, values="log1p_cp10k")
    with pytest.raises(ValueError, match=r"Only .* of the vocabulary's 19,264 genes"):
        stream([make_alien(sources[0])])
    monkeypatch.setitem(sys.modules, "scdataset", None)
    with pytest.raises(ImportError, match=r"pip install scdataset"):
        stream(sources)


def make_alien(path):
    alien = path.with_name("alien.h5ad")
    cells = anndata.read_h5ad(path)[:5].copy()
    cells.var["symbol"] = [f"locus{i}" for i in range(cells.n_vars)]
    cells.write_h5ad(alien)
    return alien
