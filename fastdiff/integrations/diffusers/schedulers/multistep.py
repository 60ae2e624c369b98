"""DPMSolverMultistepScheduler and UniPCMultistepScheduler: a row for each order and step. The history entries are the
latest estimates from the model's outputs, of x0 or of the noise, which the scheduler keeps in ``model_outputs``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....ops.step_table import DRAW_FLOAT, ONE_DTYPE, X0
from ....process import RectifiedFlow
from ....samplers.dpm import multistep_weights
from ....samplers.unipc import bend
from ..add_noise import MultistepNoise, add_noise_by_sigma
from ..coefficient_cache import VP, Unfit, exact, kind_of, need
from ..rows import Columns, converted, levels_of
from ..source_digests import Method
from ..step import fused_step
from ..stepper import NARROW, NO_ROW, Options, Passes, Stepper

NO_HISTORY = "the history is too short, or was kept in another dtype"


def _multistep(sigmas: Tensor, flow: bool, kind: str, keeps: str) -> tuple[Columns, Tensor, Tensor, Tensor, Tensor]:
    """(columns of the estimate that is kept, log-SNR [steps + 1], and [steps] each: the factor on x, the factor on the
    estimates, sigma at the end), for sigmas [steps + 1]. ``keeps``: "sample" or "epsilon"."""
    alpha, sigma = levels_of(sigmas, flow)
    process = RectifiedFlow() if flow else None
    p_x, p_m = converted(kind, alpha[:-1], sigma[:-1], keeps, process)
    logs = alpha.log() - sigma.log()
    over = sigma if keeps == "sample" else alpha
    scale = (alpha if keeps == "sample" else sigma)[1:]
    return {"p_x": p_x, "p_m": p_m}, logs, over[1:] / over[:-1], scale, sigma[1:]


def _behind(logs: Tensor, order: int) -> list[Tensor]:
    """lambda_(k - j) - lambda_(k - j - 1), [steps], for j = 0 .. order - 2; NaN where there is none."""
    steps = logs.diff()
    missing = torch.full((order,), torch.nan, dtype=torch.float64, device="cpu")
    return [torch.cat([missing[:j], steps])[: len(steps)] for j in range(1, order)]


def dpm_solver(sigmas: Tensor, flow: bool, kind: str, algorithm: str, midpoint: bool, order: int) -> Columns:
    """DPM-Solver and DPM-Solver++, multistep, of this order, for sigmas [steps + 1]; Lu et al. 2022."""
    noises, sde = not algorithm.endswith("++"), algorithm.startswith("sde")
    columns, logs, ratio, scale, end = _multistep(sigmas, flow, kind, "epsilon" if noises else "sample")
    h = logs.diff()
    z = -h if noises else (2 * h if sde else h)
    # The sign of a half in diffusers' third order of the SDE is another than in the integral it stands for.
    bent = 1.0 if sde and order == 3 else 0.0
    weights = multistep_weights(z, [step / h for step in _behind(logs, order)], midpoint, bent)
    if noises and sde:
        weights = [2 * weight for weight in weights]
        columns["c_noise"] = end * torch.expm1(2 * h).sqrt()
    elif sde:
        ratio = ratio * torch.exp(-h)
        columns["c_noise"] = end * (-torch.expm1(-2 * h)).sqrt()
    columns["c_x"] = ratio
    return columns | {f"c_h{j}" if j else "c_x0": scale * weight for j, weight in enumerate(weights)}


def unipc(
    sigmas: Tensor, flow: bool, kind: str, keeps: str, solver: str, order: int
) -> tuple[Columns, Columns, Columns]:
    """(uncorrected, corrector, predictor) of this order, for sigmas [steps + 1]; Zhao et al. 2023.

    ``uncorrected`` is a step without a corrector, from the model's output; its history is the estimates of the steps
    before. ``corrector`` gives what the last step should have arrived at, from the model's output there; its history is
    the sample that the last step went from, and the estimates from there on. ``predictor`` is the step from the
    corrected sample, with the estimate in place of the model's output; its history is that of ``uncorrected``.
    """
    columns, logs, ratio, scale, _ = _multistep(sigmas, flow, kind, keeps)
    h = logs.diff()
    sign = 1 if keeps == "sample" else -1
    behind = _behind(logs, order)
    places, total = [], torch.zeros_like(h)
    for step in behind:
        total = total - step
        places.append(total / h)
    first = -torch.expm1(-sign * h)

    def weights(corrects: bool) -> Tensor:
        found = bend(sign * h, places, corrects, solver)
        found[..., 1] += first
        if solver == "bh1":  # which diffusers has as 0 times infinity on the way to clean data
            found = torch.where(h.isfinite()[:, None], found, torch.nan)
        return scale[:, None] * found

    ahead, back = weights(False), weights(True)
    predictor = {"c_x": ratio} | {f"c_h{j}" if j else "c_m": ahead[:, j + 1] for j in range(order)}
    uncorrected = columns | {"c_x": ratio} | {f"c_h{j}" if j else "c_x0": ahead[:, j + 1] for j in range(order)}
    # The corrector of the step before: its row is that of the step after it, where it runs.
    nan = torch.full_like(ratio[:1], torch.nan)
    corrector = {"c_h1": torch.cat([nan, ratio[:-1]]), "c_x0": torch.cat([nan, back[:-1, 0]])}
    corrector |= {f"c_h{j + 2}": torch.cat([nan, back[:-1, j + 1]]) for j in range(order)}
    return uncorrected, columns | corrector, predictor


class Multistep(Stepper):
    """Attributes: ``order`` is the highest; ``count``, how many rows there are of each order and part."""

    one_dtype = True

    def latest(self, outputs: list, count: int, dtypes: Any) -> tuple[Tensor, ...] | None:
        """The latest ``count`` estimates that are kept, the latest first; None if there are fewer, or one is of none of
        these dtypes. (The dtype of the model's output may have changed between two steps.)"""
        if count > len(outputs):
            return None
        entries = tuple(outputs[: -count - 1 : -1])
        for entry in entries:
            if getattr(entry, "dtype", None) not in dtypes:
                return None
        return entries

    def finish(self, scheduler: Any, timestep: Any, x: Tensor, m: Tensor, done: tuple) -> None:
        outputs = scheduler.model_outputs
        for i in range(self.order - 1):
            outputs[i] = outputs[i + 1]
        outputs[-1] = m if done[1] is None else done[1]  # the predictor of UniPC has taken the estimate for m
        if scheduler.lower_order_nums < self.order:
            scheduler.lower_order_nums += 1
        scheduler._step_index += 1


class DPMSolver(Multistep):
    """The order rises with the estimates that are kept, and may fall at the end. The SDE forms draw noise in each step,
    or take what is given."""

    dtypes = NARROW

    def make(self, scheduler: Any, config: Any) -> None:
        need(config, algorithm_type=("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"))
        need(config, solver_type=("midpoint", "heun"), solver_order=(1, 2, 3), variance_type=(None,))
        flow, algorithm = bool(config.use_flow_sigmas), config.algorithm_type
        noises = not algorithm.endswith("++")  # these know no flow_prediction
        kinds = ("epsilon", "sample") if noises else ("epsilon", "sample", "flow_prediction")
        kind = kind_of(config, kinds if flow else VP)
        self.order, self.sde = config.solver_order, algorithm.startswith("sde")
        self.limit_x0(config, clips=False)
        if self.quantile is not None and noises:
            raise Unfit(f"thresholding with algorithm_type={algorithm!r}")
        if algorithm == "sde-dpmsolver" and self.order > 2:
            raise Unfit("sde-dpmsolver has no third order")
        sigmas, midpoint = exact(scheduler.sigmas), config.solver_type == "midpoint"
        self.place(*(dpm_solver(sigmas, flow, kind, algorithm, midpoint, order + 1) for order in range(self.order)))
        count = len(self.times)
        lowers = bool(config.lower_order_final) and count < 15
        self.first_order_at = count - 1 if config.euler_at_final or lowers or config.final_sigmas_type == "zero" else -1
        self.second_order_at = count - 2 if lowers else -1
        self.count = len(sigmas) - 1

    def locate(self, scheduler: Any, x: Any, m: Any, timestep: Any, t: int | None, options: Options) -> Passes | str:
        if scheduler.num_inference_steps is None:
            return "set_timesteps was not called"
        k = scheduler._step_index
        if k is None:
            k = self.start(scheduler, timestep)
        order = min(self.order, scheduler.lower_order_nums + 1)
        if k == self.first_order_at:
            order = 1
        elif k == self.second_order_at:
            order = min(order, 2)
        row = (order - 1) * self.count + k
        history = () if order == 1 else self.latest(scheduler.model_outputs, order - 1, self.dtypes)
        if history is None:
            return NO_HISTORY
        if not 0 <= k < self.count or row not in self.usable:
            return NO_ROW
        if not self.sde:
            return ((row, history, None, X0 | ONE_DTYPE),)
        noise = options.get("variance_noise")
        if noise is None:
            return ((row, history, None, X0 | ONE_DTYPE | DRAW_FLOAT),)
        if not (isinstance(noise, Tensor) and isinstance(m, Tensor) and noise.shape == m.shape):
            return "the variance noise does not fit"
        return ((row, history, noise.to(device=m.device, dtype=torch.float32), X0 | ONE_DTYPE),)


class UniPC(Multistep):
    """The table has three parts for each order (see ``unipc``). A corrected step has two passes: the corrector, which
    gives the corrected sample and the estimate, and the predictor, which takes them. The scheduler keeps besides: the
    sample that the last step went from, the order of that step, and the timesteps of the estimates."""

    other_names = ("predict_x0", "disable_corrector", "solver_p")

    def make(self, scheduler: Any, config: Any) -> None:
        need(config, solver_type=("bh1", "bh2"), solver_order=(1, 2, 3))
        if scheduler.solver_p:
            raise Unfit("solver_p")
        flow, noises = bool(config.use_flow_sigmas), not scheduler.predict_x0
        kinds = ("epsilon", "sample") if noises else ("epsilon", "sample", "flow_prediction")
        kind = kind_of(config, kinds if flow else VP)
        self.order, self.lowers = config.solver_order, bool(config.lower_order_final)
        self.limit_x0(config, clips=False)
        if noises:
            self.quantile = None  # diffusers thresholds x0 estimates only
        sigmas, keeps = exact(scheduler.sigmas), "epsilon" if noises else "sample"
        parts: list[Columns] = []
        for order in range(self.order):
            parts += unipc(sigmas, flow, kind, keeps, config.solver_type, order + 1)
        self.place(*parts)
        self.count = len(sigmas) - 1

    def order_at(self, scheduler: Any, k: int) -> int:
        order = min(self.order, len(self.times) - k) if self.lowers else self.order
        return min(order, scheduler.lower_order_nums + 1)

    def locate(self, scheduler: Any, x: Any, m: Any, timestep: Any, t: int | None, options: Options) -> Passes | str:
        if not isinstance(x, Tensor) or x.ndim < 2:
            return "samples of one dimension"
        if scheduler.num_inference_steps is None:
            return "set_timesteps was not called"
        k, begin = scheduler._step_index, scheduler.last_sample
        if k is None:
            k = self.start(scheduler, timestep)
        order, dtypes = self.order_at(scheduler, k), (getattr(m, "dtype", None),)
        history = () if order == 1 else self.latest(scheduler.model_outputs, order - 1, dtypes)
        if history is None:
            return NO_HISTORY
        if not 0 <= k < self.count or order < 1:
            return NO_ROW
        uncorrected, predictor = (3 * order - 3) * self.count + k, (3 * order - 1) * self.count + k
        if k == 0 or k - 1 in scheduler.disable_corrector or begin is None:
            return ((uncorrected, history, None, X0 | ONE_DTYPE),) if uncorrected in self.usable else NO_ROW
        last = scheduler.this_order
        corrector = (3 * last - 2) * self.count + k
        before = self.latest(scheduler.model_outputs, last, dtypes)
        if before is None:
            return NO_HISTORY
        if corrector not in self.usable or predictor not in self.usable:
            return NO_ROW
        return (corrector, (begin, *before), None, X0 | ONE_DTYPE), (predictor, history, None, ONE_DTYPE)

    def finish(self, scheduler: Any, timestep: Any, x: Tensor, m: Tensor, done: tuple) -> None:
        times = scheduler.timestep_list
        for i in range(self.order - 1):
            times[i] = times[i + 1]
        times[-1] = timestep
        scheduler.this_order, scheduler.last_sample = self.order_at(scheduler, scheduler._step_index), x
        super().finish(scheduler, timestep, x, m, done)


INDEX = {"index_for_timestep": ("ce5bc48edb6c",)}
LEVELS = {"_sigma_to_alpha_sigma_t": ("ca225146b46d",)}
THRESHOLD = {"_threshold_sample": ("35d85792db7a",)}
ADD_NOISE = Method(add_noise_by_sigma, MultistepNoise, {"add_noise": ("88e2ca9a240a",)} | INDEX | LEVELS)
SCHEDULERS = {
    "DPMSolverMultistepScheduler": {
        "step": Method(
            fused_step,
            DPMSolver,
            {
                "step": ("ceaaa7ea9876",),
                "convert_model_output": ("deeca38ecb21",),
                "dpm_solver_first_order_update": ("a18fea4d2211", "a04a75c17fc6"),
                "multistep_dpm_solver_second_order_update": ("ef45ec00abc5",),
                "multistep_dpm_solver_third_order_update": ("7b6b4ab8c52e",),
            }
            | THRESHOLD
            | LEVELS,
        ),
        "add_noise": ADD_NOISE,
    },
    "UniPCMultistepScheduler": {
        "step": Method(
            fused_step,
            UniPC,
            {
                "step": ("3da66493da24",),
                "convert_model_output": ("7c92cbf3aa30",),
                "multistep_uni_p_bh_update": ("ae1aff0f90b4", "965a4db715fb"),
                "multistep_uni_c_bh_update": ("fd518a3a9296", "8a443b86a02b"),
            }
            | THRESHOLD
            | LEVELS,
        ),
        "add_noise": ADD_NOISE,
    },
}
