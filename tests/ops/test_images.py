"""Images of uint8, decoded as x0 / 127.5 - 1 where they are read: against NumPy, and decoding them first."""

import numpy as np
import pytest
import torch
from accuracy import assert_rounded, assert_same, to_numpy
from devices import on_every_device, pairwise
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import losses, ops
from fastdiff.tensors import decoded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["epsilon", "sample", "v_prediction", "previous_sample", "score"]
VP, FLOW = fastdiff.VariancePreserving(), fastdiff.RectifiedFlow()


def bytes_of(*shape, device="cpu"):
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def assert_same_sum(found, right, device):
    """On a GPU the layout of a tile, and with it the order of a sum in it, follows the size of what is read."""
    torch.testing.assert_close(found, right, rtol=1e-6 if device == "cuda" else 0, atol=0)


def first(images):
    """Decoded in two rounded operations of float32, by NumPy."""
    return torch.from_numpy(images.cpu().numpy().astype(np.float32) / np.float32(127.5) - np.float32(1)).to(
        images.device
    )


@on_every_device
@pytest.mark.parametrize("shape", [(1, 256), (256, 1), (2, 128), (4, 8, 8)])
def test_all_256_bytes(backend, device, shape):
    images = torch.arange(256, device=device).to(torch.uint8).reshape(shape)
    want = first(images)
    assert want.min() == -1 and want.max() == 1
    assert torch.equal(decoded(images), want)
    x_t, _ = ops.noise(images, 1.0, 0.0, torch.zeros(shape, device=device), dtype=torch.float32)
    assert torch.equal(x_t, want)
    assert float(ops.loss(torch.zeros(shape, device=device), images, None, p=1.0)) == pytest.approx(
        float((to_numpy(want) ** 2).mean()), rel=1e-6
    )
    errors = ops.loss(want.view(256, 1), images.view(256, 1), None, p=1.0, function="l1", reduction="none")
    assert torch.equal(errors, torch.zeros_like(errors))


@on_every_device
@pairwise(
    dtype=DTYPES, shape=[(3, 3, 8, 8), (2, 3, 37), (4, 5), (1, 3, 65, 33)], keep=[True, False], given=[True, False]
)
def test_noising_has_the_bits_of_decoding_first(backend, device, dtype, shape, keep, given):
    images, n = bytes_of(*shape, device=device), torch.randn(shape, device=device)
    alpha, sigma = torch.rand(2, shape[0], device=device)
    source = n if given else ops.Philox(3, offset=0.1 if len(shape) > 2 else 0.0)
    got, kept = ops.noise(images, alpha, sigma, source, keep_noise=keep, dtype=dtype)
    want, wanted = ops.noise(first(images), alpha, sigma, source, keep_noise=keep)
    assert got.dtype == dtype and torch.equal(got, want.to(dtype))
    assert kept is source if given or not keep else torch.equal(kept, wanted)


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"keep_noise": False}, {"with_target": True}], ids=str)
def test_a_training_step_has_the_numbers_of_decoding_first(backend, device, dtype, kind, options):
    objective = fastdiff.Objective(VP, kind, error_space="sample" if kind == "v_prediction" else None)
    images = bytes_of(4, 3, 6, 6, device=device)
    noised = objective.noise(images, seed=3, dtype=dtype, **options)
    want = objective.noise(first(images), seed=3, **options)
    assert noised.x0 is images and noised.x_t.dtype == dtype and torch.equal(noised.t, want.t)
    for name in ("x_t", "target", "model_input"):
        assert torch.equal(getattr(noised, name), getattr(want, name).to(dtype)), name
    assert torch.equal(noised.noise, want.noise) and noised.noise.dtype == torch.float32
    prediction = torch.randn(4, 3, 6, 6, device=device).to(dtype).requires_grad_()
    for how in ({}, {"mask": torch.rand(4, 1, 6, 6, device=device) < 0.5}, {"weight": 2.0}, {"reduction": "none"}):
        found, right = (objective.loss(prediction, n, **how) for n in (noised, want))
        assert_same_sum(found, right, device)
        gradients = [torch.autograd.grad(loss.sum() * 1.5, prediction)[0] for loss in (found, right)]
        assert_same(*gradients)
    if kind != "previous_sample":
        x0 = objective.predict_x0(prediction.detach(), noised)
        assert x0.dtype == dtype and x0.isfinite().all()


