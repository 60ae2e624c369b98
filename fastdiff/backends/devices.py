"""Which devices a backend's kernels run on, found out by trying; and whether a device's launches are captured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes


class Trial:
    """Why kernels cannot run on a device; empty if they can. ``attempt`` loads one of them there, or raises. It is
    called once a device, and not while a CUDA graph is captured, which that would break: until then they cannot run.

    Attributes:
        found: the devices that were tried.
    """

    def __init__(self, attempt: Callable[[torch.device], None]):
        self._attempt = attempt
        self.found: dict[torch.device, str] = {}

    def __call__(self, device: torch.device) -> str:
        because = self.found.get(device)
        if because is None:
            if is_capturing(device):
                return "nothing ran on it before a CUDA graph was captured"
            because = self.found[device] = self._try(device)
        return because

    def _try(self, device: torch.device) -> str:
        try:
            with _disable_current_modes():  # which would see it, or make its tensors fake
                self._attempt(device)
        except torch.OutOfMemoryError:
            raise  # that says nothing about the kernels
        except Exception as error:
            # Of an assembler's error the third line says what was wrong, and listings follow.
            said = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
            return said[:300].rstrip(". ") or type(error).__name__
        return ""


def is_capturing(device: torch.device) -> bool:
    """Whether launches on the current stream of ``device`` are being recorded in a CUDA graph."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    if device.index is None or device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def current() -> torch.device | None:
    """The current accelerator, of those that kernels are for; None where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu", torch.xpu.current_device())
    return None
