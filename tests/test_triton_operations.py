"""The Triton backend against the reference, on a GPU or, without one, in Triton's interpreter."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import ops
from fastdiff.backends import reference
from fastdiff.backends.reference import philox
from fastdiff.backends.rows import Gathered

pytest.importorskip("triton")
import triton as jit
import triton.language as tl

from fastdiff.backends.triton import interpreted, launches, plan
from fastdiff.backends.triton import operations as triton
from fastdiff.backends.triton.philox import fma

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if DEVICE.type == "cpu" and not interpreted():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)
# The interpreter's own: numpy's announcements, and what becomes of infinity and of a division by zero.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")
# The largest difference of a fast normal from the exact one: see test_fast_normals.
RNG_TOLERANCE = 1e-3

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FUNCTIONS = ["mse", "l1", "smooth_l1", "pseudo_huber", "log_cosh"]
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


def random(shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


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
    monkeypatch.setattr(triton, "tile_of", lambda elements, itemsize: 64)


@pytest.mark.parametrize("shape", [(1,), (3, 33), (2, 4, 8, 8), (1, 1100), (0, 4), (2, 0)])
def test_normals_and_uniforms_have_the_same_bits(shape):
    for seed, stream, offset in ((0, 0, 0), (-7, 2**32 - 1, 2**33 + 3), (2**62 + 5, 1, 0), (2**64 - 1, 16, 1)):
        device_seed = philox.seed_tensor(seed, DEVICE)
        want = reference.normal(seed, shape, stream, offset)
        for given_seed in (seed, device_seed):
            assert_same_bits(triton.normal(given_seed, shape, stream, offset, device=DEVICE).cpu(), want)
            got = triton.uniform(given_seed, shape[0], stream, offset, DEVICE)
            assert_same_bits(got.cpu(), reference.uniform(seed, shape[0], stream, offset))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "process", [fastdiff.RectifiedFlow(), fastdiff.RectifiedFlow(shift=1.15), fastdiff.EDM()], ids=str
)
def test_rows_of_a_continuous_process_are_one_launch(process, dtype):
    """And have the bits of the process's own float64 formula, rounded once."""
    t = torch.rand(300, dtype=dtype, device=DEVICE)
    t[:2] = torch.tensor([0.0, 1.0])
    objective = fastdiff.Objective(process, "flow" if isinstance(process, fastdiff.RectifiedFlow) else "epsilon")
    x0 = torch.randn(300, 8, device=DEVICE)
    with fastdiff.use_backend("triton"), launches() as launched:
        noised = objective.noise(x0, t, torch.zeros_like(x0))
    assert launched == ["rational", "affine"]
    levels = process.levels(t)
    assert_same_bits(noised.alpha, levels.alpha.float())
    assert_same_bits(noised.sigma, levels.sigma.float())


@jit.jit
def fused(a, b, c, out, EMULATE: tl.constexpr):
    k = tl.arange(0, 16)
    tl.store(out + k, fma(tl.load(a + k), tl.load(b + k), tl.load(c + k), EMULATE))


def test_fused_multiply_add_is_fused():
    """2^-24 is lost where the product is rounded first; so the interpreter's own fma would not do."""
    one = torch.ones(16, device=DEVICE)
    a, c, out = one * (1 + 2**-12), -one * (1 + 2**-11), one * 0
    fused[(1,)](a, a, c, out, interpreted())
    assert torch.equal(out, one * 2**-24)


def test_fast_normals():
    """The fast transform is within RNG_TOLERANCE of the exact one. Both take the same words; what differs most is the
    radius near 0, where the root magnifies an error of 2^-22 in the logarithm to 2^-11."""
    exact = triton.normal(3, (4, 2048), device=DEVICE)
    fast = triton.normal(3, (4, 2048), device=DEVICE, rng="fast")
    assert (fast - exact).abs().max() < RNG_TOLERANCE
    source = ops.Philox(3, rng="fast")
    with fastdiff.use_backend("triton"):
        assert_same_bits(source.tensor((4, 2048), DEVICE), fast)
    with fastdiff.use_backend("reference"):
        assert_same_bits(source.tensor((4, 2048), DEVICE), exact)
    x0, one = random((4, 2048)), torch.ones(4, 1, device=DEVICE)
    x_t, _ = triton.noise(x0, source, one, one, 0.0, None, False)
    torch.testing.assert_close(x_t, x0 + fast)
    got = triton.loss(x0, None, source, None, one, None, one, None, None, "mse", "none", "mean")
    torch.testing.assert_close(got, ((x0 - fast) ** 2).mean())
    with pytest.raises(ValueError, match="exact"):
        ops.Philox(3, rng="quick")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rows"), LAYOUTS)
