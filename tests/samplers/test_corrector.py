"""Predictor-corrector sampling against the paper's loop, and that a sample depends on itself alone."""

import math

import numpy as np
import oracle
import oracle_samplers as truth
import pytest
import torch
from oracle import assert_close
from tiny_run import LEVELS, STEPS, clean

import fastdiff
from fastdiff import prediction as kinds
from fastdiff.samplers import DDIM, DDPM, EDM, DPMSolverPP, Euler, PredictorCorrector

VP, VPSDE = fastdiff.VariancePreserving(), fastdiff.VPSDE()
TIMES = [0.9, 0.6, 0.3, 0.1]
SHAPE = (3, 2, 4)
START = np.random.default_rng(1).standard_normal(SHAPE)
Z = np.random.default_rng(2).standard_normal((40, *SHAPE))


def noise(k, shape):
    return torch.from_numpy(Z[k])


def network(process, prediction):
    """Says x0 = ``clean(x)`` in a prediction kind."""

    def model(x, t):
        time = {"VESDE": lambda: process.time_of(t.clamp(max=50.0))}.get(type(process).__name__, lambda: t)()
        levels = process.levels(time)
        k_x, k_m = (k.view(-1, 1, 1) for k in kinds.conversion("sample", prediction, levels))
        return (k_x * x + k_m * torch.from_numpy(clean(x.double().numpy()))).to(x.dtype)

    return model


def run(process, prediction, sampler, **how):
    how = {"x": torch.from_numpy(START), "noise": noise, "dtype": torch.float64} | how
    model = how.pop("model", None) or network(process, prediction)
    return fastdiff.sample(model, SHAPE, process, sampler, None, prediction, progress=False, **how)


PROCESSES = {
    "vp": (fastdiff.VPSDE(), "score", oracle.vpsde_alpha_sigma, TIMES),
    "ve": (fastdiff.VESDE(), "score", oracle.vesde_alpha_sigma, TIMES),
    "sub-vp": (fastdiff.SubVPSDE(), "epsilon", oracle.subvpsde_alpha_sigma, TIMES),
    "flow": (fastdiff.RectifiedFlow(), "flow", oracle.flow_alpha_sigma, [1.0, *TIMES]),
    "trigflow": (fastdiff.TrigFlow(), "trigflow", oracle.trigflow_alpha_sigma, TIMES),
}


