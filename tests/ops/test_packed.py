"""Packed sequences: each has the t, noise, x_t, target, loss and gradient that it has as a batch of its own."""

import math
import pickle
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from accuracy import assert_rounded, assert_same, to_numpy
from devices import examples, in_turn, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiff
from fastdiff import losses, ops
from fastdiff.backends import registry
from fastdiff.backends.native.launch import memory
from fastdiff.calls import LossCall, NoiseCall, NormalCall, Packed
from fastdiff.torch_access import _C

SEED = 7
LENGTHS = [5, 0, 70, 1, 37, 0]  # of 8 numbers more than a block of the kernels, and less than a vector
IDS = torch.tensor([4, 1, 2**40 + 3, 0, 0, -2])
T, S = sum(LENGTHS), len(LENGTHS)
SHAPES = [(T, 8), (1, T, 6), (T, 3, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ["reference", "native", "triton"]


def use(name):
    """Where the tensors of a test are, which runs with the backend ``name``; "cuda": what is chosen there."""
    if name == "cuda":
        return torch.device("cuda")
    found = {status.name: status for status in fastdiff.backends.status()}[name]
    if not found.available or (name == "triton" and torch.cuda.is_available()):
        pytest.skip(found.reason or "the interpreter is for machines without a GPU")
    fastdiff.use_backend(name)
    return torch.device("cpu")


def without_fast_calls(name, monkeypatch):
    """``use``, where the name says so without the calls for the plain case."""
    name, _, without = name.partition(",")
    if without:
        monkeypatch.setattr(fastdiff.backends.native.backend, "fast", None)
    return use(name)


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["reference", "native", "native, no fast calls", CUDA])
def device(request, monkeypatch):
    return without_fast_calls(request.param, monkeypatch)


@pytest.fixture(params=[*NAMES, "native, no fast calls", CUDA])
def everywhere(request, monkeypatch):
    """As ``device``, and in Triton's interpreter, which is slow."""
    return without_fast_calls(request.param, monkeypatch)


def flow(**options):
    return fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", "sigma_sqrt", **options)


def discrete(**options):
    return fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR(5.0), **options)


def parts(tensor, lengths=LENGTHS):
    """The sequences, each as a batch of one."""
    tokens = tensor[0] if tensor.shape[0] == 1 and tensor.ndim > 2 else tensor
    return [part.unsqueeze(0) for part in tokens.split(lengths)]


def normals(shape, ids=IDS, lengths=LENGTHS, stream=0):
    """The noise of each sequence by the definition, one behind the other."""
    token = shape[2:] if shape[0] == 1 and len(shape) > 2 else shape[1:]
    made = [oracle.normal(SEED, (1, n, *token), stream, int(id)).reshape(n, *token) for id, n in zip(ids, lengths)]
    return torch.from_numpy(np.concatenate([np.empty((0, *token), np.float32), *made])).view(shape)


def per_token(rows, shape, lengths=LENGTHS):
    """float64 [sequences] so that it broadcasts to the pack."""
    dims = (1, -1) if shape[0] == 1 and len(shape) > 2 else (-1,)
    return np.repeat(np.asarray(rows, np.float64), lengths).reshape(*dims, *(1,) * (len(shape) - len(dims)))


# ---- noising


@in_turn(dtype=DTYPES, shape=SHAPES, keep=[True, False], made=[flow, discrete])
def test_noising_is_that_of_each_sequence_alone(everywhere, dtype, shape, keep, made):
    device = everywhere
    objective, x0 = made(), torch.randn(shape).to(device, dtype)
    noised = objective.noise(x0, lengths=LENGTHS, ids=IDS.to(device), seed=SEED, keep_noise=keep, with_target=not keep)
    assert noised.x_t.shape == noised.noise.shape == noised.target.shape == shape and noised.t.shape == (S,)
    names = ("x_t", "noise", "target")
    for k, alone in enumerate(parts(x0)):
        if alone.numel():
            own = objective.noise(alone, ids=IDS[k : k + 1].to(device), seed=SEED)
            for name in names:
                assert torch.equal(parts(getattr(noised, name))[k], getattr(own, name)), (name, k)
            for name in ("t", "alpha", "sigma", "weight", "model_time"):
                assert torch.equal(getattr(noised, name)[k : k + 1], getattr(own, name)), (name, k)


