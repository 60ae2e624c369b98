"""Weights of elements beside a mask, against NumPy float64: sum(w m e) over sums of m."""

import numpy as np
import pytest
import torch
from devices import pairwise

import fastdiff
from fastdiff.element_weights import carried

pytestmark = pytest.mark.usefixtures("backend")
SHAPE = (3, 2, 4, 5)
FLOW = fastdiff.RectifiedFlow()
WEIGHTING = fastdiff.SigmaLinear(2.0)  # 1 + 2 sigma, so that rows differ
TIMES = {
    "sample": torch.tensor([0.2, 0.5, 0.9]),
    "frame": torch.tensor([0.1, 0.3, 0.5, 0.9, 0.2, 0.4, 0.6, 0.7, 0.3, 0.8, 0.15, 0.35]).view(3, 1, 4, 1),
    "shared frame": torch.tensor([0.1, 0.3, 0.5, 0.9]).view(1, 1, 4, 1),
}
MASKS = {
    "none": None,
    "floats": lambda: torch.rand(SHAPE),
    "bools": lambda: torch.rand(3, 1, 4, 5) < 0.6,
    "with empty rows": lambda: torch.tensor([1.0, 0.0, 0.5]).view(3, 1, 1, 1) * (torch.rand(3, 1, 4, 5) < 0.8),
    "left": lambda: torch.tensor([0.5, 0.0, 2.0]),
    "of all samples": lambda: torch.tensor([1.0, 0.0, 1.0, 1.0]).view(1, 1, 4, 1),
    "empty": lambda: torch.zeros(SHAPE),
}


def expected(e, w, m, at, normalization, reduction):
    """The loss and its gradient in e, written out. at: the sigma of each element."""
    w, m = (np.broadcast_to(v, e.shape) for v in (w, m))
    own = 1 + 2 * at
    rows = tuple(d for d in range(1, 4) if at.shape[d] == 1)
    if at.shape[0] == 1:
        rows = (0, *rows)
    each = own * w * m * e**2

    def ratio(of, axes):
        sums = m.sum(axes, keepdims=True)
        n = np.prod([e.shape[d] for d in axes])
        sums = np.full_like(sums, n) if normalization == "none" else sums
        return of.sum(axes, keepdims=True) / np.where(sums == 0, 1, sums), sums != 0

    every = (0, 1, 2, 3)
    if reduction == "sum":
        return each.sum()
    if normalization == "global" and reduction == "mean":
        return ratio(each, every)[0].item()
    if normalization == "global":
        return (each.mean(rows) / (m.mean() or 1)).reshape(at.shape)
    values, kept = ratio(each, (1, 2, 3) if normalization == "sample" else rows)
    if reduction == "none":
        return values.reshape(-1) if normalization == "sample" else values.reshape(at.shape)
    return values.sum() / (max(1, kept.sum()) if normalization in ("row", "sample") else kept.size)


