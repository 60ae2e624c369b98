"""Calls on whole tensors: the bits of the general way, taken where the case is plain, left alone where it is not."""

import copy
import gc
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from accuracy import assert_same
from asked import native, triton
from costs import python_calls
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import ops
from fastdiff.backends.native.coefficients import handle
from fastdiff.backends.triton import interpreted
from fastdiff.program import lookup, trace

_C = pytest.importorskip("fastdiff._C")
pytestmark = pytest.mark.skipif(native.fast is None, reason="this PyTorch has no C functions for its tensors")

DISCRETE = {
    "epsilon": {},
    "sample": {"weighting": fastdiff.MinSNR(5.0)},
    "v_prediction": {"weighting": fastdiff.MinSNR(5.0), "loss": "huber"},
    "score": {"loss": "l1"},
    "previous_sample": {"loss": "log_cosh"},
    "edm": {"loss": fastdiff.losses.PseudoHuber(0.2, schedule="snr")},
}
CONTINUOUS = [
    (fastdiff.RectifiedFlow(), "flow", {}),
    (fastdiff.RectifiedFlow(shift=3.0), "reversed_flow", {"loss": "smooth_l1"}),
    (fastdiff.RectifiedFlow(shift=3.0, sigma_min=1e-3), "flow", {}),
    (fastdiff.RectifiedFlow(), "flow", {"weighting": "cosmap"}),
    (fastdiff.RectifiedFlow(), "flow", {"error_space": "sample"}),
    (fastdiff.EDM(), "edm", {"weighting": "edm"}),
    (fastdiff.EDM(), "epsilon", {}),
    (fastdiff.VPSDE(), "v_prediction", {}),
]
OBJECTIVES = [fastdiff.Objective(fastdiff.VariancePreserving(), kind, **options) for kind, options in DISCRETE.items()]
OBJECTIVES += [
    fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", error_space="sample"),
    fastdiff.Objective(fastdiff.VariancePreserving("cosine"), "epsilon", noise_offset=0.1),
]
OBJECTIVES += [fastdiff.Objective(process, kind, **options) for process, kind, options in CONTINUOUS]


BOTH = pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)


@pytest.fixture
def backend(request):
    """The backend of that name, forced; "native" where a test does not say."""
    name = getattr(request, "param", "native")
    if name == "triton":
        pytest.importorskip("triton")
        if not interpreted():
            pytest.skip("on CPU tensors Triton's kernels run in its interpreter")
    with fastdiff.use_backend(name):
        yield {"native": native, "triton": triton}[name]


