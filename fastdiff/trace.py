"""``fastdiff doctor --trace``: runs a script and counts which calls went which way, and why.

The methods of ``Objective``, the functions of the package and those of the backends are wrapped while the script runs:
otherwise nothing is counted, and nothing costs time."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

import fastdiff

from . import backends, converting, functional, sampling
from .backends import registry
from .backends.reference import Reference
from .calls import Call
from .objective import Objective

_METHODS = ("noise", "loss", "loss_and_gradient", "convert")
_FUNCTIONS = {"q_sample": functional, "diffusion_loss": functional, "sample": sampling}  # and where they are defined
# They give None where they do not do it.
_FAST_CALLS = ((Objective, "_fast_noise"), (Objective, "_fast_loss"), (converting, "fast"))
FAST, GENERAL, REFERENCE = "in one call", "by the operations of a backend", "by the reference"
STEPS = "each step in one call"


class Trace:
    """Counts of calls of ``Objective``'s methods and of the package's functions: {(name, way, reason): calls}."""

    def __init__(self):
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self._open: list[dict[str, str]] = []
        self._within = False  # a function that calls an objective, which is not counted again

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is called inside."""
        replaced: list[tuple[Any, str, Callable]] = []
        for name in _METHODS:
            replaced.append((Objective, name, self._counted(name, getattr(Objective, name))))
        for name, module in _FUNCTIONS.items():
            counted = self._counted(name, getattr(module, name))
            replaced += [(module, name, counted), (fastdiff, name, counted)]
        replaced += [(owner, name, self._fast(getattr(owner, name))) for owner, name in _FAST_CALLS]
        for name in ("run", "value_and_gradient"):
            replaced.append((Reference, name, self._reference(getattr(Reference, name))))
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
        for owner, name, function in replaced:
            setattr(owner, name, function)
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _counted(self, name: str, own: Callable) -> Callable:
        @wraps(own)
        def counted(*arguments: Any, **named: Any) -> Any:
            if self._within or torch.compiler.is_compiling():
                return own(*arguments, **named)
            self._open.append({})
            self._within = name in ("q_sample", "diffusion_loss")
            try:
                return own(*arguments, **named)
            finally:
                self._within = False
                noted = self._open.pop()
                way = noted.get("way", STEPS if name == "sample" else GENERAL)
                reason = _general(name, arguments, named) if way == GENERAL else noted.get("reason", "")
                self.calls[name, way, reason] += 1

        return counted

    def _fast(self, own: Callable) -> Callable:
        def call(objective: Objective, *arguments: Any) -> Any:
            done = own(objective, *arguments)
            if done is not None and self._open:
                self._open[-1]["way"] = FAST
            return done

        return call

    def _reference(self, own: Callable) -> Callable:
        def operation(backend: Reference, *arguments: Any) -> Any:
            call: Call = arguments[-1]
            if self._open and not self._open[-1] and call.operation in (*_METHODS, "step"):
                self._open[-1].update(way=REFERENCE, reason=_why(call))
            return own(backend, *arguments)

        return operation


def _why(call: Call) -> str:
    """Why the reference does what a backend was asked."""
    device = call[0].device
    first = registry.get(device)
    if first.name != "reference":
        return first.supports(call)[1]
    others = [s for s in backends.status() if device.type in s.devices and s.name != "reference" and not s.available]
    return f"{device.type} has no other backend" + "".join(f"; {s.name}: {s.reason}" for s in others)


def _general(method: str, arguments: Sequence[Any], named: dict[str, Any]) -> str:
    """Why a call was not the fast one."""
    options = [name for name in ("with_target", "target", "y") if name in named]
    if named.get("mask_normalization") == "sample":
        options.append("mask_normalization='sample'")
    if options:
        return f"it has {', '.join(options)}"
    tensors = [a for a in (*arguments, *named.values()) if isinstance(a, Tensor)]
    if any(not t.is_cpu for t in tensors):
        return ""  # one launch each: there is nothing quicker
    if "loss" not in method and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "a gradient of its data is asked for"
    if any(not t.is_contiguous() for t in tensors):
        return "a tensor is not contiguous"
    for one in arguments:
        if isinstance(one, Objective) and (why := one._coefficients.why):
            return f"its coefficients are evaluated for each batch: {why}"
    return "its times are not one a sample, or a fast call does not take its dtypes, its mask or its weight"


def run(script: str, arguments: Sequence[str]) -> int:
    """Run a script as ``python script arguments`` would, then print what was counted. Returns its exit status."""
    trace, argv, path, status = Trace(), sys.argv, sys.path[:], 0
    if _scheduler_counts() is not None:
        _scheduler_counts().reset_counts()
    try:
        sys.argv = [script, *arguments]
        with trace.counting():
            runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if not isinstance(ended.code, (int, type(None))):
            print(ended.code, file=sys.stderr)
    except Exception:
        traceback.print_exc()
        status = 1
    finally:
        sys.argv, sys.path[:] = argv, path
    print("\n".join(report(trace, _scheduler_counts())))
    return status


def _scheduler_counts() -> Any:
    """The module that counts the calls of fused schedulers, if anything has imported it."""
    return sys.modules.get("fastdiff.integrations.diffusers")


def report(trace: Trace, schedulers: Any) -> list[str]:
    """The lines that say what was counted."""
    lines = ["objectives and functions"]
    for (name, way, reason), count in sorted(trace.calls.items()):
        lines.append(f"  {name:<14} {count:>6}  {way}{': ' + reason if reason else ''}")
    if not trace.calls:
        lines.append("  no Objective, and no function of fastdiff, was called")
    lines.append("schedulers of diffusers")
    fused = schedulers.fused_calls() if schedulers else {}
    left = schedulers.fallbacks() if schedulers else {}
    for name, count in sorted(fused.items()):
        lines.append(f"  {name}  {count}  fused")
    for name, reasons in sorted(left.items()):
        lines += [f"  {name}  {count}  left to diffusers: {reason}" for reason, count in sorted(reasons.items())]
    if not fused and not left:
        lines.append("  none was called that is fused: fuse(scheduler), or patch(), of fastdiff.integrations.diffusers")
    return lines
