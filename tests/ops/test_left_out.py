"""What is left out adds 0 to the loss and to the gradient, whatever it holds: elements under a mask of 0, rows of
weight 0, rows with nothing in their mask, a batch without anything. On every backend, and compiled."""

import contextlib
import math
import warnings

import pytest
import torch
from asked import native, triton

import fastdiff
from fastdiff import ops

PATHS = ["reference", "native", "native, general way", "triton", "compiled"]
# The interpreter's own: numpy's announcements, and what becomes of infinity and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")
SHAPE = 3, 2, 4, 8


@pytest.fixture(params=PATHS)
def loss(request, monkeypatch):
    """``ops.loss`` on one path."""
    path, name = request.param, request.param.split(",")[0]
    if name in ("native", "triton"):
        because = native.unavailable_because if name == "native" else triton.no_device_because()
        if because:
            pytest.skip(because)
        fastdiff.use_backend(name)
    if path == "native, general way":
        monkeypatch.setattr(native.backend, "fast", None)
    if path == "compiled":
        torch._dynamo.reset()  # else it counts the compilations of one test with those of another
        return torch.compile(ops.loss, backend="aot_eager", fullgraph=True)
    return ops.loss


def data(dtype=torch.float32):
    return [torch.randn(SHAPE).to(dtype) for _ in range(3)]


def run(loss, prediction, x0, n, **how):
    leaf = prediction.clone().requires_grad_()
    result = loss(leaf, x0, n, **how)
    result.sum().backward()
    return result.detach(), leaf.grad


