"""Coefficient programs: what is traced, what is not and why; each way to run one gives the formulas' numbers."""

import math
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from asked import native, reference

import fastdiff
from fastdiff import losses, weighting
from fastdiff import timesteps as ts
from fastdiff.calls import UniformCall
from fastdiff.coefficients import NAMES, drawn
from fastdiff.constancy import Constancy, NotConstant
from fastdiff.process import Levels
from fastdiff.program import OPERATIONS, Program, Untraceable, lookup, trace

PROCESSES = [
    fastdiff.RectifiedFlow(),
    fastdiff.RectifiedFlow(3.0),
    fastdiff.RectifiedFlow(sigma_min=1e-3),
    fastdiff.EDM(),
    fastdiff.VPSDE(),
    fastdiff.SubVPSDE(),
    fastdiff.VESDE(),
    fastdiff.Cosine(),
    fastdiff.TrigFlow(),
    fastdiff.VPSDE(t_min=1e-3),
]
KINDS = ["epsilon", "sample", "v_prediction", "flow", "reversed_flow", "score", "edm", "trigflow"]
WEIGHTS = [None, *(n for n in weighting._NAMES if n != "uniform"), weighting.SNR(-0.37), weighting.Bell("sigma")]
LOSSES = ["mse", "huber", losses.PseudoHuber(0.2, schedule="snr"), losses.PseudoHuber(0.2, "scaled", "exponential")]
TIMESTEPS = [
    (ts.Uniform(), fastdiff.VPSDE()),
    (ts.Uniform(0.1, 0.9), fastdiff.VariancePreserving()),
    (ts.Uniform(0.1, 0.9, "sigma"), fastdiff.RectifiedFlow(3.0)),
    (ts.LogitNormal(0.2, 1.3), fastdiff.RectifiedFlow(3.0)),
    (ts.LogitNormal(), fastdiff.VariancePreserving(steps=17)),
    (ts.Mode(), fastdiff.RectifiedFlow()),
    (ts.CosMap(), fastdiff.RectifiedFlow()),
    (ts.LogNormal(), fastdiff.EDM()),
    (ts.LogNormal(), fastdiff.TrigFlow()),
    (ts.Uniform(), fastdiff.TrigFlow()),
    (ts.Uniform(), fastdiff.VPSDE(t_min=1e-3)),
    (ts.UniformLogSNR(), fastdiff.VPSDE(t_min=1e-5)),
    (ts.UniformLogSNR(), fastdiff.SubVPSDE(t_min=1e-3)),
    (ts.UniformLogSNR(0.01, 0.99), fastdiff.Cosine()),
    (ts.UniformLogSNR(0.01, 0.99), fastdiff.RectifiedFlow(3.0, 1e-3)),
    (ts.Shifted(ts.LogitNormal(), 3.0), fastdiff.RectifiedFlow()),
]
needs_native = pytest.mark.skipif(not native.available, reason="the native backend is not there")


def in_range(process, count=257):
    """Times of a process, its ends among them."""
    inside = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    high = min(process.t_max, 80.0)
    ends = [process.t_min, high] if math.isfinite(process.t_max) else [process.t_min]
    return torch.cat([process.t_min + (high - process.t_min) * inside, torch.tensor(ends, dtype=torch.float64)])


def differing(found, expected):
    """How many float32 numbers have other bits."""
    return int(((found != expected) & ~(found.isnan() & expected.isnan())).sum())


def objectives(process):
    for k, kind in enumerate(KINDS):
        for w in WEIGHTS:
            for number, loss in enumerate(LOSSES):
                space = "sample" if (k + number) % 3 == 0 else None
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        yield fastdiff.Objective(process, kind, w, loss, error_space=space)
                except (ValueError, TypeError):
                    continue


@needs_native
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_every_formula_of_ours_is_traced_and_run_in_cpp(process):
    """All that there is: float64 to a few units in the last place, but for what cancels, and so float32 but for few."""
    t = in_range(process)
    compared = different = 0
    for objective in objectives(process):
        coefficients = objective._coefficients
        program = coefficients.program()
        assert program is not None, (objective, coefficients.why)
        expected = coefficients.formulas(Levels(t, *process.alpha_sigma(t), process))
        wide, single = (native.evaluate(program, t, dtype) for dtype in (torch.float64, torch.float32))
        meant = program.run(t)
        for k, name in enumerate(program.names):
            torch.testing.assert_close(wide[k], expected[name], rtol=1e-12, atol=0, equal_nan=True)
            torch.testing.assert_close(meant[k], expected[name], rtol=1e-12, atol=0, equal_nan=True)
            compared += len(t)
            different += differing(single[k], expected[name].float())
    # 1 in 2^28 is expected: a number that lies that near to the middle of two float32 ones.
    assert compared > 100_000 and different <= 1 + compared / 2**24, (compared, different)