@pytest.mark.usefixtures("backend")
@pairwise(kind=["flow", "reversed_flow"], dtype=DTYPES, loss=["mse", "huber"])
def test_a_flow_against_numpy(kind, dtype, loss):
    images, n = bytes_of(3, 2, 5, 7), torch.randn(3, 2, 5, 7)
    t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    objective = fastdiff.Objective(FLOW, kind, loss=losses.Huber(0.3) if loss == "huber" else "mse")
    noised = objective.noise(images, t, n, dtype=dtype)
    x, z, time = to_numpy(images) / 127.5 - 1, to_numpy(n), to_numpy(t)[:, None, None, None]
    # The decoding itself is two roundings of float32.
    assert_rounded(noised.x_t, (1 - time) * x + time * z, np.abs(x) + 1 + np.abs(z), operations=5)
    prediction = torch.randn(3, 2, 5, 7).to(dtype)
    e = to_numpy(prediction) - (z - x if kind == "flow" else x - z)
    if loss == "huber":
        rho = np.where(np.abs(e) < 0.3, e * e / 2, 0.3 * (np.abs(e) - 0.15))
    else:
        rho = e * e
    np.testing.assert_allclose(to_numpy(objective.loss(prediction, noised)), rho.mean(), rtol=2e-6)


@pytest.mark.usefixtures("backend")
def test_gradcheck_of_the_prediction():
    images, n = bytes_of(3, 4), torch.randn(3, 4, dtype=torch.float64)
    prediction = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.rand(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, w: ops.loss(m, images, n, p=0.7, q=-0.3, weight=w), (prediction, w))
    noise = n.clone().requires_grad_()
    x_t = ops.noise(images, 0.5, 0.25, noise, dtype=torch.float32)[0]
    (gradient,) = torch.autograd.grad(x_t.sum(), noise)
    assert torch.equal(gradient, torch.full_like(n, 0.25))


@pytest.mark.usefixtures("backend")
@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=5), seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES)
)
def test_any_shape(shape, seed, dtype):
    torch.manual_seed(seed)
    images, n = bytes_of(2, *shape), torch.randn(2, *shape)
    alpha, sigma = torch.rand(2, 2)
    got = ops.noise(images, alpha, sigma, n, dtype=dtype)[0]
    assert torch.equal(got, ops.noise(first(images), alpha, sigma, n)[0].to(dtype))
    found, right = (ops.loss(got, x0, n, p=alpha, q=sigma, reduction="sum") for x0 in (images, first(images)))
    assert torch.equal(found, right)


@on_every_device
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_any_strides(backend, device, layout):
    images, n = bytes_of(2, 3, 6, 8, device=device), torch.randn(2, 3, 6, 8, device=device)
    if layout == "channels_last":
        strided = images.contiguous(memory_format=torch.channels_last)
    else:
        strided = torch.cat([images, images], -1)[..., ::2]
        images = strided.contiguous()
    objective = fastdiff.Objective(FLOW, "flow")
    for noise in (None, n):
        found, want = (objective.noise(x, noise=noise, seed=1, dtype=torch.bfloat16) for x in (strided, images))
        assert torch.equal(found.x_t, want.x_t) and torch.equal(found.target, want.target)
        assert_same_sum(objective.loss(found.x_t, found), objective.loss(want.x_t, want), device)
        if layout == "channels_last":
            assert found.x_t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES)
