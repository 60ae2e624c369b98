"""Flow-matching libraries: paths of flow_matching, matchers of torchcfm, transports of SiT; none of them is imported::

    noised = flow.noise(path_or_matcher, x_1)             # in place of path.sample(...) or sample_location_and_...
    loss = flow.loss(model(noised.x_t, noised.t), noised)   # in place of the mean of (v - dx_t)^2

    flow.fuse(transport)                                   # SiT: transport.training_losses as before

As in these libraries x_0 is noise, x_1 data, and t runs from 0 (noise) to 1 (data).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import ops, torch_randn
from ..ops.checks import check_alike, check_floating
from .method_swap import fuse_methods, fused_methods, left_alone, unfuse
from .objects import twin

__all__ = ["FlowNoised", "fuse", "fused_methods", "left_alone", "loss", "noise", "unfuse"]


@dataclass(frozen=True)
class _Rows:
    """x_t = a x_1 + b x_0 + s eps and dx_t = a' x_1 + b' x_0 + s' eps: float64 [batch]; None where it is always 0."""

    a: Tensor
    b: Tensor | None
    s: Tensor | None
    da: Tensor
    db: Tensor | None
    ds: Tensor | None


@dataclass(eq=False, repr=False)
class FlowNoised:
    """A batch on its paths.

    Attributes:
        x_t: shape and dtype of x_1; t: [batch], as the network is told it.
        x_1, x_0: data and noise, in the order in which a transport plan paired them.
        eps: what a matcher with sigma adds, or None.
        dx_t: the velocity, made when asked for.
    """

    x_t: Tensor
    t: Tensor
    x_1: Tensor
    x_0: Tensor
    eps: Tensor | None
    rows: _Rows

    def __repr__(self) -> str:
        x = self.x_t
        return f"FlowNoised(x_t {tuple(x.shape)} of {x.dtype} on {x.device}, t {tuple(self.t.shape)})"

    @property
    def dx_t(self) -> Tensor:
        n, q = self._source()
        return ops.noise(self.x_1, self.rows.da, q, n)[0]

    def _source(self) -> tuple[Tensor, Tensor]:
        """(n, q) such that dx_t = a' x_1 + q n."""
        rows = self.rows
        if rows.ds is None:
            return self.x_0, rows.db
        if rows.db is None:
            return self.eps, rows.ds
        return ops.noise(self.x_0, 1.0, rows.ds / rows.db, self.eps)[0], rows.db


def noise(source: Any, x_1: Tensor, x_0: Tensor | None = None, t: Tensor | None = None) -> FlowNoised:
    """Put a batch on its paths.

    Args:
        source: an affine path of flow_matching (its ``scheduler`` gives alpha_t and sigma_t), or a matcher of torchcfm
            (an optimal-transport one pairs x_0 and x_1 first).
        x_1: data [batch, ...], floating point. x_0: noise like it; None draws it.
        t: [batch] in [0, 1]; None draws it uniformly.

    The draws are the library's, in its order. Raises TypeError for a source of another kind or one whose path is not
    affine, ValueError for shapes that do not fit.
    """
    check_floating(x_1=x_1)
    matcher = hasattr(source, "compute_conditional_flow")
    if not matcher and not callable(getattr(source, "scheduler", None)):
        raise TypeError(
            f"{type(source).__name__} is neither an affine path of flow_matching nor a matcher of torchcfm. SiT: "
            f"use flow.fuse(transport)."
        )
    x_0 = torch_randn.randn_like(x_1) if x_0 is None else x_0
    check_alike(x_1=x_1, x_0=x_0)
    if matcher and hasattr(source, "ot_sampler"):
        x_0, x_1 = source.ot_sampler.sample_plan(x_0, x_1)
    if t is None:
        t = torch.rand(len(x_1)).type_as(x_1) if matcher else torch.rand(len(x_1), device=x_1.device)
    if t.shape != x_1.shape[:1]:
        raise ValueError(f"t must be [batch] = {tuple(x_1.shape[:1])}; got {tuple(t.shape)}.")
    eps = torch_randn.randn_like(x_0) if matcher else None
    rows = _matcher_rows(source, t) if matcher else _path_rows(source, t)
    if not matcher:
        _check_affine(source, x_1, x_0)
    if rows.b is None:
        x_t = ops.noise(x_1, rows.a, rows.s, eps)[0]
    else:
        x_t = ops.noise(x_1, rows.a, rows.b, x_0)[0]
        if rows.s is not None:
            x_t = ops.noise(x_t, 1.0, rows.s, eps)[0]
    return FlowNoised(x_t, t, x_1, x_0, eps, rows)


def loss(
    velocity: Tensor,
    noised: FlowNoised,
    mask: Tensor | None = None,
    reduction: str = "mean",
    *,
    weight: Tensor | float = 1.0,
    function: str = "mse",
) -> Tensor:
    """The error of the network's velocity, as ``fastdiff.ops.loss``: float32; [batch] with reduction="none"."""
    n, q = noised._source()
    return ops.loss(
        velocity, noised.x_1, n, p=noised.rows.da, q=q, weight=weight, mask=mask, function=function,
        reduction=reduction, row_shape=tuple(noised.t.shape),
    )  # fmt: skip


_affine: WeakKeyDictionary = WeakKeyDictionary()  # the paths that were found to be


