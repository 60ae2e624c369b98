"""Conditions that are dropped in training, so that one network learns both halves of classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .calls import UniformCall
from .numeric import check_numbers
from .ops import dispatch
from .philox import Stream, seeded
from .showing import brief
from .tensors import value_checks_are_free, with_entries


def drop_condition(
    cond: Any,
    probability: float,
    null: Any = None,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int | None = None,
    ids: Tensor | None = None,  # [B]
) -> tuple[Any, Tensor]:
    """Replace the condition of some samples by the empty one (Ho and Salimans 2022, algorithm 1).

    One decision is made for each sample, for all that its condition consists of. It is a function of (seed, index of
    the sample) alone, and independent of the noise and of the time that ``Objective.noise`` makes from the same seed.

    Args:
        cond: a tensor [batch, ...], such as labels or embeddings of tokens, or a dict, tuple or list of such, nested as
            wished. What every sample is to keep is left out of it.
        probability: of dropping a sample's condition, in [0, 1]; 0.1 is usual.
        null: what stands in place of a dropped condition: for a tensor, a number or a tensor that broadcasts to it,
            [...] or [1, ...], which may need a gradient; for a dict, tuple or list, one of the same form. None is 0 for
            a floating-point tensor, and in place of a dict, tuple or list, None for each of its entries. Labels need
            their null class; a mask needs that of the empty prompt, since attention to nothing is NaN.
        seed, generator, sample_offset: as in ``Objective.noise``. Without a seed one is drawn from the generator.
        ids: integers [batch], a number for each sample, in place of ``sample_offset``.

    Returns (the condition, of the form, types and dtypes of ``cond``; dropped, bool [batch]). Nothing waits for the
    device. Raises TypeError or ValueError for unfit arguments; among them is a null beyond the numbers of the dtype of
    ``cond``, if it is a number or a tensor on the CPU.
    """
    check_numbers(probability=probability)
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must lie in [0, 1]; got {probability!r}.")
    pairs = list(_paired(cond, null, ""))
    if not pairs:
        raise ValueError(f"cond must hold a tensor; got {brief(cond)}.")
    (where, first, _), *_ = pairs
    for name, tensor, empty in pairs:
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, but {where} on {first.device}: move one with .to(device).")
        if not tensor.ndim or len(tensor) != len(first):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: its first dimension must be the batch, as that of {where}, "
                f"{tuple(first.shape)}."
            )
        _check_null(name, tensor, empty)
    seed, samples = seeded(seed, generator, ids, sample_offset, len(first), first.device)
    call = UniformCall(seed, len(first), Stream.DROPOUT, samples, first.device)
    dropped = dispatch.run(call, first.device) < probability
    return _replaced(cond, null, dropped), dropped


def _paired(cond: Any, null: Any, at: str) -> Iterator[tuple[str, Tensor, Any]]:
    """(its name, the tensor, its null) of each tensor of a condition. ``at``: where it lies in it."""
    if isinstance(cond, Tensor):
        yield "cond" + at, cond, null
        return
    if not isinstance(cond, (dict, tuple, list)):
        raise TypeError(f"cond{at} must be a tensor, or a dict, tuple or list of tensors; got {brief(cond)}.")
    kind = dict if isinstance(cond, dict) else (tuple, list)
    keys = [*cond] if kind is dict else [*range(len(cond))]
    if null is not None:
        if not isinstance(null, kind):
            raise TypeError(f"null{at} must be of the form of cond{at}, a {type(cond).__name__}; got {brief(null)}.")
        others = [*null] if kind is dict else [*range(len(null))]
        if set(keys) != set(others):
            raise ValueError(f"cond{at} and null{at} must have the same entries; got {keys} and {others}.")
    for key in keys:
        yield from _paired(cond[key], None if null is None else null[key], f"{at}[{key!r}]")


def _check_null(name: str, tensor: Tensor, null: Any) -> None:
    """Raise TypeError or ValueError unless ``null`` can stand in the place of a sample of ``tensor``."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if null is None:
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} is {kind}, which has no empty value of its own: give one as null=, the null class of labels "
                f"or the mask of the empty prompt; or leave {name} out, to keep it."
            )
        return
    if not isinstance(null, (bool, int, float, Tensor)):
        raise TypeError(f"the null of {name} must be a number or a tensor; got {brief(null)}.")
    if _kind(null) > _kind(tensor):
        raise TypeError(f"the null of {name} must be {kind}, as {name} is; got {brief(null)}.")
    _check_fits(name, tensor, null)
    if isinstance(null, Tensor):
        if null.ndim and null.device != tensor.device:
            raise ValueError(f"the null of {name} is on {null.device}, but {name} on {tensor.device}.")
        try:
            broadcast = torch.broadcast_shapes(null.shape, tensor.shape)
        except RuntimeError:
            broadcast = None
        if broadcast != tensor.shape:
            raise ValueError(
                f"the null of {name} has shape {tuple(null.shape)}, which does not broadcast to {tuple(tensor.shape)}."
            )


def _check_fits(name: str, tensor: Tensor, null: bool | int | float | Tensor) -> None:
    """Raise ValueError where a finite ``null`` is beyond the numbers of ``tensor``: it would wrap around, or become
    infinite. A tensor is looked at where that is free."""
    if tensor.dtype == torch.bool:
        return
    numbers = [null]
    if isinstance(null, Tensor):
        if null.dtype == tensor.dtype or not value_checks_are_free(null):
            return
        if null.is_floating_point():
            finite = null.detach()[null.isfinite()]
            numbers = [end.item() for end in finite.aminmax()] if finite.numel() else []
        else:  # as Python's, which have no end
            numbers = null.flatten().tolist()
    limits = torch.finfo(tensor.dtype) if _kind(tensor) == 2 else torch.iinfo(tensor.dtype)
    for number in numbers:
        if not limits.min <= number <= limits.max and abs(number) != math.inf and number == number:
            low, high = (f"{end:g}" if _kind(tensor) == 2 else end for end in (limits.min, limits.max))
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"the null of {name} must fit into {kind}, {low} to {high}; got {number!r}.")


def _kind(value: bool | int | float | Tensor) -> int:
    """0 of true and false, 1 of whole numbers, 2 of fractions. A value fits into a tensor of its kind or a higher."""
    if isinstance(value, Tensor):
        return 2 if value.is_floating_point() else int(value.dtype != torch.bool)
    return 2 if isinstance(value, float) else int(not isinstance(value, bool))


def _replaced(cond: Any, null: Any, dropped: Tensor) -> Any:
    if isinstance(cond, Tensor):
        rows = dropped.reshape(-1, *(1,) * (cond.ndim - 1))
        if not isinstance(null, Tensor):
            return cond.masked_fill(rows, 0 if null is None else null)
        return torch.where(rows, null.to(cond.dtype), cond)
    keys = cond if isinstance(cond, dict) else range(len(cond))
    return with_entries(cond, [_replaced(cond[key], None if null is None else null[key], dropped) for key in keys])
