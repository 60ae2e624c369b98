"""The native backend against the reference: every operation, layout, dtype, instruction set and thread count; and what
its binding refuses. (The tests of the operations themselves run with both backends: see the fixture ``backend``.)"""

import math

import pytest
import torch
from accuracy import assert_same
from asked import native, reference
from devices import examples, pairwise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import ops
from fastdiff.backends.layout import layout_of
from fastdiff.ops.checks import compute_dtype
from fastdiff.tensors import decoded

if not native.available:
    pytest.skip(native.unavailable_because, allow_module_level=True)
from fastdiff import _C

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (shape, rows): leading, frames behind channels, one for all, one an element, alternating, odd sizes, empty ones.
LAYOUTS = [
    ((6, 4, 5, 7), (6, 1, 1, 1)),
    ((2, 3, 4, 5, 6), (2, 1, 4, 1, 1)),
    ((2, 3, 4, 5, 6), (2, 3, 1, 1, 1)),
    ((2, 3, 4, 5, 6), (2, 1, 4, 1, 6)),
    ((2, 3, 4, 5), (1, 3, 1, 1)),
    ((4, 3, 9001), (4, 1, 1)),
    ((4, 3, 9001), (1, 1, 1)),
    ((7, 2), (7, 2)),
    ((5,), (5,)),
    ((70, 3, 32, 32), (70, 1, 1, 1)),
    ((0, 3, 4), (0, 1, 1)),
    ((3, 0), (3, 1)),
]


@pytest.fixture(params=_C.simd_variants())
def simd(request):
    _C.set_simd(request.param)
    yield request.param
    _C.set_simd(_C.simd_variants()[0])


