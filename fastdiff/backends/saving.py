"""The tensors that an ``autograd.Function`` keeps for its backward. PyTorch raises when a tensor that was saved is
written into before the backward reads it. Times and seeds are saved too, so that holds for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..tensors import Gathered


def save(ctx: Any, *values: Any) -> None:
    """Save tensors, those of ``Gathered`` coefficients and of a ``fastdiff.ops.Philox`` among them; anything else
    is kept as it is. So is a tensor made under ``torch.inference_mode``: it cannot be saved, nor outside of it be
    written into."""
    for value in values:
        if value is not None and (type(value) is not Tensor or value.is_inference()):
            break
    else:  # the common case
        ctx.kept = None
        ctx.save_for_backward(*values)
        return
    saved: list[Tensor] = []
    ctx.kept = [_keep(value, saved) for value in values]
    ctx.save_for_backward(*saved)


def saved(ctx: Any) -> Sequence[Any]:
    """The values of ``save``, in order."""
    if ctx.kept is None:
        return ctx.saved_tensors
    found = iter(ctx.saved_tensors)
    return [_found(value, found) for value in ctx.kept]


_SAVED, _GATHERED = object(), object()


def _keep(value: Any, saved: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.is_inference():
            return value
        saved.append(value)
        return _SAVED
    if isinstance(value, Gathered):
        if value.column.is_inference() or value.index.is_inference():
            return value
        saved += value
        return _GATHERED
    tensors = [v for v in getattr(value, "made_from", ()) if isinstance(v, Tensor) and not v.is_inference()]
    if tensors:
        saved += tensors
        return _Made(value, len(tensors))
    return value


class _Made(NamedTuple):
    """Noise whose seed, or ids of samples, were saved."""

    noise: Any
    tensors: int


def _found(value: Any, found: Any) -> Any:
    if value is _SAVED:
        return next(found)
    if value is _GATHERED:
        return Gathered(next(found), next(found))
    if isinstance(value, _Made):
        for _ in range(value.tensors):
            next(found)  # it has not changed
        return value.noise
    return value
