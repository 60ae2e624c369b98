"""Objective, q_sample and diffusion_loss: against each other and against trainers' own arithmetic."""

import gc
import weakref

import numpy as np
import oracle
import pytest
import torch
from accuracy import to_numpy

import fastdiff
from fastdiff import losses, weighting
from fastdiff import timesteps as ts
from fastdiff.philox import draw_seed
from fastdiff.prediction import conversion

PAIRS = [
    (fastdiff.VariancePreserving(), "epsilon"),
    (fastdiff.VariancePreserving("cosine"), "sample"),
    (fastdiff.VariancePreserving("scaled_linear", zero_terminal_snr=True), "v_prediction"),
    (fastdiff.VariancePreserving(steps=50), "previous_sample"),
    (fastdiff.RectifiedFlow(shift=3.0), "flow"),
    (fastdiff.RectifiedFlow(sigma_min=1e-3), "flow"),
    (fastdiff.RectifiedFlow(), "reversed_flow"),
    (fastdiff.EDM(), "edm"),
    (fastdiff.EDM(), "sample"),
    (fastdiff.VPSDE(), "score"),
    (fastdiff.VESDE(), "score"),
    (fastdiff.SubVPSDE(), "epsilon"),
]
IDS = [f"{type(process).__name__}-{prediction}" for process, prediction in PAIRS]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("process", "prediction"), PAIRS, ids=IDS)
def test_perfect_prediction(process, prediction, device):
    """The loss of the target is 0, its x0 estimate is x0, and its conversions are the other targets."""
    objective = fastdiff.Objective(process, prediction)
    x0 = torch.randn(6, 2, 4, dtype=torch.float64, device=device)
    noised = objective.noise(x0)
    assert objective.loss(noised.target, noised) == 0
    # 1e-9: at the noisiest levels x0 is multiplied by alpha ~ 6e-3 and what float64 rounding leaves is divided by it,
    # for previous_sample by far less.
    torch.testing.assert_close(objective.predict_x0(noised.target, noised), x0, rtol=1e-9, atol=1e-9)
    epsilon = objective.convert(noised.target, noised, "epsilon")
    torch.testing.assert_close(epsilon, noised.noise.double(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("process", "prediction"), PAIRS, ids=IDS)
def test_functions_and_the_object_are_the_formulas(process, prediction):
    """x_t and the loss of all kinds, at the levels of the process (taken as exact; test_process.py has them)."""
    weighting = None if prediction == "previous_sample" else fastdiff.MinSNR(3.0)
    objective = fastdiff.Objective(process, prediction, weighting, "huber")
    x0, n, m = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    t = objective.noise(x0).t
    noised = objective.noise(x0, t, n)
    alpha, sigma = (row.numpy().reshape(4, 1, 1) for row in process.alpha_sigma(t))
    how = {"sigma_min": getattr(process, "sigma_min", 0.0) if prediction == "flow" else 0.0}
    if prediction == "previous_sample":
        how["posterior_coefficients"] = [row.numpy().reshape(4, 1, 1) for row in process.posterior(t)[:2]]
    x_t, target = alpha * to_numpy(x0) + sigma * to_numpy(n), oracle.target(prediction, x0, n, alpha, sigma, **how)
    for got in (noised.x_t, fastdiff.q_sample(x0, t, process, n)):
        oracle.assert_close(got, x_t, absolute=1e-14 * (abs(alpha) + abs(sigma)))
    mask = (torch.rand(4, 1, 5) < 0.7).double()
    error = oracle.loss_huber(to_numpy(m) - target) * mask.numpy()
    if weighting is not None:
        error = error * oracle.weight_min_snr(prediction, alpha, sigma, gamma=3.0)
    for reduction, expected in (("mean", error.mean()), ("sum", error.sum()), ("none", error.mean((1, 2)))):
        got = objective.loss(m, noised, mask, reduction)
        oracle.assert_close(got, expected, rel=1e-10, absolute=1e-12)
        function = fastdiff.diffusion_loss(
            m, x0, n, t, process, prediction=prediction, weighting=weighting, loss="huber", mask=mask,
            reduction=reduction,
        )  # fmt: skip
        assert torch.equal(got, function), "to the bit: one way is the other"


def test_noised_has_what_a_trainer_logs():
    process = fastdiff.VariancePreserving()
    noised = fastdiff.Objective(process, "v_prediction", fastdiff.MinSNR(5.0)).noise(torch.randn(4, 3), seed=1)
    assert noised.t.dtype == torch.int64 and noised.model_time is noised.t and noised.model_input is noised.x_t
    abar = to_numpy(process.alpha_bar[noised.t])
    # float32 roundings of float64 coefficients; the SNR squares and divides two of them.
    np.testing.assert_allclose(to_numpy(noised.alpha), np.sqrt(abar), rtol=6e-8)
    np.testing.assert_allclose(to_numpy(noised.sigma), np.sqrt(1 - abar), rtol=6e-8)
    np.testing.assert_allclose(to_numpy(noised.snr), abar / (1 - abar), rtol=4e-7)
    expected = oracle.weight_min_snr("v_prediction", np.sqrt(abar), np.sqrt(1 - abar)).astype(np.float64)
    np.testing.assert_allclose(to_numpy(noised.weight), expected, rtol=6e-8)


def test_per_frame_times_and_clean_history():
    """Frames at their own noise levels; frames kept clean are left out by the mask (Diffusion Forcing, video)."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    x0 = torch.randn(2, 5, 3, 4, 4)  # [batch, frames, channels, height, width]
    t = torch.rand(2, 5)
    t[:, :2] = 0
    noised = objective.noise(x0, t)
    assert torch.equal(noised.x_t[:, :2], x0[:, :2])
    mask = (t > 0).view(2, 5, 1, 1, 1)
    m = torch.randn_like(x0)
    per_frame = objective.loss(m, noised, mask, "none", mask_normalization="row")
    assert per_frame.shape == (2, 5) and bool((per_frame[:, :2] == 0).all())
    expected = ((m - (noised.noise - x0)) ** 2)[:, 2:].mean()
    got = objective.loss(m, noised, mask, mask_normalization="global")
    torch.testing.assert_close(got, expected)
    channels_first = objective.noise(x0.transpose(1, 2), t.view(2, 1, 5, 1, 1), noised.noise.transpose(1, 2))
    assert torch.equal(channels_first.x_t.transpose(1, 2), noised.x_t)
    rows = objective.loss(m.transpose(1, 2), channels_first, reduction="none")
    torch.testing.assert_close(rows.view(2, 5), objective.loss(m, noised, reduction="none"))


def test_error_space_is_the_preconditioned_trainers_loss():
    """SD3's scripts turn the output into x0 (m * -sigma + x_t) and weigh that error; here it is a factor."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", "sigma_sqrt", error_space="sample")
    x0, m = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    noised = objective.noise(x0)
    sigma = noised.sigma.view(-1, 1, 1)
    model_pred = m * -sigma + noised.x_t
    expected = (sigma**-2 * (model_pred - x0) ** 2).mean()
    torch.testing.assert_close(objective.loss(m, noised), expected, rtol=1e-12, atol=0)
    # For Huber the error itself is scaled, not only its square's weight.
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", loss="huber", error_space="sample")
    noised = objective.noise(x0)
    alpha, sigma = noised.alpha.view(-1, 1, 1), noised.sigma.view(-1, 1, 1)
    expected = torch.nn.functional.huber_loss(alpha * noised.x_t - sigma * m, x0)
    torch.testing.assert_close(objective.loss(m, noised), expected, rtol=1e-12, atol=0)


def test_edm_is_the_papers_loss():
    """Karras et al. 2022, equation 8 and table 1, from a raw network F and from a denoiser D."""
    x0 = torch.randn(5, 2, 4, dtype=torch.float64)
    F = torch.randn_like(x0)
    raw = fastdiff.Objective(fastdiff.EDM(0.5), "edm", fastdiff.EDMWeighting())
    noised = raw.noise(x0)
    sigma = noised.t.view(-1, 1, 1)
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    denoised = c_skip * noised.x_t + c_out * F
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = (weight * (denoised - x0) ** 2).mean()
    torch.testing.assert_close(raw.loss(F, noised), expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(noised.model_input, noised.x_t / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(noised.model_time, noised.t.log() / 4)
    torch.testing.assert_close(raw.predict_x0(F, noised), denoised)
    wrapped = fastdiff.Objective(fastdiff.EDM(0.5), "sample", fastdiff.EDMWeighting())
    other = wrapped.noise(x0, noised.t, noised.noise)
    torch.testing.assert_close(wrapped.loss(denoised, other), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("form", ["plain", "scaled", "normalized"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_pseudo_huber_forms_and_schedules(form, schedule):
    process = fastdiff.VariancePreserving("scaled_linear")
    loss = losses.PseudoHuber(0.1, form, schedule)
    objective = fastdiff.Objective(process, "epsilon", loss=loss)
    x0, m = torch.randn(2, 4, 6, dtype=torch.float64)
    noised = objective.noise(x0)
    alpha, sigma = to_numpy(noised.alpha), to_numpy(noised.sigma)
    c = oracle.pseudo_huber_c(schedule, 0.1, t=noised.t.numpy(), steps=1000, alpha=alpha, sigma=sigma)
    expected = oracle.loss_pseudo_huber(to_numpy(m - noised.noise), np.broadcast_to(c, (4,))[:, None], form)
    got = objective.loss(m, noised, reduction="none")
    np.testing.assert_allclose(to_numpy(got), expected.mean(1).astype(np.float64), rtol=1e-12)


@pytest.mark.parametrize("process", [fastdiff.VariancePreserving(), fastdiff.RectifiedFlow(3.0), fastdiff.VPSDE()])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_the_scale_of_a_scheduled_c(schedule, process):
    """It multiplies the c of each time, which scaled errors have before the root too."""
    objective = fastdiff.Objective(process, "epsilon", loss=losses.PseudoHuber(0.1, "scaled", schedule, scale=3.0))
    x0, m = torch.randn(2, 4, 6, dtype=torch.float64)
    noised = objective.noise(x0)
    alpha, sigma, steps = to_numpy(noised.alpha), to_numpy(noised.sigma), process.steps if process.discrete else 1
    c = 3 * oracle.pseudo_huber_c(schedule, 0.1, t=noised.t.numpy(), steps=steps, alpha=alpha, sigma=sigma)
    expected = oracle.loss_pseudo_huber(to_numpy(m - noised.noise), np.broadcast_to(c, (4,))[:, None], "scaled")
    got = objective.loss(m, noised, reduction="none")
    np.testing.assert_allclose(to_numpy(got), expected.mean(1).astype(np.float64), rtol=1e-12)
    with pytest.raises(ValueError, match="scale must be positive and finite; got 0"):
        losses.PseudoHuber(scale=0.0)


@pytest.mark.parametrize(
    ("loss", "function"),
    [
        ("mse", torch.nn.functional.mse_loss),
        ("l1", torch.nn.functional.l1_loss),
        (losses.Huber(0.3), lambda a, b: torch.nn.functional.huber_loss(a, b, delta=0.3)),
        (losses.SmoothL1(0.3), lambda a, b: torch.nn.functional.smooth_l1_loss(a, b, beta=0.3)),
    ],
)
def test_losses_equal_pytorchs(loss, function):
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", loss=loss)
    x0, m = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    noised = objective.noise(x0)
    torch.testing.assert_close(objective.loss(m, noised), function(m, noised.target), rtol=1e-13, atol=0)


def test_weights_that_are_learned_or_given_by_sample():
    """EDM2's uncertainty: w / exp(u) * error + u, u from a small network."""
    objective = fastdiff.Objective(fastdiff.EDM(), "edm", "edm")
    x0, m = torch.randn(2, 4, 6, dtype=torch.float64)
    noised = objective.noise(x0)
    u = torch.randn(4, dtype=torch.float64, requires_grad=True)
    loss = objective.loss(m, noised, weight=torch.exp(-u)) + u.mean()
    loss.backward()
    rows = objective.loss(m, noised, reduction="none")
    torch.testing.assert_close(u.grad, (1 - rows * torch.exp(-u)).detach() / 4)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(objective.loss(m, noised, weight=weight), (weight * rows).mean())
    torch.testing.assert_close(objective.loss(m, noised, weight=2.0), 2 * rows.mean())


def test_x0_that_is_trained_gets_its_gradient():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR())
    t, n = torch.tensor([5, 500]), torch.randn(2, 3, dtype=torch.float64)

    def loss(x0, m):
        noised = objective.noise(x0, t, n)
        return objective.loss(m * noised.x_t, noised)

    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(loss, inputs)
    m = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: objective.predict_x0(m, objective.noise(inputs[0], t, n)), (m,))


def test_own_prediction_weighting_and_callable():
    halved = fastdiff.Prediction("half_noise", lambda levels: (0 * levels.alpha, 0.5 + 0 * levels.alpha), uses_x0=False)
    process = fastdiff.VariancePreserving()
    objective = fastdiff.Objective(process, halved, lambda levels: levels.sigma**2)
    x0, m = torch.randn(2, 4, 6)
    noised = objective.noise(x0)
    torch.testing.assert_close(noised.target, noised.noise / 2)
    expected = (noised.sigma.view(-1, 1) ** 2 * (m - noised.noise / 2) ** 2).mean()
    torch.testing.assert_close(objective.loss(m, noised), expected)
    levels = process.levels(torch.tensor([100]))
    assert conversion(halved, "epsilon", levels)[1].item() == pytest.approx(2.0)


def test_timesteps_argument():
    process = fastdiff.VariancePreserving()
    x0 = torch.zeros(512, 1)
    t = fastdiff.Objective(process, timesteps=ts.Uniform(0.2, 0.3)).noise(x0).t
    assert 200 <= int(t.min()) and int(t.max()) < 300
    t = fastdiff.Objective(process, timesteps="stratified").noise(x0).t
    counts = torch.histc(t.float(), 8, 0, 1000)
    assert bool((counts - 64).abs().max() <= 1), "a batch of 512 has 64 in every eighth, give or take the edges"


def test_default_dtype_and_device_do_not_matter():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    x0 = torch.randn(2, 3)
    expected = objective.noise(x0, seed=1)
    start = objective.sample(lambda x, t: x, (2, 3), "ddpm", 3, seed=1, progress=False, device="cpu")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")  # whatever is made there has no values, and cannot be compared
    try:
        fresh = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
        again = fresh.noise(x0, seed=1)
        flow = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow").noise(x0, 0.5, x0)
        x = fresh.sample(lambda x, t: x, (2, 3), "ddpm", 3, seed=1, progress=False, device="cpu")
        with pytest.raises(ValueError, match=r"must give fractions in \[0, 1\]; it gave"):
            fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", timesteps=lambda u: 1 + u)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert again.x_t.dtype == torch.float32 and torch.equal(again.x_t, expected.x_t)
    assert torch.equal(flow.x_t, x0) and torch.equal(x, start)


def test_bfloat16_noising_and_loss():
    """Coefficients are float32 and the arithmetic too: nothing but the stores is bfloat16."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon", fastdiff.MinSNR())
    x0 = torch.randn(4, 3, 8)
    t, n = torch.tensor([0, 10, 500, 999]), torch.randn(4, 3, 8).bfloat16()
    noised = objective.noise(x0.bfloat16(), t, n)
    wide = objective.noise(x0.bfloat16().float(), t, n.float())
    assert noised.x_t.dtype == torch.bfloat16 and noised.weight.dtype == torch.float32
    assert torch.equal(noised.x_t, wide.x_t.bfloat16())
    m = torch.randn(4, 3, 8).bfloat16()
    assert torch.equal(objective.loss(m, noised), objective.loss(m.float(), wide))


@pytest.mark.parametrize("prediction", ["flow", "epsilon", "sample", "reversed_flow"])
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_what_no_time_changes_is_computed_once(prediction, loss, backend):
    """Constants of the program give what rows of tensors do; so do frames."""
    process = fastdiff.RectifiedFlow()
    objective = fastdiff.Objective(process, prediction, loss=loss)
    kind = objective.prediction
    own = fastdiff.Prediction(kind.name, kind.coefficients, kind.uses_x0, kind.uses_noise)
    other = fastdiff.Objective(process, own, weighting=lambda levels: torch.ones_like(levels.alpha), loss=loss)
    x0, m, mask = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(2, 1, 4, 5)
    for t in (torch.tensor([0.2, 0.9]), torch.rand(2, 4).view(2, 1, 4, 1)):
        results = []
        for each in (objective, other):
            noised, leaf = each.noise(x0, t, seed=1), m.clone().requires_grad_()
            losses = [each.loss(leaf, noised, reduction=how) for how in ("mean", "none")]
            losses.append(each.loss(leaf, noised, mask=mask, mask_normalization="row"))
            gradient = torch.autograd.grad(sum(loss.sum() for loss in losses), leaf)[0]
            results.append([noised.x_t, noised.target, noised.weight, *losses, gradient])
        for got, want in zip(*results):
            assert torch.equal(got, want)
    program = objective._coefficients.program()
    assert program.constant("p") and program.constant("q") and program.constant("weight")
    assert not program.constant("alpha")


def test_rows_are_computed_when_they_are_asked_for(monkeypatch, backend):
    """Those of noising and the loss at once, any other by itself, each only once. There is nothing else, so that what
    asks (copy, pickle, hasattr) is told that it is not there."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", "cosmap", error_space="sample")
    rows = objective.noise(torch.randn(2, 3), torch.tensor([0.2, 0.9])).rows
    asked = []
    real = fastdiff.coefficients.Coefficients.rows
    monkeypatch.setattr(
        fastdiff.coefficients.Coefficients, "rows", lambda *given: (asked.append(given[1]), real(*given))[1]
    )
    assert not hasattr(rows, "nonsense") and not hasattr(rows, "__deepcopy__") and asked == []
    torch.testing.assert_close(rows.sigma, torch.tensor([[0.2], [0.9]]), rtol=0, atol=0)
    assert rows.sigma is rows.sigma and len(asked) <= 1, "noising may have asked before"
    torch.testing.assert_close(rows.weight, rows.loss_weight, rtol=0, atol=0)


def test_a_seed_of_another_device_is_not_waited_for(monkeypatch):
    """From the CPU's generator to a GPU: the copy does not block."""
    seen = []

    class Drawn:
        def to(self, device, **how):
            seen.append((device, how))
            return self

    asked = {}
    monkeypatch.setattr(torch, "randint", lambda *between, **how: (asked.update(how, between=between), Drawn())[1])
    generator = torch.Generator()
    draw_seed(generator, torch.device("cuda"))
    assert seen == [(torch.device("cuda"), {"non_blocking": True})]
    assert asked == {
        "between": (-(2**63), 2**63 - 1, (1,)), "dtype": torch.int64, "device": torch.device("cpu"),
        "generator": generator,
    }  # fmt: skip
    draw_seed(None, torch.device("cuda"))
    assert (asked["device"], asked["generator"]) == (torch.device("cuda"), None)


def test_the_function_has_the_error_space_of_the_object():
    """As SD3's scripts: x_t - sigma m is compared with x0."""
    x0, n, m = torch.randn(3, 4, 3, 5, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0])
    got = fastdiff.diffusion_loss(m, x0, n, t, fastdiff.RectifiedFlow(), "flow", error_space="sample")
    s = t.view(-1, 1, 1).double()
    expected = (((1 - s) * x0 + s * n - s * m - x0) ** 2).mean()
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match="unknown prediction 'smaple'"):
        fastdiff.diffusion_loss(m, x0, n, t, fastdiff.RectifiedFlow(), "flow", error_space="smaple")


def test_functions_keep_their_objective(monkeypatch):
    """Whose tables are made once; a weighting that is no key is not kept."""
    made = []
    real = fastdiff.functional.Objective

    def make(*given, **how):
        made.append(given)
        return real(*given, **how)

    monkeypatch.setattr(fastdiff.functional, "Objective", make)
    fastdiff.functional._cached_objective.cache_clear()
    process, x = fastdiff.VariancePreserving(steps=20), torch.ones(2, 3)
    t = torch.tensor([1, 5])
    for _ in range(3):
        fastdiff.diffusion_loss(x, x, x, t, process, weighting="min_snr")
    assert len(made) == 1

    class NoKey(weighting.Uniform):
        __hash__ = None

    for count in (2, 3):
        fastdiff.diffusion_loss(x, x, x, t, process, weighting=NoKey())
        assert len(made) == count
    fastdiff.functional._cached_objective.cache_clear()


def test_one_float64_tensor_makes_the_arithmetic_float64():
    """Whichever it is: a prediction of float32 and noise or data of float64."""
    m, wide = torch.full((2, 3), 0.1), torch.full((2, 3), 0.3, dtype=torch.float64)
    for x0, n in ((wide, m), (m, wide)):
        loss = fastdiff.ops.loss(m, x0, n, p=1.0, q=1.0)
        assert loss.dtype == torch.float64
        expected = (np.float64(np.float32(0.1)) - (np.float64(np.float32(0.1)) + 0.3)) ** 2
        assert loss.item() == pytest.approx(expected, rel=1e-14)
    assert fastdiff.ops.loss(m, m, m, p=1.0, q=1.0).dtype == torch.float32


def test_a_scaled_diffusion_loss_has_a_scaled_gradient():
    """For another upstream gradient than 1 it is computed again."""
    process, t = fastdiff.VariancePreserving(), torch.tensor([10, 700])
    x0, noise, output = torch.randn(3, 2, 4, 8).unbind(0)
    found = []
    for scale in (1.0, 4.0):
        leaf = output.clone().requires_grad_()
        (scale * fastdiff.diffusion_loss(leaf, x0, noise, t, process, "v_prediction", "min_snr")).backward()
        found.append(leaf.grad)
    assert torch.equal(found[1], 4 * found[0]) and bool(found[0].any())


def test_a_loss_that_is_kept_does_not_keep_the_networks_output():
    """Once its backward has run: losses are often kept, to be logged."""
    objective, x0 = fastdiff.Objective(fastdiff.VariancePreserving()), torch.randn(2, 3, 4, 4)
    for how in ({}, {"mask": torch.ones(2, 1, 4, 4)}):
        leaf = torch.randn(2, 3, 4, 4, requires_grad=True)
        output = leaf * 2
        loss = objective.loss(output, objective.noise(x0), **how)
        loss.backward()
        gone = weakref.ref(output)
        del output
        assert gone() is None


@pytest.mark.parametrize("how", [{}, {"mask": torch.ones(2, 1, 4, 4)}, {"reduction": "none"}], ids=str)
def test_a_loss_that_nobody_holds_is_gone(how, backend):
    """With its gradient, which is as large as the data, and without waiting for the garbage collector."""
    objective, x0 = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction"), torch.randn(2, 3, 4, 4)
    output, noised = torch.randn(2, 3, 4, 4, requires_grad=True), objective.noise(x0)
    gc.collect()
    gc.disable()
    try:
        loss = objective.loss(output, noised, **how)
        gone = weakref.ref(loss)
        del loss
        assert gone() is None
        objective.loss(output, noised, **how).sum().backward()
        assert not [o for o in gc.get_objects() if type(o).__name__ == "_LossBackward"]
    finally:
        gc.enable()


def test_an_error_that_is_infinite_in_the_space_of_the_loss():
    """At zero terminal SNR an error of epsilon is no finite error of x0."""
    process = fastdiff.VariancePreserving(zero_terminal_snr=True)
    with pytest.raises(ValueError, match="an error of 'epsilon' is no finite error of 'sample' at t = 999"):
        fastdiff.Objective(process, "epsilon", error_space="sample")
    fastdiff.Objective(process, "v_prediction", error_space="sample")


def test_tensors_of_one_dimension_that_differ():
    with pytest.raises(ValueError, match=r"noise has shape \(3,\), but x0 \(2,\); they must be equal.$"):
        fastdiff.ops.noise(torch.zeros(2), 1.0, 1.0, torch.zeros(3))
