"""Which seed, samples and slice the noise of a part is made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..calls import UniformCall
from ..ops.dispatch import get
from ..philox import Stream, Window, seeded
from .agreeing import agreed_seed, compare, comparing
from .part import Part


def noise_of(
    objective: Any, part: Part, x0: Tensor, t: Any, seed: int | Tensor | None, generator: torch.Generator | None,
    ids: Any, sample_offset: Any, needed: bool,
) -> tuple[Any, int | Tensor, Window | None, Any]:  # fmt: skip
    """(the seed, which samples these are, the slice of them, t) of a part's noise.

    Args:
        objective: the ``fastdiff.Objective`` that noises x0.
        t: times that were given; where there are none and they depend on the whole batch, they are drawn.
        ids: of the samples of this part.
        sample_offset: the index of the whole's first sample.
        needed: whether a seed is needed.
    """
    if not isinstance(part, Part):
        raise TypeError(f"part must be a fastdiff.distributed.Part; got {type(part).__name__}.")
    part.check("x0", x0.shape)
    drawn = seed is None and needed
    seed, samples = seeded(seed, generator, ids, sample_offset, len(x0), x0.device, False)
    if ids is None:
        samples = part.start[0] if sample_offset is None else samples + part.start[0]
    if comparing(part):
        given = {"seed": seed, "ids": ids is not None, "t": t is not None, "objective": repr(objective)}
        given |= {"dtype": x0.dtype, "timesteps": repr(objective.timesteps), "sample_offset": sample_offset}
        for name in ("noise_offset", "noise_offset_dim", "input_perturbation"):
            given[name] = getattr(objective, name)
        compare("objective.noise", part, tuple(x0.shape), **given)
    if drawn:
        seed = agreed_seed(part, generator, x0.device)
    if t is None and objective.timesteps.of_whole_batch:
        if ids is not None:
            name = type(objective.timesteps).__name__
            raise ValueError(f"{name} draws t for a whole batch: with a part, leave ids out, or draw t yourself.")
        first, batch = part.start[0], part.shape[0]
        call = UniformCall(seed, batch, Stream.TIMESTEP, samples - first, x0.device)
        every = objective._draw(get(x0.device), call)
        t = every[first : first + len(x0)]
    return seed, samples, part.window(x0.shape), t
