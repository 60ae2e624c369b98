"""Rules of guidance, to be given to ``fastdiff.sample(guidance=)`` in place of a number; and the gradient of a
classifier, for its ``cond_fn``.

A rule takes what the network says with the condition and without it, c and u, and says what the step is to use in their
place. Plain classifier-free guidance is u + scale (c - u).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import modes, ops
from .numeric import check_fields, check_numbers
from .ops.checks import check_tensor, place_rows
from .philox import whole
from .prediction import Prediction
from .process import Process
from .showing import brief, brief_fields

__all__ = ["CFGPlusPlus", "CFGZero", "NormPreserving", "Plain", "Projected", "Rule", "Step", "classifier_gradient"]


@dataclass(frozen=True)
class Step:
    """What a rule is told beside the network's two outputs.

    Attributes:
        x: x_t, [batch, ...].
        p_x, p_m: the x0 estimate of an output m is p_x x + p_m m.
        index: the number of the step, ``step_offset`` included, as a callback counts: both calls of the network in a
            step of Heun's method have one number; each call has its own with ``PredictorCorrector``.
        state: what the rule keeps from step to step. It is empty when a run begins.
    """

    x: Tensor
    p_x: float
    p_m: float
    index: int
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class Rule:
    """Base of the rules: ``combine`` is the rule.

    Args:
        scale: the guidance scale, a number or one a sample, [batch].

    Attributes:
        renoises_unconditionally: the step takes its noise estimate from u, and only its x0 estimate from what
            ``combine`` returns.
    """

    scale: float | Tensor

    renoises_unconditionally: ClassVar[bool] = False
    __repr__ = brief_fields

    def __post_init__(self):
        check_fields(self)
        if not isinstance(self.scale, Tensor):
            check_numbers(scale=self.scale)
            object.__setattr__(self, "scale", float(self.scale))

    def check(self, process: Process, prediction: Prediction, shape: tuple[int, ...]) -> None:
        """Raise ValueError where the rule means nothing for what the network predicts, or for samples of ``shape``."""
        if isinstance(self.scale, Tensor) and self.scale.numel() > 1 and self.scale.shape != shape[:1]:
            raise ValueError(f"scale must be a number or one a sample, {list(shape[:1])}; got {brief(self.scale)}.")

    def combine(self, cond: Tensor, uncond: Tensor, step: Step) -> Tensor:
        """What stands in place of the network's output, [batch, ...], float32 or float64 as ``cond`` and ``uncond``.

        Nothing in it may wait for the device. A sample must not depend on the others of its batch."""
        raise NotImplementedError

    def _scale_for(self, output: Tensor) -> float | Tensor:
        """``scale`` as it multiplies numbers of samples, [batch]."""
        if not isinstance(self.scale, Tensor):
            return self.scale
        return self.scale.to(output.device, output.dtype, non_blocking=True)

    def _between(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """u + scale (c - u)."""
        scale = self._scale_for(cond)
        return torch.lerp(uncond, cond, place_rows("scale", scale, cond.shape) if isinstance(scale, Tensor) else scale)


class Plain(Rule):
    """u + scale (c - u) (Ho and Salimans 2022): what ``sample`` does with a number."""

    def combine(self, cond: Tensor, uncond: Tensor, step: Step) -> Tensor:
        return self._between(cond, uncond)


@dataclass(frozen=True, eq=False, repr=False)
class CFGZero(Rule):
    """CFG-Zero* (Fan et al. 2025, 2503.18886): s u + scale (c - s u), with the s of each sample that brings s u nearest
    to c, s = <c, u> / <u, u>; and an output of 0 in the first steps, in which a guided velocity is worse than none.

    Args:
        scale: a number, or one a sample, [batch].
        zero_steps: in how many steps the output is 0 ("zero-init"); the paper advises 4% of them. It must be 0 unless
            the network predicts the velocity of a ``RectifiedFlow``, for which 0 leaves x as it is. In these steps
            nothing else may change x: ``sample`` refuses samplers that add noise in them, a ``clip``,
            ``dynamic_thresholding``, ``cond_fn``, and a ``guidance_interval`` without them.
    """

    zero_steps: int = 1

    def __post_init__(self):
        super().__post_init__()
        if whole("zero_steps", self.zero_steps) < 0:
            raise ValueError(f"zero_steps must be at least 0; got {self.zero_steps}.")

    def check(self, process: Process, prediction: Prediction, shape: tuple[int, ...]) -> None:
        super().check(process, prediction, shape)
        if self.zero_steps and not (process.straight and prediction.name in ("flow", "reversed_flow")):
            raise ValueError(
                f"an output of 0 leaves x as it is for the velocity of a RectifiedFlow alone; got {prediction.name!r} "
                f"of {process!r}: use CFGZero(..., zero_steps=0)."
            )

    def combine(self, cond: Tensor, uncond: Tensor, step: Step) -> Tensor:
        if step.index < self.zero_steps:
            return torch.zeros_like(cond)
        sums = ops.row_moments(cond, uncond)
        scale = self._scale_for(cond)
        return ops.convert(cond, uncond, (1 - scale) * _ratio(sums.ab, sums.bb), scale)


@dataclass(frozen=True, eq=False, repr=False)
class Projected(Rule):
    """Adaptive projected guidance, APG (Sadat et al. 2024, 2410.02416, algorithm 1), of x0 estimates: guidance that
    leaves out what makes samples oversaturated.

    The difference d of the two x0 estimates, plus ``momentum`` times that of the call before, is cut to a norm of at
    most ``threshold``. Of it, the part along the conditional estimate is multiplied by ``eta``. The guided estimate is
    the conditional one plus (scale - 1) d. With eta = 1 and nothing else it is plain guidance.

    Args:
        scale: a number, or one a sample, [batch].
        eta: of the part along the conditional estimate; 0 leaves it out, 1 keeps it.
        momentum: of the differences of earlier guided calls of the network; negative in the paper, -0.5 or -0.75. Then
            a difference of full size is kept.
        threshold: the largest norm of the difference of a sample (r in the paper); None: any.
    """

    eta: float = 0.0
    momentum: float = 0.0
    threshold: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"threshold must be positive, or None for none; got {self.threshold!r}.")

    def combine(self, cond: Tensor, uncond: Tensor, step: Step) -> Tensor:
        x0 = ops.convert(cond, step.x, step.p_x, step.p_m)
        difference = (cond - uncond).mul_(step.p_m)
        if self.momentum:
            if "difference" in step.state:
                difference.add_(step.state["difference"], alpha=self.momentum)
            step.state["difference"] = difference
        sums = ops.row_moments(difference, x0)
        push = (self._scale_for(cond) - 1) / step.p_m  # from x0 estimates to outputs
        if self.threshold is not None:
            push = push * (self.threshold / sums.aa.sqrt()).clamp(max=1)
        return ops.convert(difference, x0, push * (self.eta - 1) * _ratio(sums.ab, sums.bb), push).add_(cond)


@dataclass(frozen=True, eq=False, repr=False)
class NormPreserving(Rule):
    """Plain guidance, brought back to the norm of the conditional output: f (u + scale (c - u)), with the f of each
    sample or token that gives it the norm of c. As the pipelines of Qwen-Image have it.

    Args:
        scale: a number, or one a sample, [batch].
        dims: the dimensions that the norm is taken over; None: all of a sample. (-1,) is Qwen-Image's, for tokens
            [batch, tokens, channels]; (1,) does that for [batch, channels, height, width].
    """

    dims: tuple[int, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.dims is not None:
            if not isinstance(self.dims, (tuple, list)) or not self.dims:
                raise TypeError(f"dims must be dimensions such as (-1,), or None for all; got {brief(self.dims)}.")
            object.__setattr__(self, "dims", tuple([whole("dims", dim) for dim in self.dims]))

    def check(self, process: Process, prediction: Prediction, shape: tuple[int, ...]) -> None:
        super().check(process, prediction, shape)
        for dim in self.dims or ():
            if dim not in range(-len(shape), len(shape)) or dim % len(shape) == 0:
                raise ValueError(f"dims must be dimensions of {tuple(shape)}, but not the first; got {self.dims}.")
        if len({dim % len(shape) for dim in self.dims or ()}) < len(self.dims or ()):
            raise ValueError(f"dims must differ; got {self.dims}, of which two are one dimension of {tuple(shape)}.")

    def combine(self, cond: Tensor, uncond: Tensor, step: Step) -> Tensor:
        guided = self._between(cond, uncond)
        if self.dims is None:
            sums = ops.row_moments(cond, guided)
            wanted, own = sums.aa, sums.bb
        else:  # rows of a few numbers, for which that pass is not made
            wanted, own = ((half * half).sum(self.dims, keepdim=True) for half in (cond, guided))
        factor = torch.where(own == 0, 1.0, (wanted / own).sqrt())
        return guided.mul_(place_rows("dims", factor, guided.shape))


class CFGPlusPlus(Rule):
    """CFG++ (Chung et al. 2024, 2406.08070): the x0 estimate of u + scale (c - u), but the noise estimate of u. The
    scale is small, in [0, 1]. For samplers that keep nothing of earlier steps: DDPM, DDIM, Euler and its ancestral and
    flow forms, and DPM-Solver++ 1M."""

    renoises_unconditionally = True

    def combine(self, cond: Tensor, uncond: Tensor, step: Step) -> Tensor:
        return self._between(cond, uncond)


def classifier_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor],
    labels: Tensor,  # [B]
    scale: float = 1.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A ``cond_fn`` of ``fastdiff.sample`` from a classifier of noisy data (Dhariwal and Nichol 2021).

    Args:
        classifier: called as ``classifier(x_t, t)`` with x_t of the process and the t that the network is given; it
            returns logits [batch, classes]. It is trained on ``classifier(noised.x_t, noised.model_time)`` with
            cross-entropy, and used as it is: call ``.eval()`` first if it has dropout. In it, a sample must not depend
            on the others of its batch.
        labels: int64 [batch], the class that each sample is to have.
        scale: factor of the gradient; above 1 it favours samples that are typical of their class.

    Returns a function (x_t, t) -> scale times the gradient of log p(label | x_t) by x_t. It works under
    ``torch.inference_mode`` too, and raises ValueError where the logits do not fit the labels. Raises TypeError or
    ValueError for unfit arguments.
    """
    if not callable(classifier):
        raise TypeError(f"classifier must be callable as classifier(x_t, t); got {brief(classifier)}.")
    check_tensor("labels", labels, "labels")
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise TypeError(f"labels must be int64 [batch]; got {brief(labels)}.")
    check_numbers(scale=scale)

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        with modes.gradients():
            x = modes.plain(x.detach()).requires_grad_()
            logits = classifier(x, modes.plain(t))
            if logits.ndim != 2 or len(logits) != len(labels):
                raise ValueError(
                    f"the classifier must return logits [{len(labels)}, classes], one row a label; got "
                    f"{tuple(logits.shape)}."
                )
            wanted = modes.plain(labels).to(logits.device, non_blocking=True)
            loss = F.cross_entropy(logits, wanted, reduction="sum")
            return torch.autograd.grad(loss, x)[0] * -scale

    return gradient


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """over / under, and 0 where both are 0: what is nothing has no direction."""
    return torch.where(under == 0, 0.0, over / under)
