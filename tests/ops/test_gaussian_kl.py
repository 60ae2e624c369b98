"""ops.gaussian_kl: each kind of row against the float64 oracle; gradients by gradcheck; what is left out; errors."""

import math
import warnings

import numpy as np
import oracle
import pytest
import torch
from accuracy import assert_same, to_numpy
from devices import examples, pairwise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff import ops

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BIN = 1 / 255
# By the half-widths of the rows: of one kind, and mixed.
KINDS = {
    "none": None,
    "divergence": [-1.0, -1.0, -1.0, -1.0],
    "density": [0.0, 0.0, 0.0, 0.0],
    "bin": [BIN, BIN, 0.1, 1.0],
    "mixed": [-1.0, 0.0, BIN, 0.1],
}


def relative(dtype, operations=32):
    # Few float32 (float64) operations a term, and exp of numbers up to 4; sums are in float64 and add nothing.
    return operations * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def batch(dtype=torch.float32, shape=(4, 3, 5, 6), learned=True):
    """(output, x0, n): data in [-1, 1], some of it at the ends."""
    output = torch.randn(shape[0], (1 + learned) * shape[1], *shape[2:]).to(dtype)
    x0 = (torch.rand(shape) * 3 - 1.5).clamp(-1, 1).to(dtype)
    return output, x0, torch.randn(shape).to(dtype)


def coefficients(rows=(4,), learned=True, kind="mixed"):
    """Float32 numbers, so that they are the same for every dtype."""
    p, q, scale, weight, simple_weight = (torch.rand(5, *rows) + 0.1).double()
    l_0, l_q = (torch.rand(2, *rows) * 4 - 3).double()
    half_width = None if KINDS[kind] is None else torch.tensor(KINDS[kind]).double().reshape(rows)
    named = {"p": p, "q": q, "scale": scale, "l_0": l_0, "l_q": l_q, "half_width": half_width}
    named |= {"weight": weight, "simple_weight": simple_weight}
    return named | ({"l_v": torch.rand(rows).double() + 0.1} if learned else {})


def truth(output, x0, n, *, p, q, scale, l_0, l_q, half_width, weight, simple_weight, l_v=None):
    """The terms of all elements, from the oracle; rows as the leading dimension."""

    def row(values):
        values = to_numpy(values)
        return oracle.ld(values.reshape(values.shape + (1,) * (x0.ndim - values.ndim)))

    prediction, v = (to_numpy(output), None) if l_v is None else np.split(to_numpy(output), 2, axis=1)
    e = oracle.ld(prediction) - (row(p) * to_numpy(x0) + row(q) * to_numpy(n))
    d = row(scale) * e
    log_variance = row(l_0) if v is None else row(l_0) + row(l_v) * v
    rho = oracle.gaussian_divergence(d, log_variance, row(l_q))
    if half_width is not None:
        h = row(half_width)
        rho = np.where(h == 0, oracle.gaussian_density(d, log_variance), rho)
        bins = oracle.gaussian_bin(d, log_variance, to_numpy(x0), np.abs(h) + (h == 0))
        rho = np.where(h > 0, bins, rho)
    return (row(weight) * rho + row(simple_weight) * e**2).astype(np.float64)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind, dtype, learned):
    given, how = batch(dtype, learned=learned), coefficients(learned=learned, kind=kind)
    expected = truth(*given, **how)
    size = np.abs(expected).mean()
    rows = ops.gaussian_kl(*given, reduction="none", **how)
    assert rows.shape == (4,) and rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(to_numpy(rows), expected.mean((1, 2, 3)), rtol=relative(dtype), atol=relative(dtype))
    mean = ops.gaussian_kl(*given, **how)
    np.testing.assert_allclose(to_numpy(mean), expected.mean(), rtol=0, atol=relative(dtype) * size)
    total = ops.gaussian_kl(*given, reduction="sum", **how)
    np.testing.assert_allclose(to_numpy(total), expected.sum(), rtol=0, atol=relative(dtype) * size * expected.size)