@pytest.mark.parametrize("function", ["mse", "l1", "smooth_l1", "pseudo_huber", "log_cosh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "ways",
    [
        [("none", "mean"), ("none", "none"), ("row", "mean"), ("global", "mean")],
        [("sample", "mean"), ("sample", "none")],
    ],
    ids=["by row", "by sample"],
)
def test_masked_elements_and_rows_of_weight_0(loss, function, dtype, ways):
    """NaN and infinity in each operand and in the scale: the numbers are those of the same with 1 there."""
    mask = torch.rand(SHAPE[0], 1, *SHAPE[2:]) < 0.6
    mask[1, :, 0], mask[2] = False, True
    weight = torch.tensor([1.5, 0.5, 0.0])
    out = ~mask.expand(SHAPE) | (weight == 0).view(3, 1, 1, 1)
    how = {"p": torch.rand(3) + 0.5, "q": torch.rand(3) + 0.5, "c": 0.3, "function": function, "weight": weight}
    operands, scale = data(dtype), torch.tensor([1.0, 2.0, 3.0])
    for normalization, reduction in ways:
        how |= {"mask_normalization": normalization, "reduction": reduction}
        for mask_dtype in (torch.bool, torch.float32):
            how["mask"] = mask.to(mask_dtype)
            clean = [operand.masked_fill(out, 1.0) for operand in operands]
            want, gradient = run(loss, *clean, **how, scale=scale)
            assert want.isfinite().all() and not gradient[out].any() and gradient[~out].any()
            for k, value in ((0, math.nan), (0, math.inf), (1, math.nan), (2, -math.inf), (3, math.inf)):
                dirty = [clean[j].masked_fill(out, value) if j == k else clean[j] for j in range(3)]
                # An infinite scale is a whole row's.
                infinite = torch.where(weight == 0, math.inf, scale) if k == 3 else scale
                got, found = run(loss, *dirty, **how, scale=infinite)
                assert torch.equal(got, want) and torch.equal(found, gradient), (normalization, reduction, k, value)


def test_an_infinite_scale_of_a_row_that_is_masked(loss):
    """As of a clean frame at t = 0, whose error is taken in another space."""
    prediction, x0, n = data()
    mask = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    how = {"p": 1.0, "q": -1.0, "mask": mask, "mask_normalization": "row"}
    want, gradient = run(loss, prediction, x0, n, **how, scale=torch.tensor([1.0, 1.0, 2.0]))
    got, found = run(loss, prediction, x0, n, **how, scale=torch.tensor([1.0, math.inf, 2.0]))
    assert torch.equal(got, want) and torch.equal(found, gradient) and not found[1].any()


@pytest.mark.parametrize("rows", ["sample", "frame"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_rows_with_nothing_in_their_mask_are_left_out_of_the_mean(loss, rows, dtype):
    prediction, x0, n = data()
    mask = torch.rand(SHAPE) < 0.6
    if rows == "sample":
        mask[1], weight, inner = False, torch.tensor([1.0, 2.0, 3.0]), (1, 2, 3)
    else:
        mask[0, :, 2], mask[2] = False, False
        weight, inner = torch.rand(3, 1, 4, 1) + 0.5, (1, 3)
    how = {"q": 1.0, "mask": mask.to(dtype), "mask_normalization": "row", "weight": weight}
    error = (prediction - n).double()
    counts = mask.sum(inner)
    means = torch.where(counts > 0, (error**2 * mask).sum(inner) / counts.clamp(min=1), 0.0) * weight.view(counts.shape)
    result, gradient = run(loss, prediction, None, n, **how)
    kept = (counts > 0).sum()
    torch.testing.assert_close(result.double(), means.sum() / kept, rtol=1e-6, atol=0)
    factor = weight.view(counts.shape) / counts.clamp(min=1) / kept
    wide = factor.view(3, 1, 1, 1) if rows == "sample" else factor.view(3, 1, 4, 1)
    torch.testing.assert_close(gradient.double(), 2 * error * mask * wide, rtol=1e-5, atol=1e-12)
    each, _ = run(loss, prediction, None, n, **how, reduction="none")
    torch.testing.assert_close(each.double().view(counts.shape), means, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(3, 1, 4, 1), (3, 2, 1, 1), (3, 1, 1, 1), (1, 1, 4, 1), (3, 2, 4, 8)], ids=str)
@pytest.mark.parametrize("mask_shape", [SHAPE, (3, 1, 4, 1), (1, 1, 4, 8), (3,), None], ids=str)
def test_samples_are_normalised_by_their_masks(loss, shape, mask_shape):
    """Whatever the rows: a frame, a channel, a sample, shared by the samples, an element."""
    prediction, _, n = data()
    weight = torch.rand(shape) + 0.5
    mask = None if mask_shape is None else torch.rand(mask_shape) < 0.6
    if mask is not None and len(mask_shape) > 1 and mask_shape[0] == 3:
        mask[1] = False
    if mask_shape == (3,):
        mask[:] = torch.tensor([True, False, True])
    how = {"q": 1.0, "mask": mask, "mask_normalization": "sample", "weight": weight}
    error, wide = (prediction - n).double(), torch.ones(SHAPE, dtype=torch.float64)
    if mask is not None:
        wide = mask.reshape(*mask_shape, *(1,) * (4 - len(mask_shape))).double().expand(SHAPE)
    counts = wide.sum((1, 2, 3))
    means = (weight * wide * error**2).sum((1, 2, 3)) / counts.clamp(min=1)
    result, gradient = run(loss, prediction, None, n, **how)
    kept = (counts > 0).sum()
    torch.testing.assert_close(result.double(), means.sum() / kept, rtol=1e-6, atol=0)
    factor = (1 / counts.clamp(min=1) / kept).view(3, 1, 1, 1)
    torch.testing.assert_close(gradient.double(), 2 * error * wide * weight * factor, rtol=1e-5, atol=1e-12)
    each, _ = run(loss, prediction, None, n, **how, reduction="none")
    torch.testing.assert_close(each.double(), means, rtol=1e-6, atol=0)


def test_a_time_a_token_normalised_by_samples():
    """With a row a token, "row" knows tokens only: a sample with few in its mask counts as little as they are."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    x0, p, n = (torch.randn(2, 6, 4) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    noised = objective.noise(x0, torch.rand(2, 6), n)
    error = ((p - (n - x0)) ** 2).mean(2)
    found = {k: objective.loss(p, noised, mask, mask_normalization=k).item() for k in ("row", "sample", "global")}
    assert found["row"] == pytest.approx(error[mask > 0].mean().item(), rel=1e-6)
    assert found["sample"] == pytest.approx((error[0].mean() + error[1, 0]).item() / 2, rel=1e-6)
    each = objective.loss(p, noised, mask, "none", mask_normalization="sample")
    torch.testing.assert_close(each, torch.stack([error[0].mean(), error[1, 0]]))


@pytest.mark.parametrize(
    "how",
    [("none", "mean"), ("row", "mean"), ("global", "mean"), ("row", "none"), ("none", "sum"), ("sample", "mean"),
     ("sample", "none")],
)  # fmt: skip
def test_a_mask_of_zeros_gives_zeros_and_a_warning(loss, how, request):
    prediction, _, n = data()
    options = {"q": 1.0, "mask": torch.zeros(3, 1, 4, 8), "mask_normalization": how[0], "reduction": how[1]}
    compiled = "compiled" in request.node.name  # values are not looked at there
    with contextlib.nullcontext() if compiled else pytest.warns(UserWarning, match="mask is 0 everywhere"):
        result, gradient = run(loss, prediction, None, n, **options)
    assert not result.any() and not gradient.any() and result.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("normalization", ["none", "row"])
def test_a_learned_weight_of_0_still_learns(loss, normalization):
    """Its gradient is the row's error; that of the prediction is 0."""
    prediction, _, n = data()
    mask = torch.rand(SHAPE) < 0.6
    mask[2] = False
    weight = torch.tensor([0.0, 2.0, 1.0], requires_grad=True)
    leaf = prediction.clone().requires_grad_()
    how = {"q": 1.0, "mask": mask, "mask_normalization": normalization}
    loss(leaf, None, n, weight=weight, **how).backward()
    error = ((prediction - n).double() ** 2 * mask).sum((1, 2, 3))
    size = mask.sum((1, 2, 3)).clamp(min=1) if normalization == "row" else torch.full((3,), prediction[0].numel())
    rows = 2 if normalization == "row" else 3
    torch.testing.assert_close(weight.grad.double(), error / size / rows, rtol=1e-6, atol=0)
    assert not leaf.grad[0].any() and leaf.grad[1].any()


def test_infinity_elsewhere_reaches_the_output(loss):
    prediction, _, n = data()
    prediction[1, 0, 0, 0] = math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result, _ = run(loss, prediction, None, n, q=1.0, weight=torch.tensor([0.0, 1.0, 1.0]), reduction="none")
    assert result[0] == 0 and result[1] == math.inf and result[2].isfinite()


@pytest.mark.filterwarnings("ignore:mask is 0 everywhere")
@pytest.mark.parametrize("normalization", ["none", "row", "global", "sample"])
def test_a_mask_that_is_0_everywhere_in_a_batch_that_is_shared(normalization):
    """Of a part, as of a batch: 0, and no gradient."""
    x0, _, m = data()
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    noised = objective.noise(x0, 0.5, seed=1, part=fastdiff.distributed.Part(SHAPE, (0,) * 4))
    loss = objective.loss(m.requires_grad_(), noised, torch.zeros(SHAPE), mask_normalization=normalization)
    (gradient,) = torch.autograd.grad(loss, m)
    assert loss == 0 and bool((gradient == 0).all())
