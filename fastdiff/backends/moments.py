"""What the backends share for moments of rows: how the operands lie in memory, and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import modes
from ..calls import RowMomentsCall
from .interface import Backend, differentiable
from .layout import layout_of, memory_order
from .saving import save, saved


class Laid(NamedTuple):
    """The operands in the order of dimensions in which ``a`` lies in memory, contiguous; copies where they must be."""

    a: Tensor
    b: Tensor | None
    rows: tuple[int, ...]
    row_shape: tuple[int, ...]  # of results in this order
    order: tuple[int, ...] | None  # the dimensions of the call; None if they are as they were

    @property
    def back(self) -> tuple[int, ...]:
        return tuple(sorted(range(len(self.order)), key=self.order.__getitem__))

    def rows_as_asked(self, sums: Tensor, call: RowMomentsCall) -> Tensor:
        """A number a row, given in ``row_shape``, in the shape that the call asks for."""
        return sums if self.order is None else sums.permute(self.back).reshape(call.row_shape)

    def rows_as_laid(self, upstream: Tensor | None, call: RowMomentsCall) -> Tensor | None:
        """The inverse, contiguous and in the compute dtype."""
        if upstream is None:
            return None
        rows = upstream.to(call.dtype).reshape(call.rows)
        return (rows if self.order is None else rows.permute(self.order)).contiguous()

    def as_asked(self, gradient: Tensor | None) -> Tensor | None:
        return gradient if gradient is None or self.order is None else gradient.permute(self.back)


def lay(call: RowMomentsCall) -> Laid:
    a, b, rows, order = call.a, call.b, call.rows, memory_order(call.a)
    if order is not None:
        moved = tuple(rows[d] for d in order)
        if layout_of(tuple(a.shape[d] for d in order), moved)[1] == moved:
            return Laid(a.permute(order), b if b is None else b.permute(order).contiguous(), moved, moved, order)
    return Laid(a.contiguous(), b if b is None else b.contiguous(), rows, call.row_shape, None)


def fits(call: RowMomentsCall) -> str:
    """Why the rows are not those of a layout; empty if they are."""
    rows = layout_of(tuple(call.a.shape), call.rows)[1]
    return "" if rows == call.rows else "rows that alternate too often for a layout"


def run(call: RowMomentsCall, backend: Backend, launch: Any) -> tuple[Tensor | None, ...]:
    """The result of ``launch(call)``, recorded by autograd where it is wanted; its gradient is ``backend.gradient``."""
    if not differentiable(call.a, call.b):
        return launch(call)
    return _Moments.apply(call.a, call.b, call, backend, launch)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, call, backend, launch):
        ctx.set_materialize_grads(False)  # a moment without a gradient is left out of the sum
        save(ctx, a, b)
        ctx.call, ctx.backend = call._replace(a=None, b=None), backend
        return launch(call)

    @staticmethod
    def backward(ctx, *upstream):
        a, b = saved(ctx)
        call, backend, needed = ctx.call._replace(a=a, b=b), ctx.backend, ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            found = _by_autograd(backend.otherwise.run(call), upstream, (a, b), needed)
        else:
            many = any(factor is not None and modes.is_many(factor) for factor in upstream)
            found = (backend.otherwise if many else backend).gradient(upstream, call, *needed)
        return *found, None, None, None


def _by_autograd(sums: Sequence[Any], upstream: Sequence[Any], inputs: Sequence[Any], needed: Sequence[bool]) -> Any:
    sums, factors = zip(*((s, factor) for s, factor in zip(sums, upstream) if factor is not None))
    wanted = [tensor for tensor, is_needed in zip(inputs, needed) if is_needed]
    found = iter(torch.autograd.grad(sums, wanted, factors, create_graph=True, allow_unused=True))
    return [next(found) if is_needed else None for is_needed in needed]