@pytest.mark.parametrize("correctors", [0, 1, 2])
@pytest.mark.parametrize("name", list(PROCESSES))
def test_against_the_paper(backend, name, correctors):
    """Every x of a run, after predictors and correctors. Float64: the score divides a rounding by sigma^2 >= 1e-4."""
    process, prediction, alpha_sigma, times = PROCESSES[name]
    levels = [*zip(*alpha_sigma(times)), (1.0, 0.0)]
    expected = truth.predictor_corrector(START, levels, clean, 0.3, correctors, lambda k: Z[k])
    sampler = PredictorCorrector(predictor=DDPM(timesteps=times), corrector_steps=correctors, snr=0.3)
    y, path = run(process, prediction, sampler, return_trajectory=True)
    assert len(path) == 1 + len(times) + (len(times) - 1) * correctors
    for got, wanted in zip(path[1:], expected, strict=True):
        assert_close(got.numpy(), wanted, rel=0, absolute=1e-9 * max(1.0, float(np.abs(wanted).max())))
    assert torch.equal(y, path[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision(backend, dtype):
    """The loop in float64 differs by the roundings of x, one a row: 9 rows, each multiplied by less than 4 later."""
    process, prediction, alpha_sigma, times = PROCESSES["vp"]
    sampler = PredictorCorrector(predictor=DDPM(timesteps=times), corrector_steps=1, snr=0.2)
    start = torch.from_numpy(START).to(dtype)
    expected = run(process, prediction, sampler, x=start.double())
    got = run(process, prediction, sampler, x=start, dtype=dtype)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=36 * torch.finfo(dtype).eps)


def test_a_corrector_wanders_at_its_level():
    """Langevin steps with the exact score of Gaussian data keep its distribution: starting from one point, 600 steps at
    a level forget it. 50 samples of 1024 numbers. The discretisation widens the variance by r^2, and that
    the step size depends on the noise and on x by 4 / 1024."""
    process, mean, std = fastdiff.VPSDE(), 0.5, 0.4

    def model(x, t):
        levels = process.levels(t)
        alpha, sigma = levels.alpha[:, None], levels.sigma[:, None]
        return -(x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    seen = []
    sampler = PredictorCorrector(predictor=DDIM(timesteps=[0.6, 0.4, 0.39]), corrector_steps=600, snr=0.1)
    fastdiff.sample(
        model, (50, 1024), process, sampler, None, "score", x=torch.full((50, 1024), 2.0), seed=3, progress=False,
        callback=lambda k, t, x, x0: seen.append(x.clone()),
    )  # fmt: skip
    x = seen[600]  # before the second predictor
    alpha, sigma = (float(v) for v in process.alpha_sigma(torch.tensor(0.4)))
    variance = alpha**2 * std**2 + sigma**2
    assert x.mean().item() == pytest.approx(alpha * mean, abs=5 * math.sqrt(variance / x.numel()))
    assert x.var().item() == pytest.approx(variance, rel=0.015 + 5 * math.sqrt(2 / x.numel()))


def test_a_sample_does_not_depend_on_the_batch():
    sampler = PredictorCorrector(predictor=DDPM(timesteps=TIMES), corrector_steps=2)
    how = {"model": lambda x, t: torch.tanh(x), "x": None, "noise": None, "dtype": torch.float32, "seed": 7}
    whole = run(VPSDE, "epsilon", sampler, **how)
    model = how.pop("model")
    part = fastdiff.sample(
        model, (1, *SHAPE[1:]), VPSDE, sampler, None, "epsilon", seed=7, sample_offset=2, progress=False
    )
    assert torch.equal(whole[2:], part)


def test_each_row_has_noise_of_its_own():
    """That of the seed and the row's number: the same as tensors that are made beforehand."""
    sampler = PredictorCorrector(predictor=DDPM(timesteps=TIMES), corrector_steps=1)
    model = lambda x, t: torch.tanh(x)  # noqa: E731
    made = lambda k, shape: fastdiff.ops.materialize(  # noqa: E731
        fastdiff.ops.Philox(5, 0, fastdiff.philox.Stream.STEP + k), shape, "cpu"
    )
    x = torch.from_numpy(START).float()
    how = {"model": model, "x": x, "dtype": torch.float32}
    seeded = run(VPSDE, "epsilon", sampler, noise=None, seed=5, **how)
    assert torch.equal(seeded, run(VPSDE, "epsilon", sampler, noise=made, **how))
    later = run(VPSDE, "epsilon", sampler, noise=None, seed=5, step_offset=3, **how)
    assert torch.equal(later, run(VPSDE, "epsilon", sampler, noise=made, step_offset=3, **how))
    assert not torch.equal(seeded, later)


def test_guidance_is_part_of_the_score():
    """The step size is that of the combined output; a network that answers both halves with it needs no guidance."""
    sampler = PredictorCorrector(predictor=DDPM(timesteps=TIMES), corrector_steps=1)

    def guided(x, t, cond):
        return torch.sin(x) + cond

    cond, uncond = torch.full((3, 1, 1), 0.7), torch.full((3, 1, 1), 0.2)
    for scale in (3.0, torch.tensor([3.0, 0.5, 1.5])):
        how = {"cond": cond, "uncond": uncond, "guidance": scale, "model": guided}
        got = run(VPSDE, "epsilon", sampler, **how)
        factor = scale.double()[:, None, None] if isinstance(scale, torch.Tensor) else scale
        combined = run(
            VPSDE, "epsilon", sampler, model=lambda x, t, factor=factor: torch.sin(x) + 0.2 + factor * (0.7 - 0.2)
        )
        torch.testing.assert_close(got, combined, rtol=1e-6, atol=1e-6)  # the conditions are float32


def test_known_data_is_at_its_level_after_a_corrector():
    """Inpainting: known data, noised to the level that the corrector stays at."""
    known = torch.full(SHAPE, 2.0, dtype=torch.float64)
    mask = torch.zeros(SHAPE, dtype=torch.float64)
    mask[..., :2] = 1
    seen = []
    run(
        VPSDE, "epsilon", PredictorCorrector(predictor=DDPM(timesteps=TIMES)), known=known, mask=mask, seed=4,
        noise=None, model=lambda x, t: torch.tanh(x),
        callback=lambda k, t, x, x0: seen.append((float(t), x[..., :2].clone())),
    )  # fmt: skip
    z = fastdiff.ops.materialize(fastdiff.ops.Philox(4, 0, fastdiff.philox.Stream.INITIAL), SHAPE, "cpu")[
        ..., :2
    ].double()
    assert [t for t, _ in seen] == [0.9, 0.6, 0.6, 0.3, 0.3, 0.1, 0.1]
    for (_, after), level in zip(seen, [0.6, 0.6, 0.3, 0.3, 0.1, 0.1, None]):
        alpha, sigma = (1.0, 0.0) if level is None else oracle.vpsde_alpha_sigma(level)
        torch.testing.assert_close(after, float(alpha) * 2.0 + float(sigma) * z, rtol=1e-6, atol=1e-6)


def test_discrete_steps_and_scaled_input():
    """Timesteps of DDPM; and "edm", whose network is given a scaled x: the same as a network of x0."""
    expected = truth.predictor_corrector(START, LEVELS, clean, 0.16, 1, lambda k: Z[k])[-1]
    got = fastdiff.sample(
        lambda x, t: torch.from_numpy(clean(x.numpy())), SHAPE, VP, "predictor_corrector", STEPS, "sample",
        x=torch.from_numpy(START), noise=noise, dtype=torch.float64, progress=False,
    )  # fmt: skip
    assert_close(got.numpy(), expected, rel=0, absolute=1e-10)

    edm, sampler = fastdiff.EDM(), PredictorCorrector(predictor=DDPM(timesteps=[2.0, 1.0, 0.4]), corrector_steps=1)

    def raw(seen, t):
        sigma = torch.exp(4 * t)[:, None, None]
        x = seen * torch.hypot(sigma, torch.full_like(sigma, 0.5))
        k_x, k_m = (k[:, None, None] for k in kinds.conversion("sample", "edm", edm.levels(sigma[:, 0, 0])))
        return k_x * x + k_m * torch.from_numpy(clean(x.numpy()))

    plain = run(edm, "sample", sampler, model=lambda x, t: torch.from_numpy(clean(x.numpy())))
    torch.testing.assert_close(run(edm, "edm", sampler, model=raw), plain, rtol=1e-10, atol=1e-10)


def test_a_clip_of_its_own_or_of_its_predictor():
    how = {"model": lambda x, t: 3 * x}
    plain = run(VPSDE, "epsilon", PredictorCorrector(predictor=DDPM(timesteps=TIMES)), **how)
    outer = run(VPSDE, "epsilon", PredictorCorrector(predictor=DDPM(timesteps=TIMES), clip=0.3), **how)
    inner = run(VPSDE, "epsilon", PredictorCorrector(predictor=DDPM(timesteps=TIMES, clip=0.3)), **how)
    assert torch.equal(outer, inner) and float(inner.abs().max()) <= 0.3 < float(plain.abs().max())


def test_a_score_of_zero_takes_no_step():
    """Its direction is unknown; the step size would be infinite."""
    y = run(VPSDE, "score", PredictorCorrector(predictor=DDIM(timesteps=[0.6, 0.3])), model=lambda x, t: 0 * x)
    assert torch.equal(y, run(VPSDE, "score", DDIM(timesteps=[0.6, 0.3]), model=lambda x, t: 0 * x))


@pytest.mark.parametrize(
    "predictor", [DPMSolverPP(), EDM(), Euler(s_churn=5.0), DDPM("learned_range")], ids=lambda s: type(s).__name__
)
def test_predictors_that_do_not_fit(predictor):
    with pytest.raises(ValueError, match="needs a predictor of one call a step without history, churn and learned"):
        PredictorCorrector(predictor=predictor).plan(VP, 5, "epsilon")


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"predictor": "ddpm"}, TypeError, "predictor must be an object of fastdiff.samplers; got 'ddpm'"),
        ({"corrector_steps": -1}, ValueError, "corrector_steps must be at least 0; got -1"),
        ({"corrector_steps": 1.5}, TypeError, "corrector_steps must be a whole number; got 1.5"),
        ({"snr": 0.0}, ValueError, "snr must be a positive number; got 0.0"),
        ({"snr": math.inf}, ValueError, "snr must be a positive number; got inf"),
        ({"snr": "0.1"}, TypeError, "snr must be a number"),
    ],
)
def test_bad_settings(given, error, words):
    with pytest.raises(error, match=words):
        PredictorCorrector(**given)