@needs_native
@pytest.mark.parametrize(("timesteps", "process"), TIMESTEPS, ids=repr)
def test_times_are_those_of_the_formula(timesteps, process):
    traced = drawn(timesteps, process)
    program = traced.program()
    assert program is not None, traced.why
    assert (program.low, program.high) == (2.0**-53, 1 - 2.0**-53)
    for samples, count in ((4096, None), (41, 101)):
        found = native.times(program, UniformCall(7, samples, 3, 11, "cpu", count), process.discrete)
        expected = timesteps(reference.uniform(7, samples, 3, 11, "cpu", count), process)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@needs_native
@pytest.mark.parametrize("operation", [name for name, meaning in OPERATIONS.items() if meaning is not None])
def test_each_operation_is_what_it_is_in_pytorch(operation):
    """Also of zeros, infinities and NaN; to 4 units in the last place (ndtri: 64, far in the tails)."""
    special = [0.0, -0.0, 1.0, -1.0, 2.0, 0.5, math.inf, -math.inf, math.nan, 1e-300, 1e300, 3.7, -2.5]
    a = torch.cat([torch.tensor(special, dtype=torch.float64), torch.randn(200, dtype=torch.float64) * 3])
    a = torch.cat([a, torch.rand(200, dtype=torch.float64), 10.0 ** -torch.arange(1.0, 300.0, 7.0).double()])
    count = {"where": 3}.get(operation, 2 if operation in list(OPERATIONS)[list(OPERATIONS).index("add") :] else 1)
    # The other operands are constants.
    for others in ([0.5, -2.0], [math.nan, 3.0], [-0.0, math.inf], [1.0, 1.0]):
        numbers = tuple(others[: count - 1])
        # The number is looked up: no time is infinite.
        code = (("input",), ("lookup", 0, 0), *(("number", k) for k in range(count - 1)))
        code = (*code, (operation, *range(1, count + 1)))
        how = {"table": a.unsqueeze(1), "index": True, "high": len(a) - 1}
        program = Program(code, numbers, ("y",), (count + 1,), **how)
        index = torch.arange(len(a))
        rtol = (64 if operation == "ndtri" else 4) * 2.0**-52
        found, expected = native.evaluate(program, index, torch.float64)[0], program.run(index)[0]
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0, equal_nan=True)