def test_against_the_definition(everywhere):
    device = everywhere
    shape = (T, 8)
    x0 = torch.randn(shape)
    noised = flow().noise(x0.to(device), lengths=torch.tensor(LENGTHS), ids=IDS.to(device), seed=SEED)
    t, n = np.concatenate([oracle.uniform(SEED, 1, 3, int(id)) for id in IDS]), normals(shape)
    np.testing.assert_allclose(to_numpy(noised.t), t, rtol=1e-12)
    assert torch.equal(noised.noise.cpu(), n)
    sigma = per_token(t, shape)
    a, b = (1 - sigma) * to_numpy(x0), sigma * to_numpy(n)
    assert_rounded(noised.x_t, a + b, np.abs(a) + np.abs(b))
    # Without ids a sequence's index is its id.
    plain = flow().noise(x0.to(device), lengths=LENGTHS, seed=SEED, sample_offset=2)
    assert torch.equal(plain.noise.cpu(), normals(shape, range(2, 2 + S)))


@pytest.mark.parametrize("name", ["reference", "native"])
@given(data=st.data())
@settings(deadline=None, max_examples=examples(15))
def test_any_lengths(name, data):
    use(name)
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 64, 171]), max_size=6))
    if name == "native":
        lengths += data.draw(st.lists(st.sampled_from([1365, 1366, 4096, 5000]), max_size=2))
    token = data.draw(st.sampled_from([1, 3, 4, 8]))
    shape = (sum(lengths), token)
    x0 = torch.randn(shape)
    noised = flow().noise(x0, lengths=lengths, seed=SEED)
    assert torch.equal(noised.noise, normals(shape, range(len(lengths)), lengths))
    prediction = torch.randn(shape, requires_grad=True)
    target = (noised.noise - x0).double()
    square = (prediction.detach().double() - target).square()
    sums = [part.sum().item() for part in square.split(lengths)]
    weights = noised.weight.double()
    rows = flow().loss(prediction, noised, reduction="none")
    expected = torch.tensor([s / (n * token) if n else math.nan for s, n in zip(sums, lengths)]).double() * weights
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=0, equal_nan=True)
    total = flow().loss(prediction, noised, reduction="sum")
    torch.testing.assert_close(total.double(), (torch.tensor(sums).double() * weights).sum(), rtol=1e-5, atol=0)
    total.backward()
    slope = 2 * (prediction.detach() - target) * torch.from_numpy(per_token(weights, shape, lengths))
    torch.testing.assert_close(prediction.grad.double(), slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"noise_offset": 0.3}, {"input_perturbation": 0.2}, {"noise_offset_dim": 2}])
@pytest.mark.parametrize("shape", [(T, 8), (1, T, 8)])
def test_options_of_the_noise(device, options, shape):
    objective = flow(**{"noise_offset": 0.3, **options} if "noise_offset_dim" in options else options)
    x0 = torch.randn(shape).to(device)
    for of in ({"ids": IDS.to(device)}, {"sample_offset": 3}):
        noised = objective.noise(x0, lengths=LENGTHS, seed=SEED, **of)
        for k, alone in enumerate(parts(x0)):
            if alone.numel():
                own = {"ids": of["ids"][k : k + 1]} if "ids" in of else {"sample_offset": 3 + k}
                own = objective.noise(alone, seed=SEED, **own)
                assert torch.equal(parts(noised.x_t)[k], own.x_t) and torch.equal(parts(noised.noise)[k], own.noise)


def test_images_and_given_noise(device):
    images, n = torch.randint(0, 256, (T, 4, 6), dtype=torch.uint8), torch.randn(T, 4, 6)
    noised = flow().noise(images.to(device), noise=n.to(device), lengths=LENGTHS, seed=SEED, dtype=torch.bfloat16)
    decoded = to_numpy(images) / 127.5 - 1
    sigma = per_token(to_numpy(noised.t), images.shape)
    a, b = (1 - sigma) * decoded, sigma * to_numpy(n)
    assert noised.x_t.dtype == torch.bfloat16
    assert_rounded(noised.x_t, a + b, np.abs(a) + np.abs(b))
    prediction = torch.randn(T, 4, 6).to(device)
    error = (to_numpy(prediction) - (to_numpy(n) - decoded)) ** 2 * per_token(to_numpy(noised.weight), images.shape)
    np.testing.assert_allclose(flow().loss(prediction, noised).item(), error.mean(), rtol=1e-5)


