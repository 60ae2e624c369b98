"""The noise: Philox against the published vectors, the normal transform bit for bit against the oracle, its statistics.

Bits are compared as bits: no tolerance. Statistical bounds are z-scores: each statistic is divided by its standard
deviation under the null hypothesis (independent standard normals), and |z| must stay below 4.5 (two-sided 7e-6, so
about 1e-3 over the few hundred statistics here). The seeds are fixed, so a test passes always or never.
"""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import fastdiff
from fastdiff import ops
from fastdiff.backends import registry
from fastdiff.backends.interface import Backend, run
from fastdiff.backends.reference import Reference
from fastdiff.backends.reference.philox import _box_muller, _fma, normal, philox4x32, uniform
from fastdiff.calls import NormalCall, UniformCall

PROFILE = settings(max_examples=40, deadline=None, derandomize=True)
Z = 4.5
CPU = torch.device("cpu")

# Random123-1.14, tests/kat_vectors, "philox4x32 10": counter, key, result
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


def bits(values) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(values, dtype=np.float32)).view(np.uint32)


def assert_same_bits(actual, expected):
    a, e = bits(actual), bits(expected)
    assert a.shape == e.shape
    different = int((a != e).sum())
    assert different == 0, f"{different} of {a.size} differ, first at {np.argwhere(a != e)[0]}"


# ------------------------------------------------------------------------------------------------------------ Philox


@pytest.mark.parametrize("counter, key, result", KNOWN_ANSWERS)
def test_known_answers(counter, key, result):
    """The vectors published with Random123, by the oracle and by fastdiff."""
    assert oracle.philox4x32(np.array(words(counter)), words(key)).tolist() == words(result)
    ours = philox4x32(torch.tensor(words(counter)), tuple(words(key)))
    assert ours.dtype == torch.int64 and ours.tolist() == words(result)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
@PROFILE
def test_philox_any_counter_and_key(values):
    counter, key = values[:4], tuple(values[4:])
    assert philox4x32(torch.tensor(counter), key).tolist() == oracle.philox4x32(np.array(counter), key).tolist()


def test_philox_batched_counters():
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 2**32, size=(7, 11, 4))
    ours = philox4x32(torch.from_numpy(counter), (0x9E3779B9, 0xFFFFFFFF))
    assert ours.shape == (7, 11, 4)
    assert np.array_equal(ours.numpy(), oracle.philox4x32(counter, (0x9E3779B9, 0xFFFFFFFF)))


# -------------------------------------------------------------------------------------------------- normal transform


def test_oracle_fma_is_correctly_rounded():
    """The oracle's vectorised fma equals rational arithmetic, on ties, cancellations and subnormals too."""
    rng = np.random.default_rng(1)
    with np.errstate(under="ignore"):
        a, b, c = (rng.standard_normal((3, 1500)) * 10.0 ** rng.integers(-6, 7, (3, 1500))).astype(np.float32)
        c[:300] = -(a[:300] * b[:300])  # cancels: what is left is the rounding error of the product
        c[300:500] = (a[300:500] * b[300:500]) * np.float32(2.0**24)  # the product is at the last bit of c
        a[500:520] *= np.float32(1e-38)
        a[520:620], b[520:620] = np.float32(1 + 2.0**-12), np.float32(1 + 2.0**-12)
        c[520:620] = np.float32(2.0**-24) * np.arange(100).astype(np.float32)  # near ties
    fused = oracle.fma32(a, b, c)
    exact = np.array([oracle.fma32_exact(*row) for row in zip(a, b, c, strict=True)], dtype=np.float32)
    nonzero = exact != 0  # rational arithmetic has no signed zero
    assert_same_bits(fused[nonzero], exact[nonzero])
    assert (fused[~nonzero] == 0).all()


