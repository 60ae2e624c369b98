"""Noising and the loss as functions, for a training loop that has x0, noise and t of its own."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .losses import Loss
from .objective import Objective
from .ops.checks import check_alike, check_floating, check_order, compute_dtype
from .prediction import Prediction
from .process import Process
from .weighting import WeightingLike


def q_sample(
    x0: Tensor,
    t: Any,
    process: Process,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x_t = alpha x0 + sigma n of ``process`` at ``t``, shaped as x0, in ``dtype`` or that of x0, differentiable.

    Args as in ``Objective.noise``. Ho et al. 2020, equation 4, for any process.
    """
    return (
        _objective(process, "epsilon", None, "mse", None, "x0, t, process, noise")
        .noise(x0, t, noise, generator, dtype=dtype)
        .x_t
    )


def diffusion_loss(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Any,
    process: Process,
    prediction: str | Prediction = "epsilon",
    weighting: WeightingLike = None,
    loss: str | Loss = "mse",
    mask: Tensor | None = None,
    reduction: str = "mean",
    *,
    weight: Tensor | float | None = None,
    mask_normalization: str = "none",
    error_space: str | Prediction | None = None,
) -> Tensor:
    """The loss of a network's output for x_t of (x0, noise, t): what a trainer computes after its network, in one call.

    Args as in ``Objective`` and ``Objective.loss``: ``prediction`` says what ``model_output``, shaped as x0, estimates.
    x_t itself is not needed.
    """
    objective = _objective(process, prediction, weighting, loss, error_space, "model_output, x0, noise, t, process")
    try:
        check_floating(model_output=model_output, x0=x0, noise=noise)
        check_alike(x0=x0, noise=noise)
    except (TypeError, ValueError):
        check_order(x0, t, noise, "model_output, x0, noise, t, process")
        raise
    dtype = compute_dtype(x0, noise, model_output)
    how = mask, reduction, weight, mask_normalization
    result = objective._fast_loss(model_output, x0, noise, t, None, how)
    if result is not None:
        return result
    rows, t = objective._rows_at(t, x0, dtype)
    return objective._loss(model_output, x0, noise, rows, t.shape, *how)


def _objective(process, kind, weights, loss, error_space, order) -> Objective:
    try:
        return _cached_objective(process, kind, weights, loss, error_space)
    except TypeError as error:
        if isinstance(process, Tensor):
            raise TypeError(f"{error} The order of the arguments is {order}.") from error
        if "unhashable" not in str(error):
            raise
        return Objective(process, kind, weights, loss, error_space=error_space)


@lru_cache(maxsize=32)
def _cached_objective(process, kind, weights, loss, error_space) -> Objective:
    return Objective(process, kind, weights, loss, error_space=error_space)
