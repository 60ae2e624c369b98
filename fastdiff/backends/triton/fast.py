"""Fast calls on a GPU: sequences of launches that are kept by dtypes and shape (``sequence.py``), of which pointers and
numbers change from step to step. They are the launches of the general way. The arguments are those of
``backends/native/fast.py``; a call that is not supported returns None, and the general way does it, or refuses it.

A training step is four launches at most: times with all coefficients of a continuous process, x_t, the loss with its
gradient, and the backward, which compares.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ... import modes
from ...calls import Combination, LossCall
from ...program import OF_LOSS, OF_NOISE, Program
from ...tensors import Gathered, value_checks_are_free
from .. import reference
from . import arguments
from . import loss as general
from .affine import affine, affine_launch
from .arguments import Seeded, samples_on, seed_of
from .laid import lay
from .launch import are_recorded, prepare_captures, unprepared
from .programs import coefficients, flat
from .sequence import Kept, Launches, Shares, Value
from .times import coefficients_launch, constants_of
from .workspace import cell, loss_workspace, of_this_stream, single

_grad, _wrapping = torch.is_grad_enabled, modes.wrapping
# The arguments of a call, beside its name, which is the first.
_NOISE = "x0", "t", "n", "seed", "stream", "sample_offset", "strength", "draw", "stream_of_t", "keep", "fast", "dtype"
_LOSS = "prediction", "x0", "n", "t", "columns", "seed", "stream", "sample_offset", "strength", "fast"
_BOTH = *_LOSS, "upstream"
_BACKWARD = *_BOTH, "gradient", "used", "assumed"


def _plain(device: torch.device, *tensors: Any) -> bool:
    """Whether these are ordinary contiguous tensors on the device. None is passed over."""
    for t in tensors:
        if t is not None and not (type(t) is Tensor and t.is_contiguous() and t.device == device and not t.is_neg()):
            return False
    return _wrapping() is None


def _has_time(program: Program, t: Any, data: Tensor) -> bool:
    """Whether there is one time for each sample, of a dtype that the program takes, and in range: on a GPU, where
    looking would wait for it, one that is not gives NaN, or what the formula gives. (``t`` is plain.)"""
    kinds = (torch.int64,) if program.index else (torch.float64, torch.float32)
    if t is None or t.dtype not in kinds or t.shape != data.shape[:1] or (t.requires_grad and _grad()):
        return False
    return not value_checks_are_free(t) or all(program.low <= time <= program.high for time in t.tolist())


def _kept(program: Program) -> Kept:
    """The sequences of a program."""
    found = program.kept.get(_kept)
    if found is None:
        found = program.kept[_kept] = Kept()
    return found


def declined(program: Program) -> str:
    """Why C++ does not launch the kernels of a program; empty if it does, or none was launched yet."""
    return _kept(program).declined


def _fits(device: torch.device, *data: Tensor | None, images: bool = False) -> bool:
    return arguments.runs_on(device) and arguments.fits(*data, images=images) and bool(data[0].numel())


# ---- the parts of sequences


def _seed(values: dict[str, Any], device: torch.device) -> str:
    """The kind of the seed among ``values``; it becomes what a kernel takes."""
    values["seed"], kind = seed_of(values["seed"], device)
    if isinstance(values["sample_offset"], Tensor):
        _, values["sample_offset"] = samples_on(device, values["sample_offset"])
    return kind


def _of_seed(values: dict[str, Any], stream: str = "stream") -> dict[str, Value]:
    """What changes of noise, or of uniforms, that are made from ``values``."""
    samples = "ids" if isinstance(values["sample_offset"], Tensor) else "sample_offset"
    return {"seed": Value("seed"), "stream": Value(stream), samples: Value("sample_offset")}


def _add_rows(to: Launches, program: Program, values: dict[str, Any], draw: Program | None = None) -> None:
    """The launch that draws t, if there is a ``draw``, and computes all coefficients of a program at t. What is looked
    up by t needs none. Adds examples of what it makes to ``values``."""
    t, device, changing = values["t"], to.device, {}
    samples, joined, drawn, columns = len(next(iter(values.values()))), program, None, None
    if draw is not None:
        joined = draw if program.index else program.after(draw)
        drawn = _small(to, "drawn", values, (samples,), torch.int64 if program.index else torch.float64)
        changing = {"drawn": Value("drawn"), **_of_seed(values, "stream_of_t")}
    elif program.index:
        return
    else:
        changing = {"times": Value("t")}
    if not program.index:
        columns = _small(to, "columns", values, (len(program.outputs), samples))
        changing["columns"] = Value("columns")
    seeded = (None, 0, 0) if draw is None else (values["seed"], values["stream_of_t"], values["sample_offset"])
    seed, stream, first = seeded
    how = columns, drawn, t, seed, constants_of(joined, device), stream, first, samples
    to.add(coefficients, coefficients_launch(*how, flat(joined.code), joined.outputs), changing)


def _placed(
    program: Program, names: tuple[str, ...], values: dict[str, Any], shape: tuple[int, ...], operands: tuple[str, ...]
) -> tuple[list[Any], dict[str, Value]]:
    """The coefficients ``names``, placed to broadcast to [B, ...], and what changes of a launch that calls them
    ``operands``."""
    time = "drawn" if values["t"] is None else "t"
    if program.index:
        index = values[time].view(shape)
        table = program.of(*names).columns(index.device, torch.float32)
        return [Gathered(column, index) for column in table.unbind(1)], {"index": Value(time)}
    rows = [program.names.index(name) for name in names]
    changing = {operand: Value("columns", row) for operand, row in zip(operands, rows)}
    return [values["columns"][row].view(shape) for row in rows], changing


def _add_affine(to: Launches, placed: tuple[list[Any], dict[str, Value]], values: dict[str, Any], n: Any) -> None:
    """The launch of x_t = a x0 + b n, kept = n, where n is given or made."""
    (a, b), changing = placed
    out, kept, x0 = (values.get(name) for name in ("x_t", "kept", "x0"))
    how = affine_launch(tuple(x0.shape), to.device, x0, a, n, b, out, kept)
    changing |= {"out": Value("x_t"), "u": Value("x0")}
    if kept is not None:
        changing["kept"] = Value("kept")
    changing |= {"v": Value("n")} if isinstance(n, Tensor) else _of_noise(values)
    to.add(affine, how, changing)


def _of_noise(values: dict[str, Any]) -> dict[str, Value]:
    return _of_seed(values) | {"strength": Value("strength")}


def _made(values: dict[str, Any]) -> Seeded:
    """The noise that is made from ``values``."""
    seed, stream, samples, strength = (values[name] for name in ("seed", "stream", "sample_offset", "strength"))
    return Seeded(seed, stream, samples, strength, "fast" if values["fast"] else "exact")


def _small(
    to: Launches, name: str, values: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Has a small tensor made, and adds an example of it to ``values``."""
    to.made[name] = shape, dtype
    return to.make(name, values)


