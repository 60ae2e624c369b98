"""Losses by element, against NumPy, and against the other reductions of the same loss."""

import math

import numpy as np
import oracle
import pytest
import torch
from accuracy import assert_rounded, assert_same, to_numpy
from devices import in_turn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import losses, ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FUNCTIONS = {
    "mse": lambda e, c: oracle.loss_mse(e),
    "l1": lambda e, c: oracle.loss_l1(e),
    "smooth_l1": lambda e, c: np.stack([oracle.loss_smooth_l1(row, float(b.item())) for row, b in zip(e, c)]),
    "pseudo_huber": oracle.loss_pseudo_huber,
    "log_cosh": lambda e, c: oracle.loss_log_cosh(e),
}


def rows_of(*shape, count=5, dtype=torch.float64):
    return torch.rand(count, *shape, dtype=dtype) + 0.1


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(everywhere, function, dtype):
    """With a third operand, a scale, weights and a mask of numbers; one row, and some elements, are left out."""
    prediction, x0, n, y = (torch.randn(4, 3, 5, 6).to(dtype) for _ in range(4))
    (p, q, r, w, k), c = rows_of(4), rows_of(4, count=1)[0]
    w[2] = 0
    mask = torch.rand(4, 1, 5, 6) * (torch.rand(4, 1, 5, 6) < 0.7)
    got = ops.loss(
        prediction, x0, n, p=p, q=q, y=y, r=r, weight=w, scale=k, c=c, mask=mask, function=function,
        reduction="elements",
    )  # fmt: skip
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.shape == prediction.shape and got.dtype == compute
    p, q, r, w, k, c = (to_numpy(row.to(compute))[:, None, None, None] for row in (p, q, r, w, k, c))
    e = k * (to_numpy(prediction) - (p * to_numpy(x0) + q * to_numpy(n) + r * to_numpy(y)))
    error = FUNCTIONS[function](e, c)
    truth = (w * to_numpy(mask) * error).astype(np.float64)
    sizes = k * (
        np.abs(to_numpy(prediction)) + p * np.abs(to_numpy(x0)) + q * np.abs(to_numpy(n)) + r * np.abs(to_numpy(y))
    )
    # Roundings of e change the error by its slope, which is at most 2 |e|, or 1.
    slope = 2 * np.abs(e) if function == "mse" else np.ones_like(e)
    terms = truth + w * to_numpy(mask) * (slope * sizes + (np.abs(e) if function == "log_cosh" else 0))
    assert_rounded(got, truth, terms, operations=8)
    assert bool((got[2] == 0).all()) and bool((got[mask.expand_as(got) == 0] == 0).all())


def arguments(dtype=torch.float32, rows=(4,), shape=(4, 3, 5, 6), **more):
    prediction, x0, n = (torch.randn(shape).to(dtype) for _ in range(3))
    p, q, w, k, c = rows_of(*rows, dtype=torch.float32)
    how = {
        "p": p,
        "q": q,
        "weight": w,
        "scale": k,
        "c": c,
        "mask": torch.rand(shape[0], *(1,) * (len(shape) - 2), shape[-1]),
    }
    return prediction, x0, n, how | more


