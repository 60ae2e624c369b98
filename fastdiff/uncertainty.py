"""Learned uncertainty: a number u for each row, trained beside the network on exp(-u) L + u, L the weighted error.

The u that minimizes it is ln L, so every noise level counts alike, whatever its error (Kendall et al. 2018; Karras et
al. 2024, EDM2, section 2)::

    uncertainty = fastdiff.uncertainty.Fourier()      # its parameters go to the optimizer, with the network's

    u = uncertainty(noised)
    loss = objective.loss(output, noised, weight=torch.exp(-u)) + u.mean()

The same a row: ``objective.loss(..., weight=torch.exp(-u), reduction="none") + u``. A row that a mask leaves out has no
error, and its u would fall without end: take ``(rows + u)[kept].mean()`` of the others. After training u is not needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .noised import Noised
from .process import Levels, check_by
from .showing import brief
from .tensors import gather_rows
from .weighting import interpolate

__all__ = ["Fourier", "Table"]

# ln(sigma / alpha) / 4 of SNRs from 5e17 down to 2e-18: clean data and pure noise, where it is infinite, stand here.
_REACH = 5.0


class Fourier(nn.Module):
    """u of the noise level: one linear layer on random Fourier features of c = ln(sigma / alpha) / 4, which for EDM is
    its c_noise (Karras et al. 2024, EDM2). It starts at u = 0.

    u = bias + sum over k of weight_k sqrt(2) cos(2 pi (f_k c + phase_k)). EDM2's own layer also keeps the norm of its
    weights; this one does not.

    Args:
        features: how many, at least 1.
        bandwidth: the standard deviation of the frequencies f, > 0.

    Raises ValueError for unfit arguments.
    """

    def __init__(self, features: int = 128, bandwidth: float = 1.0):
        super().__init__()
        _count("features", features, 1)
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth must be a positive number; got {bandwidth!r}.")
        self.register_buffer("frequencies", bandwidth * torch.randn(features))
        self.register_buffer("phases", torch.rand(features))
        self.weight, self.bias = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(()))

    def forward(self, noised: Noised) -> Tensor:
        """u, one a row: the shape of ``noised.t``, float32 (float64 if the parameters are). Also under autocast."""
        levels = _levels(noised)
        c = ((levels.sigma.log() - levels.alpha.log()) / 4).clamp(-_REACH, _REACH).unsqueeze(-1)
        angles = 2 * math.pi * (self.frequencies.to(c.dtype) * c + self.phases.to(c.dtype))
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        features = (math.sqrt(2) * torch.cos(angles)).to(dtype)
        # No matrix product: autocast would round it to 8 bits.
        return (features * self.weight.to(dtype)).sum(-1) + self.bias.to(dtype)

    def extra_repr(self) -> str:
        return f"features={len(self.weight)}"


class Table(nn.Module):
    """u from a table of its own: one entry a timestep of a discrete process, or entries at equally spaced places of a
    continuous one, from 0 to 1, with straight lines between them. It starts at u = 0. The weights are exp(-u).

    Args:
        entries: how many; of a discrete process, its steps. At least 2.
        by: what the place is for continuous processes: "fraction" (the time) or "sigma", in [0, 1].

    Raises ValueError for unfit arguments.
    """

    def __init__(self, entries: int, by: str = "fraction"):
        super().__init__()
        _count("entries", entries, 2)
        check_by(by)
        self.by = by
        self.values = nn.Parameter(torch.zeros(entries))

    def forward(self, noised: Noised) -> Tensor:
        """u, one a row: the shape of ``noised.t``, float32 (float64 if the parameters are).

        Raises ValueError for a discrete process of another number of steps, and for EDM, whose sigma has no end.
        """
        levels, dtype = _levels(noised), torch.promote_types(self.values.dtype, torch.float32)
        process = levels.process
        if not process.discrete:
            if process.t_is_sigma:
                raise ValueError(f"Table needs a time or a sigma in [0, 1]; got {process!r}: use Fourier().")
            return interpolate(self.values, levels.measured(self.by)).to(dtype)
        if process.steps != len(self.values):
            raise ValueError(f"Table has {len(self.values)} entries, but {process!r} has {process.steps} steps.")
        return gather_rows(self.values.to(dtype).unsqueeze(-1), levels.t).squeeze(-1)

    def extra_repr(self) -> str:
        return f"entries={len(self.values)}, by={self.by!r}"


def _levels(noised: Noised) -> Levels:
    if not isinstance(noised, Noised):
        raise TypeError(f"noised must be what objective.noise returned; got {brief(noised)}.")
    noised.check_unchanged()
    return noised.objective.process.levels(noised.t)


def _count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")
