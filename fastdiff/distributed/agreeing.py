"""What the ranks of a group must have in common: the seed, and, where they are asked to compare it, all else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..philox import draw_seed, first_sample
from .part import Part

_comparing = False


class _Before:
    """Puts the former setting back where a ``with`` block ends."""

    def __init__(self, before: bool):
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        global _comparing
        _comparing = self._before


def debug(on: bool = True) -> Any:
    """Have the ranks that share a whole compare what they were given, before noise is made and before a loss is
    reduced: shapes, parts, dtypes, seeds, the objective and how it draws t and noise, reductions. Where they differ, or
    where the parts do not cover the whole once, every rank raises RuntimeError, which says which rank has what. It
    waits for the device, and for the slowest rank. Of the contents of tensors, only seeds are compared.

    ``fastdiff.debug(True)`` switches it on for good; ``with fastdiff.debug(): ...`` in a block.
    """
    global _comparing
    before, _comparing = _comparing, bool(on)
    return _Before(before)


def agreed_seed(part: Part, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A seed that all ranks of the part's group have: that which its first rank draws, as each does from its generator.
    Other groups have another, though generators have one seed, for it depends on where the first rank counts its
    samples from. Nothing waits for a GPU."""
    seed = draw_seed(generator, device)
    if first_sample():
        seed ^= first_sample()
    if part.size > 1:
        first = torch.distributed.get_process_group_ranks(part.group)[0] if part.group else 0
        torch.distributed.broadcast(seed, first, group=part.group)
    return seed


def comparing(part: Part) -> bool:
    """Whether ranks compare what they were given."""
    return _comparing and part.size > 1


def compare(what: str, part: Part, shape: tuple[int, ...], **given: Any) -> None:
    """Raise RuntimeError, on every rank, where ranks were given different things: see ``debug``. ``shape`` is that of
    the slice."""
    if not comparing(part):
        return
    given = {name: int(value) if isinstance(value, Tensor) else value for name, value in given.items()}
    given |= {name: getattr(part, name) for name in ("averaged", "split", "copies")}
    given["shape of the whole"] = part.shape
    own = given, part.start, tuple(shape), part.copy
    every: list[Any] = [None] * part.size
    torch.distributed.all_gather_object(every, own, group=part.group)
    wrong = []
    for name in given:
        values = [of[0].get(name) for of in every]
        if any(value != values[0] for value in values):
            wrong.append(f"{name}: " + ", ".join(f"rank {rank} has {value!r}" for rank, value in enumerate(values)))
    if not wrong and not _cover(part.shape, [of[1:3] for of in every if not of[3]]):
        slices = (f"rank {rank} has {size} from {start} on" for rank, (_, start, size, _) in enumerate(every))
        wrong.append(f"the parts do not cover the whole {part.shape} once: {', '.join(slices)}")
    if wrong:
        raise RuntimeError(
            f"the ranks were given different things for {what} (ranks of the group). {'; '.join(wrong)}."
        )


def _cover(shape: tuple[int, ...], slices: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether slices (start, sizes) cover a whole of ``shape`` once: none meets another, and together they are as
    large."""
    boxes = [[(s, s + n) for s, n in zip(*of)] for of in slices if all(of[1])]
    for k, box in enumerate(boxes):
        for other in boxes[:k]:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, other)):
                return False
    return sum(_volume(box) for box in boxes) == _volume([(0, n) for n in shape])


def _volume(box: list[tuple[int, int]]) -> int:
    volume = 1
    for begin, end in box:
        volume *= end - begin
    return volume
