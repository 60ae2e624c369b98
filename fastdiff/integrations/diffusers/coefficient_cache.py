"""What is kept with a scheduler between two calls: its coefficients as placed tables, as long as the numbers that they
were made from are the same objects with the same contents. Made when ``set_timesteps`` ends, or at the first call.

Contents are compared with a copy, which is cheap for the small tensors of a scheduler on the CPU: neither
``torch.inference_mode``, nor ``.data``, nor numpy changes a tensor's version. On an accelerator a comparison would wait
for the device, so there it is the version that is compared, where the tensor has one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...backends.native.operations import _C
from ...backends.native.prepared import number
from ...backends.rows import cached
from ...samplers.base import build_table
from . import rows

UNTRACED = torch.compiler.disable
# Where the plans are kept, in the scheduler's __dict__.
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


# (plan.watched, scheduler.__dict__) -> whether the scheduler still has what the plan was made from.
is_current = _is_current if _C is None else _C.is_current


class Plan:
    """Base of the plans. ``reason`` is why there is none, or None; ``quick``: try ``run`` of what it prepared;
    ``lasting``: equal numbers would give it again.

    Args:
        scheduler: whose numbers to use.
        tensors: names of the tensors they are.
        others: names of further attributes that they depend on.
    """

    quick, lasting = False, True

    def __init__(self, scheduler: Any, tensors: tuple[str, ...], others: tuple[str, ...]):
        held = scheduler.__dict__
        self.config = held["_internal_dict"]
        self.settings = dict(self.config.__dict__)
        self.others = tuple((name, held.get(name)) for name in others)
        self.reason: str | None = None
        self.watch(held, tensors)

    def watch(self, held: dict[str, Any], names: tuple[str, ...]) -> None:
        """Take the tensors of these names for those that the plan was made from."""
        self.tensors = tuple((name, held.get(name)) for name in names)
        contents = tuple((name, tensor, _copy_of(tensor)) for name, tensor in self.tensors)
        versions = tuple(
            (tensor, tensor._version)
            for _, tensor, before in contents
            if before is None and isinstance(tensor, Tensor) and not tensor.is_inference()
        )
        self.watched = contents, versions, self.others, self.config, self.settings

    def serving(self, scheduler: Any) -> Plan | None:
        """The plan for the tensors that the scheduler has now, if they hold the numbers that this one was made from, on
        the CPU; else None. It is another object: a copy of the scheduler may go on with this one."""
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
        served = object.__new__(type(self))
        served.__dict__ |= self.__dict__
        served.watch(held, tuple(name for name, _ in self.tensors))
        return served

    def __deepcopy__(self, memo: Any) -> None:
        return None  # a copied scheduler makes its own

    def __reduce__(self) -> Any:
        return type(None), ()


def _copy_of(tensor: Any) -> Tensor | None:
    return tensor.detach().clone() if isinstance(tensor, Tensor) and tensor.is_cpu and tensor.numel() else None


class Refused(Plan):
    """The plan of what is left to diffusers, and why: because of its numbers and settings (``lasting``), or of what
    it has of its own."""

    def __init__(
        self, scheduler: Any, tensors: tuple[str, ...], others: tuple[str, ...], reason: str | None, lasting: bool
    ):
        super().__init__(scheduler, tensors, others)
        self.reason, self.lasting = reason, lasting


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


class StepPlan(Plan):
    """Base of the plans of ``step``: ``table`` in one piece, and which rows have coefficients.

    Attributes:
        rows: ``ops.PreparedSteps``.
        usable: of each row, whether its coefficients are finite. Elsewhere diffusers gives infinities or NaN: its own.
        times: the scheduler's timesteps, on the host.
    """

    tensor_names: tuple[str, ...] = ("timesteps", "sigmas")
    other_names: tuple[str, ...] = ()
    folds = True  # see ``rows.folded``
    clip: float | None = None
    quantile: tuple[float, float] | None = None

    def __init__(self, scheduler: Any):
        super().__init__(scheduler, self.tensor_names, self.other_names)
        self.host_times = host(scheduler.timesteps)
        self.times = self.host_times.tolist()
        self.make(scheduler, self.config)
        self.quick = self.quantile is None

    def make(self, scheduler: Any, config: Any) -> None:
        raise NotImplementedError

    def place(self, *parts: rows.Columns) -> None:
        """Make the table: the rows of each part after those of the last."""
        if self.clip is None and self.quantile is None and self.folds:
            parts = tuple(rows.folded(part) for part in parts)
        count = len(parts[0]["p_x"] if "p_x" in parts[0] else parts[0]["c_x"])
        table = torch.cat([build_table(count, **part) for part in parts])
        self.usable = table.isfinite().all(1).tolist()
        self.rows = ops.PreparedSteps(table)
        self.run = self.rows.run

    def thresholds(self, config: Any, clips: bool = True) -> None:
        """Take over how the x0 estimate is clipped."""
        if getattr(config, "thresholding", False):
            self.quantile = config.dynamic_thresholding_ratio, config.sample_max_value
        elif clips and getattr(config, "clip_sample", False):
            self.clip = float(config.clip_sample_range)
            if not self.clip > 0:
                raise Unfit(f"clip_sample_range={config.clip_sample_range!r}")

    def threshold(self, k: int, x: Tensor, m: Tensor, dtype: torch.dtype) -> Tensor:
        """s of dynamic thresholding, one a sample [batch] (Saharia et al. 2022)."""
        ratio, most = self.quantile  # type: ignore[misc]
        x0 = self.rows(k, x, m, dtype=dtype)[1]
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


def kind_of(config: Any, accepted: tuple[str, ...]) -> str:
    kind = config.prediction_type
    if kind not in accepted:
        raise Unfit(f"prediction_type={kind!r}")
    return {"original_sample": "sample", "flow_prediction": "flow"}.get(kind, kind)


VP = ("epsilon", "sample", "v_prediction")


class DDPMPlan(StepPlan):
    """Rows by the timestep: ``at`` says where."""

    tensor_names = ("timesteps", "alphas_cumprod", "one")
    other_names = ("num_inference_steps", "custom_timesteps", "variance_type")

    def make(self, scheduler: Any, config: Any) -> None:
        self.kind = kind = kind_of(config, VP)
        self.learned = scheduler.variance_type == "learned_range"
        if scheduler.variance_type != config.variance_type:
            raise Unfit("variance_type differs from the config's")
        need(config, variance_type=("fixed_small", "fixed_small_log", "fixed_large", "learned_range"))
        self.thresholds(config)
        bars = host(scheduler.alphas_cumprod)
        if scheduler.custom_timesteps or scheduler.num_inference_steps:
            now = self.host_times
            before = torch.cat([now[1:], torch.full_like(now[:1], -1)])
        else:
            now = torch.arange(len(bars), device="cpu")
            before = now - 1
        if now.is_floating_point() or not bool(((now >= 0) & (now < len(bars)) & (before < len(bars))).all()):
            raise Unfit("timesteps beyond the schedule")
        before_bars = torch.where(before >= 0, bars[before], host(scheduler.one))
        self.place(rows.ddpm(bars[now], before_bars, kind, config.variance_type))
        self.at = {t: k for k, t in reversed(list(enumerate(now.tolist())))}  # the first of equal ones


class DDIMPlan(StepPlan):
    """Rows by the timestep, for (eta, use_clipped_model_output): one table each."""

    tensor_names = ("timesteps", "alphas_cumprod", "final_alpha_cumprod")
    other_names = ("num_inference_steps",)

    def make(self, scheduler: Any, config: Any) -> None:
        self.kind = kind_of(config, VP)
        self.thresholds(config)
        if scheduler.num_inference_steps is None:
            raise Unfit("set_timesteps was not called")
        self.bars, self.final = host(scheduler.alphas_cumprod), host(scheduler.final_alpha_cumprod)
        self.stride = config.num_train_timesteps // scheduler.num_inference_steps
        self.count = len(self.bars)
        self.tables: dict[tuple[float, bool], tuple[ops.PreparedSteps, list[bool]]] = {}
        self.choose(0.0, False)

    def choose(self, eta: float, rederive: bool) -> tuple[ops.PreparedSteps, list[bool]]:
        found = self.tables.get((eta, rederive))
        if found is None:
            before = torch.arange(self.count) - self.stride
            bars = torch.where(before >= 0, self.bars[before.clamp(min=0)], self.final)
            self.place(rows.ddim(self.bars, bars, self.kind, eta, rederive))
            found = self.tables[eta, rederive] = self.rows, self.usable
        self.rows, self.usable = found
        return found


class LCMPlan(StepPlan):
    """Rows by the step's index."""

    tensor_names = ("timesteps", "alphas_cumprod", "final_alpha_cumprod")
    other_names = ("num_inference_steps",)

    def make(self, scheduler: Any, config: Any) -> None:
        self.kind = kind = kind_of(config, VP)
        self.thresholds(config)
        self.clips = self.clip is not None or self.quantile is not None
        bars, count = host(scheduler.alphas_cumprod), len(self.times)
        now, before = self.host_times, torch.cat([self.host_times[1:], self.host_times[-1:]])
        if scheduler.num_inference_steps is None:
            raise Unfit("set_timesteps was not called")
        if not bool(((now >= 0) & (now < len(bars))).all()):
            raise Unfit("timesteps beyond the schedule")
        last = torch.arange(count) == scheduler.num_inference_steps - 1
        self.draws = (~last).tolist()
        self.place(rows.lcm(bars[now], bars[before], now, last, kind, config.timestep_scaling, self.clips))


