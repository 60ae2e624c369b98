"""The terms of the variational bound, and their gradient, as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends.interface import COEFFICIENTS, Backend, able, differentiable
from ...backends.registry import get
from ...calls import GaussianCall
from .declaring import declare, keep_arguments, kept_arguments, noise_arguments, parts, source, strided
from .declaring import run as runs

_ARGUMENTS = (
    f"Tensor output, Tensor weight, Tensor? x0, {noise_arguments('n')}, Tensor? p, Tensor? q, Tensor scale, "
    "Tensor l_0, Tensor? l_v, Tensor l_q, Tensor? half_width, Tensor? simple_weight, bool freeze_mean, str reduction"
)


def _call(output: Tensor, weight: Tensor, x0: Tensor | None, *arguments: Any) -> GaussianCall:
    n, others = source(arguments)
    return GaussianCall(output, x0, n, *others[:7], weight, *others[7:])


def _fake(output, weight, *arguments):
    return weight.new_empty(weight.shape if arguments[-1] == "none" else ())


@declare("gaussian_kl", f"({_ARGUMENTS}) -> Tensor", _fake)
def _gaussian_kl(output, *arguments):
    return runs(_call(output, *arguments), output)


def _fake_gradient(upstream, output, *arguments):
    return torch.empty_like(output)


@declare("gaussian_kl_gradient", f"(Tensor upstream, {_ARGUMENTS}) -> Tensor", _fake_gradient)
def _gaussian_kl_gradient(upstream, output, *arguments):
    call = _call(output, *arguments)
    return strided(able(get(output.device), call).gradient(upstream, call), output)


def _backward(ctx, upstream):
    arguments = kept_arguments(ctx)
    wanted = ctx.needs_input_grad[0]
    d_output = torch.ops.fastdiff.gaussian_kl_gradient(upstream, *arguments) if wanted else None
    return d_output, *(None,) * (len(arguments) - 1)


torch.library.register_autograd("fastdiff::gaussian_kl", _backward, setup_context=keep_arguments)


def declines(call: GaussianCall) -> str:
    return COEFFICIENTS if differentiable(*call[1:12]) else ""


def run(call: GaussianCall, backend: Backend) -> Tensor:
    output, x0, n, *coefficients, weight, simple_weight, freeze_mean, reduction = call
    made = parts(n, output.device)
    return torch.ops.fastdiff.gaussian_kl(
        output, weight, x0, *made, *coefficients, simple_weight, freeze_mean, reduction
    )
