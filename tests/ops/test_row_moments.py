"""ops.row_moments: every moment against NumPy's extended precision, rows, strides, gradients; on every backend."""

import math

import numpy as np
import pytest
import torch
from accuracy import assert_rounded, to_numpy
from asked import native, triton
from devices import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import ops
from fastdiff.backends import layout
from fastdiff.codes import MOMENTS, OF_ONE

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# The interpreter's own: numpy's announcements, and what becomes of infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")


@pytest.fixture(params=["reference", "native", "triton", "compiled"])
def moments(request):
    """``ops.row_moments`` on one path."""
    path = request.param
    if path in ("native", "triton"):
        because = native.unavailable_because if path == "native" else triton.no_device_because()
        if because:
            pytest.skip(because)
        fastdiff.use_backend(path)
    if path == "reference":
        fastdiff.use_backend("reference")
    if path == "compiled":
        torch._dynamo.reset()  # else it counts the compilations of one test with those of another
        return torch.compile(ops.row_moments, backend="aot_eager", fullgraph=True)
    return ops.row_moments


def pair(*shape, dtype=torch.float32, grad=False):
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for _ in range(2)]


def elements(a, b):
    """What each moment sums up, by name, in extended precision."""
    a, b = np.asarray(to_numpy(a), np.longdouble), np.asarray(to_numpy(b), np.longdouble)
    s = a - b
    found = {"aa": a * a, "ab": a * b, "bb": b * b, "ss": s * s, "l1": np.abs(s), "b1": np.abs(b), "a": a, "b": b}
    assert tuple(found) == MOMENTS
    return found


def check(found, a, b, rows):
    """``rows``: the shape of the rows as placed."""
    dims = tuple(d for d, size in enumerate(rows) if size == 1)
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    for name, values in elements(a, b).items():
        total = getattr(found, name)
        assert total.dtype == dtype
        expected = values.sum(dims).reshape(total.shape)
        # Roundings of an element, and of the sums within a tile of a GPU; float64 has none to spare for a sum.
        operations = 32 if dtype == torch.float64 else 8
        assert_rounded(total, expected, np.abs(values).sum(dims).reshape(total.shape), operations)
    assert found.count == math.prod(a.shape) // max(1, math.prod(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (2, 4, 64, 64), (5, 1), (1, 9000), (300, 6)])
def test_values(moments, shape, dtype):
    a, b = pair(*shape, dtype=dtype)
    found = moments(a, b)
    assert found.aa.shape == shape[:1]
    check(found, a, b, shape[:1] + (1,) * (len(shape) - 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_b(moments, dtype):
    a, _ = pair(3, 2, 70, dtype=dtype)
    found, both = moments(a), moments(a, torch.zeros_like(a))
    assert found.count == 140
    for name in MOMENTS:
        if name in OF_ONE:
            assert torch.equal(getattr(found, name), getattr(both, name))
        else:
            assert getattr(found, name) is None


def test_a_difference_of_what_is_alike_keeps_its_digits(moments):
    """By aa - 2 ab + bb nothing would be left of it."""
    a = torch.randn(3, 4000) + 100
    b = a + 2.0**-10 * torch.randn(3, 4000)
    exact = ((a.double() - b.double()) ** 2).sum(1)
    found = moments(a, b)
    np.testing.assert_allclose(to_numpy(found.ss), exact, rtol=1e-6)
    cancelled = (found.aa.double() - 2 * found.ab.double() + found.bb.double()) / exact
    assert ((cancelled - 1).abs() > 0.1).any()


@pytest.mark.parametrize(
    "row_shape",
    [None, (2,), (2, 4), (2, 4, 3), (2, 1, 3, 1), (1, 4, 1, 5), (2, 1, 3, 5), (2, 1, 1, 1), (), (2, 4, 3, 5)],
)
def test_rows(moments, row_shape):
    a, b = pair(2, 4, 3, 5)
    found = moments(a, b, row_shape=row_shape)
    shape = (2,) if row_shape is None else row_shape
    assert found.ss.shape == shape
    check(found, a, b, shape if len(shape) == 4 else shape + (1,) * (4 - len(shape)))


def test_rows_that_alternate_too_often(moments):
    a, b = pair(2, 3, 4, 2, 3)
    rows = (2, 1, 4, 1, 3)
    assert layout.layout_of((2, 3, 4, 2, 3), rows)[1] != rows
    check(moments(a, b, row_shape=rows), a, b, rows)


@pytest.mark.parametrize("row_shape", [(3,), (4, 2), (2, 4, 1), (1, 2, 3, 5), (2, 4, 3, 5, 1)])
def test_rows_that_do_not_fit(row_shape):
    with pytest.raises(ValueError, match=r"row_shape has shape .*, which fits no rows of \(2, 4, 3, 5\)"):
        ops.row_moments(*pair(2, 4, 3, 5), row_shape=row_shape)


def test_a_scalar_has_no_rows():
    with pytest.raises(ValueError, match="a must have a batch dimension; got a scalar"):
        ops.row_moments(torch.tensor(1.0))


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "with gaps": lambda x: torch.cat([x, x], 3)[..., ::2],
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row_shape", [(2,), (2, 1, 3, 1), (1, 3, 1, 4)])
def test_any_strides(moments, layout, row_shape):
    a, b = pair(2, 3, 3, 4, grad=True)
    strided = LAYOUTS[layout](a)
    found = moments(strided, b, row_shape=row_shape)
    check(found, strided, b, row_shape if len(row_shape) == 4 else (2, 1, 1, 1))
    check(moments(b, strided, row_shape=row_shape), b, strided, row_shape if len(row_shape) == 4 else (2, 1, 1, 1))
    gradients = torch.autograd.grad(total(found), (a, b))
    whole = strided.detach().contiguous().requires_grad_()
    d_strided, d_b = torch.autograd.grad(total(moments(whole, b, row_shape=row_shape)), (whole, b))
    (d_a,) = torch.autograd.grad(strided, a, d_strided)
    for gradient, expected in zip(gradients, (d_a, d_b)):
        torch.testing.assert_close(gradient, expected)


def total(found):
    """All moments in one number, each with a factor of its own, alternating by row."""
    sums = [getattr(found, name) for name in MOMENTS]
    assert all(s is not None for s in sums)
    signs = 1 - 2 * (torch.arange(found.aa.numel()) % 2).to(found.aa).view(found.aa.shape)
    return sum((k + 1) / 8 * (s * signs).sum() for k, s in enumerate(sums))


def test_same_bits_every_run_and_for_any_thread_count(moments):
    # The interpreter takes its time, and has no threads.
    shape = (2, 2100) if fastdiff.backends.choose("cpu") == "triton" else (4, 3, 64, 65)
    a, b = pair(*shape, grad=True)

    def run():
        found = moments(a, b)
        return [getattr(found, name) for name in MOMENTS] + list(torch.autograd.grad(total(found), (a, b)))

    first = run()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for _ in range(2):
                assert all(map(torch.equal, first, run()))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4)])
