"""Which calls were fused and which were left to diffusers, and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

_fused: Counter[str] = Counter()
fused = _fused  # for what counts many a call: fused[name] += 1, where nothing is traced
_fallbacks: dict[str, Counter[str]] = {}


def fused_calls() -> dict[str, int]:
    """How many calls of each method were fused since the last ``reset_counts``: {"DDPMScheduler.step": 50, ...}. A
    compiled program's calls are counted when it is traced, not when it runs."""
    return dict(_fused)


def fallbacks() -> dict[str, dict[str, int]]:
    """How many calls were left to diffusers, by method and reason."""
    return {name: dict(reasons) for name, reasons in _fallbacks.items()}


def reset_counts() -> None:
    """Begin both counts anew."""
    _fused.clear()
    _fallbacks.clear()


@torch.compiler.assume_constant_result
def _traced(name: str, reason: str | None) -> int:
    if reason is None:
        _fused[name] += 1
    else:
        _fallbacks.setdefault(name, Counter())[reason] += 1
    return 0


def count(name: str) -> None:
    if torch.compiler.is_compiling():
        _traced(name, None)
    else:
        _fused[name] += 1


def left(name: str, reason: str, original: Any, *arguments: Any, **named: Any) -> Any:
    """Call what diffusers has."""
    if torch.compiler.is_compiling():
        _traced(name, reason)
    else:
        _fallbacks.setdefault(name, Counter())[reason] += 1
    return original(*arguments, **named)