def test_fma_is_correctly_rounded():
    """fastdiff's fma of float64 parts, where a float64 sum rounded to nearest would round twice: p + c within 2^-53 of
    halfway between two fp32, on either side, for every sign and for totals above and below 1."""
    a, b, c = [], [], []
    for exponent in (-30, -3, -1, 0, 1, 20):
        for sign in (1.0, -1.0):
            scale = sign * 2.0**exponent
            for k in range(1, 60, 2):
                # the product: an odd multiple of 2^-24 in [1.5, 2), halfway between two fp32; c: a part of 2^-52
                for part in (0.25, 0.4999, 0.5, 0.5001, 0.75, 1.0, 1.25, 1.5, 2.0**-40, 0.0):
                    for side in (1.0, -1.0):
                        a.append(scale * (1 + k * 2.0**-23))
                        b.append(1.5)
                        c.append(side * abs(scale) * part * 2.0**-52)
                # c: 1 + k 2^-23; the product: half an ulp of it, less 2^-70
                a.append(scale * (2.0**-12 + 2.0**-35))
                b.append(2.0**-12 - 2.0**-35)
                c.append(scale * (1 + k * 2.0**-23))
    a, b, c = (np.array(v, dtype=np.float32) for v in (a, b, c))
    exact = np.array([oracle.fma32_exact(*row) for row in zip(a, b, c, strict=True)], dtype=np.float32)
    assert_same_bits(oracle.fma32(a, b, c), exact)
    assert_same_bits(_fma(*(torch.from_numpy(v) for v in (a, b, c))), exact)
    twice = (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)
    assert (bits(twice) != bits(exact)).any(), "the cases would not catch double rounding"


def test_oracle_transform_is_box_muller():
    """The fp32 transform against the same map in float64: the notes' mean error of 3e-7 and maximum of 4e-5."""
    w = oracle.philox_words(7, 4, 50_000)
    exact = np.stack(oracle.box_muller_float64(w[..., 0], w[..., 1]))
    error = np.abs(np.stack(oracle.box_muller(w[..., 0], w[..., 1])) - exact)
    assert error.mean() < 4e-7 and error.max() < 4e-5


# one word of each special kind: the smallest u, u of 1 (radius near 0), the split at sqrt(1/2), rounding up to 2^32
RADIUS_WORDS = [0, 1, 2, 3, 0x7F, 0x80000000, 0xB504F300, 0xB504F2FF, 0xB504F333, 0xB504F400, 0xFFFFFF7F, 0xFFFFFF80]
RADIUS_WORDS += [0xFFFFFFFE, 0xFFFFFFFF, 0x5A827980, 0x5A82799A, 0x00FFFFFF, 0x01000001, 0x3FFFFFFF]
ANGLE_WORDS = [0, 1, 2, 3, 0x1FF, 0x200, 0x201, 0x7FFFFFFF, 0x80000000, 0x80000203, 0xFFFFFE00, 0xFFFFFFFF, 0x40000002]


def test_transform_on_special_words():
    """The corners of the transform, through fastdiff's own function for two words."""
    i1, i2 = (np.array(v, dtype=np.int64).ravel() for v in np.meshgrid(RADIUS_WORDS, ANGLE_WORDS))
    expected = oracle.box_muller(i1.astype(np.uint32), i2.astype(np.uint32))
    assert np.isfinite(expected).all() and np.abs(expected).max() < 6.67  # sqrt(-2 ln 2^-32) = 6.66
    for ours, truth in zip(_box_muller(torch.from_numpy(i1), torch.from_numpy(i2)), expected, strict=True):
        assert_same_bits(ours, truth)


