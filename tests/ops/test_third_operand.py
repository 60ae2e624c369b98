"""A third operand of the target, p x0 + q n + r y: ops.loss and Objective.loss against NumPy float64."""

import asked
import numpy as np
import pytest
import torch
from accuracy import to_numpy
from devices import pairwise

import fastdiff
from fastdiff import ops
from fastdiff.calls import LossCall

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def batch(dtype=torch.float32, shape=(4, 3, 5, 6)):
    return [torch.randn(shape).to(dtype) for _ in range(4)]


def relative(dtype):
    return 16 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def column(rows):
    return to_numpy(rows)[:, None, None, None]


@pairwise(
    dtype=DTYPES,
    other=DTYPES,
    with_x0=[True, False],
    noise=["given", "made", None],
    function=["mse", "pseudo_huber"],
    masked=[None, "none", "global", "row"],
)
def test_values_and_gradients(dtype, other, with_x0, noise, function, masked):
    if torch.float64 in (dtype, other):
        dtype = other = torch.float64
    prediction, x0, n, y = batch(dtype)
    y = y.to(other)
    p, q, r, w, k = torch.rand(5, 4, dtype=torch.float64) + 0.1
    seeded = ops.Philox(5)
    if noise == "made":
        n = ops.materialize(seeded, prediction.shape, prediction.device)
    target = column(r) * to_numpy(y)
    target = target + column(p) * to_numpy(x0) if with_x0 else target
    target = target + column(q) * to_numpy(n) if noise else target
    e = column(k) * (to_numpy(prediction) - target)
    c = 0.7
    rho = e * e if function == "mse" else np.sqrt(e * e + c * c) - c
    slope = 2 * e if function == "mse" else e / np.sqrt(e * e + c * c)
    mask = (torch.rand(4, 1, 5, 6) < 0.7) if masked else None
    kept = np.broadcast_to(to_numpy(mask) if masked else 1.0, rho.shape)
    counts = kept.sum((1, 2, 3), keepdims=True)
    divisor = {"global": kept.sum() / 4, "row": counts}.get(masked, np.float64(90.0))
    factor = column(w) * kept / divisor / 4
    prediction.requires_grad_()
    loss = ops.loss(
        prediction, x0, seeded if noise == "made" else n, y=y, r=r, p=p if with_x0 else None, q=q if noise else None,
        weight=w, scale=k, c=c, function=function, mask=mask, mask_normalization=masked or "none",
    )  # fmt: skip
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(to_numpy(loss), (factor * rho).sum(), rtol=relative(dtype))
    (gradient,) = torch.autograd.grad(loss, prediction)
    wanted = factor * slope * column(k)
    size = np.abs(wanted).max()
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(to_numpy(gradient), wanted, rtol=eps, atol=size * max(relative(dtype), eps / 8))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 5), (2, 4, 3, 2), (3, 7), (5,)])
def test_r_for_rows_of_any_shape(shape):
    prediction, _, n, y = batch(torch.float64, shape)
    rows = shape[:1] + ((1, shape[2], 1, 1) if len(shape) == 5 else (1,) * (len(shape) - 1))
    r, w = torch.rand(rows, dtype=torch.float64), torch.rand(rows, dtype=torch.float64)
    got = ops.loss(prediction, None, n, q=1.0, y=y, r=r, weight=w)
    torch.testing.assert_close(got, (w * (prediction - n - r * y) ** 2).mean(), rtol=1e-13, atol=0)


def test_in_one_pass_in_any_memory_format(backend):
    prediction, _, n, y = batch(shape=(2, 4, 5, 6))
    r = torch.tensor([0.5, -2.0])
    want = ops.loss(prediction, None, n, q=1.0, y=y, r=r)
    arguments = [t.to(memory_format=torch.channels_last) for t in (prediction, n, y)]
    got = ops.loss(arguments[0], None, arguments[1], q=1.0, y=arguments[2], r=r)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    got = ops.loss(arguments[0], None, n, q=1.0, y=y, r=r)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    one = torch.ones(1, 1, 1, 1)
    call = LossCall(prediction, None, n, None, one, None, one, None, None, y, r.view(2, 1, 1, 1).clone())
    call = call._replace(weight=torch.ones(2, 1, 1, 1))
    assert getattr(asked, backend).supports(call) == (True, "")