class EulerPlan(StepPlan):
    def make(self, scheduler: Any, config: Any) -> None:
        kind = kind_of(config, ("epsilon", "v_prediction", "sample", "original_sample"))
        self.given = kind == "sample"
        self.place(rows.euler(exact(scheduler.sigmas), kind))


class EulerAncestralPlan(StepPlan):
    def make(self, scheduler: Any, config: Any) -> None:
        self.place(rows.euler_ancestral(host(scheduler.sigmas), kind_of(config, ("epsilon", "v_prediction"))))


class EDMEulerPlan(StepPlan):
    def make(self, scheduler: Any, config: Any) -> None:
        kind = kind_of(config, ("epsilon", "v_prediction"))
        sign = 1 if kind == "epsilon" else -1
        self.place(rows.euler(exact(scheduler.sigmas), "edm", config.sigma_data, sign))


class TwoCallsPlan(StepPlan):
    """Rows by the call's index: of first calls, then of second ones."""

    def step(self, k: int) -> Tensor:
        """What the scheduler keeps as ``dt`` after the first call: one tensor a call, by which it is known again."""
        return cached(self.steps, k, lambda: self.sigmas[k + 1] - self.sigmas[k])


class HeunPlan(TwoCallsPlan):
    def make(self, scheduler: Any, config: Any) -> None:
        kind = kind_of(config, VP)
        self.thresholds(config)
        self.place(*rows.heun(exact(scheduler.sigmas), kind))
        self.sigmas, self.count = scheduler.sigmas, len(scheduler.sigmas) - 1
        self.steps: dict[int, Tensor] = {}


