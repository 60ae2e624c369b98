"""The kernel of coefficient programs (``fastdiff.program``): seed -> uniform -> time -> coefficients, in float64.

It goes through a program while it is compiled: there is one kernel for each list of operations, whatever the numbers.
The functions are those of the device's library, which the interpreter has not; there PyTorch's stand in for them.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from ...program import OPERATIONS
from .interpreter import interpreted
from .launch import Kernel, launches
from .philox import words

# The numbers of operations. (Only a kernel may use them: see step.py.)
(
    INPUT, NUMBER, LOOKUP, NEG, ABS, SIGN, SQRT, RECIPROCAL, EXP, LOG, EXPM1, LOG1P, SIN, COS, TAN, ATAN, TANH, SIGMOID,
    ERF, NDTRI, FLOOR, CEIL, TRUNC, ISNAN, ISINF, NOT, ADD, SUB, MUL, DIV, POW, HYPOT, MAXIMUM, MINIMUM, EQ, LT, LE,
    AND, OR, WHERE,
) = (tl.constexpr(k) for k in range(len(OPERATIONS)))  # fmt: skip


def flat(code: tuple[tuple[Any, ...], ...]) -> tuple[int, ...]:
    """The code of a program as the kernel takes it: operation, three registers and the place of a number, for each."""
    found: list[int] = []
    for operation, *operands in code:
        number = operation == "number"
        found += (
            _PLACES[operation],
            *((0, 0, 0) if number else (*operands, 0, 0, 0)[:3]),
            operands[0] if number else 0,
        )
    return tuple(found)


_PLACES = {name: k for k, name in enumerate(OPERATIONS)}


class _StandIns:
    """Functions of ``libdevice`` by those of PyTorch, on the interpreter's tensors."""

    def __getattr__(self, name):
        function = getattr(torch, name)

        def call(*operands):
            found = function(*(torch.from_numpy(o.handle.data.copy()) for o in operands)).numpy()
            return tl.core.tensor(TensorHandle(found, operands[0].handle.dtype), operands[0].type)

        return call


if interpreted():
    library = _StandIns()
else:
    from triton.language.extra import libdevice as library


@triton.jit
def _ndtri(u):
    """The quantile function of the normal distribution: Moshier's Cephes, as PyTorch has it."""
    upper = u > 0.8646647167633873
    y = tl.where(upper, 1.0 - u, u)
    # The middle.
    a = y - 0.5
    s = a * a
    p = _polynomial(
        s, (-59.96335010141079, 98.00107541859997, -56.67628574690703, 13.931260938727968, -1.2391658386738125)
    )
    q = _polynomial(
        s,
        (1.0, 1.9544885833814176, 4.676279128988815, 86.36024213908905, -225.46268785411937, 200.26021238006066,
         -82.03722561683334, 15.90562251262117, -1.1833162112133),
    )  # fmt: skip
    middle = (a + a * (s * p / q)) * 2.5066282746310007
    # The tails.
    x = library.sqrt(-2.0 * library.log(y))
    z = 1.0 / x
    p = _polynomial(
        z,
        (4.0554489230596245, 31.525109459989388, 57.16281922464213, 44.08050738932008, 14.684956192885803,
         2.1866330685079025, -0.1402560791713545, -0.03504246268278482, -0.0008574567851546854),
    )  # fmt: skip
    q = _polynomial(
        z,
        (1.0, 15.779988325646675, 45.39076351288792, 41.3172038254672, 15.04253856929075, 2.504649462083094,
         -0.14218292285478779, -0.03808064076915783, -0.0009332594808954574),
    )  # fmt: skip
    near = z * p / q
    p = _polynomial(
        z,
        (3.2377489177694603, 6.915228890689842, 3.9388102529247444, 1.3330346081580755, 0.20148538954917908,
         0.012371663481782003, 0.00030158155350823543, 2.6580697468673755e-06, 6.239745391849833e-09),
    )  # fmt: skip
    q = _polynomial(
        z,
        (1.0, 6.02427039364742, 3.6798356385616087, 1.3770209948908132, 0.21623699359449663, 0.013420400608854318,
         0.00032801446468212774, 2.8924786474538068e-06, 6.790194080099813e-09),
    )  # fmt: skip
    rest = tl.where(x < 8.0, near, z * p / q)
    first = x - library.log(x) / x
    tail = tl.where(upper, first - rest, rest - first)
    found = tl.where(y > 0.1353352832366127, middle, tail)
    found = tl.where(u == 0.0, float("-inf"), tl.where(u == 1.0, float("inf"), found))
    return tl.where((u >= 0.0) & (u <= 1.0), found, float("nan"))


@triton.jit
def _polynomial(x, C: tl.constexpr):
    value = tl.full(x.shape, C[0], tl.float64)
    for k in tl.static_range(1, len(C)):
        value = value * x + tl.full(x.shape, C[k], tl.float64)
    return value


