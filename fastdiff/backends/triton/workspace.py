"""What the loss kernels leave for each other: counters, sums of parts, and the upstream gradient that came last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import current_stream, is_capturing


@dataclass
class Workspace:
    """``counters``: 0 between launches; every kernel resets those it uses. ``assumed``: the upstream gradient the next
    forward writes gradients for, 0 for none yet."""

    counters: Tensor  # int32
    partials: Tensor  # float32
    assumed: Tensor  # float32 [1]


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def workspace(device: torch.device, counters: int, partials: int) -> Workspace:
    """That of the current stream, at least as large as asked for.

    Launches of one stream follow each other, so they can share it; no two streams do. A launch that is captured in a
    CUDA graph gets one of its own, zeroed at every replay, as graphs may be replayed side by side.
    """
    if is_capturing(device):
        return _new(device, counters, partials)
    key = (device, current_stream(device))
    found = _workspaces.get(key)
    if found is None or found.counters.numel() < counters or found.partials.numel() < partials:
        # In powers of two, so that slowly growing batches do not allocate each time.
        larger = _new(device, 1 << (counters - 1).bit_length(), 1 << max(10, (partials - 1).bit_length()))
        if found is not None:
            larger.assumed = found.assumed
        found = _workspaces[key] = larger
    return found


def _new(device: torch.device, counters: int, partials: int) -> Workspace:
    zeros = torch.zeros(counters + 1, dtype=torch.int32, device=device)
    return Workspace(
        zeros[1:], torch.empty(partials, dtype=torch.float32, device=device), zeros[:1].view(torch.float32)
    )