@in_turn(
    function=list(FUNCTIONS),
    dtype=DTYPES,
    rows=[
        ((4,), (4, 3, 5, 6)),
        ((4, 3), (4, 3, 5, 6)),
        ((2, 1, 3, 1, 1), (2, 4, 3, 2, 5)),
        ((1, 1), (8, 40)),
        ((6, 4), (6, 4)),
    ],
)
def test_their_sums_are_the_other_reductions(everywhere, function, dtype, rows):
    """In float64; and the gradient of a sum or a weighted sum of rows, to the bit."""
    prediction, x0, n, how = arguments(dtype, *rows, function=function)
    leaf = prediction.requires_grad_()
    elements = ops.loss(leaf, x0, n, reduction="elements", **how)
    total, mean, by_row = (ops.loss(leaf, x0, n, reduction=name, **how) for name in ("sum", "mean", "none"))
    near = {"rtol": 1e-13 if dtype == torch.float64 else 2e-6, "atol": 0}
    wide = elements.detach().double()
    torch.testing.assert_close(wide.sum(), total.detach().double(), **near)
    torch.testing.assert_close(wide.mean(), mean.detach().double(), **near)
    # Of one number for all, a row is a sample.
    shared = prediction.shape[:1] if math.prod(rows[0]) == 1 else rows[0]
    placed = (*shared, *(1,) * (prediction.ndim - len(shared)))
    dims = [d for d, size in enumerate(placed) if size == 1]
    means = wide.mean(dims) if dims else wide
    torch.testing.assert_close(means.flatten(), by_row.detach().double().flatten(), **near)

    (of_sum,) = torch.autograd.grad(total * 0.3, leaf, retain_graph=True)
    (of_elements,) = torch.autograd.grad((elements * 0.3).sum(), leaf, retain_graph=True)
    assert_same(of_elements, of_sum)
    # Whatever memory the upstream gradient is in.
    each = torch.rand(placed).to(elements.dtype)
    (by_rows,) = torch.autograd.grad(elements, leaf, each.expand_as(elements), retain_graph=True)
    (whole,) = torch.autograd.grad(elements, leaf, each.expand_as(elements).contiguous(), retain_graph=True)
    assert_same(by_rows, whole)
    upstream = torch.randn(prediction.shape).to(elements.dtype)
    (first,) = torch.autograd.grad(elements, leaf, upstream, retain_graph=True)
    turned = upstream.transpose(0, -1).contiguous().transpose(0, -1)
    (second,) = torch.autograd.grad(elements, leaf, turned)
    assert_same(first, second)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients(everywhere, function, dtype):
    """For an upstream gradient of each element: as the reference's in float64, rounded once."""
    prediction, x0, n, how = arguments(dtype, function=function)
    upstream = torch.randn(4, 3, 5, 6)
    leaf = prediction.detach().requires_grad_()
    ops.loss(leaf, x0, n, reduction="elements", **how).backward(upstream)
    wide = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in how.items()}
    exact = prediction.detach().double().requires_grad_()
    with fastdiff.use_backend("reference"):
        ops.loss(exact, x0.double(), n.double(), reduction="elements", **wide).backward(upstream.double())
    unit = torch.finfo(dtype).eps / 2 + 24 * torch.finfo(torch.float32).eps
    # At the corner of smooth L1 and where terms cancel, e's own rounding counts, which is of the size of the terms.
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=unit, atol=2e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(backend, function):
    prediction, x0, n = (torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    p, q, scale, c = torch.rand(4, 3, dtype=torch.float64) + 0.5
    mask = torch.rand(3, 1, 4, dtype=torch.float64)

    def loss(prediction, x0, n, weight):
        rows = {"p": p, "q": q, "weight": weight, "scale": scale, "c": c, "mask": mask}
        return ops.loss(prediction, x0, n, function=function, reduction="elements", **rows)

    inputs = prediction, x0, n, weight
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradcheck(lambda m: loss(m, x0.detach(), n.detach(), weight.detach()), prediction)
    if function in ("mse", "pseudo_huber", "log_cosh"):  # twice differentiable
        assert torch.autograd.gradgradcheck(loss, inputs)


def test_what_is_left_out_adds_0_whatever_it_holds(everywhere):
    prediction, x0, n, how = arguments(function="pseudo_huber")
    prediction[1], n[2, 0, 0, 0], prediction[3, :, :, 2] = math.nan, math.inf, math.nan
    how["weight"][1], how["mask"] = 0, how["mask"].expand(4, 1, 5, 6).clone()
    how["mask"][2, :, 0, 0], how["mask"][3, :, :, 2] = 0, 0
    leaf = prediction.requires_grad_()
    elements = ops.loss(leaf, x0, n, reduction="elements", **how)
    elements.backward(torch.full_like(elements, 2.0))
    assert bool(elements.isfinite().all()) and bool(leaf.grad.isfinite().all())
    for left_out in (elements[1], elements[3, :, :, 2], leaf.grad[1], leaf.grad[3, :, :, 2]):
        assert bool((left_out == 0).all())
    kept = elements[0]
    assert bool((kept > 0).all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is(everywhere, value):
    prediction, x0, n, how = arguments(function="l1")
    prediction[1, 0, 2, 3] = value
    elements = ops.loss(prediction, x0, n, reduction="elements", **how)
    assert (~elements.isfinite()).nonzero().tolist() == [[1, 0, 2, 3]]


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "gaps", "expanded"])
def test_any_strides(everywhere, layout):
    """The errors lie as a prediction without gaps does."""
    prediction, x0, n, how = arguments()
    change = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
        "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
        "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    }[layout]
    a = [change(x) for x in (prediction, x0, n)]
    upstream, found = torch.randn(4, 3, 5, 6), []
    for inputs, of_upstream in (
        (a, upstream),
        (a, change(upstream) if layout != "expanded" else upstream),
        ([x.contiguous() for x in a], upstream),
    ):
        leaf = inputs[0].detach().requires_grad_()
        elements = ops.loss(leaf, *inputs[1:], reduction="elements", **how)
        found.append((elements, *torch.autograd.grad(elements, leaf, of_upstream)))
    for elements, gradient in found[:2]:
        assert_same(elements, found[2][0])
        assert_same(gradient, found[2][1])
    if layout in ("channels_last", "transposed") and everywhere.startswith("native"):
        assert found[0][0].stride() == a[0].stride() == found[0][1].stride()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_zero_size(everywhere, shape):
    prediction = torch.zeros(shape, requires_grad=True)
    elements = ops.loss(prediction, None, torch.zeros(shape), q=1.0, reduction="elements")
    assert elements.shape == shape
    elements.sum().backward()
    assert prediction.grad.shape == shape


