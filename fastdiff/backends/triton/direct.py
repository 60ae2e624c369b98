"""Whole calls of the plain training step: the launches of ``operations``, kept by dtypes and shape, of which only
pointers and numbers change from step to step. A call that is not plain gives None: ``operations`` does it, or refuses
it. The arguments are those of ``backends/native/direct.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import modes
from ...tensors import Gathered, value_checks_are_free
from .. import reference
from ..saving import save, saved
from . import launch, operations
from .launch import Ready
from .operations import Seeded
from .workspace import cell, of_this_stream

_grad, _wrapping = torch.is_grad_enabled, modes.wrapping
_MOST_SHAPES = 256  # an operation of an objective
_NOISE = ("stream", "sample_offset", "strength")


class _Source:
    """Where coefficients come from: ``values`` (float64, on the CPU), once a device, in ``dtype``; for times in
    [low, high]. ``ready``: the launches that are kept.

    A kind of source has these:
        times: the dtypes of the times [B] that it takes.
        changing: the arguments of a kernel that change with the times; the kernel's a and b are its first two columns.
    """

    times: tuple[torch.dtype, ...]
    changing: tuple[str, ...] = ()
    dtype = torch.float32

    def __init__(self, values: Tensor, low: float, high: float):
        self._values, self._low, self._high = values, low, high
        self._placed: dict[torch.device, Any] = {}
        self.ready: dict[tuple, Any] = {}

    def on(self, device: torch.device) -> Any:
        found = self._placed.get(device)
        if found is None:
            with modes.lasting():
                found = self._placed[device] = self.columns(self._values.to(device, self.dtype))
        return found

    def columns(self, values: Tensor) -> Any:
        return values.unbind(-1)

    def allows(self, t: Tensor) -> bool:
        """Whether all times are in range. On a GPU, where looking would wait for it, one that is not gives NaN."""
        return not value_checks_are_free(t) or all(self._low <= time <= self._high for time in t.tolist())

    def at(self, t: Tensor) -> Sequence[Tensor]:
        """What ``changing`` are at the times ``t``."""
        return ()

    def rows(self, changing: Sequence[Tensor], shape: tuple[int, ...], device: torch.device) -> Sequence[Any]:
        """The coefficients, placed to broadcast to [B, ...], from what ``at`` gave."""
        raise NotImplementedError


class _GatheredRows(_Source):
    times = (torch.int64,)
    changing = ("index",)

    def at(self, t: Tensor) -> Sequence[Tensor]:
        return (t,)

    def rows(self, changing: Sequence[Tensor], shape: tuple[int, ...], device: torch.device) -> Sequence[Any]:
        index = changing[0].view(shape)
        return [Gathered(column, index) for column in self.on(device)]


class _RationalRows(_Source):
    times = (torch.float64, torch.float32)
    changing = ("a", "b")
    dtype = torch.float64

    def columns(self, values: Tensor) -> Tensor:
        return values

    def at(self, t: Tensor) -> Sequence[Tensor]:
        rows = operations.rational(self.on(t.device), t)
        assert rows is not None  # it was looked at before
        return rows

    def rows(self, changing: Sequence[Tensor], shape: tuple[int, ...], device: torch.device) -> Sequence[Any]:
        return [row.view(shape) for row in changing]


class _ConstantRows(_Source):
    times = (torch.float64, torch.float32)

    def rows(self, changing: Sequence[Tensor], shape: tuple[int, ...], device: torch.device) -> Sequence[Any]:
        # One number a sample, all of them the same in memory: the loss is summed by sample, as in the general way.
        return [number.expand(shape) for number in self.on(device)]


def gathered(table: Tensor) -> _Source:
    """Rows table[t] of a float64 [steps, columns], t int64; NaN where t is out of range."""
    return _GatheredRows(table, 0, len(table) - 1)


def rational(columns: Sequence[tuple[float, float, float]], low: float, high: float) -> _Source:
    """Rows (a + b t) / (1 + d t), a column for each (a, b, d), of floating-point t in [low, high]."""
    return _RationalRows(torch.tensor(columns, dtype=torch.float64, device="cpu").T.contiguous(), low, high)


def constant(row: Sequence[float], low: float, high: float) -> _Source:
    """The same numbers at every floating-point t in [low, high]."""
    return _ConstantRows(torch.tensor(row, dtype=torch.float64, device="cpu"), low, high)


def _kept(store: dict, key: tuple, make: Callable[[], Any]) -> Any:
    """``store[key]``, made where it is not there. Where there are very many shapes, all are made anew."""
    found = store.get(key)
    if found is None:
        if len(store) >= _MOST_SHAPES:
            store.clear()
        found = store[key] = make()
    return found


def _plain(device: torch.device, *tensors: Any) -> bool:
    """Whether these are ordinary contiguous tensors on the device; what is None is passed over."""
    for t in tensors:
        if t is not None and not (type(t) is Tensor and t.is_contiguous() and t.device == device):
            return False
    return _wrapping() is None


def _has_rows(source: _Source, t: Any, data: Tensor) -> bool:
    """Whether there is one time for each sample, of a dtype that the source takes, and in range. (``t`` is plain.)"""
    return t is not None and t.dtype in source.times and t.shape == data.shape[:1] and source.allows(t)


# ---- times

_times: dict[tuple, Ready] = {}


def times(steps: int, seed: int | Tensor, samples: int, stream: int, sample_offset: int, device: Any) -> Tensor | None:
    """floor(steps u), int64, of a uniform u in (0, 1) a sample; u itself, float64, for steps = 0."""
    if not samples or _wrapping() is not None or not operations._runs_on(device):
        return None
    out = torch.empty(samples, dtype=torch.int64 if steps else torch.float64, device=device)
    seed, kind = operations._seed(seed, device)

    def make() -> Ready:
        how = operations.uniforms_launch(out, seed, kind, stream, sample_offset, steps)
        return Ready(launch.uniforms, device, how, (), ("out", "seed"), ("stream", "offset"))

    _kept(_times, (steps, samples, kind, device), make)((), (out, seed), (stream, sample_offset))
    return out


# ---- noise


def noise(
    source: _Source, x0: Tensor, t: Any, n: Tensor | tuple, keep: bool, rng: str = "exact"
) -> tuple[Tensor, Tensor | None] | None:
    """(x_t, the noise that was made and kept), one row (alpha, sigma) a sample. n: the noise, or (seed, stream,
    sample_offset, offset) to make it from."""
    device, shape = x0.device, x0.shape
    given = n if isinstance(n, Tensor) else None
    if not _plain(device, x0, given, t) or not _has_rows(source, t, x0) or (given is not None and given.shape != shape):
        return None
    if _grad() and (x0.requires_grad or (given is not None and given.requires_grad)):
        return None
    made = None
    if given is None:
        seed, kind = operations._seed(n[0], device)
        made = Seeded(seed, *n[1:], rng)
        how = kind, bool(made.offset), rng
    else:
        how = given.dtype
    key = ("noise", shape, x0.dtype, device, t.dtype, how, keep)
    ready = source.ready.get(key)
    if ready is None and not _fits(device, x0, given):
        return None
    x_t = torch.empty_like(x0)
    kept = torch.empty(shape, dtype=torch.float32, device=device) if keep and made is not None else None
    changing = source.at(t)
    if ready is None:
        ready = _kept(source.ready, key, lambda: _ready_affine(source, changing, x_t, kept, x0, given, made))
    data = (x_t, x0) if kept is None else (x_t, x0, kept)
    if made is None:
        ready((*data, given), changing)
    else:
        ready(data, (*changing, made.seed), made[1:4])
    return x_t, kept


def _fits(device: torch.device, *data: Tensor | None) -> bool:
    return operations._runs_on(device) and operations._fits(*data) and bool(data[0].numel())


def _ready_affine(source, changing, out, kept, u, given, made) -> Ready:
    """The launch of out = a u + b n, kept = n, where n is given or made."""
    shape = (u.shape[0],) + (1,) * (u.ndim - 1)
    a, b = source.rows(changing, shape, u.device)
    n = made if given is None else given
    how = operations.affine_launch(tuple(u.shape), u.device, u, a, n, b, out, kept)
    data = ("out", "u") if kept is None else ("out", "u", "kept")
    if made is None:
        return Ready(launch.affine, u.device, how, (*data, "v"), source.changing)
    return Ready(launch.affine, u.device, how, data, (*source.changing, "seed"), _NOISE)


def convert(source: _Source, m: Tensor, x_t: Tensor, t: Any) -> Tensor | None:
    """k_x x_t + k_m m in the dtype of m, one row (k_x, k_m) a sample."""
    device, shape = m.device, m.shape
    if not _plain(device, m, x_t, t) or not _has_rows(source, t, m) or x_t.shape != shape:
        return None
    if _grad() and (m.requires_grad or x_t.requires_grad):
        return None
    key = ("convert", shape, m.dtype, x_t.dtype, device, t.dtype)
    ready = source.ready.get(key)
    if ready is None and not _fits(device, m, x_t):
        return None
    out, changing = torch.empty_like(m), source.at(t)
    if ready is None:
        ready = _kept(source.ready, key, lambda: _ready_affine(source, changing, out, None, x_t, m, None))
    ready((out, x_t, m), changing)
    return out


# ---- loss


class _Losses(NamedTuple):
    """The launches of a loss at one shape. ``kind``: what tells it from other losses, see ``workspace.cell``."""

    forward: Ready
    backward: Ready
    kind: tuple


def loss(
    source: _Source,
    present: int,
    function: str,
    prediction: Tensor,
    x0: Tensor | None,
    n: Any,
    t: Any,
    rows: Callable[[], tuple[Any, ...]],
) -> Tensor | None:
    """The mean loss, one row (p, q, scale, weight, c) a sample, of which the bits of ``present`` say what is used; n: a
    tensor, a ``fastdiff.ops.Philox`` or None. ``rows`` gives them placed, for a gradient other than the usual one."""
    device, shape = prediction.device, prediction.shape
    given = n if isinstance(n, Tensor) else None
    if not _plain(device, prediction, x0, given, t) or not _has_rows(source, t, prediction):
        return None
    for data in (x0, given):
        if data is not None and (data.shape != shape or (data.requires_grad and _grad())):
            return None
    made = None
    if n is not None and given is None:
        seed, kind = operations._seed(n.seed, device)
        made = Seeded(seed, n.stream, n.sample_offset, n.offset, n.rng)
        how = kind, bool(made.offset), made.rng
    else:
        how = None if given is None else given.dtype
    recorded = prediction.requires_grad and _grad()
    # A float16 loss is scaled; the size of its gradient is known only in the backward.
    ahead = recorded and prediction.dtype is not torch.float16
    key = (shape, prediction.dtype, device, t.dtype, None if x0 is None else x0.dtype, how, ahead)
    ready = source.ready.get(key)
    if ready is None:
        if not _fits(device, prediction, x0, given) or (made is not None and made.offset and len(shape) < 3):
            return None
        ready = _kept(
            source.ready,
            key,
            lambda: _ready_losses(source, present, function, prediction, x0, given, made, t, ahead, key),
        )
    if recorded:
        return _apply(prediction, (ready, source, ahead, x0, given, made, n, t, rows, function))
    return _forward(ready, source, prediction, x0, given, made, t)


def _ready_losses(source, present, function, prediction, x0, given, made, t, ahead, key) -> _Losses:
    device, own = prediction.device, (prediction.shape[0],) + (1,) * (prediction.ndim - 1)
    columns = source.rows(source.at(t), own, device)
    p, q, scale, weight, c = (row if k == 3 or present >> k & 1 else None for k, row in enumerate(columns))
    n = made if given is None else given
    laid = operations._lay(prediction, weight, x0, n, p, q, scale, c, None)
    how = function, "none", "mean"
    d, one = torch.empty_like(prediction), torch.empty((), dtype=torch.float32, device=device)
    used = one.view(1)
    data = tuple(name for name, there in (("x0", x0), ("n", given)) if there is not None)
    seed, numbers = ((), ()) if made is None else (("seed",), _NOISE)
    written, cells = (("gradient",), ("used", "assumed")) if ahead else ((), ())

    def of(gradient: bool, data: tuple, others: tuple, **more: Any) -> Ready:
        more |= {"used": used, "assumed": used} if ahead else {}
        launched = operations.loss_launch(laid, *how, d if gradient else None, **more)
        return Ready(launch.loss, device, launched, ("prediction", *data), (*source.changing, *seed, *others), numbers)

    return _Losses(
        of(ahead, (*data, *written), ("counters", "partials", "result", *cells), result=one),
        of(True, (*data, "gradient"), ("upstream", *cells), upstream=one),
        (id(source), *key),  # a hint: another objective's losses are others
    )


def _forward(ready: _Losses, source: _Source, prediction, x0, given, made, t, written=(), cells=()) -> Tensor:
    device, of = prediction.device, ready.forward
    result = torch.empty((), dtype=torch.float32, device=device)
    space = operations.loss_workspace(device, of["rows"], of["parts"], of["number"])
    _launch(of, source, prediction, x0, given, made, t, written, (*space, result, *cells))
    return result


def _launch(ready: Ready, source: _Source, prediction, x0, given, made, t, written, others) -> None:
    data = tuple(tensor for tensor in (prediction, x0, given, *written) if tensor is not None)
    changing = source.at(t)
    if made is None:
        ready(data, (*changing, *others))
    else:
        ready(data, (*changing, made.seed, *others), made[1:4])


class _Loss(torch.autograd.Function):
    """As ``operations._Loss``, whose comments say how the gradient is written ahead."""

    @staticmethod
    def forward(ctx, prediction, call):
        ready, source, ahead, x0, given, made, n, t, rows, function = call
        device = prediction.device
        written, cells, ctx.written = (), (), None
        if ahead:
            d, used = torch.empty_like(prediction), torch.empty(1, dtype=torch.float32, device=device)
            last = cell(device, ready.kind)
            written, cells, ctx.written = (d,), (used, last.value), (d, used, last)
        result = _forward(ready, source, prediction, x0, given, made, t, written, cells)
        seed = made.seed if made is not None and isinstance(made.seed, Tensor) else None
        save(ctx, prediction, x0, given, t, seed)
        ctx.call = ready, source, made, n if given is None else None, rows, function
        return result

    @staticmethod
    def backward(ctx, upstream):
        prediction, x0, given, t, _ = saved(ctx)
        ready, source, made, n, rows, function = ctx.call
        n = given if n is None else n
        rest = None, function, "none", "mean"
        written, ctx.written = ctx.written, None
        device = prediction.device
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            loss = reference.loss(prediction, x0, n, *operations.tensors(*rows()), *rest)
            return torch.autograd.grad(loss, prediction, upstream, create_graph=True)[0], None
        if modes.is_many(upstream):
            return reference.loss_gradient(upstream, prediction, x0, n, *operations.tensors(*rows()), *rest), None
        if written is None or not _plain(device, upstream) or upstream.dtype is not torch.float32:
            return operations.loss_gradient(upstream, prediction, x0, n, *rows(), *rest), None
        d, used, last = written
        cells = used, of_this_stream(last, device).value
        _launch(ready.backward, source, prediction, x0, given, made, t, (d,), (upstream, *cells))
        return d, None


# What Function.apply comes to where no transform is at work, which the call has seen to.
_apply = super(torch.autograd.Function, _Loss).apply
