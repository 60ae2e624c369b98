"""Times, and the coefficients at them: the launches of coefficient programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...calls import UniformCall
from ...program import Program
from ...tensors import Gathered, cached
from ..interface import differentiable
from . import arguments
from .arguments import TYPES, device_of, samples_on, seed_of, untouched
from .programs import coefficients, flat

_ROWS = 128  # a program


def coefficients_launch(
    columns: Tensor | None, drawn: Tensor | None, times: Tensor | None, seed: int | Tensor | None,
    constants: Tensor | None, stream: int, sample_offset: int | Tensor, rows: int,
    code: tuple[int, ...] = (0,) * 5, outputs: tuple[int, ...] = (0,), each: int = 1,
) -> tuple[tuple[int, int], tuple, tuple]:  # fmt: skip
    """The launch that runs a program for each row, ``each`` of a sample. The default program returns the uniform
    itself. See ``programs.coefficients``."""
    device = (drawn if drawn is not None else times).device
    seed, kind = (None, "number") if seed is None else seed_of(seed, device)
    first, ids = samples_on(device, sample_offset)
    given = columns, drawn, times, seed, ids, constants, stream, first, rows, each
    return (-(-rows // _ROWS), 1), given, (code, outputs, kind, _ROWS)


def constants_of(program: Program, device: torch.device) -> Tensor | None:
    """The constants of a program on ``device``, float64."""
    if not program.numbers:
        return None

    def make() -> Tensor:
        return torch.tensor(program.numbers, dtype=torch.float64, device="cpu").to(device)

    return cached(program.kept, ("constants", device), make)


def evaluate(program: Program, t: Tensor, dtype: torch.dtype) -> Sequence[Any] | None:
    """See ``Backend.evaluate``; rows of a table are gathered by the kernels. None if these times are not for this
    backend."""
    usable = untouched() and type(t) in TYPES and arguments.runs_on(t.device) and dtype == torch.float32
    if program.index:
        if not usable:
            return None
        index = t.long()
        return [Gathered(column, index) for column in program.columns(t.device, dtype).unbind(1)]
    if not usable or not t.is_floating_point() or not t.numel() or differentiable(t):
        return None
    t = (t if t.dtype is torch.float32 else t.double()).contiguous()
    columns = torch.empty((len(program.outputs), *t.shape), dtype=torch.float32, device=t.device)
    how = columns, None, t, None, constants_of(program, t.device), 0, 0, t.numel()
    coefficients(t.device, *coefficients_launch(*how, flat(program.code), program.outputs))
    return columns.unbind(0)


def times(program: Program, call: UniformCall, discrete: bool) -> Tensor | None:
    """See ``Backend.times``."""
    where = device_of(call.device, call.seed)
    if not untouched() or not arguments.runs_on(where) or 0 in call.shape:
        return None
    t = torch.empty(call.shape, dtype=torch.int64 if discrete else torch.float64, device=where)
    how = None, t, None, call.seed, constants_of(program, where), call.stream, call.sample_offset, t.numel()
    coefficients(where, *coefficients_launch(*how, flat(program.code), program.outputs, call.count or 1))
    return t
