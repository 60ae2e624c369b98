"""The base of the steppers: what is common to the coefficients of every scheduler's ``step``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...samplers.base import build_table
from . import rows
from .coefficient_cache import STEPS, Coefficients, Unfit, host, untraced

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
HALVES = frozenset({torch.float16, torch.bfloat16})
NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})

NO_ROW = "no finite coefficients for this step"
# What ``locate`` finds: one pass over the data for each entry, (row of the step table, history, noise that was given or
# None, flags). The flags are those of ``ops.PreparedSteps.run``. The new sample and the x0 estimate of a pass are the
# sample and the model output of the next.
Passes = tuple[tuple[int, tuple[Tensor, ...], Tensor | None, int], ...]
Options = dict[str, Any]


class Stepper(Coefficients):
    """The record of one diffusers scheduler: what fastdiff knows of its ``step``. The driver is ``step.fused_step``.

    A subclass says in three methods what is particular to its scheduler:

    - ``make``: the step table, from the numbers that the scheduler holds;
    - ``locate``: which row of the table a call takes, with which history and which noise;
    - ``finish``: what the scheduler's own step would have written to the scheduler's state.

    Attributes:
        table: the step table, ``ops.PreparedSteps``.
        usable: the rows of finite coefficients. Elsewhere diffusers gives infinities or NaN, and does so itself.
        times: the scheduler's timesteps, numbers of the host.
        by_timestep: ``locate`` needs the timestep as a number of the host.
        dtypes: what sample and model output may be of.
        one_dtype: sample and model output must have the same dtype.
        noise_as_result: noise is drawn in the dtype of the result, not in that of the model output.
        learned: the model output holds the variance too, behind it in the channels.
        folds: see ``rows.folded``.
        clip: the x0 estimate is clamped to [-clip, clip]; None: it is not.
        quantile: (ratio, largest value) of dynamic thresholding; None: there is none.
    """

    kept_as = STEPS
    tensor_names: tuple[str, ...] = ("timesteps", "sigmas")
    by_timestep = one_dtype = noise_as_result = learned = False
    dtypes = FLOATS
    folds = True
    clip: float | None = None
    quantile: tuple[float, float] | None = None

    def __init__(self, scheduler: Any):
        self.host_times = host(scheduler.timesteps)
        self.times = self.host_times.tolist()
        super().__init__(scheduler)
        self.fast = self.quantile is None and not self.learned

    def locate(self, scheduler: Any, x: Any, m: Any, timestep: Any, t: int | None, options: Options) -> Passes | str:
        """The passes that do a call of ``step``, or why diffusers has to do it.

        The scheduler is not changed, but for its step index, which it finds as its own step does. x and m are not
        checked yet.

        Args:
            x: the sample.
            m: the model's output.
            t: with ``by_timestep``, the timestep as an int, or None if it is no single integer.
            options: the other arguments of ``step``, those that were given.
        """
        raise NotImplementedError

    def finish(self, scheduler: Any, timestep: Any, x: Tensor, m: Tensor, done: tuple) -> Any:
        """Write the scheduler's state as its own step does. Returns what ``step`` returns besides the new sample.

        Args:
            x, m: what the last pass took, [batch, ...] each.
            done: what the last pass gave: (new sample, x0 estimate or None, history entry or None), shaped as x.
        """
        raise NotImplementedError

    def place(self, *parts: rows.Columns) -> None:
        """Make the step table: the rows of each part after those of the last."""
        if self.clip is None and self.quantile is None and self.folds:
            parts = tuple(rows.folded(part) for part in parts)
        count = len(parts[0]["p_x"] if "p_x" in parts[0] else parts[0]["c_x"])
        table = torch.cat([build_table(count, **part) for part in parts])
        self.usable = frozenset(table.isfinite().all(1).nonzero().flatten().tolist())
        self.table = ops.PreparedSteps(table)

    def limit_x0(self, config: Any, clips: bool = True) -> None:
        """Take over from the config how the x0 estimate is clamped."""
        if getattr(config, "thresholding", False):
            self.quantile = config.dynamic_thresholding_ratio, config.sample_max_value
        elif clips and getattr(config, "clip_sample", False):
            self.clip = float(config.clip_sample_range)
            if not self.clip > 0:
                raise Unfit(f"clip_sample_range={config.clip_sample_range!r}")

    def threshold(self, k: int, x: Tensor, m: Tensor, dtype: torch.dtype) -> Tensor:
        """s of dynamic thresholding (Saharia et al. 2022), [batch], from x and m, [batch, ...]."""
        ratio, most = self.quantile  # type: ignore[misc]
        x0 = self.table(k, x, m, dtype=dtype)[1]
        assert x0 is not None
        wide = x0.dtype if x0.dtype == torch.float64 else torch.float32
        size = x0.to(wide).reshape(len(x0), -1).abs()
        return torch.quantile(size, ratio, dim=1).clamp(min=1, max=most)

    def value(self, timestep: Any) -> Any:
        """``timestep`` as a number of the host; None if it is no single number. A view of the scheduler's own timesteps
        is looked up, so that no device is waited for."""
        if type(timestep) is int or type(timestep) is float:
            return timestep
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1 or timestep.ndim > 1:
                return None
            if not timestep.is_cpu:
                at = self.position(timestep)
                if at is not None:
                    return self.times[at]
            return timestep.item()
        try:
            return timestep.__index__()
        except AttributeError:
            return None

    def integer(self, timestep: Any) -> int | None:
        """``timestep`` as an int; None if it is no single integer."""
        number = self.value(timestep)
        return number if type(number) is int else None

    integer_untraced = untraced(integer)

    def position(self, timestep: Tensor) -> int | None:
        """Which of the scheduler's timesteps this is a view of; None if it is none."""
        mine = self.tensors[0][1]  # timesteps, first of the names
        if (
            timestep.dtype != mine.dtype
            or timestep.device != mine.device
            or timestep.numel() != 1
            or mine.stride() != (1,)
            or timestep.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr()
        ):
            return None
        at = timestep.storage_offset() - mine.storage_offset()
        return at if 0 <= at < len(self.times) else None

    @untraced
    def start(self, scheduler: Any, timestep: Any) -> int:
        """Set the scheduler's step index as its own step does, and return it. For a view of the scheduler's own
        timesteps no device is waited for."""
        at = None
        if isinstance(timestep, Tensor) and not timestep.is_cpu and scheduler.begin_index is None:
            at = self.position(timestep)
        if at is None:
            scheduler._init_step_index(timestep)
        else:
            scheduler._step_index = scheduler.index_for_timestep(self.host_times[at], self.host_times)
        return scheduler._step_index