@pytest.fixture(params=[1, 2])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def random(shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def assert_as_good(got, want, exact):
    """Within twice the reference's own largest relative error, plus one ulp. float64 is its own truth: 8 ulps."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    finite = exact.isfinite() & want.isfinite()
    assert torch.equal(got[~finite].nan_to_num(7.5), want[~finite].nan_to_num(7.5))
    if not bool(finite.any()):
        return
    info, exact = torch.finfo(got.dtype), exact[finite].double()
    size = exact.abs().clamp(min=info.tiny)
    error, reference_error = ((t[finite].double() - exact).abs() / size for t in (got, want))
    limit = 2 * reference_error.max() + (8 if got.dtype == torch.float64 else 1) * info.eps
    assert error.max() <= limit, (error.max(), reference_error.max())


@pytest.mark.parametrize(
    "shape", [(1,), (3,), (2, 5), (1, 31), (3, 33), (2, 4, 8, 8), (2, 511), (3, 4097), (0, 4), (2, 0)]
)
@pytest.mark.parametrize("seed", [0, 1, -7, 2**62 + 5])
def test_normals_have_the_same_bits(shape, seed, simd, threads):
    for stream, offset in ((0, 0), (16, 2**33 + 3), (2**32 - 1, 1)):
        assert_same(native.normal(seed, shape, stream, offset), reference.normal(seed, shape, stream, offset))
        if shape[0]:
            u = native.uniform(seed, 50, stream, offset)
            assert_same(u, reference.uniform(seed, 50, stream, offset))


@pytest.mark.parametrize(("shape", "rows"), LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise(shape, rows, dtype, simd):
    x0 = random(shape, dtype)
    sources = [random(shape, torch.float32), random(shape, dtype), random(shape, torch.float64), ops.Philox(99, 3)]
    if len(shape) > 2:
        sources.append(ops.Philox(-99, 2**40, offset=0.1))
    for n in sources:
        wide = compute_dtype(x0, n if isinstance(n, torch.Tensor) else None)
        alpha, sigma = random(rows, wide), random(rows, wide)
        for xi in (None, random(shape, dtype), ops.Philox(99, 3, 2)):
            for keep in (True, False):
                arguments = (x0, n, alpha, sigma, 0.0 if xi is None else 0.1, xi, keep)
                (got, kept), (want, wanted) = native.noise(*arguments), reference.noise(*arguments)
                assert_same(got, want)
                if isinstance(wanted, torch.Tensor):
                    assert_same(kept, wanted)
                else:
                    assert kept is n


@pytest.mark.parametrize(("shape", "rows"), LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_images(shape, rows, dtype, simd):
    images, n = torch.randint(0, 256, shape, dtype=torch.uint8), random(shape, torch.float32)
    alpha, sigma, weight = (random(rows, torch.float32) for _ in range(3))
    for source in (n, ops.Philox(99, 3)):
        arguments = alpha, sigma, 0.0, None, True, dtype
        for got, want in zip(native.noise(images, source, *arguments), reference.noise(images, source, *arguments)):
            assert_same(got, want)
    if layout_of(shape, rows)[1] == rows:
        how = n, alpha, sigma, None, weight, None, None, "mse", "none", "sum"
        got, want = (native.loss(n.to(dtype), x0, *how) for x0 in (images, decoded(images)))
        assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [800_000, 800_003])
def test_results_larger_than_the_cache_are_those_of_their_rows(size, dtype, simd):
    """Large results are written past the caches; those of one row are not."""
    rows = 4 if dtype == torch.float32 else 8
    x0, n, m = (torch.randn(rows, size).to(dtype) for _ in range(3))
    alpha, sigma, weight = (torch.rand(rows, 1) + 0.1 for _ in range(3))
    table, one = torch.rand(len(ops.COLUMNS)), torch.ones(())

    def everything(r, k):
        made = ops.Philox(7, sample_offset=k)
        x_t, _ = native.noise(x0[r], n[r], alpha[r], sigma[r], 0.0, None, False)
        y_t, kept = native.noise(x0[r], made, alpha[r], sigma[r], 0.0, None, True)
        predicted = m[r].clone().requires_grad_()
        loss = native.loss(
            predicted, x0[r], n[r], alpha[r], sigma[r], None, weight[r], None, None, "mse", "none", "sum"
        )
        loss.backward()
        step = native.step(x0[r], m[r], None, 1.0, table, 1.0, (), n[r], None, dtype, (True, True))
        moments = torch.cat([x0[r], m[r]], 1)
        factors = None, weight[r], made, alpha[r], sigma[r]
        of_moments = moments, ops.Philox(7, k, 7), *factors, -30.0, 20.0, dtype, True
        latents = native.posterior(*of_moments)
        gradients = native.posterior_gradient(n[r], m[r], *of_moments)
        gradients = gradients, native.kl_normal_gradient(one, moments, weight[r], -30.0, 20.0, "sum")
        converted = native.convert(m[r], x0[r], alpha[r], sigma[r])
        return [x_t, y_t, kept, predicted.grad, converted, *step, *latents, *gradients]

    pieces = [everything(slice(k, k + 1), k) for k in range(rows)]
    for whole, *parts in zip(everything(slice(None), 0), *pieces):
        assert_same(whole, torch.cat(parts))


def loss_arguments(shape, rows, dtype, mask, made=False, wide=torch.float32):
    if dtype == torch.float64:
        wide = torch.float64
    p, q, scale, weight, c = (random(rows, wide).abs() + 0.1 for _ in range(5))
    n = ops.Philox(5) if made else random(shape, dtype)
    return [random(shape, dtype), random(shape, dtype), n, p, q, scale, weight, c, mask]


@pairwise(layout=LAYOUTS, dtype=DTYPES, function=["mse", "l1", "smooth_l1", "pseudo_huber", "log_cosh"])
def test_loss_and_gradients(layout, dtype, function):
    shape, rows = layout
    masks = [None]
    if math.prod(shape):
        masks += [(torch.rand(shape[-1]) < 0.7), torch.rand((shape[0],) + (1,) * (len(shape) - 1))]
    for mask in masks:
        arguments = loss_arguments(shape, rows, dtype, mask, made=mask is None)
        reductions = [("none", "mean"), ("none", "none"), ("none", "sum"), ("row", "mean"), ("global", "none")]
        for normalization, reduction in reductions if mask is not None else reductions[:3]:

            def run(backend, convert, arguments=arguments, normalization=normalization, reduction=reduction):
                values = [convert(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
                values[0], values[6] = values[0].requires_grad_(), values[6].requires_grad_()
                loss = backend.loss(*values, function, normalization, reduction)
                upstream = torch.linspace(0.5, 2, max(1, loss.numel())).to(loss.dtype)[: loss.numel()].view_as(loss)
                loss.backward(upstream)
                return loss.detach(), values[0].grad, values[6].grad

            exact = run(reference, lambda t: t.detach().double())
            want, got = (run(backend, lambda t: t.detach().clone()) for backend in (reference, native))
            for g, w, e in zip(got, want, exact):
                assert_as_good(g, w, e)


def test_loss_has_the_same_bits_everywhere():
    """For every instruction set, thread count and run: 1 and 2 threads, odd sizes, two frames."""
    arguments = loss_arguments((3, 2, 5, 4099), (3, 1, 5, 1), torch.float32, torch.rand(3, 1, 1, 4099))
    first = {}
    for variant in _C.simd_variants():
        _C.set_simd(variant)
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            for function in ("mse", "pseudo_huber"):
                prediction = arguments[0].clone().requires_grad_()
                loss = native.loss(prediction, *arguments[1:], function, "global", "mean")
                loss.backward()
                expected = first.setdefault(function, (loss.detach(), prediction.grad))
                assert torch.equal(loss, expected[0]) and torch.equal(prediction.grad, expected[1])
    _C.set_simd(_C.simd_variants()[0])
    torch.set_num_threads(1)


def test_backward_twice_scaled_and_by_zero():
    """The gradient written ahead is for an upstream of 1; any other, again, and accumulation must be right too."""
    prediction, n = random((4, 3, 100), torch.float32).requires_grad_(), random((4, 3, 100), torch.float32)
    loss = ops.loss(prediction, None, n, q=1.0)
    exact = 2 * (prediction.detach() - n) / n.numel()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(prediction.grad, exact)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(prediction.grad, 2 * exact)
    for scale in (0.0, -3.0, 2.0**16):
        (g,) = torch.autograd.grad(loss * scale, prediction, retain_graph=True)
        torch.testing.assert_close(g, scale * exact)
    (loss * 0.5).backward()
    torch.testing.assert_close(prediction.grad, 2.5 * exact)


def test_a_changed_input_is_noticed_in_backward():
    prediction, n = random((2, 3), torch.float32).requires_grad_(), random((2, 3), torch.float32)
    loss = ops.loss(prediction, None, n, q=1.0)
    n.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        (2 * loss).backward()


# Of ops.gaussian_kl: whether the variance is learned, half-widths, noise, whether the mean is frozen, whether there are
# weights of the squared error, whether x0 is in the target, reduction.
GAUSSIANS = [
    (True, None, "made", True, True, False, "mean"),
    (True, "rows", "given", False, True, True, "none"),
    (False, 0.3, "made", False, False, False, "sum"),
    (False, None, "given", True, True, True, "mean"),
    (True, "rows", None, False, False, True, "none"),
    (False, "rows", None, False, True, False, "mean"),
    (True, 0.3, "made", True, False, False, "sum"),
]


def gaussian_arguments(shape, rows, dtype, how):
    learned, widths, noise, freeze_mean, simple, reads_x0, reduction = how
    learned, wide, count = learned and len(shape) > 1, compute_dtype(torch.empty(0, dtype=dtype)), math.prod(rows)
    p, q, scale, l_v, weight, simple_weight = (random(rows, wide).abs() * 0.4 + 0.1 for _ in range(6))
    l_0, l_q = (random(rows, wide).clamp(-2, 2) for _ in range(2))
    half_width = None if widths is None else torch.tensor(0.3 if widths == 0.3 else 0.0, dtype=wide).expand(rows)
    if widths == "rows":
        half_width = torch.tensor(([-1.0, 1 / 255, 0.0, 0.5] * count)[:count], dtype=wide).view(rows)
    output = random((shape[0], 2 * shape[1], *shape[2:]) if learned else shape, dtype)
    n = {"made": ops.Philox(5), "given": random(shape, dtype), None: None}[noise]
    p, q, l_v = p if reads_x0 else None, None if n is None else q, l_v if learned else None
    rest = (l_0, l_v, l_q, half_width, weight, simple_weight if simple else None, freeze_mean, reduction)
    return [output, random(shape, dtype), n, p, q, scale, *rest]


def run_gaussian(backend, arguments, convert=lambda t: t.detach().clone()):
    values = [convert(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    values[0].requires_grad_()
    value = backend.gaussian_kl(*values)
    upstream = torch.linspace(0.5, 2, max(1, value.numel())).to(value)[: value.numel()].view_as(value)
    value.backward(upstream)
    return value.detach(), values[0].grad


@pairwise(layout=LAYOUTS, dtype=DTYPES, how=GAUSSIANS)
def test_gaussian_kl_and_gradient(layout, dtype, how, simd):
    arguments = gaussian_arguments(*layout, dtype, how)
    results = run_gaussian(native, arguments), run_gaussian(reference, arguments)
    for got, want, exact in zip(*results, run_gaussian(reference, arguments, lambda t: t.detach().double())):
        assert got.dtype == want.dtype and got.shape == want.shape
        if not math.prod(layout[0]):
            assert_same(got, want)
            continue
        # Terms cancel: the scale of the errors is that of the tensor. float64 is its own truth.
        info = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        bound = 2 * (want.double() - exact).abs().max() + 4 * info.eps * exact.abs().max() * (
            4 if info.bits == 64 else 1
        )
        assert bool(((got.double() - exact).abs() <= bound + torch.finfo(got.dtype).eps * exact.abs()).all())


def test_gaussian_kl_has_the_same_bits_everywhere():
    """For every instruction set, thread count and run: odd sizes, frames, rows of each kind."""
    for shape, rows in (((3, 2, 5, 4099), (3, 1, 5, 1)), ((3, 2, 4099), (1, 1, 1))):
        arguments, expected = gaussian_arguments(shape, rows, torch.float32, GAUSSIANS[1]), None
        for variant in _C.simd_variants():
            _C.set_simd(variant)
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                found = run_gaussian(native, arguments)
                expected = expected or found
                assert all(torch.equal(f, e) for f, e in zip(found, expected))
    _C.set_simd(_C.simd_variants()[0])
    torch.set_num_threads(1)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_any_float_of_a_gaussian_term(wide, simd):
    """Log-variances of all sizes, against the reference in float64: functions of the kernel itself make the terms."""
    logs = torch.linspace(-40, 40, 2001, dtype=wide)
    one, near = torch.ones(1, 1, dtype=wide), 2e-5 if wide == torch.float32 else 1e-13
    for half_width in (None, 0.0, 1 / 255, 0.5):
        for d in (0.0, 1e-3, 0.4, -3.0, 100.0):
            output = torch.stack([torch.full_like(logs, d), logs], 1)
            width = None if half_width is None else one * half_width
            coefficients = [one, one * 0, one, one * 0.5, width, torch.ones(2001, 1, dtype=wide), None]
            arguments = [output, torch.zeros_like(output[:, :1]), None, None, None, *coefficients, False, "none"]
            got, want = run_gaussian(native, arguments), run_gaussian(reference, arguments, lambda t: t.double())
            for g, w in zip(got, want):
                # exp(L) of L up to 40, rounded to 2^-24 of itself; below the normal numbers digits go.
                inside = (w.abs() < 1e37) & (w.abs() > 1e-36)
                torch.testing.assert_close(g[inside].double(), w[inside], rtol=near, atol=near / 10)


def test_a_changed_input_of_gaussian_kl_is_noticed_in_backward():
    arguments = gaussian_arguments((3, 2, 8), (3, 1, 1), torch.float32, GAUSSIANS[3])
    arguments[0].requires_grad_()
    loss = native.gaussian_kl(*arguments)
    arguments[2].add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        (2 * loss).backward()


def test_what_is_not_finite_reaches_a_gaussian_term_and_what_is_left_out_does_not(simd):
    for how in (GAUSSIANS[0], GAUSSIANS[1]):
        arguments = gaussian_arguments((6, 2, 40), (6, 1, 1), torch.float32, (*how[:-1], "none"))
        arguments[0][0, 0, 3], arguments[0][1, 3, 3], arguments[0][2, 1, 5] = math.nan, math.nan, math.inf
        arguments[0][4, :, 7], arguments[0][5, 2, 7] = math.nan, math.nan
        arguments[10][4:], arguments[11][4] = 0, 0  # the second has its squared error still
        results = [run_gaussian(backend, arguments) for backend in (native, reference)]
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
        value, gradient = results[0]
        assert value.flatten()[4] == 0 and not gradient[4].any()
        assert value.flatten()[5] > 0 and bool(gradient[5].isfinite().all())


# Of ops.posterior: xi, n, whether there is a shift, the dtype of the latents (None: of the moments).
POSTERIORS = [
    ("made", "made", True, None),
    ("given", "given", False, torch.bfloat16),
    ("made", None, True, torch.float32),
    (None, "made", False, None),
    ("wide", "given", True, torch.float16),
    (None, None, True, torch.float32),
]
OF_MOMENTS = [case for case in LAYOUTS if len(case[0]) > 1]


def posterior_arguments(shape, rows, dtype, how):
    xi, n, shifted, out = how
    kinds = {"made": ops.Philox(5, 2**33, 7), "given": random(shape, dtype), None: None}
    kinds["wide"] = random(shape, torch.float64)
    wide = compute_dtype(torch.empty(0, dtype=dtype), kinds["wide"] if xi == "wide" else None)
    shift, scale, alpha, sigma = (random(rows, wide) for _ in range(4))
    moments = random((shape[0], 2 * shape[1], *shape[2:]), dtype)
    xi, n = kinds[xi], ops.Philox(6) if n == "made" else kinds[n]
    factors = (None, None) if n is None else (alpha, sigma)
    return [moments, xi, shift if shifted else None, scale, n, *factors, -1.0, 1.5, out or dtype, True]


def run_posterior(backend, arguments, convert=lambda t: t.detach().clone()):
    values = [convert(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    if values[0].dtype == torch.float64:
        values[9] = torch.float64
    values[0].requires_grad_()
    z, x_t, n = backend.posterior(*values)
    outs = [out for out in (z, x_t) if out is not None]
    g = torch.Generator().manual_seed(0)
    upstream = [torch.randn(z.shape, generator=g).to(arguments[9]).to(out.dtype) for out in outs]
    d_z, d_x_t = (*upstream, None)[:2]
    return *outs, n, backend.posterior_gradient(d_z, d_x_t, values[0].detach(), *values[1:])


@pairwise(layout=OF_MOMENTS, dtype=DTYPES, how=POSTERIORS)
def test_posterior_and_gradient(layout, dtype, how, simd):
    arguments = posterior_arguments(*layout, dtype, how)
    results = [run_posterior(backend, arguments) for backend in (native, reference)]
    wide = run_posterior(reference, arguments, lambda t: t.detach().double())
    for got, want, exact in zip(*results, wide):
        if not isinstance(want, torch.Tensor):
            assert got is want
            continue
        assert got.dtype == want.dtype and got.shape == want.shape
        if not math.prod(layout[0]):
            continue
        # Sums cancel: the scale of the errors is that of the tensor.
        info = torch.finfo(torch.float64 if want.dtype == torch.float64 else torch.float32)
        bound = 2 * (want.double() - exact).abs().max() + 8 * info.eps * exact.abs().max()
        assert bool(((got.double() - exact).abs() <= bound + torch.finfo(got.dtype).eps * exact.abs()).all())


@pairwise(layout=OF_MOMENTS, dtype=DTYPES, reduction=["mean", "sum", "none"])
def test_kl_normal_and_gradient(layout, dtype, reduction, simd):
    shape, rows = layout
    if layout_of(shape, rows)[1] != rows:
        rows = (shape[0], *(1,) * (len(shape) - 1))
    moments = random((shape[0], 2 * shape[1], *shape[2:]), dtype)
    weight = random(rows, compute_dtype(moments)).abs()
    weight.view(-1)[: moments.numel()][:1] = 0  # a row of no elements has no mean whatever its weight
    upstream = random(rows if reduction == "none" else (), weight.dtype)

    def both(backend, moments, weight, upstream):
        arguments = moments, weight, -1.0, 1.5, reduction
        return backend.kl_normal(*arguments), backend.kl_normal_gradient(upstream, *arguments)

    wide = both(reference, moments.double(), weight.double(), upstream.double())
    for got, want, exact in zip(*(both(b, moments, weight, upstream) for b in (native, reference)), wide):
        assert got.dtype == want.dtype and got.shape == want.shape
        if not math.prod(shape):
            assert_same(got, want)
            continue
        info = torch.finfo(weight.dtype)
        bound = 2 * (want.double() - exact).abs().max() + 8 * info.eps * exact.abs().max()
        assert bool(((got.double() - exact).abs() <= bound + torch.finfo(got.dtype).eps * exact.abs()).all())


def test_what_is_made_of_moments_has_the_same_bits_everywhere():
    """For every instruction set, thread count and run: odd sizes, frames."""
    shape, rows = (3, 2, 5, 4099), (3, 1, 5, 1)
    arguments = posterior_arguments(shape, rows, torch.float32, POSTERIORS[0])
    weight, expected = torch.rand(rows), None
    for variant in _C.simd_variants():
        _C.set_simd(variant)
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            of_divergence = arguments[0], weight, -1.0, 1.5, "none"
            found = *run_posterior(native, arguments), native.kl_normal(*of_divergence)
            found += (native.kl_normal_gradient(weight, *of_divergence),)
            expected = expected or found
            assert all(torch.equal(f, e) for f, e in zip(found, expected))
    _C.set_simd(_C.simd_variants()[0])
    torch.set_num_threads(1)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_any_log_variance(wide, simd):
    """Of all sizes, against the reference in float64: functions of the kernel itself make z and the divergence."""
    logs = torch.linspace(-40, 30, 2001, dtype=wide)
    moments = torch.stack([torch.full_like(logs, 0.3), logs], 1)
    xi, scale, near = torch.full((2001, 1), 0.7, dtype=wide), torch.ones(1, 1, dtype=wide), torch.finfo(wide).eps
    results = []
    for backend, dtype in ((native, wide), (reference, torch.float64)):
        m, x, s = (t.to(dtype) for t in (moments, xi, scale))
        arguments = m, x, None, s, None, None, None, -30.0, 20.0, dtype, True
        rows = m, torch.ones_like(x), -30.0, 20.0, "none"
        results.append([
            backend.posterior(*arguments)[0], backend.posterior_gradient(torch.ones_like(x), None, *arguments),
            backend.kl_normal(*rows), backend.kl_normal_gradient(torch.ones_like(x), *rows),
        ])  # fmt: skip
    for got, want in zip(*results):
        torch.testing.assert_close(got.double(), want, rtol=8 * near, atol=2 * near)


@pytest.mark.parametrize(("shape", "rows"), [case for case in LAYOUTS if layout_of(*case)[1] == case[1]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_and_their_gradient(shape, rows, dtype):
    """Sums with the bits of one instruction set for all, near to the truth; gradients with the reference's bits."""
    a, b = random(shape, dtype), random(shape, dtype if dtype == torch.float16 else torch.float32)
    compute = compute_dtype(a, b)
    upstream = [None if k == 2 else random(rows, compute) for k in range(8)]
    arguments = a, b, rows, rows, compute
    exact = reference.row_moments(a.double(), b.double(), rows, rows, torch.float64)
    sizes = reference.row_moments(a.double().abs(), -b.double().abs(), rows, rows, torch.float64)
    want = reference.moments_gradient(upstream, *arguments, True, True)
    found = []
    for variant in _C.simd_variants():
        _C.set_simd(variant)
        found.append(native.row_moments(*arguments))
        for got, expected in zip(native.moments_gradient(upstream, *arguments, True, True), want):
            assert_same(got, expected)
    _C.set_simd(_C.simd_variants()[0])
    for got, truth, size in zip(found[0], exact, sizes):
        # Summed in float64, rounded once.
        eps = torch.finfo(torch.float64).eps
        bound = torch.finfo(compute).eps / 2 * truth.abs() + 4 * math.log2(a.numel() + 2) * eps * size.abs()
        assert got.dtype == compute and bool(((got.double() - truth).abs() <= bound).all())
    for other in found[1:]:
        for got, same in zip(other, found[0]):
            assert torch.equal(got, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batched", [False, True])
def test_convert_and_step(dtype, batched, simd):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((3, 2, 5), (2, 4, 33, 31), (0, 3), (1, 1)):
        x, m, uncond, z, v, *history = (random(shape, dtype) for _ in range(9))
        columns = len(ops.COLUMNS)
        row = random((shape[0], columns) if batched else (columns,), wide)
        ones = (1,) * len(shape)
        for guidance in (2.5, random((shape[0], *ones[1:]), wide)):
            for clip, noise, variance in (
                (None, z, None),
                (0.5, z, v),
                (0.5, ops.Philox(3, 1, 20), None),
                (None, None, None),
            ):
                arguments = (x, m, uncond, guidance, row, clip, tuple(history), noise, variance, dtype, (True, True))
                wider = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
                wider[6], wider[-2] = tuple(h.double() for h in history), torch.float64
                results = native.step(*arguments), reference.step(*arguments), reference.step(*wider)
                for got, want, exact in zip(*results):
                    # Terms cancel: the scale of the errors is that of the tensor.
                    bound = 2 * (want.double() - exact).abs().max() if want.numel() else 0
                    ulps = torch.finfo(got.dtype).eps * exact.abs() * (8 if dtype == torch.float64 else 1)
                    spread = torch.finfo(wide).eps * 4 * (exact.abs().max() if exact.numel() else 0)
                    assert bool(((got.double() - exact).abs() <= bound + ulps + spread).all())
        k_x, k_m = (random((shape[0], *ones[1:]), wide) for _ in range(2))
        assert_same(native.convert(m, x, k_x, k_m), reference.convert(m, x, k_x, k_m))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 65504.0, 1e-40, -0.0, 3.4e38])
