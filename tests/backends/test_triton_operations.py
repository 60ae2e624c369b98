"""The Triton backend against the reference, on a GPU or, without one, in Triton's interpreter.

A GPU compiles each variant of a kernel, and all tests together ask for over a thousand. There those marked
``gpu_variants`` are run, the others skipped: they reach every branch of the kernels in at most 295 variants
(test_triton_variants.py counts them).

    python -m pytest tests/backends/test_triton_operations.py -m gpu_variants -n 16
"""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accuracy import assert_same
from devices import every_pair, nightly
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import ops
from fastdiff.backends.layout import TOKENS, empty_in_order
from fastdiff.backends.reference import philox
from fastdiff.calls import Combination, NoiseCall
from fastdiff.tensors import Gathered, as_tensor, decoded

pytest.importorskip("triton")
import triton as jit
import triton.language as tl
from asked import reference, triton

from fastdiff.backends.triton import (
    affine,
    gaussian_kl,
    interpreted,
    kl_normal,
    loss,
    plan,
    posterior,
    row_moments,
    step,
)
from fastdiff.backends.triton.launch import launches
from fastdiff.backends.triton.philox import fma
from fastdiff.backends.triton.tiles import spot_of

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if DEVICE.type == "cpu" and not interpreted():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)
# The interpreter's own: numpy's announcements, and what becomes of infinity and of a division by zero.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")
# The largest difference of a fast normal from the exact one: see test_fast_normals.
RNG_TOLERANCE = 1e-3

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUNCTIONS = ["mse", "l1", "smooth_l1", "pseudo_huber", "log_cosh"]
COMBINED = Combination(0.5, 0.4, 0.3, 0.2, 0.1, c_smooth_l1=0.3, c_pseudo_huber=None)
# (shape, rows): leading, frames behind channels, one for all, one an element, odd sizes, rows of several tiles.
LAYOUTS = [
    ((3, 4, 8, 8), (3, 1, 1, 1)),
    ((2, 3, 4, 5), (2, 1, 4, 1)),
    ((2, 3, 4, 6), (1, 3, 1, 1)),
    ((3, 3, 37), (1, 1, 1)),
    ((7, 2), (7, 2)),
    ((5,), (5,)),
    ((2, 1, 1033), (2, 1, 1)),
]


gpu_variants = pytest.mark.gpu_variants


def diagonal(chosen=None, **lists):
    """Parametrizes by every combination of the lists. Marked for a GPU are ``chosen`` of them (as many as the longest
    list is long) that go through all lists at once, each from its start again at its end: together they have every
    value, and every pair of two lists whose lengths share no factor, if there are enough. Those, and few more that
    have every pair, run each time; the others at night."""
    number = max(map(len, lists.values())) if chosen is None else chosen
    marked = {tuple(k % len(values) for values in lists.values()) for k in range(number)}
    cases = []
    paired = every_pair(list(itertools.product(*lists.values())))
    for i, places in enumerate(itertools.product(*(range(len(values)) for values in lists.values()))):
        case = [values[place] for values, place in zip(lists.values(), places)]
        named = (v if isinstance(v, str) else f"{name}{k}" for name, v, k in zip(lists, case, places))
        marks = gpu_variants if places in marked else () if i in paired else nightly
        cases.append(pytest.param(*case, marks=marks, id="-".join(named)))
    return pytest.mark.parametrize(list(lists), cases)


def random(shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def assert_as_good(got, want, exact):
    """Within twice the reference's own largest relative error, plus one ulp."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    info, exact = torch.finfo(got.dtype), exact.double()
    size = exact.abs().clamp(min=info.tiny)
    error, reference_error = (((t.double() - exact).abs() / size).nan_to_num(0).max() for t in (got, want))
    assert error <= 2 * reference_error + info.eps, (float(error), float(reference_error))


@pytest.fixture
def small_tiles(monkeypatch):
    """Rows of several tiles without large data."""
    for module in (affine, gaussian_kl, kl_normal, loss, posterior, row_moments, step):
        monkeypatch.setattr(module, "tile_of", lambda elements, itemsize: 64)


@diagonal(1, shape=[(1,), (1, 1100), (3, 33), (2, 4, 8, 8), (0, 4), (2, 0)])
def test_normals_and_uniforms_have_the_same_bits(shape):
    for seed, stream, offset in ((0, 0, 0), (-7, 2**32 - 1, 2**33 + 3), (2**62 + 5, 1, 0), (2**64 - 1, 16, 1)):
        device_seed = philox.seed_tensor(seed, DEVICE)
        want = reference.normal(seed, shape, stream, offset)
        for given_seed in (seed, device_seed):
            assert_same(triton.normal(given_seed, shape, stream, offset, device=DEVICE).cpu(), want)
            got = triton.uniform(given_seed, shape[0], stream, offset, DEVICE)
            assert_same(got.cpu(), reference.uniform(seed, shape[0], stream, offset))


@pytest.mark.parametrize("rng", ["exact", "fast"])
def test_noise_by_sample_ids(rng):
    """In normals, uniforms, drawn times, noising and a loss; with channel offsets, and runs shorter than a tile."""
    ids, shape = torch.tensor([3, 2**40 + 1, -2, 3, 0], device=DEVICE), (5, 2, 3, 4)
    assert_same(triton.uniform(7, 5, 3, ids, DEVICE).cpu(), reference.uniform(7, 5, 3, ids.cpu()))
    want = reference.normal(7, shape, 0, ids.cpu())
    close = {"rtol": 0, "atol": 0 if rng == "exact" else RNG_TOLERANCE}
    torch.testing.assert_close(triton.normal(7, shape, 0, ids, device=DEVICE, rng=rng).cpu(), want, **close)
    made, x0 = ops.Philox(7, ids, offset=0.1, rng=rng), random(shape)
    alpha, sigma = random((5, 1, 1, 1)), random((5, 1, 1, 1))
    for keep in (True, False):
        (got, kept), (want, wanted) = (b.noise(x0, made, alpha, sigma, 0.0, None, keep) for b in (triton, reference))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=10 * close["atol"])
    arguments = loss_arguments(shape, (5, 1, 1, 1), torch.float32, None)
    arguments[2] = made
    if rng == "exact":
        compare_losses(arguments, ("mse", "none", "mean"))
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", noise_offset=0.1)
    prediction = random(shape).requires_grad_()
    found = []
    for name in ("triton", "reference"):
        with fastdiff.use_backend(name):
            noised = objective.noise(x0, seed=7, ids=ids, rng=rng, keep_noise=False)  # the fast call
            loss = objective.loss(prediction, noised)
            found.append((noised.t, noised.x_t, loss, *torch.autograd.grad(loss, prediction)))
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=max(1e-6, 10 * close["atol"]))


@diagonal(
    dtype=[torch.float32, torch.float64],
    process=[fastdiff.RectifiedFlow(), fastdiff.RectifiedFlow(shift=1.15), fastdiff.EDM()],
)
def test_rows_of_a_continuous_process_are_one_launch(process, dtype):
    """And have the bits of the process's own float64 formula, rounded once."""
    t = torch.rand(300, dtype=dtype, device=DEVICE)
    t[:2] = torch.tensor([0.0, 1.0])
    objective = fastdiff.Objective(process, "flow" if isinstance(process, fastdiff.RectifiedFlow) else "epsilon")
    x0 = torch.randn(300, 8, device=DEVICE)
    with fastdiff.use_backend("triton"), launches() as launched:
        noised = objective.noise(x0, t, torch.zeros_like(x0))
    assert launched == ["coefficients", "affine"]
    levels = process.levels(t)
    assert_same(noised.alpha, levels.alpha.float())
    assert_same(noised.sigma, levels.sigma.float())


@jit.jit
def fused(a, b, c, out, EMULATE: tl.constexpr):
    k = tl.arange(0, 16)
    tl.store(out + k, fma(tl.load(a + k), tl.load(b + k), tl.load(c + k), EMULATE))


@gpu_variants
def test_fused_multiply_add_is_fused():
    """2^-24 is lost where the product is rounded first; so the interpreter's own fma would not do."""
    one = torch.ones(16, device=DEVICE)
    a, c, out = one * (1 + 2**-12), -one * (1 + 2**-11), one * 0
    fused[(1,)](a, a, c, out, interpreted())
    assert torch.equal(out, one * 2**-24)


@gpu_variants
def test_fast_normals():
    """The fast transform is within RNG_TOLERANCE of the exact one. Both take the same words; what differs most is the
    radius near 0, where the root magnifies an error of 2^-22 in the logarithm to 2^-11."""
    exact = triton.normal(3, (4, 2048), device=DEVICE)
    fast = triton.normal(3, (4, 2048), device=DEVICE, rng="fast")
    assert (fast - exact).abs().max() < RNG_TOLERANCE
    source = ops.Philox(3, rng="fast")
    with fastdiff.use_backend("triton"):
        assert_same(ops.materialize(source, (4, 2048), DEVICE), fast)
    with fastdiff.use_backend("reference"):
        assert_same(ops.materialize(source, (4, 2048), DEVICE), exact)
    x0, one = random((4, 2048)), torch.ones(4, 1, device=DEVICE)
    x_t, _ = triton.noise(x0, source, one, one, 0.0, None, False)
    torch.testing.assert_close(x_t, x0 + fast)
    got = triton.loss(x0, None, source, None, one, None, one, None, None, "mse", "none", "mean")
    torch.testing.assert_close(got, ((x0 - fast) ** 2).mean())
    with pytest.raises(ValueError, match="exact"):
        ops.Philox(3, rng="quick")


def near(dtype):
    """Fast noise, made with its factor in it and without: the same but for roundings. (A sum has terms up to 7.)"""
    return {"rtol": torch.finfo(dtype).eps, "atol": 7 * 4 * torch.finfo(torch.float32).eps}


def fast_noise(shape, stream=0, offset=0.0):
    """(source, tensor) of the same fast noise."""
    source = ops.Philox(3, 1, stream, offset=offset, rng="fast")
    with fastdiff.use_backend("triton"):
        return source, ops.materialize(source, shape, DEVICE)


@diagonal(3, layout=LAYOUTS, dtype=DTYPES, xi=["none", "made", "given"], keep=[False, True])
def test_fast_noise_in_noising(layout, dtype, xi, keep):
    shape, rows = layout
    n, tensor = fast_noise(shape, offset=0.1 if len(shape) > 2 else 0.0)
    made, other = (None, None) if xi == "none" else fast_noise(shape, 2)
    x0, alpha, sigma, gamma = random(shape, dtype), random(rows), random(rows), 0.0 if xi == "none" else 0.1
    want, _ = reference.noise(x0, tensor, alpha, sigma, gamma, other, False)
    got, kept = triton.noise(x0, n, alpha, sigma, gamma, made if xi == "made" else other, keep)
    torch.testing.assert_close(got, want, **near(dtype))
    if keep:
        torch.testing.assert_close(kept, tensor, **near(dtype))


@diagonal(3, layout=[*LAYOUTS[3:], *LAYOUTS[:3]], x0=[True, False], dtype=DTYPES)
def test_fast_noise_in_the_loss(layout, dtype, x0):
    shape, rows = layout
    p, q, weight = random(rows), random(rows), random(rows).abs()
    prediction, data = random(shape, dtype), random(shape, dtype)
    n, tensor = fast_noise(shape, offset=0.1 if len(shape) > 2 else 0.0)
    results = []
    for backend, source in ((triton, n), (reference, tensor)):
        leaf = prediction.clone().requires_grad_()
        coefficients = p if x0 else None, q, None, weight, None
        loss = backend.loss(leaf, data if x0 else None, source, *coefficients, None, "mse", "none", "sum")
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    (got, d_got), (want, d_want) = results
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_got, d_want, rtol=torch.finfo(dtype).eps, atol=float(d_want.abs().max()) * 4e-6)


