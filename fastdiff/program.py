"""Coefficient programs: a float64 formula of one number a row, as a short list of operations on registers.

``trace`` runs a formula once, on five float64 numbers, and writes down each operation of PyTorch that depends on them.
Everything else is computed on the way and becomes a constant. Checks of values are left out meanwhile. 9 to 80
operations come of the objectives in use. (``make_fx`` traces them too, but it loses the values of constants.)

A backend then runs the list in its own way: in a loop in C++, or in one kernel. The formula itself stays the
definition. exp, log and other functions differ between C++, PyTorch and GPUs in the last bits of float64. Therefore the
coefficients of two backends agree after the rounding to float32 but for 1 in 2^28, and times agree to 1e-12. Tables and
plain arithmetic (``RectifiedFlow``, EDM's levels) agree to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .modes import Recording, lasting
from .tensors import cached, gather_rows

# The operations of programs, and the meaning of each in PyTorch. Operands are registers; truth values are 1 and 0.
OPERATIONS: dict[str, Callable[..., Tensor] | None] = {
    "input": None,  # the number of the row; always register 0, and nowhere else
    "number": None,  # its operand: a place among the program's numbers
    "lookup": None,  # table[row, column]; its operands: a register that holds the row, and the column. NaN: no such row
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": torch.sign,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "exp": torch.exp,
    "log": torch.log,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "atan": torch.atan,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "ndtri": torch.special.ndtri,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "trunc": torch.trunc,
    "isnan": lambda a: a.isnan().double(),
    "isinf": lambda a: a.isinf().double(),
    "not": lambda a: (a == 0).double(),
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "hypot": torch.hypot,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "eq": lambda a, b: (a == b).double(),
    "lt": lambda a, b: (a < b).double(),
    "le": lambda a, b: (a <= b).double(),
    "and": lambda a, b: ((a != 0) & (b != 0)).double(),
    "or": lambda a, b: ((a != 0) | (b != 0)).double(),
    "where": lambda a, b, c: torch.where(a != 0, b, c),
}
MOST_REGISTERS = 256
# The coefficients of an objective: alpha, sigma; p, q of target = p x0 + q n; scale, which makes an error of the
# prediction one of the error space; weight; loss_weight, the weight times the factor of the error function; c, its
# constant, where it has one. Below them the names that fast calls ask of a program: one that it has not is 0.
NAMES = ("alpha", "sigma", "p", "q", "scale", "weight", "loss_weight", "c")
OF_NOISE, OF_LOSS = ("alpha", "sigma"), ("p", "q", "scale", "loss_weight", "c")


class Untraceable(Exception):
    """A formula has no program; the message says why."""


@dataclass(frozen=True, eq=False)
class Program:
    """A formula as a list of operations.

    Attributes:
        code: (operation, its operands) of each register, from register 0, the input.
        numbers: the constants.
        names, outputs: what it computes: a register for each name.
        table: float64 [steps, columns] on the CPU, of lookups; or None.
        index: the input is a row of the table, an integer; otherwise a floating-point number in [low, high].
    """

    code: tuple[tuple[Any, ...], ...]
    numbers: tuple[float, ...]
    names: tuple[str, ...]
    outputs: tuple[int, ...]
    table: Tensor | None = None
    index: bool = False
    low: float = 0.0
    high: float = 1.0
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)  # backends keep here what they make of the program

    def __getstate__(self) -> dict[str, Any]:  # what backends keep points into memory
        return self.__dict__ | {"kept": {}}

    def of(self, *names: str) -> Program:
        """The part of the program that computes ``names``. A name that the program does not compute is 0."""
        found = self.kept.get(names)
        if found is None:
            writer = _Writer()
            memo = {0: 0}
            outputs = [writer.number(0.0) if n not in self.names else self._copied(n, writer, memo) for n in names]
            found = replace(self, **writer.program(names, outputs), kept={})
            self.kept[names] = found
        return found

    def _copied(self, name: str, writer: _Writer, memo: dict[int, int]) -> int:
        """Copy the operations that ``name`` needs into another program; returns its register there."""
        wanted = self.outputs[self.names.index(name)]
        needed, open_ = set(), [wanted]
        while open_:
            register = open_.pop()
            if register not in needed:
                needed.add(register)
                open_ += _registers(self.code[register])
        for register in sorted(needed - memo.keys()):
            operation, *operands = self.code[register]
            if operation == "number":
                memo[register] = writer.number(self.numbers[operands[0]])
            elif operation == "lookup":
                memo[register] = writer.add(operation, memo[operands[0]], operands[1])
            else:
                memo[register] = writer.add(operation, *(memo[o] for o in operands))
        return memo[wanted]

    def after(self, first: Program, name: str = "t") -> Program:
        """This program applied to the output ``name`` of ``first``. The joined program has the input of ``first``, and
        computes ``name`` too. (``first`` must have no lookups.)"""
        before, found = self.kept.get("after", (None, None))
        if before is not first:
            writer = _Writer()
            t = first._copied(name, writer, {0: 0})
            memo = {0: t}
            outputs = [t, *(self._copied(each, writer, memo) for each in self.names)]
            how = {"table": self.table, "index": False, "low": first.low, "high": first.high}
            found = replace(first, **writer.program((name, *self.names), outputs), **how, kept={})
            self.kept["after"] = first, found  # the last alone: what makes times may be set anew each step
        return found

    def constant(self, name: str) -> bool:
        """Whether it is the same number for every input."""
        return self.code[self.outputs[self.names.index(name)]][0] == "number"

    @property
    def finite(self) -> bool:
        """Whether all numbers in its table are finite."""
        if "finite" not in self.kept:
            with lasting():
                self.kept["finite"] = bool(self.table.isfinite().all())
        return self.kept["finite"]

    def columns(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The table of a program of lookups, a column for each output: [steps, outputs], rounded to ``dtype``."""

        def make() -> Tensor:
            found = [self._column(register) for register in self.outputs]
            return torch.stack(found, -1).to(device, dtype)

        return cached(self.kept, (device, dtype), make)

    def _column(self, register: int) -> Tensor:
        operation, *operands = self.code[register]
        if operation == "number":
            return torch.full_like(self.table[:, 0], self.numbers[operands[0]])
        return self.table[:, operands[1]]

    def gathered(self, t: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """Run a program of lookups at the times ``t`` in PyTorch: one tensor a name, shaped as ``t``; NaN where the
        table has no such row."""
        return gather_rows(self.columns(t.device, dtype), t).unbind(-1)

    def run(self, x: Tensor) -> list[Tensor]:
        """Run the program on ``x``, float64 [B], one operation of PyTorch after the other: [B] for each name. It is
        slow, and for tests and tracing."""
        registers: list[Tensor] = []
        for operation, *operands in self.code:
            if operation == "input":
                found = x.double()
            elif operation == "number":
                found = torch.full_like(x, self.numbers[operands[0]], dtype=torch.float64)
            elif operation == "lookup":
                row = registers[operands[0]]
                inside = (row >= 0) & (row < len(self.table))
                column = self.table[:, operands[1]].to(x.device)
                found = torch.where(inside, column[torch.where(inside, row, 0).long()], math.nan)
            else:
                found = OPERATIONS[operation](*(registers[o] for o in operands))
            registers.append(found)
        return [registers[output] for output in self.outputs]


def lookup(table: Tensor, names: Sequence[str]) -> Program:
    """The program of a discrete process: each of ``names`` is a column of ``table``, float64 [steps, columns]."""
    writer = _Writer()
    outputs = [writer.add("lookup", 0, column) for column in range(len(names))]
    table = table.contiguous()
    return Program(**writer.program(names, outputs), table=table, index=True, low=0, high=len(table) - 1)


def _registers(instruction: tuple[Any, ...]) -> tuple[int, ...]:
    """The registers among the operands of an instruction."""
    operation, *operands = instruction
    return () if operation == "number" else tuple(operands[:1]) if operation == "lookup" else tuple(operands)


class _Writer:
    """Writes a program: each operation once, however often it is asked for."""

    def __init__(self):
        self.code: list[tuple[Any, ...]] = [("input",)]
        self.numbers: list[float] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def number(self, value: float) -> int:
        value = float(value)
        key = ("number", value.hex(), math.copysign(1, value))
        if key not in self._known:
            self.numbers.append(value)
            self._known[key] = self._append(("number", len(self.numbers) - 1))
        return self._known[key]

    def add(self, operation: str, *operands: int) -> int:
        if operation != "lookup":
            values = [self.value(o) for o in operands]
            if None not in values:
                rows = (torch.tensor([v], dtype=torch.float64, device="cpu") for v in values)
                return self.number(OPERATIONS[operation](*rows).item())
            same = _identity(operation, operands, values)
            if same is not None:
                return same
        key = (operation, *operands)
        if key not in self._known:
            self._known[key] = self._append(key)
        return self._known[key]

    def value(self, register: int) -> float | None:
        """The number in a register that holds a constant, otherwise None."""
        operation, *operands = self.code[register]
        return self.numbers[operands[0]] if operation == "number" else None

    def program(self, names: Sequence[str], outputs: Sequence[int]) -> dict[str, Any]:
        """code, numbers, names and outputs of a ``Program``."""
        return {
            "code": tuple(self.code),
            "numbers": tuple(self.numbers),
            "names": tuple(names),
            "outputs": tuple(outputs),
        }

    def _append(self, instruction: tuple[Any, ...]) -> int:
        self.code.append(instruction)
        return len(self.code) - 1


def _identity(operation: str, operands: Sequence[int], values: Sequence[float | None]) -> int | None:
    """The operand that an operation gives back unchanged, to the bit, if there is one."""
    if operation in ("mul", "div") and values[1] == 1:
        return operands[0]
    if operation == "mul" and values[0] == 1:
        return operands[1]
    if operation == "or" and 0.0 in values:
        return operands[1 - values.index(0.0)]
    if operation == "where" and values[0] is not None:
        return operands[1] if values[0] else operands[2]
    if operation == "where" and operands[1] == operands[2]:
        return operands[1]
    return None


def trace(
    formula: Callable[[Tensor], dict[str, Tensor]], low: float, high: float, *, integers: Sequence[str] = ()
) -> Program:
    """The program of ``formula``: float64 [B] in [low, high] -> float64 [B] by name. It is compared with the formula at
    21 numbers before it is returned.

    Args:
        formula: a function that computes each row from its own number alone, without looking at it.
        integers: the names whose result may be int64.

    Raises Untraceable, with the reason, where there is no such program, or it has other results than the formula.
    """
    with lasting():
        points = _points(low, high)
        recorder = _Recorder()
        with recorder, _Guard(recorder):
            found = formula(recorder.start(points[:5].clone()))
        outputs = [recorder.operand(row) for row in found.values()]
        for name, row in found.items():
            if row.shape != (5,) or row.dtype not in (torch.float64, *([torch.int64] if name in integers else ())):
                raise Untraceable(f"{name} is {row.dtype} of shape {tuple(row.shape)}, not one float64 number a row")
        # What was not needed in the end is left out.
        whole = Program(**recorder.writer.program(tuple(found), outputs), low=low, high=high)
        program = whole.of(*found)
        if len(program.code) > MOST_REGISTERS:
            raise Untraceable(f"it takes {len(program.code)} operations; at most {MOST_REGISTERS} are done")
        expected = formula(points.clone())
        for name, row in zip(program.names, program.run(points)):
            if not torch.allclose(row, expected[name].double(), rtol=1e-11, atol=0, equal_nan=True):
                raise Untraceable(f"{name} depends on more than the number of its row")
    return program


def _points(low: float, high: float) -> Tensor:
    """[21] in [low, high], in no order; the ends last, where they are finite."""
    k = torch.arange(1, 20, dtype=torch.float64, device="cpu")
    inside = (k * 0.6180339887498949) % 1  # of the golden ratio, so no two are near to each other
    ends = torch.tensor([low, min(high, 1e4)], dtype=torch.float64, device="cpu")
    return torch.cat([low + (min(high, 50.0) - low) * inside, ends])


# Operations of PyTorch by the name of theirs here; all other ways to write them are in ``_lower``.
_SAME = {name: name for name in ("neg", "abs", "sqrt", "reciprocal", "exp", "log", "expm1", "log1p", "sin", "cos")} | {
    **{name: name for name in ("tan", "atan", "tanh", "sigmoid", "erf", "floor", "ceil", "trunc", "isnan", "isinf")},
    **{name: name for name in ("hypot", "maximum", "minimum", "div", "mul", "eq", "lt", "le", "pow", "sign")},
    "special_ndtri": "ndtri", "logical_not": "not", "bitwise_not": "not", "logical_and": "and", "logical_or": "or",
    "bitwise_and": "and", "bitwise_or": "or", "__and__": "and", "__or__": "or", "where": "where", "sgn": "sign",
}  # fmt: skip
_TRUTH = {"eq", "lt", "le", "ne", "gt", "ge", "isnan", "isinf"}  # of numbers
_LOGIC = {"logical_not", "bitwise_not", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "__and__", "__or__"}
_UNCHANGED = {"alias", "clone", "detach", "lift_fresh", "view", "reshape", "expand", "_to_copy", "_unsafe_view"}
_LIKE = {"ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full"}


class _Guard(TorchFunctionMode):
    """Refuses what leads out of PyTorch, where nothing is written down."""

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("numpy", "__array__", "tolist", "data_ptr") and self._recorder.knows(args[0]):
            raise Untraceable(f"it looks at values ({name})")
        return function(*args, **(kwargs or {}))


class _Recorder(Recording):
    """Writes down what happens to one tensor and to what is made of it. Everything is computed too, so what does not
    depend on it has its values."""

    def __init__(self):
        super().__init__()
        self.writer = _Writer()
        self._registers: dict[int, tuple[Tensor, int]] = {}  # by the tensor's id; they are held, so ids stay theirs

    def start(self, x: Tensor) -> Tensor:
        self._registers[id(x)] = x, 0
        return x

    def knows(self, value: Any) -> bool:
        """Whether this is a tensor that depends on the input."""
        return id(value) in self._registers

    def operand(self, value: Any) -> int:
        """The register that holds a tensor or a number."""
        if not isinstance(value, Tensor):
            return self.writer.number(value)
        known = self._registers.get(id(value))
        if known is not None:
            return known[1]
        if value.numel() == 0 or value.requires_grad or value.is_complex():
            raise Untraceable("it uses a tensor that is no constant")
        first = value.flatten()[0]
        if not bool(((value == first) | (value.isnan() & first.isnan())).all()):
            raise Untraceable("it uses numbers that differ from row to row and do not come from the row's time")
        return self.writer.number(first.item())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise Untraceable(f"it is random ({name})")
        result = function(*args, **kwargs)
        tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (list, tuple)) else (a,))]
        if name in _LIKE or not any(self.knows(t) for t in tensors):
            return result
        if not isinstance(result, Tensor) or name.endswith("_") and not name.startswith("_"):
            raise Untraceable(f"it looks at values, or writes into them ({name})")
        # [5] stays [5]: every row by itself.
        if tuple(result.shape) != (5,):
            raise Untraceable(f"it makes shape {tuple(result.shape)} of one number a row ({name})")
        self._registers[id(result)] = result, self._lower(name, args, kwargs, result.dtype)
        return result

    def _lower(self, name: str, args: tuple, kwargs: dict[str, Any], dtype: torch.dtype) -> int:
        """The register of what an operation of PyTorch computes."""
        kinds = {a.dtype for a in args if isinstance(a, Tensor)}
        if dtype not in (torch.float64, torch.bool, torch.int64):
            raise Untraceable(f"it computes in {str(dtype).removeprefix('torch.')}, not in float64 ({name})")
        if name in _LOGIC and kinds - {torch.bool}:
            raise Untraceable(f"it computes with bits ({name})")
        if (dtype is torch.bool) != (name in _TRUTH | _LOGIC) and name not in _UNCHANGED and name != "where":
            raise Untraceable(f"it computes with truth values ({name})")
        if name in _UNCHANGED:
            (before,) = kinds
            same = self.operand(args[0])
            if dtype is torch.int64 and before is torch.float64:
                return self.writer.add("trunc", same)
            if dtype is torch.bool and before is not torch.bool:
                return self.writer.add("not", self.writer.add("eq", same, self.writer.number(0.0)))
            return same
        if name == "pow" and not isinstance(args[1], Tensor):
            return self._power(self.operand(args[0]), float(args[1]))
        if name == "div" and kwargs.get("rounding_mode") is not None:
            # PyTorch's is not the rounded quotient: where that rounds up to a whole number, it is one less.
            raise Untraceable("it uses an operation that programs have not (div with rounding_mode)")
        if name in ("add", "sub", "rsub"):
            a, b = (self.operand(v) for v in (args[1::-1] if name == "rsub" else args[:2]))
            b = self.writer.add("mul", b, self.writer.number(kwargs.get("alpha", args[2] if len(args) > 2 else 1)))
            return self.writer.add("add" if name == "add" else "sub", a, b)
        if name in ("clamp", "clamp_min", "clamp_max"):
            low = kwargs.get("min", args[1] if name != "clamp_max" and len(args) > 1 else None)
            high = kwargs.get("max", args[-1] if name == "clamp_max" or len(args) > 2 else None)
            register = self.operand(args[0])
            if low is not None:
                register = self.writer.add("maximum", register, self.operand(low))
            if high is not None:
                register = self.writer.add("minimum", register, self.operand(high))
            return register
        if name in ("ne", "gt", "ge"):
            a, b = (self.operand(v) for v in args[:2])
            if name == "ne":
                return self.writer.add("not", self.writer.add("eq", a, b))
            return self.writer.add({"gt": "lt", "ge": "le"}[name], b, a)
        if name == "rsqrt":
            return self.writer.add("reciprocal", self.writer.add("sqrt", self.operand(args[0])))
        if name == "square":
            return self._power(self.operand(args[0]), 2.0)
        if name not in _SAME or kwargs:
            raise Untraceable(f"it uses an operation that programs have not ({name})")
        return self.writer.add(_SAME[name], *map(self.operand, args))

    def _power(self, x: int, power: float) -> int:
        """x^power in the steps that PyTorch takes."""
        add = self.writer.add
        if power == 1:
            return x
        if power == 0:
            return self.writer.number(1.0)
        whole = {0.5: lambda: add("sqrt", x), 2.0: lambda: add("mul", x, x), 1.0: lambda: x}.get(abs(power))
        if power == 3:
            return add("mul", add("mul", x, x), x)
        if whole is None:
            return add("pow", x, self.writer.number(power))
        return whole() if power > 0 else add("reciprocal", whole())
