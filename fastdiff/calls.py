"""What an operation is asked, one record an operation: ``fastdiff.ops`` checks and makes it, a backend runs it.

Tensors are of one device and shape [batch, ...]. Coefficients are placed: as many dimensions as the data, 1 where
shared, in the compute dtype (float32, or float64 where the data is float64); None where the formula has no such term.
Noise is a tensor, or the ``Philox`` to make it from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .philox import Philox

Noise = Tensor | Philox | None


class NoiseCall(NamedTuple):
    """x_t = alpha x0 + sigma (n + perturbation xi). Gives (x_t in the dtype of x0, n): n as a tensor of the compute
    dtype or, without ``keep_noise``, as it came."""

    x0: Tensor  # [batch, ...]
    n: Tensor | Philox
    alpha: Any
    sigma: Any
    perturbation: float = 0.0
    xi: Noise = None
    keep_noise: bool = True


class LossCall(NamedTuple):
    """weight * mask * rho(scale * (prediction - (p x0 + q n)); c), summed row by row in float64, then reduced.

    ``weight`` is shaped as the rows; reduction "none" gives that shape, "mean" and "sum" a scalar, in the compute
    dtype. What has a mask or a weight of 0 adds 0, whatever it holds."""

    prediction: Tensor  # [batch, ...]
    x0: Tensor | None
    n: Noise
    p: Any
    q: Any
    scale: Any
    weight: Any
    c: Any = None
    mask: Tensor | None = None  # broadcasts to the prediction
    function: str = "mse"
    mask_normalization: str = "none"
    reduction: str = "mean"


class ConvertCall(NamedTuple):
    """k_x x_t + k_m m, in the dtype of m."""

    m: Tensor  # [batch, ...]
    x_t: Tensor
    k_x: Any
    k_m: Any


class StepCall(NamedTuple):
    """One sampler step: see ``fastdiff.ops.step``. Gives (y, x0 estimate, history entry), the last two None where they
    are not wanted."""

    x: Tensor  # [batch, ...]
    m: Tensor
    row: Tensor  # [columns], or one a sample [batch, columns]: fastdiff.codes.COLUMNS
    uncond: Tensor | None = None
    guidance: Tensor | float = 1.0
    clip: float | None = None
    history: tuple[Tensor, ...] = ()
    noise: Noise = None
    log_variance: Tensor | None = None
    dtype: torch.dtype | None = None  # of y and x0; None: that of x
    want_x0: bool = True
    want_entry: bool = True
    threshold: Tensor | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    known_noise: Noise = None
    model_input: Tensor | None = None  # is overwritten with c_in y

    @property
    def data(self) -> tuple[Any, ...]:
        """What is of full size, but for the mask and ``model_input``."""
        more = (self.noise, self.log_variance, self.known, self.known_noise)
        return (self.x, self.m, self.uncond, *self.history, *more)


class RunCall(NamedTuple):
    """A run of sampler steps: see ``fastdiff.ops.trajectory``."""

    x: Tensor  # [batch, ...]
    steps: Any  # fastdiff.ops.PreparedSteps
    guidance: Tensor | float = 1.0
    clip: float | None = None
    mask: Tensor | None = None
    known: Tensor | None = None
    known_noise: Noise = None
    philox: Philox | None = None
    reuse: bool = False


Call = NoiseCall | LossCall | ConvertCall | StepCall


def seed_of(noise: Noise) -> Any:
    """The seed that noise is made from; None for a tensor."""
    return noise.seed if isinstance(noise, Philox) else None