@diagonal(
    6,
    layout=LAYOUTS,
    dtype=DTYPES,
    other=DTYPES,
    made=[True, False],
    how=[("mse", "none", "mean"), ("smooth_l1", "none", "none"), ("mse", "row", "mean")],
)
def test_a_third_operand_of_the_target(layout, dtype, other, made, how):
    shape, rows = layout
    mask = torch.rand(shape, device=DEVICE) < 0.7 if how[1] == "row" else None
    third = {"y": random(shape, other), "r": random(rows)}
    arguments = loss_arguments(shape, rows, dtype, mask, made)
    if made and mask is not None:  # the target of epsilon
        arguments[1] = arguments[3] = None
    with launches() as launched:
        compare_losses(arguments, how, **third)
    if rows == (shape[0],) + (1,) * (len(shape) - 1):  # a time a sample
        assert launched == ["loss", "loss"]  # and the gradient


def noise_of(kind, shape, dtype, stream=0):
    """Noise as a tensor, to be made in the kernel, with channel offsets where there are channels, or none."""
    return {
        "none": lambda: None,
        "given": lambda: random(shape, dtype),
        "given in float32": lambda: random(shape),
        "made": lambda: ops.Philox(99, 3, stream),
        "made with offsets": lambda: ops.Philox(-99, 2**40, stream, offset=0.1 if len(shape) > 2 else 0.0),
    }[kind]()


@diagonal(
    layout=LAYOUTS,
    dtype=DTYPES,
    kinds=[
        (n, xi) for xi in ("none", "made", "given") for n in ("given", "made", "made with offsets", "given in float32")
    ],
)
def test_noise(layout, dtype, kinds):
    shape, rows = layout
    x0, alpha, sigma = random(shape, dtype), random(rows), random(rows)
    n, xi = noise_of(kinds[0], shape, dtype), noise_of(kinds[1], shape, dtype, 2)
    arguments = (x0, n, alpha, sigma, 0.0 if xi is None else 0.1, xi, xi is None)
    (got, kept), (want, wanted) = triton.noise(*arguments), reference.noise(*arguments)
    assert_same(got, want)
    if isinstance(wanted, torch.Tensor):
        assert_same(kept, wanted)
    else:
        assert kept is n


@diagonal(
    4,
    layout=LAYOUTS,
    kinds=[("given in float32", "none", True), ("made", "none", False), ("made", "made", True),
           ("given in float32", "made", True)],
    rows_of_target=["p and q", "p", "q"],
    dtype=DTYPES,
)  # fmt: skip
def test_noise_and_target_in_one_launch(layout, dtype, kinds, rows_of_target):
    shape, rows = layout
    x0, (alpha, sigma, p, q) = random(shape, dtype), (random(rows) for _ in range(4))
    n, xi, keep = noise_of(kinds[0], shape, dtype), noise_of(kinds[1], shape, dtype, 2), kinds[2]
    p, q = p if "p" in rows_of_target else None, q if "q" in rows_of_target else None
    arguments = (x0, n, alpha, sigma, 0.1 if xi else 0.0, xi, keep)
    with launches() as launched:
        got, noise, target = triton.noise_and_target(*arguments, p, q)
    assert launched == ["affine"]
    want, kept = reference.noise(*arguments)
    assert_same(got, want)
    assert noise is n if not keep else torch.equal(noise, kept)
    p, q = (torch.zeros_like(alpha) if row is None else row for row in (p, q))
    assert_same(target, reference.noise(x0, n, p, q, 0.0, None, False)[0])


@diagonal(1, layout=LAYOUTS, dtype=DTYPES)
def test_fast_noise_and_target_in_one_launch(layout, dtype):
    shape, rows = layout
    x0, (alpha, sigma, p, q) = random(shape, dtype), (random(rows) for _ in range(4))
    n, tensor = fast_noise(shape)
    got, _, target = triton.noise_and_target(x0, n, alpha, sigma, 0.0, None, False, p, q)
    torch.testing.assert_close(got, reference.noise(x0, tensor, alpha, sigma, 0.0, None, False)[0], **near(dtype))
    torch.testing.assert_close(target, reference.noise(x0, tensor, p, q, 0.0, None, False)[0], **near(dtype))


@gpu_variants
def test_target_in_the_memory_format_of_x0_and_with_gradients():
    x0 = random((2, 3, 8, 8)).contiguous(memory_format=torch.channels_last)
    n, row = torch.randn_like(x0), random((2, 1, 1, 1))
    for source in (n, ops.Philox(3)):
        x_t, _, target = triton.noise_and_target(x0, source, row, row, 0.0, None, False, row, row)
        assert_same(x_t, target)
        assert target.is_contiguous(memory_format=torch.channels_last)
    leaf = x0.clone().requires_grad_()
    x_t, _, target = triton.noise_and_target(leaf, n, row, row, 0.0, None, True, 2 * row, row)
    torch.testing.assert_close(torch.autograd.grad((x_t + target).sum(), leaf)[0], (3 * row).expand_as(x0))


