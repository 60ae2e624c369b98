"""Several processes at once, one a GPU, under torchrun: each for itself and all together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from . import BenchError
from .report import case_name

TIMEOUT = timedelta(minutes=10)


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``fastdiff bench`` with ``arguments`` in so many processes. Returns the exit status of torchrun."""
    if processes < 1:
        raise BenchError(f"--nproc must be at least 1; got {processes}.")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    child = subprocess.Popen([*command, "-m", "fastdiff", "bench", *arguments], env=environment)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the terminal has told the processes too: wait for what they still write
            continue


@dataclass
class Group:
    """The processes of this run: rank 0 of 1 where there is only this one."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: Any = None

    @classmethod
    def join(cls) -> Group:
        """The group that torchrun started this process in, if it did."""
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world == 1 or "MASTER_ADDR" not in os.environ:
            return cls()
        group = cls(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", 0)))
        group.store, _, _ = next(torch.distributed.rendezvous("env://", timeout=TIMEOUT))
        torch.distributed.init_process_group(
            "gloo", store=group.store, rank=group.rank, world_size=world, timeout=TIMEOUT
        )
        return group

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: its own GPU."""
        if self.world == 1 or device.type != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise BenchError(f"{self.world} processes, but only {torch.cuda.device_count()} GPUs.")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def wait(self) -> None:
        """Wait for all processes, so that each case is measured while the others measure it too."""
        if self.world > 1:
            torch.distributed.barrier()

    def gather(self, report: dict[str, Any]) -> dict[str, Any] | None:
        """On rank 0: images and bytes a second of every process, case by case."""
        if self.world == 1:
            return None
        own = {case_name(case): case["peers"]["fastdiff"] for case in report["cases"]}
        # Through the store, not as tensors: one that a thread of gloo lets go of while Python ends aborts the process.
        self.store.set(f"report {self.rank}", json.dumps(own))
        if self.rank != 0:
            return None
        everyone = [json.loads(self.store.get(f"report {rank}")) for rank in range(self.world)]

        def of_each(name: str, key: str) -> list[float | None]:
            return [found.get(name, {}).get(key) for found in everyone]

        return {
            "world": self.world,
            "cases": [
                {
                    "case": name,
                    "images_per_second": of_each(name, "images_per_second"),
                    "bytes_per_second": of_each(name, "bytes_per_second"),
                }
                for name in own
            ],
        }

    def leave(self) -> None:
        if self.world > 1:
            torch.distributed.destroy_process_group()
