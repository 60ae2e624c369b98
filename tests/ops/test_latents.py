"""ops.posterior and ops.kl_normal: values against NumPy's extended precision, gradients, rows, strides, errors; on
every backend."""

import math

import numpy as np
import oracle
import pytest
import torch
from accuracy import assert_rounded, assert_same, to_numpy
from asked import native, triton
from devices import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import ops
from fastdiff.philox import Stream

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CLAMP = (-30.0, 20.0)
# The interpreter's own: numpy's announcements, and what becomes of infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")


@pytest.fixture(params=["reference", "native", "triton", "compiled"])
def path(request):
    """What runs an operation: (function) -> the function on one path."""
    name = request.param
    if name in ("native", "triton"):
        because = native.unavailable_because if name == "native" else triton.no_device_because()
        if because:
            pytest.skip(because)
        fastdiff.use_backend(name)
    if name == "reference":
        fastdiff.use_backend("reference")
    if name == "compiled":
        torch._dynamo.reset()  # else it counts the compilations of one test with those of another
        return lambda function: torch.compile(function, backend="aot_eager", fullgraph=True)
    return lambda function: function


@pytest.fixture
def posterior(path):
    return path(ops.posterior)


@pytest.fixture
def kl_normal(path):
    return path(ops.kl_normal)


def moments_of(*shape, dtype=torch.float32, grad=False, size=2.0):
    """Moments of latents of ``shape``."""
    return (size * torch.randn(shape[0], 2 * shape[1], *shape[2:])).to(dtype).requires_grad_(grad)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def xi_source(seed=5, offset=0):
    return ops.Philox(seed, offset, Stream.POSTERIOR)


def drawn(source, shape):
    return torch.from_numpy(oracle.normal(source.seed, shape, source.stream, source.sample_offset))


