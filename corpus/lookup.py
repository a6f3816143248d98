"""Was this data set in pretraining? The hashes of a model's training cells, which ship with it, and their lookup.

A cell is known by its counts over the vocabulary's genes (`fingerprints.cell_ids`), of which 64 bits are kept. They
tell nothing of a cell's counts but to somebody who has the same cell; guessing a cell of hundreds of counts is
hopeless. A cell that was not in training is found by chance with a probability of cells / 2^64.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from anndata import AnnData
from safetensors import safe_open
from safetensors.numpy import save
from transformers.utils.hub import cached_file

from scfoundation_hf.tokenization.prepared_cells import Values
from scfoundation_hf.tokenization.tokenization_scfoundation import ScFoundationTokenizer

from .fingerprints import cell_ids
from .manifest import SPLITS, CorpusManifest
from .whole_files import write_json, write_whole

MEMBERS_FILE = "training_cells.safetensors"
MANIFEST_FILE = "data_manifest.json"
HASH_BITS = 64


@dataclass(frozen=True)
class TrainingCells:
    """The cells a model was trained on, each as 64 bits of its fingerprint and the source it came from.

    Attributes:
        hashes: `(cells,)` uint64, rising, each once.
        sources: `(cells,)` uint16, positions in `source_names`; of a cell that several sources hold, the first.
        source_names: the inputs of the corpus.
    """

    hashes: np.ndarray
    sources: np.ndarray
    source_names: tuple[str, ...]

    @classmethod
    def from_ids(cls, ids_of_sources: Iterable[tuple[str, Sequence[str]]]) -> "TrainingCells":
        """From pairs of a source's name and the `cell_ids` of its cells; a source may come in several parts."""
        names: dict[str, int] = {}
        hashes, sources = [np.empty(0, np.uint64)], [np.empty(0, np.uint16)]
        for name, ids in ids_of_sources:
            hashes.append(_hashes(ids))
            sources.append(np.full(len(ids), names.setdefault(name, len(names)), dtype=np.uint16))
        unique, first = np.unique(np.concatenate(hashes), return_index=True)
        return cls(unique, np.concatenate(sources)[first], tuple(names))

    @classmethod
    def from_corpus(cls, corpus: str | PathLike[str]) -> "TrainingCells":
        """The training split of a prepared corpus, a local folder or an fsspec address."""
        filesystem, root = fsspec.core.url_to_fs(str(corpus))

        def parts() -> Iterable[tuple[str, Sequence[str]]]:
            for shard in CorpusManifest.read(corpus).shards:
                if shard.split == "train":
                    with filesystem.open(f"{root}/{shard.path}") as file:
                        yield shard.source, pq.read_table(file, columns=["cell_id"])["cell_id"].to_pylist()

        return cls.from_ids(parts())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "TrainingCells":
        """Read what `save` wrote."""
        with safe_open(path, framework="numpy") as file:
            names = json.loads((file.metadata() or {})["source_names"])
            return cls(file.get_tensor("hashes"), file.get_tensor("sources"), tuple(names))

    def save(self, path: str | PathLike[str]) -> Path:
        """Write a safetensors file of 10 bytes a cell; the same cells give the same bytes."""
        target = Path(path)
        metadata = {"source_names": json.dumps(self.source_names)}  # safetensors writes several in any order
        content = save({"hashes": self.hashes, "sources": self.sources}, metadata)
        write_whole(target, lambda file: file.write(content))
        return target

    def __len__(self) -> int:
        """Number of different cells."""
        return len(self.hashes)

    @property
    def false_positive_rate(self) -> float:
        """Probability that a cell that was not in training is found all the same."""
        return len(self) / 2**HASH_BITS

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """`(cells,)` int64: the source that holds each cell, -1 where none does."""
        wanted = _hashes(ids)
        places = np.searchsorted(self.hashes, wanted)
        inside = np.minimum(places, max(len(self) - 1, 0))
        is_found = self.hashes[inside] == wanted if len(self) else np.zeros(len(wanted), dtype=bool)
        return np.where(is_found, self.sources[inside].astype(np.int64) if len(self) else -1, -1)


