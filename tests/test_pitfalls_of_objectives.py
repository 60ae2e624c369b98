"""What goes wrong in trainers people use, one test each: every one of these is a bug that was shipped somewhere."""

import copy
import math
import pickle
import warnings

import numpy as np
import oracle
import pytest
import torch
from accuracy import to_numpy
from devices import in_turn
from torch._dynamo.testing import CompileCounterWithBackend

import fastdiff
from fastdiff import losses, weighting
from fastdiff import timesteps as ts

pytestmark = pytest.mark.usefixtures("backend")

ZERO_SNR = fastdiff.VariancePreserving("scaled_linear", zero_terminal_snr=True)


@pytest.mark.parametrize(
    ("prediction", "weights", "limit"),
    [
        ("epsilon", fastdiff.MinSNR(5.0), 1.0),  # min(S, 5) / S -> 1
        ("v_prediction", fastdiff.MinSNR(5.0), 0.0),
        ("v_prediction", fastdiff.MinSNR(5.0, form="plus_one"), 2.0),
        ("v_prediction", fastdiff.MinSNR(5.0, form="shifted"), 1.0),
        ("sample", fastdiff.MinSNR(5.0), 0.0),
        ("epsilon", fastdiff.SoftMinSNR(5.0), 1.0),
        ("v_prediction", fastdiff.Debiased(), 1.0),
    ],
)
def test_zero_terminal_snr_takes_the_limit(prediction, weights, limit):
    """0/0 and 0 * inf never appear: the loss and its gradient are finite at S = 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective = fastdiff.Objective(ZERO_SNR, prediction, weights)
    noised = objective.noise(torch.randn(2, 3), torch.tensor([999, 10]))
    assert noised.snr[0] == 0 and noised.weight[0].item() == pytest.approx(limit, abs=1e-30)
    m = torch.randn(2, 3, requires_grad=True)
    objective.loss(m, noised).backward()
    assert bool(m.grad.isfinite().all())


@pytest.mark.parametrize("weights", [fastdiff.Debiased(), fastdiff.SNR(-1.0), fastdiff.InverseAlphaBar()])
def test_zero_terminal_snr_leaves_out_what_is_infinite(weights):
    with pytest.warns(UserWarning, match=r"infinite at t = \[999\]"):
        objective = fastdiff.Objective(ZERO_SNR, "epsilon", weights)
    noised = objective.noise(torch.randn(2, 3), torch.tensor([999, 10]))
    m = torch.randn(2, 3, requires_grad=True)
    rows = objective.loss(m, noised, reduction="none")
    assert rows[0] == 0 and rows[1] > 0
    rows.sum().backward()
    assert bool((m.grad[0] == 0).all()) and bool(m.grad[1].all())


def test_zero_terminal_snr_noise_is_all_there_is():
    objective = fastdiff.Objective(ZERO_SNR, "epsilon")
    noised = objective.noise(torch.randn(1, 50), torch.tensor([999]))
    assert torch.equal(noised.x_t, noised.noise)
    with pytest.raises(ValueError, match="does not determine"):
        objective.predict_x0(noised.noise, noised)
    v = fastdiff.Objective(ZERO_SNR, "v_prediction")
    noised = v.noise(torch.randn(1, 50), torch.tensor([999]))
    torch.testing.assert_close(v.predict_x0(noised.target, noised), noised.x0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_schedule_is_never_in_the_models_dtype(dtype):
    """In bfloat16 the Stable Diffusion schedule adds no noise at t = 0 and 1, and 23% too much or little at 2."""
    process = fastdiff.VariancePreserving("scaled_linear")
    objective = fastdiff.Objective(process)
    t = torch.arange(4)
    noised = objective.noise(torch.zeros(4, 1000, dtype=dtype), t, torch.ones(4, 1000, dtype=dtype))
    sigma = np.sqrt(1 - to_numpy(process.alpha_bar[:4]))
    np.testing.assert_allclose(to_numpy(noised.x_t[:, 0]), sigma, rtol=torch.finfo(dtype).eps)
    assert bool((process.alpha_bar[:3].bfloat16() == 1).any()), "the pitfall is real: bfloat16 rounds alpha_bar to 1"


def test_sigmas_stay_distinct_with_bfloat16_data():
    """Cast to bfloat16, 1000 flow sigmas are 506."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(shift=3.0), "flow")
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    noised = objective.noise(torch.zeros(1000, 1, dtype=torch.bfloat16), t)
    assert len(noised.sigma.unique()) == 1000
    assert len(noised.sigma.bfloat16().unique()) < 600


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sigma_to_the_minus_two(dtype):
    """sigma^-2 in float16 is infinite below 0.0039, and at 0 everywhere: there the row is left out."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", fastdiff.SigmaSqrt())
    t = torch.tensor([0.002, 0.5, 0.0], dtype=torch.float64)
    noised = objective.noise(torch.randn(3, 4).to(dtype), t)
    np.testing.assert_allclose(to_numpy(noised.weight), [0.002**-2, 4.0, 0.0], rtol=1e-7)
    m = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    (objective.loss(m, noised) * 1e-3).backward()  # the gradient itself, 2 sigma^-2 e / 12, is beyond float16
    assert bool(m.grad.isfinite().all()) and bool((m.grad[2] == 0).all())


def test_densities_never_index_past_the_end():
    """SD3's mode density is exactly 1 at u = 0 (index 1000 of 1000), and a float32 sigmoid saturates to 1 near 17."""
    process = fastdiff.VariancePreserving()
    u = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    for sampler in (ts.Mode(1.29), ts.Mode(-1.0), ts.LogitNormal(40.0, 1.0), ts.CosMap(), ts.Uniform()):
        t = sampler(u, process)
        assert t.dtype == torch.int64 and 0 <= int(t.min()) and int(t.max()) <= 999, sampler
    flow = fastdiff.RectifiedFlow(3.0)
    for sampler in (ts.Mode(1.29), ts.LogitNormal(40.0, 1.0), ts.CosMap()):
        flow.levels(sampler(u[1:-1], flow))