@pytest.mark.parametrize("function", FUNCTIONS)
def test_under_torch_func(backend, function):
    """Per-sample gradients (vmap of grad), and a Jacobian's product, equal the ordinary ones."""
    prediction, n, upstream = torch.randn(3, 3, 4, dtype=torch.float64)

    def loss(m, n, upstream):
        return (upstream * ops.loss(m, None, n, q=1.0, c=0.5, function=function, reduction="elements")).sum()

    batched = (x.unsqueeze(1) for x in (prediction, n, upstream))
    rows = torch.func.vmap(torch.func.grad(loss))(*batched).squeeze(1)
    torch.testing.assert_close(rows, torch.func.grad(loss)(prediction, n, upstream))
    leaf = prediction.clone().requires_grad_()
    elements = ops.loss(leaf, None, n, q=1.0, c=0.5, function=function, reduction="elements")
    many = torch.randn(2, 3, 4, dtype=torch.float64)
    (several,) = torch.autograd.grad(elements, leaf, many, is_grads_batched=True, retain_graph=True)
    for k in range(2):
        torch.testing.assert_close(several[k], torch.autograd.grad(elements, leaf, many[k], retain_graph=True)[0])


# ---- of an objective

FLOW = fastdiff.Objective(fastdiff.RectifiedFlow(shift=3.0), "flow", "cosmap", loss="huber", error_space="sample")
OBJECTIVES = {
    "min-SNR": fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", "min_snr"),
    "flow in the space of x0": FLOW,
    "scheduled Huber": fastdiff.Objective(
        fastdiff.RectifiedFlow(), "flow", loss=losses.PseudoHuber(0.1, "scaled", "snr")
    ),
}


def of_batch(objective, x0, m, t=None, **how):
    options = {name: how.pop(name) for name in ("tokens", "lengths") if name in how}
    noised = objective.noise(x0, t, seed=3, **options)
    leaf = m.detach().clone().requires_grad_()
    return leaf, {name: objective.loss(leaf, noised, reduction=name, **how) for name in ("elements", "sum", "none")}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("weights", ["none", "rows", "elements"])
def test_an_objective(everywhere, name, weights):
    """The sum, and its gradient, of those of the objective; with times of frames, too."""
    x0, m = torch.randn(2, 2, 3, 4, 5, 6)
    for t in (None, torch.tensor([[3], [500]]).expand(2, 3)):
        t = t if t is None or OBJECTIVES[name].process.discrete else t / 1000
        how = {"mask": torch.rand(2, 3, 1, 5, 6) < 0.7}
        if weights != "none":
            how["weight"] = torch.rand(2 if t is None else (2, 3)) if weights == "rows" else torch.rand(2, 1, 4, 5, 1)
        leaf, found = of_batch(OBJECTIVES[name], x0, m, t, **how)
        assert found["elements"].shape == x0.shape
        torch.testing.assert_close(found["elements"].double().sum(), found["sum"].double(), rtol=2e-6, atol=0)
        rows = found["elements"].double().mean((2, 3, 4))
        rows = rows.mean(1) if t is None else rows
        torch.testing.assert_close(rows, found["none"].double(), rtol=2e-6, atol=0)
        assert bool((found["elements"][(~how["mask"]).expand_as(x0)] == 0).all())
        gradients = [torch.autograd.grad(found[k].sum(), leaf, retain_graph=True)[0] for k in ("elements", "sum")]
        assert_same(*gradients)


@pytest.mark.parametrize("order", ["c p q", "p q c"])
def test_tokens(everywhere, order):
    """The errors are tokens, as the prediction is: those of the unpacked batch, packed."""
    tokens, (x0, m) = fastdiff.Tokens(2, order), torch.randn(2, 2, 3, 4, 6)
    how = {"mask": torch.rand(2, 1, 4, 6) < 0.8}
    whole, unpacked = of_batch(FLOW, x0, m, **how)
    packed, found = of_batch(FLOW, x0, tokens.pack(m), tokens=tokens, **how)
    assert found["elements"].shape == packed.shape
    assert_same(found["elements"], tokens.pack(unpacked["elements"]))
    upstream = torch.randn(x0.shape)
    (of_tokens,) = torch.autograd.grad(found["elements"], packed, tokens.pack(upstream), retain_graph=True)
    (of_whole,) = torch.autograd.grad(unpacked["elements"], whole, upstream)
    assert_same(of_tokens, tokens.pack(of_whole))
    gradients = [torch.autograd.grad(found[k].sum(), packed, retain_graph=True)[0] for k in ("elements", "sum")]
    assert_same(*gradients)


