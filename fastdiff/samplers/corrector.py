"""Predictor-corrector sampling: after each step of another sampler, Langevin steps at the level that it has reached."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ..ops.checks import check_clip
from ..ops.step import COLUMNS
from ..philox import whole
from ..prediction import Prediction
from ..process import Process
from .base import Plan, Sampler, build_table
from .ddpm import DDPM

_AT = {name: k for k, name in enumerate(COLUMNS)}
_OF_HISTORY = [k for name, k in _AT.items() if name.startswith(("c_h", "h_"))]


@dataclass(frozen=True, kw_only=True)
class PredictorCorrector(Sampler):
    """Song et al. 2021 (Score-Based Generative Modeling through Stochastic Differential Equations), algorithms 2 and 3,
    for any process.

    A Langevin step is x + e s + sqrt(2 e) z, with the score s and new noise z. Its size, for each sample,
    is e = 2 a (snr abs(z) / abs(s))^2. a is 1 - beta of the step that follows in a process that preserves variance
    (algorithm 5), 1 in one whose data is not scaled (algorithm 4): (alpha / alpha')^2.

    It is made for samples of many numbers. Of a few, abs(s) may be near 0, and the step then leads far away.

    N steps are N + (N - 1) corrector_steps calls of the network. Each call counts as a step for a callback, for
    ``noise`` and for ``step_offset``. Not with cond_fn or cuda_graph.

    Args:
        predictor: a sampler of one call a step that keeps no history: ``DDPM`` (the paper's ancestral sampling),
            ``DDIM``, ``Euler``, ``EulerAncestral``.
        corrector_steps: Langevin steps after each step but the last.
        snr: the signal-to-noise ratio r of the paper; > 0.
        clip: clamp the predictor's x0 estimate to [-clip, clip]; None: as the predictor has it.
    """

    predictor: Sampler = DDPM()
    corrector_steps: int = 1
    snr: float = 0.16
    clip: float | None = None

    def __post_init__(self):
        super().__post_init__()
        check_clip(self.clip)
        if not isinstance(self.predictor, Sampler):
            raise TypeError(f"predictor must be an object of fastdiff.samplers; got {self.predictor!r}.")
        object.__setattr__(self, "corrector_steps", whole("corrector_steps", self.corrector_steps))
        if self.corrector_steps < 0:
            raise ValueError(f"corrector_steps must be at least 0; got {self.corrector_steps}.")
        if not 0 < self.snr < float("inf"):
            raise ValueError(f"snr must be a positive number; got {self.snr!r}.")

    def plan(self, process: Process, steps: int | None, prediction: str | Prediction) -> Plan:
        plan = self.predictor.plan(process, steps, prediction)
        if (
            plan.steps is not None
            or plan.start is not None
            or plan.learned_variance
            or bool((plan.table[:, _OF_HISTORY] != 0).any())
        ):
            raise ValueError(
                f"PredictorCorrector needs a predictor of one call a step without history, churn and learned variance; "
                f"got {self.predictor!r}."
            )
        table = plan.table
        # The level (alpha, sigma) that each corrector is at is where the step before it goes, and it goes nowhere else.
        alpha, sigma = table[:-1, _AT["k_x0"]], table[:-1, _AT["k_n"]]
        following = table[1:, _AT["k_x0"]]
        p_x, p_m = table[1:, _AT["p_x"]], table[1:, _AT["p_m"]]
        # The score (alpha x0 - x) / sigma^2 as c_x x + c_m m. The step multiplies both, and the noise, by its size.
        score = {"c_x": (alpha * p_x - 1) / sigma**2, "c_m": alpha * p_m / sigma**2, "c_noise": torch.ones_like(alpha)}
        langevin = build_table(len(alpha), p_x=p_x, p_m=p_m, k_x0=alpha, k_n=sigma, **score)
        size = 2 * self.snr**2 * (alpha / following) ** 2
        # In order: the first step; then, for each other, its correctors and itself.
        each = self.corrector_steps + 1
        rows, corrects = [0], [False]
        for k in range(1, len(table)):
            rows += [k] * each
            corrects += [True] * self.corrector_steps + [False]
        made = torch.stack([langevin[k - 1] if c else table[k] for k, c in zip(rows, corrects)])
        scale = None if plan.model_scale is None else plan.model_scale[rows]
        if scale is not None:
            made[:-1, _AT["c_in"]] = scale[1:]
        else:
            made[:, _AT["c_in"]] = 1.0
        return dataclasses.replace(
            plan,
            times=plan.times[rows],
            table=made,
            draws=tuple(c or plan.draws[k] for k, c in zip(rows, corrects)),
            model_scale=scale,
            model_time=plan.model_time[rows],
            gradient=plan.gradient[rows],
            clip=plan.clip if self.clip is None else self.clip,
            langevin=tuple(float(size[k - 1]) if c else 0.0 for k, c in zip(rows, corrects)),
        )
