"""The options of sampling that look at the network's output before a step: guidance in an interval of times, rescaled
guidance, dynamic thresholding, classifier guidance; and Langevin steps, whose size depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..numeric import check_numbers
from ..ops.checks import check_tensor
from ..ops.step import COLUMNS
from ..ops.step_table import PreparedSteps
from ..samplers import Plan, Sampler
from ..showing import brief

_AT = {name: k for k, name in enumerate(COLUMNS)}
_OF_OUTPUT = torch.tensor([name in ("p_m", "c_m", "h_m") for name in COLUMNS], dtype=torch.float64, device="cpu")


class Guidance:
    """The options of ``fastdiff.sample`` that have to look at the network's output before the step, checked.

    Attributes:
        guided: for each row, whether the unconditional half is computed.
        rows: the step table of the plan, with a history entry for the gradient of the mean if there is one.
        looks: whether an option looks at the output: then each step needs ``prepare``.
    """

    def __init__(
        self,
        plan: Plan,
        sampler: Sampler,
        guidance: float | Tensor,
        has_uncond: bool,
        interval: tuple[float, float] | None,
        rescale: float,
        quantile: float | None,
        most: float | None,
        cond_fn: Callable[[Tensor, Tensor], Tensor] | None,
    ):
        check_numbers(guidance=1.0 if isinstance(guidance, Tensor) else guidance, guidance_rescale=rescale)
        optional = {"dynamic_thresholding": quantile, "sample_max_value": most}
        check_numbers(**{name: value for name, value in optional.items() if value is not None})
        if interval is not None:
            if not isinstance(interval, Sequence) or len(interval) != 2 or isinstance(interval, str):
                raise TypeError(f"guidance_interval must be (low, high), two times; got {brief(interval)}.")
            check_numbers(**dict(zip(("guidance_interval[0]", "guidance_interval[1]"), interval)))
        if interval is not None and not (has_uncond and interval[0] <= interval[1]):
            raise ValueError(
                f"guidance_interval=(low, high) needs guidance with uncond, and low <= high; got {interval}."
            )
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance_rescale must lie in [0, 1]; got {rescale!r}.")
        if rescale and not has_uncond:
            raise ValueError(f"guidance_rescale needs guidance other than 1 with uncond; got {rescale!r} without.")
        if quantile is not None and not 0 < quantile <= 1:
            raise ValueError(f"dynamic_thresholding is a quantile in (0, 1]; got {quantile!r}.")
        if quantile is not None and plan.clip is not None:
            raise ValueError(f"dynamic_thresholding and the clip={plan.clip} of {sampler!r} exclude each other.")
        if most is not None and (quantile is None or not most >= 1):
            raise ValueError(f"sample_max_value goes with dynamic_thresholding and is at least 1; got {most!r}.")
        if interval is None:
            self.guided = [has_uncond] * len(plan.times)
        else:
            self.guided = [interval[0] <= t <= interval[1] for t in plan.times.tolist()]
        if plan.langevin is not None and cond_fn is not None:
            raise ValueError(f"cond_fn does not go with {sampler!r}: leave it out, or use the predictor alone.")
        self.looks = bool(rescale) or quantile is not None or cond_fn is not None or plan.langevin is not None
        self.rows = plan.rows
        self._plan, self._scale, self._rescale = plan, guidance, rescale
        self._quantile, self._most, self._cond_fn = quantile, most, cond_fn
        if cond_fn is not None and plan.gradient_of_mean:
            table = plan.table.clone()
            table[:, _AT["c_h1"]] = 1.0
            self.rows = PreparedSteps(table)

    def prepare(
        self, k: int, run: Any, m: Tensor, guided: bool, variance: Tensor | None, time: Tensor, noise: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """(the network's output, what else the step is told). ``noise``: what the step adds, as it is given it."""
        x, extras = run.x, {}
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self._cond_fn is not None:
            m, extras = self._classified(k, x, m, guided, variance, time[: len(x)], wide)
        row = self.rows.table[k].to(x.device, wide, non_blocking=True)
        if self._rescale and guided:
            uncond, cond = m[: len(x)].to(wide), m[len(x) :].to(wide)
            combined = uncond + self._of_samples(x) * (cond - uncond)
            spread = _deviation(combined)
            ratio = torch.where(spread > 0, _deviation(cond) / spread, 1.0)
            factor = self._rescale * ratio + (1 - self._rescale)
            row = row * (1 + (factor[:, None] - 1) * _OF_OUTPUT.to(x.device, wide, non_blocking=True))
            extras["row"] = row
        if self._plan.langevin is not None and self._plan.langevin[k]:
            size = self._plan.langevin[k]
            extras["row"] = _langevin(row, x.to(wide), self._combined(x, m.to(wide), guided), noise.to(wide), size)
        if self._quantile is not None:
            output = self._combined(x, m.to(wide), guided)
            p_x, p_m = (row[..., _AT[name]].reshape(-1, *(1,) * (x.ndim - 1)) for name in ("p_x", "p_m"))
            size = (p_x * x.to(wide) + p_m * output).abs().reshape(len(x), math.prod(x.shape[1:]))
            bound = quantile(size, self._quantile).clamp(1.0, self._most)
            extras["threshold"] = bound.reshape(-1, *(1,) * (x.ndim - 1))
        return m, extras

    def _combined(self, x: Tensor, m: Tensor, guided: bool) -> Tensor:
        """The network's output, [batch, ...], of both halves where it is guided."""
        if not guided:
            return m
        uncond, cond = m[: len(x)], m[len(x) :]
        return uncond + self._of_samples(x) * (cond - uncond)

    def _of_samples(self, x: Tensor) -> Tensor | float:
        if not isinstance(self._scale, Tensor):
            return self._scale
        scale = self._scale.to(x.device, non_blocking=True)
        return scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))

    def _classified(self, k, x, m, guided, variance, time, wide) -> tuple[Tensor, dict[str, Any]]:
        with torch.enable_grad():
            gradient = self._cond_fn(x.detach(), time)
        check_tensor("the gradient of cond_fn", gradient, "gradient")
        gradient = gradient.detach().to(wide)
        if gradient.shape != x.shape:
            raise ValueError(
                f"cond_fn must return a gradient shaped as x, {tuple(x.shape)}; got {tuple(gradient.shape)}."
            )
        shift = float(self._plan.gradient[k]) * gradient
        if not self._plan.gradient_of_mean:
            return (m.to(wide) + (torch.cat([shift, shift]) if guided else shift)).to(m.dtype), {}
        if variance is not None:
            row = self.rows.table[k].tolist()
            shift = torch.exp(row[_AT["l_0"]] + row[_AT["l_v"]] * variance.to(wide)) * gradient
        return m, {"history": (shift,)}