def test_floating_data_in_another_dtype(dtype):
    """Computed as without it, and rounded once."""
    x0, objective = torch.randn(3, 4, 5), fastdiff.Objective(FLOW, "flow")
    found, plain = objective.noise(x0, seed=2, dtype=dtype), objective.noise(x0, seed=2)
    assert torch.equal(found.x_t, plain.x_t.to(dtype)) and torch.equal(found.target, plain.target.to(dtype))
    leaf = x0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective.noise(leaf, 0.25, seed=2, dtype=dtype).x_t.float().sum(), leaf)
    assert torch.equal(gradient, torch.full_like(x0, 0.75))


def test_a_copy_and_an_explanation():
    import pickle

    objective = fastdiff.Objective(VP, "v_prediction")
    noised = objective.noise(bytes_of(2, 3, 4, 4), seed=1, dtype=torch.bfloat16)
    again = pickle.loads(pickle.dumps(noised))
    assert torch.equal(again.target, noised.target) and again.target.dtype == torch.bfloat16
    assert torch.equal(objective.loss(again.x_t, again), objective.loss(noised.x_t, noised))
    assert "loss: " in objective.explain(bytes_of(2, 3, 4, 4))


WRONG = {
    "no dtype": (lambda o, u: o.noise(u), TypeError, "uint8 with dtype=.*got torch.uint8 without dtype"),
    "no dtype of ops": (lambda o, u: ops.noise(u, 1.0, 1.0, ops.Philox(0)), TypeError, "uint8 with dtype="),
    "dtype of integers": (lambda o, u: o.noise(u, dtype=torch.uint8), ValueError, "dtype, of x_t, must be one of"),
    "dtype of float64": (lambda o, u: o.noise(u, dtype=torch.float64), ValueError, "float32.*bfloat16.*float16"),
    "dtype a name": (lambda o, u: o.noise(u.float(), dtype="bfloat16"), ValueError, "got 'bfloat16'"),
    "int8": (lambda o, u: o.noise(u.to(torch.int8), dtype=torch.float32), TypeError, "x0 must be floating.*int8"),
    "bool": (lambda o, u: o.noise(u > 9, dtype=torch.float32), TypeError, "x0 must be floating.*bool"),
    "noise": (lambda o, u: o.noise(u, noise=u, dtype=torch.float32), TypeError, "noise must be floating"),
    "prediction": (
        lambda o, u: o.loss(u, o.noise(u, dtype=torch.float32)), TypeError, "prediction must be floating"),
    "target": (
        lambda o, u: o.loss(u.float(), o.noise(u.float()), target=u), TypeError, "target must be floating"),
    "y": (lambda o, u: o.loss(u.float(), o.noise(u.float()), y=u), TypeError, "y must be floating"),
    "convert": (lambda o, u: ops.convert(u, u, 1.0, 1.0), TypeError, "must be floating"),
    "moments": (lambda o, u: ops.row_moments(u), TypeError, "must be floating"),
    "a bound": (
        lambda o, u: ops.gaussian_kl(
            u.float(), u, None, p=1.0, scale=1.0, l_0=0.0, l_q=0.0, half_width=1 / 255
        ),
        TypeError, "x0 must be floating"),
    "a step": (lambda o, u: ops.step(u, u, torch.ones(len(ops.COLUMNS))), TypeError, "must be floating"),
}  # fmt: skip


@pytest.mark.usefixtures("backend")
def test_q_sample_of_images():
    u, t, process = bytes_of(2, 3, 4, 4), torch.tensor([3, 900]), fastdiff.VariancePreserving()
    n = torch.randn(2, 3, 4, 4)
    found = fastdiff.q_sample(u, t, process, n, dtype=torch.float32)
    assert torch.equal(found, fastdiff.q_sample(u.float() / 127.5 - 1, t, process, n))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        call(fastdiff.Objective(FLOW, "flow"), bytes_of(2, 3, 4, 4))
