"""Fast calls on a GPU: launches that are kept by dtypes and shape (``launch.Ready``), of which only pointers and
numbers change from step to step. They are the launches of the general way. The arguments are those of
``backends/native/fast.py``; a call that is not supported returns None, and the general way does it, or refuses it.

A training step is four launches at most: times with all coefficients of a continuous process, x_t, the loss with its
gradient, and the backward, which compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import modes
from ...calls import LossCall
from ...program import OF_LOSS, OF_NOISE, Program
from ...tensors import Gathered, value_checks_are_free
from .. import reference
from . import arguments
from . import loss as general
from .affine import affine, affine_launch
from .arguments import Seeded, samples_on, seed_of
from .launch import Ready
from .programs import coefficients, flat
from .times import coefficients_launch, constants_of
from .workspace import cell, loss_workspace, of_this_stream, single

_grad, _wrapping = torch.is_grad_enabled, modes.wrapping
_MOST_SHAPES = 256  # an operation of an objective
_MADE, _NUMBERS = ("seed", "ids"), ("stream", "sample_offset", "strength")  # of noise, the arguments that change


def _kept(store: dict, key: tuple, make: Callable[[], Any]) -> Any:
    """``store[key]``, made by ``make`` if it is not there. A store with too many shapes is emptied first."""
    found = store.get(key)
    if found is None:
        if len(store) >= _MOST_SHAPES:
            store.clear()
        found = store[key] = make()
    return found


def _plain(device: torch.device, *tensors: Any) -> bool:
    """Whether these are ordinary contiguous tensors on the device. None is passed over."""
    for t in tensors:
        if t is not None and not (type(t) is Tensor and t.is_contiguous() and t.device == device):
            return False
    return _wrapping() is None


def _has_time(program: Program, t: Any, data: Tensor) -> bool:
    """Whether there is one time for each sample, of a dtype that the program takes, and in range: on a GPU, where
    looking would wait for it, one that is not gives NaN, or what the formula gives. (``t`` is plain.)"""
    kinds = (torch.int64,) if program.index else (torch.float64, torch.float32)
    if t is None or t.dtype not in kinds or t.shape != data.shape[:1] or (t.requires_grad and _grad()):
        return False
    return not value_checks_are_free(t) or all(program.low <= time <= program.high for time in t.tolist())


def _store(program: Program) -> dict[tuple, Any]:
    """The launches that are kept for a program."""
    found = program.kept.get(_store)
    if found is None:
        found = program.kept[_store] = {}
    return found


# ---- coefficients


def _compute(
    program: Program, device: torch.device, t: Tensor | None, seed: Any, stream: int, sample_offset: int | Tensor,
    columns: Tensor | None, drawn: Tensor | None,
) -> None:  # fmt: skip
    """The launch that computes ``columns`` at ``t``, or ``drawn`` times and ``columns`` from uniforms."""
    written = tuple(tensor for tensor in (columns, drawn) if tensor is not None)
    samples = written[0].shape[-1]
    if t is None:
        seed, kind = seed_of(seed, device)
        first, ids = samples_on(device, sample_offset)
        given, others, kind = (seed, ids), _MADE, (kind, ids is None)
    else:
        given, others, kind, first = (t,), ("times",), t.dtype, 0
    key = "coefficients", samples, kind, device, columns is None, None if drawn is None else drawn.dtype

    def make() -> Ready:
        constants = constants_of(program, device)
        how = columns, drawn, t, seed if t is None else None, constants, stream, sample_offset, samples
        names = tuple(n for n, tensor in (("columns", columns), ("drawn", drawn)) if tensor is not None)
        launched = coefficients_launch(*how, flat(program.code), program.outputs)
        return Ready(coefficients, device, launched, (), (*names, *others), ("stream", "sample_offset"))

    _kept(_store(program), key, make)((), (*written, *given), (stream, first))


def _columns(program: Program, t: Tensor) -> Tensor:
    """All that the program computes at the times ``t``: [outputs, batch], float32."""
    columns = torch.empty((len(program.outputs), len(t)), dtype=torch.float32, device=t.device)
    _compute(program, t.device, t, None, 0, 0, columns, None)
    return columns


def _draw(
    program: Program, draw: tuple[Program, int], made: tuple, samples: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Times, and ``_columns`` at them where they are not looked up."""
    t = torch.empty(samples, dtype=torch.int64 if program.index else torch.float64, device=device)
    if program.index:
        _compute(draw[0], device, None, made[0], draw[1], made[2], None, t)
        return t, None
    columns = torch.empty((len(program.outputs), samples), dtype=torch.float32, device=device)
    _compute(program.after(draw[0]), device, None, made[0], draw[1], made[2], columns, t)
    return t, columns


