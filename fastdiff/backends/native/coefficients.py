"""Coefficients on the CPU: ``fastdiff._C`` runs the program, in float64 and rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...calls import UniformCall
from ...modes import lasting
from ...program import Program, lookup
from ...torch_access import _C
from ..interface import differentiable
from .launch import makes, memory, samples, unsuited


def handle(program: Program, names: tuple[str, ...]) -> Any:
    """The object of ``fastdiff._C`` for the part of a program that computes ``names``; kept with the program."""
    found = program.kept.get((_C, names))
    if found is None:
        part = program if names == program.names else program.of(*names)
        if part.index and all(part.code[output][0] in ("lookup", "number") for output in part.outputs):
            # As rows of a table that has nothing else.
            with lasting():
                part = lookup(part.columns(torch.device("cpu"), torch.float64), names)
        places = {name: k for k, name in enumerate(_C.codes["operations"])}
        code = tuple((places[operation], *(*operands, 0, 0, 0)[:3]) for operation, *operands in part.code)
        table, height, width = None, 0, 0
        if part.table is not None:
            table, (height, width) = memory(part.table), part.table.shape
        found = program.kept[_C, names] = _C.coefficient_program(
            code, part.numbers, part.outputs, table, height, width, part.index, part.low, part.high
        )
    return found


def evaluate(program: Program, t: Tensor, dtype: torch.dtype) -> Sequence[Any] | None:
    """See ``Backend.evaluate``; None if these times are not for this backend."""
    if unsuited(t) or differentiable(t) or program.index != (not t.is_floating_point()):
        return None
    if program.index:
        t = t.long()
    elif t.dtype is not torch.float32:
        t = t.double()
    held, columns = t.contiguous(), len(program.outputs)
    rows = torch.empty((columns, *t.shape), dtype=dtype, device="cpu")
    if not _C.coefficients(handle(program, program.names), columns, memory(held), memory(rows)):
        return None
    return rows.unbind(0)


def times(program: Program, call: UniformCall, discrete: bool) -> Tensor | None:
    """See ``Backend.times``."""
    if makes(call.seed, call.sample_offset, call.device) or 0 in call.shape:
        return None
    out = torch.empty(call.shape, dtype=torch.int64 if discrete else torch.float64, device="cpu")
    offset = samples(call.sample_offset)
    _C.times(handle(program, program.names), memory(out), int(call.seed), call.stream, offset, call.samples)
    return out