def test_what_is_left_out_adds_nothing():
    prediction, _, n, y = batch()
    y[1] = float("nan")
    y[2, :, 0] = float("inf")
    mask = torch.ones(4, 1, 5, 6, dtype=torch.bool)
    mask[2, :, 0] = False
    w = torch.tensor([1.0, 0.0, 1.0, 1.0])
    prediction.requires_grad_()
    loss = ops.loss(prediction, None, n, q=1.0, y=y, r=0.5, weight=w, mask=mask)
    loss.backward()
    assert loss.isfinite() and prediction.grad.isfinite().all() and not prediction.grad[1].any()
    kept = torch.where(mask & (w.view(4, 1, 1, 1) != 0), prediction.detach() - n - 0.5 * y, 0.0)
    torch.testing.assert_close(loss.detach(), (kept.double() ** 2).mean().float())


def test_gradcheck():
    prediction, x0, n, y = (torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(4))
    r = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def loss(prediction, x0, n, y, r):
        return ops.loss(prediction, x0, n, p=0.5, q=1.5, y=y, r=r, function="pseudo_huber", c=0.5)

    assert torch.autograd.gradcheck(loss, (prediction, x0, n, y, r))
    assert torch.autograd.gradgradcheck(loss, (prediction, x0, n, y, r))
    assert torch.autograd.gradcheck(lambda m: loss(m, *(t.detach() for t in (x0, n, y, r))), (prediction,))


def test_compiled():
    prediction, x0, n, y = batch()
    r = torch.rand(4)
    prediction.requires_grad_()

    def step(prediction, x0, n, y, r):
        return ops.loss(prediction, x0, n, p=0.5, q=1.0, y=y, r=r)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (step, compiled):
        loss = call(prediction, x0, n, y, r)
        results.append((loss, *torch.autograd.grad(loss * 3, prediction)))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_an_objective_takes_a_further_term_and_another_target():
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", "cosmap")
    x0, prediction, y, teacher = batch(torch.float64, (3, 2, 4, 4))
    noised = objective.noise(x0, seed=2)
    r = torch.tensor([0.1, -0.5, 0.0], dtype=torch.float64)
    w = noised.weight.view(3, 1, 1, 1)
    flow = noised.noise - x0
    prediction.requires_grad_()
    for got, target in (
        (objective.loss(prediction, noised, y=y, r=r), flow + r.view(3, 1, 1, 1) * y),
        (objective.loss(prediction, noised, y=y), flow + y),
        (objective.loss(prediction, noised, y=y, r=-2.0), flow - 2 * y),
        (objective.loss(prediction, noised, target=teacher), teacher),
        (objective.loss(prediction, noised, target=teacher, y=y, r=r), teacher + r.view(3, 1, 1, 1) * y),
    ):
        want = (w * (prediction - target) ** 2).mean()
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        for a, b in zip(torch.autograd.grad(got, prediction), torch.autograd.grad(want, prediction)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)


def test_an_error_space_counts_for_another_target_too():
    """The error of a prediction of v, taken in x0: sigma (v_teacher - v)."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", error_space="sample")
    x0, prediction, teacher, _ = batch(torch.float64, (3, 2, 4, 4))
    noised = objective.noise(x0, seed=2)
    want = ((noised.sigma.view(3, 1, 1, 1) * (prediction - teacher)) ** 2).mean()
    torch.testing.assert_close(objective.loss(prediction, noised, target=teacher), want, rtol=1e-12, atol=0)


def test_unfit_input():
    prediction, x0, n, y = batch()
    objective = fastdiff.Objective(fastdiff.VariancePreserving())
    noised = objective.noise(x0, seed=1)
    with pytest.raises(ValueError, match="y has shape .*but prediction|prediction has shape .*but y"):
        objective.loss(prediction, noised, y=y[:, :1])
    with pytest.raises(TypeError, match="y must be floating point"):
        objective.loss(prediction, noised, y=y.long())
    with pytest.raises(TypeError, match="y must be a tensor"):
        ops.loss(prediction, x0, n, p=1.0, y=[1.0], r=1.0)
    with pytest.raises(ValueError, match="target has shape|prediction has shape"):
        objective.loss(prediction, noised, target=y[:2])
    with pytest.raises(TypeError, match="target must be a tensor"):
        objective.loss(prediction, noised, target=1.0)
    with pytest.raises(ValueError, match="r has shape"):
        objective.loss(prediction, noised, y=y, r=torch.ones(3))
    with pytest.raises(TypeError, match="r must be"):
        objective.loss(prediction, noised, y=y, r="half")
    with pytest.raises(ValueError, match="pass y"):
        objective.loss(prediction, noised, r=0.5)