def test_all_bytes_of_images():
    images = torch.arange(256, device=DEVICE).to(torch.uint8).view(1, 256)
    one, zero = torch.ones(1, 1, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    noise = torch.zeros(1, 256, device=DEVICE)
    got = triton.noise(images, noise, one, zero, 0.0, None, False, torch.float32)[0]
    assert torch.equal(got.cpu(), images.cpu().float() / 127.5 - 1)


@diagonal(1, layout=LAYOUTS, dtype=DTYPES, kind=["given in float32", "made"], keep=[True, False])
def test_images_in_noising(layout, dtype, kind, keep):
    """Decoded in registers: one launch, and the bits of decoding them first."""
    shape, rows = layout
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
    n, (alpha, sigma, p, q) = noise_of(kind, shape, dtype), (random(rows) for _ in range(4))
    arguments = n, alpha, sigma, 0.0, None, keep
    with launches() as launched:
        got, kept = triton.noise(images, *arguments, dtype)
    want, wanted = reference.noise(decoded(images), *arguments, dtype)
    assert launched == ["affine"] and got.dtype == dtype
    assert_same(got, want)
    assert kept is n if kept is n else torch.equal(kept, wanted)
    if kind != "made":
        assert launched[0].read == images.numel() * (1 + 4) + 4 * (alpha.numel() + sigma.numel())
    call = NoiseCall(images, *arguments, dtype)
    with launches() as launched:
        target = triton.backend.noise_and_target(call, p, q)[2]
    assert launched == ["affine"]
    assert_same(target, reference.noise(decoded(images), n, p, q, 0.0, None, False, dtype)[0])


@diagonal(1, layout=LAYOUTS, dtype=DTYPES, kind=["given in float32", "made"])
def test_images_in_the_loss(layout, dtype, kind):
    shape, rows = layout
    images, prediction = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE), random(shape, dtype)
    n, (p, q, w) = noise_of(kind, shape, dtype), (random(rows) for _ in range(3))
    how = n, p, q, None, w.abs(), None, None, "mse", "none", "mean"
    results = []
    for x0 in (images, decoded(images)):
        leaf = prediction.clone().requires_grad_()
        with launches() as launched:
            value = triton.loss(leaf, x0, *how)
        assert launched == ["loss"]
        results.append((value, *torch.autograd.grad(value, leaf)))
    (got, gradient), (want, wanted) = results
    # On a GPU the layout of a tile, and with it the order of a sum in it, follows the size of what is read.
    torch.testing.assert_close(got, want, rtol=0 if interpreted() else 1e-6, atol=0)
    assert_same(gradient, wanted)


# [B, C, h, p, w, q]: whole patches in a unit; units shorter than a row of the image is long; odd sizes.
PATCHES = [(2, 4, 2, 2, 8, 2), (3, 4, 2, 3, 3, 2), (2, 3, 3, 4, 5, 4), (2, 5, 3, 1, 7, 3)]
ORDERS = list(TOKENS)


def in_order(x, name):
    """The same elements in the memory order of tokens."""
    return empty_in_order(tuple(x.shape), TOKENS[name], x.dtype, x.device).copy_(x)


def check_noising_into_tokens(shape, name, dtype, kind, keep, with_target):
    x0, n, rows = random(shape, dtype), noise_of(kind, shape, dtype), (shape[0],) + (1,) * 5
    alpha, sigma, p, q = (random(rows) for _ in range(4))
    arguments, order = (n, alpha, sigma, 0.0, None, keep), TOKENS[name]
    with launches() as launched:
        if with_target:
            got, kept, target = triton.backend.noise_and_target(NoiseCall(x0, *arguments, None, order), p, q)
            assert_same(target, reference.noise(x0, n, p, q, 0.0, None, False)[0])
            assert target.permute(order).is_contiguous()
        else:
            got, kept = triton.noise(x0, *arguments, None, order)
    assert launched == ["affine"] and got.permute(order).is_contiguous()
    want, wanted = reference.noise(x0, *arguments)
    assert_same(got, want)
    assert kept is n if not isinstance(wanted, torch.Tensor) else torch.equal(kept, wanted)


@diagonal(
    shape=PATCHES, name=ORDERS, dtype=DTYPES, kind=["given", "made", "made with offsets"], keep=[True, False],
    with_target=[False, True],
)  # fmt: skip
def test_noising_into_tokens(shape, name, dtype, kind, keep, with_target):
    check_noising_into_tokens(shape, name, dtype, kind, keep, with_target)


@pytest.mark.parametrize("name", ORDERS)
def test_tokens_in_several_tiles(name, small_tiles):
    for shape in [*PATCHES[:2], (1, 1, 5, 3, 1, 4)]:
        check_noising_into_tokens(shape, name, torch.bfloat16, "made", True, True)
        check_loss_of_tokens(shape, name, torch.bfloat16, "made", "mse", "mask")


@jit.jit
def spots(first, out, c_size, c_factor, c_shift, h_size, h_factor, h_shift, w_size, w_factor, w_shift,
          ORDER: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, IN_ROW: tl.constexpr):  # fmt: skip
    place = tl.arange(0, 64)
    start, spot = spot_of(tl.load(first), place, (c_size, c_factor, c_shift), (h_size, h_factor, h_shift),
                          (w_size, w_factor, w_shift), ORDER, P, Q, IN_ROW)  # fmt: skip
    tl.store(out + place, start + spot)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("shape", [(1000, 7, 31, 2, 64, 2), (1000, 16, 9, 4, 30, 4), (9000, 3, 11, 1, 7, 3)])
