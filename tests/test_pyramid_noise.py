"""Noise of several resolutions against NumPy: the normals of the generator, interpolated by the formula."""

import numpy as np
import oracle
import pytest
import torch
from oracle import assert_close

import fastdiff

SHAPE = (3, 2, 12, 9)


def lines(small, large):
    """Linear interpolation [large, small]: pixel i of the large lies at (i + 1/2) small / large - 1/2 of the small,
    and at its edge where that is beyond it."""
    matrix = np.zeros((large, small))
    for i in range(large):
        at = min(max((i + 0.5) * small / large - 0.5, 0), small - 1)
        k = min(int(at), max(small - 2, 0))
        matrix[i, k] += 1 - (at - k)
        if small > 1:
            matrix[i, k + 1] += at - k
    return matrix


def expected(shape, discount, levels, ratio, seed, offset=0):
    """z and one more of full size, which together are root 2 times one; then coarser ones, until a side is 1."""
    *_, height, width = shape
    sizes = []
    for i in range(1, levels):
        if 1 in (height, width) or (sizes and 1 in sizes[-1]):
            break
        sizes.append((max(1, int(height / ratio**i)), max(1, int(width / ratio**i))))
    shared = int(np.prod(shape[1:-2]))
    coarse = oracle.normal(seed, (shape[0], shared * sum(h * w for h, w in sizes)), stream=6, sample_offset=offset)
    total = np.sqrt(2) * oracle.normal(seed, shape, sample_offset=offset).astype(np.float64)
    variance, first = 2.0, 0
    for i, (h, w) in enumerate(sizes, 1):
        z = coarse[:, first : first + shared * h * w].reshape(*shape[:-2], h, w).astype(np.float64)
        first += shared * h * w
        rows, columns = lines(h, height), lines(w, width)
        total += discount**i * (rows @ z @ columns.T)
        variance += discount ** (2 * i) * (rows**2).sum(1).mean() * (columns**2).sum(1).mean()
    return total / np.sqrt(variance)


@pytest.mark.parametrize(
    "shape, discount, levels, ratio",
    [
        (SHAPE, 0.4, 6, 3.0),
        (SHAPE, 0.9, 2, 2.0),
        (SHAPE, 1.0, 9, 1.3),
        ((2, 3, 4, 8, 8), 0.7, 4, 2.5),
        ((2, 3, 1, 8), 0.7, 4, 2.5),
        ((2, 3, 7, 7), 0.7, 1, 2.5),
    ],
)
def test_against_the_formula(shape, discount, levels, ratio, backend):
    got = fastdiff.pyramid_noise(torch.zeros(shape), discount, levels, ratio, seed=11)
    assert got.dtype == torch.float32
    # A few sums of float32 numbers of at most 5.
    assert_close(got.double(), expected(shape, discount, levels, ratio, 11), rel=0, absolute=4e-6)


@pytest.mark.parametrize("given", [{}, {"ratio": 1.3}])  # the sixth of six levels is 3x2 with a ratio of 1.3
def test_defaults_are_as_documented(given, backend):
    right = expected(SHAPE, 0.4, 6, given.get("ratio", 3.0), 3)
    assert_close(fastdiff.pyramid_noise(torch.zeros(SHAPE), seed=3, **given).double(), right, rel=0, absolute=4e-6)


def test_no_discount_left_is_plain_noise(backend):
    noise = fastdiff.Objective(fastdiff.VariancePreserving()).noise(torch.zeros(SHAPE), 5, seed=7).noise
    assert torch.equal(fastdiff.pyramid_noise(torch.zeros(SHAPE), 0.0, seed=7), noise)


@pytest.mark.parametrize("discount, ratio", [(0.4, 3.0), (0.9, 2.0)])
def test_its_variance_is_one(discount, ratio):
    """The mean of n^2 over 2000 samples of 2 x 144 pixels. Its standard deviation, of all within one sample alike, is
    at most sqrt(2 / 4000)."""
    noise = fastdiff.pyramid_noise(torch.zeros(2000, 2, 12, 12), discount, ratio=ratio, seed=1)
    assert noise.square().mean().item() == pytest.approx(1, abs=4 * (2 / 4000) ** 0.5)
    assert noise.mean((2, 3)).var().item() > 3 / 144  # more than plain noise has


def test_a_sample_does_not_depend_on_its_batch(backend):
    whole = fastdiff.pyramid_noise(torch.zeros(4, 2, 8, 8), 0.8, seed=5)
    halves = [fastdiff.pyramid_noise(torch.zeros(2, 2, 8, 8), 0.8, seed=5, sample_offset=k) for k in (0, 2)]
    assert torch.equal(whole, torch.cat(halves))


def test_dtypes_and_the_generator():
    for dtype, made in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x0 = torch.zeros(SHAPE, dtype=dtype)
        first, again = (fastdiff.pyramid_noise(x0, generator=torch.Generator().manual_seed(2)) for _ in range(2))
        assert first.dtype == made and torch.equal(first, again)
    assert not torch.equal(fastdiff.pyramid_noise(x0), fastdiff.pyramid_noise(x0))
    assert fastdiff.pyramid_noise(torch.zeros(0, 2, 8, 8)).shape == (0, 2, 8, 8)


def test_it_reaches_the_target():
    x0 = torch.ones(SHAPE)
    noise = fastdiff.pyramid_noise(x0, seed=4)
    noised = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow").noise(x0, torch.full((3,), 0.5), noise)
    torch.testing.assert_close(noised.target, noise - 1)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"discount": -0.1}, ValueError, r"discount must lie in \[0, 1\]; got -0.1"),
        ({"discount": 1.1}, ValueError, r"discount must lie in \[0, 1\]; got 1.1"),
        ({"discount": "0.4"}, TypeError, "discount must be a number"),
        ({"levels": 0}, ValueError, "levels must be a whole number of at least 1; got 0"),
        ({"levels": 2.5}, ValueError, "levels must be a whole number of at least 1; got 2.5"),
        ({"levels": "6"}, TypeError, "levels must be a number; got '6'"),
        ({"ratio": "3"}, TypeError, "ratio must be a number; got '3'"),
        ({"ratio": 1.0}, ValueError, "ratio must be a number above 1; got 1.0"),
        ({"ratio": float("inf")}, ValueError, "ratio must be a number above 1; got inf"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "pass a generator or a seed, not both"),
        ({"x0": torch.zeros(3, 4, 5)}, ValueError, r"pyramid noise is of \[batch, channels, ..., height, width\]"),
        ({"x0": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "x0"),
    ],
)
def test_unfit_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        fastdiff.pyramid_noise(**{"x0": torch.zeros(SHAPE)} | arguments)
