"""video.frame_noise: the formulas of PYoCo on the generator's normals, covariance and variance."""

import numpy as np
import oracle
import pytest
import torch
from accuracy import to_numpy
from oracle import assert_close

from fastdiff import video

SHAPE = (2, 3, 5, 4, 6)


def expected(shape, kind, alpha, seed, offset=0, dim=2):
    z = np.moveaxis(oracle.normal(seed, shape, sample_offset=offset).astype(np.float64), dim, 0)
    one = tuple(1 if d == dim else size for d, size in enumerate(shape))
    s = np.moveaxis(oracle.normal(seed, one, stream=9, sample_offset=offset).astype(np.float64), dim, 0)[0]
    n = z.copy()
    for f in range(len(z)):
        before = s if kind == "mixed" else n[f - 1]
        if kind == "mixed" or f:
            n[f] = np.sqrt(alpha**2 / (1 + alpha**2)) * before + np.sqrt(1 / (1 + alpha**2)) * z[f]
    return np.moveaxis(n, 0, dim)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["mixed", "progressive"])
def test_against_the_formula(kind, alpha, dim, backend):
    found = video.frame_noise(torch.zeros(SHAPE), kind, alpha, frame_dim=dim, seed=7, sample_offset=5)
    assert found.dtype == torch.float32
    assert_close(found.double(), expected(SHAPE, kind, alpha, 7, 5, dim), rel=0, absolute=4e-6)


def test_defaults():
    assert_close(video.frame_noise(torch.zeros(SHAPE), seed=7).double(), expected(SHAPE, "mixed", 1.0, 7), 0, 4e-6)
    wide = video.frame_noise(torch.zeros(SHAPE, dtype=torch.float64), seed=7)
    assert wide.dtype == torch.float64 and torch.equal(wide.float(), video.frame_noise(torch.zeros(SHAPE), seed=7))


@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("kind", ["mixed", "progressive"])
def test_covariance(kind, alpha):
    """Of 60,000 places: standard errors of at most sqrt(2 / 60,000)."""
    n = to_numpy(video.frame_noise(torch.zeros(1, 60_000, 4, 1, 1), kind, alpha, seed=3))[0, :, :, 0, 0]
    f = np.arange(4)
    apart = np.abs(f[:, None] - f[None])
    share = alpha / np.sqrt(1 + alpha**2)
    right = np.where(apart == 0, 1, share**2) if kind == "mixed" else share**apart
    assert np.abs(n.T @ n / len(n) - right).max() < 4.5 * np.sqrt(2 / len(n))
    assert np.abs(n.mean(0)).max() < 4.5 / np.sqrt(len(n))


def test_a_sample_does_not_depend_on_its_batch():
    whole = video.frame_noise(torch.zeros(SHAPE), "progressive", 2.0, seed=5)
    halves = [
        video.frame_noise(torch.zeros(1, *SHAPE[1:]), "progressive", 2.0, seed=5, sample_offset=k) for k in (0, 1)
    ]
    assert torch.equal(whole, torch.cat(halves))
    ids = torch.tensor([1, 0])
    assert torch.equal(video.frame_noise(torch.zeros(SHAPE), "progressive", 2.0, seed=5, ids=ids), whole[ids])
    first, again = (video.frame_noise(torch.zeros(SHAPE), generator=torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, video.frame_noise(torch.zeros(SHAPE)))


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"kind": "shared"}, ValueError, "unknown kind of frame noise 'shared': use one of mixed, progressive"),
        ({"alpha": -1.0}, ValueError, "alpha must be at least 0, and finite; got -1.0"),
        ({"alpha": "1"}, TypeError, "alpha must be a number"),
        ({"frame_dim": 0}, ValueError, "frame_dim must be 2"),
        ({"x0": torch.zeros(2, 3)}, ValueError, r"frame_dim must be 2.*got 2 for \(2, 3\)"),
        ({"x0": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x0"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "pass a generator or a seed, not both"),
    ],
)
def test_wrong_input(arguments, error, words):
    with pytest.raises(error, match=words):
        video.frame_noise(**{"x0": torch.zeros(SHAPE)} | arguments)
