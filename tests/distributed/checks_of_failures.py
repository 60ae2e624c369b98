"""What becomes of the others where a rank stalls, or dies. The last checks of all: the processes are of no more use."""

import datetime
import os
import time

import torch
import torch.distributed as dist

import fastdiff
from fastdiff.distributed import Part

OBJECTIVE = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
X0 = torch.ones(1, 2, 4, 4)


def fails_within(seconds, group, rank):
    """The loss of a part raises PyTorch's own error."""
    noised = OBJECTIVE.noise(X0, seed=1, part=Part((4, 2, 4, 4), (rank, 0, 0, 0), group, split=(0,)))
    began = time.monotonic()
    try:
        OBJECTIVE.loss(X0, noised)
    except RuntimeError:
        assert time.monotonic() - began < seconds
    else:
        raise AssertionError("a loss without the last rank")


def check_a_rank_that_stalls(rank):
    """The timeout is that of its process group."""
    group = dist.new_group(range(4), timeout=datetime.timedelta(seconds=1))
    dist.barrier()
    if rank == 3:
        time.sleep(6)
    else:
        fails_within(5, group, rank)


def check_a_rank_that_dies(rank):
    group = dist.new_group(range(4), timeout=datetime.timedelta(seconds=20))
    dist.barrier()
    if rank == 3:
        os._exit(1)
    fails_within(20, group, rank)


CHECKS = {"a_rank_that_stalls": check_a_rank_that_stalls, "a_rank_that_dies": check_a_rank_that_dies}