@pairwise(
    time=list(TIMES), masked=list(MASKS), normalization=["none", "row", "sample", "global"],
    reduction=["mean", "none", "sum"], dtype=[torch.float32, torch.float64, torch.bfloat16],
    weights=[SHAPE, (3, 1, 4, 5), (1, 2, 4, 5), (1, 2, 1, 5)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:mask is 0 everywhere")
def test_weights_of_elements(time, masked, normalization, reduction, dtype, weights):
    torch.manual_seed(4)
    if reduction == "sum" and normalization != "none":
        normalization = "none"
    x0, n, m = torch.randn(3, *SHAPE).to(dtype)
    t, w = TIMES[time], torch.rand(weights) * 2
    w[..., 0] = 0.0
    mask = MASKS[masked] and MASKS[masked]()
    objective = fastdiff.Objective(FLOW, "flow", WEIGHTING)
    noised, m = objective.noise(x0, t, n), m.requires_grad_()
    got = objective.loss(m, noised, mask, reduction, weight=w, mask_normalization=normalization)
    at = t.double().numpy().reshape(3, 1, 1, 1) if time == "sample" else t.double().numpy()
    kept = np.ones(1) if mask is None else mask.reshape(*mask.shape, *(1,) * (4 - mask.ndim)).double().numpy()
    e = (m.detach().double() - (n.double() - x0.double())).numpy()
    right = expected(e, w.double().numpy(), kept, at, normalization, reduction)
    right = right.reshape(3) if time == "sample" and reduction == "none" else right
    assert got.shape == np.shape(right)
    rel = 1e-6 if dtype != torch.float64 else 2e-7  # of the weights, which are float32 in the first and times in both
    np.testing.assert_allclose(got.detach().double().numpy(), right, rtol=rel)
    # Linear in w m e^2, so the gradient is 2 / e of each element's share.
    (gradient,) = torch.autograd.grad(got.sum(), m)
    shares = np.zeros(SHAPE)
    for place in [(0, 0, 0, 1), (1, 1, 2, 4), (2, 0, 3, 3), (2, 1, 1, 0)]:
        changed = e.copy()
        changed[place] *= 2  # 3 e^2 more
        more = expected(changed, w.double().numpy(), kept, at, normalization, reduction)
        shares[place] = (np.sum(more) - np.sum(right)) * 2 / 3 / e[place]
        np.testing.assert_allclose(
            gradient[place].double().item(), shares[place], rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-9
        )


def test_what_is_left_out_is_left_out():
    """Under a mask of 0 the weight may be anything; under a weight of 0 the output may."""
    objective = fastdiff.Objective(FLOW, "flow")
    x0, n, m = torch.randn(3, *SHAPE)
    noised = objective.noise(x0, torch.tensor([0.2, 0.5, 0.9]), n)
    mask, w = torch.ones(SHAPE), torch.ones(SHAPE)
    mask[..., 0] = 0
    w[..., 1] = 0
    right = objective.loss(m, noised, mask, weight=w, mask_normalization="global")
    w[..., 0] = torch.nan
    m[..., 1] = torch.inf
    m = m.requires_grad_()
    got = objective.loss(m, noised, mask, weight=w, mask_normalization="global")
    assert torch.equal(got, right)
    got.backward()
    assert bool(m.grad.isfinite().all()) and not m.grad[..., :2].any()


@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (1, 1, 1, 1)])
def test_a_weight_of_rows_may_have_all_dimensions(shape):
    """It is one a row, and takes a gradient."""
    objective = fastdiff.Objective(FLOW, "flow")
    x0, n, m = torch.randn(3, *SHAPE)
    noised = objective.noise(x0, torch.tensor([0.2, 0.5, 0.9]), n)
    w = torch.rand(shape).requires_grad_()
    got = objective.loss(m, noised, weight=w)
    rows = objective.loss(m, noised, reduction="none")
    torch.testing.assert_close(got, (rows * w.flatten()).mean(), rtol=1e-6, atol=0)
    got.backward()
    torch.testing.assert_close(w.grad.flatten(), rows / 3 if shape[0] == 3 else rows.mean()[None], rtol=1e-6, atol=0)


def test_the_function_takes_them_too():
    x0, n, m = torch.randn(3, *SHAPE)
    t, w, mask = torch.tensor([0.2, 0.5, 0.9]), torch.rand(SHAPE), torch.rand(SHAPE) < 0.5
    got = fastdiff.diffusion_loss(m, x0, n, t, FLOW, "flow", mask=mask, weight=w, mask_normalization="global")
    right = (w * mask * (m - n + x0) ** 2).double().sum() / mask.sum()
    torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "weight, error, words",
    [
        (torch.ones(SHAPE, requires_grad=True), ValueError, "weights of elements take no gradient"),
        (torch.ones(SHAPE, dtype=torch.bool), TypeError, "must be floating point; got .*A choice is a mask="),
        (torch.ones(3, 1, 4, 6), ValueError, r"weight has shape \(3, 1, 4, 6\), which does not fit \(3, 2, 4, 5\)"),
        (torch.ones(3, 4), ValueError, "weight has shape"),
    ],
    ids=["gradient", "bool", "shape", "rows"],
)
def test_weights_that_mean_nothing(weight, error, words):
    objective = fastdiff.Objective(FLOW, "flow")
    noised = objective.noise(torch.randn(SHAPE), torch.tensor([0.2, 0.5, 0.9]), torch.randn(SHAPE))
    with pytest.raises(error, match=words):
        objective.loss(torch.randn(SHAPE), noised, weight=weight)


@pytest.mark.parametrize("normalization", ["none", "row", "sample", "global"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_a_device(normalization, reduction):
    """On the meta device reading a value raises."""
    x0, w, mask = (torch.empty(SHAPE, device="meta") for _ in range(3))
    noised = fastdiff.Objective(FLOW, "flow").noise(x0, torch.empty(3, device="meta"))
    m = torch.empty(SHAPE, device="meta", requires_grad=True)
    loss = noised.objective.loss(m, noised, mask, reduction, weight=w, mask_normalization=normalization)
    loss.sum().backward()
    assert loss.shape == ((3,) if reduction == "none" else ()) and m.grad.shape == SHAPE


def test_there_is_one_pass_over_the_data():
    """The mask carries the weights: nothing else of full size is made of a map that samples and channels share."""
    w, mask = torch.rand(1, 1, 4, 5), torch.ones(1, 1, 4, 1)
    both, factor = carried(w, mask, "row", "mean", (3, 1, 1, 1), torch.empty(SHAPE), torch.float32)
    assert both.shape == w.shape and factor.shape == (3, 1, 1, 1)