def test_flow_times_are_not_looked_up_by_equality():
    """Schedulers find a sigma by `timesteps == t`: 10 of 1000 are not integers and are missed. Times are values here,
    and a table of weights takes indices."""
    process = fastdiff.RectifiedFlow(3.0)
    objective = fastdiff.Objective(process, "flow")
    t = torch.rand(1000)
    noised = objective.noise(torch.zeros(1000, 1), t)
    np.testing.assert_allclose(to_numpy(noised.sigma), to_numpy(3 * t.double() / (1 + 2 * t.double())), rtol=6e-8)
    with pytest.raises(ValueError, match="discrete"):
        fastdiff.Objective(process, "flow", fastdiff.PerTimestep(torch.ones(1000)))


def test_offset_noise_reaches_x_t_and_target():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon", noise_offset=0.5)
    noised = objective.noise(torch.zeros(64, 8, 16, 16), torch.tensor(500), seed=1)
    plain = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon").noise(noised.x0, torch.tensor(500), seed=1)
    offset = noised.noise - plain.noise
    spread = offset.amax((2, 3)) - offset.amin((2, 3))
    assert bool((spread < 1e-5).all()), "one number a (sample, channel)"
    # 512 normals times 0.5: the standard deviation's own deviation is 0.5 / sqrt(2 * 512) = 0.016; five of them.
    assert offset[:, :, 0, 0].std().item() == pytest.approx(0.5, abs=0.08)
    torch.testing.assert_close(noised.x_t, noised.sigma.view(-1, 1, 1, 1) * noised.noise)
    assert torch.equal(noised.target, noised.noise)


