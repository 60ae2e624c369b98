"""The conditions that a network is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..showing import brief
from ..tensors import with_entries


def conditions(cond: Any, uncond: Any, batch: int) -> tuple[Any, Any]:
    """The conditions of the network: (the condition, the two halves of a guided batch, the unconditional first).
    Without ``uncond`` the second is the condition again. Raises ValueError for another batch size, TypeError for a
    text."""
    for name, half in (("cond", cond), ("uncond", uncond)):
        if isinstance(half, str):
            raise TypeError(
                f"{name} must be a tensor, or a tuple, list or dict of tensors; got str {brief(half)}: encode it first."
            )
    both = None if uncond is None else _both(uncond, cond, batch, "")
    if isinstance(cond, Tensor):
        cond = _of_all("cond", cond, batch)
    return cond, cond if both is None else both


def _both(uncond: Any, cond: Any, batch: int, at: str) -> Any:
    """``at``: where in the condition, for messages. A tensor [1, ...] goes with all samples."""
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        return torch.cat([_of_all("uncond" + at, uncond, batch), _of_all("cond" + at, cond, batch)])
    for kind in (dict, tuple, list):
        if isinstance(cond, kind) and isinstance(uncond, kind):
            keys, others = ([*c] if kind is dict else [*range(len(c))] for c in (cond, uncond))
            if set(keys) != set(others):
                raise ValueError(f"cond{at} and uncond{at} must have the same entries; got {keys} and {others}.")
            return with_entries(cond, [_both(uncond[key], cond[key], batch, f"{at}[{key!r}]") for key in keys])
    if type(cond) is type(uncond):
        raise TypeError(f"cond{at} must be a tensor, or a tuple, list or dict of tensors; got {type(cond).__name__}.")
    raise TypeError(
        f"cond{at} and uncond{at} must be of one form; got {type(cond).__name__} and {type(uncond).__name__}."
    )


def _of_all(name: str, cond: Tensor, batch: int) -> Tensor:
    """[batch, ...]: a tensor [1, ...], or a single number, goes with every sample."""
    if cond.ndim and len(cond) == batch:
        return cond
    if cond.ndim and len(cond) != 1:
        raise ValueError(
            f"{name} has shape {tuple(cond.shape)}, but {batch} samples are drawn: its first dimension must be "
            f"{batch}, or 1 for all."
        )
    return cond.expand(batch, *cond.shape[1:]).contiguous()
