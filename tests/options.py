"""An option, asked at two values; and a batch of four samples to ask with, in NumPy and as float64 tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracle
import torch
from oracle import LD, assert_close
from tiny_run import ABAR


@dataclass
class Asked:
    """An option: ``call(value)`` is to be ``expected(value)``, within ``absolute``, at both values."""

    values: tuple[Any, Any]
    call: Callable
    expected: Callable
    absolute: float = 1e-11


def generator(seed):
    return torch.Generator().manual_seed(seed)


def check(asked):
    first, second = (np.asarray(asked.expected(value), dtype=np.float64) for value in asked.values)
    assert first.shape != second.shape or np.abs(first - second).max() > 100 * asked.absolute, "one number for both"
    for value in asked.values:
        assert_close(asked.call(value), asked.expected(value), absolute=asked.absolute, label=f"{value!r}")


def seed_of(g):
    """The 64 bits that are drawn from a generator as a seed."""
    return int(torch.randint(-(2**63), 2**63 - 1, (1,), generator=g))


X0, N, M = np.random.default_rng(4).standard_normal((3, 4, 2, 3))
T = [0, 100, 500, 999]
ALPHA, SIGMA = (row[:, None, None] for row in oracle.vp_alpha_sigma(ABAR, T))
MASK = (np.arange(24).reshape(4, 2, 3) % 3 > 0).astype(np.float64)
MASK[1] *= 0.1  # sums to less than 1 in all
WEIGHT = np.array([0.5, 2.0, 0.0, 3.0])
x0, n, m, mask, weight = (torch.from_numpy(a) for a in (X0, N, M, MASK, WEIGHT))
t = torch.tensor(T)


def rows(values):
    return np.broadcast_to(np.asarray(values, dtype=LD), (4,))[:, None, None]
