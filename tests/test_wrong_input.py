"""Wrong input gets an error, before anything runs, that says what was given, what is accepted and what to do."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import fastdiff
from fastdiff import losses, ops, samplers, timesteps, weighting
from fastdiff import tabulated as tables
from fastdiff.integrations import guided_diffusion
from fastdiff.samplers.schedule import Path, Scheduled
from fastdiff.sampling import cuda_graph
from fastdiff.sampling.guidance import Guidance

X = torch.randn(2, 3, 4)
T = torch.tensor([1, 2])
VP = fastdiff.VariancePreserving()
FLOW = fastdiff.RectifiedFlow()


def objective(process=VP, prediction="epsilon", **how):
    return fastdiff.Objective(process, prediction, **how)


def loss(prediction=X, mask=None, **how):
    noised = objective().noise(X, T, X)
    return objective().loss(prediction, noised, mask, **how)


def never(*_):
    raise AssertionError("the model was called")


def sample(model=never, shape=(2, 3), process=VP, sampler="ddpm", steps=5, prediction="epsilon", **how):
    return fastdiff.sample(model, shape, process, sampler, steps, prediction, **({"progress": False} | how))


class Unknown(fastdiff.Process):
    """A process of one's own, of which nothing is known but its levels."""

    def alpha_sigma(self, t):
        return 1 - t.double(), t.double()


def captured(sampler="ddim", **how):
    """What a run asks before it is captured in a CUDA graph, on a CPU."""
    sampler = samplers.get(sampler)
    options = {"interval": None, "rescale": 0.0, "quantile": None, "most": None, "cond_fn": None} | how
    guidance = options.pop("guidance", 2.0)
    plan = sampler.plan(VP, 5, "epsilon")
    cuda_graph.check_capture(torch.device("cuda"), plan, Guidance(plan, sampler, guidance, True, **options))


def inpainted(**how):
    return ops.step(X, X, torch.ones(len(ops.COLUMNS)), **how)


