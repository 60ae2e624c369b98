"""Every weighting against the oracle, for every prediction kind, with the limits at SNR 0 and infinity.

The process's own alpha and sigma (float64, taken as exact) are the oracle's input. A weight is a product of a few
float64 numbers with no cancellation (squares, sums of positives), so 1e-12 relative, 1e4 roundings, holds from 1e-30 to
1e30. A limit that is infinite is a weight of 0: the documented policy. A limit that is 0 may come out as any number
that float32, in which the kernels read it, rounds to 0: below 2^-150 (SILENT).
"""

import math
import warnings

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known import make_levels
from oracle import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import weighting

SILENT = 2.0**-150
PROFILE = settings(max_examples=60, deadline=None, derandomize=True)

INDICES = list(range(0, 1000, 37)) + [1, 2, 998, 999]
FRACTIONS = [0.0, 1e-6, 1e-3, 0.1, 0.3, 0.5, 0.77, 0.9, 0.999, 1.0]
PROCESSES = {
    "vp": (fastdiff.VariancePreserving("linear"), INDICES),
    "zero snr": (fastdiff.VariancePreserving("scaled_linear", zero_terminal_snr=True), INDICES),
    "flow": (fastdiff.RectifiedFlow(shift=3.0), FRACTIONS),
    "edm": (fastdiff.EDM(), [0.0, 1e-5, 0.002, 0.5, 1.0, 80.0, 1e5]),
    "edm d=2": (fastdiff.EDM(sigma_data=2.0), [0.0, 1e-5, 0.002, 0.5, 1.0, 80.0, 1e5]),
    "vpsde": (fastdiff.VPSDE(), FRACTIONS),
    "subvpsde": (fastdiff.SubVPSDE(), FRACTIONS),
    "vesde": (fastdiff.VESDE(), FRACTIONS),
    "continuous cosine": (fastdiff.Cosine(), FRACTIONS),
    "trigflow": (fastdiff.TrigFlow(2.0), [*FRACTIONS, 1.5, fastdiff.TrigFlow.t_max]),
}


def meaningful(process, kind: str) -> bool:
    flow = isinstance(process, fastdiff.RectifiedFlow)
    return {"v_prediction": not flow, "flow": flow, "reversed_flow": flow}.get(kind, True)


PAIRS = [(name, kind) for name, (process, _) in PROCESSES.items() for kind in oracle.KINDS if meaningful(process, kind)]