def _changing(program: Program, names: tuple[str, ...], t: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
    """The arguments of a launch that change with the times: the index into a table, or the coefficients ``names``."""
    if columns is None:
        return (t,)
    chosen = program.kept.get((itemgetter, names))
    if chosen is None:
        places = [program.names.index(name) for name in names]
        chosen = program.kept[itemgetter, names] = itemgetter(*places, 0)  # of two or more: a tuple
    return chosen(columns.unbind(0))[:-1]


def _placed(
    program: Program, names: tuple[str, ...], changing: Sequence[Tensor], shape: tuple[int, ...]
) -> Sequence[Any]:
    """The coefficients, placed to broadcast to [B, ...]."""
    if not program.index:
        return [row.view(shape) for row in changing]
    index = changing[0].view(shape)
    return [Gathered(column, index) for column in program.of(*names).columns(index.device, torch.float32).unbind(1)]


# ---- noise


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
    packed: Any = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None] | None:
    """(x_t, the noise if it was made and kept, the times, the coefficients if they are not looked up), with one time a
    sample; or None. See ``native/fast.py`` for the arguments."""
    device, shape = x0.device, x0.shape
    if packed is not None:  # it takes the general way
        return None
    if not _plain(device, x0, n, t) or (n is not None and n.shape != shape) or (n is None and made[3] and x0.ndim < 3):
        return None
    if t is not None and not _has_time(program, t, x0):
        return None
    if _grad() and (x0.requires_grad or (n is not None and n.requires_grad)):
        return None
    seeded = None
    if n is None:
        seed, kind = seed_of(made[0], device)
        seeded = Seeded(seed, *made[1:], rng)
        how = kind, type(seeded.sample_offset), bool(seeded.offset), rng
    else:
        how = n.dtype
    key = ("noise", shape, x0.dtype, dtype, device, how, keep)
    store = _store(program)
    ready = store.get(key)
    if ready is None and not _fits(device, x0, n, images=dtype is not None):
        return None
    columns = None
    if t is None:
        t, columns = _draw(program, draw, made, shape[0], device)
    elif not program.index:
        columns = _columns(program, t)
    changing = _changing(program, OF_NOISE, t, columns)
    x_t = torch.empty_like(x0, dtype=dtype)
    kept = torch.empty(shape, dtype=torch.float32, device=device) if keep and seeded is not None else None
    if ready is None:
        ready = _kept(store, key, lambda: _ready_affine(program, OF_NOISE, changing, x_t, kept, x0, n, seeded))
    data = (x_t, x0) if kept is None else (x_t, x0, kept)
    if seeded is None:
        ready((*data, n), changing)
    else:
        first, ids = samples_on(device, seeded.sample_offset)
        ready(data, (*changing, seeded.seed, ids), (seeded.stream, first, seeded.offset))
    return x_t, kept, t, columns


def _fits(device: torch.device, *data: Tensor | None, images: bool = False) -> bool:
    return arguments.runs_on(device) and arguments.fits(*data, images=images) and bool(data[0].numel())


