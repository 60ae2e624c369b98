"""Packed tokens: noising and loss with tokens against packing by hand, with the bits of the unpacked batch."""

import pickle

import numpy as np
import pytest
import torch
from accuracy import assert_rounded, assert_same, to_numpy
from devices import on_every_device, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import Tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FLOW, VP = fastdiff.RectifiedFlow(), fastdiff.VariancePreserving()
ORDERS = ["c p q", "p q c"]


def packed(x, p, q, order):
    """By a loop over the tokens."""
    b, c, height, width = x.shape
    tokens = []
    for i in range(0, height, p):
        for j in range(0, width, q):
            patch = x[:, :, i : i + p, j : j + q]
            patch = patch if order == "c p q" else patch.permute(0, 2, 3, 1)
            tokens.append(patch.reshape(b, -1))
    return torch.stack(tokens, 1)


def batch(shape=(3, 4, 8, 12), dtype=torch.float32, device="cpu"):
    return [torch.randn(shape, device=device).to(dtype) for _ in range(3)]


# ----------------------------------------------------------------------------------------------------------- the layout


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("patch", [1, 2, 4, (1, 2), (4, 3), (8, 12)])
def test_packing_by_a_loop(patch, order):
    x, tokens = batch()[0], Tokens(patch, order)
    p, q = (patch, patch) if isinstance(patch, int) else patch
    assert torch.equal(tokens.pack(x), packed(x, p, q, order))
    assert torch.equal(tokens.unpack(tokens.pack(x), 8, 12), x)
    assert repr(tokens) == f"Tokens(patch={patch!r}, order={order!r})" and tokens == Tokens(patch, order)


def test_flux_and_dit():
    """As ``FluxPipeline._pack_latents`` packs, and as the transformers of DiT, PixArt and SD3 unpatchify."""
    x = batch((2, 16, 8, 6))[0]
    flux = x.view(2, 16, 4, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 12, 64)
    assert torch.equal(Tokens().pack(x), flux)
    output = torch.randn(2, 12, 64)
    unpatchified = torch.einsum("nhwpqc->nchpwq", output.view(2, 4, 3, 2, 2, 16)).reshape(2, 16, 8, 6)
    assert torch.equal(Tokens(2, "p q c").unpack(output, 8, 6), unpatchified)


def test_flux_of_diffusers():
    pipelines = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    x = batch((2, 16, 8, 6))[0]
    tokens = pipelines.FluxPipeline._pack_latents(x, 2, 16, 8, 6)
    assert torch.equal(Tokens(2, "c p q").pack(x), tokens)
    assert torch.equal(
        Tokens(2, "c p q").unpack(tokens, 8, 6), pipelines.FluxPipeline._unpack_latents(tokens, 64, 48, 8)
    )


# ------------------------------------------------------------------------------------------------------------- noising


@on_every_device
@pairwise(
    dtype=DTYPES,
    order=ORDERS,
    patch=[1, 2, 4, (2, 3), (1, 12)],
    noise=["kept", "made again", "given"],
    options=[{}, {"noise_offset": 0.1}, {"input_perturbation": 0.1}],
    with_target=[False, True],
)
def test_x_t_is_that_of_the_unpacked_batch_packed(backend, device, dtype, order, patch, noise, options, with_target):
    x0, n, _ = batch(dtype=dtype, device=device)
    tokens, objective = Tokens(patch, order), fastdiff.Objective(VP, "v_prediction", **options)
    how = {"kept": {"keep_noise": True}, "made again": {"keep_noise": False}, "given": {"noise": n}}[noise]
    found, plain = (objective.noise(x0, seed=5, tokens=t, with_target=with_target, **how) for t in (tokens, None))
    assert found.x_t.is_contiguous() and found.x_t.dtype == dtype and found.x0 is x0 and found.tokens == tokens
    for name in ("x_t", "target", "model_input"):
        assert torch.equal(getattr(found, name), tokens.pack(getattr(plain, name))), name
    assert torch.equal(found.noise, plain.noise) and torch.equal(found.t, plain.t)
    assert noise != "given" or found.noise is n


@on_every_device
@pytest.mark.parametrize("order", ORDERS)
def test_a_flow_against_numpy(backend, device, order):
    x0, n, _ = batch(device=device)
    t = torch.tensor([0.25, 0.5, 0.75], device=device)
    noised = fastdiff.Objective(FLOW, "flow").noise(x0, t, n, tokens=Tokens(2, order))
    x, z = (to_numpy(packed(data, 2, 2, order)) for data in (x0, n))
    time = to_numpy(t)[:, None, None]
    assert_rounded(noised.x_t, (1 - time) * x + time * z, np.abs(x) + np.abs(z), operations=3)
    assert_rounded(noised.target, z - x, np.abs(x) + np.abs(z), operations=3)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("order", ORDERS)
