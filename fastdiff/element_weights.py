"""Weights of single elements: the mask of a loss carries them, so that they cost no pass of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .showing import brief


def has_elements(weight: Tensor, rows: tuple[int, ...]) -> bool:
    """Whether ``weight`` tells elements of a row apart. rows: the shape of the rows, 1 where elements share one."""
    return weight.ndim == len(rows) and any(w not in (1, r) for w, r in zip(weight.shape, rows))


def carried(
    weight: Tensor,  # broadcasts to the data
    mask: Tensor | None,  # broadcasts to the data
    normalization: str,
    reduction: str,
    rows: tuple[int, ...],  # the shape of the rows, 1 where elements share one
    data: Tensor,  # [batch, ...]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | float]:
    """A mask w m that stands for weights w beside a mask m, and what the weights of the rows are multiplied by so that
    the loss is divided as ``normalization`` says: by sums of m, not of w m.

    The loss of these is to be taken with normalization "none". The factor is float64, [rows], [batch, 1, ...] for
    "sample" or [1, ...] for "global". Raises TypeError or ValueError for unfit weights.
    """
    if not weight.is_floating_point():
        raise TypeError(f"weights of elements must be floating point; got {brief(weight)}. A choice is a mask=.")
    if any(w not in (1, size) for w, size in zip(weight.shape, data.shape)):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, which does not fit {tuple(data.shape)}.")
    if weight.requires_grad:
        raise ValueError(
            "weights of elements take no gradient: pass weight.detach(). A weight of a row takes one: pass it alone, "
            "or multiply the rows of reduction='none' by it."
        )
    weight = weight.to(data.device, dtype)
    if mask is None:
        return weight, 1.0
    both = torch.where(mask != 0, weight * mask.to(dtype), 0.0)
    if normalization == "none":
        return both, 1.0
    shared = {"row": rows, "sample": (len(data), *(1,) * (data.ndim - 1)), "global": (1,) * data.ndim}[normalization]
    dims = [d for d, size in enumerate(shared) if size == 1]
    # The mean over what a broadcast mask repeats is the mean over what it holds.
    count = mask.double().mean(dims, keepdim=True) if dims else mask.double()
    count = count.expand(shared)
    empty = count == 0
    factor = torch.where(empty, 0.0, 1 / torch.where(empty, 1.0, count))
    if reduction == "mean" and normalization != "global":  # what has nothing in its mask is left out of the mean
        factor = factor * (math.prod(shared) / (~empty).sum().clamp(min=1))
    return both, factor