@pytest.fixture
def general(monkeypatch, backend):
    """Runs a function without fast calls."""

    def run(function, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(backend.backend, "fast", None)
            return function(*arguments, **options)

    return run


@pytest.fixture
def only_fast_calls(monkeypatch, backend):
    """Lets nothing but fast calls run."""

    refused, own = ("noise", "loss", "convert", *(["step"] if backend is native else [])), backend.run

    def run(call):
        assert call.operation not in refused, "the general way was taken"
        return own(call)

    monkeypatch.setattr(backend.backend, "run", run)


def batch(dtype=torch.float32, shape=(3, 4, 8, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Triton's interpreter is slow: there each objective has one of the dtypes.
CASES = [("native", objective, dtype) for objective in OBJECTIVES for dtype in DTYPES]
CASES += [("triton", objective, DTYPES[k % 4]) for k, objective in enumerate(OBJECTIVES)]


@pytest.mark.parametrize("backend, objective, dtype", CASES, indirect=["backend"], ids=str)
def test_a_training_step_has_the_bits_of_the_general_way(objective, dtype, general):
    x0, _, prediction = batch(dtype)

    def step():
        m = prediction.clone().requires_grad_()
        noised = objective.noise(x0, seed=-5, sample_offset=7)
        loss = objective.loss(m, noised)
        loss.backward()
        return noised.x_t, noised.t, noised.noise, loss, m.grad, noised.alpha, noised.sigma, noised.weight

    for got, want in zip(step(), general(step)):
        assert_same(got, want)


@pytest.mark.parametrize("backend, objective, dtype", CASES, indirect=["backend"], ids=str)
def test_given_noise_and_times_have_the_bits_of_the_general_way(objective, dtype, general):
    x0, n, prediction = batch(dtype)
    t = objective.timesteps(torch.tensor([0.1, 0.5, 0.97], dtype=torch.float64), objective.process)
    t = t.float() if t.is_floating_point() else t

    def run():
        noised = objective.noise(x0, t, n)
        return noised.x_t, objective.loss(prediction, noised)

    for got, want in zip(run(), general(run)):
        assert_same(got, want)


def masks():
    generator = torch.Generator().manual_seed(1)
    whole, shared = torch.rand(3, 4, 8, 8, generator=generator), torch.rand(3, 1, 8, 8, generator=generator)
    whole[1] = 0
    return {
        "no mask": None,
        "bool": shared > 0.3,
        "bytes": (3 * shared).to(torch.uint8),
        "float32": whole.round(decimals=1),
        "bfloat16": shared.round(decimals=1).bfloat16(),
        "float16": shared.half(),
        "float64": whole.double(),
        "of samples": torch.tensor([True, False, True]),
        "of channels": torch.tensor([[0.5, 0.0, 1.0, 2.0]]),
        "of all samples": shared[:1],
        "late": torch.arange(8.0) // 7 * torch.ones(1, 1, 8, 1),
    }


NORMALIZED = [("mean", by) for by in ("none", "row", "global")] + [("sum", "none")]
NORMALIZED += [("none", by) for by in ("none", "row", "global")]


def weights(dtype):
    some = torch.tensor([0.3, 0.0, 1.7], dtype=dtype)
    return [None, 0.3, 3, some, some.view(3, 1, 1, 1), some[:1], some[2]]


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_weights_and_reductions_have_the_bits_of_the_general_way(name, dtype, general):
    x0, n, prediction = batch(dtype)
    mask = masks()[name]
    objectives = OBJECTIVES[2], OBJECTIVES[0], OBJECTIVES[-5]
    noised = [objective.noise(x0, seed=1) for objective in objectives]
    # The coefficients of noising are float64, but nothing of the loss is.
    noised.append(OBJECTIVES[0].noise(x0.double(), torch.tensor([1, 500, 999]), n.float()))

    def run(of, upstream, **how):
        m = prediction.clone().requires_grad_()
        loss = of.objective.loss(m, of, mask, **how)
        (upstream * loss.sum()).backward()
        return loss, m.grad

    for k, (reduction, by) in enumerate(NORMALIZED * 2):
        for weight in weights(torch.float64 if k % 3 else torch.float32):
            how = {"reduction": reduction, "weight": weight, "mask_normalization": by}
            case = noised[k % 4], (1.0, 0.25)[k // 7]
            for got, want in zip(run(*case, **how), general(run, *case, **how)):
                assert_same(got, want)


@pytest.mark.parametrize("name", masks())
def test_masks_weights_and_reductions_are_fast_calls(name, only_fast_calls):
    objective, (x0, n, m) = OBJECTIVES[2], batch()
    t, mask = torch.tensor([0, 500, 999]), masks()[name]
    noised = objective.noise(x0, t, n)
    for reduction, by in NORMALIZED:
        for weight in weights(torch.float32):
            how = {"mask": mask, "reduction": reduction, "weight": weight, "mask_normalization": by}
            loss = objective.loss(m.requires_grad_(), noised, **how)
            assert loss.isfinite().all() and loss.shape == ((3,) if reduction == "none" else ())
            (loss.sum() / 4).backward()
            other = fastdiff.diffusion_loss(m, x0, n, t, objective.process, "v_prediction", "min_snr", "huber", **how)
            assert_same(other, loss)


@pytest.mark.parametrize("reduction, by", NORMALIZED)
def test_masked_and_weighted_losses_are_the_sums_of_their_definition(reduction, by, only_fast_calls):
    x0, n, m = batch(torch.float64)
    noised = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon").noise(x0, torch.tensor([5, 500, 900]), n)
    mask, weight = torch.rand(3, 1, 8, 8).double().round(decimals=1), torch.tensor([0.5, 2.0, 3.0]).double()
    mask[1] = 0
    got = noised.objective.loss(m, noised, mask, reduction, weight=weight, mask_normalization=by)
    every = mask.expand_as(m).numpy()
    sums = weight.numpy() * (every * (m - n).numpy() ** 2).sum((1, 2, 3))
    counts, empty = every.sum((1, 2, 3)), np.array([0, 1, 0])
    if reduction == "sum":
        want = sums.sum()
    else:
        rows = {"none": sums / 256, "row": sums / (counts + empty), "global": 3 * sums / counts.sum()}[by]
        want = rows if reduction == "none" else rows.sum() / (2 if by == "row" else 3)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-13)


def test_masks_and_weights_that_are_not_plain_are_done_the_general_way(general):
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", "min_snr")
    x0, n, prediction = batch()
    noised = objective.noise(x0, torch.tensor([5, 6, 7]), n)
    spatial = torch.rand(3, 1, 8, 8) > 0.5
    for how in (
        {"mask": spatial.long()},
        {"mask": spatial.int()},
        {"mask": spatial.expand(3, 4, 8, 8)},
        {"mask": spatial.transpose(2, 3)},
        {"mask": spatial.float(), "mask_normalization": "sample"},
        {"mask": torch.rand(3, 4) > 0.5},
        {"mask": torch.tensor(0.5)},
        {"weight": torch.ones(3, dtype=torch.int64)},
        {"weight": torch.ones(3).bfloat16()},
        {"weight": torch.rand(1, 4, 1, 1)},
        {"weight": torch.rand(1, 4, 1, 1), "mask": spatial, "mask_normalization": "row", "reduction": "none"},
        {"weight": torch.rand(6)[::2]},
        {"weight": 2**60 + 1},
        {"weight": float("inf")},
        {"weight": True},
        {"reduction": "sum", "mask_normalization": "row"},
    ):

        def run(how=how):
            m = prediction.clone().requires_grad_()
            loss = objective.loss(m, noised, **how)
            loss.sum().backward()
            return loss, m.grad

        for got, want in zip(run(), general(run)):
            assert_same(got, want)
    for name in ("mask", "weight"):

        def by(name=name):
            given = torch.tensor([0.5, 2.0, 1.0]).requires_grad_()
            objective.loss(prediction, noised, **{name: given}).backward()
            return given.grad

        assert by().abs().min() > 0
        assert_same(by(), general(by))


def test_unfit_masks_and_weights_get_the_usual_errors():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    x0, n, m = batch()
    noised = objective.noise(x0, torch.tensor([5, 6, 7]), n)
    for empty in (torch.zeros(3, 1, 8, 8), -torch.zeros(3).bfloat16(), torch.zeros(3, dtype=torch.bool)):
        with pytest.warns(UserWarning, match="0 everywhere"):
            assert objective.loss(m, noised, empty) == 0
    for kind, message, how in (
        (ValueError, "does not fit", {"mask": torch.ones(8, 8)}),
        (ValueError, "does not fit", {"mask": torch.ones(3, 1, 8, 4)}),
        (ValueError, "does not fit", {"mask": torch.ones(1, 3, 4, 8, 8)}),
        (TypeError, "mask must be a tensor", {"mask": [1, 0, 1]}),
        (ValueError, "divides by nothing", {"mask": torch.ones(3), "reduction": "sum", "mask_normalization": "row"}),
        (ValueError, "reduction must be one of", {"reduction": ["mean"]}),
        (ValueError, "mask_normalization must be one of", {"mask": torch.ones(3), "mask_normalization": "rows"}),
        (ValueError, "weight has shape", {"weight": torch.ones(2)}),
        (ValueError, "weight has shape", {"weight": torch.ones(3, 1)}),
        (TypeError, "weight must be a number", {"weight": "1"}),
    ):
        with pytest.raises(kind, match=message):
            objective.loss(m, noised, **how)
    video = torch.randn(2, 3, 3, 4, 4)
    with pytest.raises(ValueError, match="one a frame or one a channel"):
        objective.loss(video, objective.noise(video, torch.tensor([1, 2])), torch.ones(2, 3))


def test_a_mask_or_weight_that_is_written_into_before_the_backward_is_noticed():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    x0, _, m = batch()
    noised = objective.noise(x0)
    for name in ("mask", "weight"):
        given = torch.ones(3)
        loss = objective.loss(m.requires_grad_(), noised, **{name: given})
        given.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (2 * loss).backward()


@BOTH
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_plain_case_is_a_fast_call(kind, only_fast_calls):
    process = fastdiff.RectifiedFlow() if kind == "flow" else fastdiff.VariancePreserving()
    objective = fastdiff.Objective(process, kind)
    x0, n, m = batch()
    noised = objective.noise(x0)
    objective.loss(m.requires_grad_(), noised).backward()
    assert m.grad.isfinite().all()
    t = torch.rand(3) if kind == "flow" else torch.tensor([0, 500, 999])
    assert objective.loss(m, objective.noise(x0, t, n)).isfinite()
    if kind == "v_prediction":
        assert objective.predict_x0(n, noised).isfinite().all()
    assert fastdiff.q_sample(x0, t, process, n).isfinite().all()
    assert fastdiff.diffusion_loss(m, x0, n, t, process, kind).isfinite()
    row = torch.randn(len(ops.COLUMNS))
    with torch.no_grad():
        ops.step(x0, m, row, noise=n, return_entry=False)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_on_images_is_a_fast_call(dtype, only_fast_calls):
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction")
    images = torch.randint(0, 256, (3, 4, 8, 8), dtype=torch.uint8)
    noised = objective.noise(images, seed=1, dtype=dtype)
    prediction = torch.randn(3, 4, 8, 8).to(dtype).requires_grad_()
    loss = objective.loss(prediction, noised)
    loss.backward()
    want = objective.noise(images.float() / 127.5 - 1, seed=1)
    assert_same(noised.x_t, want.x_t.to(dtype))
    assert_same(loss, objective.loss(prediction, want))


def of_time(levels):
    return 1 / (1 + levels.t)


FORMULAS = {
    "DDPM": lambda: fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon"),
    "SD3": lambda: fastdiff.Objective(
        fastdiff.RectifiedFlow(3.0), "flow", "cosmap", timesteps="logit_normal", error_space="sample"
    ),
    "EDM": lambda: fastdiff.Objective(fastdiff.EDM(), "edm", "edm"),
    "VPSDE": lambda: fastdiff.Objective(fastdiff.VPSDE(), "v_prediction", "likelihood"),
    "a function": lambda: fastdiff.Objective(fastdiff.VPSDE(), "epsilon", of_time),
}


@BOTH
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_of_time_are_fast_calls(name, only_fast_calls):
    objective = FORMULAS[name]()
    x0, n, m = batch()
    noised = objective.noise(x0)
    objective.loss(m.requires_grad_(), noised).backward()
    assert m.grad.isfinite().all()
    assert objective.loss(m, objective.noise(x0, noised.t, n)).isfinite()


def test_noising_is_a_fast_call_in_any_memory_format(only_fast_calls):
    """Made noise counts elements in their logical order, whatever the strides."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), noise_offset=0.1)
    x0, *_ = batch()
    for x in (x0.to(memory_format=torch.channels_last), x0.transpose(1, 3), x0[:, :, ::2], x0[:1].expand(3, 4, 8, 8)):
        got, want = objective.noise(x, seed=4), objective.noise(x.contiguous(), seed=4)
        assert_same(got.x_t, want.x_t)
        assert_same(got.noise, want.noise)
        assert_same(got.t, want.t)
        assert got.x_t.stride() == torch.empty_like(x).stride() and got.x0 is x


def test_noising_is_a_fast_call_whatever_the_weighting(only_fast_calls):
    """Also where the weighting may change from batch to batch."""
    factor = torch.ones(1, dtype=torch.float64)
    objective = fastdiff.Objective(fastdiff.VPSDE(), "epsilon", lambda levels: factor * levels.snr)
    x0, n, _ = batch()
    noised = objective.noise(x0)
    assert noised.x_t.isfinite().all() and objective.noise(x0, noised.t, n).x_t.isfinite().all()
    factor *= 2
    torch.testing.assert_close(noised.weight, 2 * noised.snr)


def entered(call):
    """How many functions of fastdiff a call enters."""
    return python_calls(call, os.path.dirname(fastdiff.__file__))


@pytest.mark.parametrize("name", FORMULAS)
def test_what_a_training_step_costs_the_host(name, backend):
    objective = FORMULAS[name]()
    x0, _, m = batch()
    m.requires_grad_()
    for _ in range(2):
        noised = objective.noise(x0)
        loss = objective.loss(m, noised)
        loss.backward()
    counts = entered(lambda: objective.noise(x0)), entered(lambda: objective.loss(m, noised))
    loss = objective.loss(m, noised)
    counts = *counts, entered(loss.backward)
    # One more where the program may have to be traced again. (Before there were programs: 25, 15, 2; SD3's 82, 99, 2.)
    traced = name != "DDPM"
    most = 22 + traced, 15 + traced, 2
    assert all(count <= limit for count, limit in zip(counts, most)), (counts, most)


@pytest.mark.parametrize(
    "how",
    [
        {"mask": torch.rand(3, 1, 8, 8) > 0.3},
        {"mask": torch.ones(3), "mask_normalization": "global", "weight": 0.5},
        {"weight": torch.ones(3)},
        {"reduction": "sum"},
        {"reduction": "none"},
        {},
    ],
    ids=lambda how: ", ".join(how),
)
def test_what_a_masked_or_weighted_loss_costs_the_host(how, backend):
    """As much as a plain one, also where its gradient is made for another upstream gradient than 1."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    x0, _, m = batch()
    noised = objective.noise(x0)
    m.requires_grad_()
    objective.loss(m, noised, **how)
    losses = []
    assert entered(lambda: losses.append(objective.loss(m, noised, **how))) <= 15
    scaled = losses[0].sum() / 4
    assert entered(scaled.backward) <= 6


@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(512.0)])
def test_what_a_loss_with_its_gradient_costs_the_host(scale, backend):
    """Less than the loss, the scaling of it and the backward; and its operators of PyTorch are few."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    x0, _, m = batch()
    noised = objective.noise(x0)
    m.requires_grad_()
    objective.loss_and_gradient(m, noised, scale)
    assert entered(lambda: objective.loss_and_gradient(m, noised, scale)) <= 18
    with torch.profiler.profile() as profile:
        objective.loss_and_gradient(m, noised, scale)
    called = {event.name for event in profile.events()}
    assert called <= {"aten::detach", "detach", "aten::full", "aten::fill_", "aten::empty", "aten::empty_like",
                      "aten::empty_strided", "aten::to", "[memory]"}, called  # fmt: skip


def test_what_a_short_run_costs_the_host(backend):
    """``fastdiff.sample`` with two steps of DDPM: what is checked and prepared, and the steps."""
    process = fastdiff.VariancePreserving()

    def run():
        fastdiff.sample(lambda x, t: x, (4, 4, 32, 32), process, "ddpm", 2, "epsilon", seed=0, progress=False)

    run()  # which makes the plan
    assert entered(run) <= 98


@BOTH
@pytest.mark.parametrize("upstream", [1.0, 3.0, 0.0])
def test_any_upstream_gradient_and_a_second_use(upstream, general):
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", "min_snr")
    x0, n, prediction = batch(torch.bfloat16)

    def run():
        m = prediction.clone().requires_grad_()
        loss = objective.loss(m, objective.noise(x0, torch.tensor([1, 2, 3]), n))
        (first,) = torch.autograd.grad(loss, m, torch.tensor(upstream), retain_graph=True)
        (second,) = torch.autograd.grad(loss, m, torch.tensor(upstream))
        return first, second

    (first, second), (want, _) = run(), general(run)
    assert_same(first, want)
    assert_same(second, want)


@BOTH
def test_a_scaled_float16_loss_rounds_its_gradient_once(general):
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    x0, n, prediction = batch(torch.float16)

    def run():
        m = prediction.clone().requires_grad_()
        (objective.loss(m, objective.noise(x0, torch.tensor([1, 2, 3]), n)) * 65536.0).backward()
        return m.grad

    assert_same(run(), general(run))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mask", [None, torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]])])
def test_the_gradient_of_the_gradient(mask, reduction):
    """Of a loss that knows the coefficients of its noising, and of the function, which has none to know."""
    objective, t = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow"), torch.tensor([0.2, 0.8])
    x0, n, m = batch(torch.float64, (2, 3))
    noised = objective.noise(x0, t, n)

    def loss(m):
        return objective.loss(m, noised, mask, reduction, weight=3.0)

    def function(m):
        return fastdiff.diffusion_loss(
            m, x0, n, t, objective.process, "flow", mask=mask, reduction=reduction, weight=3.0
        )

    for of in (loss, function):
        assert torch.autograd.gradcheck(of, m.requires_grad_()) and torch.autograd.gradgradcheck(of, m)


@BOTH
def test_what_is_not_plain_is_done_the_general_way(general):
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", "min_snr")
    x0, n, m = batch()
    t = torch.tensor([5, 6, 7])
    channels_last = x0.to(memory_format=torch.channels_last)
    for x, times, noise in (
        (channels_last, t, n),
        (x0, t.int(), n),
        (x0, t.view(3, 1, 1, 1), n),
        (x0, 5, n),
        (x0, [5, 6, 7], n),
        (x0, t, n.double()),
        (x0, t, n.transpose(2, 3)),
        (x0[:0], t[:0], n[:0]),
        (x0[:1].expand(3, 4, 8, 8), t, n),
        (torch.nn.Parameter(x0), t, n),
    ):

        def run(x=x, times=times, noise=noise):
            noised = objective.noise(x, times, noise)
            return noised.x_t.detach(), objective.loss(m[: len(x)], noised).detach()

        for got, want in zip(run(), general(run)):
            assert_same(got, want)
            assert got.stride() == want.stride()


def test_gradients_of_x0_and_noise_are_kept():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction")
    x0, n, m = batch(torch.float64, (2, 3))
    t = torch.tensor([100, 900])

    def run(x0, n, m):
        noised = objective.noise(x0, t, n)
        return objective.loss(m, noised) + noised.x_t.sum()

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in (x0, n, m)])


@BOTH
def test_transforms_and_subclasses_are_left_alone(general):
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    x0, n, m = batch()
    t = torch.tensor([5, 6, 7])

    class Mine(torch.Tensor):
        pass

    assert_same(
        objective.noise(x0.as_subclass(Mine), t, n).x_t.as_subclass(torch.Tensor), objective.noise(x0, t, n).x_t
    )
    each = torch.func.vmap(lambda x, n: objective.noise(x, t, n).x_t)(x0[None], n[None])
    assert_same(each[0], objective.noise(x0, t, n).x_t)
    noised = objective.noise(x0, t, n)
    m = m.requires_grad_()
    want = torch.autograd.grad(objective.loss(m, noised), m)[0]
    torch.testing.assert_close(torch.func.grad(lambda m: objective.loss(m, noised))(m.detach()), want)


@BOTH
def test_a_forced_backend_leaves_other_devices_to_the_reference(backend):
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction")
    x0 = torch.empty(3, 4, 8, 8, device="meta")
    m = torch.empty_like(x0, requires_grad=True)
    for seed in (None, 5, torch.zeros(1, dtype=torch.int64, device="meta")):
        noised = objective.noise(x0, seed=seed)
        objective.loss(m, noised).backward()
        assert noised.x_t.shape == noised.noise.shape == x0.shape and m.grad.device.type == "meta"


def test_unfit_input_gets_the_usual_errors():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    x0, n, m = batch()
    for t in (torch.tensor([0, 1, 1000]), torch.tensor([-1, 0, 0])):
        with pytest.raises(ValueError, match="must lie in"):
            objective.noise(x0, t, n)
    with pytest.raises(TypeError, match="integer"):
        objective.noise(x0, torch.rand(3), n)
    with pytest.raises(ValueError, match="shape"):
        objective.noise(x0, torch.tensor([0, 1, 2]), n[:2])
    with pytest.raises(ValueError, match="shape"):
        objective.loss(m[:2], objective.noise(x0))
    with pytest.raises(TypeError, match="seed"):
        objective.noise(x0, seed="no")
    flow = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    for t in ([0.0, 0.5, 1.5], [0.0, 0.5, float("nan")]):
        with pytest.raises(ValueError, match="must lie in"):
            flow.noise(x0, torch.tensor(t), n)
    with pytest.raises(ValueError, match="must lie in"):
        fastdiff.Objective(fastdiff.EDM(), "edm").noise(x0, torch.tensor([1.0, 2.0, float("inf")]), n)


@pytest.mark.parametrize("t", [[0.0, 0.5, 1.5], [0.0, 0.5, float("nan")], [-0.1, 0.0, 0.0]])
def test_a_loss_that_is_the_same_at_all_times_still_looks_at_t(t):
    x0, n, m = batch()
    with pytest.raises(ValueError, match="must lie in"):
        fastdiff.diffusion_loss(m, x0, n, torch.tensor(t), fastdiff.RectifiedFlow(), "flow")
    with pytest.raises(TypeError, match="floating point"):
        fastdiff.diffusion_loss(m, x0, n, torch.tensor([0, 1, 1]), fastdiff.RectifiedFlow(), "flow")


@BOTH
def test_times_of_frames_have_the_bits_of_the_general_way(general):
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    x0, n, m = batch(shape=(3, 5, 7, 9))
    noised = objective.noise(x0, torch.rand(3, 5), n)

    def run():
        p = m.clone().requires_grad_()
        loss = objective.loss(p, noised)
        return loss, *torch.autograd.grad(loss, p)

    for got, want in zip(run(), general(run)):
        assert_same(got, want)


def test_offset_noise_of_data_without_channels_is_refused():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon", noise_offset=0.1)
    with pytest.raises(ValueError, match="channels"):
        objective.noise(torch.randn(3, 4))


def test_a_subclass_of_a_process_is_asked_for_its_own_levels():
    class Curved(fastdiff.RectifiedFlow):
        def alpha_sigma(self, t):
            t = t.double()
            return (1 - t) ** 2, t

    x0, n, _ = batch(torch.float64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    rows = t.view(-1, 1, 1, 1)
    noised = fastdiff.Objective(Curved(), "sample").noise(x0, t, n)
    torch.testing.assert_close(noised.x_t, (1 - rows) ** 2 * x0 + rows * n, rtol=1e-14, atol=1e-14)


def test_copies_make_their_own_calls():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", "min_snr")
    x0, n, _ = batch()
    t = torch.tensor([5, 6, 7])
    want = objective.noise(x0, t, n).x_t
    for other in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert_same(other.noise(x0, t, n).x_t, want)
    other = copy.deepcopy(objective)
    del objective
    gc.collect()
    assert_same(other.noise(x0, t, n).x_t, want)


def test_seeds_and_generators():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    x0, _, _ = batch(shape=(4, 3, 4, 4))
    whole = objective.noise(x0, seed=2**64 - 3)
    halves = [objective.noise(x0[k : k + 2], seed=torch.tensor(-3), sample_offset=k) for k in (0, 2)]
    for name in ("x_t", "t", "noise"):
        assert_same(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))
    one, other = (objective.noise(x0, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert_same(one.x_t, other.x_t)
    assert not torch.equal(objective.noise(x0).x_t, objective.noise(x0).x_t)
    not_kept = objective.noise(x0, seed=9, keep_noise=False)
    assert isinstance(not_kept.noise_source, ops.Philox)
    assert_same(not_kept.noise, objective.noise(x0, seed=9).noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("noise", ["none", "given", "made", "offset"])
def test_a_step_has_the_bits_of_the_general_way(dtype, noise, general):
    x, n, m = batch(dtype)
    row = torch.randn(len(ops.COLUMNS), dtype=torch.float64).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    z = {"none": None, "given": n, "made": ops.Philox(4, 2, 17), "offset": ops.Philox(4, 2, 17, 0.3)}[noise]

    def run():
        return ops.step(x, m, row, clip=0.7, noise=z, return_entry=False)

    for got, want in zip(run()[:2], general(run)[:2]):
        assert_same(got, want)
    assert run()[2] is None


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sample", "epsilon", "score"])
def test_a_conversion_has_the_bits_of_the_general_way(dtype, kind, general):
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction")
    x0, n, m = batch(dtype)
    noised = objective.noise(x0, torch.tensor([0, 500, 999]), n)
    assert_same(objective.convert(m, noised, kind), general(objective.convert, m, noised, kind))
    m.requires_grad_()
    got, want = (run(objective.convert, m, noised, kind) for run in (lambda f, *a: f(*a), general))
    assert_same(torch.autograd.grad(got.sum(), m)[0], torch.autograd.grad(want.sum(), m)[0])


def test_a_conversion_that_is_not_determined_is_refused():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(zero_terminal_snr=True), "epsilon")
    x0, n, m = batch()
    with pytest.raises(ValueError, match="does not determine"):
        objective.predict_x0(m, objective.noise(x0, torch.tensor([0, 500, 999]), n))


def test_large_results_have_the_bits_of_small_ones():
    """Above 32 MiB memory is asked for in large pages, and written past the caches."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction")
    x0 = torch.randn(9, 1024, 1024)
    m = torch.randn_like(x0).requires_grad_()
    whole = objective.noise(x0, seed=1)
    (gradient,) = torch.autograd.grad(objective.loss(m, whole), m)
    for k in (0, 8):
        one = objective.noise(x0[k : k + 1], seed=1, sample_offset=k)
        assert_same(whole.x_t[k], one.x_t[0])
        assert_same(whole.noise[k], one.noise[0])
        m_k = m[k : k + 1].detach().requires_grad_()
        (small,) = torch.autograd.grad(objective.loss(m_k, one), m_k)
        # Both have the divisor in a factor that is rounded once, and are rounded themselves.
        torch.testing.assert_close(gradient[k] * 9, small[0], rtol=4 * 2**-24, atol=0)


