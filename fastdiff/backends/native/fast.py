"""Fast calls on a CPU: one call of ``fastdiff._C`` reads the tensors, computes the coefficients and makes the results
(csrc/fast_calls.cpp). A call returns None for tensors that it does not take: other classes, layouts or dtypes,
gradients of x0, ``torch.func``, a t out of range. Then the general way does the call, or refuses it, with the same
bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...calls import Combination, LossCall, Packed
from ...codes import DTYPES
from ...program import OF_LOSS, OF_NOISE, Program
from ...tensors import number
from ...torch_access import _C, reads_tensors
from .. import reference
from .coefficients import handle
from .launch import FUNCTIONS, NORMALIZATIONS, REDUCTIONS
from .loss import recorded as _recorded

_threads, _grad = torch.get_num_threads, torch.is_grad_enabled

available = reads_tensors
_reference = reference.backend
_T = ("t",)
_OF_T, _OF_NOISE, _OF_LOSS = (_C, _T), (_C, OF_NOISE), (_C, OF_LOSS)  # where ``handle`` keeps what it makes
# The codes of a mask's normalization and of a reduction. A sum divides by nothing; "sample" is made of means of rows.
_CODES = {
    (by, kind): (NORMALIZATIONS[by], REDUCTIONS[kind])
    for by in NORMALIZATIONS
    for kind in REDUCTIONS
    if kind != "sum" or by == "none"
}
_ONE = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


def declined(program: Program) -> str:
    """Why the calls of a program take the host longer than they need; they do not."""
    return ""


def noise(
    program: Program,
    draw: tuple[Program, int] | None,
    x0: Tensor,
    t: Any,
    n: Tensor | None,
    made: tuple[int | Tensor, int, int | Tensor, float],
    keep: bool,
    rng: str = "exact",
    dtype: torch.dtype | None = None,
    packed: Packed | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, None] | None:
    """Noise a batch with one time a sample: (x_t, the noise if it was made and kept, the times, None); or None.

    Args:
        program: computes alpha and sigma, among others.
        draw: the program that makes times from uniforms, and the stream of the uniforms; for ``t`` None.
        x0: [batch, ...]; uint8 with ``dtype``.
        t: [batch], or None to draw it.
        n: the noise, shaped as x0; or None to make it from ``made``.
        made: (seed, stream, index of the first sample or ids, strength of the offset noise).
        keep: whether noise that is made is returned.
        rng: without effect: a CPU has one way to make noise.
        dtype: of x_t, or None for that of x0.
        packed: where the sequences lie whose times these are, if they are packed.
    """
    if not x0.is_cpu or (n is None and made[3] and x0.ndim < 3):  # another device: where this backend is forced
        return None
    if t is None:
        samples = x0.shape[0] if packed is None else packed.sequences
        t = torch.empty(samples, dtype=torch.int64 if program.index else torch.float64, device="cpu")
        times = draw[0].kept.get(_OF_T) or handle(draw[0], _T)
        t = _C.fast_times(times, t, made[0], draw[1], made[2])
    source = program.kept.get(_OF_NOISE) or handle(program, OF_NOISE)
    code, starts = None if dtype is None else DTYPES[dtype], None if packed is None else packed.starts
    done = _C.fast_noise(source, x0, t, made if n is None else n, keep, code, _threads(), starts)
    return done and (*done, t, None)


def loss(
    program: Program,
    present: int,
    function: str | Combination,
    prediction: Tensor,
    x0: Tensor | None,
    n: Any,
    t: Any,
    at_hand: Any,
    record: Callable[..., LossCall],
    how: tuple[Tensor | None, str, Tensor | float | None, str],
    packed: Packed | None = None,
    upstream: Tensor | float | None = None,
) -> Any:
    """The loss of a batch with one time a sample, recorded for autograd; or None.

    Args:
        program: computes ``OF_LOSS``; ``present`` says by bits which of them are used.
        prediction, x0, n: [batch, ...]; x0 or n is None if the target does not use it.
        t: [batch].
        at_hand: without effect: coefficients are computed in the call.
        record: (prediction, *others) -> the record, for a gradient that is differentiated again, or many at once. The
            others are tensors that it holds itself, which have not been written into.
        how: (mask, reduction, weight, mask_normalization) as ``Objective.loss`` takes them.
        packed: as for ``noise``: then it is the plain mean that is computed.
        upstream: the gradient of the loss, a number or a tensor []. With it the result is (the loss, its gradient by
            the prediction), in one pass, and nothing is recorded.
    """
    if n is not None and not isinstance(n, Tensor):
        return None
    mask, reduction, weight, normalization = how
    codes = _CODES.get((normalization, reduction)) if type(normalization) is type(reduction) is str else None
    further = mask is not None or weight is not None or reduction != "mean" or normalization != "none"
    if codes is None or (packed is not None and further):
        return None
    recorded = upstream is None and prediction.requires_grad and _grad()
    # A float16 loss is scaled, and losses of rows are weighted: a gradient for 1 would be of no use.
    ahead = recorded and prediction.dtype is not torch.float16 and reduction != "none"
    wide = torch.float64 in (prediction.dtype, getattr(x0, "dtype", None), getattr(n, "dtype", None))
    one = _ONE[torch.float64 if wide else torch.float32]
    source = program.kept.get(_OF_LOSS) or handle(program, OF_LOSS)
    if weight is not None and (type(weight) is float or type(weight) is int):
        weight = one.new_full((), weight)
    if upstream is not None:
        ahead, upstream = True, number(upstream, one.dtype, one.device)
    rho, (by, kind), starts = FUNCTIONS.get(function, function), codes, None if packed is None else packed.starts
    made = _C.fast_loss(
        source, present, rho, prediction, x0, n, t, one, ahead, _threads(), mask, by, kind, weight, upstream, starts
    )
    if upstream is not None:
        return made
    if made is None or not recorded:
        return None if made is None else made[0]

    def again(upstream, prediction, x0, n, t, mask=None, weight=None):
        upstream = upstream.contiguous()
        found = _C.fast_loss(
            source, present, rho, prediction, x0, n, t, None, True, _threads(), mask, by, kind, weight, upstream, starts
        )
        return found and found[1]

    kept = (prediction, x0, n, t) if mask is None and weight is None else (prediction, x0, n, t, mask, weight)
    return _recorded(prediction, None, (made[0], None, made[1]), kept, record, _reference, again)


def convert(program: Program, m: Tensor, x_t: Tensor, t: Any) -> Tensor | None:
    """k_x x_t + k_m m in the dtype of m, [batch, ...], with one time a sample, t [batch]; or None, also where k_x or
    k_m is not finite."""
    return _C.fast_convert(handle(program, program.names), m, x_t, t, _threads())


def step(
    x: Tensor, m: Tensor, row: Tensor, clip: float | None, n: Tensor | tuple | None, x0: bool
) -> tuple[Tensor, Tensor | None] | None:
    """See ``Backend.fast_step``; ``x0`` says whether the estimate is wanted."""
    return _C.fast_step(x, m, row, clip, n, x0, _threads())