def test_fast_noise_in_noising_and_loss(shape, rows, dtype):
    """It is made with its factor in it, and without where it is kept: the same noise, but for roundings. (A sum has
    terms up to 7 in size.)"""
    offset = 0.1 if len(shape) > 2 else 0.0
    n, xi = ops.Philox(3, 1, offset=offset, rng="fast"), ops.Philox(3, 1, 2, rng="fast")
    with fastdiff.use_backend("triton"):
        tensor, other = n.tensor(shape, DEVICE), xi.tensor(shape, DEVICE)
    x0, alpha, sigma = random(shape, dtype), random(rows), random(rows)
    near = {"rtol": torch.finfo(dtype).eps, "atol": 7 * 4 * torch.finfo(torch.float32).eps}
    for gamma, made, tensors in ((0.0, None, None), (0.1, xi, other), (0.1, other, other)):
        want, _ = reference.noise(x0, tensor, alpha, sigma, gamma, tensors, False)
        for keep in (False, True):
            got, kept = triton.noise(x0, n, alpha, sigma, gamma, made, keep)
            torch.testing.assert_close(got, want, **near)
            if keep:
                torch.testing.assert_close(kept, tensor, **near)
    p, q, weight = random(rows), random(rows), random(rows).abs()
    prediction = random(shape, dtype)
    for x0_, p_ in ((x0, p), (None, None)):
        results = []
        for source in (n, tensor):
            leaf = prediction.clone().requires_grad_()
            loss = triton.loss(leaf, x0_, source, p_, q, None, weight, None, None, "mse", "none", "sum")
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        (got, d_got), (want, d_want) = results
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(d_got, d_want, rtol=torch.finfo(dtype).eps, atol=float(d_want.abs().max()) * 4e-6)


