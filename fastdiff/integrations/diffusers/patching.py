"""Putting the fused methods in place, for one scheduler or for all, and taking them away again."""

from __future__ import annotations

import copy
import copyreg
import importlib.metadata
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from ...from_scheduler import check_scheduler
from ...showing import warn
from .call_counts import left
from .coefficient_cache import KEPT, Cache
from .supported import SUPPORTED, SWITCH, own, resolve, unknown

_active: list[patch] = []  # every patch() that was not undone
_installed: list[tuple[type, str, Callable]] = []


def _base(cls: type) -> type | None:
    """The supported class of diffusers that ``cls`` is or comes from."""
    for parent in cls.__mro__:
        if parent.__name__ in SUPPORTED and parent is resolve(parent.__name__):
            return parent
    return None


def _refusal(base: type, name: str) -> Callable[[Any], str | None]:
    """Says of a scheduler why its method ``name`` is not fused, whatever its config; None if it may be."""
    parts = {part: own(base, part) for part in SUPPORTED[base.__name__][name].digests if part != name}

    def refuse(scheduler: Any) -> str | None:
        cls = type(scheduler)
        for part, function in parts.items():
            if part in scheduler.__dict__:
                return f"the scheduler has a {part} of its own"
            if getattr(cls, part, None) is not function:
                return f"{cls.__name__} has a {part} of its own"
        return None

    return refuse


@cache
def _replacement(base: type, name: str, original: Callable, shared: bool) -> Callable:
    """The fused method for ``original``, the method ``name`` of a supported class; ``shared``: for the class."""
    counted = f"{base.__name__}.{name}"
    if name == SWITCH:
        replaced = _following(base, original, shared)
    else:
        reason, method = unknown(base, name), SUPPORTED[base.__name__][name]
        if reason is not None:
            replaced = _passing(counted, reason, original)
        else:
            coefficients = Cache(method.coefficients, _refusal(base, name))
            replaced = method.fused(original, counted, coefficients)
            replaced._fastdiff_cache = coefficients
    replaced._fastdiff_original = original
    return replaced


@cache
def _passing(counted: str, reason: str, original: Callable) -> Callable:
    """A method that only counts why it is not fused."""

    @wraps(original)
    def passed(self, *arguments, **named):
        return left(counted, reason, original, self, *arguments, **named)

    passed._fastdiff_original = original
    return passed


def _following(base: type, original: Callable, shared: bool) -> Callable:
    """``set_timesteps`` that makes the coefficients of ``step`` too, so that no step waits for them."""
    coefficients = getattr(_replacement(base, "step", own(base, "step"), shared), "_fastdiff_cache", None)

    @wraps(original)
    def set_timesteps(self, *arguments, **named):
        result = original(self, *arguments, **named)
        if coefficients is not None and coefficients.enabled:
            coefficients.build(self)
        return result

    return set_timesteps


def _methods(base: type) -> tuple[str, ...]:
    return (*SUPPORTED[base.__name__], SWITCH)


def _from_diffusers(function: Any) -> bool:
    """Whether diffusers itself defined this function; it was not wrapped by another library."""
    return "/diffusers/" in getattr(getattr(function, "__code__", None), "co_filename", "").replace("\\", "/")


def _fused_methods(cls: type, base: type) -> tuple[tuple[str, Callable], ...]:
    """What ``fuse`` gives to an object of ``cls``, by name."""
    chosen = []
    for name in _methods(base):
        original = own(cls, name)
        if original is own(base, name) and _from_diffusers(original):
            chosen.append((name, _replacement(base, name, original, False)))
        elif name != SWITCH:
            reason = f"{cls.__name__} has a {name} of its own"
            chosen.append((name, _passing(f"{base.__name__}.{name}", reason, original)))
    return tuple(chosen)


@cache
def _fused_class(cls: type, methods: tuple[tuple[str, Callable], ...]) -> type:
    """A subclass of ``cls``, under its name, with these methods: so that a copy of an object steps itself."""
    body = dict(methods) | {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"_fastdiff_class": cls, "__copy__": _copied, "__deepcopy__": _deeply_copied, "__reduce_ex__": _reduced}
    return type(cls.__name__, (cls,), body)


def _copied(self: Any) -> Any:
    made = object.__new__(type(self))
    made.__dict__ |= self.__dict__
    return made


def _deeply_copied(self: Any, memo: dict) -> Any:
    made = memo[id(self)] = object.__new__(type(self))
    made.__dict__ |= copy.deepcopy(self.__dict__, memo)
    return made


