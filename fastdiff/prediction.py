"""Prediction kinds: what a network's output estimates, as rows (p, q) of ``target = p * x0 + q * n``.

Since ``x_t = alpha * x0 + sigma * n``, an output m of a kind and x_t determine x0 and n: two linear equations. Every
conversion between kinds, and every x0 estimate, is their solution; no kind needs formulas of its own for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .names import find
from .process import Levels


@dataclass(frozen=True)
class Prediction:
    """A prediction kind.

    Args:
        name: its name, as the diffusers library writes it where that has it.
        coefficients: levels -> (p, q), float64 tensors of the levels' shape; raises ValueError where the kind means
            nothing for the process.
        uses_x0, uses_noise: whether p (q) can differ from 0. If not, x0 (the noise) is never read.
        model_input: levels -> (scale of x_t, time) as the network is to be given them; None: x_t itself and the
            process's ``model_time``.
        constant: p and q are the same at all levels, so for a process with continuous time they need not be computed
            for each batch.
    """

    name: str
    coefficients: Callable[[Levels], tuple[Tensor, Tensor]]
    uses_x0: bool = True
    uses_noise: bool = True
    model_input: Callable[[Levels], tuple[Tensor, Tensor]] | None = None
    constant: bool = False


def _epsilon(levels: Levels) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(levels.alpha), torch.ones_like(levels.alpha)


def _sample(levels: Levels) -> tuple[Tensor, Tensor]:
    return torch.ones_like(levels.alpha), torch.zeros_like(levels.alpha)


def velocity(levels: Levels) -> tuple[Tensor, Tensor]:
    """(p, q) of cos(phi) n - sin(phi) x0 for any process, with the angle phi whose tangent is sigma / alpha."""
    norm = torch.hypot(levels.alpha, levels.sigma)
    return -levels.sigma / norm, levels.alpha / norm


def _v_prediction(levels: Levels) -> tuple[Tensor, Tensor]:
    # Salimans and Ho 2022, appendix D; the norm is 1 for variance-preserving processes, and makes v the same quantity
    # in the sigma space of k-diffusion and EDM.
    if levels.process.straight:
        raise ValueError(
            "v_prediction is not defined for RectifiedFlow (its path does not preserve the variance). "
            "The velocity n - x0 is prediction='flow'."
        )
    return velocity(levels)


def _flow(levels: Levels) -> tuple[Tensor, Tensor]:
    # The velocity d x / d sigma of the path; Lipman et al. 2022, equation 23 with sigma_min.
    sigma_min = levels.process.sigma_min if levels.process.straight else 0.0
    one = torch.ones_like(levels.alpha)
    return -one, one * (1 - sigma_min) if sigma_min else one


def _reversed_flow(levels: Levels) -> tuple[Tensor, Tensor]:
    p, q = _flow(levels)
    return -p, -q


def _score(levels: Levels) -> tuple[Tensor, Tensor]:
    # Song et al. 2021: the score of N(alpha x0, sigma^2) at x_t is -n / sigma.
    return torch.zeros_like(levels.alpha), -1 / levels.sigma


def _previous_sample(levels: Levels) -> tuple[Tensor, Tensor]:
    if not levels.process.noisiest_last:
        raise ValueError(
            f"previous_sample predicts x_(t-1), which needs a process with discrete steps (VariancePreserving); "
            f"got {levels.process!r}."
        )
    c_x0, c_xt, _ = levels.process.posterior(levels.t)
    return c_x0 + c_xt * levels.alpha, c_xt * levels.sigma


def _sigma_data(levels: Levels) -> float:
    return levels.process.sigma_data


def _edm(levels: Levels) -> tuple[Tensor, Tensor]:
    # Karras et al. 2022, equation 8: F's target is (x0 - c_skip (x0 + sigma n)) / c_out, written out, with
    # sigma / alpha for sigma so that the kind is defined for every process.
    d, alpha, sigma = _sigma_data(levels), levels.alpha, levels.sigma
    norm = torch.hypot(sigma, alpha * d)
    return sigma / (d * norm), -alpha * d / norm


def _edm_input(levels: Levels) -> tuple[Tensor, Tensor]:
    norm = torch.hypot(levels.sigma, levels.alpha * _sigma_data(levels))
    return 1 / norm, (levels.sigma / levels.alpha).log() / 4


def _trigflow(levels: Levels) -> tuple[Tensor, Tensor]:
    # Lu and Song 2024: the velocity dx / dt of TrigFlow, which is -sigma_data times EDM's F; so it too is defined for
    # every process.
    p, q = _edm(levels)
    return -_sigma_data(levels) * p, -_sigma_data(levels) * q


_KINDS = {
    kind.name: kind
    for kind in (
        Prediction("epsilon", _epsilon, uses_x0=False, constant=True),
        Prediction("sample", _sample, uses_noise=False, constant=True),
        Prediction("v_prediction", _v_prediction),
        Prediction("flow", _flow, constant=True),
        Prediction("reversed_flow", _reversed_flow, constant=True),
        Prediction("score", _score, uses_x0=False),
        Prediction("previous_sample", _previous_sample),
        Prediction("edm", _edm, model_input=_edm_input),
        Prediction("trigflow", _trigflow),
    )
}
EPSILON, SAMPLE = _KINDS["epsilon"], _KINDS["sample"]
# Other libraries' names of the same kinds. ("velocity" is n - x0 in some and x0 - n in others.)
_SYNONYMS = {
    "eps": "epsilon",
    "pred_noise": "epsilon",
    "x0": "sample",
    "x_0": "sample",
    "x_start": "sample",
    "pred_x0": "sample",
    "v": "v_prediction",
    "pred_v": "v_prediction",
    "flow_prediction": "flow",
}


def get(prediction: str | Prediction) -> Prediction:
    """The prediction kind of that name; a Prediction passes through.

    Raises ValueError for an unknown name, TypeError for what is neither.
    """
    if isinstance(prediction, Prediction):
        return prediction
    if not isinstance(prediction, str):
        names, given = ", ".join(_KINDS), type(prediction).__name__
        raise TypeError(f"prediction must be a name ({names}) or a fastdiff.Prediction; got {given}.")
    if prediction in _KINDS:
        return _KINDS[prediction]
    if "velocity" in prediction.lower():
        raise ValueError(
            f"prediction {prediction!r} has two meanings: use 'flow' for n - x0, 'reversed_flow' for x0 - n."
        )
    return find("prediction", prediction, _KINDS, _SYNONYMS, "a fastdiff.Prediction")


def conversion(source: str | Prediction, target: str | Prediction, levels: Levels) -> tuple[Tensor, Tensor]:
    """Rows (k_x, k_m) such that ``k_x * x_t + k_m * m`` is of the kind ``target`` where m is of the kind ``source``.

    float64, of the levels' shape. They are infinite or NaN where the source does not determine the target (x0 from
    epsilon at zero SNR).
    """
    source, target = get(source), get(target)
    if source is target:  # also where the two equations are singular
        return torch.zeros_like(levels.alpha), torch.ones_like(levels.alpha)
    p, q = source.coefficients(levels)
    p_target, q_target = target.coefficients(levels)
    determinant = levels.alpha * q - levels.sigma * p
    return (
        (p_target * q - q_target * p) / determinant,
        (levels.alpha * q_target - levels.sigma * p_target) / determinant,
    )


def model_input(prediction: Prediction, levels: Levels) -> tuple[Tensor | None, Tensor]:
    """(scale of x_t or None for 1, time): what the network is called with, in training as in sampling."""
    if prediction.model_input is not None:
        return prediction.model_input(levels)
    return None, levels.process.model_time(levels)