def test_packed_sequences(everywhere):
    """The errors of each sequence are those that it has alone."""
    lengths, (x0, m) = [3, 0, 5, 1], torch.randn(2, 9, 4)
    how = {"mask": torch.rand(9, 1) < 0.8}
    leaf, found = of_batch(FLOW, x0, m, lengths=lengths, **how)
    torch.testing.assert_close(found["elements"].double().sum(), found["sum"].double(), rtol=2e-6, atol=0)
    upstream = torch.randn(9, 4)
    (gradient,) = torch.autograd.grad(found["elements"], leaf, upstream, retain_graph=True)
    start = 0
    noised = FLOW.noise(x0, seed=3, lengths=lengths)
    for k, length in enumerate(lengths):
        part, start = slice(start, start + length), start + length
        if not length:
            continue
        alone = FLOW.noise(x0[None, part], noised.t[k : k + 1], seed=3, sample_offset=k)
        own = m[None, part].clone().requires_grad_()
        elements = FLOW.loss(own, alone, how["mask"][None, part], "elements")
        assert_same(found["elements"][part], elements[0])
        assert_same(gradient[part], torch.autograd.grad(elements, own, upstream[None, part])[0][0])
    gradients = [torch.autograd.grad(found[k].sum(), leaf, retain_graph=True)[0] for k in ("elements", "sum")]
    assert_same(*gradients)


def test_other_targets_and_functions(everywhere):
    x0, m, target, y = torch.randn(4, 2, 3, 4)
    noised = FLOW.noise(x0, torch.tensor([0.2, 0.7]), seed=3)
    how = {"target": target, "y": y, "r": torch.tensor([0.5, -1.0])}
    elements = FLOW.loss(m, noised, reduction="elements", **how)
    torch.testing.assert_close(elements.double().mean(), FLOW.loss(m, noised, **how).double(), rtol=2e-6, atol=0)
    t, n = torch.tensor([0.2, 0.7]), torch.randn(2, 3, 4)
    of_function = fastdiff.diffusion_loss(m, x0, n, t, FLOW.process, "flow", reduction="elements")
    torch.testing.assert_close(of_function, (m - (n - x0)) ** 2, rtol=1e-6, atol=1e-6)


class Computed(TorchDispatchMode):
    """Collects the names of PyTorch's operations that compute, or allocate."""

    def __init__(self):
        super().__init__()
        self.computed, self.made = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "empty" in function.name():
            self.made += result.numel() >= 96
        elif not function.is_view and "detach" not in function.name():
            self.computed.append(function.name())
        return result


@pytest.mark.parametrize("everywhere", ["native", "native, no fast calls", "triton"], indirect=True)
@pytest.mark.parametrize("upstream", ["a mean's", "rows'", "elements'"])
def test_one_pass_forward_and_one_backward(everywhere, upstream):
    """Nothing of full size is computed or made by PyTorch but the errors and the gradient."""
    prediction, n, w = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(2, 1, 1, 1)
    given = {"a mean's": torch.tensor(0.5), "rows'": torch.rand(2, 1, 1, 1), "elements'": torch.rand(2, 3, 4, 4)}
    given = given[upstream].expand(2, 3, 4, 4)
    leaf = prediction.requires_grad_()
    with Computed() as forward:
        elements = ops.loss(leaf, None, n, q=1.0, weight=w, reduction="elements")
    with Computed() as backward:
        torch.autograd.grad(elements, leaf, given)
    assert forward.made == backward.made == 1, (forward.made, backward.made)
    assert not [name for name in backward.computed if "copy" in name or "mul" in name or "contiguous" in name]
    assert not [name for name in forward.computed if "copy" in name or "mul" in name]


def test_a_changed_input_is_noticed_in_backward(everywhere):
    prediction = torch.randn(2, 8, requires_grad=True)
    c = torch.full((2, 1), 0.5)
    elements = ops.loss(prediction, None, None, c=c, function="smooth_l1", reduction="elements")
    c.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        elements.sum().backward()


def test_threads_change_nothing():
    prediction, x0, n, how = arguments(shape=(4, 3, 64, 64))
    first = ops.loss(prediction, x0, n, reduction="elements", **how)
    try:
        torch.set_num_threads(2)
        assert_same(ops.loss(prediction, x0, n, reduction="elements", **how), first)
    finally:
        torch.set_num_threads(1)