def test_tracing_does_not_import_the_compiler():
    """Which takes seconds."""
    code = """if True:
        import sys, torch, fastdiff
        before = "torch._dynamo" in sys.modules
        assert fastdiff.Objective(fastdiff.VPSDE())._coefficients.program() is not None
        assert before or "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_depends_on_nothing_is_folded():
    program = trace(lambda t: {"a": t * (torch.ones_like(t) * 3 + 4), "b": torch.full_like(t, 2.0)}, 0.0, 1.0)
    assert program.code == (("input",), ("number", 0), ("mul", 0, 1), ("number", 1)) and program.numbers == (7.0, 2.0)
    assert program.constant("b") and not program.constant("a")
    part = program.of("b", "missing")
    assert part.numbers == (2.0, 0.0) and part.names == ("b", "missing") and part is program.of("b", "missing")


def test_one_program_after_another():
    time = trace(lambda u: {"t": torch.exp(u)}, 0.0, 1.0)
    level = trace(lambda t: {"alpha": 1 / t, "sigma": t * t}, 1.0, 3.0)
    both = level.after(time)
    u = torch.rand(9, dtype=torch.float64)
    t, alpha, sigma = both.run(u)
    assert both.names == ("t", "alpha", "sigma") and both.low == 0.0 and level.after(time) is both
    torch.testing.assert_close((t, alpha, sigma), (u.exp(), 1 / u.exp(), u.exp() * u.exp()), rtol=1e-15, atol=0)


def test_rows_of_a_table():
    table = torch.rand(5, 3, dtype=torch.float64)
    program = lookup(table, ("a", "b", "c"))
    t = torch.tensor([0, 4, 2])
    for rows in (program.run(t), program.gathered(t, torch.float64), program.of("a", "b", "c").run(t)):
        torch.testing.assert_close(torch.stack(list(rows), -1), table[t], rtol=0, atol=0)
    assert program.of("c").run(torch.tensor([7]))[0].isnan()
    # A time of such a process may be drawn and looked up at once.
    draw = trace(lambda u: {"t": (u * 5).long().clamp(0, 4)}, 0.0, 1.0, integers=("t",))
    u = torch.rand(20, dtype=torch.float64)
    index, a, _, _ = program.after(draw).run(u)
    torch.testing.assert_close(a, table[index.long(), 0], rtol=0, atol=0)


# Ways to write an operation, and the program of each: the constant's place among the numbers stands after "number".
WAYS = {
    "t^0.5": (lambda t: t**0.5, [("sqrt", 0)], ()),
    "t^-0.5": (lambda t: t**-0.5, [("sqrt", 0), ("reciprocal", 1)], ()),
    "t^-1": (lambda t: t**-1, [("reciprocal", 0)], ()),
    "t^1": (lambda t: t**1, [], ()),
    "t^0": (lambda t: t**0, [("number", 0)], (1.0,)),
    "t^2": (lambda t: t**2, [("mul", 0, 0)], ()),
    "t^-2": (lambda t: t**-2.0, [("mul", 0, 0), ("reciprocal", 1)], ()),
    "t^3": (lambda t: t**3, [("mul", 0, 0), ("mul", 1, 0)], ()),
    "t^-3": (lambda t: t**-3, [("number", 0), ("pow", 0, 1)], (-3.0,)),
    "t^2.5": (lambda t: t**2.5, [("number", 0), ("pow", 0, 1)], (2.5,)),
    "2^t": (lambda t: 2.0**t, [("number", 0), ("pow", 1, 0)], (2.0,)),
    "t^t": (lambda t: t**t, [("pow", 0, 0)], ()),
    "square": (torch.square, [("mul", 0, 0)], ()),
    "rsqrt": (torch.rsqrt, [("sqrt", 0), ("reciprocal", 1)], ()),
    "1 - t": (lambda t: 1 - t, [("number", 0), ("sub", 1, 0)], (1.0,)),
    "t - 2 t^2": (lambda t: torch.sub(t, t * t, alpha=2), [("mul", 0, 0), ("number", 0), ("mul", 1, 2), ("sub", 0, 3)],
                  (2.0,)),
    "3 - 2 t": (lambda t: torch.rsub(t, 3, alpha=2), [("number", 0), ("number", 1), ("mul", 0, 2), ("sub", 1, 3)],
                (3.0, 2.0)),
    "at least": (lambda t: t.clamp(min=0.3), [("number", 0), ("maximum", 0, 1)], (0.3,)),
    "at most": (lambda t: t.clamp(max=0.3), [("number", 0), ("minimum", 0, 1)], (0.3,)),
    "at most, by place": (lambda t: torch.clamp_max(t, 0.3), [("number", 0), ("minimum", 0, 1)], (0.3,)),
    "at least, by place": (lambda t: torch.clamp_min(t, 0.3), [("number", 0), ("maximum", 0, 1)], (0.3,)),
    "between": (lambda t: t.clamp(0.3, 0.6), [("number", 0), ("maximum", 0, 1), ("number", 1), ("minimum", 2, 3)],
                (0.3, 0.6)),
    "between numbers of each row": (
        lambda t: t.clamp(t * t, t.sqrt()), [("mul", 0, 0), ("sqrt", 0), ("maximum", 0, 1), ("minimum", 3, 2)], ()),
    "t > 0.5": (lambda t: (t > 0.5).double(), [("number", 0), ("lt", 1, 0)], (0.5,)),
    "t >= 0.5": (lambda t: (t >= 0.5).double(), [("number", 0), ("le", 1, 0)], (0.5,)),
    "t != 0.5": (lambda t: (t != 0.5).double(), [("number", 0), ("eq", 0, 1), ("not", 2)], (0.5,)),
    "a truth value": (lambda t: t.bool().double(), [("number", 0), ("eq", 0, 1), ("not", 2)], (0.0,)),
    "not": (lambda t: (~(t < 0.5)).double(), [("number", 0), ("lt", 0, 1), ("not", 2)], (0.5,)),
    "a whole number": (lambda t: (t * 5).long().double(), [("number", 0), ("mul", 0, 1), ("trunc", 2)], (5.0,)),
    "times 1": (lambda t: 1 * t * 1 / 1, [], ()),
    "1 / t": (lambda t: 1 / t, [("reciprocal", 0)], ()),
    "2 / t": (lambda t: 2 / t, [("reciprocal", 0), ("number", 0), ("mul", 1, 2)], (2.0,)),
    "always": (lambda t: torch.where(torch.ones_like(t) > 0, t, -t), [], ()),
    "never": (lambda t: torch.where(torch.ones_like(t) < 0, -t, t), [], ()),
    "whichever": (lambda t: torch.where(t > 0.5, t, t), [], ()),
    "or never": (lambda t: ((torch.zeros_like(t) > 0) | (t < 0.5)).double(), [("number", 0), ("lt", 0, 1)], (0.5,)),
    "twice the same": (lambda t: t.exp() + t.exp(), [("exp", 0), ("add", 1, 1)], ()),
    "minus zero is not zero": (lambda t: t / -0.0 + t / 0.0, None, (-0.0, 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_the_steps_of_a_program_are_those_of_pytorch(way):
    """So its numbers are too, to the bit where each step is rounded correctly."""
    formula, code, numbers = WAYS[way]
    program = trace(lambda t: {"y": formula(t)}, 0.0, 1.0)
    if code is not None:
        assert list(program.code) == [("input",), *code]
    assert [number.hex() for number in program.numbers] == [number.hex() for number in numbers]
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    torch.testing.assert_close(program.run(t)[0], formula(t).double(), rtol=2.0**-52, atol=0, equal_nan=True)


UNTRACEABLE = {
    "looks at a value": (lambda t: t * 2 if t[0] > 0.5 else t, "select"),
    "looks at all of them": (lambda t: t if bool((t > 2).any()) else -t, "shape"),
    "as a list": (lambda t: torch.tensor([x * x for x in t.tolist()], dtype=torch.float64), "values .tolist"),
    "hidden in NumPy": (lambda t: t * 2 if t.numpy().max() < 9 else t, "values .numpy"),
    "in NumPy": (lambda t: torch.from_numpy(np.interp(t.numpy(), [0, 1], [3, 5])), "values .numpy"),
    "a mean": (lambda t: t / t.mean(), "shape"),
    "its place": (lambda t: t + torch.arange(len(t)), "differ from row to row"),
    "random": (lambda t: t + torch.rand(1, dtype=torch.float64), "random"),
    "in place": (lambda t: t.clone().mul_(2), "writes"),
    "float32": (lambda t: t.float().exp().double(), "float32"),
    "what programs have not": (lambda t: torch.special.bessel_j0(t), "special_bessel_j0"),
    "an index": (lambda t: torch.tensor([1.0, 2.0])[(t * 1.5).long()].double(), "index"),
    "another shape": (lambda t: t[:1], "shape"),
    "sorted": (lambda t: t.sort()[0], "looks at values"),
    "a number as a truth value": (lambda t: torch.logical_or(t, torch.zeros_like(t)).double(), "computes with bits"),
    "bits of whole numbers": (lambda t: ((t * 5).long() & 3).double(), "computes with bits"),
    "a sum of truth values": (lambda t: ((t > 0.2) + (t > 0.6)).double(), "computes with truth values"),
    "what learns": (lambda t: t * torch.ones(5, dtype=torch.float64, requires_grad=True), "no constant"),
    "a complex number": (lambda t: (t * torch.full((5,), 1j, dtype=torch.complex128)).real, "complex"),
    "a difference from the first row": (lambda t: t - t[0], "shape"),
    "a number of another row": (lambda t: t.flip(0) * 1, r"\(flip\)"),
}


@pytest.mark.parametrize(("formula", "because"), UNTRACEABLE.values(), ids=UNTRACEABLE)
def test_what_has_no_program(formula, because):
    with pytest.raises(Untraceable, match=because):
        trace(lambda t: {"y": formula(t)}, 0.0, 1.0)


def test_a_formula_that_is_too_long():
    def formula(t, count):
        for k in range(count):
            t = torch.sin(t + k)
        return {"y": t}

    assert len(trace(lambda t: formula(t, 80), 0.0, 1.0).code) <= 256
    with pytest.raises(Untraceable, match="operations; at most 256"):
        trace(lambda t: formula(t, 200), 0.0, 1.0)


def test_a_formula_of_more_than_its_row_is_found_by_trying():
    """What escapes the record is noticed by other numbers than those that were traced."""
    calls = []

    def formula(t):
        calls.append(1)
        return {"y": t * float(len(calls))}

    with pytest.raises(Untraceable, match="more than the number of its row"):
        trace(formula, 0.0, 1.0)


GAMMA = 5.0
TENSOR = torch.tensor(5.0)


class Settings:
    gamma = 5.0


def capped(levels):
    return levels.snr.clamp(max=GAMMA)


capped.factor = 2.0


def twice(levels):
    return 2 * capped(levels)


def by_default(levels, gamma=5.0):
    return levels.snr.clamp(max=gamma)


@dataclass(frozen=True)
class Mine(fastdiff.weighting.Weighting):
    gamma: float = 5.0

    def formula(self, levels, prediction):
        return levels.snr.clamp(max=self.gamma)


@dataclass
class Changing(fastdiff.weighting.Weighting):
    gamma: float = 5.0

    def formula(self, levels, prediction):
        return levels.snr.clamp(max=self.gamma)


class Learned(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = torch.nn.Parameter(torch.tensor(5.0, dtype=torch.float64))

    def forward(self, levels):
        return levels.snr / (levels.snr + self.gamma)


def closure(gamma):
    return lambda levels: levels.snr.clamp(max=gamma)


def repeated(levels, times=2):
    return levels.snr.clamp(max=5.0) if times == 0 else repeated(levels, times - 1)


def by_a_tensor(levels, gamma=TENSOR):
    return levels.snr.clamp(max=gamma)


def by_a_tensor_of_that_name(levels, *, gamma=TENSOR):
    return levels.snr.clamp(max=gamma)


def by_pairs(levels, ends=(0.1, (5.0, math.inf))):
    return levels.snr.clamp(ends[0], ends[1][0])


def by_a_pair_of_tensors(levels, ends=(0.1, (TENSOR, TENSOR))):
    return levels.snr.clamp(max=ends[1][0])


def missing(levels):
    return levels.snr * (NOWHERE if levels is None else 1.0)  # noqa: F821


def within(levels):
    gamma = 5.0

    def capped_at():
        return levels.snr.clamp(max=gamma)

    return capped_at()


def within_a_tensor(levels):
    return (lambda snr: snr.clamp(max=TENSOR))(levels.snr)


def writing(levels):
    global WRITTEN
    WRITTEN = 5.0
    return levels.snr.clamp(max=5.0)


def storing(levels):
    levels.kept = 5.0


def deleting(levels):
    del levels.kept


def unset():
    def weight(levels):
        return levels.snr.clamp(max=gamma)  # noqa: F821

    if math.pi < 3:
        gamma = 5.0
    return weight


class Own(fastdiff.weighting.Weighting):
    """What the classes below have in common: no setting."""

    def formula(self, levels, prediction):
        return levels.snr.clamp(max=5.0)


@dataclass(frozen=True)
class Reading(Own):
    def formula(self, levels, prediction):
        return levels.snr.clamp(max=TENSOR)


@dataclass(frozen=True)
class Twice(Own):
    def formula(self, levels, prediction):
        return super().formula(levels, prediction) * 2


@dataclass(frozen=True)
class Holding(Own):
    gamma: object = 5.0

    def formula(self, levels, prediction):
        return levels.snr.clamp(max=self.gamma)


@dataclass(frozen=True)
class Private(Own):
    _gamma: object = 5.0

    def formula(self, levels, prediction):
        return levels.snr.clamp(max=self._gamma)


class Later(ts.Timesteps):
    power = 2.0

    def fraction(self, u):
        return u**self.power


@dataclass(frozen=True)
class Shared(Own):
    gamma = 5.0

    def formula(self, levels, prediction):
        return levels.snr.clamp(max=self.gamma)


@dataclass(frozen=True)
class SharedTensor(Shared):
    gamma = TENSOR


@dataclass(frozen=True)
class Property(Own):
    @property
    def gamma(self):
        return TENSOR

    def formula(self, levels, prediction):
        return levels.snr.clamp(max=self.gamma)


@dataclass(frozen=True)
class Static(Property):
    @staticmethod
    def gamma():
        return TENSOR

    def formula(self, levels, prediction):
        return levels.snr.clamp(max=self.gamma())


@dataclass(frozen=True)
class Called:
    def __call__(self, levels):
        return levels.snr.clamp(max=5.0 if self is CALLED else 4.0)

    def __str__(self):
        return f"{TENSOR}"


CALLED = Called()


@dataclass(frozen=True)
class CalledWithATensor:
    def __call__(self, levels):
        return levels.snr.clamp(max=TENSOR)


@dataclass(frozen=True, slots=True)
class Slots:
    gamma: object = 5.0

    def __call__(self, levels):
        return levels.snr.clamp(max=self.gamma)


def counting():
    calls = 0

    def weight(levels):
        nonlocal calls
        calls += 1
        return levels.snr * calls

    return weight


CONSTANT = [None, "min_snr", fastdiff.MinSNR(3.0), capped, twice, by_default, Mine(), closure(5.0)]
CONSTANT += [lambda levels: 1 / (1 + levels.t), lambda levels: torch.exp(-levels.sigma) * math.pi]
CONSTANT += [lambda levels: levels.snr.clamp(max=5.0)]
CONSTANT += [
    lambda levels: levels.snr * capped(levels),
    by_pairs,
    within,
    Twice(),
    Holding(),
    Shared(),
    CALLED,
    Slots(),
    repeated,
]
CONSTANT += [lambda levels: levels.snr.to(torch.float64).clamp(max=abs(-5.0)) * (1.0 if ... is not None else 2.0)]


def importing(levels):
    import cmath

    return levels.snr * abs(cmath.pi)


OTHERWISE = {
    "a rounded quotient": (lambda levels: torch.div(levels.snr, levels.alpha, rounding_mode="floor"), "rounding_mode"),
    "a remainder": (lambda levels: levels.snr % levels.alpha, r"programs have not \(remainder\)"),
    "an import of its own": (importing, "imports 'cmath'"),
    "an object that may change": (Changing(), "uses a Changing"),
    "a module": (Learned(), "uses a Learned"),
    "a tensor": (lambda levels: levels.snr.clamp(max=TENSOR), "uses a Tensor"),
    "a class of one's own": (lambda levels: levels.snr.clamp(max=Settings.gamma), "reads Settings"),
    "a count": (counting(), "writes 'calls'"),
    "an attribute of a function": (lambda levels: levels.snr * capped.factor, "attribute of capped"),
    "an attribute of a function, first": (lambda levels: capped.factor * levels.snr, "attribute of capped"),
    "a tensor as a default": (by_a_tensor, "by_a_tensor uses a Tensor"),
    "a tensor as a default of a name": (by_a_tensor_of_that_name, "uses a Tensor"),
    "a tensor among numbers": (by_a_pair_of_tensors, "uses a Tensor"),
    "a tensor around it": (closure(TENSOR), r"\(gamma\) uses a Tensor"),
    "a tensor in a function in it": (within_a_tensor, r"^within_a_tensor \(TENSOR\) uses a Tensor"),
    "a name that is not there": (missing, r"missing \(NOWHERE\) is not there"),
    "what it writes": (writing, "writing writes 'WRITTEN'"),
    "a tensor in a method": (Reading(), r"formula \(TENSOR\) uses a Tensor"),
    "a tensor in a setting": (Holding(TENSOR), "Holding.gamma uses a Tensor"),
    "a tensor in a private setting": (Private(TENSOR), "Private._gamma uses a Tensor"),
    "a tensor in a slot": (Slots(TENSOR), "Slots.gamma uses a Tensor"),
    "a tensor of the class": (SharedTensor(), "SharedTensor.gamma uses a Tensor"),
    "a tensor in a property": (Property(), "uses a Tensor"),
    "a tensor in a static method": (Static(), "uses a Tensor"),
    "a tensor in a call": (CalledWithATensor(), "uses a Tensor"),
    "an import": (lambda levels: __import__("math").pi * levels.snr, "reads __import__"),
}


@pytest.mark.parametrize("weight", CONSTANT, ids=lambda weight: getattr(weight, "__name__", str(weight)))
def test_what_is_constant_has_a_program(weight):
    coefficients = fastdiff.Objective(fastdiff.VPSDE(), "epsilon", weight)._coefficients
    assert coefficients.program() is not None and coefficients.why == ""


@pytest.mark.parametrize(("weight", "because"), OTHERWISE.values(), ids=OTHERWISE)
def test_what_may_change_is_evaluated_each_time(weight, because):
    coefficients = fastdiff.Objective(fastdiff.VPSDE(), "epsilon", weight)._coefficients
    assert coefficients.program() is None
    assert re.search(because, coefficients.why), coefficients.why


def test_a_formula_that_raises_does_so_when_it_is_evaluated():
    def picky(levels):
        if len(levels.t) > 4:
            raise ValueError("at most four")
        return levels.snr

    objective = fastdiff.Objective(fastdiff.VPSDE(), "epsilon", picky)
    assert objective._coefficients.program() is None and objective._coefficients.why == "ValueError: at most four"
    assert loss_of(objective).isfinite()
    with pytest.raises(ValueError, match="at most four"):
        objective.loss(torch.ones(5, 3), objective.noise(torch.ones(5, 3)))


def loss_of(objective, backend=None):
    x0 = torch.linspace(-1, 1, 24).view(2, 3, 4)
    with fastdiff.use_backend(backend):
        return objective.loss(x0 * 0.5, objective.noise(x0, torch.tensor([0.3, 0.6]), seed=1))


@needs_native
def test_a_name_that_means_something_else_is_noticed(monkeypatch):
    for weight in (capped, twice):
        objective = fastdiff.Objective(fastdiff.VPSDE(), "epsilon", weight)
        before = loss_of(objective)
        assert objective._coefficients.program() is not None
        monkeypatch.setitem(globals(), "GAMMA", 0.01)
        after = loss_of(objective)
        torch.testing.assert_close(after, loss_of(objective, "reference"))
        assert after < before
        monkeypatch.setitem(globals(), "GAMMA", 5.0)
        assert torch.equal(loss_of(objective), before)


@needs_native
@pytest.mark.parametrize("weight", [Changing(), Learned()], ids=["dataclass", "module"])
def test_what_changes_is_noticed(weight):
    objective = fastdiff.Objective(fastdiff.VPSDE(), "epsilon", weight)
    before = loss_of(objective)
    with torch.no_grad():
        weight.gamma *= 0.001
    after = loss_of(objective)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, loss_of(objective, "reference"))


def test_a_learned_weighting_gets_its_gradient():
    weight = Learned()
    loss_of(fastdiff.Objective(fastdiff.VPSDE(), "epsilon", weight)).backward()
    assert weight.gamma.grad is not None and weight.gamma.grad.isfinite()


def test_timesteps_set_anew_are_drawn_anew():
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", timesteps=ts.Uniform(0.0, 0.1))
    x0 = torch.zeros(64, 2)
    assert objective.noise(x0).t.max() < 0.1
    objective.timesteps = ts.Uniform(0.9, 1.0)
    assert objective.noise(x0).t.min() > 0.9
    objective.timesteps = "stratified"  # of the whole batch: no program
    assert objective._times().program() is None and objective._times().why
    counts = torch.histc(objective.noise(x0).t, 8, 0, 1)
    assert bool((counts - 8).abs().max() <= 1)


def test_a_copy_has_programs_of_its_own():
    objective = fastdiff.Objective(fastdiff.VPSDE(), "epsilon", Mine())
    want = loss_of(objective)
    assert torch.equal(loss_of(pickle.loads(pickle.dumps(objective))), want)


NOT_CONSTANT = [
    (Learned(), "Learned uses a Learned"),
    (ts.Shifted(Later(), 3.0), "Shifted.inner uses a Later"),
    (unset(), r"weight \(gamma\) is not there"),
    (storing, "storing writes 'kept'"),
    (deleting, "deleting writes 'kept'"),
    (lambda levels: open("gamma"), "reads open"),
    (lambda levels: vars(levels), "reads vars"),
    (lambda levels: re.escape("gamma"), "reads re"),
    ((5.0, frozenset([Learned])), "tuple reads Learned"),
]


@pytest.mark.parametrize(("part", "words"), NOT_CONSTANT, ids=[words for _, words in NOT_CONSTANT])
def test_why_something_is_not_constant_names_what(part, words):
    with pytest.raises(NotConstant, match=words):
        Constancy(part)


def test_names_are_looked_up_again(monkeypatch):
    """Those of numbers and of functions of one's own, wherever they stand; modules and builtins are what they are."""
    assert Constancy(lambda levels: math.exp(abs(levels.snr)), fastdiff.MinSNR(), Slots(), torch.exp).names == []
    process = fastdiff.RectifiedFlow()
    process.twin = process  # looked at once
    assert Constancy(process).names == []
    gamma = 5.0
    inner = closure(gamma)
    around = lambda levels: inner(levels).clamp(max=gamma)  # noqa: E731
    parts = {"around": Constancy(around), "its own": Constancy(twice), "the class": Constancy(Shared())}

    def held():
        return {name: part.holds() for name, part in parts.items()}

    assert held() == {"around": True, "its own": True, "the class": True}
    gamma = 4.0
    assert held() == {"around": False, "its own": True, "the class": True}
    gamma = 5.0
    monkeypatch.setattr(Shared, "gamma", 4.0)
    monkeypatch.setitem(globals(), "capped", closure(3.0))
    inner = closure(3.0)
    assert held() == {"around": False, "its own": False, "the class": False}
    monkeypatch.undo()
    assert parts["its own"].holds() and parts["the class"].holds()
    monkeypatch.delattr(Shared, "gamma")
    monkeypatch.delitem(globals(), "GAMMA")
    assert held() == {"around": False, "its own": False, "the class": False}