class FlowHeunPlan(TwoCallsPlan):
    def make(self, scheduler: Any, config: Any) -> None:
        self.place(*rows.flow_heun(exact(scheduler.sigmas)))
        self.sigmas, self.count = scheduler.sigmas, len(scheduler.sigmas) - 1
        self.steps: dict[int, Tensor] = {}


class FlowEulerPlan(StepPlan):
    folds = False  # as it is written it has diffusers' bits

    def make(self, scheduler: Any, config: Any) -> None:
        self.draws = bool(config.stochastic_sampling)
        sigmas = exact(scheduler.sigmas)
        self.place(rows.flow_stochastic(sigmas) if self.draws else rows.flow_euler(sigmas))


class DPMSolverPlan(StepPlan):
    """Rows by order and the step's index."""

    def make(self, scheduler: Any, config: Any) -> None:
        need(config, algorithm_type=("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"))
        need(config, solver_type=("midpoint", "heun"), solver_order=(1, 2, 3), variance_type=(None,))
        flow = bool(config.use_flow_sigmas)
        noises = not config.algorithm_type.endswith("++")  # these know no flow_prediction
        kinds = ("epsilon", "sample") if noises else ("epsilon", "sample", "flow_prediction")
        kind = kind_of(config, kinds if flow else VP)
        self.algorithm, self.order = config.algorithm_type, config.solver_order
        self.sde = self.algorithm.startswith("sde")
        self.thresholds(config, clips=False)
        if self.quantile is not None and not self.algorithm.endswith("++"):
            raise Unfit(f"thresholding with algorithm_type={self.algorithm!r}")
        if self.algorithm == "sde-dpmsolver" and self.order > 2:
            raise Unfit("sde-dpmsolver has no third order")
        sigmas, midpoint = exact(scheduler.sigmas), config.solver_type == "midpoint"
        self.place(
            *(rows.dpm_solver(sigmas, flow, kind, self.algorithm, midpoint, order + 1) for order in range(self.order))
        )
        count = len(self.times)
        lowers = bool(config.lower_order_final) and count < 15
        self.first_order_at = count - 1 if config.euler_at_final or lowers or config.final_sigmas_type == "zero" else -1
        self.second_order_at = count - 2 if lowers else -1
        self.count = len(sigmas) - 1


