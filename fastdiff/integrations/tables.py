"""Processes whose levels are the numbers of another library's tables: what is computed with them is the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.rows import cached, gather_rows
from ..process import EDM, Levels, Process, RectifiedFlow, VariancePreserving, as_float64


def _column(values: Any) -> Tensor:
    """float64 [steps] on the CPU."""
    column = as_float64(values).detach().to("cpu", torch.float64)
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

    def fraction(self, t: Tensor) -> Tensor:
        return 1 - as_float64(t) / self.steps

    def time(self, fraction: Tensor) -> Tensor:
        return ((1 - fraction) * self.steps).long().clamp(0, self.steps - 1)

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
