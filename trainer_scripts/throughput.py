"""How fast training runs: cells and tokens a second, the share of the machine's matrix rate (MFU), and memory."""

import sys
import time
from dataclasses import astuple, dataclass

import torch

MATRIX_SIZE = 2048
MEASURING_SECONDS = 0.3


def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of square matrix products on this device, the best of several.

    On a CPU that several processes share, all must measure at the same time to get their shares.
    """
    left, right = (torch.randn(MATRIX_SIZE, MATRIX_SIZE, device=device).to(dtype) for _ in range(2))
    fastest, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < MEASURING_SECONDS or fastest == float("inf"):
        _synchronize(device)
        begin = time.perf_counter()
        left @ right
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - begin)
    return 2 * MATRIX_SIZE**3 / fastest


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Work:
    """What was computed, and in what time."""

    cells: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Work") -> "Work":
        return Work(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def rates(self, *, matrix_rate: float) -> dict[str, float]:
        """`cells_per_second`, `tokens_per_second` and `mfu`, the share of `matrix_rate`."""
        return {
            "cells_per_second": self.cells / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "mfu": self.flops / self.seconds / matrix_rate,
        }


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory that this process held so far, or the GPU of it; `None` where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