@needs_native
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: ((0, 0, 0, 0), (1, 0, 0, 0))}, "an operand is out of range"),
        ({0: ()}, "from 1 to 256 registers"),
        ({0: ((3, 0, 0, 0),)}, "the input is the first register"),
        ({0: ((0, 0, 0, 0), (0, 0, 0, 0))}, "the input is the first register"),
        ({0: ((0, 0, 0, 0), (3, 1, 0, 0))}, "an operand is out of range"),
        ({0: ((0, 0, 0, 0), (2, 0, 0, 0))}, "an operand is out of range"),
        ({0: ((0, 0, 0, 0), (99, 0, 0, 0))}, "code: must be from 0 to"),
        ({0: ((0, 0, 0),)}, "expected \\(operation, a, b, c\\)"),
        ({2: ()}, "outputs: must be from 1 to 16"),
        ({2: (1,)}, "an operand is out of range"),
        ({4: 3}, "table: is needed for its height"),
        ({5: 17}, "at most 2\\^40 rows and 16 columns"),
    ],
)
def test_a_program_that_is_none_is_refused(change, words):
    fit = [((0, 0, 0, 0),), (), (0,), None, 0, 0, False, 0.0, 1.0]
    native.fast._C.coefficient_program(*fit)
    for place, value in change.items():
        fit[place] = value
    with pytest.raises(ValueError, match=words):
        native.fast._C.coefficient_program(*fit)


