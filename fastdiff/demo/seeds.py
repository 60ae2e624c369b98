"""Whatever is random in a run is a function of the run's seed, a purpose, and often a step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def derived_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed for one purpose and step: unrelated to those of every other."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A generator, on the CPU, of that derived seed."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, index))


def with_weights_of(seed: int, purpose: str, make: Callable[[], Module]) -> Module:
    """``make()``, whose weights are those of that derived seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, purpose))
        return make()