@pytest.mark.parametrize("z", [2.0**-20, -(2.0**-10), 0.25, -0.75, 0.999, 1.0, -1.5, 12.0, -30.0])
def test_a_divergence_of_near_variances_keeps_its_digits(z):
    """exp(z) - 1 - z, about z^2 / 2, would lose all digits of a float32 near 0."""
    zero = torch.zeros(1, 7)
    for learned in (False, True):
        for shift in (0.0, 0.5):
            output = torch.cat([zero, zero + 1], 1) if learned else zero
            by = {"l_0": 0.0, "l_v": shift} if learned else {"l_0": shift}
            found = ops.gaussian_kl(output, None, None, scale=1.0, l_q=shift + z, **by)
            expected = float(oracle.gaussian_divergence(0.0, shift, shift + z)) if abs(z) > 0.5 else None
            expected = expected or sum(z**k / math.factorial(k) for k in range(2, 20)) / 2
            assert float(found) == pytest.approx(expected, rel=4e-7)


def test_a_gradient_of_near_variances_keeps_its_digits():
    output = torch.zeros(1, 2, 4, requires_grad=True)
    ops.gaussian_kl(output, None, None, scale=1.0, l_0=0.5, l_v=1.0, l_q=0.5 + 2.0**-12, reduction="sum").backward()
    assert output.grad[0, 1].tolist() == pytest.approx([-math.expm1(2.0**-12) / 2] * 4, rel=4e-7)
    assert not output.grad[0, 0].any()


# Data in the middle, at both ends, and at what still counts as the middle.
X0 = [-1.0, -0.9995, -0.9985, 0.0, 0.9985, 0.9995, 1.0]


@pytest.mark.parametrize("log_variance", [-12.0, -8.0, -4.0, 0.0, 3.0])
@pytest.mark.parametrize("d", [-0.8, -0.03, -1 / 255, 0.0, 1e-3, 0.03, 0.8])
def test_bins(d, log_variance):
    x0 = torch.tensor([X0])
    expected = oracle.gaussian_bin(np.full((1, 7), np.float64(np.float32(d))), log_variance, to_numpy(x0), 1 / 255)
    prediction = torch.full((1, 7), d)
    found = [
        ops.gaussian_kl(
            prediction[:, k : k + 1], x0[:, k : k + 1], None, scale=1.0, l_0=log_variance, l_q=0.0, half_width=BIN
        )
        for k in range(7)
    ]
    # A, at most 28 where it counts, is off by 8 roundings of 2^-24, and its exponential by as much relative to it.
    np.testing.assert_allclose(to_numpy(torch.stack(found)), expected[0], rtol=28 * 8 * 2**-24, atol=1e-37)


def test_an_improbable_bin_has_the_least_probability_and_no_gradient():
    """1e-12, as in the papers' code."""
    output = torch.tensor([[0.9, 0.0], [0.0, 0.0], [-0.9, 0.0], [1e30, 0.0]], requires_grad=True)
    x0 = torch.tensor([[0.0], [0.0], [1.0], [0.0]])
    how = {"scale": 1.0, "l_0": -12.0, "l_v": 1.0, "l_q": 0.0, "half_width": BIN, "reduction": "none"}
    rows = ops.gaussian_kl(output, x0, None, **how)
    assert rows[[0, 2, 3]].tolist() == pytest.approx([12 * math.log(10)] * 3, rel=1e-6)
    rows.sum().backward()
    assert not output.grad[[0, 2, 3]].any() and output.grad[1, 1] != 0


def test_bins_have_probabilities_that_sum_to_1():
    """Of all 256 values, for any mean and variance."""
    x0 = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1)
    for mean, log_variance in ((0.1, -3.0), (-1.3, -6.0), (0.999, 1.0)):
        how = {"scale": 1.0, "l_0": log_variance, "l_q": 0.0, "half_width": BIN, "reduction": "none"}
        # d is the model's mean less the data.
        logarithms = -ops.gaussian_kl(mean - x0, x0, None, **how)
        assert float(logarithms.exp().sum()) == pytest.approx(1, abs=256e-12)