def test_zero_size(moments, shape):
    a, b = pair(*shape, grad=True)
    found = moments(a, b)
    assert found.count == math.prod(shape[1:])
    for name in MOMENTS:
        assert torch.equal(getattr(found, name), torch.zeros(shape[:1]))
    assert torch.equal(moments(a).l1, torch.zeros(shape[:1]))
    total(found).backward()
    assert a.grad.shape == b.grad.shape == shape


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16),
                                    (torch.float16, torch.bfloat16), (torch.float64, torch.bfloat16)])  # fmt: skip
def test_mixed_dtypes(moments, dtypes):
    a, b = (x.to(dtype).requires_grad_() for x, dtype in zip(pair(3, 70), dtypes))
    found = moments(a, b)
    check(found, a, b, (3, 1))
    total(found).backward()
    assert (a.grad.dtype, b.grad.dtype) == dtypes


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_reach_the_sums_of_their_row(moments, value, dtype):
    a, b = pair(3, 50, dtype=dtype)
    a[1, 7] = value
    found = moments(a, b)
    for name in MOMENTS:
        sums = getattr(found, name)
        assert bool(sums[[0, 2]].isfinite().all())
        expected = {"ss": value**2, "aa": value**2, "l1": abs(value), "a": value}
        if name in expected:
            torch.testing.assert_close(sums[1].item(), expected[name], equal_nan=True)
        elif name != "ab":
            assert sums[1].isfinite()
        else:
            assert not sums[1].isfinite()


@pytest.mark.parametrize("both", [True, False])
def test_gradcheck(moments, both):
    a, b = pair(3, 2, 4, dtype=torch.float64, grad=True)
    for row_shape in ((3,), (3, 1, 4)):

        def sums(*given, row_shape=row_shape):
            found = moments(*given, row_shape=row_shape)
            return tuple(s for name in MOMENTS if (s := getattr(found, name)) is not None)

        given = (a, b) if both else (a,)
        assert torch.autograd.gradcheck(sums, given)


def test_second_derivatives():
    a, b = pair(3, 4, dtype=torch.float64, grad=True)
    for name in ("reference", "native"):
        if name != "native" or not native.unavailable_because:
            with fastdiff.use_backend(name):
                assert torch.autograd.gradgradcheck(lambda a, b: ops.row_moments(a, b)[:8], (a, b))