class UniPCPlan(StepPlan):
    """Rows by order, part (whole, corrector, predictor) and the step's index."""

    other_names = ("predict_x0", "disable_corrector", "solver_p")

    def make(self, scheduler: Any, config: Any) -> None:
        need(config, solver_type=("bh1", "bh2"), solver_order=(1, 2, 3))
        if scheduler.solver_p:
            raise Unfit("solver_p")
        flow, noises = bool(config.use_flow_sigmas), not scheduler.predict_x0
        kind = kind_of(
            config, VP if not flow else ("epsilon", "sample") if noises else ("epsilon", "sample", "flow_prediction")
        )
        self.order, self.lowers = config.solver_order, bool(config.lower_order_final)
        self.thresholds(config, clips=False)
        if noises:
            self.quantile = None  # diffusers thresholds x0 estimates only
        sigmas, keeps = exact(scheduler.sigmas), "epsilon" if noises else "sample"
        parts: list[rows.Columns] = []
        for order in range(self.order):
            parts += rows.unipc(sigmas, flow, kind, keeps, config.solver_type, order + 1)
        self.place(*parts)
        self.count = len(sigmas) - 1


class NoisePlan(Plan):
    """Base of the plans of ``add_noise`` and its like.

    Attributes:
        noise: ``ops.PreparedNoise``; ``velocity``: the same of velocities, or None.
    """

    tensor_names: tuple[str, ...] = ("alphas_cumprod",)
    quick = True

    def __init__(self, scheduler: Any):
        super().__init__(scheduler, self.tensor_names, ())
        bars = exact(scheduler.alphas_cumprod)
        alpha, sigma = bars.sqrt(), (1 - bars).sqrt()
        self.noise = ops.PreparedNoise(torch.stack([alpha, sigma], -1))
        self.velocity = ops.PreparedNoise(torch.stack([-sigma, alpha], -1))