@pairwise(kind=list(KINDS), learned=[True, False], reduction=["mean", "sum", "none"])
def test_gradcheck(kind, learned, reduction):
    output, x0, n = (t.double() for t in batch(shape=(4, 2, 3), learned=learned))
    how = coefficients(learned=learned, kind=kind)
    names = [name for name, rows in how.items() if rows is not None and name != "half_width"]

    def call(output, x0, n, *rows):
        return ops.gaussian_kl(output, x0, n, **(how | dict(zip(names, rows))), reduction=reduction)

    # Not where data crosses the edge of the outermost bins.
    inputs = [t.requires_grad_() for t in (output, x0 * 0.8, n, *(how[name] for name in names))]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_gradcheck_of_the_width_of_a_bin():
    output, x0, n = (t.double() for t in batch(shape=(4, 2, 3)))
    how = coefficients(kind="bin")
    width = how.pop("half_width").requires_grad_()
    call = lambda width: ops.gaussian_kl(output, x0, n, half_width=width, **how)  # noqa: E731
    assert torch.autograd.gradcheck(call, width) and torch.autograd.gradgradcheck(call, width)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_with_a_frozen_mean(kind):
    """In everything but the prediction, which is a constant."""
    output, x0, n = (t.double() for t in batch(shape=(4, 2, 3)))
    how = coefficients(kind=kind) | {"simple_weight": 0.0}
    prediction, v = output.chunk(2, 1)

    def call(v, scale, l_0):
        given = how | {"scale": scale, "l_0": l_0}
        return ops.gaussian_kl(torch.cat([prediction, v], 1), x0, n, **given, freeze_mean=True)

    inputs = [t.requires_grad_() for t in (v.clone(), how["scale"], how["l_0"])]
    assert torch.autograd.gradcheck(call, inputs) and torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_the_output_alone(kind):
    """The way that kernels take: nothing else requires grad."""
    output, x0, n = (t.double() for t in batch(shape=(4, 2, 3)))
    how = coefficients(kind=kind)
    call = lambda output, **more: ops.gaussian_kl(output, x0, n, **how, **more)  # noqa: E731
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(lambda o, r=reduction: call(o, reduction=r), output.requires_grad_())
    assert torch.autograd.gradgradcheck(call, output)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_mean_is_taught_by_the_squared_error_alone(kind):
    output, x0, n = (t.double() for t in batch())
    how = coefficients(kind=kind)

    def gradient(**more):
        o = output.clone().requires_grad_()
        return torch.autograd.grad(ops.gaussian_kl(o, x0, n, **(how | more)), o)[0].chunk(2, 1)

    frozen, whole, simple = gradient(freeze_mean=True), gradient(), gradient(weight=torch.zeros(4).double())
    torch.testing.assert_close(frozen[0], simple[0])
    torch.testing.assert_close(frozen[1], whole[1])
    assert not simple[1].any() and (frozen[0] - whole[0]).abs().max() > 1e-4
    loss = ops.gaussian_kl(output, x0, n, **how)
    assert_same(ops.gaussian_kl(output, x0, n, **how, freeze_mean=True), loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_gradient_is_rounded_once(kind, dtype):
    """The gradient in a 16-bit dtype is the float32 one, rounded: the upstream factor is applied before."""
    output, x0, n = batch(dtype)
    how = coefficients(kind=kind)

    def gradient(output, scale):
        output = output.detach().requires_grad_()
        (ops.gaussian_kl(output, x0, n, **how) * scale).backward()
        return output.grad

    for scale in (1.0, 65536.0, 0.0, -3.0):
        assert torch.equal(gradient(output, scale), gradient(output.float(), scale).to(dtype))


@pytest.mark.parametrize("kind", ["none", "mixed"])
def test_backward_twice_and_accumulated(kind):
    output, x0, n = batch(torch.float64)
    output.requires_grad_()
    loss = ops.gaussian_kl(output, x0, n, **coefficients(kind=kind))
    (first,) = torch.autograd.grad(loss, output, retain_graph=True)
    for scale in (1.0, -3.0, 0.0, 2.0**16):
        (again,) = torch.autograd.grad(loss * scale, output, retain_graph=True)
        torch.testing.assert_close(again, scale * first)
    many = torch.autograd.grad(loss, output, torch.tensor([1.0, -2.0]).double(), is_grads_batched=True)[0]
    torch.testing.assert_close(many, torch.stack([first, -2 * first]))


@pytest.mark.parametrize("left_out", ["weight", "simple_weight", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_term_of_weight_0_adds_0_whatever_the_row_holds(kind, left_out):
    output, x0, n = batch()
    how = coefficients(kind=kind)
    for name in ("weight", "simple_weight") if left_out == "both" else (left_out,):
        how[name][1:3] = 0
    clean = ops.gaussian_kl(output, x0, n, **how, reduction="none")
    if left_out == "both":
        output[1] = math.nan
        output[2, :3], x0[2], n[2] = math.inf, math.nan, -math.inf
        how["scale"][1], how["l_0"][2], how["l_v"][2] = math.inf, -math.inf, math.nan
    elif left_out == "weight":
        output[1, 3:], how["scale"][2], how["l_0"][1], how["l_q"][2] = math.nan, math.inf, -math.inf, math.nan
    output.requires_grad_()
    rows = ops.gaussian_kl(output, x0, n, **how, reduction="none")
    assert_same(rows, clean)
    (gradient,) = torch.autograd.grad(rows.sum(), output)
    assert bool(gradient.isfinite().all())
    if left_out == "both":
        assert not rows[1:3].any() and not gradient[1:3].any()
    elif left_out == "weight":
        assert not gradient[1:3, 3:].any() and gradient[1:3, :3].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "divergence", "density"])
def test_nan_and_inf_reach_loss_and_gradient(kind, dtype, value):
    for place in ((1, 0, 0, 0), (1, 3, 0, 0)):
        output, x0, n = batch(dtype)
        output[place] = value if place[1] == 0 else -value
        output.requires_grad_()
        rows = ops.gaussian_kl(output, x0, n, **coefficients(kind=kind), reduction="none")
        assert not rows[1].isfinite() and bool(rows[[0, 2, 3]].isfinite().all())
        rows[1].backward()
        if math.isnan(value):
            assert output.grad[place].isnan()
        assert bool(output.grad[0].isfinite().all())


def test_nan_reaches_a_bin():
    for place in ((1, 0, 0, 0), (1, 3, 0, 0)):
        output, x0, n = batch()
        output[place] = math.nan
        rows = ops.gaussian_kl(output.requires_grad_(), x0, n, **coefficients(kind="bin"), reduction="none")
        assert rows.isnan().tolist() == [False, True, False, False]
        rows[1].backward()
        assert output.grad[place].isnan()


def test_a_half_width_of_nan_makes_its_row_nan():
    """So that a t out of range, which makes all of its row's coefficients NaN, is seen."""
    output, x0, n = batch()
    how = coefficients() | {"half_width": torch.tensor([-1.0, math.nan, 0.0, BIN])}
    assert ops.gaussian_kl(output, x0, n, **how, reduction="none").isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", ["none", "mixed"])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_zero_size(shape, kind):
    output = torch.zeros(shape[0], 2 * shape[1], shape[2], requires_grad=True)
    x0 = n = torch.zeros(shape)
    how = {"p": 1.0, "q": 1.0, "scale": 1.0, "l_0": 0.0, "l_v": 1.0, "l_q": 0.0}
    how |= {"half_width": 0.1} if kind == "mixed" else {}
    assert ops.gaussian_kl(output, x0, n, **how).isnan()
    assert ops.gaussian_kl(output, x0, n, **how, reduction="sum") == 0
    assert ops.gaussian_kl(output, x0, n, **how, reduction="none").shape == shape[:1]
    ops.gaussian_kl(output, x0, n, **how, reduction="sum").backward()
    assert output.grad.shape == output.shape


def test_x0_is_read_for_the_target_and_in_rows_of_bins():
    output, x0, n = batch()
    how = coefficients() | {"p": None}
    x0[:2] = math.nan  # rows of the divergence and of the density
    assert ops.gaussian_kl(output, x0, n, **how).isfinite()
    at_end, inside = torch.ones_like(x0), torch.zeros_like(x0)
    assert ops.gaussian_kl(output, at_end, n, **how) != ops.gaussian_kl(output, inside, n, **how)
    x0[2:] = math.inf  # above 0.999, and not in the target
    assert ops.gaussian_kl(output, x0, n, **how) == ops.gaussian_kl(output, at_end, n, **how)
    assert ops.gaussian_kl(output, None, n, **(how | {"half_width": None})).isfinite()
    n[:] = math.nan
    assert ops.gaussian_kl(output, x0, n, **(how | {"q": None})).isfinite()


@pytest.mark.parametrize("rng", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["none", "mixed"])
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 2, 7), (4, 1, 1300)])
def test_noise_that_is_made_again(shape, kind, rng):
    output, x0, _ = batch(shape=shape)
    how = coefficients(kind=kind)
    source = ops.Philox(9, 2**33, offset=0.1 if len(shape) > 2 else 0.0, rng=rng)
    n = ops.materialize(source, shape, output.device)
    results = []
    for noise in (source, n):
        o = output.clone().requires_grad_()
        loss = ops.gaussian_kl(o, x0, noise, **how)
        results.append((loss, *torch.autograd.grad(loss, o)))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "halves of more"])
