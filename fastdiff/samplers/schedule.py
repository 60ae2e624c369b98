"""The noise levels that a sampler visits: what Euler, Heun, DPM-Solver++, UniPC and their kin have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import sigma_schedules as schedules
from ..ops.checks import check_clip
from ..process import Levels, Process, VariancePreserving
from . import spacing as spacings
from .base import Sampler

SCHEDULES = ("karras", "exponential", "beta", "linear")


@dataclass(frozen=True)
class Path:
    """The levels visited, [N]; t, alpha and sigma of those and of the end, [N + 1]. The t of clean data is -1."""

    levels: Levels
    times: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of the level that each step goes to, [N]."""
        return self.alpha[1:], self.sigma[1:]

    @property
    def log_ratio(self) -> Tensor:
        """lambda = ln(alpha / sigma), [N + 1]; infinite at clean data and at pure noise."""
        return self.alpha.log() - self.sigma.log()


@dataclass(frozen=True, kw_only=True)
class Scheduled(Sampler):
    """Base of the samplers that visit any noise levels.

    Args:
        spacing, steps_offset: of the timesteps of a discrete process: "trailing", "leading" or "linspace", see
            ``fastdiff.samplers.spacing``. Continuous processes have a grid of their own.
        timesteps: visit these times instead, noisiest first. Those of a discrete process may lie between its
            timesteps; then sigma / alpha is interpolated.
        sigmas: "karras", "exponential", "beta" or "linear" from sigma_max to sigma_min, or the sigmas themselves, the
            noisiest first and without the end. A sigma is sigma / alpha, and for RectifiedFlow the factor of the noise,
            after any shift: it is not shifted again. With ``timesteps`` too, those are what the network is told.
        sigma_min, sigma_max: of a named schedule; None: of the process's own first and last time.
        rho: of "karras".
        final_sigma: where the last step goes; 0 is clean data.
        clip: clamp the x0 estimate to [-clip, clip].
    """

    spacing: str = "trailing"
    steps_offset: int = 0
    timesteps: Sequence[float] | None = None
    sigmas: str | Sequence[float] | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    final_sigma: float = 0.0
    clip: float | None = None

    def __post_init__(self):
        super().__post_init__()
        self._freeze("timesteps", "sigmas")
        check_clip(self.clip)
        if isinstance(self.sigmas, str) and self.sigmas not in SCHEDULES:
            raise ValueError(f"sigmas must be one of {', '.join(SCHEDULES)}, or numbers; got {self.sigmas!r}.")
        if self.spacing not in spacings.SPACINGS:
            raise ValueError(f"spacing must be one of {', '.join(spacings.SPACINGS)}; got {self.spacing!r}.")
        if self.timesteps is not None and isinstance(self.sigmas, str):
            raise ValueError(f"timesteps and sigmas={self.sigmas!r} both say which levels to visit: leave one out.")
        if not isinstance(self.sigmas, str) and (self.sigma_min is not None or self.sigma_max is not None):
            raise ValueError(f"sigma_min and sigma_max go with a named schedule ({', '.join(SCHEDULES)}).")
        if not self.rho > 0:
            raise ValueError(f"rho must be positive; got {self.rho!r}.")
        for low, high in ((0, self.sigma_min), (self.sigma_min or 0, self.sigma_max)):
            if high is not None and not low < high:
                raise ValueError(
                    f"0 < sigma_min < sigma_max is needed; got sigma_min={self.sigma_min}, sigma_max={self.sigma_max}."
                )

    def spaced(self, process: VariancePreserving, steps: int) -> list[float]:
        """The timesteps of a discrete process that ``steps`` steps visit."""
        return spacings.between_timesteps(process.steps, steps, self.spacing, self.steps_offset)

    def path(self, process: Process, steps: int | None) -> Path:
        """The levels of a run. Raises ValueError unless the noise falls from each to the next."""
        given = next((g for g in (self.timesteps, self.sigmas) if g is not None and not isinstance(g, str)), None)
        if given is not None:
            if steps is not None and steps != len(given):
                raise ValueError(f"{len(given)} timesteps or sigmas were given and steps={steps}: leave steps out.")
            steps = len(given)
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps}.")
        levels = self._levels(process, steps)
        end = (-1.0, 1.0, 0.0)
        if self.final_sigma != 0:
            last = process.levels_at([self.final_sigma])
            end = (float(last.t), float(last.alpha), float(last.sigma))
        times, alpha, sigma = (
            torch.cat([visited, torch.tensor([last], dtype=torch.float64, device="cpu")])
            for visited, last in zip((levels.t, levels.alpha, levels.sigma), end)
        )
        # By more than the roundings of a schedule: a step of no length would be divided by.
        falls = alpha[1:] * sigma[:-1] > alpha[:-1] * sigma[1:] * (1 + 1e-9)
        if not bool(falls.all()):
            shown = ", ".join(f"{value:.4g}" for value in (sigma / alpha).tolist()[-6:])
            raise ValueError(
                f"the noise must fall from each level to the next, and at last to final_sigma={self.final_sigma:g}; "
                f"sigma / alpha ends with {shown}."
            )
        return Path(levels, times, alpha, sigma)

    def _levels(self, process: Process, steps: int | None) -> Levels:
        if isinstance(self.sigmas, str):
            return process.levels_at(self._named(process, 50 if steps is None else steps))
        if self.sigmas is not None:
            levels = process.levels_at(list(self.sigmas))
            if self.timesteps is None:
                return levels
            if len(self.timesteps) != len(levels.t):
                raise ValueError(f"{len(levels.t)} sigmas and {len(self.timesteps)} timesteps: one each is needed.")
            told = torch.as_tensor(self.timesteps, dtype=torch.float64, device="cpu")
            return Levels(told, levels.alpha, levels.sigma, process)
        return self._timed(process, steps)

    def _timed(self, process: Process, steps: int | None) -> Levels:
        if not process.noisiest_last:
            return process.levels(spacings.times(process, steps, timesteps=self.timesteps))
        times = self.timesteps
        if times is None:
            times = self.spaced(process, process.steps if steps is None else steps)
        times = [float(t) for t in times]
        if all(t == int(t) for t in times):
            return process.levels(torch.tensor([int(t) for t in times], device="cpu"))
        return process.levels_between(times)

    def _named(self, process: Process, steps: int) -> Tensor:
        if process.noisiest_last:
            ends = process.levels([process.steps - 1, 0])
        else:
            grid = spacings.times(process, max(steps, 2))
            ends = process.levels(grid[[0, -1]])
        high, low = ends.sigma if process.straight else ends.sigma / ends.alpha
        low = self.sigma_min if self.sigma_min is not None else float(low)
        high = self.sigma_max if self.sigma_max is not None else float(high)
        if not 0 < low < high < float("inf"):
            raise ValueError(
                f"a {self.sigmas!r} schedule needs 0 < sigma_min < sigma_max < infinity; got {low:g} and {high:g} for "
                f"{process!r}: give sigma_min and sigma_max."
            )
        if self.sigmas == "karras":
            return schedules.karras(steps, low, high, self.rho)
        return getattr(schedules, self.sigmas)(steps, low, high)  # type: ignore[arg-type]