CASES = {
    # what is given: (call, error, words of the message)
    "x0 of integers": (
        lambda: objective().noise(torch.ones(2, 3, dtype=torch.uint8)), TypeError, "x0 must be .*uint8.*127.5"),
    "x0 no tensor": (lambda: objective().noise([1.0, 2.0]), TypeError, "x0 must be a tensor; got list"),
    "x0 complex": (lambda: objective().noise(X.to(torch.complex64)), TypeError, "complex64"),
    "x0 scalar": (lambda: objective().noise(torch.tensor(1.0)), ValueError, "batch dimension"),
    "x0 scalar, and times": (lambda: objective().noise(torch.tensor(1.0), T), ValueError, "batch dimension"),
    "t float for discrete": (
        lambda: objective().noise(X, torch.rand(2)), TypeError, r"integer indices.*999"),
    "t integer for continuous": (
        lambda: objective(FLOW, "flow").noise(X, T), TypeError, r"floating point in \[0, 1\]"),
    "t too large": (lambda: objective().noise(X, torch.tensor([0, 1000])), ValueError, r"\[0, 999\].*got 1000"),
    "t negative": (lambda: objective().noise(X, torch.tensor([-1, 5])), ValueError, "got -1"),
    "t above 1": (
        lambda: objective(FLOW, "flow").noise(X, torch.tensor([0.5, 1.5])), ValueError, r"\[0, 1\].*got 1.5"),
    "t NaN": (lambda: objective(FLOW, "flow").noise(X, torch.tensor([0.5, float("nan")])), ValueError, "got nan"),
    "t of a wrong length": (lambda: objective().noise(X, torch.tensor([1, 2, 3])), ValueError, r"t has shape \(3,\)"),
    "noise of another shape": (lambda: objective().noise(X, T, X[:, :2]), ValueError, r"noise has shape \(2, 2, 4\)"),
    "noise of integers": (lambda: objective().noise(X, T, X.long()), TypeError, "noise must be floating"),
    "noise elsewhere": (lambda: objective().noise(X, T, X.to("meta")), ValueError, r"noise is on meta.*\.to\(device\)"),
    "offset noise without channels": (
        lambda: objective(noise_offset=0.1).noise(torch.zeros(2, 3)), ValueError, "channels"),
    "seed of 65 bits": (lambda: objective().noise(X, seed=1 << 64), ValueError, "64 bits"),
    "seed a float": (lambda: objective().noise(X, seed=1.5), TypeError, "seed must be an integer"),
    "seed and generator": (lambda: objective().noise(X, seed=1, generator=torch.Generator()), ValueError, "not both"),
    "q_sample t": (lambda: fastdiff.q_sample(X, torch.tensor([0, 1000]), VP), ValueError, "999"),
    "diffusion_loss t": (lambda: fastdiff.diffusion_loss(X, X, X, torch.tensor([1000]), VP), ValueError, "999"),
    "diffusion_loss noise": (lambda: fastdiff.diffusion_loss(X, X, X[:1], T, VP), ValueError, "noise has shape"),
    "prediction of another shape": (lambda: loss(X[:, :2]), ValueError, "prediction"),
    "prediction with a variance": (lambda: loss(torch.cat([X, X], 1)), ValueError, r"chunk\(2, dim=1\)"),
    "prediction sparse": (lambda: loss(X.to_sparse()), TypeError, r"prediction must be .*sparse.*to_dense\(\)"),
    "prediction nested": (
        lambda: loss(torch.nested.nested_tensor([X[0], X[1]])), TypeError, "must be dense.*nested.*lengths="),
    "prediction of integers": (lambda: loss(X.long()), TypeError, "prediction must be floating"),
    "mask aligned at the right": (
        lambda: loss(mask=torch.ones(3, 4)), ValueError, r"\(3, 4\).*\(2, 3, 4\).*at the left.*mask.view\(1, 3, 4\)"),
    "mask of more dimensions": (lambda: loss(mask=torch.ones(1, 2, 3, 4)), ValueError, "aligned at the left"),
    "mask elsewhere": (lambda: loss(mask=torch.ones(2, 1, 4, device="meta")), ValueError, "mask is on meta"),
    "mask complex": (lambda: loss(mask=torch.ones(4, dtype=torch.complex64)), TypeError, "complex"),
    "normalised sum": (
        lambda: loss(mask=torch.ones(2), mask_normalization="row", reduction="sum"), ValueError, "divides by nothing"),
    "unknown reduction": (lambda: loss(reduction="avg"), ValueError, "mean, sum, none, elements; got 'avg'"),
    "normalised elements": (
        lambda: loss(mask=torch.ones(2), mask_normalization="sample", reduction="elements"),
        ValueError, "divides by nothing.*got 'sample'.*by the mask's sum"),
    "unknown mask normalisation": (lambda: loss(mask_normalization="all"), ValueError, "none, row, sample, global"),
    "weights of a wrong length": (lambda: loss(weight=torch.ones(3)), ValueError, r"weight has shape \(3,\)"),
    "unknown prediction": (lambda: objective(prediction="epsilons"), ValueError, "epsilon, sample, v_prediction"),
    "unknown weighting": (lambda: objective(weighting="minsnr"), ValueError, "min_snr"),
    "weighting a class": (lambda: objective(weighting=fastdiff.MinSNR), TypeError, r"MinSNR\(5.0\)"),
    "weighting a number": (lambda: objective(weighting=5.0), TypeError, "callable"),
    "weighting NaN": (
        lambda: objective(weighting=lambda levels: levels.alpha * float("nan")), ValueError, "NaN at t = 0"),
    "weighting of a wrong shape": (lambda: objective(weighting=lambda levels: 1.0), ValueError, "one weight a row"),
    "unknown loss": (lambda: objective(loss="l3"), ValueError, "mse, l1"),
    "loss a function": (lambda: objective(loss=torch.nn.functional.mse_loss), TypeError, "Huber"),
    "unknown timesteps": (lambda: objective(timesteps="normal"), ValueError, "logit_normal"),
    "process a name": (lambda: objective("ddpm"), TypeError, r"VariancePreserving\(\)"),
    "negative offset": (lambda: objective(noise_offset=-1.0), ValueError, "noise_offset"),
    "uniform times for EDM": (
        lambda: objective(fastdiff.EDM(), "edm", timesteps="uniform"), ValueError, "LogNormal"),
    "shift twice": (
        lambda: objective(fastdiff.RectifiedFlow(3.0), "flow",
                          timesteps=timesteps.Shifted(timesteps.Uniform(), 3.0)),
        ValueError, "twice"),
    "v of a flow": (lambda: objective(FLOW, "v_prediction"), ValueError, "prediction='flow'"),
    "previous sample of a flow": (lambda: objective(FLOW, "previous_sample"), ValueError, "discrete steps"),
    "infinite error scale": (
        lambda: objective(fastdiff.VariancePreserving(zero_terminal_snr=True), error_space="sample"),
        ValueError, "t = 999"),
    "unknown schedule": (lambda: fastdiff.VariancePreserving("sqrt"), ValueError, "scaled_linear"),
    "betas out of range": (lambda: fastdiff.VariancePreserving([0.1, 1.5]), ValueError, "got 1.5"),
    "betas NaN": (lambda: fastdiff.VariancePreserving([0.1, float("nan")]), ValueError, "got nan"),
    "no betas": (lambda: fastdiff.VariancePreserving([]), ValueError, "at least one"),
    "no steps": (lambda: fastdiff.VariancePreserving(steps=0), ValueError, "positive integer"),
    "shift 0": (lambda: fastdiff.RectifiedFlow(shift=0.0), ValueError, "shift"),
    "huber 0": (lambda: losses.Huber(0.0), ValueError, r"L1\(\)"),
    "huber infinite": (lambda: losses.Huber(float("inf")), ValueError, r"delta must be .*finite; got inf.*MSE\(\)"),
    "smooth l1 infinite": (lambda: losses.SmoothL1(float("inf")), ValueError, "beta must be .*finite"),
    "pseudo-huber infinite": (lambda: losses.PseudoHuber(float("inf")), ValueError, "c must be .*finite"),
    "pseudo-huber's scale infinite": (
        lambda: losses.PseudoHuber(scale=float("inf")), ValueError, "scale must be .*finite"),
    "strength of 2000 bits": (lambda: losses.Combined(mse=1 << 1999), ValueError, "2000 bits"),
    "gamma 0": (lambda: weighting.MinSNR(0.0), ValueError, "gamma"),
    "unknown sampler": (lambda: sample(sampler="eular"), ValueError, "ddpm, ddim, euler"),
    "sampler a class": (lambda: sample(sampler=samplers.DDPM), TypeError, "sampler"),
    "too many steps": (lambda: sample(steps=1001), ValueError, r"\[1, 1000\]"),
    "no sampling steps": (lambda: sample(steps=0), ValueError, "steps"),
    "timesteps that rise": (lambda: sample(sampler=samplers.DDPM(timesteps=[1, 5]), steps=None), ValueError, "fall"),
    "sigma_min above sigma_max": (
        lambda: samplers.Euler(sigmas="karras", sigma_min=2.0, sigma_max=1.0), ValueError, "sigma_min < sigma_max"),
    "sigma_min of 0": (lambda: samplers.Euler(sigmas="karras", sigma_min=0.0), ValueError, "0 < sigma_min"),
    "a mask of a step elsewhere": (
        lambda: ops.step(X, X, torch.ones(len(ops.COLUMNS)), mask=torch.ones(2, 1, 4, device="meta"), known=X),
        ValueError, "mask is on meta"),
    "offset noise of a step without channels": (
        lambda: ops.step(X[0], X[0], torch.ones(len(ops.COLUMNS)), noise=ops.Philox(1, offset=0.1)),
        ValueError, "channels"),
    "a start of images": (
        lambda: sample(x=torch.zeros(2, 3, dtype=torch.uint8)), TypeError,
        r"x must be floating point .*; got torch.uint8. Scale images .* x.float\(\) / 127.5 - 1"),
    "a start of integers": (
        lambda: sample(x=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "x must be floating point .*torch.int64"),
    "known data of images": (
        lambda: sample(mask=torch.ones(2, 3), known=torch.zeros(2, 3, dtype=torch.uint8)), TypeError,
        r"known must be floating point .*; got torch.uint8. Scale images .* known.float\(\) / 127.5 - 1"),
    "known data of complex numbers": (
        lambda: sample(mask=torch.ones(2, 3), known=torch.zeros(2, 3) * 1j), TypeError, "known must be floating point"),
    "integers as the noise of churn": (
        lambda: sample(lambda x, t: x, sampler=samplers.Euler(s_churn=1.0, timesteps=[500]), steps=None, x=X[:, :, 0],
                       noise=lambda k, shape: torch.ones(shape, dtype=torch.int64)),
        TypeError, "noise must be floating point .*torch.int64"),
    "noise of churn of another shape": (
        lambda: sample(lambda x, t: x, sampler=samplers.Euler(s_churn=1.0, timesteps=[500]), steps=None, x=X[:, :, 0],
                       noise=lambda k, shape: torch.ones(shape[1:])),
        ValueError, r"noise has shape \(3,\), but x \(2, 3\)"),
    "integers of a network under a rule": (
        lambda: sample(lambda x, t, c: x.long(), cond=T, uncond=T, guidance=fastdiff.guidance.Plain(2.0)), TypeError,
        "model_output must be floating point .*torch.int64"),
    "seed and generator of samples": (lambda: sample(seed=1, generator=torch.Generator()), ValueError, "not both"),
    "a generator too many": (
        lambda: sample(generator=[torch.Generator() for _ in range(3)]), ValueError, "3 generators for 2 samples"),
    "cond a number": (lambda: sample(cond=1.0, uncond=0.0, guidance=2.0), TypeError, "cond must be a tensor.*float"),
    "cond_fn of another shape": (
        lambda: sample(lambda x, t: x, cond_fn=lambda x, t: x[:, :2]), ValueError, "cond_fn must return"),
    "model of another shape, rescaled": (
        lambda: sample(lambda x, t, c: x[:, :2], cond=T, uncond=T, guidance=2.0, guidance_rescale=0.7),
        ValueError, "returned shape"),
    "eta above 1": (lambda: samplers.DDIM(eta=1.5), ValueError, r"eta must lie in \[0, 1\]; got 1.5"),
    "eta below 0": (lambda: samplers.DDIM(eta=-0.1), ValueError, "eta"),
    "unknown previous": (lambda: samplers.DDIM(previous="last"), ValueError, "'next' or 'stride'; got 'last'"),
    "unknown variance": (lambda: samplers.DDPM("fixed"), ValueError, "variance must be one of .*got 'fixed'"),
    "rho 0": (lambda: samplers.Euler(sigmas="karras", rho=0.0), ValueError, "rho must be positive; got 0.0"),
    "no steps of a schedule": (lambda: sample(sampler="euler", steps=0), ValueError, "at least 1; got 0"),
    "steps beside timesteps": (
        lambda: sample(sampler=samplers.DDPM(timesteps=[5, 1]), steps=3), ValueError, "2 timesteps.*steps=3"),
    "steps beside LCM's timesteps": (
        lambda: sample(sampler=samplers.LCM(timesteps=[5, 1]), steps=3), ValueError, "2 timesteps.*steps=3"),
    "LCM of more steps than there are": (
        lambda: sample(sampler=samplers.LCM(original_steps=2000)), ValueError, "2000 exceeds the 1000"),
    "a timestep for each sigma": (
        lambda: sample(sampler=samplers.Euler(sigmas=[2.0, 1.0], timesteps=[500]), steps=None),
        ValueError, "2 sigmas and 1 timesteps"),
    "alpha 0 at Heun's first level": (
        lambda: sample(process=FLOW, prediction="flow", sampler=samplers.Heun(timesteps=[1.0, 0.5]), steps=None),
        ValueError, "alpha is 0 at the first level"),
    "no grid of a process of one's own": (
        lambda: sample(process=Unknown(), sampler="ddim"), ValueError, "no time grid is known"),
    "a sigma of a process of one's own": (lambda: Unknown().levels_at([1.0]), ValueError, "knows no t for a sigma"),
    "an infinite sigma": (lambda: VP.levels_at([float("inf")]), ValueError, "finite and at least 0; got inf"),
    "beta_start beside betas": (
        lambda: fastdiff.VariancePreserving([0.1, 0.2], beta_start=0.1), ValueError, "go with a named schedule"),
    "beta_end of the cosine": (
        lambda: fastdiff.VariancePreserving("cosine", beta_end=0.1), ValueError, "takes no beta_start"),
    "zero terminal SNR of one step": (
        lambda: fastdiff.VariancePreserving(steps=1, zero_terminal_snr=True), ValueError, "at least 2 steps"),
    "x0 where nothing says": (
        lambda: objective(fastdiff.VariancePreserving(zero_terminal_snr=True)).predict_x0(
            X, objective(fastdiff.VariancePreserving(zero_terminal_snr=True)).noise(X, torch.tensor([5, 999]))),
        ValueError, "does not determine 'sample' at t = 999"),
    "a fraction of EDM's t": (lambda: fastdiff.EDM().fraction(torch.ones(2)), ValueError, "no fraction"),
    "form of the pseudo-Huber": (lambda: losses.PseudoHuber(form="normal"), ValueError, "form must be.*'normal'"),
    "schedule of the pseudo-Huber": (
        lambda: losses.PseudoHuber(schedule="linear"), ValueError, "schedule must be.*'linear'"),
    "stratified within a shift": (
        lambda: objective(FLOW, "flow", timesteps=timesteps.Shifted(timesteps.Stratified(), 2.0)).noise(X),
        ValueError, "Stratified outside"),
    "P2's k below 0": (lambda: weighting.P2(k=-1.0), ValueError, "k must be at least 0"),
    "weights of two dimensions": (
        lambda: weighting.PerTimestep(torch.ones(2, 3)), ValueError, r"1-D table.*\(2, 3\)"),
    "weights of too few timesteps": (
        lambda: objective(weighting=weighting.PerTimestep(torch.ones(5))), ValueError, "5 weights.*1000 steps"),
    "weights of timesteps for a flow": (
        lambda: objective(FLOW, "flow", weighting=weighting.PerTimestep(torch.ones(5))).noise(X, torch.rand(2)).weight,
        ValueError, "PerTimestep needs a discrete process"),
    "a bell for EDM": (
        lambda: objective(fastdiff.EDM(), "edm", weighting=weighting.Bell()),
        ValueError, "Bell needs a time or a sigma"),
    "a bell by something else": (
        lambda: weighting.Bell(by="t"), ValueError, "by must be 'fraction' or 'sigma'; got 't'"),
    "sigma for c at every time": (
        lambda: losses.PseudoHuber(schedule="snr", by="sigma"), ValueError, "goes with schedule='exponential'"),
    "c by the sigma of EDM": (
        lambda: objective(fastdiff.EDM(), "edm", loss=losses.PseudoHuber(schedule="exponential", by="sigma")),
        ValueError, r"by='sigma' needs a process whose sigma lies in \[0, 1\]"),
    "uniform sigmas of a discrete process": (
        lambda: objective(timesteps=timesteps.Uniform(by="sigma")), ValueError, "draws the sigma of a RectifiedFlow"),
    "sigma and t": (
        lambda: objective(FLOW, "flow").noise(X, torch.rand(2), sigma=0.5), ValueError, "t and sigma both say"),
    "sigma of a discrete process": (lambda: objective().noise(X, sigma=0.5), ValueError, "no other sigma: pass t"),
    "sigma beyond 1": (
        lambda: objective(FLOW, "flow").noise(X, sigma=[0.5, 1.5]), ValueError, r"has no noise level sigma = 1\.5"),
    "a sigma that is NaN": (
        lambda: objective(FLOW, "flow").noise(X, sigma=float("nan")), ValueError, "has no noise level sigma = nan"),
    "sigma below what VESDE has": (
        lambda: objective(fastdiff.VESDE(), "score").noise(X, sigma=0.001),
        ValueError, r"no noise level sigma = 0\.001"),
    "t a frame or a channel, on every path": (
        lambda: objective().noise(torch.zeros(2, 3, 3, 4, 4), torch.zeros(2, 3).long(), seed=1, with_target=True),
        ValueError, r"t has shape \(2, 3\), which could be one a frame or one a channel"),
    "t a frame or a channel": (
        lambda: objective(FLOW, "flow").noise(torch.zeros(2, 3, 3, 4, 4), torch.rand(2, 3)), ValueError,
        r"one a frame or one a channel.*\(2, 1, 3, 1, 1\).*\(2, 3, 1, 1, 1\)"),
    "a mask of frames or of channels": (
        lambda: objective().loss(V := torch.zeros(2, 3, 3, 4, 4), objective().noise(V), torch.ones(2, 3)), ValueError,
        r"mask has shape \(2, 3\), which could be one a frame"),
    "offsets along the batch": (lambda: objective(noise_offset_dim=0), ValueError, "noise_offset_dim must be"),
    "offsets along what is not there": (
        lambda: objective(noise_offset=0.1, noise_offset_dim=4).noise(X), ValueError, "noise_offset_dim=4 is no"),
    "likelihood of no SDE": (
        lambda: objective(weighting=weighting.Likelihood()), ValueError, "VPSDE, VESDE, SubVPSDE"),
    "a scalar prediction": (
        lambda: ops.loss(torch.tensor(1.0), None, torch.tensor(1.0), q=1.0), ValueError, "batch dimension"),
    "perturbation of another shape": (
        lambda: ops.noise(X, 1.0, 1.0, X, perturbation=0.1, perturbation_noise=X[:, :2]),
        ValueError, "perturbation_noise has shape"),
    "a run of integers": (
        lambda: ops.trajectory(torch.ones(2, 3).long(), torch.ones(1, len(ops.COLUMNS), dtype=torch.float64)),
        TypeError, "x must be floating"),
    "known noise of another shape": (
        lambda: ops.step(X, X, torch.ones(len(ops.COLUMNS)), mask=X > 0, known=X, known_noise=X[:, :2]),
        ValueError, "known_noise has shape"),
    "guidance without uncond": (lambda: sample(guidance=2.0), ValueError, "needs uncond"),
    "uncond without cond": (lambda: sample(uncond=T), ValueError, "without cond"),
    "x of another shape": (lambda: sample(x=X), ValueError, "x has shape"),
    "dtype of integers": (lambda: sample(dtype=torch.int64), TypeError, "dtype"),
    "stride of a flow": (
        lambda: sample(process=FLOW, prediction="flow", sampler=samplers.DDIM(previous="stride")),
        ValueError, "discrete"),
    "model of another shape": (lambda: sample(lambda x, t: x[:, :2]), ValueError, r"returned shape \(2, 2\)"),
    "learned variance without channels": (
        lambda: sample(lambda x, t: x, sampler=samplers.DDPM("learned")), ValueError, "6 channels"),
    "rows that fit nothing": (lambda: ops.convert(X, X, torch.ones(5), 1.0), ValueError, r"k_x has shape \(5,\)"),
    "row of a wrong length": (lambda: ops.step(X, X, torch.ones(3)), ValueError, "row must be"),
    "clip 0": (lambda: ops.step(X, X, torch.ones(len(ops.COLUMNS)), clip=0.0), ValueError, "clip"),
    "five history tensors": (
        lambda: ops.step(X, X, torch.ones(len(ops.COLUMNS)), history=[X] * 5), ValueError, "at most 4"),
    "data elsewhere": (
        lambda: ops.loss(X, X.to("meta"), X, p=1.0, q=1.0), ValueError, r"x0 is on meta.*move one with .to\(device\)|"
        r"prediction is on cpu.*move one with .to\(device\)"),
    "rescale below 0": (
        lambda: sample(cond=T, uncond=T, guidance=2.0, guidance_rescale=-0.5), ValueError,
        r"guidance_rescale must lie in \[0, 1\]; got -0.5"),
    "a timestep twice": (
        lambda: sample(sampler=samplers.DDPM(timesteps=[5, 5]), steps=None), ValueError, "integers that fall"),
    "unknown error function": (lambda: ops.loss(X, None, X, q=1.0, function="mae"), ValueError, "mse, l1"),
    "huber without c": (lambda: ops.loss(X, None, X, q=1.0, function="smooth_l1"), ValueError, "needs its constant"),
    "seed of two numbers": (
        lambda: objective().noise(X, seed=torch.tensor([1, 2])), TypeError,
        r"one int64; got a tensor \(2,\) of torch.int64"),
    "seed of 32 bits": (
        lambda: objective().noise(X, seed=torch.tensor(1, dtype=torch.int32)), TypeError, "one int64; got .*int32"),
    "unknown rng": (
        lambda: objective().noise(X, T, rng="quick"), ValueError,
        "rng must be 'exact' or 'fast'; got 'quick'"),
    "perturbation without noise": (
        lambda: ops.noise(X, 1.0, 1.0, X, perturbation=0.1), ValueError, "perturbation=0.1 needs perturbation_noise"),
    "q_sample of a name": (lambda: fastdiff.q_sample(X, T, "ddpm"), TypeError, r"VariancePreserving\(\); got 'ddpm'"),
    "prediction scalar": (
        lambda: ops.loss(torch.tensor(1.0), None, torch.tensor(1.0), q=1.0), ValueError,
        "batch dimension; got a scalar"),
    "a coefficient that is none": (lambda: objective().noise(X, T, X).rows.gamma, AttributeError, "gamma"),
    "form of a loss": (
        lambda: losses.PseudoHuber(form="sqrt"), ValueError, "one of plain, scaled, normalized; got 'sqrt'"),
    "schedule of a loss": (
        lambda: losses.PseudoHuber(schedule="cosine"), ValueError, "one of constant, exponential, snr; got 'cosine'"),
    "timesteps a number": (
        lambda: objective(timesteps=5), TypeError, "object or a function from uniforms to fractions; got 5"),
    "timesteps a class": (
        lambda: objective(timesteps=fastdiff.timesteps.Mode), TypeError, "a function from uniforms to fractions; got"),
    "stratified inside": (
        lambda: objective(timesteps=fastdiff.timesteps.Shifted(fastdiff.timesteps.Stratified(), 3.0)),
        ValueError, r"Stratified\(Shifted\(inner, shift\)\)"),
    "ends of a cosine": (
        lambda: fastdiff.VariancePreserving("cosine", beta_end=0.02), ValueError, "got None and 0.02: leave them out"),
    "ends of betas": (
        lambda: fastdiff.VariancePreserving([0.1, 0.2], beta_start=0.1), ValueError,
        "got 0.1 and None: leave them out"),
    "zero SNR of one step": (
        lambda: fastdiff.VariancePreserving([0.1], zero_terminal_snr=True), ValueError, "at least 2 steps; got 1"),
    "table of two dimensions": (
        lambda: tables.TabulatedVP([[1.0]], [0.0]), ValueError, r"1-D with at least one value; got shape \(1, 1\)"),
    "tables of two lengths": (
        lambda: tables.TabulatedVP([1.0, 0.5], [0.1]), ValueError, "must be equally long; got 2 and 1"),
    "table that rises": (
        lambda: tables.TabulatedVP([0.5, 0.6], [0.1, 0.1]), ValueError, r"alpha must not rise; got alpha \[0.5, 0.6\]"),
    "table beyond 1": (lambda: tables.TabulatedVP([1.5], [0.1]), ValueError, r"lie in \[0, 1\].*got alpha \[1.5\]"),
    "sigmas without times": (
        lambda: tables.TabulatedFlow([1.0, 0.5], [1.0]), ValueError, "2 sigmas, but 1 times: they must be as many"),
    "uniform_prob of 150%": (
        lambda: guided_diffusion.LossSecondMomentResampler(5, uniform_prob=1.5), ValueError,
        r"lie in \[0, 1\]; got 1.5"),
    "no losses to remember": (
        lambda: guided_diffusion.LossSecondMomentResampler(5, history_per_term=0), ValueError,
        "positive integers; got 5, 0"),
    "unknown spacing": (
        lambda: sample(sampler=samplers.DDPM(spacing="karras")), ValueError,
        "trailing, leading, linspace; got 'karras'"),
    "steps and timesteps": (
        lambda: sample(sampler=samplers.DDIM(timesteps=[5, 1])), ValueError, "2 timesteps .* steps=5: leave steps out"),
    "steps and timesteps of LCM": (
        lambda: sample(sampler=samplers.LCM(timesteps=[5, 1])), ValueError, "2 timesteps .* steps=5: leave steps out"),
    "times of a flow that rise": (
        lambda: sample(process=FLOW, sampler=samplers.DDIM(timesteps=[0.1, 0.5]), steps=None, prediction="flow"),
        ValueError, "the noisiest first; got 0.1, 0.5"),
    "no times of a flow": (
        lambda: sample(process=FLOW, sampler=samplers.DDIM(timesteps=[]), steps=None, prediction="flow"),
        ValueError, "the noisiest first; got none"),
    "no timesteps": (lambda: sample(sampler=samplers.DDPM(timesteps=[]), steps=None), ValueError, "got none"),
    "no steps of a flow": (
        lambda: sample(process=FLOW, sampler="ddim", steps=0, prediction="flow"), ValueError, "at least 1; got 0"),
    "no steps of Euler": (lambda: sample(sampler="euler", steps=0), ValueError, "steps must be at least 1; got 0"),
    "grid of an unknown process": (
        lambda: sample(process=Unknown(), sampler="ddim"), ValueError,
        "no time grid .*: give the sampler its timesteps"),
    "sigmas of an unknown process": (
        lambda: sample(process=Unknown(), sampler=samplers.Euler(sigmas=[2.0, 1.0]), steps=None),
        ValueError, "knows no t for a sigma: give the times themselves"),
    "sigmas and times of two lengths": (
        lambda: sample(sampler=samplers.Euler(sigmas=[3.0, 1.0], timesteps=[5]), steps=None),
        ValueError, "2 sigmas and 1 timesteps: one each is needed|leave steps out"),
    "distillation longer than the process": (
        lambda: sample(process=fastdiff.VariancePreserving(steps=40), sampler="lcm"), ValueError, "50 exceeds the 40"),
    "sampling with a seed and a generator": (
        lambda: sample(seed=1, generator=torch.Generator()), ValueError, "a seed or a generator, not both"),
    "two generators for three samples": (
        lambda: sample(shape=(3, 3), generator=[torch.Generator()] * 2), ValueError,
        "2 generators for 3 samples: one each"),
    "condition of a kind": (
        lambda: sample(cond="cat", uncond="", guidance=2.0), TypeError, "tensor, or a tuple, list or dict .*; got str"),
    "a model of another shape, watched": (
        lambda: sample(lambda x, t: x[:, :2], cond_fn=lambda x, t: x), ValueError,
        r"\(2, 2\) for an input of \(2, 3\)"),
    "a gradient of another shape": (
        lambda: sample(lambda x, t: x, cond_fn=lambda x, t: x[:1]), ValueError, r"shaped as x, \(2, 3\); got \(1, 3\)"),
    "a graph and a rescale": (
        lambda: captured(rescale=0.5), ValueError,
        "excludes guidance_rescale, .* use compile=True"),
    "a graph and a rule": (
        lambda: captured(guidance=fastdiff.guidance.NormPreserving(2.0)), ValueError,
        "excludes guidance_rescale, rules of guidance, .* use compile=True"),
    "a graph and an interval": (
        lambda: captured(interval=(0, 500)), ValueError,
        "excludes a guidance_interval.* leave one out"),
    "a graph and a learned variance": (
        lambda: captured(samplers.DDPM("learned")), ValueError, "excludes a learned variance: leave it out"),
    "known noise alone": (lambda: inpainted(known_noise=X), ValueError, "without mask and known: it goes with both"),
    "known alone": (lambda: inpainted(known=X), ValueError, "both mask and known; got known alone"),
    "mask of inpainting elsewhere": (
        lambda: inpainted(known=X, mask=torch.ones(2, 3, 4, device="meta")), ValueError,
        r"mask is on meta.*\.to\(device\)"),
    "fractions that nobody wrote": (
        lambda: objective(timesteps=timesteps.Timesteps()).noise(X), NotImplementedError, ""),
    "levels that nobody wrote": (lambda: fastdiff.Process().levels(0.5), NotImplementedError, ""),
    "weights that nobody wrote": (
        lambda: objective(weighting=weighting.Weighting()).noise(X), NotImplementedError, ""),
    "a plan that nobody wrote": (lambda: sample(sampler=samplers.Sampler()), NotImplementedError, ""),
    "unknown backend": (lambda: fastdiff.use_backend("cpu"), ValueError, "native, cuda"),
    "backend that is not there": (lambda: fastdiff.use_backend("cuda"), RuntimeError, "not available: "),
}  # fmt: skip


ROW = torch.ones(len(ops.COLUMNS))
STEPS = ops.PreparedSteps(ROW.double()[None])


def twice(x):
    """Moments whose halves are x each."""
    return torch.cat([x, x], 1) if isinstance(x, torch.Tensor) else x


# The operations, each with the tensors that go with each other, by argument, and what a message calls them.
OPERATIONS = {
    "noise": (
        lambda **given: ops.noise(**({"x0": X, "alpha": 1.0, "sigma": 1.0, "n": X, "perturbation": 0.1} | given)),
        {"x0": "x0", "n": "noise", "perturbation_noise": "perturbation_noise"}),
    "loss": (
        lambda **given: ops.loss(**({"p": 1.0, "q": 1.0} | given)),
        {"prediction": "prediction", "x0": "x0", "n": "noise"}),
    "gaussian_kl": (
        lambda **given: ops.gaussian_kl(**given, p=1.0, q=1.0, scale=1.0, l_0=0.0, l_q=0.0),
        {"output": "output", "x0": "x0", "n": "noise"}),
    "posterior": (
        lambda moments, **given: ops.posterior(twice(moments), alpha=1.0, sigma=1.0, **given),
        {"moments": "moments", "xi": "xi", "n": "noise"}),
    "kl_normal": (lambda moments: ops.kl_normal(twice(moments)), {"moments": "moments"}),
    "convert": (lambda **given: ops.convert(**given, k_x=1.0, k_m=1.0), {"x_t": "x_t", "m": "prediction"}),
    "row moments": (ops.row_moments, {"a": "a", "b": "b"}),
    "step": (
        lambda **given: ops.step(row=ROW, mask=X > 0, **given),
        {"x": "x", "m": "model_output", "uncond": "uncond", "log_variance": "log_variance", "noise": "noise",
         "history": r"history\[0\]", "known": "known", "known_noise": "known_noise"}),
    "a plain step": (
        lambda **given: ops.step(row=ROW, return_entry=False, **given),
        {"x": "x", "m": "model_output", "noise": "noise"}),
    "prepared step": (
        lambda **given: STEPS(0, **given),
        {"x": "x", "m": "model_output", "noise": "noise", "log_variance": "log_variance", "history": r"history\[0\]"}),
    "prepared noising": (
        lambda **given: ops.PreparedNoise(torch.ones(1, 2, dtype=torch.float64))(0, **given),
        {"x0": "x0", "n": "noise"}),
    "trajectory": (
        lambda **given: ops.trajectory(table=STEPS, mask=X > 0, **given),
        {"x": "x", "known": "known", "known_noise": "known_noise"}),
}  # fmt: skip
WRONG = {
    "integers": (lambda x: x.long(), TypeError, "{} must be floating point .*; got torch.int64"),
    "no tensor": (lambda x: "x", TypeError, "{} must be a tensor; got str"),
    "another shape": (lambda x: x[:, :2], ValueError, r"{0} has shape \(2, 2, 4\), but|, but {0} \(2, 2, 4\)"),
    "another device": (
        lambda x: x.to("meta"),
        ValueError,
        "{0} is on meta, but .* move one with|, but {0} on meta: move one with",
    ),
}


def given_to(operation, argument=None, change=None):
    call, tensors = OPERATIONS[operation]
    given = {name: X if name != argument else change(X) for name in tensors}
    if "history" in given:
        given["history"] = [given["history"]]
    return call(**given)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_tensor_of_an_operation_is_looked_at(operation, wrong):
    given_to(operation)
    change, error, words = WRONG[wrong]
    first, *others = OPERATIONS[operation][1]
    # Of a shape or a device it is the others that are held to the first.
    for argument in (first, *others) if error is TypeError else others:
        with pytest.raises(error, match=words.format(OPERATIONS[operation][1][argument])):
            given_to(operation, argument, change)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("operation", ["step", "a plain step", "prepared step", "trajectory"])
def test_a_bound_is_positive(operation, clip):
    call, tensors = OPERATIONS[operation]
    with pytest.raises(ValueError, match="clip must be positive, or None for no clamping; got"):
        call(clip=clip, **{name: [X] if name == "history" else X for name in tensors})


@pytest.mark.parametrize("make", [ops.PreparedSteps, ops.PreparedNoise, lambda table: ops.trajectory(X, table)])
def test_what_is_no_table(make):
    columns = 2 if make is ops.PreparedNoise else len(ops.COLUMNS)
    make(torch.ones(3, columns))
    with pytest.raises(TypeError, match="table must be floating point .*; got torch.int64"):
        make(torch.ones(3, columns).long())
    with pytest.raises(TypeError, match="table must be a tensor; got list"):
        make([[1.0] * columns])
    for table in (torch.ones(columns), torch.ones(3, columns + 1), torch.ones(3, columns, device="meta")):
        with pytest.raises(ValueError, match=rf"table must be \[rows, {columns}\] on the CPU; got"):
            make(table)


POSITIVE = {
    "std of a logit-normal": (timesteps.LogitNormal, "std", True),
    "std of a log-normal": (timesteps.LogNormal, "std", True),
    "shift": (lambda shift: timesteps.Shifted(timesteps.Uniform(), shift), "shift", True),
    "gamma of min-SNR": (weighting.MinSNR, "gamma", False),
    "gamma of soft min-SNR": (weighting.SoftMinSNR, "gamma", False),
    "beta": (losses.SmoothL1, "beta", False),
    "delta": (losses.Huber, "delta", False),
    "c": (losses.PseudoHuber, "c", False),
    "rho": (lambda rho: samplers.Euler(sigmas="karras", rho=rho), "rho", False),
}


@pytest.mark.parametrize("setting", POSITIVE)
def test_a_setting_is_positive(setting):
    """And finite, where infinity would mean nothing."""
    make, name, finite = POSITIVE[setting]
    make(**{name: 1e-3})
    for value in (0.0, -1.0, float("nan"), *([float("inf")] if finite else [])):
        with pytest.raises(ValueError, match=f"{name} must be (a )?positive.*; got {value!r}"):
            make(**{name: value})


SCHEDULED = [cls for cls in vars(samplers).values() if isinstance(cls, type) and issubclass(cls, Scheduled)]


@pytest.mark.parametrize("sampler", SCHEDULED)
def test_every_sampler_with_sigmas_looks_at_their_options(sampler):
    assert len(SCHEDULED) > 8
    for options in ({"rho": 0.0}, {"sigma_min": 2.0, "sigma_max": 1.0}, {"sigma_min": -1.0}):
        with pytest.raises(ValueError, match="rho|sigma_min"):
            sampler(sigmas="karras", **options)


def test_a_schedule_whose_noise_rises_is_shown_from_its_end():
    sigmas = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 4.5]
    with pytest.raises(ValueError, match=r"sigma / alpha ends with 7, 6, 5, 4, 4.5, 0\."):
        sample(process=fastdiff.EDM(), prediction="edm", sampler=samplers.Euler(sigmas=sigmas), steps=None)