@dataclass(frozen=True)
class LookupResult:
    """Which cells of a query a model was trained on.

    Attributes:
        cell_names: of the query.
        source_of_cell: `(cells,)` the training source that holds each cell, "" where none does.
        num_training_cells: how many cells the model was trained on.
        false_positive_rate: probability that a cell is found by chance.
    """

    cell_names: np.ndarray
    source_of_cell: np.ndarray
    num_training_cells: int
    false_positive_rate: float

    @property
    def num_found(self) -> int:
        """Cells of the query that were in training."""
        return int((self.source_of_cell != "").sum())

    def __str__(self) -> str:
        """A sentence or two for people."""
        found, num_cells = self.num_found, len(self.cell_names)
        names, counts = np.unique(self.source_of_cell[self.source_of_cell != ""], return_counts=True)
        where = ", ".join(f"{name}: {count:,}" for name, count in zip(names, counts, strict=True))
        return (
            f"{found:,} of {num_cells:,} cells ({found / num_cells:.1%}) are among the {self.num_training_cells:,} "
            f"training cells{f' ({where})' if found else ''}. A cell is found if its counts over the vocabulary's "
            f"genes are the same; by chance with a probability of {self.false_positive_rate:.0e}."
        )


def lookup(
    model: str | PathLike[str],
    data: AnnData | str | PathLike[str],
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    values: Values = "counts",
) -> LookupResult:
    """Find out which cells of a data set a model was trained on.

    Args:
        model: folder or Hub id that holds `training_cells.safetensors`.
        data: an AnnData, or a .h5ad or .zarr path.
        layer, gene_column, values: as for the tokenizer; the cells must be counts again to be compared.
    Raises: FileNotFoundError: if the model ships no hashes; ValueError: for values that are no counts.
    """
    if values == "log1p_cp10k":
        raise ValueError("values='log1p_cp10k' has no counts to compare; pass the counts, or values='recover_counts'.")
    members = TrainingCells.load(_members_file(model))
    names = np.array([*members.source_names, ""], dtype=object)
    prepared = ScFoundationTokenizer.from_pretrained(model).prepare(
        data, layer=layer, gene_column=gene_column, values=values, on_empty_cell="nan"
    )
    with prepared:
        places = [members.find(cell_ids(prepared.counts(*rows))) for rows in prepared.chunks()]
        return LookupResult(
            cell_names=prepared.cell_names,
            source_of_cell=names[np.concatenate(places)],
            num_training_cells=len(members),
            false_positive_rate=members.false_positive_rate,
        )


def record_training_data(corpus: str | PathLike[str], model: str | PathLike[str]) -> None:
    """Put beside a model what it was trained on: hashes of the cells, and sources with their numbers of cells.

    Args:
        corpus: the prepared corpus.
        model: the model's folder, which gets `training_cells.safetensors` and `data_manifest.json`.
    """
    folder = Path(model)
    TrainingCells.from_corpus(corpus).save(folder / MEMBERS_FILE)
    manifest = CorpusManifest.read(corpus)
    names = [shard.source for shard in manifest.shards]
    num_cells = {split: dict.fromkeys(names, 0) for split in SPLITS}
    for shard in manifest.shards:
        num_cells[shard.split][shard.source] += shard.num_rows - shard.num_duplicates
    content = {
        "sources": [
            {"name": name, "num_cells": count, "num_validation_cells": num_cells["validation"][name]}
            for name, count in num_cells["train"].items()
        ],
        "settings": manifest.settings,
        "vocabulary_sha256": manifest.vocabulary_sha256,
        "package_version": manifest.package_version,
    }
    write_json(folder / MANIFEST_FILE, content)


def _hashes(ids: Sequence[str]) -> np.ndarray:
    """The first 64 of each id's 128 bits, `(cells,)` uint64."""
    return np.frombuffer(bytes.fromhex("".join(name[: HASH_BITS // 4] for name in ids)), dtype=">u8").astype(np.uint64)


def _members_file(model: str | PathLike[str]) -> str:
    try:
        path = cached_file(model, MEMBERS_FILE)
    except OSError as error:
        raise FileNotFoundError(
            f"{model} has no {MEMBERS_FILE}: whoever trained it did not ship the hashes of its training cells, so that "
            "nothing can be said about them."
        ) from error
    assert path is not None
    return path
