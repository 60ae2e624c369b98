"""``fastdiff doctor --trace``: runs a script and counts which calls went which way, and why.

The methods of ``Objective`` and the functions of the backends are wrapped while the script runs: otherwise nothing is
counted, and nothing costs time."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import backends, modes
from .backends import reference
from .objective import Objective
from .plain import PlainCalls

_METHODS = ("noise", "loss", "convert")
FAST, GENERAL, REFERENCE = "in one call", "by the operations of a backend", "by the reference"


class Trace:
    """Counts of ``Objective``'s calls: {(method, way, reason): calls}."""

    def __init__(self):
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self._open: list[dict[str, str]] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is called inside."""
        replaced = [(Objective, name, self._method(name, getattr(Objective, name))) for name in _METHODS]
        replaced += [(PlainCalls, name, self._fast(getattr(PlainCalls, name))) for name in _METHODS]
        replaced += [(reference, name, self._reference(getattr(reference, name))) for name in _METHODS]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
        for owner, name, function in replaced:
            setattr(owner, name, function)
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _method(self, name: str, own: Callable) -> Callable:
        def method(objective: Objective, *arguments: Any, **named: Any) -> Any:
            if torch.compiler.is_compiling():
                return own(objective, *arguments, **named)
            self._open.append({})
            try:
                return own(objective, *arguments, **named)
            finally:
                noted = self._open.pop()
                way = noted.get("way", GENERAL)
                reason = (
                    noted.get("reason", "")
                    if way == REFERENCE
                    else ""
                    if way == FAST
                    else _general(name, arguments, named)
                )
                self.calls[name, way, reason] += 1

        return method

    def _fast(self, own: Callable) -> Callable:
        def call(calls: PlainCalls, *arguments: Any) -> Any:
            done = own(calls, *arguments)
            if done is not None and self._open:
                self._open[-1]["way"] = FAST
            return done

        return call

    def _reference(self, own: Callable) -> Callable:
        def operation(*arguments: Any, **named: Any) -> Any:
            if self._open and not self._open[-1]:
                self._open[-1].update(way=REFERENCE, reason=_why(arguments))
            return own(*arguments, **named)

        return operation


def _why(arguments: Sequence[Any]) -> str:
    """Why the reference does what a backend was asked."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if modes.wrapping() is not None:
        return "a transform of torch.func, forward-mode derivatives or fake tensors"
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"a {type(tensor).__name__}, which is a subclass of Tensor"
    device = tensors[0].device
    chosen = backends.choose(device)
    if chosen == "reference":
        status = {s.name: s for s in backends.status()}
        others = [s for s in status.values() if device.type in s.devices and s.name != "reference" and not s.available]
        return f"{device.type} has no other backend" + "".join(f"; {s.name}: {s.reason}" for s in others)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors[1:]):
        return "gradients of data, noise or coefficients"
    return f"{chosen} does not do it: {', '.join(sorted({str(t.dtype).removeprefix('torch.') for t in tensors}))}"


def _general(method: str, arguments: Sequence[Any], named: dict[str, Any]) -> str:
    """Why a call was not the plain one."""
    options = [name for name in ("mask", "weight", "reduction", "mask_normalization", "with_target") if name in named]
    if options:
        return f"it has {', '.join(options)}"
    tensors = [a for a in (*arguments, *named.values()) if isinstance(a, Tensor)]
    if any(not t.is_cpu for t in tensors):
        return ""  # one launch each: there is nothing quicker
    if method != "loss" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "a gradient of its data is asked for"
    if any(not t.is_contiguous() for t in tensors):
        return "a tensor is not contiguous"
    return "its times are not one a sample, its dtypes differ, or the process or loss has no such call"


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
    lines = ["objectives"]
    for (name, way, reason), count in sorted(trace.calls.items()):
        lines.append(f"  {name:<10} {count:>6}  {way}{': ' + reason if reason else ''}")
    if not trace.calls:
        lines.append("  no Objective was called")
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
