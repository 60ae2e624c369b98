"""How far a result may be from the truth: derived from the dtype, never tuned."""

import numpy as np
import torch


def assert_rounded(actual: torch.Tensor, truth, terms, operations: int = 4) -> None:
    """``actual`` is ``truth`` (float64) up to rounding: half an ulp of its dtype at the store, plus ``operations``
    half-ulps of the compute dtype of ``terms``, the size of what was added up on the way.
    """
    compute = torch.float64 if actual.dtype == torch.float64 else torch.float32
    actual64 = actual.detach().to("cpu", torch.float64).numpy()
    truth, terms = np.asarray(truth, np.float64), np.asarray(terms, np.float64)
    unit = torch.finfo(actual.dtype).eps / 2
    slack = operations * torch.finfo(compute).eps / 2
    # Below the smallest normal number the spacing no longer shrinks with the value.
    bound = unit * np.abs(truth) + (1 + unit) * slack * np.abs(terms) + torch.finfo(actual.dtype).smallest_normal * unit
    off = np.abs(actual64 - truth)
    worst = np.unravel_index((off - bound).argmax(), off.shape) if off.size else ()
    assert actual64.shape == off.shape
    assert (off <= bound).all(), f"{actual64[worst]!r} is {off[worst]:.3g} off, {bound[worst]:.3g} allowed, at {worst}"


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal dtype, shape and elements. NaN equals NaN, and 0 equals -0."""
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def float64(values) -> torch.Tensor:
    return torch.tensor(np.asarray(values, dtype=np.float64))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float64).numpy()