@Kernel
def coefficients(
    columns, drawn, times, seed, ids, constants, stream, sample_offset, rows, each,
    CODE: tl.constexpr, OUTPUTS: tl.constexpr, SEED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a program computes for each row: its outputs, one behind the other in ``columns``, rounded once to
    float32.

    Its input is one of ``times``; where there are none, a uniform in (0, 1) of 52 bits, ``each`` of the samples from
    ``sample_offset`` on, or of ``ids``. Its first output is a time if there is ``drawn``, float64 or int64, where that
    goes. constants: those of the program, float64.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < rows
    if times is not None:
        x = tl.load(times + place, mask=inside, other=0.0).to(tl.float64)
    else:
        if SEED == "tensor":
            key = tl.load(seed)
        else:
            key = seed.to(tl.int64)
        sample = place.to(tl.int64) // each
        of_sample = (place - sample * each).to(tl.uint32)
        if ids is not None:
            sample = tl.load(ids + sample, mask=inside, other=0)
        else:
            sample = sample + sample_offset
        group = of_sample >> 1
        zero = group * 0
        high = (sample >> 32).to(tl.uint32)
        k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
        o0, o1, o2, o3 = words(group, zero + stream.to(tl.uint32), sample.to(tl.uint32), high, k0, k1)
        odd = (of_sample & 1) == 1
        first, second = tl.where(odd, o2, o0), tl.where(odd, o3, o1)
        bits = (first.to(tl.int64) << 20) | (second >> 12).to(tl.int64)
        x = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16
    registers = (x,)
    for k in tl.static_range(1, len(CODE) // 5):
        a, b, c = registers[CODE[5 * k + 1]], registers[CODE[5 * k + 2]], registers[CODE[5 * k + 3]]
        if CODE[5 * k] == NUMBER:
            value = tl.broadcast_to(tl.load(constants + CODE[5 * k + 4]), (BLOCK,))
        elif CODE[5 * k] == NEG:
            value = -a
        elif CODE[5 * k] == ABS:
            value = tl.abs(a)
        elif CODE[5 * k] == SIGN:
            value = (a > 0.0).to(tl.float64) - (a < 0.0).to(tl.float64)
        elif CODE[5 * k] == SQRT:
            value = library.sqrt(a)
        elif CODE[5 * k] == RECIPROCAL:
            value = 1.0 / a
        elif CODE[5 * k] == EXP:
            value = library.exp(a)
        elif CODE[5 * k] == LOG:
            value = library.log(a)
        elif CODE[5 * k] == EXPM1:
            value = library.expm1(a)
        elif CODE[5 * k] == LOG1P:
            value = library.log1p(a)
        elif CODE[5 * k] == SIN:
            value = library.sin(a)
        elif CODE[5 * k] == COS:
            value = library.cos(a)
        elif CODE[5 * k] == TAN:
            value = library.tan(a)
        elif CODE[5 * k] == ATAN:
            value = library.atan(a)
        elif CODE[5 * k] == TANH:
            value = library.tanh(a)
        elif CODE[5 * k] == SIGMOID:
            value = 1.0 / (1.0 + library.exp(-a))
        elif CODE[5 * k] == ERF:
            value = library.erf(a)
        elif CODE[5 * k] == NDTRI:
            value = _ndtri(a)
        elif CODE[5 * k] == FLOOR:
            value = tl.floor(a)
        elif CODE[5 * k] == CEIL:
            value = tl.ceil(a)
        elif CODE[5 * k] == TRUNC:
            value = tl.where(a < 0.0, tl.ceil(a), tl.floor(a))
        elif CODE[5 * k] == ISNAN:
            value = (a != a).to(tl.float64)
        elif CODE[5 * k] == ISINF:
            value = (tl.abs(a) == float("inf")).to(tl.float64)
        elif CODE[5 * k] == NOT:
            value = (a == 0.0).to(tl.float64)
        elif CODE[5 * k] == ADD:
            value = a + b
        elif CODE[5 * k] == SUB:
            value = a - b
        elif CODE[5 * k] == MUL:
            value = a * b
        elif CODE[5 * k] == DIV:
            value = a / b
        elif CODE[5 * k] == POW:
            value = library.pow(a, b)
        elif CODE[5 * k] == HYPOT:
            value = library.hypot(a, b)
        elif CODE[5 * k] == MAXIMUM:
            value = tl.where(a != a, a, tl.where(b != b, b, tl.where(a < b, b, a)))
        elif CODE[5 * k] == MINIMUM:
            value = tl.where(a != a, a, tl.where(b != b, b, tl.where(b < a, b, a)))
        elif CODE[5 * k] == EQ:
            value = (a == b).to(tl.float64)
        elif CODE[5 * k] == LT:
            value = (a < b).to(tl.float64)
        elif CODE[5 * k] == LE:
            value = (a <= b).to(tl.float64)
        elif CODE[5 * k] == AND:
            value = ((a != 0.0) & (b != 0.0)).to(tl.float64)
        elif CODE[5 * k] == OR:
            value = ((a != 0.0) | (b != 0.0)).to(tl.float64)
        else:
            tl.static_assert(CODE[5 * k] == WHERE)
            value = tl.where(a != 0.0, b, c)
        registers = registers + (value,)
    if drawn is not None:
        tl.store(drawn + place, registers[OUTPUTS[0]].to(drawn.dtype.element_ty), mask=inside)
    if columns is not None:
        FIRST: tl.constexpr = 0 if drawn is None else 1
        for k in tl.static_range(FIRST, len(OUTPUTS)):
            tl.store(columns + (k - FIRST) * rows + place, registers[OUTPUTS[k]].to(tl.float32), mask=inside)


def try_on(device: torch.device) -> None:
    """Compile, load and launch a small kernel on ``device``, without a record; raises where that cannot be."""
    out, seed = torch.empty(1, dtype=torch.float64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    uniform = (0,) * 5, (0,), "tensor", 128
    # Triton prints what it could not assemble.
    with launches(), contextlib.redirect_stdout(io.StringIO()):
        coefficients(device, (1, 1), (None, out, None, seed, None, None, 0, 0, 1, 1), uniform)