@pytest.mark.parametrize(
    "seed, shape, stream, offset",
    [
        (0, (1, 1), 0, 0),
        (0, (3, 4), 0, 0),
        (1, (2, 3), 0, 0),
        (2, (2, 5), 1, 0),
        (3, (2, 7), 0, 5),
        (123456789, (4, 1001), 0, 0),
        (2**32, (2, 64), 2, 1),
        (2**63 - 1, (2, 64), 3, 2**31 - 1),
        (2**62 + 12345, (2, 3, 5, 7), 0, 2**32 - 1),
        (42, (1, 262_147), 0, 2**40 + 3),
        (9, (2000, 3), 0, 0),
        (9, (5,), 0, 0),
    ],
)
def test_normal_is_the_oracle_to_the_bit(seed, shape, stream, offset):
    """Odd sizes, sizes below a group, one element, 64-bit seeds, and sample ids that need the counter's high word."""
    ours = normal(seed, shape, stream=stream, sample_offset=offset)
    assert ours.dtype == torch.float32 and tuple(ours.shape) == shape
    assert_same_bits(ours, oracle.normal(seed, shape, stream, offset))


@given(seed=st.integers(0, 2**63 - 1), offset=st.integers(0, 2**48), stream=st.integers(0, 2**32 - 1))
@PROFILE
def test_normal_any_seed_offset_stream(seed, offset, stream):
    shape = (2, 3, 3)
    ours = normal(seed, shape, stream=stream, sample_offset=offset)
    assert_same_bits(ours, oracle.normal(seed, shape, stream, offset))


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, -1, -(2**63)])
def test_every_64_bit_seed(seed):
    """torch.Generator takes seeds from -2^63 to 2^64 - 1: the same 64 bits, signed or not, are the same key."""
    assert_same_bits(normal(seed, (2, 9)), oracle.normal(seed, (2, 9)))


def test_seed_as_a_tensor():
    """A seed on the device (no host sync) is the same seed."""
    assert_same_bits(normal(torch.tensor(77), (2, 9)), oracle.normal(77, (2, 9)))


@pytest.mark.parametrize("elements", [1, 3, 5, 7, 1001])
def test_batch_split(elements):
    """8 samples = 4 + 4 = 1 x 8: noise belongs to the sample, not to the batch."""
    whole = normal(5, (8, elements))
    halves = [normal(5, (4, elements), sample_offset=o) for o in (0, 4)]
    ones = [normal(5, (1, elements), sample_offset=o) for o in range(8)]
    assert_same_bits(whole, torch.cat(halves))
    assert_same_bits(whole, torch.cat(ones))


def test_a_sample_is_a_prefix_of_a_larger_one():
    """Element i is the same whatever the size of the sample, and whatever its shape."""
    assert_same_bits(normal(5, (2, 1001))[:, :7], normal(5, (2, 7)))
    assert_same_bits(normal(5, (2, 3, 4, 5)).reshape(2, 60), normal(5, (2, 60)))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0, 3)])
def test_empty(shape):
    assert tuple(normal(1, shape).shape) == shape


