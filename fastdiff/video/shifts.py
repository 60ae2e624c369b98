"""The shifts of flows' noise schedules, by the size of the data: pure functions.

A shift s makes of a time t in [0, 1] the noise level sigma = s t / (1 + (s - 1) t) (Esser et al. 2024, equation 23), as
``RectifiedFlow(shift=s)`` does. An exponential time shift by mu, exp(mu) / (exp(mu) + 1 / t - 1), is the shift exp(mu).

Numbers of tokens may be tensors, such as int64 [batch] of a batch of different lengths; then so is the shift, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..names import find
from ..numeric import check_numbers
from ..process import as_float64
from ..showing import brief
from ..tensors import value_checks_are_free

__all__ = ["exponential", "flux", "hunyuanvideo", "ltx", "resolution", "sd3", "shifted", "sigmas", "stretched", "wan"]

Shift = float | Tensor


def shifted(t: Any, shift: Shift) -> Tensor:
    """shift t / (1 + (shift - 1) t), float64.

    Args:
        t: times in [0, 1]: a tensor, a number or a list.
        shift: a number, or a tensor that broadcasts to t.
    """
    t = as_float64(t)
    return shift * t / (1 + (shift - 1) * t)


def stretched(t: Any, terminal: float) -> Tensor:
    """1 - (1 - t) (1 - terminal) / (1 - t_last), float64: a falling schedule [steps] whose last level becomes
    ``terminal``, as LTX-Video's does before sampling.

    Raises ValueError for a terminal that is not in (0, 1).
    """
    check_numbers(terminal=terminal)
    if not 0 < terminal < 1:
        raise ValueError(f"terminal must lie in (0, 1); got {terminal!r}.")
    t = as_float64(t)
    return 1 - (1 - t) * (1 - terminal) / (1 - t[-1])


def sigmas(steps: int, shift: float = 1.0, terminal: float | None = None) -> Tensor:
    """The noise levels of a sampler's steps, [steps] float64: 1, 1 - 1 / steps, ..., 1 / steps, shifted and, with
    ``terminal``, stretched. ``samplers.FlowEuler(sigmas=shifts.sigmas(40, shifts.wan(720, 1280)))`` takes them.

    Raises ValueError for less than one step, or a shift that is not positive.
    """
    check_numbers(steps=steps, shift=shift)
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps!r}.")
    made = shifted(1 - torch.arange(steps, dtype=torch.float64, device="cpu") / steps, _checked(shift))
    return made if terminal is None else stretched(made, terminal)


def exponential(tokens: Shift, base: tuple[float, float], most: tuple[float, float]) -> Shift:
    """exp(mu), mu linear in the number of tokens through ``base`` and ``most``, each (tokens, mu)."""
    (few, low), (many, high) = base, most
    slope = (high - low) / (many - few)
    if isinstance(tokens, Tensor):
        return torch.exp(slope * as_float64(tokens) + (low - slope * few))
    return math.exp(slope * tokens + (low - slope * few))


def flux(tokens: Shift) -> Shift:
    """Flux: exp(mu), mu = 0.5 at 256 tokens and 1.15 at 4,096."""
    return exponential(tokens, (256, 0.5), (4096, 1.15))


def ltx(tokens: Shift) -> Shift:
    """LTX-Video: exp(mu), mu = 0.95 at 1,024 tokens and 2.05 at 4,096. Its trainer adds mu to a logit-normal's mean,
    which is the same: ``timesteps="logit_normal"`` with this shift."""
    return exponential(tokens, (1024, 0.95), (4096, 2.05))


def resolution(tokens: Shift, base: float = 256) -> Shift:
    """sqrt(tokens / base): as much noise is seen at m pixels as at n without a shift (Esser et al. 2024, section 5.3.2,
    from 256 x 256 pixels, which are 256 tokens)."""
    return (as_float64(tokens) / base).sqrt() if isinstance(tokens, Tensor) else math.sqrt(tokens / base)


def sd3() -> float:
    """Stable Diffusion 3: 3, at every size."""
    return 3.0


def wan(height: float, width: float) -> float:
    """Wan 2.1, by the pixels of a frame: 3 up to 480p (480 x 832), 5 above (720p), as its image-to-video models are
    sampled. Its text-to-video models, and Wan 2.2's 5B and image-to-video ones, have 5 at every size: pass
    ``shift=5.0``."""
    return 3.0 if height * width <= 480 * 832 else 5.0


def hunyuanvideo() -> float:
    """HunyuanVideo: 7, at every size."""
    return 7.0


class Rule(NamedTuple):
    """A shift by the size of a batch.

    Attributes:
        of: ``of(frames, height, width, tokens)`` gives the shift: frames, height and width of the latents (None, for
            data that is tokens), and the number of tokens.
        patch: how many frames, rows and columns of latents are a token.
    """

    of: Callable[..., Shift]
    patch: tuple[int, int, int] = (1, 2, 2)


def _wan_of(frames: Any, height: Any, width: Any, tokens: Any) -> float:
    if height is None:
        raise ValueError("the shift 'wan' goes by height and width, which tokens do not tell: pass shift=3.0 or 5.0.")
    return wan(8 * height, 8 * width)  # its autoencoder makes one latent of 8 x 8 pixels


_NAMES = {
    "sd3": Rule(lambda frames, height, width, tokens: sd3()),
    "resolution": Rule(lambda frames, height, width, tokens: resolution(tokens)),
    "flux": Rule(lambda frames, height, width, tokens: flux(tokens)),
    "ltx": Rule(lambda frames, height, width, tokens: ltx(tokens), (1, 1, 1)),
    "wan": Rule(_wan_of),
    "hunyuanvideo": Rule(lambda frames, height, width, tokens: hunyuanvideo()),
}
_SYNONYMS = {"hunyuan": "hunyuanvideo", "hunyuan_video": "hunyuanvideo", "ltx_video": "ltx", "ltxv": "ltx"}


def rule(shift: Any) -> Rule:
    """The rule that a shift is: a name, a positive number, a tensor of one a sample, or a callable as ``Rule.of``.

    Raises TypeError or ValueError for anything else.
    """
    if isinstance(shift, str):
        return find("shift", shift, _NAMES, _SYNONYMS, "a number, a tensor [batch] or a callable")
    if callable(shift) and not isinstance(shift, type):
        return Rule(shift)
    fixed = _checked(shift)
    return Rule(lambda frames, height, width, tokens: fixed)


def _checked(shift: Any) -> Shift:
    """A shift. Raises TypeError or ValueError for what is none."""
    if isinstance(shift, Tensor) and shift.ndim:
        if shift.ndim != 1 or not shift.is_floating_point():
            raise ValueError(f"a shift must be a number, or floating point [batch]; got {brief(shift)}.")
        if value_checks_are_free(shift) and not bool(((shift > 0) & (shift < math.inf)).all()):
            raise ValueError(f"shifts must be positive numbers; got {brief(shift)}.")
        return shift.double()
    check_numbers(shift=shift)
    if not 0 < float(shift) < math.inf:
        raise ValueError(f"shift must be a positive number; got {shift!r}.")
    return float(shift)


def of_data(made: Rule, tokens: int | Tensor, sizes: Sequence[int | None] = (None, None, None)) -> Shift:
    """The shift of data of so many tokens, and where it is video of these frames, height and width."""
    return _checked(made.of(*sizes, tokens))