@needs_native
def test_times_out_of_range_are_refused_before_anything_is_written():
    from fastdiff.backends.native.coefficients import handle
    from fastdiff.backends.native.launch import memory

    program = trace(lambda t: {"y": 2 * t}, 0.0, 1.0)
    _C, source = native.fast._C, handle(program, ("y",))
    for bad in (-0.1, 1.5, math.nan, math.inf):
        t, out = torch.tensor([0.5, bad]), torch.full((2,), -7.0)
        assert not _C.coefficients(source, 1, memory(t), memory(out)) and bool((out == -7).all())
    t = torch.rand(1000)
    out = torch.empty(1000)
    assert _C.coefficients(source, 1, memory(t), memory(out)) and torch.equal(out, 2 * t)


def test_the_names_of_operations_are_those_of_cpp():
    if native.available:
        assert native.fast._C.codes["operations"] == list(OPERATIONS)
    assert set(fastdiff.program.OF_NOISE + fastdiff.program.OF_LOSS) | {"weight"} == set(NAMES)


def test_no_more_is_computed_than_is_used():
    """The weight alone is for who looks at it: the loss has it times the factor of its error function."""
    made = fastdiff.Objective(fastdiff.VariancePreserving())._coefficients
    assert made.used == ("alpha", "sigma", "q", "loss_weight")


def test_coefficients_of_a_time_that_was_changed_are_refused():
    objective = fastdiff.Objective(fastdiff.VPSDE(), "epsilon", lambda levels: levels.snr * float(levels.snr.mean()))
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    noised = objective.noise(torch.zeros(2, 3), t)
    t += 0.1
    with pytest.raises(RuntimeError, match="t was changed in place"):
        noised.weight  # noqa: B018