def test_times_that_are_given(device):
    x0 = torch.randn(1, T, 8).to(device)
    t = torch.rand(S, dtype=torch.float64)
    noised = flow().noise(x0, t.to(device), lengths=LENGTHS, seed=SEED)
    assert torch.equal(noised.t.cpu(), t)
    shared = flow().noise(x0, 0.25, lengths=LENGTHS, seed=SEED)
    assert torch.equal(shared.t.cpu(), torch.full((S,), 0.25, dtype=torch.float64))
    by_sigma = flow().noise(x0, sigma=t.to(device), lengths=LENGTHS, seed=SEED)
    assert torch.equal(by_sigma.x_t, noised.x_t)


@pytest.mark.parametrize("shape", [(T, 8), (1, T, 8)])
def test_a_time_for_each_token(everywhere, shape):
    """A row is a token then; the noise is that of the sequences all the same."""
    device = everywhere
    x0, t = torch.randn(shape).to(device), torch.rand(T, dtype=torch.float64)
    noised = flow(input_perturbation=0.1).noise(x0, t.to(device), lengths=LENGTHS, ids=IDS.to(device), seed=SEED)
    n, xi = normals(shape), normals(shape, stream=2)
    assert torch.equal(noised.noise.cpu(), n)
    sigma = to_numpy(t).reshape(*shape[:-1], 1)
    terms = (1 - sigma) * to_numpy(x0), sigma * to_numpy(n), 0.1 * sigma * to_numpy(xi)
    assert_rounded(noised.x_t, sum(terms), sum(map(np.abs, terms)))

    prediction, mask = torch.randn(shape).to(device), (torch.rand(T) < 0.5).view(shape[:-1]).to(device)
    weight = to_numpy(noised.weight).reshape(*shape[:-1], 1)
    error = (weight * (to_numpy(prediction) - (to_numpy(n) - to_numpy(x0))) ** 2).reshape(T, -1)
    tokens = flow().loss(prediction, noised, reduction="none")
    np.testing.assert_allclose(to_numpy(tokens).reshape(-1), error.mean(1), rtol=1e-5)
    ends, ones = np.cumsum(LENGTHS)[:-1], np.ones((T, 8))
    for of_mask, counted in (({}, ones), ({"mask": mask}, to_numpy(mask).reshape(T, 1) * ones)):
        for reduction in ("none", "mean"):
            how = {"mask_normalization": "sample", "reduction": reduction, **of_mask}
            expected = expected_loss(np.split(error, ends), np.ones(S), np.split(counted, ends), "row", reduction)
            np.testing.assert_allclose(to_numpy(flow().loss(prediction, noised, **how)), expected, rtol=1e-5)


# ---- the loss


def expected_loss(error, weights, mask, normalization, reduction, divided=None):
    """By the definition, in float64: rows are lists of the sequences' elements. ``divided``: the mask that divides."""
    sums = np.array([w * (e * m).sum() for w, e, m in zip(weights, error, mask)])
    counts = np.array([m.sum() for m in (mask if divided is None else divided)], np.float64)
    sizes = np.array([e.size for e in error], np.float64)
    if reduction == "sum":
        return sums.sum()
    if normalization == "none":
        with np.errstate(invalid="ignore"):
            return sums.sum() / sizes.sum() if reduction == "mean" else sums / sizes
    if normalization == "global":
        return sums.sum() / counts.sum() if reduction == "mean" else sums / (counts.sum() / len(error))
    means = np.where(counts > 0, sums / np.where(counts > 0, counts, 1), 0)
    return means.sum() / max(1, (counts > 0).sum()) if reduction == "mean" else means


HOW = [("none", r) for r in ("none", "mean", "sum")]
HOW += [(n, r) for n in ("row", "sample", "global") for r in ("none", "mean")]