def test_default_dtype_does_not_matter():
    expected = oracle.normal(3, (2, 37))
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert_same_bits(normal(3, (2, 37)), expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_matter(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_same_bits(normal(3, (2, 70_001)), oracle.normal(3, (2, 70_001)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_the_rounded_float32(dtype):
    """One noise for every dtype: the fp32 value, rounded once."""
    expected = torch.from_numpy(oracle.normal(3, (2, 37))).to(dtype)
    ours = normal(3, (2, 37), dtype=dtype)
    assert ours.dtype == dtype and torch.equal(ours, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_has_the_same_bits():
    assert_same_bits(normal(3, (5, 1001), device="cuda").cpu(), oracle.normal(3, (5, 1001)))


def test_objective_noise_is_this_noise():
    """What a user gets from a seed is stream 0 of the generator; it does not depend on how the batch is cut."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving())
    x = torch.zeros(8, 3, 5)
    whole = objective.noise(x, seed=11)
    first, second = objective.noise(x[:4], seed=11), objective.noise(x[4:], seed=11, sample_offset=4)
    assert_same_bits(whole.noise, oracle.normal(11, (8, 3, 5)))
    assert_same_bits(whole.noise, torch.cat([first.noise, second.noise]))
    assert torch.equal(whole.t, torch.cat([first.t, second.t]))


# -------------------------------------------------------------------------------------------------------- statistics


def moment_scores(z: np.ndarray) -> dict[str, float]:
    """z-scores of the first four moments: Var of z^k is E z^2k - (E z^k)^2, so 1, 2, 15, 96."""
    n = z.size
    z = z.astype(np.float64).ravel()
    return {
        "mean": z.mean() * math.sqrt(n),
        "second": ((z**2).mean() - 1) * math.sqrt(n / 2),
        "third": (z**3).mean() * math.sqrt(n / 15),
        "fourth": ((z**4).mean() - 3) * math.sqrt(n / 96),
    }


def correlation_score(a: np.ndarray, b: np.ndarray) -> float:
    """The mean product of independent standard normals has standard deviation n^-1/2."""
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float((a * b).mean() * math.sqrt(a.size))


def assert_small(scores: dict[str, float]):
    bad = {k: v for k, v in scores.items() if not abs(v) < Z}
    assert not bad, bad


@pytest.fixture(scope="module")
def million() -> np.ndarray:
    """1,000,000 normals: 1000 samples of 1000 elements."""
    return normal(2024, (1000, 1000)).numpy()


def test_moments(million):
    assert_small(moment_scores(million))


@pytest.mark.parametrize("lane", range(4))
def test_moments_of_each_lane(million, lane):
    """Each of a group's four normals comes by its own expression."""
    assert_small(moment_scores(million[:, lane::4]))


def test_kolmogorov_smirnov(million):
    """sqrt(n) D follows Kolmogorov's law; its p-value beyond 1e-5 (which is sqrt(n) D of 2.5)."""
    result = stats.kstest(million.ravel().astype(np.float64), "norm")
    assert result.pvalue > 1e-5, result


@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.0, 3.0, 4.0])
def test_tails(million, threshold):
    """The number beyond a threshold on either side is binomial. (At 4, 32 a side are expected.)"""
    p = float(stats.norm.sf(threshold))
    scale = math.sqrt(million.size * p * (1 - p))
    above, below = int((million > threshold).sum()), int((million < -threshold).sum())
    assert_small({"above": (above - million.size * p) / scale, "below": (below - million.size * p) / scale})


def test_chi_square_of_equal_bins(million):
    """256 bins of equal probability: (chi^2 - 255)/sqrt(2*255) is near normal."""
    counts = np.bincount((stats.norm.cdf(million.ravel().astype(np.float64)) * 256).astype(int), minlength=256)
    expected = million.size / 256
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi2 - 255) / math.sqrt(2 * 255) < Z


def test_squares_of_a_pair_are_exponential(million):
    """Box-Muller's radius: n1^2 + n2^2 of one pair is exponential of mean 2, which a wrong pairing of words breaks."""
    pair = (million.astype(np.float64) ** 2).reshape(-1, 2).sum(1)
    assert stats.kstest(pair, "expon", args=(0, 2)).pvalue > 1e-5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 100, 500])
def test_lag_correlation_within_a_sample(million, lag):
    """Between elements a lag apart, plain and squared (variance of z^2 is 2): lags 1 to 3 are between lanes."""
    a, b = million[:, :-lag], million[:, lag:]
    squares = ((a.astype(np.float64) ** 2 - 1) / math.sqrt(2), (b.astype(np.float64) ** 2 - 1) / math.sqrt(2))
    assert_small({"plain": correlation_score(a, b), "squares": correlation_score(*squares)})


@pytest.mark.parametrize("first, second", [(i, j) for i in range(4) for j in range(i)])
def test_correlation_between_lanes(million, first, second):
    """The four lanes of one group; absolute values too, since a pair shares its radius."""
    a, b = million[:, first::4].astype(np.float64), million[:, second::4].astype(np.float64)
    mean, variance = math.sqrt(2 / math.pi), 1 - 2 / math.pi
    absolute = ((np.abs(a) - mean) / math.sqrt(variance), (np.abs(b) - mean) / math.sqrt(variance))
    assert_small({"plain": correlation_score(a, b), "absolute": correlation_score(*absolute)})