SHAPES = [(3, 4, 8, 8), (2, 2, 5, 7), (4, 3), (2, 1, 1300), (2, 3, 2, 4, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_latents(posterior, shape, dtype):
    moments = moments_of(*shape, dtype=dtype)
    shift, scale = torch.randn(shape[1]), torch.rand(shape[1]) + 0.5
    found = posterior(moments, xi_source(offset=2**33), shift=shift, scale=scale)
    assert found.x_t is None and found.n is None
    assert found.z.shape == shape and found.z.dtype == dtype
    view = (-1, *(1,) * (len(shape) - 2))
    rows = [to_numpy(row.view(view)) for row in (shift, scale)]
    xi = to_numpy(drawn(xi_source(offset=2**33), shape))
    expected = oracle.latents(to_numpy(moments), xi, *rows, CLAMP)
    sizes = oracle.latents(np.abs(to_numpy(moments)), np.abs(xi), -np.abs(rows[0]), rows[1], CLAMP)
    assert_rounded(found.z, expected, sizes, operations=8)  # the exponential is good to 4 of them


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [True, False])
def test_noised_latents(posterior, dtype, kept):
    """x_t is made of z as it is stored, and of the noise that ``noise`` makes: bit for bit."""
    shape = (3, 4, 6, 5)
    moments, n, alpha, sigma = moments_of(*shape, dtype=dtype), ops.Philox(9, 4), torch.rand(3), torch.rand(3)
    how = {"shift": 0.1, "scale": 0.3}
    z, x_t, noise = posterior(moments, xi_source(), n=n, alpha=alpha, sigma=sigma, keep_noise=kept, **how)
    assert_same(z, posterior(moments, xi_source(), **how).z)
    expected, want = ops.noise(z, alpha, sigma, n, keep_noise=kept)
    assert_same(x_t, expected)
    if kept:
        assert_same(noise, want)
        assert_same(noise, drawn(n, shape).to(wide(dtype)))
    else:
        assert noise is n or noise == n


def test_given_noise_is_used_as_it_is(posterior):
    moments, xi, n = moments_of(2, 3, 7), torch.randn(2, 3, 7), torch.randn(2, 3, 7).bfloat16()
    z, x_t, noise = posterior(moments, xi, n=n, alpha=0.6, sigma=0.8)
    assert noise is n or torch.equal(noise, n)
    mean, log_variance = moments.chunk(2, 1)
    torch.testing.assert_close(z, mean + torch.exp(log_variance / 2) * xi, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(x_t, 0.6 * z + 0.8 * n.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mode_is_the_mean(posterior, dtype):
    """The log-variance is not read."""
    moments = moments_of(2, 3, 4, 5, dtype=dtype)
    moments[:, 3:] = math.nan
    mean = moments[:, :3]
    assert_same(posterior(moments, None).z, mean.contiguous())
    z, x_t, _ = posterior(moments, None, shift=0.5, scale=2.0, n=ops.Philox(1), alpha=0.5, sigma=0.5)
    assert_same(z, ((mean.to(wide(dtype)) - 0.5) * 2).to(dtype))
    assert bool(x_t.isfinite().all())


def test_the_log_variance_is_clamped(posterior, kl_normal):
    moments = torch.zeros(1, 2, 6)
    moments[0, 1] = torch.tensor([-math.inf, -100.0, 0.0, 1.0, 20.5, math.inf])
    moments.requires_grad_()
    xi = torch.ones(1, 1, 6)
    z = posterior(moments, xi).z
    logs = [-30.0, -30.0, 0.0, 1.0, 20.0, 20.0]
    assert z[0, 0].tolist() == pytest.approx([math.exp(v / 2) for v in logs], rel=1e-6)
    (gradient,) = torch.autograd.grad(z.sum(), moments)
    slopes = [0.0, 0.0, 0.5, math.exp(0.5) / 2, 0.0, 0.0]
    assert gradient[0, 1].tolist() == pytest.approx(slopes, rel=1e-6)
    rows = kl_normal(moments, reduction="none", row_shape=(1, 1, 6))
    assert rows[0, 0].tolist() == pytest.approx([(math.exp(v) - v - 1) / 2 for v in logs], rel=1e-6, abs=1e-9)
    (gradient,) = torch.autograd.grad(rows.sum(), moments)
    slopes = [0.0, 0.0, 0.0, math.expm1(1) / 2, 0.0, 0.0]
    assert gradient[0, 1].tolist() == pytest.approx(slopes, rel=1e-6)


def test_at_the_bounds_of_the_clamp_there_is_a_gradient(posterior, kl_normal):
    """As autograd of ``torch.clamp`` has it."""
    moments = torch.zeros(1, 2, 2)
    moments[0, 1] = torch.tensor([-1.0, 2.0])
    moments.requires_grad_()
    (gradient,) = torch.autograd.grad(posterior(moments, torch.ones(1, 1, 2), clamp=(-1, 2)).z.sum(), moments)
    assert gradient[0, 1].tolist() == pytest.approx([math.exp(-0.5) / 2, math.e / 2], rel=1e-6)
    (gradient,) = torch.autograd.grad(kl_normal(moments, clamp=(-1, 2), reduction="sum"), moments)
    assert gradient[0, 1].tolist() == pytest.approx([math.expm1(-1) / 2, math.expm1(2) / 2], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_of_the_latents(posterior, dtype):
    moments, n = moments_of(2, 4, 33), torch.randn(2, 4, 33)
    z, x_t, _ = posterior(moments, xi_source(), n=n, alpha=0.6, sigma=0.8, dtype=dtype)
    assert z.dtype == x_t.dtype == dtype
    assert_same(z, posterior(moments.to(wide(dtype)), xi_source()).z.to(dtype))
    assert_same(x_t, ops.noise(z.to(wide(dtype)), 0.6, 0.8, n)[0].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("made", [True, False])
def test_the_gradient_of_latents(posterior, dtype, made):
    """dz/dmean = scale, dz/dv = exp(v/2) xi scale / 2, and alpha times these of x_t: rounded once."""
    shape = (3, 2, 7, 5)
    moments = moments_of(*shape, dtype=dtype, grad=True)
    source = xi_source()
    xi = to_numpy(drawn(source, shape)) if made else np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    given_xi = source if made else torch.from_numpy(xi)
    shift, scale, alpha = torch.randn(2), torch.rand(2) + 0.5, torch.rand(3)
    z, x_t, _ = posterior(moments, given_xi, shift=shift, scale=scale, n=ops.Philox(1), alpha=alpha, sigma=0.5)
    d_z, d_x_t = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    of = to_numpy(scale).reshape(1, 2, 1, 1), to_numpy(alpha).reshape(3, 1, 1, 1)
    _, v = np.split(oracle.ld(to_numpy(moments)), 2, axis=1)
    growth = np.exp(v / 2) * oracle.ld(xi) / 2
    for upstream in ((d_z, d_x_t), (d_z, None), (None, d_x_t)):
        results = [(out, d) for out, d in zip((z, x_t), upstream) if d is not None]
        outs, ups = zip(*results)
        (gradient,) = torch.autograd.grad(outs, moments, ups, retain_graph=True)
        assert gradient.dtype == dtype
        parts = [0 if d is None else to_numpy(d) for d in upstream]
        slope = of[0] * (parts[0] + of[1] * parts[1])
        size = of[0] * (np.abs(parts[0]) + of[1] * np.abs(parts[1]))
        truth = np.concatenate([slope, growth * slope], 1)
        sizes = np.concatenate([size, np.abs(growth) * size], 1)
        # Autograd of the reference takes the gradient of x_t to z in 16 bits, and adds it there.
        twice = upstream[1] is not None and fastdiff.backends.choose("cpu") == "reference" and dtype.itemsize == 2
        if twice:
            assert np.all(np.abs(to_numpy(gradient) - truth) <= 4 * torch.finfo(dtype).eps * sizes + 1e-6)
        else:
            assert_rounded(gradient, truth, sizes, operations=12)


def leaf_pair(*shape):
    return moments_of(*shape, dtype=torch.float64, grad=True), torch.randn(shape, dtype=torch.float64)


def test_gradcheck(posterior, kl_normal):
    moments, xi = leaf_pair(3, 2, 4)
    n, shift, scale, alpha = torch.randn_like(xi), torch.randn(2), torch.rand(2) + 0.5, torch.rand(3)
    for clamp in (CLAMP, (-1.0, 1.0)):

        def both(moments, clamp=clamp):
            given = {"shift": shift, "scale": scale, "n": n, "alpha": alpha, "sigma": 0.3, "clamp": clamp}
            return posterior(moments, xi, **given)[:2]

        assert torch.autograd.gradcheck(both, moments)
        for reduction in ("mean", "sum", "none"):
            how = {"clamp": clamp, "reduction": reduction, "weight": torch.rand(3) + 0.1}
            assert torch.autograd.gradcheck(lambda m, how=how: kl_normal(m, **how), moments)


def test_second_derivatives():
    moments, xi = leaf_pair(2, 2, 3)
    for name in ("reference", "native"):
        if name != "native" or not native.unavailable_because:
            with fastdiff.use_backend(name):
                for function in (
                    lambda m: ops.posterior(m, xi, scale=0.7, n=xi, alpha=0.6, sigma=0.8)[:2],
                    lambda m: ops.kl_normal(m, reduction="none"),
                    lambda m: ops.kl_normal(m),
                ):
                    assert torch.autograd.gradgradcheck(function, moments)


def test_gradients_of_everything_else(path):
    """Of noise, factors and the weight, through the reference."""
    moments, xi = leaf_pair(3, 2, 4)
    n = torch.randn_like(xi).requires_grad_()
    shift, scale, alpha, sigma = (torch.rand(k, dtype=torch.float64, requires_grad=True) for k in (2, 2, 3, 3))

    def call(moments, xi, n, shift, scale, alpha, sigma):
        return ops.posterior(moments, xi, shift=shift, scale=scale, n=n, alpha=alpha, sigma=sigma)[:2]

    assert torch.autograd.gradcheck(path(call), (moments, xi.requires_grad_(), n, shift, scale, alpha, sigma))
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(path(lambda m, w: ops.kl_normal(m, weight=w)), (moments, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 2), (1, 1, 9000)])
def test_divergence(kl_normal, shape, dtype):
    moments = moments_of(*shape, dtype=dtype)
    terms = oracle.normal_divergence(to_numpy(moments), CLAMP)
    axes = tuple(range(1, len(shape)))
    rows = kl_normal(moments, reduction="none")
    assert rows.shape == shape[:1] and rows.dtype == wide(dtype)
    # Of float64 nothing is spared for the sum.
    operations = 64 if dtype == torch.float64 else 12
    assert_rounded(rows, terms.mean(axes), terms.mean(axes), operations)
    assert_rounded(kl_normal(moments), terms.mean(), terms.mean(), operations)
    assert_rounded(kl_normal(moments, reduction="sum"), terms.sum(), terms.sum(), operations)
    weight = torch.rand(shape[0])
    weighted = to_numpy(weight) * terms.mean(axes)
    assert_rounded(kl_normal(moments, weight=weight), weighted.mean(), weighted.mean(), operations)


@pytest.mark.parametrize("v", [2.0**-20, -(2.0**-10), 0.25, -0.75, 0.999, 1.0, -1.5, 12.0, -25.0])
def test_a_divergence_of_a_variance_near_1_keeps_its_digits(kl_normal, v):
    """exp(v) - 1 - v, about v^2 / 2, would lose all digits of a float32 near 0."""
    moments = torch.zeros(1, 2, 7)
    moments[:, 1] = v
    expected = (math.exp(v) - 1 - v) / 2 if abs(v) > 0.5 else sum(v**k / math.factorial(k) for k in range(2, 20)) / 2
    moments.requires_grad_()
    found = kl_normal(moments)
    assert float(found.detach()) == pytest.approx(expected, rel=4e-7)
    (gradient,) = torch.autograd.grad(found, moments)
    assert gradient[0, 1].tolist() == pytest.approx([math.expm1(v) / 14] * 7, rel=4e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_divergence(kl_normal, dtype):
    """(mean, (exp(v) - 1) / 2), times the weight and the upstream gradient, rounded once."""
    moments = moments_of(3, 2, 70, dtype=dtype, grad=True, size=1.0)
    mean, v = np.split(oracle.ld(to_numpy(moments)), 2, axis=1)
    slopes = np.concatenate([mean, np.expm1(v) / 2], 1)
    weight, upstream = torch.rand(3) + 0.1, torch.rand(3) + 0.1
    of_rows = to_numpy(weight)[:, None, None] * slopes
    loss = kl_normal(moments, weight=weight)
    for scale in (1.0, -3.0, 65536.0, 0.0):
        (gradient,) = torch.autograd.grad(loss * scale, moments, retain_graph=True)
        truth = scale * of_rows / 420
        assert gradient.dtype == dtype
        assert_rounded(gradient, truth, np.abs(truth) + 1e-3 * np.abs(scale) * np.abs(slopes) / 420, operations=12)
    rows = kl_normal(moments, weight=weight, reduction="none")
    (gradient,) = torch.autograd.grad(rows, moments, upstream.to(rows.dtype))
    assert_rounded(gradient, to_numpy(upstream)[:, None, None] * of_rows / 140, np.abs(of_rows) / 100, operations=12)


ROWS = [(2,), (2, 4), (2, 4, 3), (1, 4, 1, 1), (2, 1, 3, 1), (2, 1, 1, 5), (1, 1, 1, 1), (2, 4, 3, 5), ()]


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_a_divergence(kl_normal, rows):
    moments = moments_of(2, 4, 3, 5, grad=True)
    view = rows if len(rows) == 4 else (*rows, *(1,) * (4 - len(rows)))
    terms = oracle.normal_divergence(to_numpy(moments), CLAMP)
    means = terms.mean(tuple(d for d in range(4) if view[d] == 1), keepdims=True)
    found = kl_normal(moments, reduction="none", row_shape=rows)
    assert found.shape == rows
    assert_rounded(found, means.reshape(rows), means.reshape(rows), operations=12)
    weight = torch.rand(view)
    weighted = to_numpy(weight) * means
    assert_rounded(kl_normal(moments, weight=weight, row_shape=view), weighted.mean(), weighted.mean(), operations=12)
    upstream = torch.rand(rows)
    (gradient,) = torch.autograd.grad(found, moments, upstream)
    mean, v = np.split(oracle.ld(to_numpy(moments)), 2, axis=1)
    share = to_numpy(upstream).reshape(view) * (means.size / terms.size)
    truth = np.concatenate([share * mean, share * np.expm1(v) / 2], 1)
    assert_rounded(gradient, truth, np.abs(truth) + 1e-6, operations=12)


@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_those_of_the_weight(rows):
    """One number, in whatever shape, is no rows: then a row is a sample."""
    moments, weight = moments_of(2, 4, 3, 5), torch.rand(rows)
    view = weight.reshape(*rows, *(1,) * (4 - len(rows)))
    terms = to_numpy(view) * oracle.normal_divergence(to_numpy(moments), CLAMP)
    found = ops.kl_normal(moments, weight=weight, reduction="none")
    shared = (2, 1, 1, 1) if weight.numel() == 1 else view.shape
    means = terms.mean(tuple(d for d in range(4) if shared[d] == 1), keepdims=True)
    assert found.shape == ((2,) if weight.numel() == 1 else rows)
    assert_rounded(found, means.reshape(found.shape), means.reshape(found.shape), operations=12)


def test_rows_that_alternate_too_often(kl_normal):
    moments = moments_of(2, 3, 4, 2, 3)
    rows = (2, 1, 4, 1, 3)
    means = oracle.normal_divergence(to_numpy(moments), CLAMP).mean((1, 3), keepdims=True)
    assert_rounded(kl_normal(moments, reduction="none", row_shape=rows), means, means, operations=12)


def test_a_row_of_weight_0_adds_0_whatever_it_holds(kl_normal):
    moments = moments_of(3, 2, 40)
    clean = kl_normal(moments[[0, 2]], reduction="none")
    moments[1, 0], moments[1, 3] = math.nan, math.inf
    moments.requires_grad_()
    rows = kl_normal(moments, weight=torch.tensor([1.0, 0.0, 1.0]), reduction="none")
    assert_same(rows, torch.stack([clean[0], torch.tensor(0.0), clean[1]]))
    (gradient,) = torch.autograd.grad(rows.sum(), moments)
    assert not gradient[1].any() and bool(gradient.isfinite().all()) and bool(gradient[0].any())


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_the_results(posterior, kl_normal, dtype, half):
    moments = moments_of(3, 1, 40, dtype=dtype)
    moments[1, half, 7] = math.nan
    z, x_t, _ = posterior(moments, xi_source(), n=ops.Philox(1), alpha=0.6, sigma=0.8)
    for result in (z, x_t):
        assert result.isnan().nonzero().tolist() == [[1, 0, 7]]
    assert kl_normal(moments, reduction="none").isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_mean_reaches_the_results(posterior, kl_normal, value):
    moments = moments_of(2, 1, 40)
    moments[1, 0, 7] = value
    assert posterior(moments, xi_source()).z[1, 0, 7] == value
    assert kl_normal(moments, reduction="none")[1] == math.inf


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_zero_size(posterior, kl_normal, shape):
    moments = moments_of(*shape, grad=True)
    z, x_t, n = posterior(moments, xi_source(), n=ops.Philox(1), alpha=1.0, sigma=1.0)
    assert z.shape == x_t.shape == n.shape == shape
    (z.sum() + x_t.sum()).backward()
    assert moments.grad.shape == moments.shape
    assert kl_normal(moments).isnan() and kl_normal(moments, reduction="sum") == 0
    assert kl_normal(moments, reduction="none").shape == shape[:1]
    kl_normal(moments, reduction="sum").backward()


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "expanded": lambda x: x[:1].expand(x.shape),
    "with gaps": lambda x: torch.cat([x, x], 3)[..., ::2],
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(posterior, kl_normal, layout):
    moments, xi, n = (
        LAYOUTS[layout](t) for t in (moments_of(3, 2, 4, 6), torch.randn(3, 2, 4, 6), torch.randn(3, 2, 4, 6))
    )
    whole = [t.contiguous() for t in (moments, xi, n)]
    d_z, d_x_t = (LAYOUTS[layout](torch.randn(3, 2, 4, 6)) for _ in range(2))
    results = []
    for m, x, noise in ((moments, xi, n), whole):
        m = m.detach().requires_grad_()
        z, x_t, _ = posterior(m, x, scale=0.5, n=noise, alpha=0.6, sigma=0.8)
        loss = kl_normal(m, reduction="none")
        gradients = [
            torch.autograd.grad(outs, m, ups)[0] for outs, ups in (((z, x_t), (d_z, d_x_t)), (loss, torch.ones(3)))
        ]
        results.append((z.detach(), x_t.detach(), loss.detach(), *gradients))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_same_bits_every_run_and_for_any_thread_count(posterior, kl_normal):
    # The interpreter takes its time, and has no threads.
    shape = (2, 2, 1100) if fastdiff.backends.choose("cpu") == "triton" else (4, 3, 64, 65)
    moments = moments_of(*shape, grad=True)

    def run():
        z, x_t, n = posterior(moments, xi_source(), n=ops.Philox(2), alpha=0.6, sigma=0.8)
        loss = kl_normal(moments)
        return [z, x_t, n, loss, *torch.autograd.grad(z.sum() + x_t.square().sum() + loss, moments)]

    first = run()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(2):
                assert all(map(torch.equal, first, run()))
    finally:
        torch.set_num_threads(1)


def test_noise_depends_on_the_sample_alone(posterior):
    moments = moments_of(4, 2, 33)
    whole = posterior(moments, xi_source(), n=ops.Philox(3), alpha=0.6, sigma=0.8)
    part = posterior(moments[2:], xi_source(offset=2), n=ops.Philox(3, 2), alpha=0.6, sigma=0.8)
    for one, other in zip(whole, part):
        assert torch.equal(one[2:], other)


def test_offset_noise_and_the_fast_transform(posterior):
    moments = moments_of(2, 3, 40)
    for n in (ops.Philox(3, offset=0.1), ops.Philox(3, rng="fast")):
        z, x_t, noise = posterior(moments, xi_source(), n=n, alpha=0.6, sigma=0.8)
        near = 0 if n.rng == "exact" else 2e-3
        expected = ops.noise(z, 0.6, 0.8, ops.Philox(3, offset=n.offset))
        torch.testing.assert_close((x_t, noise), expected, rtol=near, atol=near)


def test_several_gradients_at_once(posterior, kl_normal):
    moments = moments_of(3, 2, 5, grad=True)
    z = posterior(moments, xi_source()).z
    rows = kl_normal(moments, reduction="none")
    for out in (z, rows):
        upstream = torch.randn(4, *out.shape)
        (batched,) = torch.autograd.grad(out, moments, upstream, is_grads_batched=True, retain_graph=True)
        for many, one in zip(batched, upstream):
            torch.testing.assert_close(many, torch.autograd.grad(out, moments, one, retain_graph=True)[0])


def test_under_torch_func():
    """Per-sample gradients (vmap of grad) equal the ordinary ones."""
    moments, xi = (t.detach() for t in leaf_pair(4, 2, 3))

    def loss(moments, xi):
        return ops.posterior(moments, xi, scale=0.5).z.square().sum() + ops.kl_normal(moments, reduction="sum")

    rows = torch.func.vmap(torch.func.grad(loss))(moments.unsqueeze(1), xi.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(rows, torch.func.grad(loss)(moments, xi))
    tangent = torch.randn_like(moments)
    _, found = torch.func.jvp(lambda m: loss(m, xi), (moments,), (tangent,))
    torch.testing.assert_close(found, (rows * tangent).sum())


@pytest.mark.parametrize("name", ["reference", "native"])
def test_writing_into_an_operand_before_the_backward_raises(name):
    if name == "native" and native.unavailable_because:
        pytest.skip(native.unavailable_because)
    with fastdiff.use_backend(name):
        functions = [lambda m: ops.posterior(m, xi_source()).z.sum(), lambda m: 2 * ops.kl_normal(m)]
        for function in functions if name == "native" else functions[:1]:  # the reference keeps copies of the second's
            moments = moments_of(3, 2, 4, grad=True)
            loss = function(moments)
            with torch.no_grad():
                moments.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_under_autocast(posterior, kl_normal):
    """Autocast changes nothing: what is computed is float32 in any case."""
    moments = moments_of(2, 3, 40, dtype=torch.bfloat16)
    expected = posterior(moments, xi_source()).z, kl_normal(moments)
    with torch.autocast("cpu", torch.bfloat16):
        found = posterior(moments, xi_source()).z, kl_normal(moments)
    assert all(map(torch.equal, found, expected))


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_dtypes(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=4)))
    if data.draw(st.booleans()):
        shape = (*shape[:-1], shape[-1] * 97)
    dtype, of_xi = (data.draw(st.sampled_from(DTYPES[:3])) for _ in range(2))
    moments = moments_of(*shape, dtype=dtype)
    xi = (
        torch.randn(shape).to(of_xi) if data.draw(st.booleans()) else xi_source(offset=data.draw(st.integers(0, 2**40)))
    )
    scale = torch.rand(shape[1]) if data.draw(st.booleans()) else 0.5
    backend = data.draw(st.sampled_from(["reference", *([] if native.unavailable_because else ["native"])]))
    leading = data.draw(st.integers(0, len(shape)))
    with fastdiff.use_backend(backend):
        z = ops.posterior(moments, xi, scale=scale).z
        rows = ops.kl_normal(moments, reduction="none", row_shape=shape[:leading])
    drawn_xi = to_numpy(xi if isinstance(xi, torch.Tensor) else drawn(xi, shape))
    by_channel = to_numpy(torch.as_tensor(scale)).reshape(-1, *(1,) * (len(shape) - 2))
    truth = oracle.latents(to_numpy(moments), drawn_xi, 0.0, by_channel, CLAMP)
    sizes = oracle.latents(np.abs(to_numpy(moments)), np.abs(drawn_xi), 0.0, by_channel, CLAMP)
    assert_rounded(z, truth, sizes, operations=8)
    means = oracle.normal_divergence(to_numpy(moments), CLAMP).mean(tuple(range(leading, len(shape))))
    assert_rounded(rows, means, means, operations=12)


ERRORS = {
    "an odd number of channels": ({"moments": torch.zeros(2, 3, 4)}, ValueError, "as many channels of log-variances"),
    "no channels": ({"moments": torch.zeros(2)}, ValueError, "as many channels of log-variances"),
    "integers": ({"moments": torch.zeros(2, 4, 4, dtype=torch.int64)}, TypeError, "moments must be floating point"),
    "noise of another shape": ({"xi": torch.zeros(2, 4, 4)}, ValueError, r"xi has shape \(2, 4, 4\), but latents"),
    "noise without its factors": ({"n": torch.zeros(2, 2, 4)}, ValueError, "n, alpha and sigma go together"),
    "factors without noise": ({"alpha": 1.0, "sigma": 1.0}, ValueError, "n, alpha and sigma go together"),
    "a scale of other channels": ({"scale": torch.ones(3)}, ValueError, r"scale has shape \(3,\), but the latents 2"),
    "a shift of no rows": ({"shift": torch.ones(2, 3)}, ValueError, "shift has shape"),
    "a clamp out of order": ({"clamp": (20.0, -30.0)}, ValueError, "in this order"),
    "a clamp of one number": ({"clamp": 20.0}, ValueError, "clamp must be"),
    "a clamp of texts": ({"clamp": ("a", "b")}, TypeError, "least must be a number"),
    "a clamp of NaN": ({"clamp": (math.nan, 1.0)}, ValueError, "in this order"),
    "a dtype of integers": ({"dtype": torch.int32}, TypeError, "dtype must be"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_latents(case):
    change, error, words = ERRORS[case]
    good = {"moments": torch.zeros(2, 4, 4), "xi": torch.zeros(2, 2, 4)}
    assert not ops.posterior(**good).z.any()
    with pytest.raises(error, match=words):
        ops.posterior(**(good | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moments": torch.zeros(2, 3)}, "as many channels of log-variances"),
        ({"clamp": (1.0, 0.0)}, "in this order"),
        ({"reduction": "max"}, "mean, sum, none"),
        ({"row_shape": (3,)}, "row_shape has shape"),
        ({"weight": torch.ones(3)}, "row_shape has shape|weight has shape"),
    ],
)
def test_errors_of_a_divergence(change, words):
    good = {"moments": torch.zeros(2, 4, 4)}
    assert ops.kl_normal(**good) == 0
    with pytest.raises(ValueError, match=words):
        ops.kl_normal(**(good | change))