def test_several_threads_at_once():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction")
    x0, n, m = batch(shape=(2, 4, 64, 64))  # large enough for the lock to be let go
    t = torch.tensor([5, 600])
    want = objective.loss(m, objective.noise(x0, t, n))
    failed = []

    def work():
        for _ in range(50):
            if not torch.equal(objective.loss(m, objective.noise(x0, t, n)), want):
                failed.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
    st.tuples(st.integers(-5, 5), st.integers(-5, 5), st.integers(-5, 5), st.floats(-1, 1)),
    st.sampled_from(
        [
            torch.randn(2, 3),
            torch.randn(2, 3).double(),
            torch.ones(2, 3, dtype=torch.uint8),
            torch.randn(3, 2).T,
            torch.randn(6),
            torch.zeros(0, 3),
            torch.tensor(1.0),
            torch.tensor([0, 1]),
            torch.tensor([0, 9]),
            torch.randn(2, 3, dtype=torch.complex64),
            torch.randn(2, 3).to_sparse(),
            torch.ones(2, 3, device="meta"),
        ]
    ),
    st.sampled_from([object(), int, [], {}]),
)


OPTIONS = [  # mask, normalization, reduction, weight
    (None, 0, 0, None),
    (torch.tensor([[True, False, True]]), 1, 0, torch.tensor([1.0, 2.0])),
    (torch.ones(2), 2, 2, torch.tensor(0.5)),
    (torch.ones(2, 3), 0, 1, None),
]