@pytest.mark.parametrize("lag", [1, 2, 7, 256])
def test_correlation_between_samples(million, lag):
    assert_small({"samples": correlation_score(million[:-lag], million[lag:])})


@pytest.mark.parametrize("other", [1, 2, 3, 2**16, 2**31])
def test_correlation_between_streams(other):
    a, b = normal(5, (100, 1000)).numpy(), normal(5, (100, 1000), stream=other).numpy()
    assert_small({"streams": correlation_score(a, b), "mean": moment_scores(b)["mean"]})


@pytest.mark.parametrize("first, second", [(0, 1), (1, 2), (0, 2**32), (0, 2**62), (2**32, 1), (12345, 12346)])
def test_correlation_between_seeds(first, second):
    """Neighbouring seeds, and seeds that differ in the high word only, are as independent as any others."""
    a, b = normal(first, (100, 1000)).numpy(), normal(second, (100, 1000)).numpy()
    assert_small({"seeds": correlation_score(a, b), "mean": moment_scores(b)["mean"]})


def test_no_two_counters_share_a_value():
    """Sample s, group g, stream r, and seed are different words: swapping any two gives different noise."""
    seen = {
        "seed 1": normal(1, (1, 4)),
        "stream 1": normal(0, (1, 4), stream=1),
        "sample 1": normal(0, (1, 4), sample_offset=1),
        "group 1": normal(0, (1, 8))[:, 4:],
        "origin": normal(0, (1, 4)),
        "seed high": normal(2**32, (1, 4)),
        "sample high": normal(0, (1, 4), sample_offset=2**32),
    }
    assert len({tuple(bits(v).ravel().tolist()) for v in seen.values()}) == len(seen)


def test_uniform_moments_and_range():
    """One uniform a sample, in the open interval: mean 1/2 (variance 1/12), second moment 1/3 (variance 4/45)."""
    u = uniform(17, 1_000_000, stream=1)
    assert u.dtype == torch.float64 and u.shape == (1_000_000,)
    u = u.numpy()
    assert 0.0 < u.min() and u.max() < 1.0
    n = u.size
    assert_small(
        {
            "mean": (u.mean() - 0.5) * math.sqrt(12 * n),
            "second": ((u**2).mean() - 1 / 3) * math.sqrt(n * 45 / 4),
            "lag": float(((u[1:] - 0.5) * (u[:-1] - 0.5)).mean() * 12 * math.sqrt(n - 1)),
        }
    )
    assert stats.kstest(u, "uniform").pvalue > 1e-5


def test_uniform_batch_split():
    whole = uniform(17, 8, stream=1)
    assert torch.equal(whole, torch.cat([uniform(17, 3, stream=1), uniform(17, 5, stream=1, sample_offset=3)]))


@pytest.mark.parametrize("count", [None, 1, 2, 5, 131])
@pytest.mark.parametrize("offset", [0, 2**32 - 2, "ids"])
def test_uniforms_of_a_sample(count, offset, backend):
    """As the oracle has them, to the bit; those of fewer are the first of more."""
    ids = [7, 2**40, 7]
    call = UniformCall(11, 3, 5, torch.tensor(ids) if offset == "ids" else offset, CPU, count)
    found = run(registry.get(CPU), call).cpu()
    places = ids if offset == "ids" else [offset + k for k in range(3)]
    expected = np.concatenate([oracle.uniforms(11, 1, count or 1, 5, place) for place in places])
    assert found.dtype == torch.float64 and found.shape == call.shape
    assert np.array_equal(found.numpy().reshape(3, -1), expected)


def test_uniforms_of_a_sample_are_independent():
    """Of 1,000 samples of 1,000: mean, variance, and what neighbours within and between samples have in common."""
    u = (uniform(17, 1000, stream=1, count=1000).numpy() - 0.5) * math.sqrt(12)
    assert_small(
        {
            "mean": u.mean() * 1000,
            "variance": ((u**2).mean() - 1) * 1000 / math.sqrt(4 / 5),
            "within": (u[:, 1:] * u[:, :-1]).mean() * math.sqrt(999_000),
            "of a group": (u[:, ::2] * u[:, 1::2]).mean() * math.sqrt(500_000),
            "between": (u[1:] * u[:-1]).mean() * math.sqrt(999_000),
        }
    )
    assert stats.kstest(u.ravel() / math.sqrt(12) + 0.5, "uniform").pvalue > 1e-5


