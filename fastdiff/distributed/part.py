"""Which part of a batch a process has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..philox import Window, whole
from ..showing import brief

_initialized = getattr(torch.distributed, "is_initialized", bool)


@dataclass(frozen=True)
class Part:
    """Which part of a whole batch a process has: a slice of it along any dimensions, of any size, also none.

    ``objective.noise(x0, part=part)`` gives the slice of the noise that the whole would have had, and t of the whole's
    samples. ``objective.loss`` of what it returns is the loss of the whole, the same on every rank of ``group``. Every
    rank has to call them, one whose slice is empty too. The slices are those of a grid: they cover the whole once.

    Args:
        shape: of the whole, [batch, ...].
        start: where the slice of this process begins in each dimension. Its size is that of the data.
        group: the process group whose ranks share the whole. None: the default group.
        averaged: whether the trainer averages gradients over the ranks, as DDP and FSDP do: then the gradient of the
            prediction is multiplied by the number of slices, so that the average is the gradient of one process. With
            False the gradient of the prediction is just the slice of that of one process, for trainers that add up.
        split: the dimensions along which there are several slices. None: it may be any of them, and losses that divide
            by the masks of rows exchange a number for each row of the whole, where few would do.
        rows: the dimensions in which times differ. Only needed for a t with as many dimensions as the data, where a
            slice may have a single frame, say: then its shape does not tell.
        copy, copies: with several ranks in the group that hold the same slice, which of these this is, and how many
            they are: they count once.

    Raises TypeError or ValueError for what is no part.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    group: Any = None
    averaged: bool = True
    split: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    copy: int = 0
    copies: int = 1

    def __post_init__(self):
        for name in ("shape", "start", "split", "rows"):
            value = getattr(self, name)
            if value is not None:
                numbers = tuple(whole(name, number) for number in value)
                object.__setattr__(self, name, numbers if name in ("shape", "start") else tuple(sorted(numbers)))
        if not self.shape or len(self.start) != len(self.shape) or min(self.shape) < 1:
            raise ValueError(
                f"shape must be that of the whole batch, with something in it, and start have as many numbers; got "
                f"shape {self.shape} and start {self.start}."
            )
        if any(not 0 <= s <= n for s, n in zip(self.start, self.shape)):
            raise ValueError(f"start {self.start} lies outside of the whole, {self.shape}.")
        for name in ("split", "rows"):
            dims = getattr(self, name) or ()
            if any(not 0 <= d < len(self.shape) for d in dims):
                raise ValueError(f"{name} must name dimensions of {self.shape}, from 0 on; got {dims}.")
        if isinstance(self.group, int):
            raise ValueError("this process is not in the group, so it has no part of what its ranks share.")
        if not 0 <= self.copy < self.copies:
            raise ValueError(f"copy must be one of 0 to copies - 1; got {self.copy} of {self.copies}.")

    # ---- ways to make one

    @classmethod
    def of(cls, tensor: Any, *, group: Any = None, averaged: bool = True) -> Part:
        """The part that a ``DTensor`` holds here: ``objective.noise(x.to_local(), part=Part.of(x))``.

        Args:
            tensor: the DTensor, sharded or replicated along each dimension of its mesh.
            group, averaged: as in ``placed``.
        """
        if not hasattr(tensor, "device_mesh"):
            raise TypeError(f"tensor must be a DTensor; got {brief(tensor)}. Other ways to say it: Part(shape, start).")
        return cls.placed(tensor.shape, tensor.device_mesh, tensor.placements, group=group, averaged=averaged)

    @classmethod
    def placed(
        cls, shape: Sequence[int], mesh: Any, placements: Sequence[Any], *, group: Any = None, averaged: bool = True
    ) -> Part:
        """The part of a whole of ``shape`` that lies on this process, cut as ``torch.chunk`` cuts.

        Args:
            shape: of the whole, [batch, ...].
            mesh: a ``DeviceMesh``.
            placements: ``Shard(dimension)`` or ``Replicate()`` for each dimension of the mesh. Ranks that differ only
                along replicated ones hold the same data, which counts once.
            group: the ranks that share the whole. None: with one sharded dimension of the mesh, its group; with
                several, the default group, if the mesh holds all processes.
            averaged: as in ``Part``.

        Raises ValueError for other placements, for a process outside of the mesh, and where a group has to be given.
        """
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError("this process is not in the mesh.")
        if len(placements) != mesh.ndim:
            raise ValueError(f"{len(placements)} placements for a mesh of {mesh.ndim} dimensions: one each is needed.")
        sizes, start = list(shape), [0] * len(shape)
        sharded, copy, copies = [], 0, 1
        for number, placement in enumerate(placements):
            ranks, here = mesh.size(number), coordinate[number]
            if placement.is_replicate():
                copy, copies = copy * ranks + here, copies * ranks
                continue
            if type(placement).__name__ != "Shard":
                raise ValueError(
                    f"placements must be Shard or Replicate; got {placement}: redistribute the tensor first."
                )
            dim = placement.dim % len(sizes)
            each = -(-sizes[dim] // ranks)
            begin = min(here * each, sizes[dim])
            start[dim] += begin
            sizes[dim] = min(each, sizes[dim] - begin)
            sharded.append((number, dim))
        split = tuple(sorted({dim for _, dim in sharded}))
        if group is None and len(sharded) == 1:
            return cls(tuple(shape), tuple(start), mesh.get_group(sharded[0][0]), averaged, split)
        if group is None and mesh.size() != _world():
            raise ValueError(
                f"the whole lies on {len(sharded)} dimensions of a mesh that holds {mesh.size()} of {_world()} "
                "processes: pass the process group of all ranks that share it as group=."
            )
        return cls(tuple(shape), tuple(start), group, averaged, split, None, copy, copies)

    @classmethod
    def batches(
        cls, x0: Tensor, sizes: Sequence[int] | None = None, *, group: Any = None, averaged: bool = True
    ) -> Part:
        """Plain data parallelism, in which ranks may have batches of different sizes, also none.

        Args:
            x0: the data of this process, [batch, ...].
            sizes: the batch size of each rank of the group. None: the ranks tell each other, which waits for the
                device; with equal sizes on all of them, pass them.
            group, averaged: as in ``Part``.
        """
        ranks, rank = _world(group), _rank(group)
        if sizes is None:
            sizes = [len(x0)]
            if ranks > 1:
                own = torch.tensor(sizes, device=x0.device)
                every = [torch.empty_like(own) for _ in range(ranks)]
                torch.distributed.all_gather(every, own, group=group)
                sizes = torch.cat(every).tolist()
        sizes = [whole("sizes", size) for size in sizes]
        if len(sizes) != ranks or sizes[rank] != len(x0):
            raise ValueError(f"sizes must be those of {ranks} ranks, here {len(x0)} on rank {rank}; got {sizes}.")
        shape, start = (sum(sizes), *x0.shape[1:]), (sum(sizes[:rank]), *(0,) * (x0.ndim - 1))
        return cls(shape, start, group, averaged, (0,))

    # ---- what is asked of it

    @property
    def size(self) -> int:
        """How many ranks share the whole."""
        return _world(self.group)

    @property
    def factor(self) -> float:
        """What the gradient is multiplied by."""
        return self.size / self.copies if self.averaged else 1.0

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise ValueError unless data of ``shape`` is a slice that begins where this one does."""
        if len(shape) != len(self.shape) or any(s + n > m for s, n, m in zip(self.start, shape, self.shape)):
            raise ValueError(
                f"{name} has shape {tuple(shape)}, which is no slice of the whole {self.shape} that begins at "
                f"{self.start}."
            )

    def window(self, shape: Sequence[int]) -> Window | None:
        """The slice of each sample that data of ``shape`` is; None for whole samples."""
        return None if tuple(shape[1:]) == self.shape[1:] else Window(self.shape[1:], self.start[1:])

    def may_split(self, dim: int) -> bool:
        """Whether there may be several slices along a dimension."""
        return self.shape[dim] > 1 and (self.split is None or dim in self.split)


def _world(group: Any = None) -> int:
    return torch.distributed.get_world_size(group) if _initialized() else 1


def _rank(group: Any = None) -> int:
    return torch.distributed.get_rank(group) if _initialized() else 0
