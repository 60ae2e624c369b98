"""The network's output as another prediction kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops
from . import prediction as kinds
from .calls import Packed
from .modes import wrapping
from .ops.checks import check_alike, compute_dtype, place_rows
from .ops.dispatch import get as backend_of
from .prediction import Prediction
from .tensors import as_tensor, value_checks_are_free


def convert(
    objective: Any, prediction: Tensor, x_t: Tensor, t: Tensor, kind: Prediction, packed: Packed | None = None
) -> Tensor:
    """See ``Objective.convert``. packed: where the rows are packed sequences."""
    done = fast(objective, prediction, x_t, t, kind) if packed is None else None
    return of_rows(objective, prediction, x_t, t, kind, packed=packed) if done is None else done


def fast(objective: Any, prediction: Tensor, x_t: Tensor, t: Tensor, kind: Prediction) -> Tensor | None:
    """``convert`` if a fast call of a backend can do it, else None."""
    calls = backend_of(x_t.device).fast
    program = None if calls is None else objective._coefficients.conversion(kind)
    if program is None or not program.finite or wrapping() is not None:
        return None
    return calls.convert(program, prediction, x_t, t)


def of_rows(
    objective: Any, prediction: Tensor, x_t: Tensor, t: Tensor, kind: Prediction, kept: Tensor | None = None,
    packed: Packed | None = None,
) -> Tensor:  # fmt: skip
    """``convert`` for any rows of a noised batch.

    Args:
        kept: bool [batch]; the coefficients of the other samples are 0, also where they are not finite.
        packed: where the rows are packed sequences.
    """
    shape = x_t.shape if packed is None else packed.rows(x_t.shape)
    program = objective._coefficients.conversion(kind)
    if program is not None:
        placed = place_rows("t", t, shape)
        objective.process.check_t(placed)
        k_x, k_m = backend_of(x_t.device).evaluate(program, placed, compute_dtype(prediction, x_t))
        singular = not program.finite
    else:  # float64, as it may be what a gradient is asked for
        k_x, k_m = (
            place_rows("t", row, shape)
            for row in kinds.conversion(objective.prediction, kind, objective.process.levels(t))
        )
        singular = True
    if kept is not None:
        k_x, k_m = (torch.where(place_rows("kept", kept, x_t.shape), as_tensor(row), 0.0) for row in (k_x, k_m))
    if singular and value_checks_are_free(t):
        finite = (as_tensor(k_x).isfinite() & as_tensor(k_m).isfinite()).reshape(t.shape)
        if not bool(finite.all()):
            bad = t[~finite].flatten()[0]
            raise ValueError(
                f"{objective.prediction.name!r} does not determine {kind.name!r} at t = {bad.item()} of "
                f"{objective.process!r} (SNR {objective.process.levels(bad).snr.item():g}): use "
                f"prediction='v_prediction' or 'sample'."
            )
    if packed is not None:
        check_alike(x_t=x_t, prediction=prediction)
        k_x, k_m = (packed.spread(row, x_t.shape) for row in (k_x, k_m))
    return ops.convert(prediction, x_t, k_x, k_m)