def _like(to: Launches, name: str, values: dict[str, Any], argument: str, dtype: torch.dtype | None = None) -> Tensor:
    """Has a tensor made like an argument, in its dtype or another, and adds an example of it to ``values``."""
    to.made[name] = argument, dtype or values[argument].dtype
    return to.make(name, values)


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
    if packed is not None:  # it takes the general way
        return None
    given = ("noise", x0, t, n, *made, *(draw or (None, 0)), keep, rng == "fast", dtype)
    if unprepared:
        prepare_captures()
    kept, done = _kept(program), False
    if not are_recorded():
        done = kept.run(*given)
        if type(done) is tuple:
            return done
    device, shape = x0.device, x0.shape
    if not _plain(device, x0, n, t) or (n is not None and n.shape != shape) or (n is None and made[3] and x0.ndim < 3):
        return None
    if t is not None and not _has_time(program, t, x0):
        return None
    if _grad() and (x0.requires_grad or (n is not None and n.requires_grad)):
        return None
    values = dict(zip(_NOISE, given[1:]))
    kind = None if n is not None and t is not None else _seed(values, device)
    samples = type(values["sample_offset"])
    how = bool(made[3]), rng if n is None else n.dtype, None if t is None else t.dtype
    key = ("noise", shape, x0.dtype, dtype, device, kind, samples, *how, keep, values["draw"])
    sequence = kept.get(key, lambda: _noising(program, device, dict(values)))
    if sequence is None:
        return None
    done_here, variants = sequence.run(values)
    if done is None:
        kept.keep(sequence, ("", *_NOISE), given, values, variants)
    return done_here


def _noising(program: Program, device: torch.device, values: dict[str, Any]) -> Launches | None:
    x0, n, kept = values["x0"], values["n"], values["keep"] and values["n"] is None
    if not _fits(device, x0, n, images=values["dtype"] is not None):
        return None
    returned = (
        *("x_t", "kept" if kept else None, "drawn" if values["t"] is None else "t"),
        None if program.index else "columns",
    )
    to = Launches(device, returned)
    _add_rows(to, program, values, values["draw"] if values["t"] is None else None)
    _like(to, "x_t", values, "x0", values["dtype"])
    if kept:
        _like(to, "kept", values, "x0", torch.float32)
    own = (len(x0),) + (1,) * (x0.ndim - 1)
    _add_affine(to, _placed(program, OF_NOISE, values, own, ("a", "b")), values, _made(values) if n is None else n)
    return to


