"""The modes of PyTorch that a call may run under: transforms of ``torch.func``, forward-mode derivatives, fake tensors,
``torch.inference_mode``.

Under a transform, forward-mode derivatives or fake tensors, a tensor has no memory of its own, or means more than its
memory says: then the reference computes, which is plain PyTorch. What is made once and kept is made as a plain tensor,
whatever mode its first use is in (``lasting``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

_functorch = torch._C._functorch
_transform, _modes = _functorch.peek_interpreter_stack, torch._C._len_torch_dispatch_stack
_is_compiling = torch.compiler.is_compiling
_get_mode, _FAKE = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.FAKE


class Recording(TorchDispatchMode):
    """The base of a mode that writes operations down, to be done again with other numbers. Under it values must not be
    looked at."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # no program is traced in it; to see to that, PyTorch would import its compiler, for two seconds


def fake_mode() -> Any:
    """The ``FakeTensorMode`` that is on, or None."""
    return _get_mode(_FAKE) if _modes() else None


def wrapping() -> Any:
    """None if a tensor is no more than its memory; otherwise the mode under which it is: a transform of ``torch.func``,
    forward-mode derivatives, or fake tensors."""
    transform = _transform()
    if transform is not None or (forward_ad._current_level < 0 and not _modes()):
        return transform
    return True if forward_ad._current_level >= 0 else fake_mode()


def any_mode() -> bool:
    """Whether a transform, forward-mode derivatives or any dispatch mode of PyTorch is on, which may see or change what
    is drawn."""
    return _modes() > 0 or wrapping() is not None


def has_values(tensor: Tensor) -> bool:
    """Whether a number can be read from a tensor: not where it stands for a batch (``vmap``), for other numbers
    (``Recording``), or is fake."""
    if _modes() and (fake_mode() is not None or isinstance(_get_current_dispatch_mode(), Recording)):
        return False
    if _transform() is None:
        return True
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written into; None for a tensor that does not count it."""
    return None if _is_compiling() or tensor.is_inference() else tensor._version


def is_many(gradient: Tensor) -> bool:
    """Whether an upstream gradient stands for several at once: ``vmap`` over a backward, ``is_grads_batched``."""
    return _functorch.is_legacy_batchedtensor(gradient) or _functorch.is_functorch_wrapped_tensor(gradient)


@contextmanager
def gradients() -> Iterator[None]:
    """A block in which gradients are computed, whatever mode it is called in. Tensors from outside of it go through
    ``plain``: those made under ``torch.inference_mode`` have no gradients, and cannot be kept for one."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def plain(tensor: Tensor) -> Tensor:
    """``tensor``, or in a block of ``gradients`` a copy of one that was made under ``torch.inference_mode``."""
    return tensor.clone() if tensor.is_inference() else tensor


@contextmanager
def lasting() -> Iterator[None]:
    """A block that makes tensors which are kept: they are plain, outside of every transform, mode and graph."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
    ):
        yield