def _reduced(self: Any, protocol: int) -> tuple:
    """Pickled as an object that is not fused: where it is read fastdiff need not be."""
    state = {name: value for name, value in self.__dict__.items() if name not in KEPT}
    return copyreg._reconstructor, (type(self)._fastdiff_class, object, None), state  # type: ignore[attr-defined]


def fuse(scheduler: Any) -> Any:
    """Fuse the methods of this scheduler object, and of no other; returns it.

    Its class becomes a subclass of its class, of the same name. A method that its class, or the object, has of its own
    is called as it is, and one of its class is counted among ``fallbacks()``. Fusing twice is fusing once; ``unfuse``
    undoes it. A copy, shallow or deep, is fused too and goes by its own timesteps and state; what is unpickled is not
    fused.

    Raises TypeError for what is no scheduler that is covered. Warns where this version of diffusers is not known.
    """
    base = _base(type(scheduler))
    if base is None:
        check_scheduler(scheduler, "fuse")
        raise TypeError(
            f"fuse() takes a scheduler of diffusers, one of {', '.join(SUPPORTED)} or of a class made from one; "
            f"got {type(scheduler).__name__}."
        )
    if "_fastdiff_class" in type(scheduler).__dict__:
        return scheduler
    _warn_unknown([base])
    for name in _methods(base):
        if name in scheduler.__dict__:
            warn(f"the scheduler has a {name} of its own: fastdiff leaves it alone.")
    cls = type(scheduler)
    scheduler.__class__ = _fused_class(cls, _fused_methods(cls, base))
    return scheduler


def unfuse(scheduler: Any) -> Any:
    """Take back ``fuse`` of this object; returns it. One that is not fused stays as it is."""
    original = type(scheduler).__dict__.get("_fastdiff_class")
    if original is not None:
        scheduler.__class__ = original
    for name in KEPT:
        scheduler.__dict__.pop(name, None)
    return scheduler


class patch:
    """Fuse every scheduler of the supported classes of diffusers, those that are there and those to come: from the call
    on until ``unpatch()``, or as a context manager for a block.

    Patches nest: the classes are as they were when the last is undone, in whatever order. A method that another library
    has replaced before is left alone, with a warning. One that is replaced afterwards stays replaced when this is
    undone, and what it hands on to the fused method underneath then goes to diffusers.

    Raises ImportError without diffusers. Warns where this version of diffusers is not known, and leaves it as it is.
    """

    def __init__(self):
        bases = [base for base in map(resolve, SUPPORTED) if base is not None]
        if not bases:
            raise ImportError("patch() needs the diffusers library: install fastdiff[diffusers].")
        if not _active:
            _warn_unknown(bases)
            for base in bases:
                _install(base)
        _active.append(self)

    def undo(self) -> None:
        """Undo this one; a second time does nothing."""
        if self in _active:
            _active.remove(self)
            if not _active:
                _restore()

    def __enter__(self) -> patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def unpatch() -> None:
    """Undo every ``patch()``. Objects that were fused one by one stay fused."""
    if _active:
        _active.clear()
        _restore()


def _enable(function: Callable, enabled: bool) -> None:
    coefficients = getattr(function, "_fastdiff_cache", None)
    if coefficients is not None:
        coefficients.enabled = enabled


def _install(base: type) -> None:
    for name in _methods(base):
        found = base.__dict__.get(name)
        if hasattr(found, "__wrapped__") or not _from_diffusers(found):
            warn(f"{base.__name__}.{name} is not diffusers' own: fastdiff leaves it alone.")
            continue
        replaced = _replacement(base, name, found, True)
        _enable(replaced, True)
        setattr(base, name, replaced)
        _installed.append((base, name, replaced))


def _restore() -> None:
    for base, name, replaced in _installed:
        if base.__dict__.get(name) is replaced:
            setattr(base, name, replaced._fastdiff_original)
        else:  # another library's is in its place, and may still call ours
            _enable(replaced, False)
    _installed.clear()


def _warn_unknown(bases: list[type]) -> None:
    reasons = [reason for base in bases for name in SUPPORTED[base.__name__] if (reason := unknown(base, name))]
    if reasons:
        warn(
            f"diffusers {importlib.metadata.version('diffusers')}: {'; '.join(dict.fromkeys(reasons))}. "
            f"What needs it is left as it is."
        )