def test_any_strides(layout):
    output, x0, n = batch()
    how = coefficients()
    change = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        "expanded": lambda x: x[:1].expand(x.shape),
        "halves of more": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    }[layout]
    plain = [change(t).contiguous() for t in (output, x0, n)]
    strided = [change(t) for t in (output, x0, n)]
    results = []
    for o, *others in (plain, strided):
        o = o.detach().requires_grad_()
        loss = ops.gaussian_kl(o, *others, **how, reduction="none")
        results.append((loss, *torch.autograd.grad(loss.sum(), o)))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("rows", [(2,), (2, 4), (2, 4, 3), (2, 1, 3, 1), (1, 4, 1, 1), (1, 1, 1, 1), ()])
def test_rows_per_sample_frame_and_token(rows, learned):
    shape = (2, 4, 3, 6)
    output, x0, n = (t.double() for t in batch(shape=shape, learned=learned))
    view = rows if len(rows) == 4 else rows + (1,) * (4 - len(rows))
    how = coefficients(view, learned, "none") | {"half_width": torch.where(torch.rand(view) < 0.5, -1.0, BIN).double()}
    expected = truth(output, x0, n, **how)
    given = {k: v.reshape(rows) for k, v in how.items()}
    output.requires_grad_()
    got = ops.gaussian_kl(output, x0, n, **given, reduction="none")
    one = math.prod(rows) == 1  # number for all: then a row is a sample
    dims = (1, 2, 3) if one else tuple(d for d in range(4) if view[d] == 1)
    want = expected.mean(dims, keepdims=True)
    np.testing.assert_allclose(to_numpy(got).ravel(), want.ravel(), rtol=1e-12, atol=1e-13)
    assert got.shape == ((2,) if one else rows)
    mean = ops.gaussian_kl(output, x0, n, **given)
    np.testing.assert_allclose(to_numpy(mean), expected.mean(), rtol=1e-12)
    (gradient,) = torch.autograd.grad(mean, output)
    wide = {k: v.expand(shape).contiguous() for k, v in how.items()}
    torch.testing.assert_close(gradient, torch.autograd.grad(ops.gaussian_kl(output, x0, n, **wide), output)[0])


