"""Adversarial losses of the x0 estimate: of the network that makes it, and of the discriminator that judges it.

A discriminator gives logits, high for real data: one a sample, or several (patches), over which the mean is taken. With
f = D(fake), r = D(real) and softplus(x) = ln(1 + e^x), the losses of the generator and of the discriminator are

- "non_saturating" (Goodfellow et al. 2014, section 3): softplus(-f) = -ln sigmoid(f), and softplus(-r) + softplus(f);
- "hinge" (Lim and Ye 2017, arXiv 1705.02894): -f, and max(0, 1 - r) + max(0, 1 + f);
- "minmax" (Goodfellow et al. 2014, equation 1): -softplus(f) = ln(1 - sigmoid(f)), and softplus(-r) + softplus(f).

The gradient of "minmax" vanishes where the discriminator is sure of itself, so "non_saturating" is the default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..numeric import check_numbers
from ..ops.checks import check_floating, check_tensor, compute_dtype, place_rows
from ..showing import brief
from .features import frozen

__all__ = ["KINDS", "Discriminator", "discriminator_loss", "generator_loss", "r1_penalty"]

KINDS = ("non_saturating", "hinge", "minmax")


def generator_loss(fake: Tensor, kind: str = "non_saturating") -> Tensor:
    """The loss of what the discriminator takes for real too rarely, one a sample: [batch].

    Args:
        fake: the discriminator's logits of generated data, [batch, ...], floating point.
        kind: "non_saturating", "hinge" or "minmax".

    Returns float32 (float64 of float64). Raises TypeError or ValueError for unfit inputs.
    """
    _check_kind(kind)
    logits = _logits("fake", fake)
    if kind == "hinge":
        return -logits.mean(1)
    return (F.softplus(-logits) if kind == "non_saturating" else -F.softplus(logits)).mean(1)


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "non_saturating", kept: Tensor | None = None) -> Tensor:
    """The loss of a discriminator, a mean over each of its two batches, which may differ in size: a scalar.

    Args:
        real, fake: its logits of real and of generated data, [batch, ...], floating point.
        kind: "non_saturating", "hinge" or "minmax" (of which the first and the last are alike here).
        kept: bool, [batch] of ``fake``: the samples that count, whatever the others hold. None: all. Where none does,
            that mean is 0.

    Returns float32 (float64 of float64). Raises TypeError or ValueError for unfit inputs.
    """
    _check_kind(kind)
    real, fake = _logits("real", real), _logits("fake", fake)
    _check_kept(kept, len(fake))
    if kept is not None:
        fake = torch.where(kept[:, None], fake, 0.0)
    if kind == "hinge":
        real, fake = F.relu(1 - real), F.relu(1 + fake)
    else:
        real, fake = F.softplus(-real), F.softplus(fake)
    if kept is None:
        return real.mean() + fake.mean()
    fake = torch.where(kept, fake.mean(1), 0.0)
    return real.mean() + fake.sum() / kept.sum().clamp(min=1)


def r1_penalty(discriminator: Callable[..., Tensor], real: Tensor, gamma: float = 10.0, *condition: Any) -> Tensor:
    """gamma / 2 times the mean over the samples of the squared norm of the gradient of D by real data, a scalar
    (Mescheder et al. 2018, arXiv 1801.04406). Differentiable in the discriminator's parameters.

    Args:
        discriminator: called as ``discriminator(real, *condition)``; the logits of a sample may depend on that sample
            alone.
        real: real data, [batch, ...], floating point.

    Raises TypeError or ValueError for unfit inputs, and for a discriminator whose output has no gradient.
    """
    check_floating(real=real)
    check_numbers(gamma=gamma)
    with torch.enable_grad():
        real = real.detach().requires_grad_()
        logits = _logits("the discriminator's output", discriminator(real, *condition), len(real))
        _check_gradient(logits)
        (gradient,) = torch.autograd.grad(logits.mean(1).sum(), real, create_graph=True)
        return 0.5 * gamma * gradient.to(logits.dtype).square().flatten(1).sum(1).mean()


class Discriminator:
    """A discriminator and its training: a loss for the network, and a step of its own after the network's::

        critic = adversarial.Discriminator(d, torch.optim.Adam(d.parameters(), 1e-4), "hinge", r1_gamma=10.0)
        loss = objective.loss(prediction, noised) + 0.1 * critic(objective.predict_x0(prediction, noised)).mean()
        loss.backward()                    # leaves no gradient in d
        optimizer.step()
        values = critic.step(x0)

    In ``fastdiff.losses.Sum`` it is the loss of a term: ``Term(critic, 0.1)``.

    Args:
        network: the discriminator, a module: ``network(data)`` gives logits [batch, ...].
        optimizer: of its parameters.
        kind: "non_saturating", "hinge" or "minmax".
        r1_gamma: the factor of the R1 penalty; 0: none.
        r1_every: the penalty is computed in every so many steps, the first among them, and then counts so many times
            (lazy regularization, Karras et al. 2020).
        conditional: the network is called as ``network(data, condition)``.

    Attributes:
        seen: the estimates that the last call was given, [batch, ...], without their gradient, zeros where they are
            left out; None: there are none, as before the first call, or after ``forget``.
        kept: bool, [batch], which of them a term did not leave out; None: all.
        condition: of them, if the network is conditional, without a gradient.

    Raises TypeError or ValueError for unfit settings, such as a network none of whose parameters requires a gradient.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        kind: str = "non_saturating",
        r1_gamma: float = 0.0,
        r1_every: int = 1,
        conditional: bool = False,
    ):
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, whose parameters are trained; got {brief(network)}.")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {brief(optimizer)}.")
        if not any(part.requires_grad for part in network.parameters()):
            raise ValueError(
                "no parameter of the discriminator requires a gradient, so it cannot learn: call "
                "network.requires_grad_(True), or use the loss of a frozen one, generator_loss(network(x0_hat))."
            )
        _check_kind(kind)
        check_numbers(r1_gamma=r1_gamma)
        if not r1_gamma >= 0:
            raise ValueError(f"r1_gamma must be at least 0; got {r1_gamma!r}.")
        if type(r1_every) is not int or r1_every < 1:
            raise ValueError(f"r1_every must be a whole number of steps, at least 1; got {r1_every!r}.")
        self.network, self.optimizer, self.kind = network, optimizer, kind
        self.r1_gamma, self.r1_every, self.conditional = float(r1_gamma), r1_every, conditional
        self.steps = 0
        self.seen: Tensor | None = None
        self.kept: Tensor | None = None
        self.condition: Any = None

    def __call__(self, estimate: Tensor, condition: Any = None, kept: Tensor | None = None) -> Tensor:
        """The generator's loss of each sample, [batch]. It is differentiable in ``estimate`` [batch, ...]; the
        discriminator's parameters get no gradient. Samples of which ``kept`` (bool [batch]) is False are not looked
        at: they are judged as zeros, get no gradient, and are not learned from in ``step``. A ``Sum`` says which its
        term leaves out.

        Raises TypeError or ValueError for unfit inputs, and for a discriminator through which no gradient flows.
        """
        check_floating(estimate=estimate)
        _check_kept(kept, len(estimate))
        if kept is not None:
            estimate = torch.where(place_rows("kept", kept, estimate.shape), estimate, 0.0)
        inputs = self._inputs(estimate, condition)
        logits = _logits("the discriminator's output", frozen(self.network, *inputs), len(estimate))
        if estimate.requires_grad and torch.is_grad_enabled():
            _check_gradient(logits)
        self.seen, self.kept = estimate.detach(), kept
        self.condition = _detached(condition) if self.conditional else None
        return generator_loss(logits, self.kind)

    def forget(self) -> None:
        """Forgets the estimates that it has seen. A ``Sum`` says so in steps in which its term has weight 0, so that
        no step learns from estimates of an earlier batch."""
        self.seen = self.kept = self.condition = None

    def step(self, real: Tensor, fake: Tensor | None = None, condition: Any = None) -> dict[str, Tensor]:
        """One step of the discriminator's optimizer on real and generated data, [batch, ...] each, which are detached.

        Args:
            fake: None: those that the last call was given, and did not leave out, with their own condition.
            condition: of the real data, and of ``fake`` if that is given, for a conditional discriminator; detached
                too. A tensor, or a list or dict of such, or whatever else the network takes.

        Returns ``{"discriminator": its loss}`` and, in steps with a penalty, ``"r1"``, as tensors without a gradient on
        the device. Raises TypeError or ValueError for unfit inputs, for a discriminator whose output has no gradient,
        and where ``fake`` is None and there is nothing that it has seen.
        """
        condition = _detached(condition)
        kept, of_fake = None, condition
        if fake is None:
            if self.seen is None:
                raise ValueError(
                    "the discriminator has no estimates to learn from: call it first, or pass fake=. In a losses.Sum "
                    "it sees none in steps in which its term has weight 0: take its step only where the sum's values "
                    "have the term's name."
                )
            fake, kept, of_fake = self.seen, self.kept, self.condition
        check_floating(real=real, fake=fake)
        with torch.enable_grad():
            logits = []
            for name, data, given in (("real", real, condition), ("fake", fake, of_fake)):
                output = self.network(*self._inputs(data.detach(), given))
                logits.append(_logits(f"the discriminator's output of {name}", output, len(data)))
                _check_gradient(logits[-1])
            loss = discriminator_loss(*logits, self.kind, kept)
            values = {"discriminator": loss.detach()}
            if self.r1_gamma and self.steps % self.r1_every == 0:
                penalty = r1_penalty(self.network, *self._with_gamma(real, condition))
                values["r1"] = penalty.detach()
                loss = loss + self.r1_every * penalty
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        self.steps += 1
        return values

    def _with_gamma(self, real: Tensor, condition: Any) -> tuple[Any, ...]:
        data, *rest = self._inputs(real, condition)
        return data, self.r1_gamma, *rest

    def _inputs(self, data: Tensor, condition: Any) -> tuple[Any, ...]:
        if not self.conditional:
            return (data,)
        if condition is None:
            raise TypeError("a conditional discriminator needs condition=.")
        return data, condition


