"""Coefficients that are kept with a scheduler between two calls, and how a call finds out whether they still fit.

A scheduler is called from outside, one step at a time. Its coefficients are made when ``set_timesteps`` ends, or at the
first call, and are kept in the scheduler's ``__dict__``. A later call uses them again if the scheduler still holds the
same tensors with the same contents, the same config, and the same values of a few attributes. Otherwise they are made
anew.

On the CPU contents are compared with a copy, which is cheap for the small tensors of a scheduler. (Versions would not
do: ``torch.inference_mode``, ``.data`` and numpy change a tensor without changing its version.) On an accelerator a
comparison would wait for the device, so there it is the version that is compared, where the tensor has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...torch_access import _C

untraced = torch.compiler.disable
# The names under which coefficients are kept in a scheduler's __dict__: those of ``step``, of ``add_noise`` and its
# like, and of ``scale_model_input``.
KEPT = STEPS, NOISE, INPUT = "_fastdiff_steps", "_fastdiff_noise", "_fastdiff_input"


class Unfit(Exception):
    """Why a scheduler, as it is configured, is left to diffusers."""


def _is_current(watched: tuple, held: dict[str, Any]) -> bool:
    tensors, versions, others, config, settings = watched
    for name, tensor, before in tensors:
        if held.get(name) is not tensor or (before is not None and not torch.equal(tensor, before)):
            return False
    for tensor, version in versions:
        if tensor._version != version:
            return False
    for name, value in others:
        found = held.get(name)
        if found is not value and found != value:
            return False
    return held["_internal_dict"] is config and config.__dict__ == settings


# (coefficients.watched, scheduler.__dict__) -> whether the scheduler still has what the coefficients were made from.
is_current = _is_current if _C is None else _C.is_current


class Coefficients:
    """Base of what is kept with a scheduler. A subclass makes its coefficients in ``make``.

    Attributes:
        kept_as: the name under which it is kept in the scheduler's ``__dict__``.
        tensor_names: the scheduler's tensors that the coefficients are made from.
        other_names: further attributes of the scheduler that they depend on.
        reason: why diffusers has to do every call of this scheduler; None if it has not.
        fast: whether the fast call, which reads its tensors in C, may be tried.
        lasting: whether a scheduler with equal numbers would get the same again.
    """

    kept_as: str
    tensor_names: tuple[str, ...] = ()
    other_names: tuple[str, ...] = ()
    reason: str | None = None
    fast, lasting = False, True

    def __init__(self, scheduler: Any):
        held = scheduler.__dict__
        self.config = held["_internal_dict"]
        self.settings = dict(self.config.__dict__)
        self.others = tuple((name, held.get(name)) for name in self.other_names)
        self.watch(held)
        self.make(scheduler, self.config)

    def make(self, scheduler: Any, config: Any) -> None:
        """Make the coefficients. Raises Unfit where there are none."""
        raise NotImplementedError

    def watch(self, held: dict[str, Any]) -> None:
        """Note the tensors that the scheduler has now as those that the coefficients were made from."""
        self.tensors = tuple((name, held.get(name)) for name in self.tensor_names)
        contents = tuple((name, tensor, _copy_of(tensor)) for name, tensor in self.tensors)
        versions = tuple(
            (tensor, tensor._version)
            for _, tensor, before in contents
            if before is None and isinstance(tensor, Tensor) and not tensor.is_inference()
        )
        self.watched = contents, versions, self.others, self.config, self.settings

    def reused(self, scheduler: Any) -> Coefficients | None:
        """A copy of these coefficients that watches the scheduler's present tensors, if those are on the CPU and hold
        the numbers that the coefficients were made from; else None. It is a copy, since a copy of the scheduler may
        still use the original."""
        held = scheduler.__dict__
        config = held["_internal_dict"]
        if config is not self.config or config.__dict__ != self.settings:
            return None
        if any(held.get(name) != value for name, value in self.others):
            return None
        for name, tensor, before in self.watched[0]:
            now = held.get(name)
            if now is None and tensor is None:
                continue
            if before is None or not isinstance(now, Tensor) or not now.is_cpu or now.dtype != before.dtype:
                return None
            if now.shape != before.shape or not torch.equal(now, before):
                return None
        again = object.__new__(type(self))
        again.__dict__ |= self.__dict__
        again.watch(held)
        return again

    def __deepcopy__(self, memo: Any) -> None:
        return None  # a copied scheduler makes its own

    def __reduce__(self) -> Any:
        return type(None), ()


def _copy_of(tensor: Any) -> Tensor | None:
    return tensor.detach().clone() if isinstance(tensor, Tensor) and tensor.is_cpu and tensor.numel() else None


class Refused(Coefficients):
    """Kept in place of coefficients ``of`` a scheduler that is left to diffusers, and why. It depends on the same
    tensors and attributes, so that a scheduler that changes is looked at again."""

    def __init__(self, scheduler: Any, of: type[Coefficients], reason: str, lasting: bool):
        self.tensor_names, self.other_names = of.tensor_names, of.other_names
        self.reason, self.lasting = reason, lasting
        super().__init__(scheduler)

    def make(self, scheduler: Any, config: Any) -> None:
        pass


class _Undone:
    reason, fast = "patch() was undone", False


_UNDONE = _Undone()


class Cache:
    """Gives the coefficients of a scheduler: those that are kept with it, or new ones.

    Args:
        kind: the class of the coefficients.
        refuse: says of a scheduler why it is left alone whatever its config; None if it is not.

    ``enabled`` is False once the method that this belongs to should no longer be called.
    """

    def __init__(self, kind: type[Coefficients], refuse: Callable[[Any], str | None]):
        self.kind, self.refuse, self.kept_as = kind, refuse, kind.kept_as
        self.enabled = True

    def __call__(self, scheduler: Any) -> Any:
        if not self.enabled:
            return _UNDONE
        held = scheduler.__dict__
        found = held.get(self.kept_as)
        if found is None or not is_current(found.watched, held):
            found = self.build(scheduler)
        return found

    def build(self, scheduler: Any) -> Any:
        """Make the coefficients anew and keep them. If they were made from equal numbers before, they are reused."""
        reason, found = self.refuse(scheduler), None
        before, lasting = scheduler.__dict__.get(self.kept_as), reason is None
        if reason is None:
            try:
                found = before.reused(scheduler) if before is not None and before.lasting else None
                found = self.kind(scheduler) if found is None else found
            except Exception as error:  # whatever is odd about a scheduler, its own method has to say
                reason = str(error) or type(error).__name__
        if found is None:
            found = Refused(scheduler, self.kind, reason or "", lasting)
        scheduler.__dict__[self.kept_as] = found
        return found

    @untraced
    def _untraced(self, scheduler: Any) -> Any:
        return self(scheduler)

    def traced(self, scheduler: Any) -> Any:
        """The coefficients, while a program is traced. Those that are kept are taken without a break of the graph as
        long as the scheduler has the same tensors."""
        if not self.enabled:
            return _UNDONE
        found = getattr(scheduler, self.kept_as, None)
        if found is None or any(getattr(scheduler, name, None) is not tensor for name, tensor in found.tensors):
            return self._untraced(scheduler)
        return found


# ---------------------------------------------------------------------------- for those who make coefficients


def host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def exact(tensor: Tensor) -> Tensor:
    return host(tensor).double()


def need(config: Any, **accepted: Any) -> None:
    """Raise Unfit unless each setting has one of the values ``accepted``."""
    for name, values in accepted.items():
        value = getattr(config, name, values[0])
        if value not in values:
            raise Unfit(f"{name}={value!r}")


VP = ("epsilon", "sample", "v_prediction")


def kind_of(config: Any, accepted: tuple[str, ...] = VP) -> str:
    """fastdiff's name of what the network predicts. Raises Unfit unless the config's is one of those ``accepted``."""
    kind = config.prediction_type
    if kind not in accepted:
        raise Unfit(f"prediction_type={kind!r}")
    return {"original_sample": "sample", "flow_prediction": "flow"}.get(kind, kind)