def test_images(dtype, order):
    images, tokens = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), Tokens(4, order)
    objective = fastdiff.Objective(FLOW, "flow")
    found = objective.noise(images, seed=1, dtype=dtype, tokens=tokens)
    plain = objective.noise(images, seed=1, dtype=dtype)
    assert torch.equal(found.x_t, tokens.pack(plain.x_t)) and torch.equal(found.target, tokens.pack(plain.target))
    m = torch.randn(2, 4, 48).to(dtype)
    assert_close(objective.loss(m, found), objective.loss(tokens.unpack(m, 8, 8), plain))


def assert_close(a, b):
    """Sums of the reference are taken in another order where the elements lie in another."""
    torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 1e-14, atol=0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dims", [1, 2, 4])
def test_times_may_have_all_dimensions(dims):
    x0, n = batch()[:2]
    t, tokens, objective = torch.rand(len(x0)), Tokens(2), fastdiff.Objective(FLOW, "flow")
    expected = objective.noise(x0, t, n, tokens=tokens)
    found = objective.noise(x0, t.view(len(x0), *(1,) * (dims - 1)), n, tokens=tokens)
    assert torch.equal(found.x_t, expected.x_t) and torch.equal(found.t, t)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 1, 1, 12), (3, 1, 8, 1), (3, 4, 1, 12), (3, 1, 8)])
def test_masks_that_are_broadcast(shape):
    """A mask [B, 1, 1, W], say, is that of [B, C, H, W] that it stands for."""
    x0, n = batch()[:2]
    mask = torch.rand(shape) < 0.6
    whole = mask.view(*shape, *(1,) * (4 - len(shape))).expand(x0.shape)
    t, tokens, objective = torch.rand(len(x0)), Tokens(2), fastdiff.Objective(FLOW, "flow")
    m = torch.randn_like(x0)
    expected = objective.loss(m, objective.noise(x0, t, n), mask=whole)
    noised = objective.noise(x0, t, n, tokens=tokens)
    assert_close(objective.loss(tokens.pack(m), noised, mask=mask), expected)


# ------------------------------------------------------------------------------------------------------------ the loss


@on_every_device
@pairwise(
    dtype=DTYPES,
    order=ORDERS,
    patch=[1, 2, (2, 3)],
    noise=["kept", "made again", "given"],
    kind=["epsilon", "sample", "v_prediction"],
    loss=["mse", "huber"],
    how=["mean", "sum", "none", "mask", "mask's mean", "sample", "weight", "element weight", "target", "y"],
)
def test_loss_and_gradient_are_those_of_the_unpacked_batch(
    backend, device, dtype, order, patch, noise, kind, loss, how
):
    x0, n, m = batch(dtype=dtype, device=device)
    tokens, objective = (
        Tokens(patch, order),
        fastdiff.Objective(VP, kind, "snr" if kind == "v_prediction" else None, loss),
    )
    given = {"kept": {"keep_noise": True}, "made again": {"keep_noise": False}, "given": {"noise": n}}[noise]
    found, plain = (objective.noise(x0, seed=5, tokens=t, **given) for t in (tokens, None))
    mask, rows = torch.rand(3, 1, 8, 12, device=device) < 0.5, torch.rand(3, device=device)
    other = torch.randn(x0.shape, device=device).to(dtype)
    options = {
        "mean": {}, "sum": {"reduction": "sum"}, "none": {"reduction": "none"}, "mask": {"mask": mask},
        "mask's mean": {"mask": mask, "mask_normalization": "row", "reduction": "none"},
        "sample": {"mask": mask[:, :, :, :1], "mask_normalization": "sample"}, "weight": {"weight": rows},
        "element weight": {"weight": torch.rand(3, 1, 8, 12, device=device), "mask": rows > 0.2},
        "target": {"target": other}, "y": {"y": other, "r": 0.5},
    }[how]  # fmt: skip
    results = []
    for noised, pack in ((found, tokens.pack), (plain, lambda x: x)):
        leaf = pack(m).clone().requires_grad_()
        own = {name: pack(value) if name in ("target", "y") else value for name, value in options.items()}
        value = objective.loss(leaf, noised, **own)
        upstream = torch.rand(value.shape, device=device, dtype=value.dtype, generator=generator(device))
        (gradient,) = torch.autograd.grad((value * upstream).sum(), leaf)
        results.append((value, gradient))
    (value, gradient), (right, wanted) = results
    assert gradient.shape == found.x_t.shape and gradient.dtype == dtype
    if backend == "reference" or (device == "cuda" and dtype == torch.float64):  # the reference computes that too
        assert_close(value, right)
        torch.testing.assert_close(gradient, tokens.pack(wanted), rtol=torch.finfo(dtype).eps, atol=0)
    else:
        assert gradient.is_contiguous()
        # On a GPU the layout of a tile, and with it the order of a sum in it, follows the order of the tokens.
        torch.testing.assert_close(value, right, rtol=1e-6 if device == "cuda" else 0, atol=0)
        assert_same(gradient, tokens.pack(wanted))