def _check_affine(path: Any, x_1: Tensor, x_0: Tensor) -> None:
    """Raise TypeError unless the path's own points and velocities, of two samples at most, are those of its scheduler.
    Looked at once a path: a path along geodesics has a scheduler too."""
    if path in _affine or not len(x_1) or not callable(getattr(path, "sample", None)):
        return
    with torch.no_grad():
        a, b = (x[:2].detach().double() for x in (x_0, x_1))
        t = torch.tensor([0.3, 0.8], dtype=torch.float64, device=b.device)[: len(b)]
        own, rows = path.sample(x_0=a, x_1=b, t=t), _path_rows(path, t)
        spread = [row.reshape(-1, *(1,) * (b.ndim - 1)) for row in (rows.a, rows.b, rows.da, rows.db)]
        ours = spread[0] * b + spread[1] * a, spread[2] * b + spread[3] * a
        size = max(float(b.abs().max()), float(a.abs().max()))
        same = all(float((x - y).abs().max()) <= 1e-4 * size for x, y in zip((own.x_t, own.dx_t), ours))
    if not same:
        raise TypeError(
            f"the path of {type(path).__name__} is not affine in x_0 and x_1: use its own sample, and "
            f"fastdiff.ops.loss with its dx_t for the error."
        )
    _affine[path] = True


def _path_rows(path: Any, t: Tensor) -> _Rows:
    found = path.scheduler(t.double())
    return _Rows(found.alpha_t, found.sigma_t, None, found.d_alpha_t, found.d_sigma_t, None)


# Which of (b, s, b', s') are 0 at every t.
_zeros: WeakKeyDictionary = WeakKeyDictionary()


def _matcher_rows(matcher: Any, t: Tensor) -> _Rows:
    """Its formulas are linear in x_0, x_1 and x_t, so their values at units are the rows."""
    known = _zeros.get(matcher)
    if known is None or known[0] != matcher.sigma:
        example = torch.tensor([0.21, 0.43, 0.87], dtype=torch.float64)
        known = matcher.sigma, tuple(not bool(row.any()) for row in _linear(matcher, example)[2:])
        _check_linear(matcher, example)
        _zeros[matcher] = known
    a, da, *rest = _linear(matcher, t.double())
    b, s, db, ds = (None if zero else row for row, zero in zip(rest, known[1]))
    return _Rows(a, b, s, da, db, ds)


def _linear(matcher: Any, t: Tensor) -> tuple[Tensor, ...]:
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    a, b = matcher.compute_mu_t(zero, one, t), matcher.compute_mu_t(one, zero, t)
    s = torch.as_tensor(matcher.compute_sigma_t(t), dtype=t.dtype, device=t.device).expand(t.shape)
    u_1 = matcher.compute_conditional_flow(zero, one, t, zero)
    u_0 = matcher.compute_conditional_flow(one, zero, t, zero)
    u_t = matcher.compute_conditional_flow(zero, zero, t, one)
    return a, u_1 + u_t * a, b, s, u_0 + u_t * b, u_t * s


def _check_linear(matcher: Any, t: Tensor) -> None:
    g = torch.Generator().manual_seed(0)
    x_0, x_1, eps = torch.randn(3, len(t), dtype=torch.float64, generator=g)
    a, da, b, s, db, ds = _linear(matcher, t)
    x_t = matcher.compute_mu_t(x_0, x_1, t) + s * eps
    pairs = (
        (x_t, a * x_1 + b * x_0 + s * eps),
        (matcher.compute_conditional_flow(x_0, x_1, t, x_t), da * x_1 + db * x_0 + ds * eps),
    )
    if not all(torch.allclose(theirs, ours, rtol=1e-6, atol=1e-6) for theirs, ours in pairs):
        raise TypeError(f"the path of {type(matcher).__name__} is not linear in x_0, x_1 and noise.")


def fuse(transport: Any) -> Any:
    """Fuse ``training_losses`` of a SiT transport; returns it, ``unfuse`` undoes it.

    Raises TypeError for an object without its interface, or whose losses are others.
    """
    if fused_methods(transport):
        return transport
    if not hasattr(transport, "path_sampler") or not hasattr(transport, "model_type"):
        raise TypeError(f"{type(transport).__name__} is no transport of SiT: for paths and matchers use flow.noise.")
    return fuse_methods(transport, {"training_losses": training_losses}, {"training_losses": _probe}, twin)


def training_losses(self, model: Callable, x1: Tensor, model_kwargs: dict | None = None) -> dict[str, Tensor]:
    """{"pred": the network's output, "loss": [batch]}."""
    t, x0, x1 = self.sample(x1)
    wide = t.double()
    (alpha, d_alpha), (sigma, d_sigma) = (
        tuple(torch.as_tensor(row, dtype=wide.dtype, device=wide.device).expand(wide.shape) for row in pair)
        for pair in (self.path_sampler.compute_alpha_t(wide), self.path_sampler.compute_sigma_t(wide))
    )
    output = model(ops.noise(x1, alpha, sigma, x0)[0], t, **(model_kwargs or {}))
    if self.model_type.name == "VELOCITY":
        return {"pred": output, "loss": ops.loss(output, x1, x0, p=d_alpha, q=d_sigma, reduction="none")}
    weight: Tensor | float = 1.0
    if self.loss_type.name != "NONE":
        drift = self.path_sampler.compute_drift(wide[:, None], wide)[1].flatten()
        weight = (drift / sigma) ** 2 if self.loss_type.name == "VELOCITY" else drift / sigma**2
    if self.model_type.name == "NOISE":
        error = ops.loss(output, None, x0, q=1.0, weight=weight, reduction="none")
    else:  # the score, times sigma, is the negative noise
        error = ops.loss(output, None, x0, q=-1 / sigma, scale=sigma, weight=weight, reduction="none")
    return {"pred": output, "loss": error}


def _probe(transport: Any) -> Any:
    return transport.training_losses(
        lambda x, t, **kwargs: torch.sin(3 * x) + t.reshape(-1, 1, 1, 1), torch.ones(3, 2, 4, 4)
    )
