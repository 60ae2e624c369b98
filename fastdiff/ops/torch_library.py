"""The operations as ``torch.compile`` and ``torch.export`` see them: opaque operators ``fastdiff::...``.

Each operator runs the backend that is chosen for its device when the program runs, so a compiled step has the bits of
an eager one, and one graph serves all t, seeds and scales. The operators are defined with ``torch.library``, with fake
implementations and, but for the step, gradients. For gradients of coefficients, and of x0 in a loss, the reference is
traced instead. Eager calls do not come here: they go to the backend directly, which costs less.

In a compiled program the gradient of the prediction is computed in the backward, not in the pass of the loss: an
operator may neither return nor change what it was given. Nothing that is made while tracing is cached. PyTorch 2.6
cannot export an objective, because it takes no tables along; later versions can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.interface import COEFFICIENTS, YES, Backend, able, differentiable
from ..backends.registry import get
from ..calls import Call, ConvertCall, LossCall, NoiseCall, RunCall, StepCall
from ..philox import Philox, seed_tensor

_MADE = "Tensor? {0}, Tensor? {0}_seed, int {0}_stream, SymInt {0}_sample_offset, float {0}_offset, str {0}_rng"
_LOSS = (
    f"Tensor prediction, Tensor weight, Tensor? x0, {_MADE.format('n')}, Tensor? p, Tensor? q, Tensor? scale, "
    "Tensor? c, Tensor? mask, str function, str normalization, str reduction"
)
OPERATORS = {
    "uniform": "(Tensor seed, SymInt samples, int stream, SymInt sample_offset) -> Tensor",
    "normal": "(Tensor seed, SymInt[] shape, int stream, SymInt sample_offset, ScalarType dtype, str rng) -> Tensor",
    "noise": f"(Tensor x0, {_MADE.format('n')}, Tensor alpha, Tensor sigma, float perturbation, "
    f"{_MADE.format('xi')}, bool keep) -> (Tensor, Tensor)",
    "loss": f"({_LOSS}) -> Tensor",
    "loss_gradient": f"(Tensor upstream, {_LOSS}) -> Tensor",
    "convert": "(Tensor m, Tensor x_t, Tensor k_x, Tensor k_m) -> Tensor",
    "step": "(Tensor x, Tensor m, Tensor row, Tensor[] history, "
    f"{_MADE.format('noise')}, {_MADE.format('known_noise')}, Tensor? uncond, Tensor? guidance, float? scale, "
    "float? clip, Tensor? log_variance, Tensor? threshold, Tensor? mask, Tensor? known, bool x0, bool entry, "
    "SymInt seen) -> (Tensor, Tensor, Tensor, Tensor)",
}


def _operator(implementation: Callable) -> Callable:
    name = f"fastdiff::{implementation.__name__.strip('_')}"
    torch.library.define(name, OPERATORS[implementation.__name__.strip("_")])

    @torch.library.impl(name, "CompositeExplicitAutograd")
    def run(*arguments):
        with torch.no_grad():
            return implementation(*arguments)

    return implementation


def _runs(call: Call, tensor: Tensor) -> Backend:
    """The backend that runs ``call``, whose data is on the device of ``tensor``."""
    return able(get(tensor.device), call)


def _source(n: Tensor | None, seed: Tensor | None, stream: int, sample_offset: int, offset: float, rng: str) -> Any:
    """Noise from its arguments, as the backends take it: the inverse of ``_parts``."""
    if seed is None:
        return n
    return Philox(seed, sample_offset, stream, offset, rng)


def _parts(n: Any, device: torch.device) -> tuple:
    if n is None or isinstance(n, Tensor):
        return n, None, 0, 0, 0.0, "exact"
    return None, seed_tensor(n.seed, device), n.stream, n.sample_offset, n.offset, n.rng


def _strided(result: Tensor, like: Tensor) -> Tensor:
    """``result`` with the strides that the fake implementation promises."""
    promised = torch.empty_like(like, dtype=result.dtype)
    return result if result.stride() == promised.stride() else promised.copy_(result)


@_operator
def _uniform(seed, samples, stream, sample_offset):
    return get(seed.device).uniform(seed, samples, stream, sample_offset, seed.device)


@torch.library.register_fake("fastdiff::uniform")
def _(seed, samples, stream, sample_offset):
    return seed.new_empty((samples,), dtype=torch.float64)


@_operator
def _normal(seed, shape, stream, sample_offset, dtype, rng):
    return get(seed.device).normal(seed, tuple(shape), stream, sample_offset, dtype, seed.device, rng).contiguous()


@torch.library.register_fake("fastdiff::normal")
def _(seed, shape, stream, sample_offset, dtype, rng):
    return seed.new_empty(shape, dtype=dtype)


@_operator
def _noise(x0, *arguments):
    n, (alpha, sigma, perturbation), xi = _source(*arguments[:6]), arguments[6:9], _source(*arguments[9:15])
    call = NoiseCall(x0, n, alpha, sigma, perturbation, xi, arguments[15])
    x_t, kept = _runs(call, x0).noise(call)
    # A result must not be an argument.
    return _strided(x_t, x0), kept if kept is not n else x0.new_empty(0, dtype=alpha.dtype)


@torch.library.register_fake("fastdiff::noise")
def _(x0, *arguments):
    made = arguments[0] is None and arguments[15]
    return torch.empty_like(x0), x0.new_empty(x0.shape if made else (0,), dtype=arguments[6].dtype)


def _loss_call(prediction: Tensor, weight: Tensor, x0: Tensor | None, *arguments: Any) -> LossCall:
    """A loss from the arguments of its operator."""
    n, (p, q, scale, c, mask), how = _source(*arguments[:6]), arguments[6:11], arguments[11:]
    return LossCall(prediction, x0, n, p, q, scale, weight, c, mask, *how)


@_operator
def _loss(prediction, weight, x0, *arguments):
    call = _loss_call(prediction, weight, x0, *arguments)
    return _runs(call, prediction).loss(call)


@torch.library.register_fake("fastdiff::loss")
def _(prediction, weight, *arguments):
    return weight.new_empty(weight.shape if arguments[-1] == "none" else ())


@_operator
def _loss_gradient(upstream, prediction, *arguments):
    call = _loss_call(prediction, *arguments)
    gradient = _runs(call, prediction).loss_gradient(upstream, call)
    return _strided(gradient, prediction)


@torch.library.register_fake("fastdiff::loss_gradient")
def _(upstream, prediction, *arguments):
    return torch.empty_like(prediction)


@_operator
def _convert(m, x_t, k_x, k_m):
    call = ConvertCall(m, x_t, k_x, k_m)
    return _strided(_runs(call, m).convert(call), m)


@torch.library.register_fake("fastdiff::convert")
def _(m, x_t, k_x, k_m):
    return torch.empty_like(m)


@_operator
def _step(x, m, row, history, *arguments):
    noise, known_noise = _source(*arguments[:6]), _source(*arguments[6:12])
    uncond, guidance, scale, clip, log_variance, threshold, mask, known, want_x0, want_entry, rows = arguments[12:]
    seen = x.new_empty((rows, *x.shape[1:]))
    call = StepCall(
        x, m, row, uncond, scale if guidance is None else guidance, clip, tuple(history), noise, log_variance, x.dtype,
        want_x0, want_entry, threshold, mask, known, known_noise, seen if rows else None,
    )  # fmt: skip
    y, x0, entry = _runs(call, x).step(call)
    nothing = x.new_empty(0)
    return (
        _strided(y, x),
        nothing if x0 is None else _strided(x0, x),
        nothing.clone() if entry is None else _strided(entry, x),
        seen,
    )


@torch.library.register_fake("fastdiff::step")
def _(x, m, row, history, *arguments):
    x0, entry, rows = arguments[-3:]
    return (
        torch.empty_like(x),
        torch.empty_like(x) if x0 else x.new_empty(0),
        torch.empty_like(x, dtype=row.dtype) if entry else x.new_empty(0),
        x.new_empty((rows, *x.shape[1:])),
    )


def _affine_gradient(upstream: Tensor, row: Tensor, dtype: torch.dtype) -> Tensor:
    return (row * upstream.to(row.dtype)).to(dtype)


def _noise_context(ctx, inputs, output):
    x0, n = inputs[:2]
    ctx.save_for_backward(*inputs[7:9])
    ctx.dtypes = x0.dtype, n if n is None else n.dtype
    ctx.mark_non_differentiable(output[1])


def _noise_backward(ctx, upstream, _):
    alpha, sigma = ctx.saved_tensors
    d_x0 = _affine_gradient(upstream, alpha, ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    d_n = _affine_gradient(upstream, sigma, ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return d_x0, d_n, *(None,) * 15


def _loss_context(ctx, inputs, output):
    ctx.arguments = tuple(None if isinstance(a, Tensor) else a for a in inputs)
    ctx.tensors = tuple(k for k, a in enumerate(inputs) if isinstance(a, Tensor))
    ctx.save_for_backward(*(inputs[k] for k in ctx.tensors))


def _loss_backward(ctx, upstream):
    arguments = list(ctx.arguments)
    for k, tensor in zip(ctx.tensors, ctx.saved_tensors):
        arguments[k] = tensor
    d_prediction = d_weight = None
    if ctx.needs_input_grad[0]:
        d_prediction = torch.ops.fastdiff.loss_gradient(upstream, *arguments)
    if ctx.needs_input_grad[1]:
        prediction, weight, (mask, _, normalization, reduction) = *arguments[:2], arguments[-4:]
        means = torch.ops.fastdiff.loss(prediction, torch.ones_like(weight), *arguments[2:-1], "none")
        count = max(1, weight.numel())
        factor = {"mean": 1 / count, "sum": prediction.numel() / count, "none": 1.0}[reduction]
        if reduction == "mean" and mask is not None:
            factor = 1 / reference.rows_of_mean(prediction, weight, mask, normalization)
        d_weight = (upstream * means * factor).to(weight.dtype)
    return d_prediction, d_weight, *(None,) * (len(arguments) - 2)


def _convert_context(ctx, inputs, output):
    m, x_t, k_x, k_m = inputs
    ctx.save_for_backward(k_x, k_m)
    ctx.dtypes = m.dtype, x_t.dtype


def _convert_backward(ctx, upstream):
    k_x, k_m = ctx.saved_tensors
    d_m = _affine_gradient(upstream, k_m, ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    d_x = _affine_gradient(upstream, k_x, ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return d_m, d_x, None, None


torch.library.register_autograd("fastdiff::noise", _noise_backward, setup_context=_noise_context)
torch.library.register_autograd("fastdiff::loss", _loss_backward, setup_context=_loss_context)
torch.library.register_autograd("fastdiff::convert", _convert_backward, setup_context=_convert_context)


class Operators(Backend):
    """The operators as a backend: what runs while a program is traced."""

    name = "operators"

    def __init__(self):
        self.otherwise = reference.Reference(self)

    def supports(self, call: Call) -> tuple[bool, str]:
        if isinstance(call, NoiseCall):
            wanted = differentiable(call.alpha, call.sigma, call.xi)
        elif isinstance(call, LossCall):
            wanted = differentiable(call.x0, call.n, call.p, call.q, call.scale, call.c, call.mask)
        elif isinstance(call, ConvertCall):
            wanted = differentiable(call.k_x, call.k_m)
        else:
            wanted = differentiable(*call.data, call.guidance, call.row, call.threshold, call.mask)
            if call.dtype not in (None, call.x.dtype):
                return False, "results in another dtype than x's"
        return (False, COEFFICIENTS) if wanted else YES

    def uniform(self, seed, samples, stream, sample_offset=0, device=None):
        return torch.ops.fastdiff.uniform(seed_tensor(seed, device), samples, stream, sample_offset)

    def normal(self, seed, shape, stream=0, sample_offset=0, dtype=torch.float32, device=None, rng="exact"):
        return torch.ops.fastdiff.normal(seed_tensor(seed, device), shape, stream, sample_offset, dtype, rng)

    def noise(self, call: NoiseCall) -> tuple[Tensor, Any]:
        x0, n, alpha, sigma, perturbation, xi, keep = call
        parts, xi_parts = _parts(n, x0.device), _parts(xi, x0.device)
        x_t, kept = torch.ops.fastdiff.noise(x0, *parts, alpha, sigma, float(perturbation), *xi_parts, keep)
        return x_t, n if isinstance(n, Tensor) or not keep else kept

    def loss(self, call: LossCall) -> Tensor:
        prediction, x0, n, p, q, scale, weight, c, mask, *how = call
        parts = _parts(n if q is not None else None, prediction.device)
        x0 = x0 if p is not None else None
        return torch.ops.fastdiff.loss(prediction, weight, x0, *parts, p, q, scale, c, mask, *how)

    def convert(self, call: ConvertCall) -> Tensor:
        return torch.ops.fastdiff.convert(call.m, call.x_t, call.k_x, call.k_m)

    def step(self, call: StepCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, guidance, seen = call.x, call.guidance, call.model_input
        rows = isinstance(guidance, Tensor)
        y, x0, entry, written = torch.ops.fastdiff.step(
            x, call.m, call.row, list(call.history), *_parts(call.noise, x.device), *_parts(call.known_noise, x.device),
            call.uncond, guidance if rows else None, None if rows else float(guidance), call.clip, call.log_variance,
            call.threshold, call.mask, call.known, call.want_x0, call.want_entry, 0 if seen is None else len(seen),
        )  # fmt: skip
        if seen is not None:
            seen.copy_(written)
        return y, x0 if call.want_x0 else None, entry if call.want_entry else None

    def trajectory(self, call: RunCall) -> reference.Trajectory:
        return reference.Trajectory(self, call)


operators = Operators()