@pytest.mark.parametrize(("shape", "rows"), LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise(shape, rows, dtype):
    x0, alpha, sigma = random(shape, dtype), random(rows), random(rows)
    sources = [random(shape), random(shape, dtype), ops.Philox(99, 3)]
    if len(shape) > 2:
        sources.append(ops.Philox(-99, 2**40, offset=0.1))
    for n in sources:
        for xi in (None, random(shape, dtype), ops.Philox(99, 3, 2)):
            keep = xi is None
            arguments = (x0, n, alpha, sigma, 0.0 if xi is None else 0.1, xi, keep)
            (got, kept), (want, wanted) = triton.noise(*arguments), reference.noise(*arguments)
            assert_same_bits(got, want)
            if isinstance(wanted, torch.Tensor):
                assert_same_bits(kept, wanted)
            else:
                assert kept is n


@pytest.mark.parametrize(("shape", "rows"), LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_and_target_in_one_launch(shape, rows, dtype):
    x0, n, (alpha, sigma, p, q) = random(shape, dtype), random(shape), (random(rows) for _ in range(4))
    made, xi = ops.Philox(99, 3), ops.Philox(99, 3, 2)
    for source, other, keep in ((n, None, True), (made, None, False), (made, xi, True), (n, xi, True)):
        arguments = (x0, source, alpha, sigma, 0.1 if other else 0.0, other, keep)
        want, kept = reference.noise(*arguments)
        for p_, q_ in ((p, q), (p, None), (None, q)):
            with launches() as launched:
                got, noise, target = triton.noise_and_target(*arguments, p_, q_)
            assert launched == ["affine"]
            assert_same_bits(got, want)
            assert noise is source if not keep else torch.equal(noise, kept)
            rows_ = (row if row is not None else torch.zeros_like(p) for row in (p_, q_))
            assert_same_bits(target, reference.noise(x0, source, *rows_, 0.0, None, False)[0])
    fast = ops.Philox(99, 3, rng="fast")
    with fastdiff.use_backend("triton"):
        tensor = fast.tensor(shape, DEVICE)
    near = {"rtol": torch.finfo(dtype).eps, "atol": 7 * 4 * torch.finfo(torch.float32).eps}
    got, _, target = triton.noise_and_target(x0, fast, alpha, sigma, 0.0, None, False, p, q)
    torch.testing.assert_close(got, reference.noise(x0, tensor, alpha, sigma, 0.0, None, False)[0], **near)
    torch.testing.assert_close(target, reference.noise(x0, tensor, p, q, 0.0, None, False)[0], **near)


def test_target_in_the_memory_format_of_x0_and_with_gradients():
    x0 = random((2, 3, 8, 8)).contiguous(memory_format=torch.channels_last)
    n, row = torch.randn_like(x0), random((2, 1, 1, 1))
    for source in (n, ops.Philox(3)):
        x_t, _, target = triton.noise_and_target(x0, source, row, row, 0.0, None, False, row, row)
        assert_same_bits(x_t, target)
        assert target.is_contiguous(memory_format=torch.channels_last)
    leaf = x0.clone().requires_grad_()
    x_t, _, target = triton.noise_and_target(leaf, n, row, row, 0.0, None, True, 2 * row, row)
    torch.testing.assert_close(torch.autograd.grad((x_t + target).sum(), leaf)[0], (3 * row).expand_as(x0))


@pytest.mark.parametrize("rows", [(3, 1, 1), (3, 5, 1), (1, 1, 1)])
def test_rows_gathered_in_the_kernel(rows):
    """From a column of any stride, by an index of which one is out of range: that row is NaN. Mixed with plain rows,
    and with columns of another table."""
    shape, table, other = (3, 5, 48), random((10, 4)), random((10,))
    index = torch.randint(0, 10, rows, device=DEVICE)
    if index.numel() > 1:
        index.view(-1)[1] = 10
    a, b, elsewhere = Gathered(table[:, 1], index), Gathered(table[:, 3], index), Gathered(other, index)
    x0, n, plain = random(shape), random(shape), random((3, 1, 1)).abs()
    for alpha, sigma in ((a, b), (a, plain), (plain, a), (a, elsewhere)):
        for source in (n, ops.Philox(4)):
            got = triton.noise(x0, source, alpha, sigma, 0.0, None, False)[0]
            want = reference.noise(x0, source, *triton.tensors(alpha, sigma), 0.0, None, False)[0]
            assert_same_bits(got, want)
    weight = plain.expand(rows) if rows != (3, 1, 1) and rows[0] == 3 else random(rows)
    for p, q, w in ((a, b, weight), (a, None, b), (None, b, a)):
        arguments = (x0, n, p, q, None, w, None, None, "mse", "none", "none")
        got = triton.loss(random(shape) * 0 + 1, *arguments)
        p, q, w = triton.tensors(p, q, w)
        want = reference.loss(random(shape) * 0 + 1, x0, n, p, q, None, w, None, None, "mse", "none", "none")
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0, equal_nan=True)


def loss_arguments(shape, rows, dtype, mask, made=False):
    p, q, scale, weight, c = (random(rows).abs() + 0.1 for _ in range(5))
    n = ops.Philox(5) if made else random(shape, dtype)
    return [random(shape, dtype), random(shape, dtype), n, p, q, scale, weight, c, mask]


def run_loss(backend, arguments, convert, how):
    values = [convert(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    values[0], values[6] = values[0].requires_grad_(), values[6].requires_grad_()
    loss = backend.loss(*values, *how)
    upstream = torch.linspace(0.5, 2, max(1, loss.numel())).to(loss)[: loss.numel()].view_as(loss)
    loss.backward(upstream)
    return loss.detach(), values[0].grad, values[6].grad


def compare_losses(arguments, how):
    exact = run_loss(reference, arguments, lambda t: t.detach().double(), how)
    want, got = (run_loss(backend, arguments, lambda t: t.detach().clone(), how) for backend in (reference, triton))
    for g, w, e in zip(got, want, exact):
        assert_as_good(g, w, e)


@pytest.mark.parametrize(
    ("shape", "rows", "function"),
    [(*LAYOUTS[0], function) for function in FUNCTIONS] + [(*layout, "mse") for layout in LAYOUTS[1:]],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients(shape, rows, dtype, function):
    arguments = loss_arguments(shape, rows, dtype, None, made=True)
    for reduction in ("mean", "sum", "none"):
        compare_losses(arguments, (function, "none", reduction))


@pytest.mark.parametrize(
    "how", [("none", "sum"), ("row", "mean"), ("row", "none"), ("global", "mean"), ("global", "none")]
)
@pytest.mark.parametrize(
    ("shape", "rows", "dtype"), [(*LAYOUTS[0], dtype) for dtype in DTYPES] + [(*LAYOUTS[k], DTYPES[1]) for k in (3, 4)]
)
def test_masks(shape, rows, dtype, how):
    for mask in (
        torch.rand(shape[-1], device=DEVICE) < 0.7,
        torch.rand((shape[0],) + (1,) * (len(shape) - 1), device=DEVICE) + 0.1,
    ):
        compare_losses(loss_arguments(shape, rows, dtype, mask), ("mse", *how))


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_masks_of_any_type_and_strides(kind):
    shape = (2, 3, 4, 5)
    for mask in (torch.rand(2, 1, 4, 5), torch.rand(5, 4).t().expand(2, 3, 4, 5), torch.rand(2, 3, 4, 10)[..., ::2]):
        mask = (mask < 0.6).to(DEVICE, kind)
        compare_losses(loss_arguments(shape, (2, 1, 1, 1), torch.float32, mask), ("l1", "row", "mean"))


@pytest.mark.parametrize(
    "how", [("none", "mean"), ("none", "none"), ("row", "mean"), ("global", "mean"), ("global", "none")]
)
def test_rows_of_several_tiles(how, small_tiles):
    for shape, rows in (((3, 2, 200), (3, 1, 1)), ((2, 3, 2, 70), (2, 1, 2, 1)), ((2, 128), (1, 1))):
        mask = torch.rand(shape, device=DEVICE) if how[0] != "none" else None
        compare_losses(loss_arguments(shape, rows, torch.float32, mask, made=True), ("mse", *how))


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
    assert nothing.isnan()


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


@pytest.mark.parametrize("dtype", DTYPES)
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


def test_a_gradient_that_is_right_is_not_written_again():
    """Whatever is in it: the kernel looks at the upstream gradient and returns."""
    prediction, n, one = random((2, 64)).requires_grad_(), random((2, 64)), torch.ones(2, 1, device=DEVICE)
    for scale in (1.0, 0.25, 0.25):
        loss = triton.loss(prediction, None, n, None, one, None, one, None, None, "mse", "none", "mean")
        written, used = loss.grad_fn.gradient
        assumed = float(used)
        written.fill_(3.0)
        (g,) = torch.autograd.grad(loss * scale, prediction)
        if assumed == scale:
            assert bool((g == 3.0).all())
        else:
            torch.testing.assert_close(g, scale * 2 * (prediction - n).detach() / 128)
    assert assumed == 0.25  # seen once, assumed next


def test_double_backward():
    prediction, n, one = random((2, 8)).requires_grad_(), random((2, 8)), torch.ones(2, 1, device=DEVICE)
    loss = triton.loss(prediction, None, n, None, one, None, one, None, None, "mse", "none", "mean")
    (g,) = torch.autograd.grad(loss, prediction, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), prediction)
    torch.testing.assert_close(h, torch.full_like(h, 2 / 16))


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
    # backward() makes the upstream gradient of 1, and the first use of a leaf keeps the gradient as it is
    # (copy_ and set_ are the interpreter's).
    computes = {name for name in computed.names if not name.startswith(("aten::copy_", "aten::set_"))}
    assert computes <= {"aten::ones_like"}


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
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
            others.append({name for name in computed.names if "copy_" not in name and "set_" not in name})
            prediction.grad = None
        assert others[1] == others[2]
        assert_same_bits(target, objective.noise(x0, t, seed=seed).target)


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize(
    ("process", "prediction", "weighting", "rows"),
    [
        (fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR(5.0), []),
        # One small launch more: alpha and sigma. The target and the weights of a flow are the same at all times.
        (fastdiff.RectifiedFlow(), "flow", None, ["rational"]),
    ],
)
def test_an_objective_is_three_launches_and_keeps_no_noise(process, prediction, weighting, rows, frames):
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
    # On a CPU t is looked at; copy_ and set_ are the interpreter's.
    checks = ("aten::aminmax", "aten::_local_scalar_dense", "aten::copy_", "aten::set_")
    others = [name for name in computed.names if not name.startswith(checks)]
    assert Counter(others) == {"aten::ones_like": 1}  # the upstream gradient
    with fastdiff.use_backend("reference"):
        again = prediction.detach().clone().requires_grad_()
        want = objective.noise(x0, t, seed=seed)
        objective.loss(again, want).backward()
    assert_same_bits(noised.x_t, want.x_t)
    torch.testing.assert_close(noised.snr, want.snr, rtol=0, atol=0)
    torch.testing.assert_close(prediction.grad, again.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_noising_and_conversion(dtype):
    a, b, g = (random((2, 3, 8), dtype) for _ in range(3))
    rows = random((2, 1, 1)), random((2, 1, 1))
    calls = [
        lambda backend, a, b: backend.noise(a, b, *rows, 0.0, None, True)[0],
        lambda backend, a, b: backend.convert(a, b, *rows, dtype),
    ]
    for call in calls:
        results = []
        for backend in (triton, reference):
            inputs = [a.clone().requires_grad_(), b.clone().requires_grad_()]
            results.append([(out := call(backend, *inputs)), *torch.autograd.grad(out, inputs, g)])
        for got, want in zip(*results):
            assert_same_bits(got, want)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step(dtype, batched):
    for shape in ((3, 2, 5), (2, 2, 8, 16), (0, 3), (1, 1)):
        x, m, uncond, z, v, *history = (random(shape, dtype) for _ in range(9))
        row = random((shape[0], len(ops.COLUMNS)) if batched else (len(ops.COLUMNS),))
        for guidance in (2.5, random((shape[0], *(1,) * (len(shape) - 1)))):
            for clip, noise, variance, wanted in (
                (None, z, None, (True, True)),
                (0.5, z, v, (True, False)),
                (0.5, ops.Philox(3, 1, 20), None, (False, True)),
                (None, None, None, (False, False)),
            ):
                arguments = (x, m, uncond, guidance, row, clip, tuple(history), noise, variance, dtype, wanted)
                wider = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
                wider[6], wider[-2] = tuple(h.double() for h in history), torch.float64
                for got, want, exact in zip(
                    *(triton.step(*arguments), reference.step(*arguments), reference.step(*wider))
                ):
                    if want is None or variance is None:  # bit for bit: all but the exponential is IEEE arithmetic
                        assert got is None if want is None else torch.equal(got, want)
                        continue
                    # Terms cancel: the scale of the errors is that of the tensor.
                    size = exact.abs().max() if exact.numel() else 0
                    bound = 2 * (want.double() - exact).abs().max() if want.numel() else 0
                    ulps = torch.finfo(got.dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * size
                    assert bool(((got.double() - exact).abs() <= bound + ulps).all())


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_writes_the_next_model_input(dtype, copies):
    for shape in ((3, 2, 5), (2, 2, 8, 16)):
        x, m = random(shape, dtype), random(shape, dtype)
        row = random((len(ops.COLUMNS),))
        results = []
        for backend in (triton, reference):
            seen = torch.full((copies * shape[0], *shape[1:]), torch.nan, dtype=dtype, device=DEVICE)
            arguments = (x, m, None, 1.0, row, 1.0, (), ops.Philox(3, 1, 20), None, dtype, (False, False))
            results.append((backend.step(*arguments, model_input=seen)[0], seen))
        for got, want in zip(*results):
            assert_same_bits(got, want)


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
    assert_same_bits(got, want)


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
    assert_same_bits(results[0][0], results[1][0])
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
