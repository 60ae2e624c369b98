"""Euler's method in sigma / alpha, and its ancestral form, on any process."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import prediction as kinds
from ..prediction import Prediction
from ..process import Process, transition
from .base import Plan, build_plan
from .churn import Churned
from .schedule import Path, Scheduled


def euler_columns(alpha: Tensor, sigma: Tensor, ends: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """x_t at (alpha, sigma) to ``ends`` along a straight line: x'/alpha' = x/alpha + (s' - s) (x/alpha - x0)/s with
    s = sigma / alpha. Multiplied out nothing is divided by alpha, which may be 0."""
    ratio = ends[1] / sigma
    return {"c_x": ratio, "c_x0": ends[0] - alpha * ratio}


@dataclass(frozen=True)
class Euler(Churned):
    """Euler's method for dx/dsigma = (x - x0) / sigma in the space of x_t / alpha (Karras et al. 2022, algorithm 2
    without its correction). On RectifiedFlow it is x + (sigma' - sigma) velocity.

    x is kept as x_t of the process, not as x_t / alpha as in k-diffusion and diffusers: with variance preserved there
    is no input to scale, and nothing of size sigma_max (4096 at zero terminal SNR) in half precision.

    Args: those of ``Churned`` and ``Scheduled``.
    """

    def plan(self, process: Process, steps: int | None, prediction: str | Prediction) -> Plan:
        path, start, after, added = self.churned(process, steps)
        columns = euler_columns(path.levels.alpha, path.levels.sigma, path.ends)
        columns = {name: after * column for name, column in columns.items()} | {"c_noise": added}
        draws = tuple((added > 0).tolist())
        ends, std = self.ends_with(path, after, added), self.first_std(process, path)
        return build_plan(kinds.get(prediction), path.levels, ends, draws, columns, std, clip=self.clip, start=start)


@dataclass(frozen=True, kw_only=True)
class EulerAncestral(Scheduled):
    """Euler's method to a lower level, then noise up to the next (k-diffusion's sample_euler_ancestral). With eta = 1
    it is DDPM's posterior on these levels.

    On RectifiedFlow the lower level is sigma' (1 + (sigma' / sigma - 1) eta), as ComfyUI and diffusers' LTX scheduler
    have it.

    Args:
        eta: how much of the noise is replaced; 0 is ``Euler``.
        s_noise: factor on the noise.
        and those of ``Scheduled``.
    """

    eta: float = 1.0
    s_noise: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1]; got {self.eta!r}.")

    def plan(self, process: Process, steps: int | None, prediction: str | Prediction) -> Plan:
        path = self.path(process, steps)
        columns = self._flow_columns(path) if process.straight else self._columns(path)
        columns["c_noise"] = self.s_noise * columns["c_noise"]
        draws = (self.eta > 0,) * len(path.levels.t)
        return build_plan(kinds.get(prediction), path.levels, path.ends, draws, columns, clip=self.clip)

    def _columns(self, path: Path) -> dict[str, Tensor]:
        alpha, sigma = path.levels.alpha, path.levels.sigma
        up = self.eta**2 * transition(alpha, sigma, *path.ends)[2]
        down = (path.ends[1] ** 2 - up).clamp(min=0).sqrt()
        return euler_columns(alpha, sigma, (path.ends[0], down)) | {"c_noise": up.sqrt()}

    def _flow_columns(self, path: Path) -> dict[str, Tensor]:
        sigma, (alpha, end) = path.levels.sigma, path.ends
        down = end * (1 + (end / sigma - 1) * self.eta)
        below = path.levels.process.levels_at(down)
        factor = alpha / below.alpha  # back up: scaled so that the data has the next level's alpha
        columns = euler_columns(path.levels.alpha, sigma, (below.alpha, down))
        columns = {name: factor * column for name, column in columns.items()}
        return columns | {"c_noise": (end**2 - (down * factor) ** 2).clamp(min=0).sqrt()}


@dataclass(frozen=True)
class FlowEuler(Euler):
    """``Euler`` for RectifiedFlow alone: x + (sigma' - sigma) velocity (Liu et al. 2022; SD3 and Flux)."""

    def path(self, process: Process, steps: int | None) -> Path:
        need_flow(self, process)
        return super().path(process, steps)


@dataclass(frozen=True)
class FlowLCM(Scheduled):
    """Stochastic flow sampling: (1 - sigma') x0 + sigma' z, all noise new at every step. diffusers' FlowMatchLCM, and
    FlowMatchEuler with stochastic_sampling=True. Args: those of ``Scheduled``."""

    def plan(self, process: Process, steps: int | None, prediction: str | Prediction) -> Plan:
        need_flow(self, process)
        path = self.path(process, steps)
        columns = {"c_x0": path.ends[0], "c_noise": path.ends[1]}
        draws = (True,) * len(path.levels.t)
        return build_plan(kinds.get(prediction), path.levels, path.ends, draws, columns, clip=self.clip)


def need_flow(sampler: object, process: Process) -> None:
    """Raise ValueError unless the process is a RectifiedFlow."""
    if not process.straight:
        raise ValueError(f"{type(sampler).__name__} is for fastdiff.RectifiedFlow; got {process!r}.")
