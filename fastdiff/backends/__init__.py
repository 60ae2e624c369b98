"""Which implementation of the operations runs, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch

from . import compiled, cuda, native, reference, triton


@dataclass(frozen=True)
class Status:
    """A backend as ``fastdiff doctor`` shows it. ``reason`` says why it is, or is not, available."""

    name: str
    available: bool
    reason: str
    devices: tuple[str, ...]


_MODULES: dict[str, ModuleType] = {"native": native, "cuda": cuda, "triton": triton, "reference": reference}
_STATUS = (
    Status("native", native.available, native.unavailable_because or native.description(), ("cpu",)),
    Status("cuda", cuda.built, cuda.unavailable_because, ("cuda",)),
    Status("triton", triton.available, triton.unavailable_because, ("cuda", "xpu")),
    Status("reference", True, "plain PyTorch, on every device", ("cpu", "cuda", "mps", "xpu")),
)
_CHOICE = {kind: backend.name for backend in reversed(_STATUS) if backend.available for kind in backend.devices}
_forced: str | None = None


def status() -> list[Status]:
    """Every backend, in the order of preference."""
    return [_with_device(backend) for backend in _STATUS]


def _with_device(backend: Status) -> Status:
    """``backend`` as it is on this machine. Looked up when asked for: it initialises CUDA."""
    if backend.name not in ("cuda", "triton") or not backend.available:
        return backend
    module = _MODULES[backend.name]
    because = module.no_device_because()
    return replace(backend, available=not because, reason=because or module.description())


def choose(device: torch.device | str) -> str:
    """The name of the backend that operations on ``device`` use."""
    return _forced or _CHOICE.get(torch.device(device).type, "reference")


def get(device: torch.device) -> ModuleType:
    """The module with the operations for ``device``; while a program is traced, their operators."""
    if torch.compiler.is_compiling():
        return compiled
    return _MODULES[_forced or _CHOICE.get(device.type, "reference")]


def remakes_noise(device: torch.device | str) -> bool:
    """Whether noise on ``device`` is made again faster than it is read: then a training step need not keep it."""
    return getattr(_MODULES[choose(device)], "remakes_noise", False)


class use_backend:
    """Force one backend, from the call on or, as a context manager, for a block. (Tensors that are not on a device it
    is for still go to the reference. CPU tensors go to "triton" only in its interpreter, with TRITON_INTERPRET=1.)

    Args:
        name: "reference", "native", "triton" or "cuda"; None goes back to the automatic choice.

    Raises ValueError for an unknown name, RuntimeError, saying why, for one that is not available.
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
    native.prepared.allow(choose("cpu") == "native")
