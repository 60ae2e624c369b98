"""The schedulers of diffusers that can be fused: all records in ``schedulers/``, by the names of the classes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from . import schedulers
from .source_digests import Method, fingerprint

SWITCH = "set_timesteps"  # followed, so that coefficients are made before the first step


def _records() -> dict[str, dict[str, Method]]:
    files = [
        importlib.import_module(f"{schedulers.__name__}.{file.name}")
        for file in pkgutil.iter_modules(schedulers.__path__)
    ]
    return {name: methods for file in files for name, methods in file.SCHEDULERS.items()}


# {"DDPMScheduler": {"step": Method(...), "add_noise": Method(...), ...}, ...}
SUPPORTED = _records()


def resolve(name: str) -> type | None:
    """The class of that name of the installed diffusers, or None."""
    try:
        return getattr(importlib.import_module("diffusers.schedulers"), name, None)
    except (ImportError, RuntimeError):  # RuntimeError: what diffusers' lazy modules make of an ImportError
        return None


def own(cls: type, name: str) -> Any:
    """What ``cls`` has under that name without a replacement of ours; None if nothing."""
    found = inspect.getattr_static(cls, name, None)
    return getattr(found, "_fastdiff_original", found)


def unknown(base: type, name: str) -> str | None:
    """Why the method ``name`` of a supported class is none that the fused one was made for; None if it is one."""
    for part, digests in SUPPORTED[base.__name__][name].digests.items():
        called = f"{base.__name__}.{part}"
        function = own(base, part)
        if function is None:
            return f"{called} is missing"
        found = fingerprint(function)
        if found is None:
            return f"the source of {called} is not there to be compared"
        if found not in digests:
            return f"{called} is none that fastdiff knows"
    return None