def _langevin(row: Tensor, x: Tensor, m: Tensor, noise: Tensor, size: float) -> Tensor:
    """The coefficients [batch, columns] of a Langevin step x + e s + sqrt(2 e) z, from the score's [columns] or
    [batch, columns]: see ``Plan.langevin``."""
    row = row.expand(len(x), len(COLUMNS)).clone()
    c_x, c_m = (row[:, _AT[name]].reshape(-1, *(1,) * (x.ndim - 1)) for name in ("c_x", "c_m"))
    length, wanted = (t.reshape(len(x), math.prod(x.shape[1:])).norm(dim=1) for t in (c_x * x + c_m * m, noise))
    e = torch.where(length > 0, size * (wanted / length) ** 2, 0.0)
    row[:, _AT["c_x"]] = 1 + e * row[:, _AT["c_x"]]
    row[:, _AT["c_m"]] *= e
    row[:, _AT["c_noise"]] = (2 * e).sqrt()
    return row


def quantile(rows: Tensor, q: float) -> Tensor:
    """The q-quantile of each row [B, N], linear between neighbours as torch.quantile, which has a limit on the size."""
    if not rows.numel():
        return rows.new_ones(len(rows))
    place = q * (rows.shape[1] - 1)
    low = int(place)
    near = rows.kthvalue(low + 1, dim=1).values
    if low + 1 >= rows.shape[1]:
        return near
    return torch.lerp(near, rows.kthvalue(low + 2, dim=1).values, place - low)


def _deviation(values: Tensor) -> Tensor:
    """Of each sample, [B]; 0 where it is a single number, which has none."""
    rows = values.reshape(len(values), math.prod(values.shape[1:]))
    return rows.std(1) if rows.numel() > len(rows) else rows.new_zeros(len(rows))