def test_no_uniforms(backend):
    for samples, count in ((0, None), (0, 4), (3, 0)):
        call = UniformCall(11, samples, 5, 0, CPU, count)
        assert run(registry.get(CPU), call).shape == call.shape


def test_the_fast_way_is_the_exact_one_where_there_is_no_other(backend):
    for shape, offset in (((3, 4, 5), 0.5), ((3, 4), 0.0)):
        fast, exact = (
            ops.materialize(ops.Philox(7, 2, offset=offset, rng=rng), shape, CPU) for rng in ("fast", "exact")
        )
        assert_same_bits(fast, exact)


def test_a_backend_with_a_fast_way_is_asked_for_it(monkeypatch):
    asked = []

    class Quick(Backend):
        def supports(self, call):
            return True, ""

        def run(self, call):
            asked.append(call.rng)
            return torch.zeros(call.shape)

    monkeypatch.setattr(registry, "get", lambda device: Quick())
    for rng in ("fast", "exact"):
        ops.materialize(ops.Philox(7, offset=0.5, rng=rng), (2, 3, 4), CPU)
    assert asked == ["fast", "fast", "exact", "exact"]


FLOW, LATENTS, MOMENTS = fastdiff.RectifiedFlow(), torch.zeros(2, 4, 6, 6), torch.zeros(2, 8, 6, 6)
SHIFTED = fastdiff.Objective(FLOW, "flow", noise_offset=0.5)
ACROSS = fastdiff.Objective(FLOW, "flow", noise_offset=0.5, noise_offset_dim=2)
PERTURBED = fastdiff.Objective(FLOW, "flow", input_perturbation=0.1)
PART = fastdiff.distributed.Part((2, 4, 12, 6), (0, 0, 6, 0))
TOKENS = torch.zeros(1, 7, 4)


@pytest.mark.parametrize(
    ("call", "streams"),
    [
        (lambda **how: SHIFTED.noise(LATENTS, **how), {0, 1}),
        (lambda **how: SHIFTED.noise(LATENTS, part=PART, **how), {0, 1}),
        (lambda **how: ACROSS.noise(LATENTS, **how), {0, 1}),
        (lambda **how: ACROSS.noise(LATENTS, part=PART, **how), {0, 1}),
        (lambda **how: SHIFTED.noise(TOKENS, lengths=[3, 4], **how), {0, 1}),
        (lambda **how: PERTURBED.noise(LATENTS, **how), {0, 2}),
        (lambda **how: PERTURBED.noise(LATENTS, part=PART, **how), {0, 2}),
        (lambda **how: fastdiff.video.RFLoss(noise_offset=0.5).noise(TOKENS, **how), {0, 1}),
        (lambda **how: fastdiff.autoencoder.latents(MOMENTS, **how), {7}),
        (lambda **how: fastdiff.autoencoder.noise_latents(SHIFTED, MOMENTS, **how), {0, 1, 7}),
        (lambda **how: fastdiff.autoencoder.noise_latents(PERTURBED, MOMENTS, **how), {0, 2, 7}),
    ],
)
def test_all_noise_of_a_call_is_made_the_way_that_it_asks_for(call, streams, monkeypatch):
    asked = []

    class Watched(Reference):
        def run(self, call):
            if isinstance(call, NormalCall):
                asked.append((call.stream, call.rng))
            return super().run(call)

    watched = Watched()
    monkeypatch.setattr(registry, "get", lambda device: watched)
    for rng in ("fast", "exact"):
        asked.clear()
        call(seed=1, rng=rng)
        assert set(asked) == {(stream, rng) for stream in streams}
