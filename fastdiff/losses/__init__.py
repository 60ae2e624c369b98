"""Losses: the error functions, and ``Combined``, weighted sums of them; ``fastdiff.losses.vlb``, the variational bound;
``fastdiff.losses.autoencoder``; and ``Sum``, which adds losses of the x0 estimate (``fastdiff.losses.features``,
``fastdiff.losses.adversarial``) to that of an objective."""

import importlib
from typing import Any

from .error_functions import FUNCTIONS, L1, MSE, NEED_C, Combined, Huber, LogCosh, Loss, PseudoHuber, SmoothL1, get

__all__ = [
    "FUNCTIONS",
    "L1",
    "MSE",
    "NEED_C",
    "Combined",
    "Huber",
    "LogCosh",
    "Loss",
    "PseudoHuber",
    "SmoothL1",
    "Sum",
    "Term",
    "adversarial",
    "features",
    "get",
]


def __getattr__(name: str) -> Any:
    """What stands above the objective, which imports this module, is imported when it is first used."""
    if name in ("adversarial", "features"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in ("Sum", "Term"):
        return getattr(importlib.import_module(f"{__name__}.sum"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
