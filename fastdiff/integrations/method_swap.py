"""Giving one object fused methods, and taking them back.

The object's class becomes a subclass of its own class, so ``isinstance``, its state and copies of it stay as they are.
A method is replaced only if it is known (its arguments are) and if it gives the numbers of the original, and draws as
many random numbers, on a small random input at the time of fusing: a subclass that computes something else, or a
release that changed a formula, keeps its own method, and ``left_alone`` says why.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Probes run in float32 on values of about 1; formulas that differ do so by far more than the roundings.
TOLERANCE = 1e-4


@dataclass
class Fused:
    """What ``fuse`` notes on an object: the methods it replaced, why not the others, and its options and tables."""

    methods: tuple[str, ...]
    left_alone: dict[str, str]
    options: dict[str, Any]
    tables: dict[Any, Tensor] = field(default_factory=dict)


def fused_methods(obj: Any) -> tuple[str, ...]:
    """The names of the methods of ``obj`` that are fused; () for an object that is not."""
    note = getattr(obj, "_fastdiff", None)
    return note.methods if isinstance(note, Fused) else ()


def left_alone(obj: Any) -> dict[str, str]:
    """The methods that could be fused and are not, each with the reason."""
    note = getattr(obj, "_fastdiff", None)
    return dict(note.left_alone) if isinstance(note, Fused) else {}


def unfuse(obj: Any) -> Any:
    """Give ``obj`` its own methods back; returns it. Nothing happens to an object that is not fused."""
    if fused_methods(obj):
        obj.__class__ = type(obj)._fastdiff_original
        del obj.__dict__["_fastdiff"]
    return obj


def fuse_methods(
    obj: Any,
    methods: Mapping[str, Callable],
    probes: Mapping[str, Callable[[Any], Any]],
    shadow: Callable[[Any], Any],
    **options: Any,
) -> Any:
    """Replace those of ``methods`` that are known and give the original's numbers; returns ``obj``.

    Args:
        probes: for each method, a function that calls it on an object; None: it is not tried.
        shadow: makes a copy of ``obj`` that may be called without consequences.

    Raises TypeError if none can be replaced, with the reasons.
    """
    if fused_methods(obj):
        return obj
    original = type(obj)
    chosen, reasons = {}, {}
    for name, method in methods.items():
        reason = _unknown(original, name, method) or _differs(obj, name, method, probes[name], shadow, options)
        if reason:
            reasons[name] = reason
        else:
            chosen[name] = method
    if not chosen:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise TypeError(f"nothing of {original.__name__} can be fused. {told}.")
    _become(obj, original, chosen, Fused(tuple(chosen), reasons, options))
    return obj


def _become(obj: Any, original: type, methods: Mapping[str, Callable], note: Fused) -> None:
    obj.__class__ = _subclass(original, tuple(sorted(methods.items())))
    obj.__dict__["_fastdiff"] = note


_subclasses: dict[tuple, type] = {}


def _subclass(original: type, methods: tuple[tuple[str, Callable], ...]) -> type:
    key = original, methods
    if key not in _subclasses:
        body = dict(methods) | {"_fastdiff_original": original, "_fastdiff_methods": methods, "__reduce_ex__": _reduce}
        _subclasses[key] = type("Fused" + original.__name__, (original,), body)
    return _subclasses[key]


def _reduce(self: Any, protocol: int) -> tuple:
    """Pickled as an object of its own class that is to be given the same methods again."""
    cls = type(self)
    _, _, *rest = super(cls, self).__reduce_ex__(max(protocol, 2))
    return (_restore, (cls._fastdiff_original, cls._fastdiff_methods), *rest)


def _restore(original: type, methods: tuple) -> Any:
    obj = original.__new__(original)
    obj.__class__ = _subclass(original, methods)
    return obj


def _unknown(original: type, name: str, method: Callable) -> str | None:
    """Why a method cannot be replaced by ``method``, whatever it computes."""
    own = getattr(original, name, None)
    if own is None:
        return "there is no such method"
    named = {
        p.name
        for p in inspect.signature(own).parameters.values()
        if p.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }
    unknown = named - set(inspect.signature(method).parameters)
    return f"it takes arguments that are not known here ({', '.join(sorted(unknown))})" if unknown else None


def _differs(obj, name, method, probe, shadow, options) -> str | None:
    """Why ``method`` is not what the object's own does, from trying both; None if it is, or is not to be tried."""
    if probe is None:
        return None
    device = _device(obj)
    try:
        theirs, their_draws = _tried(shadow(obj), probe, device)
    except Exception as error:
        return f"it could not be tried ({type(error).__name__}: {error})"
    twin = shadow(obj)
    _become(twin, type(obj), {name: method}, Fused((name,), {}, options))
    try:
        ours, our_draws = _tried(twin, probe, device)
    except Exception as error:
        return f"it has settings that are not known here ({type(error).__name__}: {error})"
    if len(ours) != len(theirs) or not all(_close(a, b) for a, b in zip(ours, theirs)):
        return "this class or release computes something else"
    if not torch.equal(our_draws, their_draws):
        return "this class or release draws other random numbers"
    return None


def _tried(obj: Any, probe: Callable[[Any], Any], device: torch.device) -> tuple[list[Tensor], Tensor]:
    """The tensors that ``probe`` gives, from a fixed seed, and the state of the generator after it."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            random.seed(0)
            result = _tensors(probe(obj))
            after = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.random.get_rng_state()
            return result, after
    finally:
        random.setstate(state)


def _device(obj: Any) -> torch.device:
    device = getattr(obj, "device", None)
    return torch.device(device) if isinstance(device, (str, torch.device)) else torch.device("cpu")


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for key in sorted(value) for t in _tensors(value[key])]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return not a.numel() or bool((a - b).abs().max() <= TOLERANCE * (1 + b.abs().max()))