def _ready_affine(program, names, changing, out, kept, u, given, made) -> Ready:
    """The launch of out = a u + b n, kept = n, where n is given or made."""
    shape = (u.shape[0],) + (1,) * (u.ndim - 1)
    a, b = _placed(program, names, changing, shape)
    n = made if given is None else given
    how = affine_launch(tuple(u.shape), u.device, u, a, n, b, out, kept)
    data = ("out", "u") if kept is None else ("out", "u", "kept")
    others = ("index",) if program.index else ("a", "b")
    if made is None:
        return Ready(affine, u.device, how, (*data, "v"), others)
    return Ready(affine, u.device, how, data, (*others, *_MADE), _NUMBERS)


def convert(program: Program, m: Tensor, x_t: Tensor, t: Any) -> Tensor | None:
    """k_x x_t + k_m m in the dtype of m, one row (k_x, k_m) of a table a sample."""
    device, shape = m.device, m.shape
    if not _plain(device, m, x_t, t) or not _has_time(program, t, m) or x_t.shape != shape:
        return None
    if _grad() and (m.requires_grad or x_t.requires_grad):
        return None
    key, store = ("convert", shape, m.dtype, x_t.dtype, device), _store(program)
    ready = store.get(key)
    if ready is None and not _fits(device, m, x_t):
        return None
    out = torch.empty_like(m)
    if ready is None:
        ready = _kept(store, key, lambda: _ready_affine(program, program.names, (t,), out, None, x_t, m, None))
    ready((out, x_t, m), (t,))
    return out


# ---- loss


class _Losses(NamedTuple):
    """The launches of a loss at one shape; where the forward is given the upstream gradient, there is no backward.
    ``kind`` tells it apart from other losses, see ``workspace.cell``."""

    forward: Ready
    backward: Ready | None
    kind: tuple


def loss(
    program: Program,
    present: int,
    function: str,
    prediction: Tensor,
    x0: Tensor | None,
    n: Any,
    t: Any,
    columns: Tensor | None,
    record: Callable[..., LossCall],
    how: tuple[Tensor | None, str, Tensor | float | None, str],
    packed: Any = None,
    upstream: Tensor | float | None = None,
) -> Any:
    """The mean loss of a batch with one time a sample, recorded for autograd; or None. See ``native/fast.py`` for the
    arguments.

    Args:
        n: a tensor [batch, ...], a ``fastdiff.ops.Philox`` that makes it, or None.
        columns: the coefficients that ``noise`` has computed, float32 [names of ``program``, batch]; or None.
    """
    mask, reduction, weight, normalization = how
    if mask is not None or reduction != "mean" or weight is not None or normalization != "none":
        return None
    device, shape = prediction.device, prediction.shape
    given = n if isinstance(n, Tensor) else None
    if packed is not None or not _plain(device, prediction, x0, given, t) or not _has_time(program, t, prediction):
        return None
    for data in (x0, given):
        if data is not None and (data.shape != shape or (data.requires_grad and _grad())):
            return None
    made = None
    if n is not None and given is None:
        seed, kind = seed_of(n.seed, device)
        made = Seeded(seed, n.stream, n.sample_offset, n.offset, n.rng)
        how = kind, type(made.sample_offset), bool(made.offset), made.rng
    else:
        how = None if given is None else given.dtype
    both = upstream is not None
    if both and not _plain(device, upstream := single(upstream, device)):
        return None
    recorded = not both and prediction.requires_grad and _grad()
    # A float16 loss is scaled; the size of its gradient is known only in the backward.
    ahead = recorded and prediction.dtype is not torch.float16
    key = ("loss", shape, prediction.dtype, device, None if x0 is None else x0.dtype, how, ahead, both)
    store = _store(program)
    ready = store.get(key)
    if ready is None and not _fits(device, prediction, x0, given, images=True):
        return None
    if ready is None and made is not None and made.offset and len(shape) < 3:
        return None
    names = _names(present)
    if columns is None and not program.index:
        columns = _columns(program, t)
    changing = _changing(program, names, t, columns)
    if ready is None:
        ready = _kept(
            store,
            key,
            lambda: _ready_losses(program, names, function, prediction, x0, given, made, changing, ahead, both, key),
        )
    if both:
        d = torch.empty_like(prediction)
        return _forward(ready, changing, prediction, x0, given, made, (d,), (upstream,)), d
    if not recorded:
        return _forward(ready, changing, prediction, x0, given, made)
    written, cells, there = (), (), None
    if ahead:
        d, used = torch.empty_like(prediction), torch.empty(1, dtype=torch.float32, device=device)
        last = cell(device, ready.kind)
        written, cells, there = (d,), (used, last.value), (d, used, last)
    value = _forward(ready, changing, prediction, x0, given, made, written, cells)
    tensors = () if made is None else [v for v in (made.seed, made.sample_offset) if isinstance(v, Tensor)]

    def again(tensors, upstream, there):
        if there is None or not _plain(device, upstream) or upstream.dtype is not torch.float32:
            return general.gradient(upstream, record(*tensors), reference.backend)
        d, used, last = there
        prediction, x0, given, *_ = tensors
        cells = used, of_this_stream(last, device).value
        _launch(ready.backward, changing, prediction, x0, given, made, (d,), (upstream, *cells))
        return d

    kept = (prediction, x0, given, t, *tensors)
    return general.recorded(prediction, None, (value, None, None, there), kept, record, again, reference.backend)