def generator(device):
    return torch.Generator(device).manual_seed(7)


@pytest.mark.usefixtures("backend")
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(low, 5) for low in (0, 1, 1, 1))),
    patch=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    order=st.sampled_from(ORDERS), dtype=st.sampled_from(DTYPES), keep=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_any_shape(sizes, patch, order, dtype, keep, seed):
    torch.manual_seed(seed)
    (b, c, h, w), (p, q) = sizes, patch
    x0 = torch.randn(b, c, h * p, w * q).to(dtype)
    tokens, objective = Tokens(patch, order), fastdiff.Objective(VP, "v_prediction")
    found, plain = (objective.noise(x0, seed=seed, tokens=t, keep_noise=keep) for t in (tokens, None))
    assert torch.equal(found.x_t, tokens.pack(plain.x_t))
    m = torch.randn(b, h * w, c * p * q).to(dtype).requires_grad_()
    value, right = objective.loss(m, found), objective.loss(tokens.unpack(m, h * p, w * q), plain)
    torch.testing.assert_close(value, right, rtol=1e-6, atol=0, equal_nan=True)
    if b:
        for gradient, want in zip(torch.autograd.grad(value, m), torch.autograd.grad(right, m)):
            torch.testing.assert_close(gradient, want, rtol=torch.finfo(dtype).eps, atol=1e-30)


