"""ops.loss: every error function, mask, row layout and reduction against the float64 oracle; gradients by gradcheck."""

import math

import numpy as np
import oracle
import pytest
import torch
from accuracy import to_numpy
from devices import pairwise

from fastdiff import ops

pytestmark = pytest.mark.usefixtures("backend")

FUNCTIONS = {
    "mse": lambda e, c: oracle.loss_mse(e),
    "l1": lambda e, c: oracle.loss_l1(e),
    "smooth_l1": lambda e, c: np.stack([oracle.loss_smooth_l1(row, float(b.item())) for row, b in zip(e, c)]),
    "pseudo_huber": oracle.loss_pseudo_huber,
    "log_cosh": lambda e, c: oracle.loss_log_cosh(e),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def batch(dtype=torch.float32, shape=(4, 3, 5, 6)):
    return (torch.randn(shape).to(dtype) for _ in range(3))


def relative(dtype):
    # Errors of a few float32 (float64) operations on each term; sums are in float64 and add nothing.
    return 16 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values(function, dtype):
    prediction, x0, n = batch(dtype)
    p, q, w, k, c = torch.rand(5, 4, dtype=torch.float64) + 0.1
    rows = {"p": p, "q": q, "weight": w, "scale": k, "c": c, "function": function}
    p_, q_, w_, k_, c_ = (to_numpy(row)[:, None, None, None] for row in (p, q, w, k, c))
    e = k_ * (to_numpy(prediction) - (p_ * to_numpy(x0) + q_ * to_numpy(n)))
    expected = (w_ * FUNCTIONS[function](e, c_)).astype(np.float64)

    per_row = ops.loss(prediction, x0, n, reduction="none", **rows)
    assert per_row.shape == (4,)
    assert per_row.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(to_numpy(per_row), expected.mean((1, 2, 3)), rtol=relative(dtype))
    mean = ops.loss(prediction, x0, n, **rows)
    np.testing.assert_allclose(to_numpy(mean), expected.mean(), rtol=relative(dtype))
    total = ops.loss(prediction, x0, n, reduction="sum", **rows)
    np.testing.assert_allclose(to_numpy(total), expected.sum(), rtol=relative(dtype))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("mask_shape", [(4, 1, 5, 6), (4, 3, 5, 6), (1, 1, 5, 6), (4, 1, 1, 1)])
def test_mask_normalizations(mask_shape, mask_dtype):
    prediction, x0, n = batch(torch.float64)
    mask = (torch.rand(mask_shape) < 0.5).to(mask_dtype)
    mask.view(-1)[0] = 1
    w = torch.rand(4, dtype=torch.float64)
    error = to_numpy(w)[:, None, None, None] * to_numpy((prediction - n) ** 2) * to_numpy(mask)
    counts = np.broadcast_to(to_numpy(mask), (4, 3, 5, 6))

    def loss(**how):
        return to_numpy(ops.loss(prediction, None, n, q=1.0, weight=w, mask=mask, **how))

    np.testing.assert_allclose(loss(), error.mean(), rtol=1e-13)
    np.testing.assert_allclose(loss(mask_normalization="global"), error.sum() / counts.sum(), rtol=1e-13)
    count = counts.sum((1, 2, 3))
    rows = np.where(count > 0, error.sum((1, 2, 3)) / np.where(count > 0, count, 1), 0)
    # An empty row is left out of the mean.
    np.testing.assert_allclose(loss(mask_normalization="row"), rows.sum() / (count > 0).sum(), rtol=1e-13)
    np.testing.assert_allclose(loss(mask_normalization="row", reduction="none"), rows, rtol=1e-13)
    per_row = loss(mask_normalization="global", reduction="none")
    np.testing.assert_allclose(per_row.mean(), error.sum() / counts.sum(), rtol=1e-13)


@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 1), (1, 4), ()])
def test_a_mask_of_fewer_dimensions_is_aligned_at_the_left(shape):
    """As t and weight are: one value a sample, or a step of a sequence, also where other sizes agree."""
    prediction, n = torch.randn(2, 4, 4, 4, 4)
    mask = (torch.arange(math.prod(shape)) % 2).float().reshape(shape) if shape else torch.tensor(0.5)
    wide = mask.reshape(shape + (1,) * (4 - len(shape))).expand(prediction.shape)
    error = (prediction - n).double() ** 2 * wide
    for normalization, want in (("none", error.mean()), ("global", error.sum() / wide.sum())):
        for how in (mask, mask.bool()) if shape else (mask,):
            got = ops.loss(prediction, None, n, q=1.0, mask=how, mask_normalization=normalization)
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_fractional_mask_weighs():
    prediction, _, n = batch(torch.float64)
    mask = torch.rand(4, 1, 5, 6, dtype=torch.float64)
    expected = ((prediction - n) ** 2 * mask).sum() / mask.expand(4, 3, 5, 6).sum()
    got = ops.loss(prediction, None, n, q=1.0, mask=mask, mask_normalization="global")
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    mask = mask * torch.tensor([1e-3, 1e-6, 0.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1)  # sums below 1, and 0
    error = ((prediction - n) ** 2 * mask).sum((1, 2, 3))
    expected = torch.where(error > 0, error / mask.expand(4, 3, 5, 6).sum((1, 2, 3)), 0.0)
    for reduction, want in (("none", expected), ("mean", expected.sum() / 3)):
        got = ops.loss(prediction, None, n, q=1.0, mask=mask, mask_normalization="row", reduction=reduction)
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("rows", [(2,), (2, 4), (2, 4, 3), (2, 1, 3, 1), ()])
def test_rows_per_sample_frame_and_token(rows):
    prediction, x0, n = torch.randn(3, 2, 4, 3, 6, dtype=torch.float64)
    w, p = torch.rand(2, *rows, dtype=torch.float64)
    view = rows if len(rows) == 4 else rows + (1,) * (4 - len(rows))
    error = w.view(view) * (prediction - p.view(view) * x0 - n) ** 2
    got = ops.loss(prediction, x0, n, p=p, q=1.0, weight=w, reduction="none")
    dims = [d for d in range(4) if view[d] == 1] if rows else [1, 2, 3]
    expected = error.mean(dims, keepdim=True)
    torch.testing.assert_close(got, expected.reshape(rows or (2,)), rtol=1e-13, atol=0)
    torch.testing.assert_close(ops.loss(prediction, x0, n, p=p, q=1.0, weight=w), error.mean(), rtol=1e-13, atol=0)


@pairwise(
    function=list(FUNCTIONS),
    how=[
        (masked, reduction)
        for masked in (None, "none", "row", "global")
        for reduction in ("mean", "sum", "none")
        if reduction != "sum" or masked in (None, "none")  # a sum is not normalised
    ],
)
def test_gradcheck(function, how):
    masked, reduction = how
    prediction, x0, n = (torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    p, q, scale, c = torch.rand(4, 3, dtype=torch.float64) + 0.5
    mask = torch.rand(3, 1, 4, dtype=torch.float64) if masked else None

    def loss(prediction, x0, n, weight):
        how = {"mask": mask, "mask_normalization": masked or "none", "reduction": reduction, "function": function}
        return ops.loss(prediction, x0, n, p=p, q=q, weight=weight, scale=scale, c=c, **how)

    assert torch.autograd.gradcheck(loss, (prediction, x0, n, weight))
    if function in ("mse", "pseudo_huber", "log_cosh"):  # twice differentiable
        assert torch.autograd.gradgradcheck(loss, (prediction, x0, n, weight))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_under_torch_func(function):
    """Per-sample gradients (vmap of grad) equal the ordinary ones."""
    prediction, n = torch.randn(2, 3, 4, dtype=torch.float64)

    def loss(m, n):
        return ops.loss(m, None, n, q=1.0, c=0.5, function=function)

    rows = torch.func.vmap(torch.func.grad(loss))(prediction.unsqueeze(1), n.unsqueeze(1)).squeeze(1)
    whole = torch.func.grad(loss)(prediction, n)
    torch.testing.assert_close(rows / 3, whole)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_rounded_once(function, dtype):
    """The gradient in a 16-bit dtype is the float32 one, rounded: the upstream factor is applied before."""
    prediction, x0, n = batch(dtype)
    rows = {"p": torch.rand(4), "q": torch.rand(4), "weight": torch.rand(4) * 100, "c": 0.3, "function": function}

    def gradient(m, scale):
        m = m.detach().requires_grad_()
        (ops.loss(m, x0, n, **rows) * scale).backward()
        return m.grad

    for scale in (1.0, 65536.0, 0.0, -3.0):
        wide = gradient(prediction.float(), scale)
        assert torch.equal(gradient(prediction, scale), wide.to(dtype))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_reach_loss_and_gradient(function, value, dtype):
    prediction, _, n = batch(dtype)
    prediction[1, 0, 0, 0] = value
    prediction.requires_grad_()
    rows = ops.loss(prediction, None, n, q=1.0, c=0.5, function=function, reduction="none")
    assert not rows[1].isfinite() and bool(rows[[0, 2, 3]].isfinite().all())
    rows[1].backward()
    if math.isnan(value):
        assert prediction.grad[1, 0, 0, 0].isnan()
    assert bool(prediction.grad[0].isfinite().all())


@pytest.mark.parametrize("function", ["l1", "smooth_l1", "pseudo_huber", "log_cosh"])
def test_an_infinite_difference_has_an_infinite_error_with_a_slope_of_1(function):
    prediction = torch.tensor([[math.inf, 1.0], [-math.inf, 1.0]], requires_grad=True)
    rows = ops.loss(prediction, None, None, function=function, c=0.5, reduction="none")
    assert rows.tolist() == [math.inf, math.inf]
    (gradient,) = torch.autograd.grad(rows.sum(), prediction)
    assert gradient[:, 0].tolist() == [0.5, -0.5]  # of a mean of two


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_zero_size(shape):
    prediction = torch.zeros(shape, requires_grad=True)
    n = torch.zeros(shape)
    assert ops.loss(prediction, None, n, q=1.0).isnan()  # a mean of nothing, as in PyTorch
    assert ops.loss(prediction, None, n, q=1.0, reduction="sum") == 0
    assert ops.loss(prediction, None, n, q=1.0, reduction="none").shape == shape[:1]
    ops.loss(prediction, None, n, q=1.0, reduction="sum").backward()
    assert prediction.grad.shape == shape


def test_what_p_and_q_leave_out_is_not_read():
    prediction, x0, n = batch()
    x0[:] = math.nan
    assert ops.loss(prediction, x0, n, q=1.0).isfinite()
    assert ops.loss(prediction, None, n, q=1.0).isfinite()


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_any_strides(layout):
    prediction, x0, n = batch()
    change = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    }[layout]
    rows = {"p": torch.rand(4), "q": torch.rand(4), "weight": torch.rand(4)}
    a = [change(x) for x in (prediction, x0, n)]
    b = [x.contiguous() for x in a]
    torch.testing.assert_close(ops.loss(*a, **rows), ops.loss(*b, **rows), rtol=1e-7, atol=0)


def test_same_bits_every_run_and_for_any_thread_count():
    prediction, x0, n = batch(shape=(4, 3, 64, 64))
    rows = {"p": torch.rand(4), "q": torch.rand(4), "weight": torch.rand(4)}
    first = ops.loss(prediction, x0, n, **rows)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert all(torch.equal(first, ops.loss(prediction, x0, n, **rows)) for _ in range(5))
    finally:
        torch.set_num_threads(1)


def test_mixed_dtypes():
    """A bf16 prediction against float32 data and noise, as under autocast: float32 arithmetic, bf16 gradient."""
    prediction, x0, n = batch()
    m = prediction.bfloat16().requires_grad_()
    loss = ops.loss(m, x0, n, p=-1.0, q=1.0)
    torch.testing.assert_close(loss, ((m.float() - (n - x0)) ** 2).mean())
    loss.backward()
    assert m.grad.dtype == torch.bfloat16
