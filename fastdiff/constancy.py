"""Whether the result of a formula can change unnoticed. A program that was traced from a formula is kept as long as it
cannot.

A formula is constant if it is made of things that cannot change: fastdiff's own functions, those of torch, math, numpy
and the builtins, numbers, strings, frozen dataclasses of these. It may also read names, from its module or from the
function around it, that stand for numbers and for other such functions: the names are looked up again at each call, and
``Constancy`` notices if one stands for something else. A process counts its changes. Everything else (attributes of
objects, lists, tensors, parameters, modules of one's own) may change without a trace: such a formula is evaluated each
time.
"""

from __future__ import annotations

import builtins
import dataclasses
import dis
import enum
import types
from collections.abc import Callable
from typing import Any

import torch

_OURS = "fastdiff"
_LIBRARIES = ("torch", "math", "numpy", "builtins", "typing", "operator")
_NUMBERS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, enum.Enum, types.EllipsisType)
_WRITES = ("STORE_GLOBAL", "STORE_NAME", "STORE_ATTR", "STORE_DEREF", "DELETE_GLOBAL", "DELETE_NAME", "DELETE_ATTR")
_READS = ("LOAD_ATTR", "LOAD_METHOD")
_ANYTHING = {"__import__", "eval", "exec", "globals", "input", "locals", "vars"}  # builtins that may read all
_MISSING = object()


class NotConstant(Exception):
    """Why something may change unnoticed."""


class Constancy:
    """The parts of a formula, and what the names in it stood for when it was traced. Raises NotConstant, with the
    reason, if a part may change unnoticed.

    Args:
        parts: functions, and objects with functions (a weighting, a loss, a process).
    """

    def __init__(self, *parts: Any):
        self.names: list[tuple[Callable[[], Any], Any]] = []  # (looks a name up, what it stood for)
        self._seen: set[int] = set()
        for part in parts:
            self._look_at(part, type(part).__name__)

    def holds(self) -> bool:
        """Whether every name still stands for what it did."""
        for look_up, value in self.names:
            if look_up() is not value:
                return False
        return True

    def _look_at(self, value: Any, what: str) -> None:
        if isinstance(value, _NUMBERS) or id(value) in self._seen:
            return
        if isinstance(value, (tuple, frozenset)):
            for each in value:
                self._look_at(each, what)
        elif isinstance(value, types.FunctionType):
            self._seen.add(id(value))
            if not _is_of(value.__module__, (_OURS, *_LIBRARIES)):
                self._function(value)
        elif isinstance(value, (types.BuiltinFunctionType, types.ModuleType, type)):
            name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__ or "builtins"
            if not _is_of(name, (_OURS, *_LIBRARIES)) or value.__name__ in _ANYTHING:
                raise NotConstant(f"{what} reads {value.__name__}, which may change")
        else:
            self._seen.add(id(value))
            self._object(value, what)

    def _object(self, value: Any, what: str) -> None:
        """A frozen dataclass, or what counts its changes (a process), of constant fields."""
        kind = type(value)
        parameters = getattr(kind, "__dataclass_params__", None)
        if not (parameters is not None and parameters.frozen) and not hasattr(kind, "_changes"):
            raise NotConstant(f"{what} uses a {kind.__name__}, which may change")
        fields = (
            vars(value)
            if hasattr(value, "__dict__")
            else {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        )
        ours = _is_of(kind.__module__, (_OURS,))
        for name, held in fields.items():
            if not (ours and name.startswith("_")):  # what is private of ours is not written into
                self._look_at(held, f"{kind.__name__}.{name}")
        for base in kind.__mro__:
            if _is_of(base.__module__, (_OURS, *_LIBRARIES)):
                continue
            for name, held in vars(base).items():
                held = getattr(held, "fget", held)
                held = getattr(held, "__func__", held)
                if isinstance(held, types.FunctionType):
                    if not name.startswith("__") or name == "__call__":
                        self._look_at(held, f"{kind.__name__}.{name}")
                elif not name.startswith("__") and not isinstance(held, types.MemberDescriptorType):
                    self._look_at(held, f"{kind.__name__}.{name}")
                    self.names.append((lambda base=base, name=name: vars(base).get(name, _MISSING), held))

    def _function(self, function: types.FunctionType) -> None:
        name = function.__name__
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._look_at(default, name)
        for cell, variable in zip(function.__closure__ or (), function.__code__.co_freevars):
            if variable == "__class__":  # of ``super()``
                continue
            self._read(lambda cell=cell: _in_cell(cell), f"{name} ({variable})")
        self._code(function.__code__, function.__globals__, name)

    def _code(self, code: types.CodeType, names: dict[str, Any], name: str) -> None:
        instructions = list(dis.get_instructions(code))
        for k, instruction in enumerate(instructions):
            if instruction.opname in _WRITES and not (
                instruction.opname == "STORE_DEREF" and instruction.argval in code.co_cellvars
            ):
                raise NotConstant(f"{name} writes {instruction.argval!r}")
            if instruction.opname == "IMPORT_NAME":
                raise NotConstant(f"{name} imports {instruction.argval!r}")
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                variable = instruction.argval
                value = self._read(lambda variable=variable: _global(names, variable), f"{name} ({variable})")
                after = instructions[k + 1].opname  # there is one: code ends by returning
                if after in _READS and isinstance(value, types.FunctionType):
                    raise NotConstant(f"{name} reads an attribute of {variable}")
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, names, name)

    def _read(self, look_up: Callable[[], Any], what: str) -> Any:
        value = look_up()
        if value is _MISSING:
            raise NotConstant(f"{what} is not there")
        self._look_at(value, what)
        if not isinstance(value, types.ModuleType) and not _is_of(getattr(value, "__module__", ""), ("builtins",)):
            self.names.append((look_up, value))
        return value


def _is_of(module: str | None, packages: tuple[str, ...]) -> bool:
    return bool(module) and module.split(".")[0] in packages


def _in_cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _global(names: dict[str, Any], name: str) -> Any:
    return names[name] if name in names else getattr(builtins, name, _MISSING)
