"""Every prediction kind against the oracle: target coefficients, conversions, round trips, pairs that mean nothing.

The process's own alpha and sigma (float64, taken as exact numbers) are the oracle's input here, so that only the
prediction's arithmetic is compared; the processes have their own tests.

Tolerances. A coefficient is a product or quotient of a few float64 numbers: 1e-12 relative is 1e4 roundings. A
converted output k_x x_t + k_m m is a sum of two terms that may cancel: its error is measured against their sizes.
"""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known import make_levels
from oracle import assert_close

import fastdiff
from fastdiff import prediction

PROFILE = settings(max_examples=40, deadline=None, derandomize=True)

INDICES = [0, 1, 2, 10, 250, 500, 750, 998, 999]
FRACTIONS = [0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0]
# name -> process, t; the flow processes take no "v_prediction", and only the discrete ones "previous_sample"
PROCESSES = {
    "linear": (fastdiff.VariancePreserving("linear"), INDICES),
    "cosine": (fastdiff.VariancePreserving("cosine"), INDICES),
    "zero snr": (fastdiff.VariancePreserving("scaled_linear", zero_terminal_snr=True), INDICES),
    "flow": (fastdiff.RectifiedFlow(), FRACTIONS),
    "flow shift": (fastdiff.RectifiedFlow(shift=3.0), FRACTIONS),
    "flow sigma_min": (fastdiff.RectifiedFlow(sigma_min=1e-3), FRACTIONS),
    "edm": (fastdiff.EDM(), [0.0, 1e-4, 0.002, 0.5, 1.0, 80.0, 1e4]),
    "edm d=2": (fastdiff.EDM(sigma_data=2.0), [0.0, 1e-4, 0.002, 0.5, 1.0, 80.0, 1e4]),
    "vpsde": (fastdiff.VPSDE(), FRACTIONS),
    "subvpsde": (fastdiff.SubVPSDE(), FRACTIONS),
    "vesde": (fastdiff.VESDE(), FRACTIONS),
    "continuous cosine": (fastdiff.Cosine(), FRACTIONS),
    "trigflow": (fastdiff.TrigFlow(), [*FRACTIONS, 1.5, fastdiff.TrigFlow.t_max]),
    "trigflow d=2": (fastdiff.TrigFlow(2.0), [*FRACTIONS, 1.5, fastdiff.TrigFlow.t_max]),
}
ALL_KINDS = (*oracle.KINDS, "previous_sample")


def meaningful(process, kind: str) -> bool:
    if kind == "v_prediction":
        return not isinstance(process, fastdiff.RectifiedFlow)
    if kind == "previous_sample":
        return process.discrete
    if kind in ("flow", "reversed_flow"):
        return isinstance(process, fastdiff.RectifiedFlow)
    return True


PAIRS = [(name, kind) for name, (process, _) in PROCESSES.items() for kind in ALL_KINDS if meaningful(process, kind)]


def truth_arguments(process, levels) -> dict:
    out = {"sigma_data": getattr(process, "sigma_data", 0.5), "sigma_min": 0.0}
    if isinstance(process, fastdiff.RectifiedFlow):
        out["sigma_min"] = process.sigma_min
    if process.discrete:
        c_x0, c_xt, _ = process.posterior(levels.t)
        out["posterior_coefficients"] = (c_x0.numpy(), c_xt.numpy())
    return out


def regular(kind: str, levels) -> np.ndarray:
    """Where the kind is defined at all: the score is not where sigma = 0."""
    sigma = levels.sigma.numpy()
    return sigma > 0 if kind == "score" else np.ones(sigma.shape, dtype=bool)


def determined(kind: str, levels) -> np.ndarray:
    """Where x_t and this output together determine x0 and the noise: everywhere but at some ends."""
    alpha, sigma = levels.alpha.numpy(), levels.sigma.numpy()
    if kind in ("epsilon", "score"):
        return (alpha > 0) & (regular(kind, levels))
    if kind in ("sample", "previous_sample"):
        return sigma > 0 if kind == "sample" else (sigma > 0) & (levels.t.numpy() > 0)
    return np.ones(alpha.shape, dtype=bool)