def test_under_torch_func():
    """Per-sample gradients (vmap of grad) equal the ordinary ones."""
    output, x0, n = (t.double() for t in batch(shape=(4, 3)))

    def loss(o, x0, n):
        how = {"p": 0.3, "q": 0.9, "scale": 0.2, "l_0": -3.0, "l_v": 0.3, "l_q": -3.1, "simple_weight": 0.1}
        return ops.gaussian_kl(o, x0, n, **how, half_width=BIN) + ops.gaussian_kl(o, x0, n, **how)

    each = (t.unsqueeze(1) for t in (output, x0, n))
    rows = torch.func.vmap(torch.func.grad(loss))(*each).squeeze(1)
    torch.testing.assert_close(rows / 4, torch.func.grad(loss)(output, x0, n))
    tangent = torch.randn_like(output)
    _, found = torch.func.jvp(lambda o: loss(o, x0, n), (output,), (tangent,))
    torch.testing.assert_close(found, (torch.func.grad(loss)(output, x0, n) * tangent).sum())


@pytest.mark.parametrize("weighted", ["numbers", "weight", "simple_weight"])
def test_the_shape_of_rows_is_that_of_the_weights(weighted):
    output, x0, n = batch(shape=(2, 4, 3))
    how = {"q": 1.0, "scale": 1.0, "l_0": 0.0, "l_v": 1.0, "l_q": 0.0}
    more = {} if weighted == "numbers" else {weighted: torch.rand(2, 4)}
    rows = ops.gaussian_kl(output, None, n, **how, **more, reduction="none")
    assert rows.shape == ((2,) if weighted == "numbers" else (2, 4))
    wide = ops.gaussian_kl(output, None, n, **how, **more, reduction="none", row_shape=(2, 4))
    torch.testing.assert_close(wide.mean(1) if weighted == "numbers" else wide, rows)