@pytest.mark.parametrize("case", CASES)
def test_clear_error(case):
    call, error, words = CASES[case]
    with pytest.raises(error, match=words):
        call()


def test_settings_can_be_shared_and_are_keys():
    """Processes keep tables by what they were made with: a setting that is changed later would not reach them."""
    modules = [weighting, losses, timesteps, samplers]
    found = {c for module in modules for c in vars(module).values() if dataclasses.is_dataclass(c)}
    assert len(found) > 30
    for cls in (*found, fastdiff.process.Levels, Path):
        with pytest.raises(dataclasses.FrozenInstanceError):
            object.__new__(cls).anything = 1
    tables = [weighting.PerTimestep(torch.ones(3)) for _ in range(2)]
    assert tables[0] != tables[1] and len({*tables, tables[0]}) == 2, "a table is equal to itself alone"


def test_a_captured_model_of_another_shape(monkeypatch):
    """The first run of what is to be captured, here without a graph, says it."""
    monkeypatch.setattr("fastdiff.sampling.checking.check_capture", lambda *_: None)
    monkeypatch.setattr(cuda_graph, "record", lambda body, begin, device: body())
    with pytest.raises(ValueError, match=r"returned shape \(2, 2\) for an input of \(2, 3\)"):
        sample(lambda x, t: x[:, :2], cuda_graph=True)


def test_use_backend_is_undone():
    with fastdiff.use_backend("reference"):
        with pytest.raises(RuntimeError, match="not available: "):
            fastdiff.use_backend("cuda")
        assert fastdiff.backends.choose("cpu") == "reference"
    fastdiff.use_backend("reference")
    assert fastdiff.backends.registry._forced == "reference"
    fastdiff.use_backend(None)
    assert fastdiff.backends.registry._forced is None
    assert {backend.name for backend in fastdiff.backends.status()} == {"reference", "native", "triton", "cuda"}


def test_importing_takes_torch_alone():
    """No extra is imported, and none is needed, by `import fastdiff`."""
    extras = ["numpy", "sklearn", "matplotlib", "PIL", "tqdm", "diffusers", "scipy"]
    code = (
        "import sys, torch; before = set(sys.modules); import fastdiff; "
        f"print([m for m in {extras} if m in set(sys.modules) - before])"
    )
    root = os.path.dirname(os.path.dirname(fastdiff.__file__))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}
    )
    assert done.stdout.strip() == "[]", done.stderr
