"""The sampler step as an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.interface import COEFFICIENTS, Backend, differentiable
from ...calls import StepCall
from .declaring import declare, noise_arguments, parts, source, strided
from .declaring import run as runs


def _fake(x, m, row, history, *arguments):
    x0, entry, rows = arguments[-3:]
    return (
        torch.empty_like(x),
        torch.empty_like(x) if x0 else x.new_empty(0),
        torch.empty_like(x, dtype=row.dtype) if entry else x.new_empty(0),
        x.new_empty((rows, *x.shape[1:])),
    )


@declare(
    "step",
    f"(Tensor x, Tensor m, Tensor row, Tensor[] history, {noise_arguments('noise')}, {noise_arguments('known_noise')}, "
    "Tensor? uncond, Tensor? guidance, float? scale, float? clip, Tensor? log_variance, Tensor? threshold, "
    "Tensor? mask, Tensor? known, bool x0, bool entry, SymInt seen) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def _step(x, m, row, history, *arguments):
    noise, others = source(arguments)
    known_noise, others = source(others)
    uncond, guidance, scale, clip, log_variance, threshold, mask, known, want_x0, want_entry, rows = others
    seen = x.new_empty((rows, *x.shape[1:]))
    call = StepCall(
        x, m, row, uncond, scale if guidance is None else guidance, clip, tuple(history), noise, log_variance, x.dtype,
        want_x0, want_entry, threshold, mask, known, known_noise, seen if rows else None,
    )  # fmt: skip
    y, x0, entry = runs(call, x)
    nothing = x.new_empty(0)
    return (
        strided(y, x),
        nothing if x0 is None else strided(x0, x),
        nothing.clone() if entry is None else strided(entry, x),
        seen,
    )


def declines(call: StepCall) -> str:
    if differentiable(*call.data, call.guidance, call.row, call.threshold, call.mask):
        return COEFFICIENTS
    return "" if call.dtype in (None, call.x.dtype) else "results in another dtype than x's"


def run(call: StepCall, backend: Backend) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, guidance, seen = call.x, call.guidance, call.model_input
    rows = isinstance(guidance, Tensor)
    y, x0, entry, written = torch.ops.fastdiff.step(
        x, call.m, call.row, list(call.history), *parts(call.noise, x.device), *parts(call.known_noise, x.device),
        call.uncond, guidance if rows else None, None if rows else float(guidance), call.clip, call.log_variance,
        call.threshold, call.mask, call.known, call.want_x0, call.want_entry, 0 if seen is None else len(seen),
    )  # fmt: skip
    if seen is not None:
        seen.copy_(written)
    return y, x0 if call.want_x0 else None, entry if call.want_entry else None