def _detached(condition: Any) -> Any:
    """A condition without its gradient: a tensor, or the tensors in a list, tuple or dict."""
    if isinstance(condition, Tensor):
        return condition.detach()
    if type(condition) is dict:
        return {key: _detached(part) for key, part in condition.items()}
    return type(condition)([_detached(part) for part in condition]) if type(condition) in (list, tuple) else condition


def _check_kept(kept: Tensor | None, batch: int) -> None:
    if kept is None:
        return
    check_tensor("kept", kept, "kept")
    if kept.dtype != torch.bool or kept.shape != (batch,):
        raise ValueError(f"kept must be bool [{batch}], one for each sample; got {brief(kept)}.")


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")


def _logits(name: str, logits: Any, batch: int | None = None) -> Tensor:
    """[batch, logits a sample], in the dtype that is computed in."""
    check_tensor(name, logits, "logits")
    check_floating(**{name: logits})
    if not logits.ndim or batch not in (None, len(logits)):
        raise ValueError(f"{name} must be logits [batch, ...], with a batch of {batch}; got {brief(logits)}.")
    return logits.to(compute_dtype(logits)).reshape(len(logits), -1)


def _check_gradient(logits: Tensor) -> None:
    if not logits.requires_grad:
        raise ValueError(
            "the discriminator's output has no gradient: it was detached, or computed under torch.no_grad(), or no "
            "parameter requires one. Return the logits as the network computes them."
        )