def test_special_values_survive_storage(dtype, value, simd):
    """Through every load and store, in full vectors and in their ends: NaN stays NaN, overflow rounds to infinity."""
    x = torch.full((37,), value, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    one, zero = torch.ones(1, dtype=wide), torch.zeros(1, dtype=wide)
    got = native.convert(x, torch.zeros_like(x), zero, one)
    assert_same(got, reference.convert(x, torch.zeros_like(x), zero, one))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_and_rounding(dtype, simd):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    one, half = torch.ones(1), torch.tensor([1 / 3])
    for k in (one, half):
        arguments = (every, torch.zeros_like(every), torch.zeros(1), k)
        assert_same(native.convert(*arguments), reference.convert(*arguments))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_strides_rows_and_mask(data):
    shape = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    rows = [data.draw(st.sampled_from([1, size])) for size in shape]
    dtype = data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    order = data.draw(st.permutations(range(len(shape))))

    def strided(t):
        return t.permute(*order).contiguous().permute(*[order.index(d) for d in range(len(shape))])

    mask = None
    if data.draw(st.booleans()):
        kept = [data.draw(st.sampled_from([1, size])) for size in shape]
        mask = torch.rand(kept[data.draw(st.integers(0, len(kept) - 1)) :]) + 0.1
    arguments = loss_arguments(shape, rows, dtype, mask)
    arguments[:3] = [strided(t) for t in arguments[:3]]
    how = (data.draw(st.sampled_from(["mse", "pseudo_huber"])), data.draw(st.sampled_from(["none", "row"])))
    got, want = (backend.loss(*arguments, *how, "none") for backend in (native, reference))
    torch.testing.assert_close(got, want, rtol=2e-6 if got.dtype == torch.float32 else 1e-14, atol=0, equal_nan=True)
    wide = got.dtype
    alpha, sigma = random(rows, wide), random(rows, wide)
    x0, n = arguments[:2]
    got, want = (backend.noise(x0, n, alpha, sigma, 0.0, None, True)[0] for backend in (native, reference))
    assert_same(got, want)


def test_channels_last_stays_channels_last():
    x0 = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    noised = fastdiff.Objective(fastdiff.VariancePreserving()).noise(x0)
    assert noised.x_t.is_contiguous(memory_format=torch.channels_last)


def test_falls_back_where_there_is_no_memory_to_point_at():
    prediction, n = torch.randn(2, 3, 4)
    gradient = torch.func.grad(lambda m: ops.loss(m, None, n, q=1.0))(prediction)
    torch.testing.assert_close(gradient, 2 * (prediction - n) / n.numel())
    with fastdiff.use_backend("native"):
        assert ops.noise(torch.empty(2, 3, device="meta"), 1.0, 1.0, ops.Philox(0))[0].device.type == "meta"
        assert native.normal(0, (2, 3), device="meta").device.type == "meta"
        assert native.uniform(0, 2, 3, device="meta").device.type == "meta"


class TestBinding:
    """``fastdiff._C`` takes pointers: what it lets through must be safe to run."""

    X = torch.zeros(1024)  # room for 64 elements of any dtype: a size that is claimed is not the binding's to doubt
    LAYOUT = (4, 1, 1, 16, 4, 1)
    GOOD, TWICE = (X.data_ptr(), 0, 64), (X.data_ptr(), 0, 128)
    RUN = [GOOD, (4, 16), LAYOUT, (X.data_ptr(), 0, 1), LAYOUT, (X.data_ptr(), 0, 1), (X.data_ptr(), 0, 54), None, None,
           None, None, (1, 0, 0, 0.0), (X.data_ptr(), 0, 128), 1]  # fmt: skip
    R = torch.ones(4)  # held: the pointer must stay good
    ROWS = (R.data_ptr(), 0, 4)
    ORDER = ((4, 2, 8), (2, 1, 8))

    @settings(max_examples=examples(10_000), deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_fuzz(self, data):
        """Anything at all in the place of any argument: a ValueError, TypeError or OverflowError, never a crash."""
        integers = st.integers(-(2**65), 2**65) | st.sampled_from([0, -1, 2**31, 2**62, 2**63, 64])
        # Pointers are null or those of real memory: the binding cannot know more of a pointer than its size says.
        pointer = st.sampled_from([0, self.X.data_ptr(), -1])
        memory = st.tuples(pointer, st.integers(-2, 9), st.sampled_from([0, 1, 4, 16, 64, -1, 65, 2**60]))
        junk = (
            st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.binary(max_size=3) | integers | memory
            | st.tuples(integers, integers) | st.tuples(*[st.tuples(integers, integers)] * 2)
            | st.tuples(*[st.integers(-1, 5)] * 6) | st.lists(integers, max_size=3)
        )  # fmt: skip
        good = {
            "normal": [self.LAYOUT, (1, 0, 0, 0.0), (3, (2, 8), (20, 1)), self.GOOD, 1],
            "uniform": [1, 0, 0, (self.X.data_ptr(), 1, 32), 32],
            "noise": [self.LAYOUT, self.GOOD, self.ROWS, self.ROWS, (1, 0, 0, 0.0), 0.0, None, self.GOOD, None,
                      self.ORDER, 1],
            "convert": [self.LAYOUT, self.GOOD, self.GOOD, self.ROWS, self.ROWS, self.GOOD, 1],
            "loss": [self.LAYOUT, self.GOOD, None, self.GOOD, None, self.ROWS, None, self.ROWS, *(None,) * 4, 0, 0, 0,
                     None, (self.X.data_ptr(), 0, 1), None, self.GOOD, None, None, self.ORDER, 1],
            "loss of elements": [self.LAYOUT, self.GOOD, None, self.GOOD, None, self.ROWS, None, self.ROWS, self.ROWS,
                                 *(None,) * 3, (0.5, 0.0, 1.0, 1.0, 0.0, 0.3, None), 0, 1, None, None, None,
                                 self.GOOD, self.GOOD, self.GOOD, self.ORDER, 1],
            "gaussian_kl": [self.LAYOUT, (self.X.data_ptr(), 0, 128), self.GOOD, (1, 0, 0, 0.0), self.ROWS, self.ROWS,
                            self.ROWS, self.ROWS, self.ROWS, self.ROWS, self.ROWS, self.ROWS, None, 1, 0, None,
                            (self.X.data_ptr(), 0, 1), (self.X.data_ptr(), 0, 128), 1],
            "posterior": [self.LAYOUT, self.TWICE, (1, 7, 0, 0.0), None, self.ROWS, self.GOOD, self.ROWS, self.ROWS,
                          -30.0, 20.0, self.GOOD, self.GOOD, None, 1],
            "posterior_gradient": [self.LAYOUT, self.TWICE, (1, 7, 0, 0.0), self.ROWS, self.ROWS, -30.0, 20.0,
                                   self.GOOD, self.GOOD, self.TWICE, 1],
            "kl_normal": [self.LAYOUT, self.TWICE, self.ROWS, -30.0, 20.0, 0, None, (self.X.data_ptr(), 0, 1),
                          self.TWICE, 1],
            "row_moments": [self.LAYOUT, self.GOOD, None, 0, (self.ROWS, None, self.ROWS, *(None,) * 5), 1],
            "row_moments_gradient": [self.LAYOUT, self.GOOD, self.GOOD, (self.ROWS, None, *(self.ROWS,) * 6),
                                     self.GOOD, None, 1],
            "step": [self.LAYOUT, self.GOOD, self.GOOD, None, None, (self.X.data_ptr(), 0, 18), None, (), None, None,
                     self.GOOD, None, None, None, None, None, None, None, 1],
            "trajectory": self.RUN,
        }  # fmt: skip
        name = data.draw(st.sampled_from(sorted(good)))
        arguments = list(good[name])
        operation = getattr(_C, name.split()[0])
        operation(*arguments)  # these are taken
        for _ in range(data.draw(st.integers(1, 2))):
            arguments[data.draw(st.integers(0, len(arguments) - 1))] = data.draw(junk)
        if any(a == self.X.data_ptr() or (isinstance(a, tuple) and -1 in a[:1]) for a in arguments):
            return  # the address as a count, or as a seed: harmless, and nothing to learn
        try:
            made = operation(*arguments)
            if name == "trajectory":
                self.use(made, data, junk)
        except (ValueError, TypeError, OverflowError):
            pass

    def use(self, made, data, junk):
        """Steps of a run, with anything in the place of any argument of them too."""
        launch, aim = made
        targets, steps = [self.GOOD, self.GOOD], [0, self.GOOD, True, 3, None, None, None, None, None]
        steps[1] = (self.X.data_ptr(), 0, 128)
        if data.draw(st.booleans()):
            targets[data.draw(st.integers(0, 1))] = data.draw(junk)
        else:
            steps[data.draw(st.integers(0, 8))] = data.draw(junk)
        aim(*targets)
        for _ in range(3):
            launch(*steps[: data.draw(st.sampled_from([4, 9]))])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({0: (4, 1, 1, 15, 4, 1)}, "x0|elements"),
            ({1: (0, 0, 64)}, "x0"),
            ({1: (GOOD[0], 0, 63)}, "x0"),
            ({1: (GOOD[0], 9, 64)}, "dtype"),
            ({2: (ROWS[0], 0, 3)}, "alpha"),
            ({2: None}, "alpha"),
            ({4: (1, 2**32, 0, 0.0)}, "stream"),
            ({7: (GOOD[0], 4, 64)}, "x_t"),
            ({9: ((4, 16),)}, "order: expected"),
            ({9: ((4, 16), (16,))}, "order: needs as many"),
            ({9: ((4, 15), (16, 1))}, "order: its sizes"),
            ({9: ((4, 16), (17, 1))}, "order: its strides reach"),
            ({9: ((4, 16), (-1, 1))}, "order: sizes and strides"),
            ({9: ((2**40, 2**40), (1, 1))}, "order: its sizes"),
            ({9: ((2,) * 6, (1, 32, 2, 16, 4, 2**62))}, "order: its strides reach"),
            ({10: -1}, "threads"),
        ],
    )
    def test_messages_name_the_argument(self, change, message):
        arguments = [
            self.LAYOUT,
            self.GOOD,
            self.ROWS,
            self.ROWS,
            (1, 0, 0, 0.0),
            0.0,
            None,
            self.GOOD,
            None,
            self.ORDER,
            1,
        ]
        for k, value in change.items():
            arguments[k] = value
        with pytest.raises(ValueError, match=message):
            _C.noise(*arguments)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({1: (GOOD[0], 0, 63)}, "a: has 63"),
            ({2: (GOOD[0], 4, 64)}, "b: the dtype"),
            ({3: 2}, "dtype: must be from 0 to 1"),
            ({3: 1}, "results: must be float64"),
            ({4: (None,) * 7}, "results: expected a tuple"),
            ({4: None}, "results: expected a tuple"),
            ({4: ((ROWS[0], 0, 5), *(None,) * 7)}, "results: has 5"),
            ({5: -1}, "threads"),
        ],
    )
    def test_messages_of_moments(self, change, message):
        arguments = [self.LAYOUT, self.GOOD, self.GOOD, 0, (self.ROWS, *(None,) * 7), 1]
        _C.row_moments(*arguments)
        for k, value in change.items():
            arguments[k] = value
        with pytest.raises(ValueError, match=message):
            _C.row_moments(*arguments)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({1: None}, "a: expected"),
            ({3: (ROWS, *(None,) * 8)}, "upstream: expected a tuple"),
            ({3: ((ROWS[0], 0, 3), *(None,) * 7)}, "upstream: has 3"),
            ({4: (GOOD[0], 0, 16)}, "d_a: has 16"),
            ({5: (GOOD[0], 9, 64)}, "d_b: unknown dtype"),
        ],
    )
    def test_messages_of_the_gradient_of_moments(self, change, message):
        arguments = [self.LAYOUT, self.GOOD, self.GOOD, (self.ROWS, *(None,) * 7), self.GOOD, self.GOOD, 1]
        _C.row_moments_gradient(*arguments)
        for k, value in change.items():
            arguments[k] = value
        with pytest.raises(ValueError, match=message):
            _C.row_moments_gradient(*arguments)

    @pytest.mark.parametrize(
        ("sizes", "strides"),
        [
            ((2, 2, 16), (1, 2**62, 1)),
            ((4, 2, 8), (2**63 - 1, 2**62, 0)),
            ((2**40, 2**40, 0), (0, 0, 1)),
            ((0, 2**40, 2**40), (1, 0, 0)),
            ((0, 2**62, 2**62, 4), (1, 0, 0, 0)),
            ((64,), (2**62,)),
        ],
    )
    def test_masks_of_sizes_beyond_64_bits(self, sizes, strides):
        """Refused by their products, none of which overflows on the way (``make sanitize`` sees that)."""
        arguments = [self.LAYOUT, self.GOOD, None, self.GOOD, None, self.ROWS, None, self.ROWS, *(None,) * 4, 0, 0, 0,
                     None, (self.X.data_ptr(), 0, 1), None, self.GOOD, None, None, self.ORDER, 1]  # fmt: skip
        arguments[9] = (self.X.data_ptr(), 0, 64, sizes, strides)
        with pytest.raises(ValueError, match="mask"):
            _C.loss(*arguments)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({12: (1.0,) * 6}, "function: expected strengths and constants"),
            ({12: (1.0, "half", *(1.0,) * 5)}, "function: must be a number"),
            ({8: None}, "c: this error function needs its constant"),
            ({14: 0}, "errors: are those of elements"),
            ({16: (X.data_ptr(), 0, 1)}, "errors: are those of elements"),
            ({19: (GOOD[0], 0, 63)}, "errors: has 63"),
            ({19: (GOOD[0], 2, 64)}, "errors: must be float32"),
            ({20: (GOOD[0], 0, 65)}, "d_errors: has 65"),
            ({20: None}, "d_errors: is needed"),
        ],
    )
    def test_messages_of_errors_by_element(self, change, message):
        arguments = [self.LAYOUT, self.GOOD, None, self.GOOD, None, self.ROWS, None, self.ROWS, self.ROWS,
                     *(None,) * 3, (0.5, 0.0, 1.0, 1.0, 0.0, 0.3, None), 0, 1, None, None, None,
                     self.GOOD, self.GOOD, self.GOOD, self.ORDER, 1]  # fmt: skip
        _C.loss(*arguments)
        for k, value in change.items():
            arguments[k] = value
        with pytest.raises(ValueError, match=message):
            _C.loss(*arguments)

    def test_more_dimensions_than_there_is_room_for(self):
        layout, memory = (512, 1, 1, 1, 512, 1), (self.X.data_ptr(), 0, 512)
        rows, order = (self.R.data_ptr(), 0, 1), ((2,) * 9, tuple(2**d for d in range(9)))
        with pytest.raises(ValueError, match="order: has too many dimensions"):
            _C.noise(layout, memory, rows, rows, (1, 0, 0, 0.0), 0.0, None, memory, None, order, 1)

    def test_a_run_of_good_arguments(self):
        launch, aim = _C.trajectory(*self.RUN)
        with pytest.raises(ValueError, match="y: no target"):
            launch(0, self.X, False, None)
        aim(self.GOOD, None)
        assert launch(0, (self.X.data_ptr(), 0, 64), False, 3, None, None, None, None, None)
        assert not launch(0, torch.zeros(8), False, None), "of another shape"
        assert not launch(0, torch.zeros(16, 4).mT, False, None), "not contiguous"
        assert not launch(0, None, False, None)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({1: (4, 15)}, "sizes"),
            ({1: ()}, "sizes"),
            ({1: (2**40, 2**40)}, "sizes"),
            ({3: (GOOD[0], 0, 3)}, "guidance"),
            ({3: (GOOD[0], 1, 1)}, "guidance|dtype"),
            ({4: (4, 1, 1, 8, 4, 1)}, "layout"),
            ({6: (GOOD[0], 0, 53)}, "table"),
            ({6: (GOOD[0], 2, 54)}, "table"),
            ({8: (GOOD[0], 4, 64, (64,), (1,))}, "known"),
            ({11: GOOD}, "made"),
            ({12: (GOOD[0], 1, 128)}, "history"),
            ({12: (GOOD[0], 0, 5 * 64)}, "history"),
            ({12: (GOOD[0], 0, 100)}, "history"),
            ({13: -1}, "threads"),
        ],
    )
    def test_messages_of_a_run(self, change, message):
        arguments = list(self.RUN)
        for k, value in change.items():
            arguments[k] = value
        with pytest.raises(ValueError, match=message):
            _C.trajectory(*arguments)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda launch, aim, x: launch(3, x, False, None), ValueError, "k: there is no such row"),
            (lambda launch, aim, x: launch(-1, x, False, None), ValueError, "k: there is no such row"),
            (lambda launch, aim, x: launch(0, x, False, 2**32), ValueError, "32 bits"),
            (lambda launch, aim, x: launch(0, x, False), TypeError, "4 or 9"),
            (lambda launch, aim, x: launch(0, x, False, None, *[None] * 5), ValueError, "m: expected"),
            (lambda launch, aim, x: aim((x.data_ptr(), 2, 64), None), ValueError, "y: must be of the dtype"),
            (lambda launch, aim, x: aim((x.data_ptr(), 0, 63), None), ValueError, "y: has 63"),
            (lambda launch, aim, x: aim((x.data_ptr(), 0, 64), (x.data_ptr(), 2, 64)), ValueError, "model_input"),
            (lambda launch, aim, x: aim(), TypeError, "2 arguments"),
        ],
    )
    def test_messages_of_a_step_of_a_run(self, call, error, message):
        launch, aim = _C.trajectory(*self.RUN)
        aim(self.GOOD, None)
        with pytest.raises(error, match=message):
            call(launch, aim, torch.zeros(4, 16))
