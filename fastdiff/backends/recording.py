"""How autograd sees a loss whose value, and perhaps its gradient, has been computed already."""

from __future__ import annotations

from typing import Any

import torch

from .. import modes
from .saving import save, saved


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, value, written, kept, call_of, again, otherwise):
        save(ctx, *kept)
        ctx.written, ctx.call_of, ctx.again, ctx.otherwise = written, call_of, again, otherwise
        return value

    @staticmethod
    def backward(ctx, upstream):
        call = ctx.call_of(*saved(ctx))
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            value = ctx.otherwise.run(call)
            (gradient,) = torch.autograd.grad(value, call[0], upstream, create_graph=True)
        elif modes.is_many(upstream):  # several gradients at once
            gradient = ctx.otherwise.gradient(upstream, call)
        else:
            # What was written ahead is given away once; whoever gets it may add to it.
            written, ctx.written = ctx.written, None
            gradient = ctx.again(call, upstream, written)
        return gradient, *(None,) * 6


# What Function.apply comes to where no transform is at work.
_recorded = super(torch.autograd.Function, _Recorded).apply


def recorded(value: Any, written: Any, call: Any, kept: int, again: Any, otherwise: Any) -> Any:
    """``value``, the result of ``call``, differentiable in the first field of ``call``.

    Args:
        written: a gradient that was computed along with the value, in the form that ``again`` takes; or None.
        kept: how many fields of ``call``, the first ones, may hold tensors. What they hold must not change until the
            backward.
        again: (call, upstream, written) -> the gradient. A function that holds nothing: the graph would keep it.
        otherwise: the fallback, which computes second derivatives.
    """
    kind, how = type(call), call[kept:]
    return _recorded(call[0], value, written, call[:kept], lambda *fields: kind(*fields, *how), again, otherwise)