class FullSize(TorchDispatchMode):
    """Which operations of PyTorch have a result of so many elements, but for views and new memory."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.found = elements, []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        name = function.overloadpacket.__name__
        if not name.startswith(("empty", "new_empty", "detach", "alias")) and not function.is_view:
            tensors = result if isinstance(result, (tuple, list)) else (result,)
            if any(isinstance(t, torch.Tensor) and t.numel() >= self.elements for t in tensors):
                self.found.append(name)
        return result


@pytest.mark.parametrize("backend", ["native", "native, no fast calls"], indirect=True)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("how", ["made", "given", "mask", "none"])
def test_no_pass_but_those_of_the_kernels(backend, order, how, monkeypatch):
    """Neither packing nor unpacking: PyTorch itself makes nothing of full size in a training step."""
    x0, n, m = batch((2, 16, 8, 8))
    tokens, objective = Tokens(2, order), fastdiff.Objective(VP, "v_prediction")
    m = tokens.pack(m).requires_grad_()
    mask = {"mask": torch.rand(2, 1, 8, 8) < 0.5} if how == "mask" else {}
    torch.utils.deterministic.fill_uninitialized_memory = False  # which is an operation
    with FullSize(x0.numel()) as ran:
        noised = objective.noise(x0, noise=n if how == "given" else None, tokens=tokens)
        assert noised.x_t.shape == noised.target.shape == (2, 16, 64)
        loss = objective.loss(m, noised, reduction="none" if how == "none" else "mean", **mask)
        loss.sum().backward()
    assert not ran.found
    with FullSize(x0.numel()) as ran:
        tokens.pack(x0)
    assert ran.found


@pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("process, kind, times", [(VP, "v_prediction", 1), (FLOW, "flow", 2)], ids=["VP", "flow"])
@pytest.mark.parametrize("order", ORDERS)
def test_launches_of_a_training_step(process, kind, times, order):
    """Times (with their coefficients apart, where those are no table), noising, the loss, and its backward, which
    compares; PyTorch makes nothing of full size."""
    pytest.importorskip("triton")
    from fastdiff.backends.triton import interpreted
    from fastdiff.backends.triton.launch import launches

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not interpreted():
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    x0, tokens, objective = torch.randn(2, 4, 8, 8, device=device), Tokens(2, order), fastdiff.Objective(process, kind)
    m = torch.randn(2, 16, 16, device=device, requires_grad=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with fastdiff.use_backend("triton"):  # once before, for what is kept
        objective.loss(m, objective.noise(x0, tokens=tokens))
    with fastdiff.use_backend("triton"), launches() as launched, FullSize(x0.numel()) as ran:
        noised = objective.noise(x0, seed=3, tokens=tokens)
        loss = objective.loss(m, noised)
        loss.backward()
    assert launched == ["coefficients"] * times + ["affine", "loss", "loss"] and not ran.found
    full = x0.numel() * 4
    assert launched[-3].written == full and full < launched[-3].read < 1.1 * full
    assert full < launched[-2].written < 1.1 * full and launched[-1].read == 8
    with fastdiff.use_backend("triton"):
        plain = objective.noise(x0, seed=3)
        right = objective.loss(tokens.unpack(m, 8, 8), plain)
    assert torch.equal(noised.x_t, tokens.pack(plain.x_t)) and torch.equal(loss, right)
    assert torch.equal(m.grad, torch.autograd.grad(right, m)[0])


@pytest.mark.usefixtures("backend")
def test_what_is_left_out_is_left_out():
    x0, _, m = batch()
    objective, tokens = fastdiff.Objective(VP, "epsilon"), Tokens()
    noised = objective.noise(x0, seed=1, tokens=tokens)
    mask = torch.rand(3, 1, 8, 12) < 0.5
    poisoned = torch.where(mask, m, float("nan"))
    poisoned[2] = float("inf")
    leaf = tokens.pack(poisoned).requires_grad_()
    weight = torch.tensor([1.0, 2.0, 0.0])
    loss = objective.loss(leaf, noised, mask, weight=weight)
    assert_same(
        loss, objective.loss(tokens.pack(torch.where(poisoned.isfinite(), m, 0.0)), noised, mask, weight=weight)
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    gradient = tokens.unpack(gradient, 8, 12)
    assert gradient.isfinite().all() and not gradient[2].any() and not gradient[:2][~mask.expand(x0.shape)[:2]].any()


@pytest.mark.usefixtures("backend")
def test_gradcheck():
    objective, tokens = fastdiff.Objective(FLOW, "flow", loss="log_cosh"), Tokens((2, 1))
    x0, n, m = (x.requires_grad_() for x in batch((2, 2, 4, 3), torch.float64))
    t = torch.tensor([0.3, 0.8])

    def loss(tokens_of_m, x0, n):
        return objective.loss(tokens_of_m, objective.noise(x0, t, n, tokens=tokens))

    assert torch.autograd.gradcheck(loss, (tokens.pack(m.detach()).requires_grad_(), x0, n))
    assert torch.autograd.gradcheck(
        lambda m: loss(m, x0.detach(), n.detach()), tokens.pack(m.detach()).requires_grad_()
    )
    assert torch.autograd.gradcheck(lambda x0, n: objective.noise(x0, t, n, tokens=tokens).x_t, (x0, n))
    assert torch.autograd.gradgradcheck(
        lambda m: loss(m, x0.detach(), n.detach()), tokens.pack(m.detach()).requires_grad_()
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("order", ORDERS)
def test_conversions_stay_tokens(order):
    x0, _, m = batch()
    objective, tokens = fastdiff.Objective(VP, "v_prediction"), Tokens(2, order)
    noised, plain = (objective.noise(x0, seed=2, tokens=t) for t in (tokens, None))
    assert_same(objective.predict_x0(tokens.pack(m), noised), tokens.pack(objective.predict_x0(m, plain)))
    exact = objective.predict_x0(noised.target, noised)
    torch.testing.assert_close(tokens.unpack(exact, 8, 12), x0, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("backend")
def test_halves_copies_and_another_objective():
    x0, _, m = batch((4, 2, 4, 4))
    objective, tokens = fastdiff.Objective(VP, "epsilon"), Tokens()
    whole = objective.noise(x0, seed=3, tokens=tokens)
    half = objective.noise(x0[2:], seed=3, sample_offset=2, tokens=tokens)
    assert torch.equal(whole.x_t[2:], half.x_t)
    again, m = pickle.loads(pickle.dumps(whole)), tokens.pack(m)
    assert torch.equal(objective.loss(m, again), objective.loss(m, whole)) and torch.equal(again.target, whole.target)
    other = fastdiff.Objective(VP, "epsilon", "min_snr")
    assert torch.equal(other.loss(m, whole), other.loss(m, other.noise(x0, whole.t, whole.noise, tokens=tokens)))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_any_strides(layout):
    x0, _, m = batch()
    change = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "sliced": lambda x: torch.cat([x, x], -1)[..., ::2],
        "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    }[layout]
    objective, tokens = fastdiff.Objective(VP, "v_prediction"), Tokens()
    x = change(x0)
    found, want = (objective.noise(data, seed=2, tokens=tokens) for data in (x, x.contiguous()))
    assert torch.equal(found.x_t, want.x_t)
    m = tokens.pack(m)
    spread = torch.cat([m, m], 1)[:, :24]  # a network that has tokens of something else besides
    assert not spread.is_contiguous()
    for prediction in (m, spread, m.transpose(1, 2).contiguous().transpose(1, 2)):
        leaf = prediction.requires_grad_()
        value, right = objective.loss(leaf, found), objective.loss(m, want)
        assert_close(value, right)
        (gradient,) = torch.autograd.grad(value, leaf)
        torch.testing.assert_close(gradient, torch.autograd.grad(right, m)[0])


# ---------------------------------------------------------------------------------------------------------- wrong input

OBJECTIVE = fastdiff.Objective(FLOW, "flow")
X = torch.zeros(2, 4, 8, 6)
WRONG = {
    "no image": (lambda: OBJECTIVE.noise(X[0], tokens=Tokens()), ValueError, r"x0 must be \[B, C, H, W\]"),
    "height": (lambda: OBJECTIVE.noise(X[:, :, :7], tokens=Tokens()), ValueError, r"\(2, 4, 7, 6\).*multiples.*2 x 2"),
    "width": (lambda: OBJECTIVE.noise(X, tokens=Tokens((2, 4))), ValueError, "multiples of the patch, 2 x 4"),
    "times": (
        lambda: OBJECTIVE.noise(X, torch.rand(2, 4), tokens=Tokens()), ValueError, r"one time a sample, \(2,\)"),
    "noise": (lambda: OBJECTIVE.noise(X, noise=Tokens().pack(X), tokens=Tokens()), ValueError, "noise has shape"),
    "prediction": (
        lambda: OBJECTIVE.loss(torch.zeros(2, 12, 15), OBJECTIVE.noise(X, tokens=Tokens())),
        ValueError, r"prediction has shape \(2, 12, 15\), but the tokens of \(2, 4, 8, 6\) are \(2, 12, 16\)"),
    "unpacked": (
        lambda: OBJECTIVE.loss(X, OBJECTIVE.noise(X, tokens=Tokens())), ValueError, "It is unpacked"),
    "no tensor": (
        lambda: OBJECTIVE.loss([X], OBJECTIVE.noise(X, tokens=Tokens())), TypeError, "prediction must be a tensor"),
    "target": (
        lambda: OBJECTIVE.loss(Tokens().pack(X), OBJECTIVE.noise(X, tokens=Tokens()), target=X),
        ValueError, "target has shape"),
    "mask": (
        lambda: OBJECTIVE.loss(Tokens().pack(X), OBJECTIVE.noise(X, tokens=Tokens()), torch.ones(2, 12, 1)),
        ValueError, r"mask has shape \(2, 12, 1\).*laid out as x0"),
    "predict_x0": (
        lambda: OBJECTIVE.predict_x0(X, OBJECTIVE.noise(X, tokens=Tokens())), ValueError, "must be equal"),
    "a number": (lambda: OBJECTIVE.noise(X, tokens=2), TypeError, r"tokens must be a fastdiff.Tokens.*; got 2"),
    "a truth": (lambda: Tokens(True), ValueError, "at least 1; got True"),
    "patch": (lambda: Tokens(0), ValueError, "at least 1; got 0"),
    "patch of three": (lambda: Tokens((1, 2, 2)), ValueError, r"a size, or \(height, width\)"),
    "patch a text": (lambda: Tokens("2"), TypeError, "patch must be a number"),
    "patch a fraction": (lambda: Tokens(2.5), ValueError, "whole sizes"),
    "order": (lambda: Tokens(2, "q p c"), ValueError, "order must be one of 'c p q', 'p q c'; got 'q p c'"),
    "unpack": (lambda: Tokens().unpack(torch.zeros(2, 12, 16), 8, 8), ValueError, "tokens has shape"),
    "pack": (lambda: Tokens(3).pack(X), ValueError, "multiples of the patch, 3 x 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        call()
