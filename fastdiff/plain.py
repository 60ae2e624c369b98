"""The plain training step: one time a sample, plain tensors, the mean loss. A backend that has whole calls for it (see
``backends/native/direct.py`` and ``backends/triton/direct.py``) is told here, once an objective, where its rows come
from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .philox import Stream
from .prediction import Prediction
from .process import Process, VariancePreserving
from .timesteps import Uniform

if TYPE_CHECKING:
    from .objective import Objective


_LOSS = ("p", "q", "scale", "loss_weight", "c")
_UNIFORM = Uniform()


class PlainCalls:
    """The calls of one objective on one backend; each gives None where the general way is needed.

    Args:
        objective: rows and switches are read from it now.
        direct: the backend's module of whole calls.
    """

    def __init__(self, objective: Objective, direct: Any):
        self._direct = direct
        process, prediction, loss = objective.process, objective.prediction, objective.loss_function
        self._function = loss.function
        own_space = objective.error_space is prediction
        self._x0, self._n = prediction.uses_x0, prediction.uses_noise
        self._present = prediction.uses_x0 + 2 * prediction.uses_noise + 4 * (not own_space) + 16 * loss.uses_c
        self._noise_rows = self._loss_rows = None
        self._conversions: dict[Prediction, Any] = {}
        if process.discrete:
            table = objective.coefficients()
            self._noise_rows = direct.gathered(torch.stack([table["alpha"], table["sigma"]], -1))
            unused = torch.zeros_like(table["p"])
            self._loss_rows = direct.gathered(torch.stack([table.get(name, unused) for name in _LOSS], -1))
        else:
            fractions = process.linear_fractional()
            if fractions is not None:
                self._noise_rows = direct.rational(fractions, process.t_min, process.t_max)
            known = objective.coefficients()
            if own_space and not loss.uses_c and {"p", "q", "loss_weight"} <= known.keys():
                row = [known.get(name, 0.0) for name in _LOSS]
                self._loss_rows = direct.constant(row, process.t_min, process.t_max)
        # Uniform times are floor(steps u) of a uniform u; 0: u itself; None: something else.
        self._steps: int | None = None
        if process.discrete and type(process).time is VariancePreserving.time:
            self._steps = process.steps
        elif type(process).time is Process.time:
            self._steps = 0

    def times(
        self, timesteps: Any, seed: int | Tensor, samples: int, sample_offset: int, device: torch.device
    ) -> Tensor | None:
        """The times of a batch, or None."""
        if self._steps is None or timesteps != _UNIFORM or not _is_plain(seed, device):
            return None
        return self._direct.times(self._steps, seed, samples, Stream.TIMESTEP, sample_offset, device)

    def noise(
        self,
        x0: Tensor,
        t: Tensor,
        n: Tensor | None,
        seed: Any,
        sample_offset: int,
        offset: float,
        keep: bool,
        rng: str = "exact",
    ) -> tuple[Tensor, Tensor | None] | None:
        """(x_t, the noise if it was made and is to be kept), or None. ``n`` None: made from ``seed``, with ``offset``
        as the strength of the offset noise, in the way of ``rng``."""
        if self._noise_rows is None:
            return None
        if n is not None:
            return self._direct.noise(self._noise_rows, x0, t, n, False)
        if not _is_plain(seed, x0.device) or (offset and x0.ndim < 3):
            return None
        return self._direct.noise(self._noise_rows, x0, t, (seed, Stream.NOISE, sample_offset, offset), keep, rng)

    def convert(self, kind: Prediction, rows: Callable[[], Tensor], m: Tensor, x_t: Tensor, t: Tensor) -> Tensor | None:
        """An output as another kind, or None. ``rows``: () -> (k_x, k_m), float64 [steps, 2]."""
        source = self._conversions.get(kind)
        if source is None:
            source = self._conversions[kind] = self._direct.gathered(rows())
        return self._direct.convert(source, m, x_t, t)

    def loss(
        self, prediction: Tensor, x0: Tensor, n: Any, t: Tensor, rows: Callable[[], tuple[Tensor | None, ...]]
    ) -> Tensor | None:
        """The mean loss, or None. ``rows``: see ``backends/native/direct.py``."""
        if self._loss_rows is None:
            return None
        x0, n = (x0 if self._x0 else None), (n if self._n else None)
        return self._direct.loss(self._loss_rows, self._present, self._function, prediction, x0, n, t, rows)


def _is_plain(seed: Any, device: torch.device) -> bool:
    return type(seed) is int or (type(seed) is Tensor and seed.device == device)
