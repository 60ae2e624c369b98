"""Processes whose levels are the numbers of another library's tables: what is computed with them is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .process import EDM, Levels, Process, RectifiedFlow, VariancePreserving, as_float64
from .tensors import cached, gather_rows


class _Reads:
    """An object that notes which attributes are read of it, and what they hold then."""

    def __init__(self, source: Any):
        self._source, self._held = source, {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._source, name)
        self._held.setdefault(name, _Held(value))
        return value


class _Held:
    """What an attribute holds: a copy of an array on the CPU; of a tensor on an accelerator, where comparing would wait
    for it, the version; anything else itself."""

    def __init__(self, value: Any):
        self.value, self.version = value, None
        if isinstance(value, Tensor) and not value.is_cpu:
            self.version = _version(value)
        elif isinstance(value, Tensor):
            self.value = value.detach().clone()
        elif hasattr(value, "__array__"):
            self.value = value.copy()

    def equals(self, now: Any) -> bool:
        before = self.value
        if self.version is not None:
            return now is before and _version(now) == self.version
        if isinstance(before, Tensor):
            same = isinstance(now, Tensor) and now.is_cpu and now.dtype == before.dtype
            return same and torch.equal(now, before)
        if hasattr(before, "__array__"):
            return getattr(now, "shape", None) == before.shape and bool((now == before).all())
        return now is before or now == before


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def kept(store: dict[Any, Any], key: Any, source: Any, make: Callable[[Any], Any]) -> Any:
    """``make(source)``, kept in ``store`` as long as the attributes of ``source`` that it reads hold what they held."""
    found = store.get(key)
    if found is None or not all(held.equals(getattr(source, name, None)) for name, held in found[0].items()):
        reads = _Reads(source)
        made = make(reads)
        found = store[key] = reads._held, made
    return found[1]


def _column(values: Any) -> Tensor:
    """float64 [steps] on the CPU, a copy: the schedule that it is from may be changed in place."""
    column = as_float64(values).detach().to("cpu", torch.float64).clone()
    if column.ndim != 1 or not len(column):
        raise ValueError(f"a schedule must be 1-D with at least one value; got shape {tuple(column.shape)}.")
    return column


class TabulatedVP(VariancePreserving):
    """A variance-preserving process of given alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar), each [steps].

    Raises ValueError unless both lie in [0, 1], are equally long and alpha never rises.
    """

    def __init__(self, alpha: Any, sigma: Any):
        self._alpha, self._sigma = _column(alpha), _column(sigma)
        a, s = self._alpha, self._sigma
        if a.shape != s.shape:
            raise ValueError(f"alpha and sigma must be equally long; got {len(a)} and {len(s)}.")
        if not bool(((a >= 0) & (a <= 1) & (s >= 0) & (s <= 1)).all()) or not bool((a.diff() <= 0).all()):
            raise ValueError(
                f"alpha and sigma must lie in [0, 1], and alpha must not rise; got alpha {a[:5].tolist()}... and sigma "
                f"{s[:5].tolist()}..."
            )
        self.schedule, self.steps = "given", len(a)
        self.zero_terminal_snr = float(a[-1]) == 0.0
        self._betas = 1 - (a / torch.cat([a.new_ones(1), a[:-1]])) ** 2
        self._tables: dict[torch.device, Tensor] = {}


class _Indexed(Process):
    """t is an index into tables of sigmas and of what the network is told; index 0 is the noisiest."""

    discrete = True
    t_is_sigma = False
    check_t = VariancePreserving.check_t

    def _tabulate(self, sigmas: Any, model_times: Any) -> None:
        self._sigmas, self._model_times = _column(sigmas), _column(model_times)
        if self._sigmas.shape != self._model_times.shape:
            raise ValueError(f"{len(self._sigmas)} sigmas, but {len(self._model_times)} times: they must be as many.")
        self.steps = len(self._sigmas)
        self._tables: dict[Any, Tensor] = {}

    def _at(self, name: str, t: Tensor) -> Tensor:
        wide = torch.float32 if t.device.type == "mps" else torch.float64
        table = cached(self._tables, (name, t.device), lambda: getattr(self, name).unsqueeze(-1).to(t.device, wide))
        return gather_rows(table, t).squeeze(-1)

    def grid(self, steps: int) -> Tensor:
        if steps > self.steps:
            raise ValueError(f"steps must lie in [1, {self.steps}] for {self!r}; got {steps}.")
        return torch.arange(steps, device="cpu") * self.steps // steps

    def fraction(self, t: Tensor) -> Tensor:
        return 1 - as_float64(t) / self.steps

    def time_at(self, part: Tensor) -> Tensor:
        return ((1 - part) * self.steps).long().clamp(0, self.steps - 1)

    def model_time(self, levels: Levels) -> Tensor:
        return self._at("_model_times", levels.t)


class TabulatedFlow(_Indexed, RectifiedFlow):
    """A rectified flow x_t = (1 - sigma) x0 + sigma n at given sigmas [steps]; t is an index into them."""

    def __init__(self, sigmas: Any, model_times: Any):
        RectifiedFlow.__init__(self)
        self._tabulate(sigmas, model_times)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self._at("_sigmas", t)
        return 1 - sigma, sigma


class TabulatedEDM(_Indexed, EDM):
    """x_t = x0 + sigma n at given sigmas [steps]; t is an index into them."""

    def __init__(self, sigmas: Any, model_times: Any, sigma_data: float):
        EDM.__init__(self, sigma_data)
        self._tabulate(sigmas, model_times)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self._at("_sigmas", t)
        return torch.ones_like(sigma), sigma