# id -> (fastdiff's weighting, the oracle's as f(kind, alpha, sigma, sigma_data))
WEIGHTINGS = {
    "uniform": (lambda: weighting.Uniform(), lambda k, a, s, d: oracle.weight_uniform(k, a, s)),
    "min_snr": (lambda: weighting.MinSNR(), lambda k, a, s, d: oracle.weight_min_snr(k, a, s, sigma_data=d)),
    "min_snr 1": (
        lambda: weighting.MinSNR(1.0),
        lambda k, a, s, d: oracle.weight_min_snr(k, a, s, gamma=1.0, sigma_data=d),
    ),
    "min_snr plus_one": (
        lambda: weighting.MinSNR(5.0, form="plus_one"),
        lambda k, a, s, d: oracle.weight_min_snr(k, a, s, form="plus_one", sigma_data=d),
    ),
    "min_snr shifted": (
        lambda: weighting.MinSNR(5.0, form="shifted"),
        lambda k, a, s, d: oracle.weight_min_snr(k, a, s, form="shifted", sigma_data=d),
    ),
    "min_snr epsilon": (
        lambda: weighting.MinSNR(5.0, form="epsilon"),
        lambda k, a, s, d: oracle.weight_min_snr(k, a, s, form="epsilon", sigma_data=d),
    ),
    "soft_min_snr": (
        lambda: weighting.SoftMinSNR(4.0),
        lambda k, a, s, d: oracle.weight_soft_min_snr(k, a, s, gamma=4.0, sigma_data=d),
    ),
    "truncated": (
        lambda: weighting.TruncatedSNR(),
        lambda k, a, s, d: oracle.weight_truncated_snr(k, a, s, sigma_data=d),
    ),
    "snr": (lambda: weighting.SNR(), lambda k, a, s, d: oracle.weight_snr(k, a, s)),
    "1/snr": (lambda: weighting.SNR(power=-1.0), lambda k, a, s, d: oracle.weight_snr(k, a, s, power=-1.0)),
    "root snr": (lambda: weighting.SNR(power=0.5), lambda k, a, s, d: oracle.weight_snr(k, a, s, power=0.5)),
    "p2": (lambda: weighting.P2(), lambda k, a, s, d: oracle.weight_p2(k, a, s)),
    "p2 0.5 k=3": (lambda: weighting.P2(gamma=0.5, k=3.0), lambda k, a, s, d: oracle.weight_p2(k, a, s, 0.5, 3.0)),
    "p2 k=0": (lambda: weighting.P2(gamma=0.5, k=0.0), lambda k, a, s, d: oracle.weight_p2(k, a, s, 0.5, 0.0)),
    "p2 of v": (lambda: weighting.P2(gamma=2.0), lambda k, a, s, d: oracle.weight_p2(k, a, s, 2.0)),
    "debiased": (lambda: weighting.Debiased(), lambda k, a, s, d: oracle.weight_debiased(k, a, s, sigma_data=d)),
    "debiased sqrt 50": (
        lambda: weighting.Debiased(cap=50.0, v_form="reciprocal_sqrt"),
        lambda k, a, s, d: oracle.weight_debiased(k, a, s, 50.0, "reciprocal_sqrt", sigma_data=d),
    ),
    "1/abar": (lambda: weighting.InverseAlphaBar(), lambda k, a, s, d: oracle.weight_inverse_alpha_bar(k, a, s)),
    "edm": (
        lambda: weighting.EDMWeighting(),
        lambda k, a, s, d: oracle.weight_edm(k, a, s, sigma_data=d, prediction_sigma_data=d),
    ),
    "edm d=0.3": (
        lambda: weighting.EDMWeighting(sigma_data=0.3),
        lambda k, a, s, d: oracle.weight_edm(k, a, s, sigma_data=0.3, prediction_sigma_data=d),
    ),
    "sigma_sqrt": (lambda: weighting.SigmaSqrt(), lambda k, a, s, d: oracle.weight_sigma_sqrt(k, a, s)),
    "sigma_linear": (lambda: weighting.SigmaLinear(), lambda k, a, s, d: oracle.weight_sigma_linear(k, a, s)),
    "sigma_linear 0.7": (
        lambda: weighting.SigmaLinear(0.7),
        lambda k, a, s, d: oracle.weight_sigma_linear(k, a, s, 0.7),
    ),
    "cosmap": (lambda: weighting.CosMap(), lambda k, a, s, d: oracle.weight_cosmap(k, a, s)),
}


def evaluate(w, levels, kind: str) -> np.ndarray:
    value = weighting.evaluate(w, levels, kind)
    assert value.dtype == torch.float64 and value.shape == levels.t.shape
    return value.numpy()


@pytest.mark.parametrize("name, kind", PAIRS)
@pytest.mark.parametrize("which", list(WEIGHTINGS))
def test_weighting(which, name, kind):
    """All weightings, kinds and processes, the two ends of each process included."""
    make, truth = WEIGHTINGS[which]
    process, t = PROCESSES[name]
    levels = make_levels(process, t)
    expected = truth(kind, levels.alpha.numpy(), levels.sigma.numpy(), getattr(process, "sigma_data", 0.5))
    assert_close(evaluate(make(), levels, kind), expected, absolute=SILENT, label=f"{which} on {kind}, {name}")


