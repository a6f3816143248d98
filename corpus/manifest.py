"""What a prepared corpus is on disk, and its table of contents; `prepare` writes it, the stream reads it.

CORPUS/
  train/<source key>-00000.parquet, validation/...   the cells
  duplicates/<source key>.npy     rows that repeat a cell of another source, to be passed over
  manifest.json                   written last: a corpus without it is not finished
  sources/<source key>.json       what became of one input, its alignment report included
  sources/<source key>.ids.npy    names of its cells, sorted, to find duplicates with
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, Literal, get_args

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = get_args(Split)

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
DUPLICATES_FOLDER = "duplicates"
# Rows read together, and the unit that is shuffled over the whole corpus: about 1 MB of compressed counts.
ROW_GROUP_ROWS = 512
OWN_COLUMNS = ("cell_id", "source", "split", "gene_ids", "counts")
DUPLICATE_DTYPE = np.dtype([("shard", "<u4"), ("row", "<u4"), ("cell_id", "S16")])


def corpus_schema(obs_columns: Sequence[str]) -> pa.Schema:
    """The one schema of all shards.

    Gene ids fit int16. Counts are float32, because one type must hold both integer counts (exact up to 2**24) and
    TPM. Lists without nulls are read twice as fast as lists that might hold some.
    """

    def list_of(element: pa.DataType) -> pa.DataType:
        return pa.list_(pa.field("element", element, nullable=False))

    types = {
        "cell_id": pa.string(),
        "source": pa.string(),
        "split": pa.string(),
        "gene_ids": list_of(pa.int16()),
        "counts": list_of(pa.float32()),
    }
    own = [pa.field(name, types[name], nullable=False) for name in OWN_COLUMNS]
    return pa.schema([*own, *(pa.field(name, pa.string()) for name in obs_columns)])


@dataclass(frozen=True)
class Shard:
    """One parquet file: rows of one source and one split, in row groups of equal size but for the last.

    Attributes:
        path: below the corpus folder.
        num_rows: rows in the file; `num_duplicates` of them are passed over.
        num_entries: expressed genes of all rows together.
        duplicates: file with the rows to be passed over (`DUPLICATE_DTYPE`; `shard` is this shard's number among
            those of its source), below the corpus folder; None if there are none.
    """

    path: str
    source: str
    split: Split
    number: int
    num_rows: int
    num_entries: int
    num_bytes: int
    num_duplicates: int = 0
    duplicates: str | None = None


@dataclass(frozen=True)
class CorpusManifest:
    """The shards of a finished corpus in their fixed order, and what they were made of.

    Attributes:
        settings: of the whole corpus: obs columns, validation split, least number of genes.
        sources: one entry an input: name, hash, how its values were taken, cells, genes, share of counts kept.
        refused: inputs that were left out, each with the reason.
    """

    shards: tuple[Shard, ...]
    settings: dict[str, Any]
    sources: list[dict[str, Any]]
    refused: list[dict[str, str]]
    vocabulary_sha256: str
    package_version: str
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, folder: str | PathLike[str]) -> "CorpusManifest":
        """The manifest of a corpus: a local folder or an fsspec address such as `hf://datasets/me/corpus`.

        Raises: FileNotFoundError: if there is none; ValueError: for one of another version.
        """
        filesystem, root = fsspec.core.url_to_fs(str(folder))
        try:
            content = json.loads(filesystem.cat_file(f"{root}/{MANIFEST_NAME}"))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} holds no {MANIFEST_NAME}, so no finished corpus: run `scfoundation prepare IN... {folder}` "
                "to its end."
            ) from error
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{folder}/{MANIFEST_NAME} has format_version {content.get('format_version')!r}; this package reads "
                f"{FORMAT_VERSION}. Prepare the corpus again, or use the package version that wrote it."
            )
        content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
        return cls(**{key: content[key] for key in cls.__dataclass_fields__})

    def to_json(self) -> str:
        """What `read` reads, with the totals in front for people."""
        totals = {"num_cells": {split: self.num_cells(split) for split in SPLITS}}
        return json.dumps(totals | asdict(self), indent=1, allow_nan=False) + "\n"

    @property
    def row_group_rows(self) -> int:
        """Rows of every row group but each shard's last."""
        return int(self.settings["row_group_rows"])

    def num_cells(self, split: Split) -> int:
        """Cells of a split, duplicates not counted."""
        return sum(shard.num_rows - shard.num_duplicates for shard in self.shards if shard.split == split)

    def fingerprint(self, split: Split) -> str:
        """Changes with anything that the order of a split's cells depends on."""
        parts = [
            (shard.path, shard.num_rows, shard.num_entries, shard.num_duplicates)
            for shard in self.shards
            if shard.split == split
        ]
        sources = sorted((source["name"], source["input"]["sha256"]) for source in self.sources)
        return hashlib.blake2b(json.dumps([parts, sources]).encode(), digest_size=8).hexdigest()


def read_duplicates(folder: str | PathLike[str], path: str) -> np.ndarray:
    """The rows of a source that are passed over, `DUPLICATE_DTYPE`, sorted by shard and row."""
    filesystem, root = fsspec.core.url_to_fs(str(folder))
    return np.load(io.BytesIO(filesystem.cat_file(f"{root}/{path}")), allow_pickle=False)
