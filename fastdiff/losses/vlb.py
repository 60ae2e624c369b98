"""The variational bound of a discrete process: its terms, and the losses that are made of it.

    -log p(x0) <= L_T + sum over t of L_t

L_T = KL(q(x_T | x0) || prior); L_t = KL(q(x_(t-1) | x_t, x0) || p(x_(t-1) | x_t)); the last term, of t = 0 here, is
minus the logarithm of the data's likelihood. Ho et al. 2020, equation 5; Nichol and Dhariwal 2021. Everything is in
bits per dimension: the nats of a sample, over ln 2 and the number of its elements.

The means of L_t differ by a factor times the error of the prediction, so each term is one pass over the prediction's
error (``fastdiff.ops.gaussian_kl``), in the same pass as L_simple.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .. import prediction as kinds
from ..modes import lasting
from ..noised import Noised, check_noised, refuse_packed
from ..numeric import check_numbers
from ..ops.checks import check_clip, check_floating, compute_dtype, place_rows
from ..ops.dispatch import get as backend_of
from ..process import MIN_VARIANCE, Process, transition
from ..program import Program, lookup
from ..tensors import gather_rows

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
_NAMES = ("p", "q", "scale", "l_0", "l_v", "l_q", "half_width", "simple", "of_x0")
_BITS = 1 / math.log(2)


def columns(process: Process, prediction: Any, variance: str, half_width: float) -> dict[str, Tensor]:
    """The coefficients of ``fastdiff.ops.gaussian_kl`` at all timesteps of ``process``: float64 [steps] each.

    p, q, scale: of the prediction's error, and of the means by it. l_0, l_v: the model's log-variance l_0 + l_v v.
    l_q: that of the true Gaussian. half_width: ``half_width`` at t = 0, -1 (a KL divergence) elsewhere. of_x0: of the
    means by an error of x0.
    """
    levels = process.levels(torch.arange(process.steps, device="cpu"))
    one, first = torch.ones(1, dtype=torch.float64, device="cpu"), levels.t == 0
    ends = torch.cat([one, levels.alpha[:-1]]), torch.cat([0 * one, levels.sigma[:-1]])
    of_x0, _, small, large = transition(levels.alpha, levels.sigma, *ends)
    # At t = 0 the true variance is 0. The model's is that of t = 1, as in the code of both papers.
    small = torch.cat([small[1:2] if len(small) > 1 else large[:1], small[1:]]).clamp(min=MIN_VARIANCE).log()
    large = large.log()
    if variance == "fixed_large":
        large = torch.cat([small[:1], large[1:]])
    p, q = prediction.coefficients(levels)
    constant = {"fixed_small": small, "fixed_large": large, "learned": 0 * small}
    return {
        "p": p,
        "q": q,
        "scale": of_x0 * kinds.conversion(prediction, kinds.SAMPLE, levels)[1],
        "l_0": constant.get(variance, (large + small) / 2),
        "l_v": {"learned": torch.ones_like(small)}.get(variance, (large - small) / 2),
        "l_q": torch.where(first, 0.0, small),
        "half_width": torch.where(first, half_width, -1.0),
        "of_x0": of_x0,
    }


class VariationalBound:
    """The variational bound of an objective whose process is discrete (VariancePreserving).

    Args:
        objective: its process and prediction make the bound; its weighting is that of L_simple. Its error function is
            "mse".
        variance: of the model's Gaussians. "fixed_small" is the true one's variance, "fixed_large" beta_t; then the
            network's output is the prediction, [batch, C, ...]. "learned": the network gives a log-variance v too;
            "learned_range": v in [-1, 1] interpolates the logarithms of the two. Then the output is [batch, 2 C, ...],
            v in the second half.
        bins: the values that the data takes, in [-1, 1] (256 for images of 8 bits): L_0 is the likelihood of its bin.
            None: L_0 is the density of continuous data.

    The network's output goes with ``noised`` of ``objective.noise(x0)``, one t a sample. All results are float32
    (float64 with float64 inputs), and differentiable in the output.

    Raises TypeError or ValueError for an unfit objective, variance or bins.
    """

    def __init__(self, objective: Any, variance: str = "fixed_small", bins: int | None = 256):
        process = getattr(objective, "process", None)
        if not isinstance(process, Process):
            raise TypeError(f"objective must be a fastdiff.Objective; got {type(objective).__name__}.")
        if not process.noisiest_last:
            raise ValueError(
                f"the variational bound is a sum over the steps of a discrete process (VariancePreserving); got "
                f"{process!r}. Of a continuous one, the likelihood is found by its probability-flow ODE."
            )
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}; got {variance!r}.")
        if bins is not None and (type(bins) is not int or bins < 2):
            raise ValueError(f"bins must be the number of values of the data, at least 2, or None; got {bins!r}.")
        error = objective.loss_function
        if error.function != "mse" or error.fixed[1] != 1:
            raise ValueError(f"the error function of the objective must be 'mse'; got {error!r}.")
        self.objective, self.variance, self.bins = objective, variance, bins
        self._made: tuple[Any, Program] | None = None
        self._program()

    @property
    def learned(self) -> bool:
        """Whether the network's output holds v."""
        return self.variance in ("learned", "learned_range")

    def terms(self, output: Tensor, noised: Noised, clip: float | None = None) -> Tensor:
        """The term L_t of each sample at its own t: [batch].

        Args:
            output: the network's output for ``noised``.
            clip: clamp the x0 estimate to [-clip, clip], as samplers do; None leaves it.
        """
        if clip is None:
            return self._kl(output, noised, reduction="none")
        check_clip(clip)
        m, v = output.chunk(2, 1) if self.learned else (output, None)
        x0 = self.objective.predict_x0(m, noised).clamp(-clip, clip)
        return self._kl(x0 if v is None else torch.cat([x0, v], 1), noised, of_x0=True, reduction="none")

    def loss(self, output: Tensor, noised: Noised, reduction: str = "mean") -> Tensor:
        """L_vlb: steps x L_t, whose mean over t is the whole bound but for L_T, which no network changes.

        Args:
            reduction: "mean" over the batch, or "none": [batch].
        """
        return self._kl(output, noised, weight=float(self.objective.process.steps), reduction=reduction)

    def hybrid(self, output: Tensor, noised: Noised, vlb_weight: float = 0.001, reduction: str = "mean") -> Tensor:
        """L_simple + vlb_weight x L_vlb in one pass (Nichol and Dhariwal 2021, equation 16): the mean learns from
        L_simple alone, the variance from L_vlb alone.

        Args:
            vlb_weight: of L_vlb, which is steps x L_t: the default is the paper's, and steps / 1000 as a factor of L_t
                in its code.
            reduction: "mean" over the batch, or "none": [batch].
        """
        check_numbers(vlb_weight=vlb_weight)
        if not self.learned:
            raise ValueError(f"a {self.variance!r} variance learns nothing from L_vlb: use 'learned_range', or loss().")
        weight = vlb_weight * self.objective.process.steps
        return self._kl(output, noised, weight=weight, simple=True, freeze_mean=True, reduction=reduction)

    def prior(self, x0: Tensor) -> Tensor:
        """L_T of each sample: how far x_T is from a standard normal, [batch]. x0: [batch, ...]."""
        check_floating(x0=x0)
        process = self.objective.process
        levels = process.levels(torch.tensor([process.steps - 1], device="cpu"))
        alpha, log_variance = float(levels.alpha), 2 * math.log(float(levels.sigma))
        return ops.gaussian_kl(x0, None, None, scale=alpha, l_0=0.0, l_q=log_variance, weight=_BITS, reduction="none")

    def _program(self) -> Program:
        """The table of the process as it is now, as a program."""
        objective = self.objective
        made_for = objective, self.variance, self.bins, objective.process._changes
        if self._made is None or self._made[0] != made_for:
            with lasting():
                half_width = 0.0 if self.bins is None else 1 / (self.bins - 1)
                found = columns(objective.process, objective.prediction, self.variance, half_width)
                of_loss = objective._coefficients.formulas(
                    objective.process.levels(torch.arange(objective.process.steps, device="cpu"))
                )
                scale = of_loss["scale"] if objective.error_space is not objective.prediction else 1.0
                found["simple"] = of_loss["loss_weight"] * scale**2
                table = torch.stack([found[name] for name in _NAMES], -1)
                for name, row in found.items():
                    if not bool(row.isfinite().all()):
                        t = int((~row.isfinite()).nonzero()[0])
                        raise ValueError(
                            f"a prediction of {objective.prediction.name!r} does not say x0 at t = {t} of "
                            f"{objective.process!r} ({name} is not finite): use 'v_prediction'."
                        )
                self._made = made_for, lookup(table, _NAMES)
        return self._made[1]

    def _kl(
        self,
        output: Tensor,
        noised: Noised,
        *,
        weight: float = 1.0,
        simple: bool = False,
        freeze_mean: bool = False,
        of_x0: bool = False,
        reduction: str,
    ) -> Tensor:
        check_noised(output, noised)
        refuse_packed(noised, "VariationalBound")
        noised.check_unchanged()
        check_floating(output=output)
        objective, t = self.objective, noised.t
        if t.ndim != 1:
            raise ValueError(f"the bound has one t a sample, [batch]; got t of shape {tuple(t.shape)}.")
        if noised.objective is not objective and not objective.process.has_levels_of(noised.objective.process):
            raise ValueError(
                f"noised is of the process {noised.objective.process!r}, the bound of {objective.process!r}."
            )
        kind = kinds.SAMPLE if of_x0 else objective.prediction
        names = [name for name, there in (("p", kind.uses_x0), ("q", kind.uses_noise), ("l_v", self.learned)) if there]
        names += ["l_0", "l_q", "half_width", "of_x0" if of_x0 else "scale"] + ["simple"] * simple
        x0, n = noised.x0, noised.noise_source
        rows = self._rows(tuple(names), t, x0, compute_dtype(output, x0, n if isinstance(n, Tensor) else None))
        if of_x0:
            rows |= {"p": 1.0, "scale": rows.pop("of_x0")}
        how = {
            "weight": weight * _BITS,
            "freeze_mean": freeze_mean,
            "reduction": reduction,
            "row_shape": tuple(t.shape),
        }
        return ops.gaussian_kl(output, x0, n, simple_weight=rows.pop("simple", 0.0), **rows, **how)

    def _rows(self, names: tuple[str, ...], t: Tensor, x0: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """The coefficients at the times ``t``, placed for ``x0``."""
        program, index = self._program(), place_rows("t", t, x0.shape)
        rows = None
        if not torch.compiler.is_compiling():
            rows = backend_of(x0.device).evaluate(program.of(*names), index, dtype)
        if rows is None:
            table = program.table[:, [_NAMES.index(name) for name in names]].to(t.device, dtype)
            rows = gather_rows(table, index).unbind(-1)
        return dict(zip(names, rows))