def convert(program: Program, m: Tensor, x_t: Tensor, t: Any) -> Tensor | None:
    """k_x x_t + k_m m in the dtype of m, one row (k_x, k_m) of a table a sample."""
    given, kept, done = ("convert", m, x_t, t), _kept(program), False
    if not are_recorded():
        done = kept.run(*given)
        if type(done) is tuple:
            return done[0]
    device, shape = m.device, m.shape
    if not _plain(device, m, x_t, t) or not _has_time(program, t, m) or x_t.shape != shape:
        return None
    if _grad() and (m.requires_grad or x_t.requires_grad):
        return None
    values = {"x0": x_t, "n": m, "t": t}

    def make() -> Launches | None:
        if not _fits(device, m, x_t):
            return None
        to, own = Launches(device, ("x_t",)), (len(m),) + (1,) * (m.ndim - 1)
        example = dict(values)
        _like(to, "x_t", example, "n")
        _add_affine(to, _placed(program, program.names, example, own, ("a", "b")), example, m)
        return to

    sequence = kept.get(("convert", shape, m.dtype, x_t.dtype, device), make)
    if sequence is None:
        return None
    (out,), variants = sequence.run(values)
    if done is None:
        kept.keep(sequence, ("", "n", "x0", "t"), given, values, variants)
    return out


# ---- loss


