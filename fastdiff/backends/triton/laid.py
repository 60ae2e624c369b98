"""The operands of a loss, laid out as its kernel takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...calls import LossCall, Packed
from ...tensors import Gathered
from ..layout import TOKENS, empty_in_order, layout_of, order_of_tokens
from .arguments import permuted
from .coefficients import is_one, shape_of
from .plan import strided

_NO_STRIDES = (1,) * 3 + (0,) * 4


def own_rows(shape: tuple[int, ...], own: tuple[int, ...], *others: Any) -> bool:
    """Whether the rows of the weight, and of the other coefficients, are rows of one layout: then each has one sum."""
    for other in others:
        rows = shape_of(other)
        if rows and rows != own:
            spread = other.index if isinstance(other, Gathered) else other
            if not is_one(spread):
                return False
    return layout_of(shape, own)[1] == own


class Laid(NamedTuple):
    """The operands of a loss, laid out for the kernel. ``back`` leads from its order of dimensions to the caller's."""

    back: tuple[int, ...] | None
    shape: tuple[int, ...]
    rows_shape: tuple[int, ...]
    data: list
    coefficients: list
    mask: Tensor | None
    mask_strides: tuple[int, tuple[int, ...]]  # see ``plan.strided``; -1 dimensions where there is no mask
    order: str = "none"  # of the prediction in memory: see ``layout.order_of_tokens``
    packed: Packed | None = None

    def ordered(self, tensor: Tensor) -> Tensor:
        """A tensor of the caller's dimensions, or one number, in the kernel's order of them."""
        return tensor if self.back is None or not tensor.ndim else _permuted(tensor, self.back)


def _permuted(tensor: Tensor, back: tuple[int, ...]) -> Tensor:
    """A tensor of the caller's dimensions in the order that ``back`` leads from."""
    return tensor.permute(sorted(range(len(back)), key=back.__getitem__))


def lay(call: LossCall) -> Laid:
    """The operands of ``call``."""
    prediction, x0, n, p, q, scale, weight, c, mask, y, r = call[:11]
    operands, coefficients = (prediction, x0, n, y), (weight, p, q, scale, c, r)
    own, shape = shape_of(weight), tuple(prediction.shape)
    order = order_of_tokens(prediction) if call.packed is None else "none"
    if order == "none" and call.packed is None:
        back, data, placed = permuted(operands, coefficients)
    else:  # rows that are packed sequences have no other order
        others = (t.contiguous() if isinstance(t, Tensor) else t for t in (x0, n, y))
        first = prediction.contiguous() if order == "none" else prediction
        back, data, placed = None, [first, *others], list(coefficients)
    if back is not None and not own_rows(tuple(data[0].shape), shape_of(placed[0])):
        data, placed, back = [t if t is None else t.contiguous() for t in operands], list(coefficients), None
    if back is not None:
        shape, own = tuple(data[0].shape), shape_of(placed[0])
    strides = -1, _NO_STRIDES
    if mask is not None:
        mask = mask.resolve_neg()
        if mask.dtype == torch.float64:
            mask = mask.float()
        elif mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        mask = mask.expand(prediction.shape)
        if back is not None:
            mask = _permuted(mask, back)
        strides = strided(shape, mask.stride())
        if strides is None:
            mask, strides = mask.contiguous(), (0, _NO_STRIDES)
    return Laid(back, shape, own, data, placed, mask, strides, order, call.packed)


def like_prediction(laid: Laid, dtype: torch.dtype | None = None) -> Tensor:
    """New memory for its gradient, or in ``dtype``, in the same order."""
    prediction = laid.data[0]
    return empty_in_order(laid.shape, TOKENS.get(laid.order), dtype or prediction.dtype, prediction.device)


def as_prediction(laid: Laid, upstream: Tensor) -> Tensor:
    """``upstream``, lying in memory as the prediction does."""
    if laid.order == "none":
        return upstream.contiguous()
    same = order_of_tokens(upstream) == laid.order
    return upstream if same else like_prediction(laid, upstream.dtype).copy_(upstream)
