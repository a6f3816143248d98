"""Seconds, peak memory, and what the machine can do at most, on CPU and GPU."""

import contextlib
import ctypes
import gc
import multiprocessing
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from scfoundation_hf.corpus.worker_processes import end_with_parent

MIB = 2**20
Result = TypeVar("Result")
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
PRODUCTS_PER_CALL = 5
MEMORY_KEPT_FREE = 2**30  # for everything else on the machine


class OutOfMemoryError(RuntimeError):
    """The computation wants more memory than this machine has."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    with out_of_memory_as_error():
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], *, repeats: int, budget_s: float, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call, all of them once in each round, so that a slow minute of the machine hits all alike.

    The first round warms up and is left out, unless it took so long that not two more fit the budget.

    Args:
        repeats: rounds.
        budget_s: no further round begins that would end behind it.
    Returns: a list a call, empty for those that ran out of memory.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    failed: set[str] = set()

    def run_round() -> float:
        start = time.perf_counter()
        for name, call in calls.items():
            if name not in failed:
                try:
                    seconds[name].append(seconds_of(call, device))
                except OutOfMemoryError:
                    failed.add(name)
                    seconds[name].clear()
        return time.perf_counter() - start

    of_one_round = run_round()
    left = budget_s - of_one_round
    if 2 * of_one_round <= left:
        for taken in seconds.values():
            taken.clear()
        of_one_round = run_round()
        left -= of_one_round
    for _ in range(repeats - 1):
        if of_one_round > left:
            break
        of_one_round = run_round()
        left -= of_one_round
    return seconds


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of at least one value; with fewer than four, the range stands for the quartiles."""
        if len(values) < 4:
            return cls(statistics.median(values), min(values), max(values), len(values))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


# --- Memory --------------------------------------------------------------------------------------------------------


def peak_memory(call: Callable[[], object], *, above: int, device: torch.device) -> int:
    """Bytes held at most during the call, above `above` (from `memory_held` when only the weights were there)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - above
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again at what is held now
        call()
        return _linux_status("VmHWM") - above
    with _sampled_memory() as peak:
        call()
    return max(peak) - above


def memory_held(device: torch.device) -> int:
    """Bytes held now: of the device's allocator, or the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed must not be there for the call to grow into unseen
        return _linux_status("VmRSS")
    return psutil.Process().memory_info().rss


def _linux_status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


@contextlib.contextmanager
def _sampled_memory(interval_s: float = 0.002) -> Iterator[list[int]]:
    """Where the system keeps no peak that can be reset: the resident size, looked at every two milliseconds."""
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def sample() -> None:
        while not done.wait(interval_s):
            seen.append(process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


class FreshProcesses:
    """Runs each function in a process of its own, so that no measurement inherits the memory of another.

    On Linux they are forked from one process that has imported everything and computed nothing, which costs
    milliseconds; elsewhere each imports anew. On a GPU the allocator's own counters are exact, and all runs here.

    Args:
        device: what will be measured.
        preload: modules to import once.
    """

    def __init__(self, device: torch.device, *, preload: list[str]) -> None:
        self.device = device
        methods = multiprocessing.get_all_start_methods()
        self.context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            self.context.set_forkserver_preload(preload)

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The function's result.

        Raises: OutOfMemoryError: if the memory does not suffice, before the machine is in trouble.
        """
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            with out_of_memory_as_error():
                return function(*arguments)
        call = partial(_call_limited, torch.get_num_threads(), function)
        with ProcessPoolExecutor(1, mp_context=self.context, initializer=end_with_parent) as pool:
            return pool.submit(call, *arguments).result()


def _call_limited(num_threads: int, function: Callable[..., Result], *arguments: Any) -> Result:
    torch.set_num_threads(num_threads)
    limit_memory()
    with out_of_memory_as_error():
        return function(*arguments)


def limit_memory() -> None:
    """Let allocations fail, rather than the machine swap or kill, once they exceed what is free now."""
    if sys.platform == "linux":
        free = max(psutil.virtual_memory().available - MEMORY_KEPT_FREE, 0)
        limit = psutil.Process().memory_info().vms + free
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


@contextlib.contextmanager
def out_of_memory_as_error() -> Iterator[None]:
    """Every allocator's way of saying it, as `OutOfMemoryError`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(str(error)) from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise OutOfMemoryError(str(error).splitlines()[0]) from None


# --- The machine ---------------------------------------------------------------------------------------------------


class MatrixProduct:
    """Large square matrix products, to be called: what the machine can do at most.

    Attributes:
        flops: floating-point operations of one call.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        size = MATRIX_SIZE.get(device.type, MATRIX_SIZE["cpu"])
        self.left, self.right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        self.product = torch.empty_like(self.left)
        self.flops = PRODUCTS_PER_CALL * 2 * size**3

    def __call__(self) -> None:
        """Multiply."""
        for _ in range(PRODUCTS_PER_CALL):
            torch.mm(self.left, self.right, out=self.product)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of large matrix products, median of three calls after a first."""
    product = MatrixProduct(device, dtype)
    taken = time_in_turns({"": product}, repeats=3, budget_s=60.0, device=device)[""]
    return product.flops / statistics.median(taken)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know to compare: processor, memory, versions."""
    description: dict[str, Any] = {
        "processor": processor_name(),
        "processor_features": processor_features(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "scfoundation-hf") if _is_installed(name)},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return description


def processor_name() -> str:
    """The processor's name as its maker writes it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", maxsplit=1)[1].strip()
    return platform.processor() or platform.machine()


def processor_features() -> list[str]:
    """The vector and matrix instructions that decide about speed, as Linux names them."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.is_file() else set()
    return [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if flag in flags]


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except ModuleNotFoundError:
        return False
    return True
