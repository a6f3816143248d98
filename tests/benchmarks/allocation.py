"""What a fresh process is asked for; found by its own name, as a package in the environment may be called `tests`."""

import torch
from harness.measure import memory_held, peak_memory

CPU = torch.device("cpu")
MIB = 2**20


def allocate(mebibytes: int) -> int:
    """Bytes held at most while so much is, above what was held before."""
    return peak_memory(lambda: torch.ones(mebibytes * MIB // 4), above=memory_held(CPU), device=CPU)
