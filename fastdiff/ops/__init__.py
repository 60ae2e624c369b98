"""The fused operations: checks and dispatch. They know coefficients, and nothing of diffusion.

- ``noise``: x_t = alpha x0 + sigma (n + gamma xi); n is given, or made from a seed.
- ``loss``: target p x0 + q n, scaled error, error function, mask, sums of rows, weight, reduction.
- ``gaussian_kl``: KL divergence or likelihood of Gaussians whose means differ by a scaled error, mean squared error.
- ``posterior``: an autoencoder's moments -> latents -> x_t.
- ``kl_normal``: KL divergence of those moments' Gaussians from the standard normal one.
- ``convert``: k_x x_t + k_m m.
- ``row_moments``: sums of a^2, a b, b^2, (a - b)^2, abs(a - b), abs(b), a and b over each row.
- ``step``: guidance, x0, clamp, threshold, linear update with history, noise, learned variance, known data, next input.
"""

from ..philox import Philox, Window
from .convert import convert
from .gaussian_kl import gaussian_kl
from .kl_normal import kl_normal
from .loss import loss
from .noise import materialize, noise
from .posterior import Posterior, posterior
from .row_moments import RowMoments, row_moments
from .step import COLUMNS, step
from .step_table import PreparedNoise, PreparedSteps
from .trajectory import trajectory

__all__ = [
    "COLUMNS",
    "Philox",
    "Posterior",
    "PreparedNoise",
    "PreparedSteps",
    "RowMoments",
    "Window",
    "convert",
    "gaussian_kl",
    "kl_normal",
    "loss",
    "materialize",
    "noise",
    "posterior",
    "row_moments",
    "step",
    "trajectory",
]