@pytest.mark.parametrize("name, kind", PAIRS)
def test_target_coefficients(name, kind):
    """target = p x0 + q n, read off the oracle's direct formula at (x0, n) = (1, 0) and (0, 1)."""
    process, t = PROCESSES[name]
    levels = make_levels(process, t)
    p, q = prediction.get(kind).coefficients(levels)
    assert p.dtype == q.dtype == torch.float64 and p.shape == q.shape == levels.t.shape
    alpha, sigma = levels.alpha.numpy(), levels.sigma.numpy()
    arguments, where = truth_arguments(process, levels), regular(kind, levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected_p = oracle.target(kind, 1.0, 0.0, alpha, sigma, **arguments)
        expected_q = oracle.target(kind, 0.0, 1.0, alpha, sigma, **arguments)
    assert_close(p.numpy()[where], expected_p[where], absolute=1e-15 * (kind == "score"), label=f"p of {kind}")
    assert_close(q.numpy()[where], expected_q[where], label=f"q of {kind}")


@pytest.mark.parametrize("name, source", PAIRS)
def test_conversion_to_x0(name, source):
    """source -> sample by the table of direct formulas, at x_t = 1, m = 0 and x_t = 0, m = 1 (so k_x and k_m apart)."""
    process, t = PROCESSES[name]
    levels = make_levels(process, t)
    k_x, k_m = prediction.conversion(source, "sample", levels)
    assert k_x.dtype == k_m.dtype == torch.float64 and k_x.shape == k_m.shape == levels.t.shape
    alpha, sigma, arguments = levels.alpha.numpy(), levels.sigma.numpy(), truth_arguments(process, levels)
    where = determined(source, levels) | (source == "sample")
    if source == "edm":  # the direct formula divides by alpha
        where &= alpha > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        expected_x = oracle.to_x0(source, 1.0, 0.0, alpha, sigma, **arguments)
        expected_m = oracle.to_x0(source, 0.0, 1.0, alpha, sigma, **arguments)
    # a k_x that is 0 in truth may come out as a rounding of k_m's size; the flow's divisor is 1 to rounding
    assert_close(k_x.numpy()[where], expected_x[where], absolute=1e-15, label=f"k_x from {source}")
    assert_close(k_m.numpy()[where], expected_m[where], absolute=1e-15, label=f"k_m from {source}")


@pytest.mark.parametrize("name", list(PROCESSES))
def test_every_conversion_gives_the_target(name):
    """For every pair of kinds: k_x x_t + k_m target_source = target_target, for two independent (x0, n)."""
    process, t = PROCESSES[name]
    levels = make_levels(process, t)
    alpha, sigma, arguments = levels.alpha.numpy(), levels.sigma.numpy(), truth_arguments(process, levels)
    kinds = [k for k in ALL_KINDS if meaningful(process, k)]
    for source in kinds:
        for goal in kinds:
            if source == goal:
                continue
            where = determined(source, levels) & regular(goal, levels)
            k_x, k_m = (k.numpy()[where].astype(oracle.LD) for k in prediction.conversion(source, goal, levels))
            assert np.isfinite(k_x).all() and np.isfinite(k_m).all(), (source, goal)
            for x0, n in ((1.0, 0.0), (0.0, 1.0), (0.7, -1.3)):
                with np.errstate(divide="ignore", invalid="ignore"):
                    m = oracle.target(source, x0, n, alpha, sigma, **arguments)[where]
                    expected = oracle.target(goal, x0, n, alpha, sigma, **arguments)[where]
                x_t = (oracle.ld(alpha) * x0 + oracle.ld(sigma) * n)[where]
                size = np.abs(k_x * x_t) + np.abs(k_m * m)
                # x_{t-1} = c1 x0 + c2 x_t is nearly x_t: solving for x0 divides by c1 (as small as 1e-4 at late t
                # under a cosine schedule) and multiplies the rounding of c2 x_t by it
                lost = 1.0
                if source == "previous_sample":
                    c_x0, c_xt = arguments["posterior_coefficients"]
                    lost = (1 + c_xt / c_x0)[where]
                assert_close(
                    k_x * x_t + k_m * m, expected, rel=0, absolute=1e-12 * size * lost, label=f"{source} -> {goal}"
                )


@pytest.mark.parametrize("name, kind", PAIRS)
def test_conversion_to_itself_is_the_identity(name, kind):
    process, t = PROCESSES[name]
    levels = make_levels(process, t)
    where = regular(kind, levels)
    k_x, k_m = prediction.conversion(kind, kind, levels)
    assert (k_x.numpy()[where] == 0).all() and (k_m.numpy()[where] == 1).all()


@given(
    log_sigma=st.floats(-6.0, 4.0), m=st.floats(-3.0, 3.0), x=st.floats(-3.0, 3.0), pair=st.permutations(oracle.KINDS)
)
@PROFILE
def test_round_trip(log_sigma, m, x, pair):
    """source -> goal -> source gives the output back, over ten decades of sigma (EDM) and through any pair."""
    kinds = [k for k in pair if meaningful(fastdiff.EDM(), k)][:2]
    levels = make_levels(fastdiff.EDM(), [10.0**log_sigma])
    k_x, k_m = (float(k) for k in prediction.conversion(kinds[0], kinds[1], levels))
    b_x, b_m = (float(k) for k in prediction.conversion(kinds[1], kinds[0], levels))
    back = b_x * x + b_m * (k_x * x + k_m * m)
    # the sizes of the terms summed on the way bound the error
    size = abs(b_x * x) + abs(b_m) * (abs(k_x * x) + abs(k_m * m)) + abs(m)
    assert abs(back - m) <= 1e-12 * size


@pytest.mark.parametrize("kind", ["epsilon", "score"])
def test_zero_snr_hides_x0(kind):
    """Where alpha = 0, noise says nothing of x0: a coefficient that is not finite, never a made-up one."""
    process = fastdiff.VariancePreserving(zero_terminal_snr=True)
    for coefficient in prediction.conversion(kind, "sample", make_levels(process, [999])):
        assert not np.isfinite(coefficient.numpy()).any()


def test_v_at_zero_snr_is_minus_x0():
    """Lin et al. section 3.3: at zero terminal SNR v = -x0, so x0 is known there."""
    levels = make_levels(fastdiff.VariancePreserving(zero_terminal_snr=True), [999])
    p, q = prediction.get("v_prediction").coefficients(levels)
    k_x, k_m = prediction.conversion("v_prediction", "sample", levels)
    assert (float(p), float(q)) == (-1.0, 0.0)
    assert (float(k_x), float(k_m)) == (0.0, -1.0)


def test_previous_sample_at_the_first_step_is_x0():
    levels = make_levels(fastdiff.VariancePreserving(), [0])
    p, q = prediction.get("previous_sample").coefficients(levels)
    assert (float(p), float(q)) == (1.0, 0.0)


def noised_of(process, kind, t):
    objective = fastdiff.Objective(process, prediction=kind)
    t = torch.tensor(t, dtype=torch.int64 if process.discrete else torch.float64)
    x0 = torch.randn(len(t), 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return objective.noise(x0, t, torch.ones_like(x0))


@pytest.mark.parametrize(
    "process, t",
    [(fastdiff.EDM(), [0.002, 0.5, 80.0]), (fastdiff.EDM(2.0), [0.002, 1.0]), (fastdiff.VPSDE(), [0.01, 0.5, 1.0])],
    ids=["edm", "edm d=2", "vpsde"],
)
def test_what_an_edm_network_is_called_with(process, t):
    """EDM eq. 7 and table 1: F is called with c_in x and c_noise = ln(sigma)/4; x and sigma those of x_t/alpha."""
    noised = noised_of(process, "edm", t)
    alpha, sigma = (v.numpy() for v in process.alpha_sigma(torch.tensor(t, dtype=torch.float64)))
    c = oracle.edm_preconditioning(oracle.ld(sigma) / alpha, getattr(process, "sigma_data", 0.5))
    x = noised.x_t.numpy() / oracle.ld(alpha)[:, None]
    # the rows' coefficients are rounded to fp32 where the data are: twice its unit roundoff, of ln(sigma)/4 absolute
    assert_close(noised.model_input, c["c_in"][:, None] * x, rel=2.0**-23)
    assert_close(noised.model_time.flatten(), c["c_noise"], rel=2.0**-23, absolute=2.0**-23)


def test_what_other_networks_are_called_with():
    """x_t itself; the index for a discrete process, the shifted time sigma for a rectified flow, t for an SDE."""
    vp = noised_of(fastdiff.VariancePreserving(), "v_prediction", [0, 500, 999])
    assert torch.equal(vp.model_input, vp.x_t) and vp.model_time.flatten().tolist() == [0, 500, 999]
    flow = noised_of(fastdiff.RectifiedFlow(shift=3.0), "flow", [0.0, 0.25, 1.0])
    assert torch.equal(flow.model_input, flow.x_t)
    assert_close(flow.model_time.flatten(), oracle.flow_shift([0.0, 0.25, 1.0], 3.0), rel=2.0**-23)
    sde = noised_of(fastdiff.VPSDE(), "score", [0.125, 1.0])
    assert torch.equal(sde.model_input, sde.x_t) and sde.model_time.flatten().tolist() == [0.125, 1.0]


@pytest.mark.parametrize("shape", [(), (2, 3), (0,)])
def test_shapes(shape):
    process = fastdiff.VariancePreserving()
    levels = process.levels(torch.full(shape, 3))
    for kind in ("epsilon", "sample", "v_prediction", "score", "edm", "previous_sample"):
        for value in (*prediction.get(kind).coefficients(levels), *prediction.conversion(kind, "epsilon", levels)):
            assert value.shape == shape and value.dtype == torch.float64


@pytest.mark.parametrize(
    "process, kind",
    [
        (fastdiff.RectifiedFlow(), "v_prediction"),
        (fastdiff.RectifiedFlow(), "previous_sample"),
        (fastdiff.EDM(), "previous_sample"),
        (fastdiff.VPSDE(), "previous_sample"),
        (fastdiff.VESDE(), "previous_sample"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_meaningless_pairs(process, kind):
    """The message names the prediction and the process, for the target as for the objective."""
    with pytest.raises(ValueError, match=f"(?s)(?=.*{kind})(?=.*{type(process).__name__})"):
        prediction.get(kind).coefficients(make_levels(process, [0.5]))
    with pytest.raises(ValueError, match=kind):
        fastdiff.Objective(process, prediction=kind)


def test_unknown_prediction_lists_the_known():
    with pytest.raises(ValueError, match="(?s)(?=.*noise)(?=.*epsilon)(?=.*v_prediction)"):
        prediction.get("noise")
    with pytest.raises(ValueError, match="epsilon"):
        fastdiff.Objective(fastdiff.EDM(), prediction="epsilons")


def test_get_passes_a_prediction_through():
    kind = prediction.get("epsilon")
    assert prediction.get(kind) is kind


@pytest.mark.parametrize("process", [fastdiff.RectifiedFlow(), fastdiff.VPSDE()], ids=["flow", "vpsde"])
def test_predict_x0_of_a_sample_prediction_is_the_prediction(process):
    """Clean data (t = 0) included: the network's output is x0, nothing is solved for."""
    objective = fastdiff.Objective(process, prediction="sample")
    noised = objective.noise(torch.ones(3, 4), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), seed=0)
    output = torch.linspace(-1, 1, 12).reshape(3, 4)
    assert torch.equal(objective.predict_x0(output, noised), output)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow", "reversed_flow", "score", "edm"])
def test_a_kind_says_which_operands_its_target_has(kind):
    """What the target does not have is not read."""
    flow = "flow" in kind
    process = fastdiff.RectifiedFlow() if flow else fastdiff.VariancePreserving()
    found = prediction.get(kind)
    p, q = found.coefficients(process.levels([0.3, 0.7] if flow else [300, 700]))
    assert (found.uses_x0, found.uses_noise) == (bool((p != 0).any()), bool((q != 0).any()))