@settings(max_examples=10000, deadline=None)
@given(st.data())
def test_no_arguments_reach_a_kernel_unchecked(data):
    table, wide = (
        handle(lookup(torch.rand(3, columns, dtype=torch.float64), names), names)
        for columns, names in ((2, tuple("ab")), (5, tuple("abcde")))
    )
    draw = trace(lambda u: {"t": u * 3}, 0.0, 1.0)
    name = data.draw(st.sampled_from(["noise", "loss", "convert", "step", "times"]))
    x, t = torch.randn(2, 3), torch.tensor([0, 2])
    fit = {
        "noise": [table, x, t, x, x.clone(), None, 1],
        "loss": [wide, 3, 0, x, x, x, t, torch.tensor(0.0), True, 1, *data.draw(st.sampled_from(OPTIONS)), None],
        "convert": [table, x, x, t, 1],
        "step": [x, x, torch.randn(len(ops.COLUMNS)), None, None, True, 1],
        "times": [handle(draw, ("t",)), t.clone(), 3, 4, 0],
    }[name]
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(fit) - 1))
        fit[place] = data.draw(ANYTHING)
    if data.draw(st.integers(0, 20)) == 0:
        fit = fit[:-1]
    try:
        getattr(_C, f"fast_{name}")(*fit)
    except (TypeError, ValueError):
        pass


def test_a_step_whose_noise_has_an_offset_is_a_fast_call(only_fast_calls):
    x, m, _ = batch()
    row = torch.rand(len(ops.COLUMNS))
    noise = ops.Philox(7, 3, 20, offset=0.1)
    y, _, _ = ops.step(x, m, row, noise=noise, return_entry=False)
    with fastdiff.use_backend("reference"):
        assert_same(y, ops.step(x, m, row, noise=noise, return_entry=False)[0])
