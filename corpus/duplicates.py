"""Cells that more than one source holds: found by name over the whole corpus, in bounded memory.

Each source leaves a sorted list of its cells' names. The lists are walked together in 256 stretches by the names' first
byte, so that 50 million cells need some megabytes at a time, and 24 bytes for each duplicate found.
"""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .manifest import DUPLICATE_DTYPE


def find_duplicates(lists: Sequence[Path]) -> list[np.ndarray]:
    """For each source, its rows whose cell an earlier source of `lists` holds too.

    Args:
        lists: one .npy file a source, `DUPLICATE_DTYPE` sorted by `cell_id`, each cell once.
    Returns: one array a source, `DUPLICATE_DTYPE` sorted by shard and row.
    """
    sources = [np.load(path, mmap_mode="r", allow_pickle=False) for path in lists]
    borders = [_stretches(source["cell_id"]) for source in sources]
    found: list[list[np.ndarray]] = [[] for _ in sources]
    for first_byte in range(256):
        parts = [
            source[border[first_byte] : border[first_byte + 1]] for source, border in zip(sources, borders, strict=True)
        ]
        together = np.concatenate([np.empty(0, DUPLICATE_DTYPE), *parts])
        source_of_row = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        order = np.argsort(together["cell_id"], kind="stable")  # equal names stay in the order of the sources
        names = together["cell_id"][order]
        repeats = order[1:][names[1:] == names[:-1]]
        for source in np.unique(source_of_row[repeats]):
            found[source].append(together[repeats[source_of_row[repeats] == source]])
    return [np.sort(np.concatenate([np.empty(0, DUPLICATE_DTYPE), *parts]), order=("shard", "row")) for parts in found]


def _stretches(names: np.ndarray) -> list[int]:
    """`(257,)` where the sorted names of each first byte begin; touches few pages of a mapped file."""
    return [*(bisect_left(names, bytes([first_byte])) for first_byte in range(256)), len(names)]
