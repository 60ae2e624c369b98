"""What the loss kernels leave for each other: counters, partial sums, and the upstream gradients that came last."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...modes import lasting
from ...tensors import number
from ..devices import is_capturing
from .launch import current_stream

_CELLS = 64  # a stream
_RESERVED = 1024  # a device, for launches that are captured


@dataclass
class Workspace:
    """``counters``: 0 between launches; every kernel resets those it uses."""

    counters: Tensor  # int32
    partials: Tensor  # float32


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def workspace(device: torch.device, counters: int, partials: int) -> Workspace:
    """The workspace of the current stream, at least as large as asked for.

    Launches of one stream follow each other, so they can share it; no two streams do. A launch that is captured in a
    CUDA graph gets one of its own, zeroed at every replay, as graphs may be replayed side by side.
    """
    if is_capturing(device):
        return _new(device, counters, partials)
    key = (device, current_stream(device))
    found = _workspaces.get(key)
    if found is None or found.counters.numel() < counters or found.partials.numel() < partials:
        # In powers of two, so that slowly growing batches do not allocate each time.
        found = _new(device, 1 << (counters - 1).bit_length(), 1 << max(10, (partials - 1).bit_length()))
        _workspaces[key] = found
    return found


def loss_workspace(device: torch.device, rows: int, parts: int, number: int) -> tuple[Tensor, Tensor]:
    """(counters, partial sums) of a launch that gives a loss."""
    space = workspace(device, 1 + rows, 4 * (rows * parts + number) + 2 * rows)
    return space.counters, space.partials


def _new(device: torch.device, counters: int, partials: int) -> Workspace:
    return Workspace(
        torch.zeros(counters, dtype=torch.int32, device=device),
        torch.empty(partials, dtype=torch.float32, device=device),
    )


# ---- the upstream gradients that came last


@dataclass(eq=False)
class Cell:
    """Holds, on the device, the upstream gradient that came last to a loss. The next forward pass of that loss writes
    its gradient for it. The host guesses which loss that is; a wrong guess costs a second pass, because backward
    compares.

    Attributes:
        owner: the stream, or the capture on it, whose launches may use the cell. They follow each other, so all
            programs of a launch find the same value.
    """

    value: Tensor  # float32 [1], 0 for none yet
    owner: tuple


@dataclass
class _Cells:
    """The cells of one stream. The least recently used go to new losses. A loss is told apart by its kind, and by how
    many of its kind are waiting for their backward."""

    fresh: list[Tensor]
    values: dict[tuple, Tensor] = field(default_factory=dict)  # the latest last
    waiting: weakref.WeakValueDictionary[tuple, Cell] = field(default_factory=weakref.WeakValueDictionary)


@dataclass
class _Reserved:
    """The cells of one device for launches that are captured. All are held, because graphs go on using those that were
    taken."""

    cells: list[Tensor]
    taken: int = 0

    def take(self) -> Tensor | None:
        if self.taken == len(self.cells):
            return None
        self.taken += 1
        return self.cells[self.taken - 1]


_cells: dict[tuple[torch.device, int], _Cells] = {}
_reserved: dict[torch.device, _Reserved] = {}
_lock = threading.Lock()  # backward runs in a thread of its own


def cell(device: torch.device, kind: Hashable) -> Cell:
    """The cell for a forward of a loss of this ``kind`` on the current stream, which its backward is to use too. It is
    waiting until nobody holds it.

    A launch that is captured takes one that no other ever gets, of memory that lies outside of the graph, so that what
    came at one replay is there at the next. Where none is left, or nothing ran before the capture, it is one that is
    zeroed at each replay.
    """
    owner = _owner(device)
    with _lock:
        if owner[0]:
            value = _reserved[device].take() if device in _reserved else None
            return Cell(_zeros(device, 1)[0] if value is None else value, owner)
        if device not in _reserved:
            _reserved[device] = _Reserved(_zeros(device, _RESERVED))
        found = _cells.get(owner[1:])
        if found is None:
            found = _cells[owner[1:]] = _Cells(_zeros(device, _CELLS))
        order = 0
        while (key := (kind, order)) in found.waiting:
            order += 1
        value = found.values.pop(key, None)
        if value is None:
            latest = next(reversed(found.values.values()), None)
            value = found.fresh.pop() if found.fresh else found.values.pop(next(iter(found.values)))
            if latest is not None and latest is not value:
                value.copy_(latest)  # most losses of a program are scaled alike
        found.values[key] = value
        taken = found.waiting[key] = Cell(value, owner)
        return taken


def of_this_stream(taken: Cell, device: torch.device) -> Cell:
    """``taken``, or, on another stream or in another kind of launch than it is for, one that nobody reads."""
    owner = _owner(device)
    return taken if taken.owner == owner else Cell(torch.empty(1, dtype=torch.float32, device=device), owner)


# ---- upstream gradients that are given

_numbers: dict[tuple, Tensor] = {}
_MOST_NUMBERS = 256


def single(value: Tensor | float, device: torch.device) -> Tensor:
    """``value`` as float32 on ``device``. A number is kept for the next launches of the stream; it is written anew in a
    capture, whose graph may outlive what is kept."""
    if isinstance(value, Tensor):
        return value.to(torch.float32)
    if is_capturing(device):
        return number(value, torch.float32, device)
    key = device, current_stream(device), value
    found = _numbers.get(key)
    if found is None:
        if len(_numbers) >= _MOST_NUMBERS:
            _numbers.clear()
        with lasting():
            found = _numbers[key] = number(value, torch.float32, device)
    return found


def _owner(device: torch.device) -> tuple:
    return is_capturing(device), device, current_stream(device)


def _zeros(device: torch.device, cells: int) -> list[Tensor]:
    return list(torch.zeros(cells, dtype=torch.float32, device=device).split(1))
