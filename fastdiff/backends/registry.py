"""The choice of a backend for a device, and the reasons why others are not chosen.

A CPU has the native backend where its extension is there. A CUDA, ROCm or XPU device has the Triton backend where
Triton is, with the sampler step from the CUDA backend where that was built. Every other device has the reference. A
CUDA or XPU device is tried once (``devices.py``): where a backend's kernels cannot be loaded (no code for the device, a
driver too old, no C compiler), one warning says so, and the next backend does the work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..showing import warn
from . import cuda, devices, native, reference, triton
from .interface import Backend
from .native import step_table


@dataclass(frozen=True)
class Status:
    """A backend as ``fastdiff doctor`` shows it. ``reason`` says why it is, or is not, available."""

    name: str
    available: bool
    reason: str
    devices: tuple[str, ...]


# In the order of preference.
_BACKENDS: dict[str, Backend] = {b.name: b for b in (native.backend, cuda.backend, triton.backend, reference.backend)}


def _status(backend: Backend) -> Status:
    because = backend.unavailable_because
    # What is tried on a device is described once it is.
    reason = because or ("" if backend.trial else backend.description())
    return Status(backend.name, not because, reason, backend.devices)


_STATUS = tuple(_status(backend) for backend in _BACKENDS.values())
_CHOICE = {kind: backend.name for backend in reversed(_STATUS) if backend.available for kind in backend.devices}
# What runs on these is compiled for each of their models, so a backend is tried on a device before it is chosen.
_TRIED = {backend.name: backend.trial for backend in _BACKENDS.values() if backend.trial}
_CPU = torch.device("cpu")
_forced: str | None = None
_chosen: dict[tuple[str | None, torch.device], str] = {}  # for what is forced, and a device


def status() -> list[Status]:
    """Every backend, in the order of preference."""
    return [_with_device(backend) for backend in _STATUS]


def _with_device(backend: Status) -> Status:
    """``backend`` as it is on this machine: on the current device, and on those that it was tried on before. Looked up
    when asked for: it initialises CUDA."""
    if backend.name not in _TRIED or not backend.available:
        return backend
    module, unfit_because = _BACKENDS[backend.name], _TRIED[backend.name]
    because = module.no_device_because()
    if because:
        return replace(backend, available=False, reason=because)
    device = devices.current()
    if device is not None and device.type in backend.devices:
        unfit_because(device)
    failed = [f"not on {device}: {because}" for device, because in unfit_because.found.items() if because]
    if failed and len(failed) == len(unfit_because.found):
        return replace(backend, available=False, reason="; ".join(failed))
    return replace(backend, reason="; ".join([module.description(), *failed]))


def choose(device: torch.device | str) -> str:
    """The name of the backend that operations on ``device`` use. Raises RuntimeError where one is forced that cannot
    run on it."""
    return _name(torch.device(device))


def _name(device: torch.device) -> str:
    # A device is compared and looked up sooner than its type is known: that makes a string each time.
    kind = "cpu" if device == _CPU else ""
    if not kind and not torch.compiler.is_compiling():
        found = _chosen.get((_forced, device))
        if found is not None or device.type in ("cuda", "xpu"):
            return found or _try_on(device)
    return _forced or _CHOICE.get(kind or device.type, "reference")


def _try_on(device: torch.device) -> str:
    """The first backend that runs on ``device``. What is found while a CUDA graph is captured, when nothing is tried,
    is for that time alone."""
    if device.index is None:
        current = devices.current()
        return _name(current) if current is not None and current.type == device.type else _forced or "reference"
    failed: dict[str, str] = {}
    name = _forced or "reference"
    for candidate in [_forced] if _forced else [b.name for b in _STATUS if b.available and device.type in b.devices]:
        because = _unfit_because(candidate, device)
        if not because:
            name = candidate
            break
        failed[candidate] = because
    if name in failed:
        raise RuntimeError(f"the backend {name!r} cannot run on {device}: {failed[name]}.")
    if not devices.is_capturing(device):
        _chosen[_forced, device] = name
        if devices.current() is not None:
            for unfit, because in failed.items():
                warn(f"the backend {unfit!r} cannot run on {device}: {because}. {name!r} does.")
    return name


def _unfit_because(name: str, device: torch.device) -> str:
    """Why a backend cannot run on a device of the types that it is for; empty where it can."""
    for_it = any(device.type in backend.devices for backend in _STATUS if backend.name == name)
    return _TRIED[name](device) if name in _TRIED and for_it else ""


def get(device: torch.device) -> Backend:
    """The backend that is asked first on ``device``."""
    return _BACKENDS[_name(device)]


def remakes_noise(device: torch.device) -> bool:
    """Whether noise on ``device`` is made again faster than it is read: then a training step need not keep it."""
    name = _name(device)
    if name == "cuda" and device.type == "cuda" and not torch.compiler.is_compiling():
        if _unfit_because("triton", device):
            return False  # "cuda" has Triton's noise
    return _BACKENDS[name].remakes_noise


class use_backend:
    """Force one backend, from the call on or, as a context manager, for a block. (Tensors that are not on a type of
    device it is for still go to the reference. CPU tensors go to "triton" only in its interpreter, with
    TRITON_INTERPRET=1.)

    Args:
        name: "reference", "native", "triton" or "cuda"; None goes back to the automatic choice.

    Raises ValueError for an unknown name, RuntimeError, saying why, for one that is not available. Where there are
    several devices and it runs on some of them, the first operation on another raises RuntimeError.
    """

    def __init__(self, name: str | None):
        by_name = {backend.name: backend for backend in _STATUS}
        if name is not None and name not in by_name:
            raise ValueError(f"unknown backend {name!r}: use one of {', '.join(by_name)}.")
        if name is not None and not (found := _with_device(by_name[name])).available:
            raise RuntimeError(f"the backend {name!r} is not available: {found.reason}.")
        self._before = _forced
        _force(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_: object) -> None:
        _force(self._before)


def _force(name: str | None) -> None:
    global _forced
    _forced = name
    step_table.allow(choose("cpu") == "native")