def test_input_perturbation_reaches_x_t_and_not_the_target():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon", input_perturbation=0.1)
    noised = objective.noise(torch.zeros(4, 1000), torch.tensor(500), seed=1)
    plain = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon").noise(noised.x0, torch.tensor(500), seed=1)
    assert torch.equal(noised.target, plain.noise)
    xi = (noised.x_t / noised.sigma.view(-1, 1) - noised.noise) / 0.1
    # 4000 normals: mean within 5 / sqrt(4000) = 0.08, uncorrelated with n to the same.
    assert abs(xi.mean()) < 0.08 and abs(xi.std() - 1) < 0.06 and abs((xi * noised.noise).mean()) < 0.08


def test_immiscible_noise_is_permuted_for_both():
    """Noise assigned to samples (Li et al. 2024) goes in as a tensor, so x_t and target cannot see different orders."""
    x0, n = torch.randn(2, 16, 10)
    order = torch.cdist(x0, n).argmin(1)
    for prediction in ("epsilon", "v_prediction", "flow"):
        process = fastdiff.RectifiedFlow() if prediction == "flow" else fastdiff.VariancePreserving()
        objective = fastdiff.Objective(process, prediction)
        noised = objective.noise(x0, noise=n[order])
        assert torch.equal(noised.noise, n[order])
        torch.testing.assert_close(objective.predict_x0(noised.target, noised), x0, rtol=1e-3, atol=1e-3)
        assert objective.loss(noised.target, noised) < 1e-10


@pytest.mark.parametrize("loss", ["pseudo_huber", "log_cosh"])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 0.1, 1.0, 30.0, 1e4])
def test_small_errors_keep_their_digits(loss, size):
    """sqrt(e^2 + c^2) - c and |e| + ln(1 + exp(-2 |e|)) - ln 2 lose all digits for small e in float32."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", loss=losses.get(loss))
    x0 = torch.zeros(1, 1)
    noised = objective.noise(x0, torch.tensor([0.5]), torch.zeros_like(x0))
    m = torch.full((1, 1), size, requires_grad=True)
    got = objective.loss(m, noised)
    got.backward()
    e = float(torch.tensor(size))  # as float32 has it
    if loss == "pseudo_huber":
        c = float(torch.tensor(0.1))
        truth, slope = oracle.decimal_pseudo_huber(e, c), e / math.hypot(e, c)
    else:
        truth, slope = oracle.decimal_log_cosh(e) if e < 100 else e - math.log(2), math.tanh(e)
    # A handful of float32 operations, each within an ulp or two.
    assert got.item() == pytest.approx(truth, rel=1e-6, abs=0)
    assert m.grad.item() == pytest.approx(slope, rel=1e-6)


def test_float16_gradients_do_not_underflow_under_loss_scaling():
    """A mean over 4M elements has gradients of 5e-7: rounding them to float16 before the loss scale loses them."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    x0 = torch.zeros(4, 1024, 1024, dtype=torch.float16)
    noised = objective.noise(x0, torch.tensor(500), x0)
    m = torch.full_like(x0, 0.3).requires_grad_()
    (objective.loss(m, noised) * 65536).backward()
    exact = 2 * float(m.detach()[0, 0, 0]) / x0.numel() * 65536
    assert bool((m.grad == torch.tensor(exact).half()).all())
    assert abs(float(torch.tensor(exact / 65536).half()) * 65536 / exact - 1) > 0.02, "the pitfall is real"


def test_float16_sums_do_not_overflow():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    x0 = torch.zeros(2, 100_000, dtype=torch.float16)
    noised = objective.noise(x0, torch.tensor(500), x0)
    m = torch.full_like(x0, 100.0)
    assert objective.loss(m, noised).item() == 10_000
    assert objective.loss(m, noised, reduction="sum").item() == 2e9
    assert objective.loss(torch.full_like(x0, 60_000), noised).item() == pytest.approx(60_000.0**2)