def test_where_elements_of_tokens_lie(name, shape):
    """In offsets of 32 and of 64 bits, against NumPy."""
    order, row = TOKENS[name], shape[4] * shape[5]
    in_row = math.gcd(8, row)
    how = plan.order_of(name, shape, SimpleNamespace(constants=("one", 1, 64, in_row)))
    sizes = [shape[d] for d in order]
    strides = {d: math.prod(sizes[k + 1 :]) for k, d in enumerate(order)}
    elements = math.prod(shape)
    for dtype, most in ((torch.int32, 2**31), (torch.int64, 2**40)):
        batches = -(-most // elements) if dtype == torch.int64 else 1
        for start in (0, 64, elements // 128 * 64, min(most, elements * batches) // 64 * 64 - 64):
            out = torch.empty(64, dtype=dtype, device=DEVICE)
            spots[(1,)](torch.tensor([start], dtype=dtype, device=DEVICE), out, *how[0], *how[1])
            index = np.unravel_index(np.arange(start, start + 64), (shape[0] * batches, *shape[1:]))
            assert out.tolist() == sum(index[d] * strides[d] for d in range(6)).tolist(), start


def check_loss_of_tokens(shape, name, dtype, kind, function, how):
    """The bits of the loss of the same prediction in the order of the data, and of its gradient, which lies as the
    prediction does. One launch, and one backward."""
    prediction, x0, rows = random(shape, dtype), random(shape, dtype), (shape[0],) + (1,) * 5
    n = noise_of(kind, shape, dtype)
    p, q, w, c = (random(rows).abs() + 0.1 for _ in range(4))
    mask = torch.rand(shape[0], 1, *shape[2:], device=DEVICE) < 0.6 if how == "mask" else None
    if how == "left out":
        w[0] = 0
    operands = (None, None) if how == "no x0" else (x0, p)
    reduction = "none" if how == "none" else "mean"
    results = []
    for m in (in_order(prediction, name), prediction):
        leaf = m.clone(memory_format=torch.preserve_format).requires_grad_()
        with launches() as launched:
            value = triton.loss(leaf, operands[0], n, operands[1], q, None, w, c, mask, function, "none", reduction)
            upstream = torch.linspace(0.5, 1, value.numel(), device=DEVICE).view(value.shape)
            (gradient,) = torch.autograd.grad(value, leaf, upstream)
        assert launched == ["loss"] * 2
        assert m is prediction or gradient.permute(TOKENS[name]).is_contiguous()
        results.append((value, gradient))
    for got, want in zip(*results):
        assert_same(got, want)


@diagonal(
    4, shape=PATCHES, name=ORDERS, dtype=DTYPES, kind=["given in float32", "made", "made with offsets"],
    function=["mse", "pseudo_huber"], how=["mean", "mask", "none", "no x0", "left out"],
)  # fmt: skip
def test_the_loss_of_tokens(shape, name, dtype, kind, function, how):
    check_loss_of_tokens(shape, name, dtype, kind, function, how)


def test_tokens_that_lie_otherwise_are_left_to_others():
    x0, row = random((2, 3, 2, 2, 2, 2)), torch.ones(2, 1, 1, 1, 1, 1, device=DEVICE)
    call = NoiseCall(x0, ops.Philox(1), row, row, order=(0, 1, 2, 4, 3, 5))
    assert "order of x_t" in triton.backend.supports(call)[1]
    got, _ = triton.noise(*call)
    assert_same(got, reference.noise(*call)[0])
    m = random((2, 3, 2, 2, 2, 2)).transpose(3, 4)  # the loss copies
    value = triton.loss(m, None, ops.Philox(1), None, row, None, row, None, None, "mse", "none", "mean")
    want = reference.loss(m, None, ops.Philox(1), None, row, None, row, None, None, "mse", "none", "mean")
    torch.testing.assert_close(value, want)


@settings(deadline=None)
@given(size=st.integers(1, 2**31 - 1), n=st.integers(0, 2**31 - 1), k=st.integers(0, 2**31))
def test_division_by_a_product(size, n, k):
    own, factor, shift = plan.divisor(size)
    assert own == size and -(2**31) <= factor < 2**31
    for number in {n, max(0, min(k // size * size - 1, 2**31 - 1)), min(k // size * size, 2**31 - 1), 2**31 - 1}:
        assert (2 * number * (factor % 2**32) >> 32) >> shift == number // size


GATHERED = [(3, 1, 1), (3, 5, 1), (1, 1, 1)]


def gathered(rows):
    """Two columns of one table, of any stride, and one of another, by an index of which one is out of range: that row
    is NaN. And plain rows."""
    table, other, plain = random((10, 4)), random((10,)), random((3, 1, 1)).abs()
    index = torch.randint(0, 10, rows, device=DEVICE)
    if index.numel() > 1:
        index.view(-1)[1] = 10
    return Gathered(table[:, 1], index), Gathered(table[:, 3], index), Gathered(other, index), plain


@diagonal(places=[(0, 1), (0, 3), (3, 0), (0, 2)], rows=GATHERED, kind=["given in float32", "made"])
def test_rows_gathered_in_noising(places, rows, kind):
    columns, x0 = gathered(rows), random((3, 5, 48))
    alpha, sigma = (columns[place] for place in places)
    n = noise_of(kind, x0.shape, x0.dtype)
    want = reference.noise(x0, n, as_tensor(alpha), as_tensor(sigma), 0.0, None, False)[0]
    assert_same(triton.noise(x0, n, alpha, sigma, 0.0, None, False)[0], want)


@diagonal(rows=GATHERED, places=["a b", "a _ b", "_ b a"])
def test_rows_gathered_in_the_loss(rows, places):
    a, b, _, plain = gathered(rows)
    weight = plain.expand(rows) if rows[0] == 3 else random(rows)
    p, q, weight = {"a b": (a, b, weight), "a _ b": (a, None, b), "_ b a": (None, b, a)}[places]
    x0, n, prediction = random((3, 5, 48)), random((3, 5, 48)), torch.ones(3, 5, 48, device=DEVICE)
    got = triton.loss(prediction, x0, n, p, q, None, weight, None, None, "mse", "none", "none")
    p, q, weight = map(as_tensor, (p, q, weight))
    want = reference.loss(prediction, x0, n, p, q, None, weight, None, None, "mse", "none", "none")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)


def loss_arguments(shape, rows, dtype, mask, made=False):
    p, q, scale, weight, c = (random(rows).abs() + 0.1 for _ in range(5))
    n = ops.Philox(5) if made else random(shape, dtype)
    return [random(shape, dtype), random(shape, dtype), n, p, q, scale, weight, c, mask]


def run_loss(backend, arguments, convert, how, **third):
    third = {name: convert(tensor) for name, tensor in third.items()}
    values = [convert(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    learned = [values[0]] if how[2] == "elements" else [values[0], values[6]]  # that loss leaves a learned weight aside
    for leaf in learned:
        leaf.requires_grad_()
    loss = backend.loss(*values, *how, **third)
    upstream = torch.linspace(0.5, 2, max(1, loss.numel())).to(loss)[: loss.numel()].view_as(loss)
    loss.backward(upstream)
    return loss.detach(), *(leaf.grad for leaf in learned)


def compare_losses(arguments, how, **third):
    exact = run_loss(reference, arguments, lambda t: t.detach().double(), how, **third)
    want, got = (
        run_loss(backend, arguments, lambda t: t.detach().clone(), how, **third) for backend in (reference, triton)
    )
    for g, w, e in zip(got, want, exact):
        assert_as_good(g, w, e)


@diagonal(
    8,
    case=[(*LAYOUTS[0], function) for function in (*FUNCTIONS, COMBINED)]
    + [(*layout, "mse") for layout in LAYOUTS[1:]],
    dtype=DTYPES,
    reduction=["mean", "sum", "none", "elements"],
)
def test_loss_and_gradients(case, dtype, reduction):
    shape, rows, function = case
    compare_losses(loss_arguments(shape, rows, dtype, None, made=True), (function, "none", reduction))


@diagonal(
    case=[(*LAYOUTS[0], dtype) for dtype in DTYPES] + [(*LAYOUTS[k], DTYPES[1]) for k in (3, 4)],
    how=[("none", "sum"), ("row", "mean"), ("row", "none"), ("global", "mean"), ("global", "none")],
    kind=["by the last dimension", "by sample"],
)
def test_masks(case, how, kind):
    shape, rows, dtype = case
    if kind == "by sample":
        mask = torch.rand((shape[0],) + (1,) * (len(shape) - 1), device=DEVICE) + 0.1
    else:
        mask = torch.rand(shape[-1], device=DEVICE) < 0.7
    compare_losses(loss_arguments(shape, rows, dtype, mask), ("mse", *how))


@diagonal(
    3,
    dtype=[torch.bool, torch.int64, torch.float16, torch.uint8, torch.float64],
    strides=["transposed", "every second", "frames"],
)
def test_masks_of_any_type_and_strides(dtype, strides):
    shape, view = {
        "frames": ((2, 1, 4, 5), lambda t: t),
        "transposed": ((5, 4), lambda t: t.t().expand(2, 3, 4, 5)),
        "every second": ((2, 3, 4, 10), lambda t: t[..., ::2]),
    }[strides]
    mask = view((torch.rand(shape, device=DEVICE) < 0.6).to(dtype))  # last, as a comparison lays its result out anew
    compare_losses(loss_arguments((2, 3, 4, 5), (2, 1, 1, 1), torch.float32, mask), ("l1", "row", "mean"))


@diagonal(
    how=[("none", "mean"), ("none", "none"), ("row", "mean"), ("global", "mean"), ("global", "none")],
    layout=[((3, 2, 200), (3, 1, 1)), ((2, 3, 2, 70), (2, 1, 2, 1)), ((2, 128), (1, 1))],
)
def test_rows_of_several_tiles(how, layout, small_tiles):
    shape, rows = layout
    mask = torch.rand(shape, device=DEVICE) if how[0] != "none" else None
    compare_losses(loss_arguments(shape, rows, torch.float32, mask, made=True), ("mse", *how))


@gpu_variants
def test_an_empty_mask():
    prediction, n = random((3, 8)).requires_grad_(), random((3, 8))
    one = torch.ones(3, 1, device=DEVICE)
    mask = torch.ones(3, 8, device=DEVICE)
    mask[1] = 0
    loss = triton.loss(prediction, None, n, None, one, None, one, None, mask, "mse", "row", "none")
    assert loss[1] == 0 and bool((loss[[0, 2]] > 0).all())
    loss.sum().backward()
    assert bool((prediction.grad[1] == 0).all())
    nothing = triton.loss(prediction, None, n, None, one, None, one, None, mask * 0, "mse", "global", "mean")
    assert nothing == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_not_finite_reaches_the_output(value, function):
    arguments = loss_arguments((2, 40), (2, 1), torch.float32, None)
    arguments[0][1, 7] = value
    results = [
        run_loss(backend, arguments, lambda t: t.clone(), (function, "none", "none")) for backend in (triton, reference)
    ]
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@diagonal(2, dtype=[torch.bfloat16, torch.float16, torch.float32])
def test_backward_twice_scaled_and_by_zero(dtype):
    """The gradient written ahead is for one upstream gradient; any other, again, and accumulation must be right too."""
    prediction, n = random((4, 3, 100), dtype).requires_grad_(), random((4, 3, 100))
    one = torch.ones(4, 1, 1, device=DEVICE)

    def loss():
        return triton.loss(prediction, None, n, None, one, None, one, None, None, "mse", "none", "mean")

    exact = 2 * (prediction.detach().double() - n.double()) / n.numel()
    rounded = torch.finfo(dtype).eps / 2 * 1.01  # one rounding to the dtype, and a few in float32
    near = {"rtol": rounded + 4e-7, "atol": torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps}
    first = loss()
    for scale in (1.0, 1.0, 0.0, -3.0, 2.0**10, 1 / 3):
        (g,) = torch.autograd.grad(first * scale, prediction, retain_graph=True)
        torch.testing.assert_close(g.double(), scale * exact, **near)
    for scale in (1 / 3, 1 / 3, 1.0, 0.0, 1.0):  # what came last is assumed next
        (g,) = torch.autograd.grad(loss() * scale, prediction)
        torch.testing.assert_close(g.double(), scale * exact, **near)
    twice = loss()
    twice.backward(retain_graph=True)
    kept = prediction.grad.clone()
    twice.backward()
    torch.testing.assert_close(prediction.grad, 2 * kept)


@gpu_variants
def test_a_gradient_that_is_right_is_not_written_again():
    """Whatever is in it: the kernel looks at the upstream gradient and returns."""
    prediction, n, one = random((2, 64)).requires_grad_(), random((2, 64)), torch.ones(2, 1, device=DEVICE)
    for scale in (1.0, 0.25, 0.25):
        loss = triton.loss(prediction, None, n, None, one, None, one, None, None, "mse", "none", "mean")
        written, used = loss.grad_fn.written[:2]
        assumed = float(used)
        written.fill_(3.0)
        (g,) = torch.autograd.grad(loss * scale, prediction)
        if assumed == scale:
            assert bool((g == 3.0).all())
        else:
            torch.testing.assert_close(g, scale * 2 * (prediction - n).detach() / 128)
    assert assumed == 0.25  # seen once, assumed next


@gpu_variants
@pytest.mark.parametrize("function", ["smooth_l1", "pseudo_huber"])
def test_a_constant_of_nan_reaches_the_output(function):
    """As of a t out of range, where the weight is a number of its own."""
    prediction, n, one = random((2, 64)).requires_grad_(), random((2, 64)), torch.ones(2, 1, device=DEVICE)
    c = torch.tensor([[0.5], [math.nan]], device=DEVICE)
    loss = triton.loss(prediction, None, n, None, one, None, one, c, None, function, "none", "none")
    loss.sum().backward()
    assert loss[0].isfinite() and loss[1].isnan()
    assert prediction.grad[0].isfinite().all() and prediction.grad[1].isnan().all()


def test_double_backward():
    prediction, n, one = random((2, 8)).requires_grad_(), ops.Philox(5), torch.ones(2, 1, device=DEVICE)
    loss = triton.loss(prediction, None, n, None, one, None, one, None, None, "mse", "none", "mean")
    (g,) = torch.autograd.grad(loss, prediction, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), prediction)
    torch.testing.assert_close(h, torch.full_like(h, 2 / 16))


@gpu_variants
def test_a_changed_input_is_noticed_in_backward():
    prediction, n, one = random((2, 8)).requires_grad_(), random((2, 8)), torch.ones(2, 1, device=DEVICE)
    loss = triton.loss(prediction, None, n, None, one, None, one, None, None, "mse", "none", "mean")
    n.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


class Computed(TorchDispatchMode):
    """Collects the names of PyTorch's operations that compute."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in function.name() and "detach" not in function.name():
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


# Of ops.gaussian_kl: whether the variance is learned, half-widths, noise, whether the mean is frozen, whether there are
# weights of the squared error, whether x0 is in the target, reduction.
GAUSSIANS = [
    (True, "none", "made", True, "row", False, "mean"),
    (True, "row", "given", False, "row", True, "none"),
    (False, "none", "given", True, "one", True, "mean"),
    (True, "row", "given", False, "none", True, "none"),
    (False, "one", "made", False, "none", False, "sum"),
    (False, "row", "none", False, "one", False, "mean"),
    (True, "one", "made", True, "none", False, "sum"),
]
WIDTHS = [-1.0, 1 / 255, 0.0, 0.5]


def gaussian_arguments(shape, rows, dtype, how, gathered=None):
    learned, widths, noise, freeze_mean, simple, reads_x0, reduction = how
    learned = learned and len(shape) > 1
    p, q, scale, l_v, weight, simple_weight = (random(rows).abs() * 0.4 + 0.1 for _ in range(6))
    l_0, l_q = (random(rows).clamp(-2, 2) for _ in range(2))
    one, count = torch.ones((1,) * len(shape), device=DEVICE), math.prod(rows)
    half_width = {
        "none": None,
        "one": one * 0.3,
        "row": torch.tensor((WIDTHS * count)[:count], device=DEVICE).view(rows),
    }[widths]
    output = random((shape[0], 2 * shape[1], *shape[2:]) if learned else shape, dtype)
    n = {"made": ops.Philox(5), "given": random(shape, dtype), "none": None}[noise]
    p, q, l_v = p if reads_x0 else None, None if n is None else q, l_v if learned else None
    simple_weight = {"none": None, "one": one * 0.2, "row": simple_weight}[simple]
    rest = (l_0, l_v, l_q, half_width, weight, simple_weight, freeze_mean, reduction)
    return [output, random(shape, dtype), n, p, q, scale, *rest]


def run_gaussian(backend, arguments, convert=lambda t: t.detach().clone()):
    values = [convert(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    values[0].requires_grad_()
    value = backend.gaussian_kl(*values)
    upstream = torch.linspace(0.5, 2, max(1, value.numel())).to(value)[: value.numel()].view_as(value)
    value.backward(upstream)
    return value.detach(), values[0].grad


def compare_gaussians(arguments):
    results = run_gaussian(triton, arguments), run_gaussian(reference, arguments)
    for got, want, exact in zip(*results, run_gaussian(reference, arguments, lambda t: t.detach().double())):
        assert got.dtype == want.dtype and got.shape == want.shape
        # Terms cancel: the scale of the errors is that of the tensor.
        bound = 2 * (want.double() - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert bool(((got.double() - exact).abs() <= bound + torch.finfo(got.dtype).eps * exact.abs()).all())


@diagonal(layout=LAYOUTS, dtype=DTYPES, how=GAUSSIANS)
def test_gaussian_kl_and_gradient(layout, dtype, how):
    compare_gaussians(gaussian_arguments(*layout, dtype, how))


@diagonal(
    3,
    layout=[((3, 2, 200), (3, 1, 1)), ((2, 3, 2, 70), (2, 1, 2, 1)), ((2, 128), (1, 1))],
    how=[(*GAUSSIANS[1][:-1], reduction) for reduction in ("mean", "none", "sum")],
)
def test_gaussian_rows_of_several_tiles(layout, how, small_tiles):
    compare_gaussians(gaussian_arguments(*layout, torch.bfloat16, how))


@diagonal(2, rows=[(3, 1, 1), (1, 1, 1), (3, 5, 1)])
def test_gaussian_rows_that_are_gathered(rows):
    arguments = gaussian_arguments((3, 5, 48), rows, torch.float32, GAUSSIANS[1])
    arguments[-2:] = True, "mean"
    table = torch.rand(7, 9, device=DEVICE) - 0.3
    index = torch.arange(math.prod(rows), device=DEVICE).view(rows) % 7
    plain = list(arguments)
    for column, k in enumerate(range(3, 12)):
        plain[k] = as_tensor(Gathered(table[:, column], index))
        arguments[k] = Gathered(table[:, column], index)
    arguments[10] = plain[10] = random((3, 1, 1)) if rows == (1, 1, 1) else plain[10]  # sums of rows
    if rows == (1, 1, 1):
        rows = (3, 1, 1)
    got, want = (run_gaussian(backend, which) for backend, which in ((triton, arguments), (reference, plain)))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6 * float(w.abs().max()))


@diagonal(1, dtype=[torch.bfloat16, torch.float16, torch.float32])
def test_gaussian_backward_twice_scaled_and_by_zero(dtype):
    arguments = gaussian_arguments((4, 3, 100), (4, 1, 1), dtype, GAUSSIANS[0])
    arguments[0].requires_grad_()
    (exact,) = torch.autograd.grad(reference.gaussian_kl(*arguments), arguments[0])
    loss = triton.gaussian_kl(*arguments)
    for scale in (1.0, 1.0, -3.0, 0.0, 2.0**12):
        (found,) = torch.autograd.grad(loss * scale, arguments[0], retain_graph=True)
        near = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5 * abs(scale) * float(exact.abs().max()) + 1e-7}
        torch.testing.assert_close(found.double(), scale * exact.double(), **near)


@gpu_variants
def test_a_hybrid_loss_is_one_launch_that_reads_and_writes_both_halves_once():
    """In bfloat16, of epsilon with noise that is made again: 4 bytes read and 4 written an element."""
    arguments = gaussian_arguments((4, 2, 512), (4, 1, 1), torch.bfloat16, GAUSSIANS[0])
    elements = 4 * 2 * 512
    arguments[0].requires_grad_()
    with launches() as launched:
        loss = triton.gaussian_kl(*arguments)
    assert launched == ["gaussian_kl"]
    assert 0 < launched[0].read - 4 * elements < 1000 and 0 < launched[0].written - 4 * elements < 100
    with launches() as launched:
        loss.backward()
    assert launched == ["gaussian_kl"] and launched[0].bytes == 8  # compares two numbers
    arguments[0] = arguments[0].detach()
    with launches() as launched:
        triton.gaussian_kl(*arguments)
    assert launched[0].written < 100


def test_a_changed_input_of_gaussian_kl_is_noticed_in_backward():
    arguments = gaussian_arguments((3, 2, 128), (3, 1, 1), torch.float32, GAUSSIANS[1])
    arguments[0].requires_grad_()
    loss = triton.gaussian_kl(*arguments)
    arguments[2].add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.sum().backward()


def test_what_is_not_finite_reaches_a_gaussian_term_and_what_is_left_out_does_not():
    shape, rows = (6, 2, 40), (6, 1, 1)
    for how in (GAUSSIANS[0], GAUSSIANS[1]):
        arguments = gaussian_arguments(shape, rows, torch.float32, (*how[:-1], "none"))
        arguments[0][0, 0, 3], arguments[0][1, 3, 3], arguments[0][2, 1, 5] = math.nan, math.nan, math.inf
        arguments[0][4, :, 7], arguments[0][5, 2, 7] = math.nan, math.nan
        arguments[10][4:], arguments[11][4] = 0, 0  # the second has its squared error still
        results = [run_gaussian(backend, arguments) for backend in (triton, reference)]
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
        value, gradient = results[0]
        assert value.flatten()[4] == 0 and not gradient[4].any()
        assert value.flatten()[5] > 0 and bool(gradient[5].isfinite().all())


@gpu_variants
def test_any_float_of_a_gaussian_term():
    """Of all sizes, against the reference in float64: functions of the kernel itself make them."""
    logs = torch.linspace(-40, 40, 2001, device=DEVICE)
    for half_width in (None, 0.0, 1 / 255, 0.5):
        for d in (0.0, 1e-3, 0.4, -3.0, 100.0):
            output = torch.cat([torch.full_like(logs, d)[:, None], logs[:, None]], 1)
            x0, one = torch.zeros_like(output[:, :1]), torch.ones(1, 1, device=DEVICE)
            width = None if half_width is None else one * half_width
            arguments = [output, x0, None, None, None, one, one * 0, one, one * 0.5, width]
            arguments += [torch.ones(2001, 1, device=DEVICE), None, False, "none"]
            got, want = run_gaussian(triton, arguments), run_gaussian(reference, arguments, lambda t: t.double())
            for g, w in zip(got, want):
                # exp(L) of L up to 40, rounded to 2^-24 of itself; a number below the normal ones may be 0.
                inside = (w.abs() < 1e37) & (w.abs() > 1e-36)
                torch.testing.assert_close(g[inside].double(), w[inside], rtol=2e-5, atol=2e-6)


@gpu_variants
def test_fast_noise_in_gaussian_kl():
    arguments = gaussian_arguments((3, 4, 8, 8), (3, 1, 1, 1), torch.bfloat16, GAUSSIANS[1])
    results = []
    for rng in ("exact", "fast"):
        arguments[2] = ops.Philox(5, offset=0.1, rng=rng)
        results.append(run_gaussian(triton, arguments))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.01)


# Of ops.posterior: xi, n, whether there is a shift, whether n is kept, the dtype of the latents (None: of the moments).
POSTERIORS = [
    ("made", "made", True, False, None),
    ("given", "given", False, False, torch.bfloat16),
    ("made", "none", True, False, torch.float32),
    ("none", "made", False, True, None),
    ("fast", "fast", True, True, torch.float16),
]
OF_MOMENTS = [case for case in LAYOUTS if len(case[0]) > 1]


def posterior_arguments(shape, rows, dtype, how):
    xi, n, shifted, kept, out = how
    rng = "fast" if xi == "fast" else "exact"
    offset = 0.1 if xi == "made" and len(shape) > 2 else 0.0
    given = {"given": random(shape, dtype), "none": None}
    shift, scale, alpha, sigma = (random(rows) for _ in range(4))
    moments = random((shape[0], 2 * shape[1], *shape[2:]), dtype)
    xi = given[xi] if xi in given else ops.Philox(5, 2**33, 7, offset, rng)
    n = given[n] if n in given else ops.Philox(torch.tensor([6], device=DEVICE), 0, 0, offset, rng)
    factors = (None, None) if n is None else (alpha, sigma)
    return [moments, xi, shift if shifted else None, scale, n, *factors, -1.0, 1.5, out or dtype, kept]


def run_posterior(backend, arguments, convert=lambda t: t.detach().clone(), of=(True, True)):
    """z, x_t, n, and the gradient for upstream gradients of those of z and x_t that ``of`` says and that are there."""
    values = [convert(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    if values[0].dtype == torch.float64:
        values[9] = torch.float64
    z, x_t, n = backend.posterior(*values)
    upstream = (torch.arange(z.numel(), device=DEVICE) % 7 - 3).view(z.shape).to(z.dtype)
    d_z, d_x_t = (
        u if out is not None and wanted else None for u, out, wanted in zip((upstream, -upstream), (z, x_t), of)
    )
    return z, x_t, n, backend.posterior_gradient(d_z, d_x_t, *values)


@diagonal(12, layout=OF_MOMENTS, dtype=DTYPES, how=POSTERIORS)
def test_posterior_and_gradient(layout, dtype, how):
    compare_posteriors(posterior_arguments(*layout, dtype, how), RNG_TOLERANCE if how[0] == "fast" else 0.0)


@gpu_variants
def test_the_gradient_of_one_of_both_results():
    arguments = posterior_arguments(*LAYOUTS[0], torch.bfloat16, POSTERIORS[0])
    for of in ((True, False), (False, True)):
        compare_posteriors(arguments, of=of)


def compare_posteriors(arguments, near=0.0, of=(True, True)):
    results = [run_posterior(backend, arguments, of=of) for backend in (triton, reference)]
    for got, want, exact in zip(*results, run_posterior(reference, arguments, lambda t: t.detach().double(), of)):
        if not isinstance(want, torch.Tensor):
            assert got is want
            continue
        assert got.dtype == want.dtype and got.shape == want.shape
        # Sums cancel: the scale of the errors is that of the tensor.
        bound = (
            2 * (want.double() - exact).abs().max() + (8 * torch.finfo(torch.float32).eps + near) * exact.abs().max()
        )
        assert bool(((got.double() - exact).abs() <= bound + torch.finfo(got.dtype).eps * exact.abs()).all())


@diagonal(2, rows=[(3, 1, 1), (1, 1, 1), (3, 5, 1)])
def test_latents_whose_factors_are_gathered(rows):
    arguments = posterior_arguments((3, 5, 48), rows, torch.float32, POSTERIORS[0])
    table, plain = torch.rand(7, 9, device=DEVICE), list(arguments)
    index = torch.arange(math.prod(rows), device=DEVICE).view(rows) % 7
    for k in (5, 6):
        arguments[k] = Gathered(table[:, k], index)
        plain[k] = as_tensor(arguments[k])
    got, want = (run_posterior(backend, which) for backend, which in ((triton, arguments), (reference, plain)))
    for g, w in zip(got, want):
        if isinstance(w, torch.Tensor):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6 * float(w.abs().max()))


@gpu_variants
def test_latents_are_one_launch_that_reads_and_writes_4_bytes_an_element():
    """In bfloat16, with noise that is made: both halves of the moments are read, z and x_t written."""
    arguments = posterior_arguments((4, 2, 512), (4, 1, 1), torch.bfloat16, POSTERIORS[0])
    elements = 4 * 2 * 512
    arguments[0].requires_grad_()
    with launches() as launched:
        z, x_t, _ = triton.posterior(*arguments)
    assert launched == ["posterior"]
    assert 0 < launched[0].read - 4 * elements < 200 and launched[0].written == 4 * elements
    with launches() as launched:
        torch.autograd.grad((z, x_t), arguments[0], (torch.ones_like(z), torch.ones_like(z)))
    assert launched == ["posterior_gradient"]
    assert 0 < launched[0].read - 8 * elements < 200 and launched[0].written == 4 * elements


@diagonal(layout=OF_MOMENTS, dtype=DTYPES, reduction=["mean", "sum", "none"])
def test_kl_normal_and_gradient(layout, dtype, reduction):
    compare_divergences(layout, dtype, reduction)


@diagonal(
    3,
    layout=[((3, 2, 200), (3, 1, 1)), ((2, 3, 2, 70), (2, 3, 1, 1)), ((2, 128), (1, 1)), ((2, 3, 2, 70), (1, 3, 1, 1))],
    reduction=["mean", "none", "sum"],
)
def test_rows_of_a_divergence_of_several_tiles(layout, reduction, small_tiles):
    compare_divergences(layout, torch.bfloat16, reduction)


def compare_divergences(layout, dtype, reduction):
    shape, rows = layout
    moments, weight = random((shape[0], 2 * shape[1], *shape[2:]), dtype), random(rows).abs()
    weight.view(-1)[-1] = 0
    upstream = random(rows if reduction == "none" else ())

    def both(backend, moments, weight, upstream):
        leaf = moments.clone().requires_grad_()
        with launches() as launched:
            value = backend.kl_normal(leaf, weight, -1.0, 1.5, reduction)
            value.backward(upstream)
        assert launched == (["kl_normal", "kl_normal"] if backend is triton else [])
        return value.detach(), leaf.grad

    wide = both(reference, moments.double(), weight.double(), upstream.double())
    for got, want, exact in zip(*(both(b, moments, weight, upstream) for b in (triton, reference)), wide):
        assert got.dtype == want.dtype and got.shape == want.shape
        bound = 2 * (want.double() - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert bool(((got.double() - exact).abs() <= bound + torch.finfo(got.dtype).eps * exact.abs()).all())


@gpu_variants
def test_any_log_variance():
    """Of all sizes, against the reference in float64: functions of the kernel itself make z and the divergence."""
    logs = torch.linspace(-40, 30, 2001, device=DEVICE)
    moments = torch.stack([torch.full_like(logs, 0.3), logs], 1)
    xi, scale = torch.full((2001, 1), 0.7, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    results = []
    for backend, wide in ((triton, torch.float32), (reference, torch.float64)):
        m, x, s = (t.to(wide) for t in (moments, xi, scale))
        arguments = m, x, None, s, None, None, None, -30.0, 20.0, wide, True
        rows = m, torch.ones_like(x), -30.0, 20.0, "none"
        results.append([
            backend.posterior(*arguments)[0], backend.posterior_gradient(torch.ones_like(x), None, *arguments),
            backend.kl_normal(*rows), backend.kl_normal_gradient(torch.ones_like(x), *rows),
        ])  # fmt: skip
    for got, want in zip(*results):
        # 2^x is good to 2 units of 2^-23, its argument to 1 of 2^-24 of itself.
        torch.testing.assert_close(got.double(), want, rtol=1.2e-6, atol=3e-7)


def test_a_training_step_is_three_launches():
    """Noising, loss and backward, with t and the seed given: and no other operation that computes."""
    x0, table = random((3, 4, 8, 8), torch.bfloat16), random((10, 4)).abs()
    seed, t = torch.tensor([7], device=DEVICE), torch.randint(0, 10, (3, 1, 1, 1), device=DEVICE)
    alpha, sigma, p, w = (Gathered(column, t) for column in table.unbind(1))
    for _ in range(2):  # the workspace is made in the first
        prediction = random(x0.shape, torch.bfloat16).requires_grad_()
        torch.use_deterministic_algorithms(False)  # which fills what is empty
        with launches() as launched, Computed() as computed:
            n = ops.Philox(seed)
            x_t, _ = triton.noise(x0, n, alpha, sigma, 0.0, None, False)
            loss = triton.loss(prediction, x0, n, p, alpha, None, w, None, None, "mse", "none", "mean")
            loss.backward()
    assert launched == ["affine", "loss", "loss"]
    # backward() makes the upstream gradient of 1, and the first use of a leaf keeps the gradient as it is.
    assert set(computed.names) <= {"aten::ones_like"}


@diagonal(1, prediction=["v_prediction", "epsilon", "sample"])
def test_noising_with_its_target_is_one_launch(prediction):
    """And a training step with both still three: the target costs no launch, nor does the loss need it."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), prediction)
    x0, t, seed = random((3, 4, 8, 8)), torch.tensor([3, 500, 999], device=DEVICE), torch.tensor([7], device=DEVICE)
    prediction = random(x0.shape).requires_grad_()
    torch.use_deterministic_algorithms(False)  # which fills what is empty
    others = []
    with fastdiff.use_backend("triton"):
        for with_target in (False, False, True):  # first, tables are made
            with launches() as launched, Computed() as computed:
                noised = objective.noise(x0, t, seed=seed, with_target=with_target)
                target = noised.target if with_target else None
                objective.loss(prediction, noised).backward()
            assert launched == ["affine", "loss", "loss"]
            others.append(set(computed.names))
            prediction.grad = None
        looks = {"aten::aminmax", "aten::_local_scalar_dense"}  # at the times, where they are on a CPU
        assert others[1] - looks == others[2] - looks
        assert_same(target, objective.noise(x0, t, seed=seed).target)


@diagonal(
    case=[
        (fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR(5.0), []),
        # One small launch more: all coefficients.
        (fastdiff.RectifiedFlow(), "flow", None, ["coefficients"]),
    ],
    frames=[True, False],
)
def test_an_objective_is_three_launches_and_keeps_no_noise(case, frames):
    process, prediction, weighting, rows = case
    objective = fastdiff.Objective(process, prediction, weighting=weighting)
    x0, t = random((3, 4, 2, 8, 8)), torch.tensor([3, 500, 999], device=DEVICE)
    seed = torch.tensor([7], device=DEVICE)
    if not process.discrete:
        t = t.double() / 1000
    if frames:
        t = torch.stack([t, t.flip(0)], 1).view(3, 1, 2, 1, 1)
    prediction = random(x0.shape).requires_grad_()
    torch.use_deterministic_algorithms(False)  # which fills what is empty
    with fastdiff.use_backend("triton"):
        for _ in range(2):  # first, tables are made
            prediction.grad = None
            with launches() as launched, Computed() as computed:
                noised = objective.noise(x0, t, seed=seed)
                loss = objective.loss(prediction, noised)
                loss.backward()
        assert isinstance(noised.noise_source, ops.Philox)
    assert launched == [*rows, "affine", "loss", "loss"]
    checks = ("aten::aminmax", "aten::_local_scalar_dense")  # on a CPU t is looked at
    others = [name for name in computed.names if not name.startswith(checks)]
    assert Counter(others) == {"aten::ones_like": 1}  # the upstream gradient
    with fastdiff.use_backend("reference"):
        again = prediction.detach().clone().requires_grad_()
        want = objective.noise(x0, t, seed=seed)
        objective.loss(again, want).backward()
    assert_same(noised.x_t, want.x_t)
    torch.testing.assert_close(noised.snr, want.snr, rtol=0, atol=0)
    torch.testing.assert_close(prediction.grad, again.grad)


@diagonal(1, dtype=[torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_noising_and_conversion(dtype):
    a, b, g = (random((2, 3, 8), dtype) for _ in range(3))
    rows = random((2, 1, 1)), random((2, 1, 1))
    calls = [
        lambda backend, a, b: backend.noise(a, b, *rows, 0.0, None, True)[0],
        lambda backend, a, b: backend.convert(a, b, *rows),
    ]
    for call in calls:
        results = []
        for backend in (triton, reference):
            inputs = [a.clone().requires_grad_(), b.clone().requires_grad_()]
            results.append([(out := call(backend, *inputs)), *torch.autograd.grad(out, inputs, g)])
        for got, want in zip(*results):
            assert_same(got, want)


@diagonal(7, layout=LAYOUTS, dtype=DTYPES, both=[True, False, True, True, True])
def test_moments_and_their_gradient(layout, dtype, both):
    """Sums as near to the truth as the reference's; the gradient of all moments to the bit; one launch each."""
    shape, rows = layout
    a, b = random(shape, dtype).requires_grad_(), random(shape, dtype).requires_grad_() if both else None
    arguments = a, b, rows, rows, torch.float32
    with launches() as launched:
        found = triton.row_moments(*arguments)
        kept = [(k, s) for k, s in enumerate(found) if s is not None]
        upstream = [random(rows) if s is not None else None for s in found]
        inputs = [a, b] if both else [a]
        gradients = torch.autograd.grad([s for _, s in kept], inputs, [upstream[k] for k, _ in kept])
    assert launched == ["row_moments", "row_moments_gradient"]
    written = a.nbytes + (b.nbytes if both else 0)
    assert (launched[0].read, launched[1].written) == (written, written)
    wide = [None if x is None else x.detach().double() for x in (a, b)]
    for k, exact in enumerate(reference.row_moments(*wide, rows, rows, torch.float64)):
        if exact is None:
            assert found[k] is None
            continue
        sizes = reference.row_moments(*(x if x is None else x.abs() for x in wide), rows, rows, torch.float64)[k]
        sizes = sizes if k not in (3, 4) or not both else sum(wide[i].abs().amax() for i in (0, 1)) ** 2 * a.numel()
        assert found[k].shape == rows and found[k].dtype == torch.float32
        assert bool(((found[k].double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps * sizes).all())
    want = reference.moments_gradient(upstream, *arguments, True, both)
    for got, exact in zip(gradients, want):
        assert_same(got, exact)


@gpu_variants
def test_the_gradient_of_one_moment_by_one_operand():
    a, b, upstream = random((2, 3, 8)), random((2, 3, 8)), random((2, 1, 1))
    arguments = [None, None, upstream, *[None] * 5], a, b, (2, 1, 1), (2, 1, 1), torch.float32
    d_a, d_b = triton.moments_gradient(*arguments, False, True)
    assert d_a is None
    assert_same(d_b, upstream * (2 * b))


@gpu_variants
def test_moments_of_rows_of_several_tiles(small_tiles):
    a, b = random((2, 3, 200)), random((2, 3, 200))
    for rows in ((2, 1, 1), (1, 3, 1)):
        arguments = rows, rows, torch.float32
        sizes = reference.row_moments(a.abs(), -b.abs(), *arguments)
        for got, want, size in zip(*(f(a, b, *arguments) for f in (triton.row_moments, reference.row_moments)), sizes):
            assert bool(((got - want).abs() <= 4 * torch.finfo(torch.float32).eps * size.abs()).all())


def test_the_gradient_of_each_moment_alone(small_tiles):
    a, b, rows = random((2, 3, 200)), random((2, 3, 200)), (1, 3, 1)
    for k in range(8):
        one = [random((1, 3, 1)) if j == k else None for j in range(8)]
        for needed in ((True, False), (False, True), (True, True)):
            got = triton.moments_gradient(one, a, b, rows, rows, torch.float32, *needed)
            want = reference.moments_gradient(one, a, b, rows, rows, torch.float32, *needed)
            for gradient, exact in zip(got, want):
                assert gradient is None if exact is None else torch.equal(gradient, exact)


@diagonal(
    12,
    shape=[(3, 2, 5), (2, 2, 8, 16), (1, 1)],
    how=[  # clip, noise, whether the variance is learned, what is wanted
        (None, "given", False, (True, True)),
        (0.5, "given", True, (True, False)),
        (0.5, "made", False, (False, True)),
        (None, "none", False, (False, False)),
    ],
    guided=[("number", False), ("tensor", True), ("number", True), ("tensor", False)],
    dtype=DTYPES,
)
def test_step(shape, how, guided, dtype):
    (clip, kind, learned, wanted), (guidance, batched) = how, guided
    x, m, uncond, v, *history = (random(shape, dtype) for _ in range(8))
    row = random((shape[0], len(ops.COLUMNS)) if batched else (len(ops.COLUMNS),))
    guidance = 2.5 if guidance == "number" else random((shape[0], *(1,) * (len(shape) - 1)))
    noise, variance = noise_of(kind, shape, dtype, 20), v if learned else None
    arguments = (x, m, uncond, guidance, row, clip, tuple(history), noise, variance, dtype, wanted)
    wider = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
    wider[6], wider[-2] = tuple(h.double() for h in history), torch.float64
    for got, want, exact in zip(*(triton.step(*arguments), reference.step(*arguments), reference.step(*wider))):
        if want is None or variance is None:  # bit for bit: all but the exponential is IEEE arithmetic
            assert got is None if want is None else torch.equal(got, want)
            continue
        # Terms cancel: the scale of the errors is that of the tensor.
        bound = 2 * (want.double() - exact).abs().max()
        ulps = torch.finfo(got.dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert bool(((got.double() - exact).abs() <= bound + ulps).all())


def test_a_step_of_nothing():
    x, row = random((0, 3)), random((len(ops.COLUMNS),))
    arguments = (x, x, x, 2.5, row, 0.5, (x,), ops.Philox(3), x, torch.float32, (True, True))
    for got, want in zip(triton.step(*arguments), reference.step(*arguments)):
        assert_same(got, want)


@diagonal(dtype=DTYPES, copies=[1, 2], shape=[(3, 2, 5), (2, 2, 8, 16)])
def test_step_writes_the_next_model_input(dtype, copies, shape):
    x, m = random(shape, dtype), random(shape, dtype)
    row = random((len(ops.COLUMNS),))
    results = []
    for backend in (triton, reference):
        seen = torch.full((copies * shape[0], *shape[1:]), torch.nan, dtype=dtype, device=DEVICE)
        arguments = (x, m, None, 1.0, row, 1.0, (), ops.Philox(3, 1, 20), None, dtype, (False, False))
        results.append((backend.step(*arguments, model_input=seen)[0], seen))
    for got, want in zip(*results):
        assert_same(got, want)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape_strides_rows_and_mask(data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    rows = [data.draw(st.sampled_from([1, size])) for size in shape]
    dtype = data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    order = data.draw(st.permutations(range(len(shape))))

    def strided(t):
        return t.permute(*order).contiguous().permute(*[order.index(d) for d in range(len(shape))])

    mask = None
    if data.draw(st.booleans()):
        kept = [data.draw(st.sampled_from([1, size])) for size in shape]
        mask = torch.rand(kept[data.draw(st.integers(0, len(kept) - 1)) :], device=DEVICE) + 0.1
    made = data.draw(st.booleans())
    arguments = loss_arguments(shape, rows, dtype, mask, made)
    arguments[:3] = [strided(t) if isinstance(t, torch.Tensor) else t for t in arguments[:3]]
    how = data.draw(st.sampled_from(["mse", "pseudo_huber"])), data.draw(st.sampled_from(["none", "row"])), "none"
    results = [run_loss(backend, arguments, lambda t: t.detach().clone(), how) for backend in (triton, reference)]
    rounding = torch.finfo(dtype).eps
    for got, want, rtol in zip(*results, (2e-6, rounding + 2e-6, 2e-6)):
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-6 if rtol > 2e-6 else 0, equal_nan=True)
    x0, n = arguments[:2] if not made else (arguments[0], ops.Philox(3))
    alpha, sigma = random(rows), random(rows)
    got, want = (backend.noise(x0, n, alpha, sigma, 0.0, None, True)[0] for backend in (triton, reference))
    assert_same(got, want)


@gpu_variants
def test_channels_last_and_transposed_predictions_are_not_copied(monkeypatch):
    x0 = random((2, 3, 8, 8)).contiguous(memory_format=torch.channels_last)
    n, row = torch.randn_like(x0), random((2, 1, 1, 1)).abs()
    copies = []
    real = torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda t, **how: copies.append(t) if not t.is_contiguous() else real(t, **how)
    )
    x_t, _ = triton.noise(x0, n, row, row, 0.0, None, False)
    prediction = x_t.detach().requires_grad_()
    triton.loss(prediction, x0, n, row, row, None, row, None, None, "mse", "none", "mean").backward()
    assert not copies
    assert x_t.is_contiguous(memory_format=torch.channels_last)
    assert prediction.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x_t, row * x0 + row * n)
    torch.testing.assert_close(prediction.grad, row * 2 * (x_t - row * x0 - row * n) / x0.numel())


@gpu_variants
def test_what_it_does_not_do_the_reference_does():
    prediction, n = random((2, 3, 4)), random((2, 3, 4))
    with fastdiff.use_backend("triton"), launches() as launched:
        gradient = torch.func.grad(lambda m: ops.loss(m, None, n, q=1.0))(prediction)
        torch.testing.assert_close(gradient, 2 * (prediction - n) / n.numel())
        alpha = torch.rand(2, device=DEVICE, requires_grad=True)
        ops.noise(prediction, alpha, 1.0, n)[0].sum().backward()
        torch.testing.assert_close(alpha.grad, prediction.sum((1, 2)))
        x0 = prediction.clone().requires_grad_()
        ops.loss(prediction, x0, n, p=1.0, q=1.0).backward()
        assert x0.grad is not None
        wide = ops.noise(prediction.double(), 1.0, 1.0, n.double())[0]
        assert wide.dtype == torch.float64
        assert ops.noise(torch.empty(2, 3, device="meta"), 1.0, 1.0, ops.Philox(0))[0].device.type == "meta"
    assert launched == []


@gpu_variants
def test_an_objective_from_end_to_end():
    objective = fastdiff.Objective(
        fastdiff.VariancePreserving(), "v_prediction", weighting=fastdiff.MinSNR(5.0), noise_offset=0.1, loss="huber"
    )
    x0, model = random((4, 3, 8, 8)), torch.nn.Conv2d(3, 3, 1).to(DEVICE)
    results = []
    for name in ("triton", "reference"):
        with fastdiff.use_backend(name):
            noised = objective.noise(x0, seed=5, keep_noise=False)
            loss = objective.loss(model(noised.x_t), noised)
            results.append([noised.x_t, noised.t, loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert_same(results[0][0], results[1][0])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_plans_cover_every_element_once():
    """The tiles of a plan, drawn out in Python: every element, in the row and the sample it is of."""
    for shape, rows in [*LAYOUTS, ((2, 3, 4, 5, 6), (2, 1, 4, 1, 1)), ((3, 5000), (3, 1)), ((6, 4, 16), (6, 4, 1))]:
        for tile in (64, 1024):
            for made, sums in ((False, False), (True, True)):
                p = plan.plan(shape, rows, tile, made, False, sums)
                units, runs, blocks, per, frames, shared = p.numbers
                kind, r, c, unit, grid, samples, even, wide = p.constants
                elements, width = math.prod(shape), units * unit
                assert runs * width == elements and p.rows == math.prod(rows)
                index = torch.arange(elements)
                run = index // width
                stretch = run // per
                row = {
                    "one": run * 0,
                    "run": run,
                    "layout": stretch // (frames * shared) * frames + stretch % frames,
                }[kind]
                want = torch.arange(p.rows).reshape(rows).expand(shape).reshape(-1)
                assert torch.equal(row, want)
                if made:
                    assert torch.equal(run // p.sample_runs, index // (elements // shape[0]))
                assert math.prod(p.grid) * r * c >= elements and blocks * c >= width
                assert even == (width % c == 0 and runs % r == 0) and not wide
                if sums and p.parts > 1:
                    assert r == 1 and p.parts * p.rows == runs * blocks


def test_offsets_of_64_bits_where_needed():
    assert not plan.plan((2**10, 2**20), (2**10, 1), 4096).constants[-1]
    large = plan.plan((2**11, 2**20), (2**11, 1), 4096)
    assert large.constants[-1] and large.grid == (256, 2**11)
    assert plan.plan((2**18, 2**14), (2**18, 1), 4096).grid == (2**20, 1)


def test_strides_of_masks():
    assert plan.strided((2, 3, 4), (12, 4, 1)) == (0, (1, 1, 24, 0, 0, 0, 1))
    assert plan.strided((2, 3, 4), (0, 0, 1)) == (2, (1, 6, 4, 0, 0, 0, 1))
    assert plan.strided((2, 3, 4), (0, 0, 0)) == (1, (1, 1, 24, 0, 0, 0, 0))
    assert plan.strided((2, 2, 2, 2, 2), (32, 1, 8, 2, 4)) is None