CASES = {
    "how": HOW,
    "dtype": DTYPES,
    "masked": ["no", "tokens", "elements", "ones", "empty sequence"],
    "kind": [("mse", True), ("mse", False), ("l1", True), (losses.PseudoHuber(0.1), False)],
}


@in_turn(**CASES | {"dtype": DTYPES[:3]})
def test_losses_and_gradients_in_triton(how, dtype, masked, kind):
    check_loss(use("triton"), how, dtype, masked, kind)


@pairwise(**CASES)
def test_losses_and_gradients(device, how, dtype, masked, kind):
    check_loss(device, how, dtype, masked, kind)


def check_loss(device, how, dtype, masked, kind):
    (normalization, reduction), (function, keep), shape = how, kind, (T, 8)
    objective = flow(loss=function)
    x0, m = torch.randn(2, *shape).to(device, dtype)
    noised = objective.noise(x0, lengths=LENGTHS, seed=SEED, keep_noise=keep)
    mask = {
        "no": None,
        "tokens": torch.rand(T) < 0.5,
        "elements": torch.rand(shape),
        "ones": torch.ones(T, 1),
        "empty sequence": torch.arange(T) >= LENGTHS[0],
    }[masked]
    weight = (torch.rand(S) + 0.5).to(device).requires_grad_()
    prediction = m.clone().requires_grad_()
    options = {"mask": None if mask is None else mask.to(device), "weight": weight, "reduction": reduction}
    loss = objective.loss(prediction, noised, mask_normalization=normalization, **options)

    e = to_numpy(m) - (to_numpy(noised.noise) - to_numpy(x0))
    rho = {"mse": oracle.loss_mse, "l1": oracle.loss_l1}.get(function, lambda e: oracle.loss_pseudo_huber(e, 0.1))
    whole = np.ones(T) if mask is None else to_numpy(mask)
    whole = np.broadcast_to(whole.reshape(T, -1), shape)
    ends = np.cumsum(LENGTHS)[:-1]
    rows = to_numpy(noised.weight) * to_numpy(weight)
    error, masks = np.split(np.asarray(rho(e), np.float64), ends), np.split(whole, ends)
    by_row = "row" if normalization == "sample" else normalization
    expected = expected_loss(error, rows, masks, by_row, reduction)
    wide = dtype == torch.float64
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    assert loss.shape == ((S,) if reduction == "none" else ())
    np.testing.assert_allclose(to_numpy(loss), expected, rtol=1e-12 if wide else 1e-5)

    # The gradients, by differences of the definition: it is linear in each element's term and in each weight.
    upstream = torch.rand(S) + 0.5 if reduction == "none" else torch.tensor(0.75)
    loss.backward(upstream.to(loss))
    up = to_numpy(upstream)

    def slope_of_terms(k):
        """d (up . loss) / d (a term of sequence k)"""
        step = [np.zeros_like(part) for part in error]
        if not step[k].size:
            return 0.0
        step[k].flat[0] = 1.0
        ones = [np.ones_like(part) for part in masks]
        found = expected_loss(step, rows, ones, by_row, reduction, masks)
        return float(np.nansum(up * np.nan_to_num(found)))

    size = {"mse": 2 * e, "l1": np.sign(e)}.get(function, e / np.sqrt(e**2 + 0.01))
    slope = per_token([slope_of_terms(k) for k in range(S)], shape) * whole * size
    near = 1e-4 if not wide else 1e-6
    got = to_numpy(prediction.grad)
    rounding = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else near
    smallest = torch.finfo(torch.float16).smallest_normal if dtype == torch.float16 else 0.0
    np.testing.assert_allclose(got, slope, rtol=max(near, rounding), atol=near * np.abs(slope).max() + smallest)
    for k in range(S):
        one = np.zeros(S)
        one[k] = to_numpy(noised.weight)[k]
        found = np.nansum(up * np.nan_to_num(expected_loss(error, one, masks, by_row, reduction)))
        if LENGTHS[k] or (normalization, reduction) != ("none", "none"):
            np.testing.assert_allclose(to_numpy(weight.grad)[k], found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_the_means_of_batches_of_one(device, shape):
    objective, x0, m = discrete(), torch.randn(shape).to(device), torch.randn(shape).to(device)
    noised = objective.noise(x0, lengths=LENGTHS, seed=SEED)
    found = objective.loss(m, noised, reduction="none")
    for k, (alone, prediction) in enumerate(zip(parts(x0), parts(m))):
        if alone.numel():
            own = objective.loss(prediction, objective.noise(alone, seed=SEED, sample_offset=k))
            torch.testing.assert_close(found[k], own, rtol=2**-23, atol=0)
        else:
            assert found[k].isnan()  # a mean over nothing
    by_row = objective.loss(m, noised, reduction="none", mask_normalization="row")
    assert_same(by_row, torch.where(found.isnan(), 0.0, found))
    everywhere = objective.loss(m, noised, torch.ones(shape, dtype=torch.bool).to(device), mask_normalization="row")
    # Triton adds up pairs where a mask divides.
    rtol = 2**-22 if fastdiff.backends.choose(device) == "triton" else 0
    torch.testing.assert_close(objective.loss(m, noised, mask_normalization="row"), everywhere, rtol=rtol, atol=0)
    torch.testing.assert_close(everywhere, by_row.sum() / sum(n > 0 for n in LENGTHS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalization", ["none", "row", "global"])
@pytest.mark.parametrize("masked", [True, False])
def test_weights_of_elements(device, normalization, masked):
    shape = (1, T, 8)
    x0, m, weight = torch.randn(shape).to(device), torch.randn(shape).to(device), torch.rand(1, T, 1)
    mask = torch.rand(1, T) < 0.5 if masked else None
    noised = flow().noise(x0, lengths=LENGTHS, seed=SEED)
    e = (to_numpy(m) - (to_numpy(noised.noise) - to_numpy(x0)))[0] ** 2
    ends = np.cumsum(LENGTHS)[:-1]
    ones = np.broadcast_to(to_numpy(mask).reshape(T, 1) if masked else np.ones((T, 1)), (T, 8))
    both, divided = np.split(ones * to_numpy(weight)[0], ends), np.split(ones, ends)
    for reduction in ("none", "mean"):
        how = {"mask_normalization": normalization, "reduction": reduction, "weight": weight.to(device)}
        loss = flow().loss(m, noised, mask if mask is None else mask.to(device), **how)
        expected = expected_loss(np.split(e, ends), to_numpy(noised.weight), both, normalization, reduction, divided)
        np.testing.assert_allclose(to_numpy(loss), expected, rtol=1e-5)


def test_other_targets(device):
    x0, m, y, target = torch.randn(4, T, 8).to(device)
    noised, r = flow().noise(x0, lengths=LENGTHS, seed=SEED), torch.rand(S)
    w, factor = per_token(to_numpy(noised.weight), x0.shape), per_token(to_numpy(r), x0.shape)
    plain = to_numpy(noised.noise) - to_numpy(x0)
    cases = [
        ({"y": y, "r": r.to(device)}, plain + factor * to_numpy(y)),
        ({"target": target}, to_numpy(target)),
        ({"target": target, "y": y}, to_numpy(target) + to_numpy(y)),
    ]
    for given_, wanted in cases:
        expected = (w * (to_numpy(m) - wanted) ** 2).mean()
        np.testing.assert_allclose(flow().loss(m, noised, **given_).item(), expected, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["none", "row"])
def test_what_is_left_out_adds_nothing(device, normalization):
    x0, m = torch.randn(T, 8), torch.randn(T, 8)
    start = LENGTHS[0]
    clean = m.clone()
    m[start : start + LENGTHS[2]] = math.nan
    weight = (torch.arange(S) != 2).float().to(device)
    noised = flow().noise(x0.to(device), lengths=LENGTHS, seed=SEED)
    found = []
    for prediction in (m, clean):
        prediction = prediction.to(device).requires_grad_()
        loss = flow().loss(prediction, noised, weight=weight, mask_normalization=normalization)
        found.append((loss.detach(), *torch.autograd.grad(loss, prediction)))
    for a, b in zip(*found):
        assert_same(a, b)
    assert not found[0][1][start : start + LENGTHS[2]].any()
    rows = flow().loss(clean.to(device), noised, weight=torch.zeros(S).to(device), reduction="none")
    assert_same(rows, torch.zeros_like(rows))  # of no elements too


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_sequences(dtype):
    """A sum over nothing is 0, a mean NaN, and there are no rows; with weights of elements, whatever divides."""
    x0 = torch.zeros(0, 4, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for options in ({}, {"noise_offset": 0.3}):
        noised = flow(**options).noise(x0, lengths=[], seed=SEED)
        assert noised.x_t.shape == noised.noise.shape == (0, 4) and noised.t.shape == (0,)
        assert noised.x_t.dtype == dtype and noised.noise.dtype == wide
        for normalization in ("none", "row", "global", "sample"):
            how = {"weight": torch.ones(0, 4), "mask_normalization": normalization}
            total, mean, rows = (flow().loss(x0, noised, reduction=of, **how) for of in ("sum", "mean", "none"))
            assert total == 0 and mean.isnan() and rows.shape == (0,)


def test_gradcheck():
    lengths, objective = [2, 0, 3, 1], discrete()
    x0, n, m = torch.randn(3, 6, 2, dtype=torch.float64).requires_grad_().unbind()
    w = torch.rand(4, dtype=torch.float64, requires_grad=True)

    def loss(x0, n, m, w, **how):
        noised = objective.noise(x0, noise=n, lengths=lengths, seed=SEED)
        return noised.x_t, objective.loss(m, noised, weight=w, **how)

    for how in ({"mask_normalization": "row"}, {"mask": torch.arange(6) % 2 == 0, "reduction": "sum"}):
        assert torch.autograd.gradcheck(partial(loss, **how), (x0, n, m, w))
    fixed = objective.noise(x0.detach(), noise=n.detach(), lengths=lengths, seed=SEED)
    for reduction in ("mean", "sum"):
        of = lambda m, w: objective.loss(m, fixed, weight=w, reduction=reduction)  # noqa: B023, E731
        assert torch.autograd.gradcheck(of, (m.detach().requires_grad_(), w))
        assert torch.autograd.gradgradcheck(of, (m.detach().requires_grad_(), w))


def test_gradients_of_the_data(everywhere):
    device = everywhere
    x0 = torch.randn(T, 8, device=device).requires_grad_()
    noised = flow().noise(x0, lengths=LENGTHS, seed=SEED)
    upstream = torch.randn(T, 8, device=device)
    (slope,) = torch.autograd.grad(noised.x_t, x0, upstream)
    expected = (1 - per_token(to_numpy(noised.t), x0.shape)) * to_numpy(upstream)
    np.testing.assert_allclose(to_numpy(slope), expected, rtol=1e-6, atol=1e-7)


def test_sequences_of_several_tiles_in_triton():
    lengths, shape = [140, 0, 3, 260], (403, 8)
    x0, m = torch.randn(2, *shape)
    found = []
    for name in ("triton", "native"):
        use(name)
        noised = flow().noise(x0, lengths=lengths, seed=SEED, keep_noise=name == "native")
        for how in ({"reduction": "none"}, {"mask_normalization": "row"}, {}):
            prediction = m.clone().requires_grad_()
            loss = flow().loss(prediction, noised, **how)
            found.append((noised.x_t, noised.noise, loss.detach(), *torch.autograd.grad(loss.nansum(), prediction)))
    for ours, expected in zip(found[:3], found[3:]):
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
        for a, b in zip(ours[2:], expected[2:]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9, equal_nan=True)


# ---- around them


def test_what_the_network_sees_and_says(device):
    x0, m = torch.randn(2, 1, T, 8).to(device)
    edm = fastdiff.Objective(fastdiff.EDM(), "edm", "edm")
    noised = edm.noise(x0, lengths=LENGTHS, seed=SEED)
    for what in (noised, pickle.loads(pickle.dumps(noised))):
        found, clean = what.model_input, edm.predict_x0(m, what)
        rows = edm.loss(m, what, reduction="none")
        for k, (alone, prediction) in enumerate(zip(parts(x0), parts(m))):
            if alone.numel():
                own = edm.noise(alone, seed=SEED, sample_offset=k)
                assert torch.equal(parts(found)[k], own.model_input)
                torch.testing.assert_close(parts(clean)[k], edm.predict_x0(prediction, own))
                torch.testing.assert_close(rows[k], edm.loss(prediction, own))
    of_table = discrete().noise(x0, lengths=LENGTHS, seed=SEED)
    clean = discrete().convert(m, of_table, "epsilon")
    for k, (alone, prediction) in enumerate(zip(parts(x0), parts(m))):
        if alone.numel():
            own = discrete().noise(alone, seed=SEED, sample_offset=k)
            torch.testing.assert_close(parts(clean)[k], discrete().convert(prediction, own, "epsilon"))
    other = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    found = other.loss(m, of_table, reduction="none")
    error = (to_numpy(m) - to_numpy(of_table.noise))[0] ** 2
    means = [part.mean() for part in np.split(error, np.cumsum(LENGTHS)[:-1]) if part.size]
    np.testing.assert_allclose(to_numpy(found)[[0, 2, 3, 4]], means, rtol=1e-5)


@pytest.mark.parametrize("made", [flow, discrete])
def test_compiled(made):
    """One graph for all lengths of a tensor, and the bits of an eager call."""
    objective = made()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x0, prediction, lengths, seed, mask):
        noised = objective.noise(x0, lengths=lengths, seed=seed)
        rows = objective.loss(prediction, noised, reduction="none", mask_normalization="row")
        return noised.x_t, objective.loss(prediction, noised, mask) + rows.sum()

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    x0, m, mask = torch.randn(T, 8), torch.randn(T, 8), torch.rand(T) < 0.5
    for lengths in (LENGTHS, LENGTHS[::-1], [T, 0, 0, 0, 0, 0]):
        given_ = torch.tensor(lengths), torch.tensor([SEED]), mask
        predictions = [m.clone().requires_grad_() for _ in range(2)]
        results = [call(x0, p, *given_) for call, p in zip((step, compiled), predictions)]
        for eager, traced in zip(*results):
            assert_same(traced, eager)
        slopes = [torch.autograd.grad(loss, p)[0] for (_, loss), p in zip(results, predictions)]
        torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-6, atol=1e-9)
    assert counter.frame_count == 1
    of_list = partial(objective.noise, x0, lengths=LENGTHS, seed=torch.tensor([SEED]))
    assert_same(torch.compile(lambda: of_list().x_t, backend="aot_eager", fullgraph=True)(), of_list().x_t)


def test_threads_change_nothing():
    use("native")
    x0, m = torch.randn(2, 40000, 4)
    lengths = [9000, 1, 0, 20999, 10000]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        noised = flow().noise(x0, lengths=lengths, seed=SEED)
        prediction = m.clone().requires_grad_()
        loss = flow().loss(prediction, noised, mask_normalization="row")
        found.append((noised.x_t, loss, torch.autograd.grad(loss, prediction)[0]))
    torch.set_num_threads(1)
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert_same(a, b)


# ---- what is refused

X0 = torch.randn(12, 4)


@pytest.mark.parametrize(
    ("lengths", "x0", "error", "words"),
    [
        ([5, 6], X0, ValueError, r"add up to the 12 tokens of x0 \(12, 4\); got .*in all 11"),
        ([13, -1], X0, ValueError, "at least 0"),
        ([0, 5, 12], X0, ValueError, r"cumulative: pass their differences, cu_seqlens.diff\(\)"),
        ([5.0, 7.0], X0, TypeError, "whole numbers, one a sequence"),
        (torch.tensor([5.0, 7.0]), X0, TypeError, "whole numbers"),
        (torch.tensor([[5, 7]]), X0, TypeError, "whole numbers"),
        (torch.tensor([5, 7], device="meta"), X0, ValueError, "lengths are on meta: keep them on the CPU"),
        (12, X0, TypeError, "whole numbers"),
        ("12", X0, TypeError, "whole numbers"),
        ([12], torch.randn(12), ValueError, r"packed sequences are \[tokens, ...\] or \[1, tokens, ...\]"),
        ([12], torch.randn(12, 0), ValueError, "a token has elements"),
        ([2, 2], torch.randn(2, 2, 5), ValueError, "add up to the 2 tokens"),
    ],
)
def test_wrong_lengths(lengths, x0, error, words):
    with pytest.raises(error, match=words):
        flow().noise(x0, lengths=lengths)


def test_wrong_company():
    with pytest.raises(ValueError, match="tokens= is for images"):
        flow().noise(X0, lengths=[12], tokens=fastdiff.Tokens())
    with pytest.raises(ValueError, match=r"one a sequence, \[2\], or one a token, \[12\]"):
        flow().noise(X0, torch.rand(5), lengths=[5, 7])
    with pytest.raises(ValueError, match=r"ids must be \[2\]"):
        flow().noise(X0, lengths=[5, 7], ids=torch.arange(12))
    with pytest.raises(ValueError, match="does not fit"):
        flow().loss(X0, flow().noise(X0, lengths=[5, 7]), torch.ones(2))
    with pytest.raises(ValueError, match="fits no rows"):
        flow().loss(X0, flow().noise(X0, lengths=[5, 7]), weight=torch.ones(3))
    with pytest.raises(ValueError, match="must be equal"):
        flow().predict_x0(X0[:5], flow().noise(X0, lengths=[5, 7]))
    by_token = flow().noise(X0, torch.rand(12), lengths=[5, 7])
    with pytest.raises(ValueError, match="got 'sample'. With one time a sequence"):
        flow().loss(X0, by_token, weight=torch.rand(12, 4), mask_normalization="sample")
    noised = discrete().noise(X0, lengths=[5, 7])
    with pytest.raises(ValueError, match=r"losses.Sum takes a batch .*noise\(lengths=\)"):
        losses.Sum(discrete())(X0, noised)
    bound = fastdiff.VariationalBound(discrete())
    with pytest.raises(ValueError, match="VariationalBound takes a batch"):
        bound.loss(X0, noised)


@pytest.mark.skipif(_C is None, reason="no extension")
@pytest.mark.parametrize(
    ("starts", "words"),
    [
        ([1, 4], "the first 0"),
        ([0, 5, 4], "must end where it starts, or behind it"),
        ([0, 2**60], "more than 2\\^58"),
        ([0.5, 4.0], "must be int64"),
        ([0, 5], "4 elements, but 5 are needed"),
    ],
)
def test_the_extension_refuses_starts(starts, words):
    starts, out = torch.tensor(starts), torch.empty(4)
    with pytest.raises(ValueError, match=words):
        _C.normal(memory(starts), (1, 0, 0, 0.0), None, memory(out), 1)


@pytest.mark.skipif(_C is None, reason="no extension")
def test_the_extension_refuses_what_is_not_of_sequences():
    starts, out, three = torch.tensor([0, 1, 4]), torch.empty(4), torch.arange(3)
    with pytest.raises(ValueError, match="no channels"):
        _C.normal(memory(starts), (1, 0, 0, 0.5), None, memory(out), 1)
    with pytest.raises(ValueError, match="3 ids for 2 samples"):
        _C.normal(memory(starts), (1, 0, memory(three), 0.0), None, memory(out), 1)
    one, moments = torch.ones(1), torch.ones(8)
    with pytest.raises(ValueError, match="the samples do not divide the elements"):
        _C.kl_normal(memory(starts), memory(moments), memory(one), 0.0, 1.0, 0, None, memory(one), None, 1)


def test_more_sequences_than_a_grid_takes():
    """The kernels leave them to their fallback."""
    use("triton")
    packed = Packed(torch.zeros(2**16 + 1, dtype=torch.int64), 0)
    noise, row = ops.Philox(1), torch.empty(2**16, 1)
    backend = registry.get(torch.device("cpu"))
    for call in (
        NormalCall(1, (0, 4), packed=packed),
        NoiseCall(torch.empty(1, 4), noise, row, row, packed=packed),
        LossCall(torch.empty(1, 4), None, noise, None, row, None, row, packed=packed),
    ):
        assert backend.supports(call) == (False, "more than 65535 sequences")
        assert backend.supports(call._replace(packed=packed._replace(starts=torch.tensor([0, 4]))))[0]