def test_mask_that_sums_to_zero():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    noised = objective.noise(torch.randn(2, 3, 4))
    m = torch.randn(2, 3, 4, requires_grad=True)
    for normalization in ("none", "row", "global"):
        # An error in one process of many would leave the others waiting.
        with pytest.warns(UserWarning, match="mask is 0 everywhere"):
            loss = objective.loss(m, noised, torch.zeros(2, 1, 4), mask_normalization=normalization)
        loss.backward()
        assert loss == 0 and not m.grad.any()
    mask = torch.tensor([0.0, 1.0]).view(2, 1, 1)  # one sample without a mask is no reason to stop
    objective.loss(m, noised, mask, mask_normalization="row").backward()
    assert bool((m.grad[0] == 0).all()) and bool(m.grad.isfinite().all())


def test_video_tensors_of_five_dimensions():
    """`.view(-1, 1, 1, 1)` and mean((1, 2, 3)) in trainers are wrong for [batch, channels, frames, height, width]."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", "sigma_sqrt")
    x0, m = torch.randn(2, 2, 3, 4, 5, 6, dtype=torch.float64)
    noised = objective.noise(x0)
    weight = noised.sigma.view(2, 1, 1, 1, 1) ** -2
    error = weight * (m - noised.target) ** 2
    torch.testing.assert_close(objective.loss(m, noised, reduction="none"), error.flatten(1).mean(1))


def test_vp_sde_standard_deviation_near_zero():
    """1 - exp(x) at t = 1e-5 is off by 0.6% in float32."""
    objective = fastdiff.Objective(fastdiff.VPSDE(), "epsilon")
    noised = objective.noise(torch.zeros(1, 1), torch.tensor([1e-5]))
    exponent = -(float(torch.tensor(1e-5)) ** 2) * (20 - 0.1) / 2 - float(torch.tensor(1e-5)) * 0.1
    assert noised.sigma.item() == pytest.approx(math.sqrt(-math.expm1(exponent)), rel=1e-7)


def test_posterior_log_variance_at_the_first_step():
    """Both customs by name: reuse entry 1, or clamp at 1e-20; never the logarithm of 0."""
    process = fastdiff.VariancePreserving()
    log_variance = process.posterior_log_variance(torch.arange(1000))
    assert bool(log_variance.isfinite().all()) and log_variance[0].item() == pytest.approx(math.log(1e-20))
    reused = process.posterior_log_variance(torch.arange(1000), first="reuse")
    assert reused[0] == reused[1] == log_variance[1] and torch.equal(reused[1:], log_variance[1:])
    with pytest.raises(ValueError, match="first must be"):
        process.posterior_log_variance(0, first="floor")


@pytest.mark.parametrize(
    ("loss", "size"),
    [*((loss, 1e30) for loss in ("l1", "huber", "smooth_l1", "pseudo_huber", "log_cosh")), ("mse", 1e18)],
)
@pytest.mark.parametrize("sign", [0.0, 1.0, -1.0])
def test_branches_that_are_not_taken_give_no_nan_gradients(loss, size, sign):
    """torch.where does not stop a NaN or infinity of the branch it discards."""
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", loss=loss)
    x0 = torch.zeros(1, 4)
    noised = objective.noise(x0, torch.tensor([0.5]), x0)
    m = torch.full((1, 4), sign * size, requires_grad=True)
    loss = objective.loss(m, noised)
    loss.backward()
    assert loss.isfinite() and bool(m.grad.isfinite().all())


def test_prior_preservation_weights_follow_their_samples():
    """Instance and class images share a batch; the class half has its own weight (DreamBooth)."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon", fastdiff.MinSNR())
    x0, m = torch.randn(2, 4, 3)
    noised = objective.noise(x0)
    weight = torch.tensor([1.0, 1.0, 0.3, 0.3])
    rows = objective.loss(m, noised, reduction="none")
    expected = (rows[:2].sum() + 0.3 * rows[2:].sum()) / 4
    torch.testing.assert_close(objective.loss(m, noised, weight=weight), expected)