@pytest.mark.parametrize("which", list(WEIGHTINGS))
@given(log_snr=st.floats(-18.0, 18.0), kind=st.sampled_from([k for k in oracle.KINDS if "flow" not in k]))
@PROFILE
def test_weighting_over_36_decades_of_snr(which, log_snr, kind):
    """Any SNR at all: in the EDM process sigma = SNR^-1/2."""
    make, truth = WEIGHTINGS[which]
    levels = make_levels(fastdiff.EDM(), [10.0 ** (-log_snr / 2)])
    expected = truth(kind, levels.alpha.numpy(), levels.sigma.numpy(), 0.5)
    assert_close(evaluate(make(), levels, kind), expected, label=f"{which} on {kind}")


@given(
    gamma=st.floats(0.01, 100.0),
    log_snr=st.floats(-6.0, 6.0),
    form=st.sampled_from(["paper", "plus_one", "shifted", "epsilon"]),
)
@PROFILE
def test_min_snr_parameters(gamma, log_snr, form):
    levels = make_levels(fastdiff.EDM(), [10.0 ** (-log_snr / 2)])
    for kind in ("epsilon", "sample", "v_prediction", "score", "edm"):
        expected = oracle.weight_min_snr(kind, levels.alpha.numpy(), levels.sigma.numpy(), gamma, form)
        assert_close(evaluate(weighting.MinSNR(gamma, form=form), levels, kind), expected, label=f"{form} on {kind}")


@given(cap=st.floats(0.5, 1e6), log_snr=st.floats(-6.0, 7.0), form=st.sampled_from(["reciprocal", "reciprocal_sqrt"]))
@PROFILE
def test_debiased_parameters(cap, log_snr, form):
    levels = make_levels(fastdiff.EDM(), [10.0 ** (-log_snr / 2)])
    for kind in ("epsilon", "sample", "v_prediction", "score", "edm"):
        expected = oracle.weight_debiased(kind, levels.alpha.numpy(), levels.sigma.numpy(), cap, form)
        assert_close(
            evaluate(weighting.Debiased(cap=cap, v_form=form), levels, kind), expected, label=f"{form} on {kind}"
        )


# ------------------------------------------------------------------------------------------------- the special ones


@pytest.mark.parametrize("steps", [1000, 50, 4000])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_bell(kind, steps):
    """The bell's mean over all timesteps is 1, its minimum (at t = 0) is 0."""
    levels = make_levels(fastdiff.VariancePreserving(steps=steps), list(range(steps)))
    value = evaluate(weighting.Bell(), levels, kind)
    # y - min cancels: the absolute error is u of y (below 1), times N/sum (3.1)
    assert_close(value, oracle.weight_bell(steps), absolute=8 * oracle.UNIT, label="bell")
    assert abs(value.mean() - 1) < 1e-12 and value.min() == 0.0


def test_per_timestep():
    table = torch.linspace(0.0, 3.0, 1000, dtype=torch.float64) ** 2
    levels = make_levels(fastdiff.VariancePreserving(), INDICES)
    for given_table in (table, table.tolist()):
        assert_close(
            evaluate(weighting.PerTimestep(given_table), levels, "v_prediction"), table.numpy()[INDICES], rel=0
        )


TABLE = [3.0, 0.5, 0.0, 2.0, 7.0, 1.0]


@pytest.mark.parametrize("by", ["fraction", "sigma"])
@pytest.mark.parametrize("name", ["flow", "vpsde", "vp"])
def test_a_table_over_the_times(name, by):
    """Entries at 0, 0.2, 0.4, ... of the time, or of sigma; straight lines between. The places are exact inputs."""
    process, t = PROCESSES[name]
    levels = make_levels(process, t)
    place = levels.sigma if by == "sigma" else levels.t.double() / (1000 if name == "vp" else 1)
    found = evaluate(weighting.Interpolated(TABLE, by=by), levels, "epsilon")
    # The place times 5 is rounded: 8 roundings of the largest slope, 5 * 6.
    assert_close(found, oracle.weight_interpolated(TABLE, place.numpy()), absolute=8 * 30 * oracle.UNIT, label=name)


