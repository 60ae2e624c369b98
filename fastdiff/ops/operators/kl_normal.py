"""The KL divergence from the standard normal distribution, and its gradient, as operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends.interface import COEFFICIENTS, Backend, able, differentiable
from ...backends.registry import get
from ...calls import KLNormalCall
from .declaring import declare, keep_arguments, kept_arguments, strided
from .declaring import run as runs

_ARGUMENTS = "Tensor moments, Tensor weight, float least, float most, str reduction"


def _fake(moments, weight, least, most, reduction):
    return weight.new_empty(weight.shape if reduction == "none" else ())


@declare("kl_normal", f"({_ARGUMENTS}) -> Tensor", _fake)
def _kl_normal(moments, *arguments):
    return runs(KLNormalCall(moments, *arguments), moments)


def _fake_gradient(upstream, moments, *arguments):
    return torch.empty_like(moments)


@declare("kl_normal_gradient", f"(Tensor upstream, {_ARGUMENTS}) -> Tensor", _fake_gradient)
def _kl_normal_gradient(upstream, moments, *arguments):
    call = KLNormalCall(moments, *arguments)
    return strided(able(get(moments.device), call).gradient(upstream, call), moments)


def _backward(ctx, upstream):
    arguments: list[Any] = kept_arguments(ctx)
    d_moments = torch.ops.fastdiff.kl_normal_gradient(upstream, *arguments) if ctx.needs_input_grad[0] else None
    return d_moments, *(None,) * 4


torch.library.register_autograd("fastdiff::kl_normal", _backward, setup_context=keep_arguments)


def declines(call: KLNormalCall) -> str:
    return COEFFICIENTS if differentiable(call.weight) else ""


def run(call: KLNormalCall, backend: Backend) -> Tensor:
    return torch.ops.fastdiff.kl_normal(*call)