@in_turn(
    loss=["mse", "huber", "pseudo_huber"],
    process=[fastdiff.VariancePreserving(), fastdiff.RectifiedFlow(3.0), fastdiff.EDM()],
)
def test_nothing_reads_a_value_back_to_the_host(process, loss):
    """On the meta device a tensor has no values: reading one raises."""
    prediction = {"RectifiedFlow": "flow", "EDM": "edm"}.get(type(process).__name__, "v_prediction")
    objective = fastdiff.Objective(
        process, prediction, fastdiff.MinSNR(), loss, noise_offset=0.1, input_perturbation=0.1
    )
    x0 = torch.empty(4, 3, 8, 8, device="meta")
    for t in (None, torch.empty(4, device="meta", dtype=torch.int64 if process.discrete else torch.float32)):
        noised = objective.noise(x0, t)
        m = torch.empty(x0.shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
        mask = torch.empty(4, 1, 8, 8, device="meta")
        objective.loss(m, noised, mask, mask_normalization="global").backward()
        assert m.grad.dtype == torch.bfloat16
        objective.predict_x0(m, noised)


@pytest.mark.gpu
def test_no_host_sync_and_graph_capture_on_a_gpu():
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR(5.0))
    x0 = torch.randn(4, 3, 16, 16, device="cuda")
    m = torch.randn_like(x0, requires_grad=True)

    def step():
        noised = objective.noise(x0)
        return objective.loss(m * noised.x_t, noised), noised

    step()[0].backward()  # the table goes to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, noised = step()
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append((loss.item(), noised.t.clone(), noised.noise.clone()))
    assert seen[0][0] != seen[1][0] and not torch.equal(seen[0][2], seen[1][2]), "fresh t and noise at every replay"


def test_compiles_whole_and_once():
    """torch.compile(fullgraph=True), no recompilation across t and seeds, the same numbers."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR(5.0))
    layer = torch.nn.Conv2d(3, 3, 3, padding=1)

    def step(x0, t):
        noised = objective.noise(x0, t)
        return objective.loss(layer(noised.x_t), noised)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for k in range(3):
        x0, t = torch.randn(4, 3, 8, 8), torch.randint(0, 1000, (4,))
        torch.manual_seed(k)
        expected = step(x0, t)
        torch.manual_seed(k)
        assert torch.equal(compiled(x0, t), expected)
    assert counter.frame_count == 1


def test_names_tell_the_min_snr_forms_apart():
    levels = fastdiff.VariancePreserving().levels(torch.tensor([100]))
    forms = [
        weighting.evaluate(fastdiff.MinSNR(5.0, form), levels, "v_prediction").item()
        for form in ("paper", "plus_one", "shifted", "epsilon")
    ]
    snr = levels.snr.item()
    right = [min(snr, 5) / (snr + 1), min(snr, 5) / snr + 1, min(snr + 1, 5) / (snr + 1), min(5 / snr, 1)]
    assert forms == pytest.approx(right)


@pytest.mark.parametrize("name", ["noise_offset", "input_perturbation"])
def test_a_strength_that_changes_between_steps(name, backend):
    """Annealed, or drawn anew for each step: what was set last holds. x_t is linear in it."""
    process, x0, t = fastdiff.VariancePreserving(), torch.randn(2, 4, 3, 3), torch.tensor([100, 800])
    none, whole = (fastdiff.Objective(process, **{name: s}).noise(x0, t, seed=7).x_t.double() for s in (0.0, 1.0))
    assert (whole - none).abs().max() > 0.1
    objective = fastdiff.Objective(process)
    for strength in (0.0, 0.3, 1.0, 0.0):
        setattr(objective, name, strength)
        x_t = objective.noise(x0, t, seed=7).x_t.double()
        torch.testing.assert_close(x_t, (1 - strength) * none + strength * whole, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=f"{name} must be at least 0"):
        setattr(objective, name, -0.1)


def test_times_that_change_between_steps(backend):
    objective, x0 = fastdiff.Objective(fastdiff.VariancePreserving()), torch.zeros(64, 2, 2)
    objective.noise(x0, seed=1)
    objective.timesteps = fastdiff.timesteps.Uniform(0.0, 0.1)
    assert objective.noise(x0, seed=1).t.max() < 100


@pytest.mark.parametrize("name", ["process", "prediction", "weighting", "loss_function", "error_space"])
def test_what_coefficients_are_made_of_is_not_changed(name):
    objective = fastdiff.Objective(fastdiff.VariancePreserving())
    with pytest.raises(AttributeError, match=f"{name} cannot be changed.*Make another Objective"):
        setattr(objective, name, getattr(objective, name))


@pytest.mark.parametrize("how", [{}, {"reduction": "none"}, {"reduction": "sum"}, {"mask": torch.ones(2, 1, 1, 1)}])
def test_a_noised_batch_in_the_loss_of_another_objective(how, backend):
    """An unweighted curve beside a weighted loss, another error, another target: each objective's own numbers."""
    process, x0, t = fastdiff.VariancePreserving(), torch.randn(2, 4, 3, 3), torch.tensor([30, 800])
    n, m = torch.randn_like(x0), torch.randn_like(x0)
    noised = fastdiff.Objective(process, "epsilon", fastdiff.MinSNR(5.0)).noise(x0, t, n)
    alpha, sigma = (row.double().view(2, 1, 1, 1) for row in (noised.alpha, noised.sigma))
    targets = {"epsilon": n.double(), "sample": x0.double(), "v_prediction": alpha * n - sigma * x0}
    for kind, target in targets.items():
        for loss, error in (("mse", (m - target) ** 2), ("l1", (m - target).abs())):
            again = fastdiff.Objective(fastdiff.VariancePreserving(), kind, loss=loss)
            want = error.sum() if how.get("reduction") == "sum" else error.mean()
            torch.testing.assert_close(again.loss(m, noised, **how).double().mean(), want.double(), rtol=1e-6, atol=0)
    for other in (fastdiff.VariancePreserving("scaled_linear"), fastdiff.RectifiedFlow()):
        with pytest.raises(ValueError, match="noise it anew"):
            fastdiff.Objective(other, "epsilon").loss(m, noised)