def test_a_table_over_the_times_of_a_flow_by_hand():
    flow = fastdiff.RectifiedFlow(shift=3.0)
    levels = flow.levels([0.0, 0.1, 0.25, 0.5, 1.0])  # sigma 0, 0.25, 0.5, 0.75, 1
    assert_close(evaluate(weighting.Interpolated([1.0, 2.0, 8.0]), levels, "flow"), [1.0, 1.2, 1.5, 2.0, 8.0])
    by_sigma = weighting.Interpolated(torch.tensor([1.0, 2.0, 8.0]), by="sigma")
    assert_close(evaluate(by_sigma, levels, "flow"), [1.0, 1.5, 2.0, 5.0, 8.0])
    objective = fastdiff.Objective(flow, "flow", by_sigma)
    t = torch.tensor([0.1, 0.5])
    x0, n, m = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = ((m - (n - x0)) ** 2).mean(1).numpy()
    assert_close(objective.loss(m, objective.noise(x0, t, n), reduction="none"), errors * [1.5, 5.0], rel=1e-7)


def test_a_table_over_the_angle_of_trigflow():
    levels = fastdiff.TrigFlow().levels([0.0, math.pi / 8, math.pi / 4, 0.75 * math.pi / 2, math.pi / 2])
    # A rounding of the angle, times the slope.
    right = [1.0, 1.5, 2.0, 5.0, 8.0]
    assert_close(evaluate(weighting.Interpolated([1.0, 2.0, 8.0]), levels, "v_prediction"), right, rel=1e-14)


def test_the_table_over_the_times_is_copied():
    table = torch.tensor([1.0, 2.0], dtype=torch.float64)
    made = weighting.Interpolated(table)
    table.fill_(9.0)
    assert evaluate(made, make_levels(fastdiff.RectifiedFlow(), [0.5]), "flow").tolist() == [1.5]


def test_the_table_over_the_times_goes_to_a_device_once():
    """A copy waits for the device. On the meta device reading a value raises."""
    made, copies = weighting.Interpolated([1.0, 2.0]), []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            device = kwargs.get("device")
            if args and isinstance(args[0], torch.Tensor) and device is not None and args[0].device != device:
                copies.append(operation)
            return operation(*args, **kwargs)

    t = torch.empty(4, device="meta")
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", made)
    x0 = torch.empty(4, 3, device="meta")
    objective.loss(x0, objective.noise(x0, t))
    with Copies():
        noised = objective.noise(x0, t)
        assert objective.loss(x0, noised).device.type == "meta" and noised.weight.shape == (4,)
    assert not copies


@pytest.mark.parametrize("c, p", [(0.01, 1.0), (1e-3, 0.5), (2.0, 0.0), (0.3, 1.7)])
def test_adaptive_weights(c, p):
    errors = np.array([0.0, 1e-6, 0.2, 3.0, 1e5])
    assert_close(weighting.adaptive(torch.from_numpy(errors), c, p), oracle.adaptive_weights(errors, c, p))


def test_adaptive_weights_of_an_objective():
    """The loss of MeanFlow: the sum of a row's squares; its gradient takes the weight for a number."""
    x0, n, m = torch.randn(3, 3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    noised, m = objective.noise(x0, torch.tensor([0.2, 0.5, 0.9]), n), m.requires_grad_()
    rows = objective.loss(m, noised, reduction="none") * m[0].numel()
    loss = (weighting.adaptive(rows, 0.05, 0.75) * rows).mean()
    loss.backward()
    e = oracle.ld(m.detach().numpy()) - (oracle.ld(n.numpy()) - oracle.ld(x0.numpy()))
    w = oracle.adaptive_weights((e**2).sum((1, 2)), 0.05, 0.75)
    assert_close(loss.detach(), (w * (e**2).sum((1, 2))).mean())
    assert_close(m.grad, w[:, None, None] * 2 * e / 3)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((torch.ones(2), 0.0), ValueError, "c must be positive; got 0.0"),
        ((torch.ones(2), 0.1, -1.0), ValueError, "p must be a number of at least 0; got -1.0"),
        ((torch.ones(2), "0.1"), TypeError, "c must be a number"),
        ((torch.ones(2, dtype=torch.int64),), TypeError, "errors must be a floating-point tensor"),
        ((3.0,), TypeError, "errors must be a floating-point tensor"),
    ],
)
def test_adaptive_weights_that_mean_nothing(arguments, error, words):
    with pytest.raises(error, match=words):
        weighting.adaptive(*arguments)