def loss(
    program: Program,
    present: int,
    function: str | Combination,
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
    if mask is not None or reduction != "mean" or weight is not None or normalization != "none" or packed is not None:
        return None
    if n is None or isinstance(n, Tensor):
        given, source = n, (None, 0, 0, 0.0, False)
    else:
        given, source = None, (n.seed, n.stream, n.sample_offset, n.offset, n.rng == "fast")
    given, done = ("loss", prediction, x0, given, t, columns, *source), False
    if upstream is not None:
        given = ("both", *given[1:], single(upstream, prediction.device))
    kept = _kept(program)
    if not are_recorded():
        done = kept.run(*given)
    if type(done) is not tuple:
        done = _loss(kept, program, present, function, given, done is None)
    if done is None or upstream is not None:
        return done
    value, *there, columns = done
    if not (prediction.requires_grad and _grad()):
        return value
    there = None if there[0] is None else there
    tensors = (prediction, x0, given[3], t, *[v for v in source[:3] if isinstance(v, Tensor)])

    def again(tensors, upstream, there):
        if there is not None:
            found = _backward(
                program, present, function, ("backward", *tensors[:4], columns, *source, upstream, *there)
            )
            if found is not None:
                return found
        return general.gradient(upstream, record(*tensors), reference.backend)

    return general.recorded(prediction, None, (value, None, None, there), tensors, record, again, reference.backend)


def _loss(
    kept: Kept, program: Program, present: int, function: str | Combination, given: tuple, tell: bool
) -> tuple | None:
    """(the loss; the gradient, the upstream gradient that it is for and its cell, or three None; the coefficients
    if they are not looked up); with an upstream gradient given, (the loss, the gradient); or None. ``tell``: C++ has
    not been told how."""
    names = _LOSS if given[0] == "loss" else _BOTH
    values = dict(zip(names, given[1:]))
    prediction, x0, n, t = given[1:5]
    device, shape, makes = prediction.device, prediction.shape, values["seed"] is not None
    if not _plain(device, prediction, x0, n, t, values.get("upstream")) or not _has_time(program, t, prediction):
        return None
    for data in (x0, n):
        if data is not None and (data.shape != shape or (data.requires_grad and _grad())):
            return None
    if makes and values["strength"] and len(shape) < 3:
        return None
    # A float16 loss is scaled; the size of its gradient is known only in the backward.
    ahead = names is _LOSS and prediction.requires_grad and _grad() and prediction.dtype is not torch.float16
    key = (given[0], *_kind(values, device), ahead)
    sequence = kept.get(key, lambda: _losses(program, present, function, dict(values), device, ahead, key))
    if sequence is None:
        return None
    (values["counters"], values["partials"]), token = sequence.shares.space()[2], None
    if ahead:
        token = sequence.shares.cell()
        values["assumed"] = token[2].value
    done, variants = sequence.run(values)
    if tell:
        kept.keep(sequence, ("", *names), given, values, variants)
    return (*done[:3], token, done[4]) if names is _LOSS else done


def _backward(program: Program, present: int, function: str | Combination, given: tuple) -> Tensor | None:
    """The gradient for an upstream gradient; None where that is not plain."""
    kept, done = _kept(program), False
    if not are_recorded():
        done = kept.run(*given)
        if type(done) is tuple:
            return done[0]
    values = dict(zip(_BACKWARD, given[1:]))
    device, upstream = values["prediction"].device, values["upstream"]
    if not _plain(device, upstream) or upstream.dtype is not torch.float32:
        return None
    key = "backward", *_kind(values, device)
    values["assumed"] = of_this_stream(values["assumed"][2], device).value
    sequence = kept.get(key, lambda: _losses(program, present, function, dict(values), device))
    (gradient,), variants = sequence.run(values)
    if done is None:
        kept.keep(sequence, ("", *_BACKWARD), given, values, variants)
    return gradient


def _kind(values: dict[str, Any], device: torch.device) -> tuple:
    """What sequences of a loss are told apart by. The seed among ``values`` becomes what a kernel takes."""
    prediction, x0, n = values["prediction"], values["x0"], values["n"]
    kind = None if values["seed"] is None else _seed(values, device)
    types = prediction.dtype, None if x0 is None else x0.dtype, None if n is None else n.dtype, values["t"].dtype
    samples, strength = type(values["sample_offset"]), bool(values["strength"])
    return prediction.shape, device, *types, kind, samples, strength, values["fast"], values["columns"] is None


@lru_cache
def _names(present: int) -> tuple[str, ...]:
    return tuple(name for k, name in enumerate(OF_LOSS) if present >> k & 1)


_OPERANDS = {"loss_weight": "weight"}  # what the kernel calls a coefficient; any other has its own name


def _losses(
    program: Program, present: int, function: str | Combination, values: dict[str, Any], device: torch.device,
    ahead: bool = False, kind: tuple = (),
) -> Launches | None:  # fmt: skip
    """The sequence of a loss, with its gradient if that is written ``ahead``, or if an upstream gradient is among
    ``values``; or, where a gradient is there already, of the gradient alone. ``kind`` tells a loss apart from others,
    see ``workspace.cell``. None where the kernel does not take such data."""
    prediction, x0, n = (values[name] for name in _LOSS[:3])
    if not _fits(device, prediction, x0, n, images=True):
        return None
    backward, both = "gradient" in values, "upstream" in values
    columns = None if program.index else "columns"
    written = ("gradient", "used", "assumed") if ahead else (None,) * 3
    returned = ("result", "gradient") if both else ("result", *written, columns)
    to = Launches(device, ("gradient",) if backward else returned)
    if values["columns"] is None:
        _add_rows(to, program, values)
    gradient = values.get("gradient")
    if not backward:
        what = {"result": _small(to, "result", values, ())}
        changing = {name: Value(name) for name in ("result", "counters", "partials")}
        if ahead or both:
            gradient = _like(to, "gradient", values, "prediction")
            changing["gradient"] = Value("gradient")
        if both:
            what["upstream"], changing["upstream"] = values["upstream"], Value("upstream")
        if ahead:
            what["used"] = what["assumed"] = _small(to, "used", values, (1,))
            changing |= {name: Value(name) for name in ("used", "assumed")}
    else:
        what = {name: values[name] for name in ("used", "assumed", "upstream")}
        changing = {name: Value(name) for name in ("gradient", *what)}
    names, own = _names(present), (len(prediction),) + (1,) * (prediction.ndim - 1)
    placed, of_rows = _placed(program, names, values, own, tuple(_OPERANDS.get(name, name) for name in names))
    p, q, scale, weight, c = (dict(zip(names, placed)).get(name) for name in OF_LOSS)
    changing |= of_rows | {name: Value(name) for name in ("prediction", "x0", "n") if values[name] is not None}
    if values["seed"] is not None:
        n, changing = _made(values), changing | _of_noise(values)
    laid = lay(LossCall(prediction, x0, n, p, q, scale, weight, c))
    launched = general.loss_launch(laid, function, "none", "mean", gradient, **what)
    to.add(general.loss, launched, changing)
    if not backward:
        sizes = (launched[1][general.loss.runtime.index(name)] for name in ("rows", "parts", "number"))
        to.shares = Shares(
            partial(_space, device, *sizes), partial(_token, device, (id(program), *kind)) if ahead else None
        )
    return to


def _space(device: torch.device, *sizes: int) -> tuple[int, int, Any]:
    space = loss_workspace(device, *sizes)
    return space[0].data_ptr(), space[1].data_ptr(), space


def _token(device: torch.device, kind: tuple) -> tuple[int, int, Any]:
    taken = cell(device, kind)  # of another objective it is another
    return taken.value.data_ptr(), taken.owner[2], taken