def test_options_that_look_at_the_output_too():
    """Rescaled guidance scales the score; a thresholded x0 estimate is what predictors step to, and no corrector."""
    cond, uncond = torch.full((3, 1, 1), 0.7), torch.full((3, 1, 1), 0.2)
    sampler = PredictorCorrector(predictor=DDPM(timesteps=TIMES))
    seen = []

    def guided(x, t, cond):
        seen.append(x.clone())
        return torch.sin(x) + cond * x

    how = {"cond": cond, "uncond": uncond, "guidance": 3.0, "model": guided}
    path = run(VPSDE, "score", sampler, guidance_rescale=0.5, dynamic_thresholding=0.9, return_trajectory=True, **how)[
        1
    ]
    x, after = path[1], path[2]  # the first corrector
    halves = [torch.sin(x) + c * x for c in (0.2, 0.7)]
    combined = halves[0] + 3.0 * (halves[1] - halves[0])
    ratio = halves[1].flatten(1).std(1) / combined.flatten(1).std(1)
    score = combined * (0.5 * ratio + 0.5)[:, None, None]
    z = torch.from_numpy(Z[1])
    one_minus_beta = float(oracle.vpsde_alpha_sigma(0.6)[0] / oracle.vpsde_alpha_sigma(0.3)[0]) ** 2
    e = 2 * one_minus_beta * (0.16 * z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1))[:, None, None] ** 2
    torch.testing.assert_close(after, x + e * score + (2 * e).sqrt() * z, rtol=1e-6, atol=1e-6)  # float32 conditions
    alone = run(VPSDE, "score", sampler, guidance_rescale=0.5, return_trajectory=True, **how)[1]
    assert not torch.allclose(alone[1], x)


def test_classifier_guidance_does_not_go_with_it():
    with pytest.raises(ValueError, match="cond_fn does not go with PredictorCorrector"):
        run(VPSDE, "epsilon", PredictorCorrector(), model=lambda x, t: x, cond_fn=lambda x, t: x)