@settings(max_examples=examples(1000), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_numbers(data):
    """A float32 term near the oracle's, or where that overflows not finite; a gradient that is finite where the term is
    moderate."""
    number = st.floats(-8, 8, width=32)
    d, v, l_q = (data.draw(number, label=name) for name in ("d", "v", "l_q"))
    half_width = data.draw(st.sampled_from([-1.0, 0.0, BIN, 0.5]))
    x0 = data.draw(st.sampled_from([-1.0, -0.5, 0.25, 1.0]))
    output = torch.tensor([[d, v]], requires_grad=True)
    found = ops.gaussian_kl(
        output, torch.tensor([[x0]]), None, scale=1.0, l_0=0.0, l_v=1.0, l_q=l_q, half_width=half_width
    )
    if half_width > 0:
        expected = oracle.gaussian_bin([[d]], v, np.array([[x0]]), np.float32(half_width))[0, 0]
    else:
        expected = oracle.gaussian_divergence(d, v, l_q) if half_width else oracle.gaussian_density(d, v)
    # Terms of these sizes are added up, of numbers that float32 rounds.
    size = abs(v) + abs(l_q) + 1 + abs(float(expected))
    assert abs(found.item() - float(expected)) <= 3e-6 * size
    found.backward()
    assert bool(output.grad.isfinite().all())


ERRORS = {
    "an odd number of channels": ({"l_v": 1.0, "output": torch.zeros(2, 3, 4)}, ValueError, "as many channels of v"),
    "no channels": ({"l_v": 1.0, "output": torch.zeros(2)}, ValueError, "as many channels of v"),
    "a variance that is not learned": ({"output": torch.zeros(2, 6, 4)}, ValueError, r"x0 has shape .*, but output"),
    "a variance that is not there": ({"l_v": 1.0}, ValueError, "output has shape|the prediction"),
    "a target without x0": ({"x0": None}, ValueError, "x0 is needed"),
    "bins without x0": ({"x0": None, "p": None, "half_width": BIN}, ValueError, "x0 is needed"),
    "a scalar": ({"output": torch.zeros(())}, ValueError, "batch dimension"),
    "another reduction": ({"reduction": "max"}, ValueError, "mean, sum, none"),
    "rows that fit nothing": ({"l_q": torch.zeros(3)}, ValueError, "l_q has shape"),
    "noise of another shape": ({"n": torch.zeros(2, 2, 4)}, ValueError, "noise has shape"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    change, error, words = ERRORS[case]
    zeros = torch.zeros(2, 3, 4)
    good = {"output": zeros, "x0": zeros, "n": zeros, "p": 1.0, "q": 1.0, "scale": 1.0, "l_0": 0.0, "l_q": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.gaussian_kl(**good) == 0
    with pytest.raises(error, match=words):
        ops.gaussian_kl(**(good | change))


def test_compiled_has_the_eager_value_and_gradient():
    output, x0, _ = batch()
    how = coefficients()

    def step(output, seed, weight):
        given = {k: v.float() if v is not None else v for k, v in how.items()} | {"weight": weight}
        return ops.gaussian_kl(output, x0, ops.Philox(seed), **given, freeze_mean=True)

    torch._dynamo.reset()
    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    for k in range(2):
        results = []
        for call in (step, whole):
            o = output.clone().requires_grad_()
            loss = call(o, torch.tensor([k]), how["weight"].float() + k)
            loss.backward()
            results.append((loss.detach(), o.grad))
        for found, expected in zip(*results):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_with_learned_weights(kind):
    """Their gradients, which no operator gives, are traced through the reference."""
    output, x0, n = batch()
    how = coefficients(kind=kind)
    given = {k: v.float() if v is not None else v for k, v in how.items()}
    weights = [given.pop(name).requires_grad_() for name in ("weight", "simple_weight")]

    def call(output, weight, simple_weight):
        return ops.gaussian_kl(output, x0, n, weight=weight, simple_weight=simple_weight, **given)

    torch._dynamo.reset()
    leaves = [output.requires_grad_(), *weights]
    results = [call, torch.compile(call, fullgraph=True, backend="aot_eager")]
    found, expected = ([loss := function(*leaves), *torch.autograd.grad(loss, leaves)] for function in results)
    for got, want in zip(found, expected):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