@lru_cache
def _names(present: int) -> tuple[str, ...]:
    return tuple(name for k, name in enumerate(OF_LOSS) if present >> k & 1)


_OPERANDS = {"loss_weight": "weight"}  # what the kernel calls a coefficient; any other has its own name


def _ready_losses(program, names, function, prediction, x0, given, made, changing, ahead, both, key) -> _Losses:
    device, own = prediction.device, (prediction.shape[0],) + (1,) * (prediction.ndim - 1)
    found = dict(zip(names, _placed(program, names, changing, own)))
    p, q, scale, weight, c = (found.get(name) for name in OF_LOSS)
    n = made if given is None else given
    laid = general.lay(LossCall(prediction, x0, n, p, q, scale, weight, c))
    how = function, "none", "mean"
    d, one = torch.empty_like(prediction), torch.empty((), dtype=torch.float32, device=device)
    used = one.view(1)
    data = tuple(name for name, there in (("x0", x0), ("n", given)) if there is not None)
    operands = ("index",) if program.index else tuple(_OPERANDS.get(name, name) for name in names)
    seed, numbers = ((), ()) if made is None else (_MADE, _NUMBERS)
    written, cells = (("gradient",), ("used", "assumed")) if ahead else ((), ())

    def of(gradient: bool, data: tuple, others: tuple, **more: Any) -> Ready:
        more |= {"used": used, "assumed": used} if ahead else {}
        launched = general.loss_launch(laid, *how, d if gradient else None, **more)
        return Ready(general.loss, device, launched, ("prediction", *data), (*operands, *seed, *others), numbers)

    if both:
        others = "counters", "partials", "result", "upstream"
        return _Losses(of(True, (*data, "gradient"), others, result=one, upstream=one), None, key)
    return _Losses(
        of(ahead, (*data, *written), ("counters", "partials", "result", *cells), result=one),
        of(True, (*data, "gradient"), ("upstream", *cells), upstream=one),
        (id(program), *key),  # a hint: another objective's losses are others
    )


def _forward(ready: _Losses, changing, prediction, x0, given, made, written=(), cells=()) -> Tensor:
    device, of = prediction.device, ready.forward
    result = torch.empty((), dtype=torch.float32, device=device)
    space = loss_workspace(device, of["rows"], of["parts"], of["number"])
    _launch(of, changing, prediction, x0, given, made, written, (*space, result, *cells))
    return result


def _launch(ready: Ready, changing, prediction, x0, given, made, written, others) -> None:
    data = tuple(tensor for tensor in (prediction, x0, given, *written) if tensor is not None)
    if made is None:
        ready(data, (*changing, *others))
    else:
        first, ids = samples_on(prediction.device, made.sample_offset)
        ready(data, (*changing, made.seed, ids, *others), (made.stream, first, made.offset))