def test_which_processes_have_the_same_levels():
    flow, shifted = fastdiff.RectifiedFlow(), fastdiff.RectifiedFlow(3.0)
    assert flow.has_levels_of(fastdiff.RectifiedFlow()) and not flow.has_levels_of(shifted)
    assert not flow.has_levels_of(fastdiff.VariancePreserving())
    assert fastdiff.VariancePreserving().has_levels_of(fastdiff.VariancePreserving("linear"))
    assert not fastdiff.VariancePreserving().has_levels_of(fastdiff.VariancePreserving(steps=500))
    assert fastdiff.EDM().has_levels_of(fastdiff.EDM()) and not fastdiff.EDM().has_levels_of(fastdiff.VPSDE())


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
@pytest.mark.parametrize("keep_noise", [True, False])
def test_a_noised_batch_is_pickled_and_copied(kind, keep_noise, backend):
    """As when a worker of a DataLoader returns it: the numbers are the same, of its own objective and of the first."""
    process = fastdiff.RectifiedFlow() if kind == "flow" else fastdiff.VariancePreserving()
    objective = fastdiff.Objective(process, kind, fastdiff.MinSNR(5.0) if kind == "epsilon" else None)
    noised, m = objective.noise(torch.randn(2, 4, 3, 3), seed=5, keep_noise=keep_noise), torch.randn(2, 4, 3, 3)
    want = objective.loss(m, noised)
    for again in (pickle.loads(pickle.dumps(noised)), copy.deepcopy(noised), copy.copy(noised)):
        for name in ("x_t", "t", "alpha", "sigma", "snr", "weight", "noise", "target", "model_input", "model_time"):
            assert torch.equal(getattr(again, name), getattr(noised, name)), name
        assert torch.equal(objective.loss(m, again), want) and torch.equal(again.objective.loss(m, again), want)
