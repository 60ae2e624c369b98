"""How rows lie in the data: as runs of elements that share coefficients. No autograd."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import recycling


def stored_elements(tensor: Tensor) -> int:
    """The distinct elements of a tensor: an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride != 0 or size == 0 else 1
    return elements


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The order of its dimensions in which a tensor (channels_last, transposed) is contiguous; None if it is so as it
    stands, or in no order."""
    if tensor.is_contiguous():
        return None
    order = tuple(sorted(range(tensor.ndim), key=lambda d: -tensor.stride(d)))
    return order if tensor.permute(order).is_contiguous() else None


def of_rows(upstream: Tensor, rows: tuple[int, ...], packed: Any = None) -> Tensor | None:
    """A full-size ``upstream`` as one number, or one for each of the placed ``rows``, where it repeats those in memory:
    that of a mean or a sum of elements does. Otherwise None."""
    if not upstream.numel():
        return None
    held = [size != 1 and stride != 0 for size, stride in zip(upstream.shape, upstream.stride())]
    if any(held) and (packed is not None or any(h and r != s for h, r, s in zip(held, rows, upstream.shape))):
        return None
    for d, h in enumerate(held):
        upstream = upstream if h else upstream.narrow(d, 0, 1)
    return upstream


# The orders of the dimensions of [B, C, h, p, w, q] in memory, where they are packed tokens, by that within a token.
TOKENS = {"c p q": (0, 2, 4, 1, 3, 5), "p q c": (0, 2, 4, 3, 5, 1)}


def order_of_tokens(tensor: Tensor) -> str:
    """Which of ``TOKENS`` a tensor lies in; "none" for any other, and for one that is contiguous."""
    if tensor.ndim == 6 and not tensor.is_contiguous():
        for name, order in TOKENS.items():
            if tensor.permute(order).is_contiguous():
                return name
    return "none"


def empty_in_order(shape: tuple[int, ...], order: tuple[int, ...] | None, dtype: torch.dtype, device: Any) -> Tensor:
    """A new tensor of ``shape`` whose dimensions lie in memory in ``order``; None: as they are."""
    if order is None:
        return torch.empty(shape, dtype=dtype, device=device)
    back, sizes = sorted(range(len(order)), key=order.__getitem__), [shape[d] for d in order]
    on_cpu = torch.device(device).type == "cpu"
    made = recycling.empty(sizes, dtype) if on_cpu else torch.empty(sizes, dtype=dtype, device=device)
    return made.permute(back)


@lru_cache(maxsize=256)
def layout_of(shape: tuple[int, ...], rows: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(layout, the shape that rows must be expanded to) for data of ``shape`` and rows of the placed shape ``rows``.

    A layout has rows that differ along some dimensions, are shared along the next, differ along the next and are shared
    along the rest. Rows that alternate more often are expanded until they do not.
    """
    sizes, part = [1, 1, 1, 1], 0
    expanded: list[int] = []
    for size, kept in zip(shape, rows):
        differs = kept == size and size != 1
        if size != 1:
            if differs and part == 1:
                part = 2
            elif differs and part == 3:
                # A third run of differing dimensions: let the rows differ along everything up to here instead.
                sizes, part = [sizes[0] * sizes[1] * sizes[2] * sizes[3], 1, 1, 1], 0
                expanded = list(shape[: len(expanded)])
            elif not differs and part in (0, 2):
                part += 1
            sizes[part] *= size
        expanded.append(size if differs else 1)
    samples = shape[0] if shape else 1
    channels = shape[1] if len(shape) > 1 else 1
    return (*sizes, samples, channels), tuple(expanded)