class SigmaNoisePlan(NoisePlan):
    """The same by the index of a step: ``at`` is that of a timestep.

    ``levels`` are (alpha, sigma) by the index; ``default`` is the index of a timestep that is none of the scheduler's.
    """

    tensor_names = ("sigmas", "timesteps", "alphas_cumprod")
    missing: int | None = None  # what index a timestep that is none of the scheduler's has: counted from the end

    def __init__(self, scheduler: Any):
        Plan.__init__(self, scheduler, self.tensor_names, ())
        sigmas = exact(scheduler.sigmas)
        nowhere = torch.full((1, 2), torch.nan, dtype=torch.float64)
        self.noise = ops.PreparedNoise(torch.cat([torch.stack(self.levels(sigmas), -1), nowhere]))
        self.count = len(sigmas)
        self.times = host(scheduler.timesteps)
        times = self.times.tolist()
        self.default = None if self.missing is None else len(times) + self.missing
        self.at: dict[float, int] = {}
        second: set[float] = set()
        for k, t in enumerate(times):
            # Of several equal timesteps it is the second that counts.
            if t not in self.at:
                self.at[t] = k
            elif t not in second:
                self.at[t] = k
                second.add(t)
        self.sorted: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def levels(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigmas), sigmas

    def quick_index(self, scheduler: Any, timesteps: Any, velocity: bool) -> int | None:
        """The row of a single timestep; None if it takes more to find one."""
        t = number(timesteps, 1)
        if type(t) is not float and (velocity or t is None):
            return None
        index = scheduler._begin_index
        if velocity or index is None:
            index = self.at.get(t, self.default)
        elif scheduler._step_index is not None:
            index = scheduler._step_index
        return index if index is not None and 0 <= index < self.count else None

    def find(self, timesteps: Tensor) -> int | Tensor | None:
        """The rows of ``timesteps`` [batch], or one for all; None if one is not the scheduler's and should be."""
        if timesteps.is_cpu:
            at, default = self.at, self.default
            found = [at.get(t, default) for t in timesteps.tolist()]
            if None in found or not found:
                return None
            return found[0] if found.count(found[0]) == len(found) else torch.tensor(found)
        values, index = self._sorted(timesteps.device)
        if timesteps.dtype != values.dtype:
            timesteps = timesteps.to(values.dtype)
        place = torch.searchsorted(values, timesteps.contiguous()).clamp(max=len(values) - 1)
        default = self.count if self.default is None else self.default  # the row of NaN: nothing can be raised here
        return torch.where(values[place] == timesteps, index[place], default)

    def _sorted(self, device: torch.device) -> tuple[Tensor, Tensor]:
        found = self.sorted.get(device)
        if found is None:
            values, order = torch.tensor(list(self.at), dtype=self.times.dtype).sort()
            index = torch.tensor(list(self.at.values()))[order]
            found = self.sorted[device] = values.to(device), index.to(device)
        return found


class EulerNoisePlan(SigmaNoisePlan):
    """Also ``get_velocity``, which looks alphas_cumprod up by the index of the step."""

    def __init__(self, scheduler: Any):
        super().__init__(scheduler)
        bars = exact(scheduler.alphas_cumprod)[: self.count]
        table = torch.full((self.count + 1, 2), torch.nan, dtype=torch.float64)
        table[: len(bars)] = torch.stack([-(1 - bars).sqrt(), bars.sqrt()], -1)
        self.velocity = ops.PreparedNoise(table)


class FlowNoisePlan(SigmaNoisePlan):
    def levels(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - sigmas, sigmas


class MultistepNoisePlan(SigmaNoisePlan):
    missing = -1

    def levels(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return rows.levels_of(sigmas, bool(self.config.use_flow_sigmas))


class InputPlan(Plan):
    """The numbers of ``scale_model_input``, made as the scheduler makes them and kept: one division a step is left."""

    tensor_names = ("sigmas",)
    divides, marks = True, True

    def __init__(self, scheduler: Any):
        super().__init__(scheduler, self.tensor_names, ())
        self.count = len(scheduler.sigmas)
        self.scales: dict[int, Tensor] = {}

    @staticmethod
    def scale(scheduler: Any, sigma: Tensor) -> Tensor:
        return (sigma**2 + 1) ** 0.5


class EDMInputPlan(InputPlan):
    divides = False

    @staticmethod
    def scale(scheduler: Any, sigma: Tensor) -> Tensor:
        return scheduler._get_conditioning_c_in(sigma)


class HeunInputPlan(InputPlan):
    marks = False
