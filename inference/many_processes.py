"""Several processes that share one file: which share is mine, which device, and who speaks.

torchrun and `accelerate launch` tell a process its number in environment variables; a SLURM job array can set the same
(docs/many-devices.md). The processes meet in the progress folder only, so they need no process group, may start and end
at different times, and a run that was killed may go on with another number of them.
"""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.utils import logging

SECONDS_FOR_THE_FIRST = 10.0  # in which its launcher ends a process that met the same error as the first


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work; alone, if nothing is said."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @classmethod
    def from_environment(cls) -> "Processes":
        """Take `RANK`, `WORLD_SIZE`, `LOCAL_RANK` and `LOCAL_WORLD_SIZE` as torchrun and accelerate set them.

        Raises: ValueError: for numbers that are none, or a rank that is not below the number of processes.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        given = {name: os.environ[name] for name in names if name in os.environ}
        try:
            numbers = {name: int(value) for name, value in given.items()}
        except ValueError as error:
            raise ValueError(f"Of {given}, not all are whole numbers.") from error
        processes = cls(
            rank=numbers["RANK"],
            count=numbers["WORLD_SIZE"],
            local_rank=numbers.get("LOCAL_RANK", 0),
            local_count=numbers.get("LOCAL_WORLD_SIZE", 1),
        )
        if not (0 <= processes.rank < processes.count and 0 <= processes.local_rank < processes.local_count):
            raise ValueError(
                f"{given} does not number processes: RANK counts from 0 to WORLD_SIZE - 1, LOCAL_RANK from 0 to "
                "LOCAL_WORLD_SIZE - 1. (A job array must begin at 0: --array=0-7.)"
            )
        return processes

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def share_of(self, device: torch.device) -> torch.device:
        """This process's own GPU, by its number on the machine; on CPUs its share of the cores.

        Raises: ValueError: if the machine has fewer GPUs than processes.
        """
        if self.local_count > 1 and device.type == "cpu":
            num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, num_cores // self.local_count))  # torchrun leaves each process one
        if self.local_count == 1 or device.type != "cuda" or device.index is not None:
            return device
        num_gpus = torch.cuda.device_count()
        if self.local_rank >= num_gpus:
            raise ValueError(
                f"{self.local_count} processes were launched on a machine with {num_gpus} GPUs; each takes its own. "
                f"Launch {num_gpus}."
            )
        return torch.device("cuda", self.local_rank)

    @contextmanager
    def speaking_once(self) -> Iterator[None]:
        """Warnings come from the first process only, and so do errors that every process meets."""
        if self.is_first:
            yield
            return
        logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            except Exception:
                time.sleep(SECONDS_FOR_THE_FIRST)
                raise


ALONE = Processes()
