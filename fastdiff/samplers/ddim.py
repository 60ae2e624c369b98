"""DDIM: x0 and noise estimates recombined at the next level. With eta = 0 it is Euler's method on a flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .. import prediction as kinds
from ..ops.checks import check_clip
from ..prediction import Prediction
from ..process import Process, VariancePreserving, transition
from . import spacing as spacings
from .base import Plan, Sampler, build_plan, following


@dataclass(frozen=True)
class DDIM(Sampler):
    """Song et al. 2021 (DDIM), equations 12 and 16, for any process.

    Args:
        eta: 0 is deterministic, 1 has DDPM's posterior variance. In [0, 1].
        clip: clamp the x0 estimate to [-clip, clip].
        rederive_epsilon: the noise estimate is taken from the clamped x0 instead of from the network's output
            (``use_clipped_model_output`` in diffusers). Without a clamp they are equal.
        spacing, steps_offset, timesteps: as for ``DDPM``.
        previous: "next" goes to the next time of the list. "stride" goes to t - T // steps, as diffusers' DDIM does,
            which is not in the list for every spacing; of ``timesteps`` that are given, at equal distances, it is that
            distance. Discrete processes.
        set_alpha_to_one: the last step goes to clean data; False: to the level of t = 0. Discrete processes.
    """

    eta: float = 0.0
    clip: float | None = None
    rederive_epsilon: bool = False
    spacing: str = "trailing"
    steps_offset: int = 0
    previous: str = "next"
    set_alpha_to_one: bool = True
    timesteps: Sequence[float] | None = None

    def __post_init__(self):
        super().__post_init__()
        self._freeze("timesteps")
        check_clip(self.clip)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1]; got {self.eta!r}.")
        if self.previous not in ("next", "stride"):
            raise ValueError(f"previous must be 'next' or 'stride'; got {self.previous!r}.")

    def plan(self, process: Process, steps: int | None, prediction: str | Prediction) -> Plan:
        prediction = kinds.get(prediction)
        times = spacings.times(process, steps, self.spacing, self.steps_offset, self.timesteps)
        levels = process.levels(times)
        alpha, sigma = self._following(process, levels)
        variance = self.eta**2 * transition(levels.alpha, levels.sigma, alpha, sigma)[2]
        epsilon = None if self.rederive_epsilon else kinds.conversion(prediction, kinds.EPSILON, levels)
        direction = (sigma**2 - variance).clamp(min=0).sqrt()
        columns = ddim_columns(levels.alpha, levels.sigma, alpha, direction, epsilon) | {"c_noise": variance.sqrt()}
        draws = (self.eta > 0,) * len(times)
        return build_plan(prediction, levels, (alpha, sigma), draws, columns, clip=self.clip)

    def _following(self, process, levels) -> tuple[Tensor, Tensor]:
        if not process.noisiest_last:
            if self.previous != "next" or not self.set_alpha_to_one:
                raise ValueError(f"previous='stride' and set_alpha_to_one=False need discrete steps; got {process!r}.")
            return following(levels)
        end = process.levels(torch.tensor([0], device="cpu"))
        last = (1.0, 0.0) if self.set_alpha_to_one else (float(end.alpha), float(end.sigma))
        if self.previous == "next":
            return following(levels, last)
        target = levels.t - self._stride(process, levels.t.tolist())
        alpha, sigma = process.alpha_sigma(target.clamp(min=0))
        return torch.where(target < 0, last[0], alpha), torch.where(target < 0, last[1], sigma)

    def _stride(self, process: VariancePreserving, times: list[int]) -> int:
        if self.timesteps is None:
            return process.steps // len(times)
        distances = {a - b for a, b in pairwise(times)}
        if len(distances) == 1:
            return distances.pop()
        if times in (spacings.discrete_timesteps(process.steps, len(times), s) for s in spacings.SPACINGS):
            return process.steps // len(times)
        raise ValueError(
            f"previous='stride' cannot tell the stride of timesteps that are not at equal distances, nor all of a "
            f"spacing; got {', '.join(map(str, times[:5]))}: use previous='next'."
        )


def ddim_columns(
    alpha: Tensor, sigma: Tensor, end: Tensor, direction: Tensor, epsilon: tuple[Tensor, Tensor] | None
) -> dict[str, Tensor]:
    """From x_t at (alpha, sigma) to end x0 + direction n. ``epsilon`` = (k_x, k_m) gives the noise estimate n as
    k_x x + k_m m; None: that which x and the x0 estimate imply."""
    if epsilon is None:
        return {"c_x": direction / sigma, "c_x0": end - direction * alpha / sigma}
    return {"c_x": direction * epsilon[0], "c_m": direction * epsilon[1], "c_x0": end}
