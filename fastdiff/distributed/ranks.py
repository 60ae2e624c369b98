"""Which processes hold different samples."""

from __future__ import annotations

from typing import Any

import torch

from ..philox import count_from, whole
from ..showing import brief


def data_parallel(ranks: Any) -> None:
    """Say which processes hold different samples. Calls that are given neither a seed, ``ids``, ``sample_offset`` nor a
    ``part`` count their samples from this process's rank among them times 2^40, so that no two draw the same t and
    noise.

    Without this call those are all processes of ``torch.distributed``'s default group, which is right for DDP and FSDP
    alone. It must be made, once, where processes hold the same samples: with tensor, sequence, context or pipeline
    parallelism.

    Args:
        ranks: a process group or a ``DeviceMesh`` whose ranks hold different samples (of a mesh all of its dimensions
            count: ``mesh["dp"]``, or ``mesh["replicate", "shard"]``); or (rank, how many). None: the default group.

    Raises TypeError or ValueError for anything else, and for a group or mesh that this process is not in.
    """
    if ranks is None:
        count_from(None)
        return
    if isinstance(ranks, tuple) and len(ranks) == 2:
        rank, size = whole("rank", ranks[0]), whole("the number of ranks", ranks[1])
    elif hasattr(ranks, "get_coordinate"):
        rank, size = 0, 1
        for coordinate, length in zip(ranks.get_coordinate() or (-1,), ranks.mesh.shape):
            rank, size = rank * length + coordinate, size * length
    elif isinstance(ranks, int):  # what torch.distributed.new_group gives those that are not in it
        rank, size = -1, 0
    elif hasattr(ranks, "rank") and hasattr(ranks, "size"):
        rank, size = torch.distributed.get_rank(ranks), torch.distributed.get_world_size(ranks)
    else:
        raise TypeError(f"ranks must be a process group, a DeviceMesh, (rank, how many) or None; got {brief(ranks)}.")
    if not 0 <= rank < size or size > 2**23:
        raise ValueError(
            f"the rank must be one of 0, 1, ..., of at most 2^23; got {rank} of {size}. A group or mesh must hold this "
            f"process."
        )
    count_from((rank, size))