@pytest.mark.parametrize("kind", ["score", "epsilon", "sample", "v_prediction", "edm"])
@pytest.mark.parametrize("name", ["vpsde", "subvpsde", "vesde"])
def test_likelihood(name, kind):
    """g(t)^2 on the score's error; other kinds carry it by |d score / d output|^2 (0 where sigma = 0: no limit)."""
    process, t = PROCESSES[name]
    levels = make_levels(process, t)
    g2 = process.diffusion_squared(levels.t).numpy()
    expected = oracle.weight_likelihood(kind, levels.alpha.numpy(), levels.sigma.numpy(), g2)
    assert_close(evaluate(weighting.Likelihood(), levels, kind), expected, absolute=SILENT, label=f"on {kind}")


@pytest.mark.parametrize("name", list(PROCESSES))
def test_any_callable(name):
    process, t = PROCESSES[name]
    levels = make_levels(process, t)
    value = evaluate(lambda at: 1 / (1 + at.sigma) ** 2, levels, "epsilon")
    assert_close(value, 1 / (1 + oracle.ld(levels.sigma.numpy())) ** 2)


def test_no_weighting_is_uniform():
    levels = make_levels(fastdiff.VariancePreserving(), INDICES)
    assert (evaluate(weighting.Uniform(), levels, "epsilon") == 1.0).all()
    noised = fastdiff.Objective(fastdiff.VariancePreserving()).noise(torch.zeros(2, 3), torch.tensor([0, 999]), seed=0)
    assert noised.weight.tolist() == [1.0, 1.0]


# ------------------------------------------------------------------------------------------------ consistency checks


@pytest.mark.parametrize(
    "make", [weighting.MinSNR, weighting.SoftMinSNR, weighting.TruncatedSNR, weighting.EDMWeighting]
)
@pytest.mark.parametrize("name", ["vp", "edm", "vpsde", "flow"])
def test_a_weight_on_x0_is_the_same_loss_in_every_kind(make, name):
    """w_kind |error of the kind|^2 = w_x0 |error of x0|^2: the kinds differ only by (d x0 / d output)^2."""
    process, t = PROCESSES[name]
    levels = make_levels(process, [v for v in t if 0.0 < v < 999])
    if name == "flow":
        levels = make_levels(process, [v for v in t if 0.0 < v < 1.0])
    on_x0 = evaluate(make(), levels, "sample")
    for kind in oracle.KINDS:
        if meaningful(process, kind):
            _, k_m = fastdiff.prediction.conversion(kind, "sample", levels)
            assert_close(evaluate(make(), levels, kind), on_x0 * k_m.numpy() ** 2, label=kind)


def test_the_forms_for_v_are_told_apart():
    levels = make_levels(fastdiff.VariancePreserving(zero_terminal_snr=True), [100, 500, 999])
    paper, plus, shifted, epsilon = (evaluate(weighting.MinSNR(5.0, form=f), levels, "v_prediction") for f in FORMS)
    assert (np.abs(paper - plus) > 0.1).all() and (np.abs(plus - shifted) > 1e-3).all()
    assert (abs(paper[-1]) < SILENT, plus[-1], shifted[-1], epsilon[-1]) == (True, 2.0, 1.0, 1.0)  # zero terminal SNR
    snr = levels.snr.numpy()
    assert_close(epsilon, np.minimum(5 / np.maximum(snr, 1e-300), 1), label="min(gamma / S, 1)")
    assert snr[0] > 5 and epsilon[0] < 1


