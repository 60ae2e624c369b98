"""Which times a sampler visits: timestep spacings of discrete processes, time grids of continuous ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..process import Process

SPACINGS = ("trailing", "leading", "linspace")


def discrete_timesteps(total: int, steps: int, spacing: str = "trailing", steps_offset: int = 0) -> list[int]:
    """``steps`` descending indices in [0, total - 1]: the spacings of Lin et al. 2024, table 2.

    "trailing" starts at the noisiest index; "leading" ends at 0, plus ``steps_offset``; "linspace" has both ends.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}; got {spacing!r}.")
    if not 1 <= steps <= total:
        raise ValueError(f"steps must lie in [1, {total}] for a process of {total} timesteps; got {steps}.")
    index = torch.arange(steps, dtype=torch.float64, device="cpu")
    if spacing == "trailing":
        # The stride as NumPy's arange has it, and below as its linspace: ties are rounded as in diffusers.
        times = (total - index * (total - (total - total / steps))).round() - 1
    elif spacing == "leading":
        times = ((steps - 1 - index) * (total // steps)).round() + steps_offset
    else:
        times = (index * ((total - 1) / max(1, steps - 1))).round().flip(0)
    return checked_timesteps(times.tolist(), total)


def checked_timesteps(times: Sequence[float], total: int) -> list[int]:
    """``times`` as a list. Raises ValueError unless it falls strictly within [0, total - 1]."""
    indices = [int(t) for t in times]
    fall = all(a > b for a, b in pairwise(indices))
    if not indices or indices[0] >= total or indices[-1] < 0 or not fall or indices != list(times):
        shown = ", ".join(str(t) for t in list(times)[:5])
        raise ValueError(
            f"timesteps must be integers that fall from at most {total - 1} to at least 0; got {shown or 'none'}."
        )
    return indices


def between_timesteps(total: int, steps: int, spacing: str, steps_offset: int) -> list[float]:
    """The same for samplers that are not bound to timesteps: "linspace" is not rounded (as in diffusers' Euler)."""
    if spacing != "linspace" or not 1 < steps <= total:
        return list(discrete_timesteps(total, steps, spacing, steps_offset))
    return torch.linspace(total - 1, 0, steps, dtype=torch.float64, device="cpu").tolist()


def multistep_timesteps(total: int, steps: int, spacing: str, steps_offset: int = 0) -> list[int]:
    """The same as DPM-Solver++ and UniPC have it in diffusers: "leading" and "linspace" are those of one step more,
    without the last, which would be t = 0."""
    if spacing == "trailing":
        return discrete_timesteps(total, steps, spacing)
    if not 1 <= steps < total:
        raise ValueError(f"steps must lie in [1, {total - 1}] with spacing={spacing!r}; got {steps}.")
    times = discrete_timesteps(total, steps + 1, spacing)[:-1]
    return checked_timesteps([t + (steps_offset if spacing == "leading" else 0) for t in times], total)


def times(
    process: Process,
    steps: int | None,
    spacing: str = "trailing",
    steps_offset: int = 0,
    timesteps: Sequence[float] | None = None,
) -> Tensor:
    """The times a sampler visits, noisiest first: int64 for discrete processes, float64 for continuous ones.

    ``timesteps`` are taken as given. ``steps=None``: every timestep of a discrete process, 50 for others. After the
    last of them comes clean data.
    """
    if timesteps is not None:
        if steps is not None and steps != len(timesteps):
            raise ValueError(f"{len(timesteps)} timesteps were given and steps={steps}: leave steps out.")
        if process.noisiest_last:
            return torch.tensor(checked_timesteps(timesteps, process.steps), device="cpu")
        given = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
        process.check_t(given)
        way, falling = ("rise", -given) if process.data_at else ("fall", given)
        if not len(given) or not bool((falling.diff() < 0).all()):
            shown = ", ".join(f"{t:g}" for t in given[:5].tolist())
            raise ValueError(f"timesteps must {way} strictly, the noisiest first; got {shown or 'none'}.")
        return given
    if process.noisiest_last:
        steps = process.steps if steps is None else steps
        return torch.tensor(discrete_timesteps(process.steps, steps, spacing, steps_offset), device="cpu")
    if steps is None:
        steps = process.steps if process.discrete else 50
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}.")
    return process.grid(steps)
