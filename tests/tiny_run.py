"""A run of six steps so small that its truth is a loop in NumPy: a network that sees x alone and says x0, and levels
that samplers visit. For the tests that ask what a name or an option is."""

import numpy as np
import oracle
import oracle_samplers as truth
import torch
from oracle import LD

import fastdiff

ABAR = oracle.alpha_bar(oracle.betas_linear(1000))
STEPS, SHAPE = 6, (2, 3)
TIMES = [999, 832, 666, 499, 332, 166]  # trailing: round(1000 - k 1000 / 6) - 1
START, Z = (np.random.default_rng(seed).standard_normal((STEPS, *SHAPE)) for seed in (1, 2))


def clean(x):
    """The network: an estimate of x0 that depends on x alone."""
    return np.tanh(0.7 * np.asarray(x, dtype=np.float64)) + 0.1


def vp(level):
    return 1 / np.sqrt(1 + LD(level) ** 2), LD(level) / np.sqrt(1 + LD(level) ** 2)


LEVELS = [*((np.sqrt(ABAR[t]), np.sqrt(1 - ABAR[t])) for t in TIMES), (LD(1), LD(0))]
ENDS = [np.sqrt((1 - ABAR[t]) / ABAR[t]) for t in (0, 999)]
KARRAS = [*map(vp, truth.karras(STEPS, *ENDS)), (LD(1), LD(0))]
SIGMAS = [1 - k / STEPS for k in range(STEPS)] + [0.0]


def at(x, i):
    return clean(x)


def scaled(u, level):
    """The estimate in the space of x / alpha."""
    return clean(u * vp(level)[0])


def run(sampler, process, steps=STEPS, **how):
    """The samples, float64, from START[0] with the noise Z[k] at step k, over again after the last."""
    how = {"x": torch.from_numpy(START[0]), "noise": lambda k, shape: torch.from_numpy(Z[k % STEPS])} | how
    return fastdiff.sample(
        lambda x, t: torch.from_numpy(clean(x.numpy())), how["x"].shape, process, sampler, steps, "sample",
        dtype=torch.float64, progress=False, **how,
    )  # fmt: skip