@pytest.mark.parametrize(
    "w, at_zero, at_infinity",
    [
        (weighting.SNR(power=0.01), 0.0, 0.0),
        (weighting.SNR(power=-0.01), 0.0, 0.0),
        (weighting.SNR(power=0.1), 0.0, 0.0),  # the limit at infinity is infinite: weight 0
        (weighting.SNR(power=-0.1), 0.0, 0.0),  # the limit at zero is
        (weighting.P2(gamma=0.1), 1.0, 0.0),
        (lambda levels: levels.snr**-0.15, 0.0, 0.0),
    ],
    ids=["snr^0.01", "snr^-0.01", "snr^0.1", "snr^-0.1", "p2 0.1", "callable"],
)
def test_limits_of_small_powers(w, at_zero, at_infinity):
    """A limit cannot be had by putting in a very small SNR: (1e-200)^0.1 is 1e-20, and its reciprocal a finite 1e20."""
    zero = make_levels(fastdiff.VariancePreserving(zero_terminal_snr=True), [999])
    infinity = make_levels(fastdiff.EDM(), [0.0])
    assert_close(evaluate(w, zero, "epsilon"), [at_zero], absolute=SILENT, label="SNR 0")
    assert_close(evaluate(w, infinity, "epsilon"), [at_infinity], absolute=SILENT, label="SNR infinity")


FORMS = ("paper", "plus_one", "shifted", "epsilon")


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("which", [k for k in WEIGHTINGS])
def test_zero_terminal_snr_never_gives_nan(which, kind):
    """A weight of NaN or infinity would poison the batch's mean; the policy makes it a limit, or 0."""
    process = fastdiff.VariancePreserving(zero_terminal_snr=True)
    value = evaluate(WEIGHTINGS[which][0](), make_levels(process, [999, 998]), kind)
    assert np.isfinite(value).all() and (value >= 0).all()
    assert np.isfinite(value.astype(np.float32)).all()


INFINITE_AT_ZERO_SNR = [
    (weighting.Debiased(), "epsilon", True),
    (weighting.Debiased(), "v_prediction", False),
    (weighting.SNR(power=-1.0), "epsilon", True),
    (weighting.SNR(power=-0.1), "epsilon", True),
    (weighting.SNR(), "epsilon", False),
    (weighting.TruncatedSNR(), "epsilon", True),
    (weighting.TruncatedSNR(), "v_prediction", False),
    (weighting.InverseAlphaBar(), "v_prediction", True),
    (weighting.EDMWeighting(), "epsilon", True),
    (weighting.EDMWeighting(), "v_prediction", False),
    (weighting.MinSNR(), "epsilon", False),
    (weighting.MinSNR(), "v_prediction", False),
    (weighting.SigmaSqrt(), "epsilon", False),
    (weighting.P2(), "epsilon", False),
]


