"""The processes of a run: one, or those of torchrun, each of which has its share of every batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import DemoError
from .settings import FOR_IMAGES, Settings

Value = TypeVar("Value")
PARALLEL = ("data",)  # what --parallel can divide


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run. The first, of rank 0, writes and prints for all."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, number: int) -> slice:
        """Which of so many samples in a row are this process's. The shares differ by one at most."""
        return slice(number * self.rank // self.count, number * (self.rank + 1) // self.count)

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What ``make()`` returns on the first process, on all. If it raises a DemoError there, that alone says so."""
        if self.count == 1:
            return make()
        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = make()
            except DemoError as error:
                said[1] = str(error)
        torch.distributed.broadcast_object_list(said)
        value, wrong = said
        if wrong is not None:
            raise DemoError(wrong) if self.first else SystemExit(2)
        return value

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of the tensors, of one dtype, by its sum over all processes: the same bits on each."""
        if self.count == 1:
            return
        together = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(together)
        for tensor, total in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


ALONE = Ranks()


def check_parallel(parallel: str | None, processes: int, settings: Settings) -> None:
    """Raises DemoError for a --parallel that is unknown or has one process, and for settings that need one process."""
    if parallel is not None and parallel not in PARALLEL:
        raise DemoError(f"unknown --parallel {parallel!r}: use one of {', '.join(PARALLEL)}.")
    if processes == 1:
        if parallel is not None:
            raise DemoError(
                f"--parallel {parallel} needs several processes: start them with  torchrun --nproc-per-node 2 -m "
                f"fastdiff demo --parallel {parallel} ..."
            )
        return
    if alone := [name for name in FOR_IMAGES if getattr(settings, name)]:
        raise DemoError(f"--{alone[0]} trains in one process; there are {processes}: leave it out, or torchrun.")
    if settings.batch < processes:
        raise DemoError(f"--batch {settings.batch} is less than one sample for each of {processes} processes.")


def started_by_torchrun() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "MASTER_ADDR" in os.environ else 1


def on_this_machine() -> int:
    """How many of them run here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if started_by_torchrun() > 1 else 1


def own_device(device: torch.device) -> torch.device:
    """The device of this process: of several, each has a GPU of its own. Raises DemoError where there are too few."""
    if started_by_torchrun() == 1 or device.type != "cuda":
        return device
    index = int(os.environ["LOCAL_RANK"])
    if index >= torch.cuda.device_count():
        raise DemoError(
            f"{on_this_machine()} processes, but {torch.cuda.device_count()} GPU(s): start one process a GPU, or pass "
            f"--device cpu."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started, which meet and part here: by gloo on CPUs, by NCCL on GPUs."""
    count = started_by_torchrun()
    if count == 1:
        yield Ranks()
        return
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(torch.distributed.get_rank(), count)
    finally:
        torch.distributed.destroy_process_group()
