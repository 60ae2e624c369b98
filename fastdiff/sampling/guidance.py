"""The options of sampling that look at the network's output before a step: guidance in an interval of times, by a rule
of ``fastdiff.guidance`` or rescaled, dynamic thresholding, classifier guidance; and Langevin steps, whose size depends
on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import modes
from ..guidance import CFGZero, Plain, Rule, Step
from ..numeric import check_numbers
from ..ops.checks import check_tensor
from ..ops.step import COLUMNS, KEPT_STEPS
from ..ops.step_table import PreparedSteps
from ..samplers import Plan, Sampler
from ..showing import brief

_AT = {name: k for k, name in enumerate(COLUMNS)}
_PAST = slice(_AT["c_h1"], _AT["c_h4"] + 1)


class Guidance:
    """The options of ``fastdiff.sample`` that have to look at the network's output before the step, checked.

    Attributes:
        guided: for each row, whether the unconditional half is computed.
        rows: the step table of the plan, with a history entry for the gradient of the mean, or for the difference of
            the two noise estimates, if there is one.
        looks: whether an option looks at the output: then each step needs ``prepare``.
    """

    def __init__(
        self,
        plan: Plan,
        sampler: Sampler,
        guidance: float | Tensor | Rule,
        has_uncond: bool,
        interval: tuple[float, float] | None,
        rescale: float,
        quantile: float | None,
        most: float | None,
        cond_fn: Callable[[Tensor, Tensor], Tensor] | None,
        first_step: int = 0,
    ):
        check_numbers(guidance=1.0 if isinstance(guidance, (Tensor, Rule)) else guidance, guidance_rescale=rescale)
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
        is_rule = isinstance(guidance, Rule)
        self.looks = (
            is_rule or bool(rescale) or quantile is not None or cond_fn is not None or plan.langevin is not None
        )
        self.rows = plan.rows
        self._rule = guidance if is_rule else Plain(guidance) if self.looks else None
        self._plan, self._rescale, self._quantile, self._most, self._cond_fn = plan, rescale, quantile, most, cond_fn
        self._first_step, self._state = first_step, {}
        needed = ("p_x", "p_m", "l_0", "l_v") if self.looks else ()
        self._columns = {name: plan.table[:, _AT[name]].tolist() for name in needed}
        if cond_fn is not None and plan.gradient_of_mean:
            table = plan.table.clone()
            table[:, _AT["c_h1"]] = 1.0
            self.rows = PreparedSteps(table)
        if isinstance(guidance, CFGZero):
            self._check_zero_steps(guidance.zero_steps, sampler)
        if is_rule and guidance.renoises_unconditionally:
            clamped = plan.clip is not None or quantile is not None
            if plan.langevin is not None or bool(plan.table[:, _PAST].any()) or clamped or cond_fn is not None:
                raise ValueError(
                    f"{self._rule!r} goes with samplers that keep nothing of earlier steps, such as DDIM, and without "
                    f"clip, dynamic_thresholding and cond_fn; got {sampler!r}."
                )
            p_m, c_m, c_x0, end = (plan.table[:, _AT[name]] for name in ("p_m", "c_m", "c_x0", "k_x0"))
            table = plan.table.clone()
            table[:, _AT["c_h1"]] = (c_m + (c_x0 - end) * p_m) * torch.tensor(self.guided, device="cpu")
            self.rows = PreparedSteps(table)

    def _index(self, k: int) -> int:
        """The number of the step that row k belongs to."""
        return self._first_step + (k if self._plan.steps is None else self._plan.steps[k])

    def _check_zero_steps(self, zero_steps: int, sampler: Sampler) -> None:
        """Raise ValueError unless x stays as it is in the first steps, in which the network's output is 0."""
        plan = self._plan
        rows = [k for k in range(len(plan.times)) if self._index(k) < zero_steps]
        options = {"clip": plan.clip, "dynamic_thresholding": self._quantile, "cond_fn": self._cond_fn}
        found = [name for name, value in options.items() if value is not None]
        if not all(self.guided[k] for k in rows):
            found.append("guidance_interval")
        factor, history = 1.0, [0.0] * KEPT_STEPS  # what x and the history are multiples of x at the start by
        for k in rows:
            row = dict(zip(COLUMNS, plan.table[k].tolist()))
            x0, past = row["p_x"] * factor, plan.table[k, _PAST].tolist()
            entry = row["h_x"] * factor + row["h_x0"] * x0
            factor = row["c_x"] * factor + row["c_x0"] * x0 + sum(c * kept for c, kept in zip(past, history))
            if row["h_x"] or row["h_m"] or row["h_x0"]:
                history = [entry, *history[:-1]]
            if (plan.draws[k] and row["c_noise"]) or abs(factor - 1) > 1e-9:
                found.append(repr(sampler))
                break
        if rows and found:
            raise ValueError(
                f"zero_steps={zero_steps} needs first steps in which an output of 0 leaves x as it is, which is not so "
                f"with {', '.join(found)}: use a sampler without new noise, such as 'flow_euler', without these "
                f"options; or CFGZero(..., zero_steps=0)."
            )

    def prepare(
        self, k: int, run: Any, m: Tensor, guided: bool, variance: Tensor | None, time: Tensor, noise: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """(the network's output, of both halves as one, and what else the step is told). ``noise``: what the step adds,
        as it is given it."""
        x, extras = run.x, {}
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if guided:
            uncond, cond = (half.to(wide) for half in m.chunk(2))
            p_x, p_m = (self._columns[name][k] for name in ("p_x", "p_m"))
            m = self._rule.combine(cond, uncond, Step(x, p_x, p_m, self._index(k), self._state))
            if self._rescale:
                spread = _deviation(m)
                ratio = torch.where(spread > 0, _deviation(cond) / spread, 1.0)
                m = m * _of_samples(self._rescale * ratio + (1 - self._rescale), x)
            if self._rule.renoises_unconditionally:
                extras["history"] = (uncond - m,)
        if self._cond_fn is not None:
            m, history = self._classified(k, x, m, variance, time[: len(x)], wide)
            extras |= history
        row = self.rows.placed(x.device, wide)[k]
        if self._plan.langevin is not None and self._plan.langevin[k]:
            row = extras["row"] = _langevin(row, x.to(wide), m.to(wide), noise.to(wide), self._plan.langevin[k])
        if self._quantile is not None:
            p_x, p_m = (_of_samples(row[..., _AT[name]], x) for name in ("p_x", "p_m"))
            size = (p_x * x.to(wide) + p_m * m.to(wide)).abs().reshape(len(x), math.prod(x.shape[1:]))
            extras["threshold"] = _of_samples(quantile(size, self._quantile).clamp(1.0, self._most), x)
        return m, extras

    def _classified(self, k, x, m, variance, time, wide) -> tuple[Tensor, dict[str, Any]]:
        with modes.gradients():
            gradient = self._cond_fn(modes.plain(x.detach()), modes.plain(time))
        check_tensor("the gradient of cond_fn", gradient, "gradient")
        gradient = gradient.detach().to(wide)
        if gradient.shape != x.shape:
            raise ValueError(
                f"cond_fn must return a gradient shaped as x, {tuple(x.shape)}; got {tuple(gradient.shape)}."
            )
        if not self._plan.gradient_of_mean:
            return m.to(wide) + float(self._plan.gradient[k]) * gradient, {}
        if variance is None:
            return m, {"history": (float(self._plan.gradient[k]) * gradient,)}
        l_0, l_v = (self._columns[name][k] for name in ("l_0", "l_v"))
        return m, {"history": (torch.exp(l_0 + l_v * variance.to(wide)) * gradient,)}


def _of_samples(numbers: Tensor, x: Tensor) -> Tensor:
    """Numbers, one a sample or one for all, as they broadcast to x."""
    return numbers.reshape(-1, *(1,) * (x.ndim - 1))


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
    """Of each sample, [B], times the root of its elements less 1; 0 where it is a single number, which has none. (It
    takes a tenth of the time of torch.std on a CPU.)"""
    rows = values.reshape(len(values), math.prod(values.shape[1:]))
    if rows.numel() <= len(rows):
        return rows.new_zeros(len(rows))
    mean = rows.mean(1, keepdim=True)
    found = torch.linalg.vector_norm(rows - mean, dim=1)
    rounding = 2 * torch.finfo(rows.dtype).eps * math.sqrt(rows.shape[1]) * mean.abs().squeeze(1)
    return torch.where(found <= rounding, 0.0, found)