@pytest.mark.parametrize(
    "w, kind, infinite", INFINITE_AT_ZERO_SNR, ids=[f"{w}-{k}" for w, k, _ in INFINITE_AT_ZERO_SNR]
)
def test_zero_snr_policy_warns_at_construction(w, kind, infinite):
    """A row dropped by the policy is said once, when the objective is made, and only then."""
    process = fastdiff.VariancePreserving(zero_terminal_snr=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objective = fastdiff.Objective(process, prediction=kind, weighting=w)
    messages = [str(c.message) for c in caught if "SNR" in str(c.message) or "weight" in str(c.message)]
    assert bool(messages) == infinite, messages
    noised = objective.noise(torch.zeros(2, 4), torch.tensor([999, 500]), seed=1)
    expected = 0.0 if infinite else float(weighting.evaluate(w, process.levels(torch.tensor(999)), kind))
    assert float(noised.weight.flatten()[0]) == pytest.approx(expected, rel=1e-7, abs=SILENT)  # fp32 rounds by 6e-8


@pytest.mark.parametrize("w", [weighting.Debiased(), weighting.InverseAlphaBar(), weighting.MinSNR()])
def test_no_warning_without_zero_snr(w):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdiff.Objective(fastdiff.VariancePreserving("scaled_linear"), weighting=w)


def test_a_weight_beyond_float32_is_zero():
    """sigma = 1e-5, SNR^8 = 1e80: finite in float64, infinite as the float32 coefficient the kernels read."""
    levels = make_levels(fastdiff.EDM(), [1e-5, 1.0])
    assert evaluate(weighting.SNR(power=8.0), levels, "epsilon").tolist() == [0.0, 1.0]
    levels = make_levels(fastdiff.EDM(), [1e-20, 1.0])  # sigma^-2 = 1e40
    assert evaluate(weighting.SigmaSqrt(), levels, "epsilon").tolist() == [0.0, 1.0]


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "make, parameters, words",
    [
        (weighting.SigmaLinear, {"slope": -0.1}, "slope must be a number of at least 0; got -0.1"),
        (weighting.SigmaLinear, {"slope": math.inf}, "slope must be a number of at least 0; got inf"),
        (weighting.Interpolated, {"table": [1.0]}, r"at least two weights, at 0 and at 1; got shape \(1,\)"),
        (weighting.Interpolated, {"table": [[1.0, 2.0]]}, r"needs a 1-D table .*; got shape \(1, 2\)"),
        (weighting.Interpolated, {"table": [1.0, 2.0], "by": "t"}, "by must be 'fraction' or 'sigma'; got 't'"),
        (weighting.MinSNR, {"gamma": 0.0}, "gamma must be positive; got 0.0"),
        (weighting.MinSNR, {"gamma": -1.0}, "gamma must be positive; got -1.0"),
        (weighting.MinSNR, {"gamma": math.nan}, "gamma must be positive; got nan"),
        (weighting.MinSNR, {"form": "v"}, "form must be one of paper, plus_one, shifted, epsilon; got 'v'"),
        (weighting.SoftMinSNR, {"gamma": 0.0}, "gamma must be positive; got 0.0"),
        (weighting.Debiased, {"cap": 0.0}, "cap must be positive; got 0.0"),
        (weighting.Debiased, {"v_form": "sqrt"}, "v_form must be one of reciprocal, reciprocal_sqrt; got 'sqrt'"),
        (weighting.EDMWeighting, {"sigma_data": 0.0}, "sigma_data must be positive; got 0.0"),
        (weighting.P2, {"k": -1.0}, "k must be at least 0, or None; got -1.0"),
        (weighting.PerTimestep, {"table": [[1.0]]}, r"needs a 1-D table, one weight a timestep; got shape \(1, 1\)"),
    ],
)
def test_bad_parameters(make, parameters, words):
    with pytest.raises(ValueError, match=words):
        make(**parameters)


@pytest.mark.parametrize(
    "process, w",
    [
        (fastdiff.RectifiedFlow(), weighting.PerTimestep([1.0, 2.0])),
        (fastdiff.EDM(), weighting.Bell()),
        (fastdiff.EDM(), weighting.Interpolated([1.0, 2.0])),
        (fastdiff.EDM(), weighting.Interpolated([1.0, 2.0], by="sigma")),
        (fastdiff.VPSDE(), weighting.PerTimestep([1.0, 2.0])),
        (fastdiff.VariancePreserving(), weighting.PerTimestep([1.0, 2.0])),
        (fastdiff.VariancePreserving(), weighting.Likelihood()),
        (fastdiff.EDM(), weighting.Likelihood()),
        (fastdiff.RectifiedFlow(), weighting.Likelihood()),
    ],
    ids=lambda v: type(v).__name__,
)
def test_meaningless_pairs(process, w):
    """A bell needs a time in [0, 1], a table timesteps (and one value each), the likelihood an SDE: each is refused by
    its name."""
    with pytest.raises(ValueError, match=type(w).__name__):
        weighting.evaluate(w, make_levels(process, [0 if process.discrete else 0.5]), "epsilon")


def test_what_a_callable_raises_is_its_own_but_where_it_takes_the_levels_for_t():
    process = fastdiff.VPSDE()
    with pytest.raises(TypeError, match="called with the noise levels, not with t"):
        fastdiff.Objective(process, weighting=lambda t: 1 / (1 + t))
    with pytest.raises(ZeroDivisionError):
        fastdiff.Objective(process, weighting=lambda levels: 1 / 0)