SLOPES = {  # of each moment, by a and by b
    "aa": lambda a, b: (2 * a, 0 * b),
    "ab": lambda a, b: (b, a),
    "bb": lambda a, b: (0 * a, 2 * b),
    "ss": lambda a, b: (2 * (a - b), 2 * (b - a)),
    "l1": lambda a, b: (np.sign(a - b), np.sign(b - a)),
    "b1": lambda a, b: (0 * a, np.sign(b)),
    "a": lambda a, b: (a * 0 + 1, 0 * b),
    "b": lambda a, b: (0 * a, b * 0 + 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(moments, dtype):
    """Of one moment alone and of all, rounded once."""
    a, b = pair(3, 2, 70, dtype=dtype, grad=True)
    with torch.no_grad():
        b[:, :, :9] = a[:, :, :9]  # where abs has a corner
    factors = dict(zip(MOMENTS, torch.randn(8, 3, dtype=torch.float64)))
    wide = [np.asarray(to_numpy(x), np.longdouble) for x in (a, b)]
    for names in [*((name,) for name in MOMENTS), MOMENTS]:
        found = moments(a, b)
        scalar = sum((getattr(found, name) * factors[name].to(found.aa.dtype)).sum() for name in names)
        gradients = torch.autograd.grad(scalar, (a, b), allow_unused=True, materialize_grads=True)
        for k, gradient in enumerate(gradients):
            rounded = {name: to_numpy(factors[name].to(found.aa.dtype))[:, None, None] for name in names}
            terms = [rounded[name] * SLOPES[name](*wide)[k] for name in names]
            assert gradient.dtype == dtype
            assert_rounded(gradient, sum(terms), sum(map(np.abs, terms)), operations=10)


@pytest.mark.parametrize("which", [0, 1])
def test_the_gradient_of_one_operand(moments, which):
    both, one = pair(3, 2, 70, grad=True), None
    one = [x if k == which else x.detach() for k, x in enumerate(both)]
    (alone,) = torch.autograd.grad(total(moments(*one)), both[which])
    assert torch.equal(alone, torch.autograd.grad(total(moments(*both)), both)[which])


def test_a_moment_without_a_gradient_adds_nothing(moments):
    """The product of 0 and infinity would be NaN."""

    def slopes(name):
        a, b = torch.tensor([[math.inf, 1.0, 2.0]], requires_grad=True), torch.tensor([[1.0, math.inf, 2.0]])
        b.requires_grad_()
        of_one = lambda a, b: getattr(ops.row_moments(a, b), name).sum()  # noqa: E731
        if moments is not ops.row_moments:  # what a compiled program returns gets a gradient of 0
            of_one = torch.compile(of_one, backend="aot_eager", fullgraph=True)
        d_a, d_b = torch.autograd.grad(of_one(a, b), (a, b), allow_unused=True, materialize_grads=True)
        return d_a[0].tolist(), d_b[0].tolist()

    assert slopes("l1") == ([1.0, -1.0, 0.0], [-1.0, 1.0, 0.0])
    assert slopes("b1") == ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    assert slopes("a") == ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    assert slopes("aa") == ([math.inf, 2.0, 4.0], [0.0, 0.0, 0.0])


def test_the_slope_at_nan_is_nan(moments):
    a = torch.tensor([[math.nan, 1.0]], requires_grad=True)
    b = torch.tensor([[0.5, math.nan]], requires_grad=True)
    d_a, d_b = torch.autograd.grad(moments(a, b).l1.sum(), (a, b))
    assert d_a.isnan().all() and d_b.isnan().all()
    (d_b,) = torch.autograd.grad(moments(a, b).b1.sum(), b)
    assert d_b[0, 1].isnan()


def test_several_gradients_at_once(moments):
    a, b = pair(3, 5, grad=True)
    found = moments(a, b)
    upstream = torch.randn(4, 3)
    batched = torch.autograd.grad(found.ss, (a, b), upstream, is_grads_batched=True, retain_graph=True)
    for k in range(4):
        for many, one in zip(batched, torch.autograd.grad(found.ss, (a, b), upstream[k], retain_graph=True)):
            torch.testing.assert_close(many[k], one)


def test_under_torch_func():
    """Per-sample gradients (vmap of grad) equal the ordinary ones."""
    a, b = pair(3, 4, dtype=torch.float64)

    def loss(a, b):
        return ops.row_moments(a, b).ss.sqrt().sum()

    rows = torch.func.vmap(torch.func.grad(loss))(a.unsqueeze(1), b.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(rows, torch.func.grad(loss)(a, b))


@pytest.mark.skipif(not native.available, reason="the reference keeps copies in float64, which nobody writes into")
def test_writing_into_an_operand_before_the_backward_raises():
    a, b = pair(3, 4, grad=True)
    found = ops.row_moments(a, b)
    with torch.no_grad():
        a.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.ss.sum().backward()


def test_a_result_can_be_written_into(moments):
    """Each is memory of its own."""
    a, b = pair(3, 4)
    found, expected = moments(a, b), moments(a, b)
    found.ss.add_(1)
    assert torch.equal(found.ss, expected.ss + 1)
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in MOMENTS if name != "ss")


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_rows_and_dtypes(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    if data.draw(st.booleans()):
        shape = (*shape[:-1], shape[-1] * 97)
    full = data.draw(st.booleans())
    kept = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    leading = data.draw(st.integers(0, len(shape)))
    row_shape = tuple(s if k else 1 for s, k in zip(shape, kept)) if full else shape[:leading]
    rows = row_shape if full else row_shape + (1,) * (len(shape) - leading)
    a, b = (torch.randn(shape).to(data.draw(st.sampled_from(DTYPES))) for _ in range(2))
    backend = data.draw(st.sampled_from(["reference", *([] if native.unavailable_because else ["native"])]))
    with fastdiff.use_backend(backend):
        check(ops.row_moments(a, b, row_shape=row_shape), a, b, rows)
