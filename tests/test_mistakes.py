"""The obvious mistakes: each is taken for what it can only mean, or answered by a line that says what to write."""

import dataclasses
import inspect
import math
import re
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import prediction as kinds
from fastdiff import samplers
from fastdiff.showing import printable
from fastdiff.tabulated import TabulatedEDM, TabulatedFlow

VP = fastdiff.VariancePreserving()
X0 = torch.randn(4, 3, 8, 8)
EPSILON = fastdiff.Objective(VP, "epsilon")
V = fastdiff.Objective(VP, "v_prediction")


def never(*_):
    raise AssertionError("the model was called")


def refused(call, *words):
    """The message of the error that ``call`` raises: one line, with these words in it."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# ------------------------------------------------------------------------------------------------ sampling as trained


class Trained:
    """The exact network for data N(0.5, 0.2^2), which knows only what training gives it: it finds the noise level from
    the ``model_time`` of noised batches at many times, and undoes the scale that ``model_input`` had there."""

    def __init__(self, objective):
        process = objective.process
        if process.discrete:
            t = torch.arange(process.steps)
        elif math.isinf(process.t_max):
            t = torch.logspace(-5, 3, 100_001, dtype=torch.float64)
        else:
            t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
            t[0] = 1e-9  # not clean data, which a score does not have
        noised = objective.noise(torch.ones(len(t), 1, dtype=torch.float64), t, torch.ones(len(t), 1).double())
        self.objective, self.times = objective, noised.model_time
        columns = noised.alpha, noised.sigma, (noised.model_input / noised.x_t)[:, 0], t.double()
        order = self.times.double().argsort()
        self.sorted, self.columns = self.times.double()[order], [column[order] for column in columns]

    def __call__(self, x, time):
        assert time.is_floating_point() == self.times.is_floating_point()
        assert self.sorted[0] <= time[0] * (1 + 1e-6) and time[0] <= self.sorted[-1] * (1 + 1e-6) + 1e-6
        right = torch.searchsorted(self.sorted, time.double().contiguous()).clamp(1, len(self.sorted) - 1)
        before, after = self.sorted[right - 1], self.sorted[right]
        part = (time - before) / (after - before)
        alpha, sigma, scale, t = (torch.lerp(c[right - 1], c[right], part)[:, None] for c in self.columns)
        x = x / scale
        variance = (0.2 * alpha) ** 2 + sigma**2
        x0 = 0.5 + 0.04 * alpha / variance * (x - alpha * 0.5)
        process = self.objective.process
        levels = fastdiff.process.Levels(t.round().long() if process.discrete else t, alpha, sigma, process)
        k_x, k_m = kinds.conversion("sample", self.objective.prediction, levels)
        return (k_x * x + k_m * x0).to(x.dtype)


AS_TRAINED = [
    (fastdiff.VariancePreserving(), "epsilon"),
    (fastdiff.VariancePreserving("cosine"), "v_prediction"),
    (fastdiff.VariancePreserving(zero_terminal_snr=True), "v_prediction"),
    (fastdiff.VariancePreserving(), "edm"),
    (fastdiff.RectifiedFlow(), "flow"),
    (fastdiff.RectifiedFlow(shift=3.0), "reversed_flow"),
    (fastdiff.RectifiedFlow(sigma_min=0.01), "flow"),
    (fastdiff.VPSDE(), "score"),
    (fastdiff.SubVPSDE(), "epsilon"),
    (fastdiff.VESDE(), "epsilon"),
    (fastdiff.VESDE(), "edm"),
    (fastdiff.EDM(), "edm"),
    (fastdiff.EDM(sigma_data=1.0), "edm"),
    (fastdiff.EDM(), "sample"),
    # Tables, as the training scripts' schedulers have them: the noisiest level first, and times of their own.
    (TabulatedFlow(torch.linspace(1, 0.001, 1000), torch.linspace(1000, 1, 1000)), "flow"),
    (TabulatedEDM(torch.logspace(2, -2.5, 1000), torch.linspace(1.2, -1.5, 1000), 0.5), "edm"),
]


@pytest.mark.parametrize(("process", "prediction"), AS_TRAINED, ids=lambda v: v if isinstance(v, str) else repr(v))
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun"])
def test_a_sampler_tells_the_network_what_training_told_it(process, prediction, sampler):
    objective = fastdiff.Objective(process, prediction)
    if sampler == "heun" and isinstance(process, fastdiff.RectifiedFlow):
        sampler = "flow_heun"  # Heun itself needs alpha > 0 at the first level
    elif sampler == "heun" and getattr(process, "zero_terminal_snr", False):
        sampler = samplers.Heun(timesteps=range(998, -1, -5))
    model = Trained(objective)
    x = objective.sample(
        model,
        (1000, 8),
        sampler,
        None if isinstance(sampler, samplers.Heun) else 200,
        seed=1,
        dtype=torch.float64,
        progress=False,
    )
    # 8000 samples: the mean deviates by 0.0022, the deviation by 0.0016; five of these, and 2% for the discretisation.
    assert x.mean().item() == pytest.approx(0.5, abs=0.011)
    assert x.std().item() == pytest.approx(0.2, abs=0.012)


def test_the_prediction_is_the_objectives():
    """A network that predicts v, taken for one that predicts epsilon, gives noise."""
    model = Trained(V)
    how = {"seed": 1, "dtype": torch.float64, "progress": False}
    x = V.sample(model, (500, 8), steps=200, **how)
    assert x.std().item() == pytest.approx(0.2, rel=0.1)
    assert torch.equal(x, fastdiff.sample(model, (500, 8), V, steps=200, **how))
    assert torch.equal(x, fastdiff.sample(model, (500, 8), VP, "ddpm", 200, "v_prediction", **how))
    assert torch.equal(x, fastdiff.sample(model, (500, 8), V, "ddpm", 200, "v_prediction", **how))
    wrong = fastdiff.sample(model, (500, 8), VP, "ddpm", 200, "epsilon", **how)
    assert wrong.std() > 10 * x.std()


def test_objective_sample_passes_every_option_on():
    seen = []
    x, path = EPSILON.sample(
        lambda x, t, c: c + 0 * x, (2, 3), samplers.DDIM(eta=0.5), 4, cond=torch.ones(2, 1), uncond=torch.zeros(2, 1),
        guidance=3.0, seed=5, sample_offset=2, dtype=torch.float64, progress=False, return_trajectory=True,
        callback=lambda k, t, x, x0: seen.append(k),
    )  # fmt: skip
    again = fastdiff.sample(
        lambda x, t: 3.0 + 0 * x, (4, 3), VP, samplers.DDIM(eta=0.5), 4, "epsilon", seed=5, dtype=torch.float64,
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(x, again[2:])
    assert path.shape == (5, 2, 3) and seen == [0, 1, 2, 3]


def test_sample_without_a_prediction():
    call = lambda: fastdiff.sample(never, (2, 3), VP, "ddim", 5)  # noqa: E731
    refused(call, "prediction is missing", "objective.sample(model, shape, ...)", "prediction='epsilon'")


def test_the_network_and_the_shape():
    for sample in (EPSILON.sample, lambda model, shape: fastdiff.sample(model, shape, EPSILON)):
        refused(lambda: sample((2, 3), never), "swapped: the network comes first, then the shape of the samples")  # noqa: B023
        refused(lambda: sample(None, (2, 3)), "model must be the network, called as model(x, t); got None")  # noqa: B023
        for shape in (4, X0, ["2", 3], (2.0, 3), None):
            refused(lambda: sample(never, shape), "shape must be [batch, ...]", "such as (16, 4, 64, 64); got")  # noqa: B023
    x = EPSILON.sample(lambda x, t: x, torch.tensor([2, 3]), "ddim", 2, progress=False)
    assert x.shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("guidance_scale", "write guidance="),
        ("condition", "write cond="),
        ("encoder_hidden_states", "write cond="),
        ("num_inference_steps", "write steps="),
        ("size", "write shape="),
        ("eta", "write sampler=fastdiff.samplers.DDIM(eta=...)"),
        ("scheduler", "write sampler="),
        ("guidence", "write guidance="),
        ("call_back", "write callback="),
        ("foo", "it has model, shape, process, sampler, steps, prediction, cond"),
    ],
)
def test_other_libraries_keywords_of_sample(name, ours):
    for call in (
        lambda: EPSILON.sample(never, (2, 3), **{name: 1}),
        lambda: fastdiff.sample(never, (2, 3), EPSILON, **{name: 1}),
    ):
        refused(call, f"sample() has no {name}=: {ours}")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: fastdiff.Objective(VP, snr_gamma=5.0),
            "Objective() has no snr_gamma=: write weighting=fastdiff.MinSNR(gamma)",
        ),
        (lambda: fastdiff.Objective(VP, prediction_type="epsilon"), "has no prediction_type=: write prediction="),
        (lambda: fastdiff.Objective(VP, loss_type="l1"), "has no loss_type=: write loss="),
        (lambda: fastdiff.Objective(noise_scheduler=3), "write process=, or fastdiff.Objective.from_scheduler("),
        (lambda: fastdiff.Objective(VP, wheighting="snr"), "has no wheighting=: write weighting="),
        (
            lambda: fastdiff.VariancePreserving(num_train_timesteps=100),
            "VariancePreserving() has no num_train_timesteps=: write steps=",
        ),
        (lambda: fastdiff.VariancePreserving(beta_schedule="linear"), "has no beta_schedule=: write betas="),
        (lambda: fastdiff.VariancePreserving(rescale_betas_zero_snr=True), "write zero_terminal_snr="),
    ],
)
def test_other_libraries_keywords(call, words):
    refused(call, words)


def test_keywords_are_still_documented():
    """What answers for unknown keywords leaves signature and docstring as they were."""
    for function in (fastdiff.sample, fastdiff.Objective, fastdiff.VariancePreserving):
        parameters = inspect.signature(function).parameters.values()
        assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
        assert "Args:" in function.__doc__


def test_what_sample_is_given_in_the_wrong_form():
    array = X0.numpy()
    how = {"sampler": "ddim", "steps": 2, "progress": False}
    sample = lambda **given: EPSILON.sample(lambda x, t: x, X0.shape, **how | given)  # noqa: E731
    for name, given in (
        ("x", {"x": array}),
        ("mask", {"mask": array, "known": X0}),
        ("known", {"known": array, "mask": X0}),
    ):
        refused(lambda: sample(**given), f"{name} must be a tensor; got ndarray: write torch.from_numpy({name})")  # noqa: B023
    refused(
        lambda: sample(mask=torch.ones(4, 1, 8, 8).long(), known=X0),
        "mask must be bool or floating point; got torch.int64: write mask.bool()",
    )
    refused(lambda: sample(noise=X0), "noise must be a function (step, shape) -> tensor; got tensor", "passed as x=")
    refused(lambda: sample(cond_fn=lambda x, t: None), "the gradient of cond_fn must be a tensor; got NoneType")
    refused(lambda: fastdiff.sample(never, (2, 3), "ddim", 5), "process must be a fastdiff process", "got 'ddim'")
    both = {"cond": torch.ones(4), "uncond": torch.ones(4), "guidance": 2.0}
    for interval in (0.5, (0.1,), "01", (1, 2, 3)):
        refused(lambda: sample(**both, guidance_interval=interval), "guidance_interval must be (low, high), two times")  # noqa: B023
    refused(lambda: sample(**both, guidance_interval=("0", 1)), "guidance_interval[0] must be a number; got '0'")


def test_sample_with_another_prediction_than_the_objectives():
    call = lambda: fastdiff.sample(never, (2, 3), V, "ddim", 5, "epsilon")  # noqa: E731
    refused(call, "the objective predicts 'v_prediction'", "prediction is 'epsilon'", "leave it out")


# --------------------------------------------------------------------------------------------- the wrong kind of object


class DDIMScheduler:
    """What is looked at of a scheduler of diffusers."""

    config = SimpleNamespace(prediction_type="epsilon")


USES_OF_A_PROCESS = {
    "Objective": lambda process: fastdiff.Objective(process),
    "sample": lambda process: fastdiff.sample(never, (2, 3), process, "ddim", 5, "epsilon"),
    "q_sample": lambda process: fastdiff.q_sample(X0, torch.zeros(4).long(), process),
    "diffusion_loss": lambda process: fastdiff.diffusion_loss(X0, X0, X0, torch.zeros(4).long(), process),
}


@pytest.mark.parametrize("use", USES_OF_A_PROCESS)
def test_what_is_no_process(use):
    call = USES_OF_A_PROCESS[use]
    refused(lambda: call(DDIMScheduler()), "DDIMScheduler of diffusers", "fastdiff.Objective.from_scheduler(scheduler)")
    refused(lambda: call(fastdiff.EDM), "the class EDM", "EDM()")
    refused(lambda: call("linear"), "the name of a beta schedule: write VariancePreserving('linear')")
    refused(lambda: call("Scaled-Linear"), "write VariancePreserving('Scaled-Linear')")
    refused(lambda: call("flow"), "process must be a fastdiff process such as VariancePreserving(); got 'flow'")
    refused(lambda: call(torch.zeros(1000)), "process must be", "VariancePreserving()")
    if use != "sample":
        refused(lambda: call(EPSILON), "an Objective: write objective.process")


def test_a_scheduler_as_the_sampler():
    fuse = "fastdiff.integrations.diffusers.fuse(scheduler)"
    sample = lambda sampler: EPSILON.sample(never, (2, 3), sampler, 5)  # noqa: E731
    refused(lambda: sample(DDIMScheduler()), "DDIMScheduler of diffusers", "sampler='ddim'", "docs/samplers.md", fuse)
    refused(lambda: sample("DPMSolverMultistepScheduler"), "sampler='dpmpp_2m'", fuse)
    refused(lambda: sample("PNDMScheduler"), "PNDMScheduler of diffusers", "use one of ddpm, ddim", fuse)
    refused(lambda: sample(samplers.DDIM), "sampler is the class DDIM: make one, DDIM()")
    refused(lambda: sample(3), "sampler must be a name or an object of fastdiff.samplers; got 3")


@pytest.mark.parametrize("name", samplers._CLASSES.values())
def test_a_scheduler_is_answered_by_a_sampler_that_exists(name):
    assert isinstance(samplers.get(name), samplers.Sampler)


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("eps", "epsilon"), ("pred_noise", "epsilon"), ("v", "v_prediction"), ("pred_v", "v_prediction"),
        ("V-Prediction", "v_prediction"), ("x0", "sample"), ("x_start", "sample"), ("pred_x0", "sample"),
        ("flow_prediction", "flow"),
    ],
)  # fmt: skip
def test_other_libraries_names_of_predictions(given, name):
    assert kinds.get(given) is kinds.get(name)
    assert fastdiff.Objective(fastdiff.VPSDE(), given).prediction.name == name


def test_a_velocity_may_be_either():
    refused(lambda: kinds.get("velocity"), "'flow' for n - x0", "'reversed_flow' for x0 - n")


def test_other_libraries_names_of_beta_schedules():
    ours, theirs = fastdiff.VariancePreserving("cosine"), fastdiff.VariancePreserving("squaredcos_cap_v2")
    assert torch.equal(ours.betas, theirs.betas) and repr(ours) == repr(theirs)
    t = torch.arange(1001, dtype=torch.float64) / 1000
    bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2  # diffusers' betas_for_alpha_bar
    torch.testing.assert_close(theirs.betas, (1 - bar[1:] / bar[:-1]).clamp(max=0.999), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("given", "sampler"),
    [
        ("dpmpp_2m_karras", samplers.DPMSolverPP(sigmas="karras")),
        ("dpmpp_2m_sde_karras", samplers.DPMSolverPP(eta=1.0, sigmas="karras")),
        ("euler_exponential", samplers.Euler(sigmas="exponential")),
        ("UniPC-beta", samplers.UniPC(sigmas="beta")),
        ("euler_a", samplers.EulerAncestral()),
        ("DDIM", samplers.DDIM()),
        ("DPM++ 2M Karras", samplers.DPMSolverPP(sigmas="karras")),
        ("dpm++_2m_sde", samplers.DPMSolverPP(eta=1.0)),
    ],
)
def test_other_libraries_names_of_samplers(given, sampler):
    assert samplers.get(given) == sampler


def test_a_schedule_of_sigmas_for_a_sampler_without_any():
    refused(lambda: samplers.get("ddim_karras"), "'ddim' has no sigmas to schedule")


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda: samplers.get("dpmpp_2n"), "did you mean 'dpmpp_2m'?"),
        (lambda: kinds.get("epsilom"), "did you mean 'epsilon'?"),
        (lambda: samplers.get("dpm++"), "did you mean 'dpmpp_"),
        (lambda: fastdiff.weighting.get("minsnr"), "did you mean 'min_snr'?"),
        (lambda: fastdiff.losses.get("hubber"), "did you mean 'huber'?"),
        (lambda: fastdiff.Objective(VP, timesteps="logitnormal"), "did you mean 'logit_normal'?"),
    ],
)
def test_the_nearest_name(call, near):
    refused(call, near)


def test_names_of_weightings_losses_and_timesteps():
    assert fastdiff.weighting.get("min-snr") == fastdiff.MinSNR()
    assert fastdiff.weighting.get("none") == fastdiff.Uniform()
    assert fastdiff.losses.get("l2") == fastdiff.losses.MSE()
    assert fastdiff.Objective(VP, timesteps="Logit-Normal").timesteps == fastdiff.timesteps.LogitNormal()


# ----------------------------------------------------------------------------------- swapped, wrapped, of another size


FLOW = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
TIMES = {"discrete": (EPSILON, torch.tensor([1, 2, 3, 4])), "continuous": (FLOW, torch.tensor([0.1, 0.2, 0.3, 0.4]))}


@pytest.mark.parametrize("kind", TIMES)
def test_x0_and_t_swapped(kind):
    objective, t = TIMES[kind]
    words = "x0 has shape (4,) and t (4, 3, 8, 8): swapped? The data comes first."
    refused(lambda: objective.noise(t, X0), words)
    refused(lambda: fastdiff.q_sample(t, X0, objective.process), words)
    assert objective.noise(X0, t).t is t


@pytest.mark.parametrize("kind", TIMES)
def test_t_and_noise_swapped(kind):
    objective, t = TIMES[kind]
    process = objective.process
    words = "t has shape (4, 3, 8, 8), and noise (4,): swapped? The order is "
    refused(lambda: objective.noise(X0, X0, t), words + "x0, t, noise")
    refused(lambda: fastdiff.q_sample(X0, X0, process, t), words + "x0, t, noise")
    refused(lambda: fastdiff.diffusion_loss(X0, X0, t, X0, process), words + "model_output, x0, noise, t, process")
    few, words = torch.rand(4), "noise has shape (4,), but x0 (4, 3, 8, 8)"
    for time in (1, t):  # where it belongs
        refused(lambda: objective.noise(X0, time, few), words)  # noqa: B023
        refused(lambda: fastdiff.diffusion_loss(X0, X0, few, time, process), words)  # noqa: B023
    refused(lambda: fastdiff.diffusion_loss(X0, X0, few, None, process), words + ": if it is t, write t=")
    refused(lambda: objective.noise(X0, X0), "t has the shape of x0, (4, 3, 8, 8)", "if it is noise, write noise=")
    refused(lambda: objective.noise(X0, noise=t), "noise has shape (4,), but x0 (4, 3, 8, 8): if it is t, write t=")
    order = "The order of the arguments is "
    refused(lambda: fastdiff.q_sample(X0, t, X0, process), order + "x0, t, process, noise")
    refused(lambda: fastdiff.diffusion_loss(X0, X0, X0, process, t), order + "model_output, x0, noise, t, process")


def test_a_time_for_each_element_is_no_noise():
    t = torch.rand(4, 5)
    assert torch.equal(FLOW.noise(torch.randn(4, 5), t).t, t)


def test_noise_of_integers_is_no_image():
    message = refused(lambda: EPSILON.noise(X0, noise=X0.long()), "noise must be floating point", "got torch.int64")
    assert "127.5" not in message


def test_what_a_terminal_would_obey_is_not_shown():
    assert printable("\x1b[31ma\rb\nc \udcff\U0001f600") == "\ufffd[31ma\ufffdb\nc \ufffd\U0001f600"


def test_a_generator_that_is_a_seed():
    for call in (lambda: V.noise(X0, generator=3), lambda: V.sample(never, (2, 3), generator=3)):
        refused(call, "generator must be a torch.Generator; got 3. A number is passed as seed=")


def test_prediction_and_noised_swapped():
    noised = V.noise(X0)
    for call in (V.loss, V.predict_x0, lambda a, b: V.convert(a, b, "epsilon")):
        refused(lambda: call(noised, X0), "the arguments are swapped: the network's output comes first, then noised")  # noqa: B023
        refused(lambda: call(X0, X0), "noised must be what objective.noise returned", "fastdiff.diffusion_loss(")  # noqa: B023


class Output(dict):
    """As diffusers' networks return it: a dictionary with attributes."""

    def __init__(self, sample):
        super().__init__(sample=sample)
        self.sample = sample


def test_a_loaders_batch_for_the_data():
    refused(lambda: V.noise({"pixel_values": X0, "labels": torch.zeros(4)}), "got dict: its data is x0['pixel_values']")
    refused(lambda: V.noise({"image": X0, "latents": X0}), "pass one of its entries, 'image', 'latents'")
    refused(lambda: V.noise([X0, torch.zeros(4)]), "got list: its first tensor is x0[0]")
    refused(lambda: V.noise(X0.numpy()), "got ndarray: write torch.from_numpy(x0)")
    refused(lambda: V.noise(X0.byte()), "must be floating point", "x0.float() / 127.5 - 1")


def test_a_dictionary_for_lightning():
    training = fastdiff.integrations.lightning.DiffusionTraining()
    training.objective = V
    message = refused(lambda: training.training_step({"images": X0, "labels": X0}, 0), "dict with 'images', 'labels'")
    assert "override unpack(self, batch)" in message and "batch['images']" in message


@pytest.mark.parametrize(
    ("wrapped", "where"),
    [(Output, "Output: its tensor is {}.sample"), (lambda m: (m,), "tuple: its first tensor is {}[0]")],
)
def test_the_output_of_a_network_that_is_no_tensor(wrapped, where):
    noised = V.noise(X0)
    for call in (V.loss, V.predict_x0, lambda a, b: V.loss(a, b, reduction="sum")):
        refused(lambda: call(wrapped(X0), noised), f"prediction must be a tensor; got {where.format('prediction')}")  # noqa: B023
    t = torch.zeros(4).long()
    refused(
        lambda: fastdiff.diffusion_loss(wrapped(X0), X0, X0, t, VP),
        "model_output must be",
        where.format("model_output"),
    )
    for how in ({}, {"dynamic_thresholding": 0.9}, {"callback": never}):
        sample = lambda: V.sample(lambda x, t: wrapped(x), (2, 3), "ddim", 2, progress=False, **how)  # noqa: B023, E731
        refused(sample, f"the model's output must be a tensor; got {where.format('output')}")


def guided(cond, uncond, guidance=2.0):
    def model(x, t, c):
        c = c["y"] if isinstance(c, dict) else c
        assert len(c) == len(x)
        return c.to(x) + 0 * x

    return EPSILON.sample(
        model, (3, 2), "ddim", 2, cond=cond, uncond=uncond, guidance=guidance, seed=1, progress=False
    )  # fmt: skip


def test_a_condition_that_the_network_needs():
    class Conditional(torch.nn.Module):
        def forward(self, x, t, labels):
            return x + labels[:, None]

    class Optional(torch.nn.Module):
        def forward(self, x, t, labels=None):
            return x + labels

    how = {"sampler": "ddim", "steps": 2, "progress": False}
    for model in (Conditional(), lambda x, t, labels: x + labels[:, None]):
        message = refused(
            lambda: EPSILON.sample(model, (2, 3), **how),  # noqa: B023
            "the network takes a condition, 'labels', but none was given: pass it as sample(..., cond=...)",
        )
        with pytest.raises(TypeError, match=re.escape(message)) as caught:
            EPSILON.sample(model, (2, 3), **how)
        assert "missing 1 required positional argument" in str(caught.value.__cause__)
        EPSILON.sample(model, (2, 3), cond=torch.ones(2), **how)
    refused(
        lambda: EPSILON.sample(lambda x, t: x, (2, 3), cond=torch.ones(2), **how),
        "the network takes no condition, its arguments are (x, t), but cond was given: leave it out",
    )
    # What is the network's own error stays it.
    with pytest.raises(TypeError, match="unsupported operand") as caught:
        EPSILON.sample(Optional(), (2, 3), **how)
    assert caught.value.__cause__ is None
    with pytest.raises(TypeError, match="unsupported operand"):
        EPSILON.sample(lambda x, t: x + None, (2, 3), **how)
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'labels' and 'more'"):
        EPSILON.sample(lambda x, t, labels, more: x, (2, 3), **how)


def test_a_text_as_the_condition():
    for call in (lambda: guided("a cat", None, 1.0), lambda: guided("a cat", "", 2.0)):
        refused(call, "cond must be a tensor, or a tuple, list or dict of tensors", "got str 'a cat': encode it first")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_one_condition_for_all_samples(guidance):
    """The network sees the batch, with guidance and without."""
    wanted = guided(torch.full((3, 1), 2.0), torch.full((3, 1), 1.0), guidance)
    one = guided(torch.full((1, 1), 2.0), torch.full((1, 1), 1.0), guidance)
    assert torch.equal(one, wanted)

    def model(x, t, c):
        assert c.shape == (len(x),) and c.is_contiguous()
        return c[:, None] + 0 * x

    how = {"guidance": guidance, "seed": 1, "progress": False}
    number = EPSILON.sample(model, (3, 2), "ddim", 2, cond=torch.tensor(2.0), uncond=torch.tensor(1.0), **how)
    assert torch.equal(number, wanted)


def test_conditions_of_another_batch_size():
    one, three, four = (torch.arange(n).float()[:, None] + 1 for n in (1, 3, 4))
    refused(lambda: guided(four, None, 1.0), "cond has shape (4, 1), but 3 samples", "must be 3, or 1 for all")
    refused(lambda: guided(four, four), "cond has shape (4, 1), but 3 samples")
    refused(lambda: guided(three, four), "uncond has shape (4, 1)")
    refused(lambda: guided({"y": four}, {"y": three}), "cond['y'] has shape (4, 1)")
    refused(
        lambda: guided({"y": three}, {"x": three}), "cond and uncond must have the same entries; got ['y'] and ['x']"
    )
    refused(lambda: guided((three, three), (three,)), "the same entries; got [0, 1] and [0]")
    refused(lambda: guided(three, (three,)), "cond and uncond must be of one form; got Tensor and tuple")
    # One condition goes with all samples.
    torch.testing.assert_close(guided(three, one), guided(three, one.expand(3, 1)))
    torch.testing.assert_close(guided({"y": one}, {"y": one * 2}), guided(one.expand(3, 1), one.expand(3, 1) * 2))


@pytest.mark.parametrize(
    "weighting",
    [
        lambda t: 1 / (t + 1),
        lambda t: torch.exp(-t),
        lambda t: torch.ones(1000)[t],
        lambda t: t.float() / 1000,
        lambda t: (t < 500).float(),
        lambda t: {500: 1.0}[t],
    ],
    ids=["adds", "exp", "table", "method", "compares", "dictionary"],
)
def test_a_weighting_that_takes_t(weighting):
    refused(lambda: fastdiff.Objective(VP, weighting=weighting), "called with the noise levels, not with t", "levels.t")


def test_a_weighting_with_a_mistake_of_its_own():
    def weighting(levels):
        return levels.snr + undefined  # noqa: F821

    with pytest.raises(NameError, match="undefined"):
        fastdiff.Objective(VP, weighting=weighting)


def test_a_class_for_its_object():
    weighting, loss, timesteps = fastdiff.MinSNR, fastdiff.losses.Huber, fastdiff.timesteps.LogitNormal
    for given in ({"weighting": weighting}, {"loss": loss}, {"timesteps": timesteps}):
        (cls,) = given.values()
        message = refused(lambda: fastdiff.Objective(VP, **given))  # noqa: B023
        assert message.endswith(f"got the class {cls.__name__}, not an object of it.")


def test_a_loss_of_pytorch():
    for loss in (torch.nn.MSELoss(), torch.nn.functional.mse_loss):
        refused(lambda: fastdiff.Objective(VP, loss=loss), "loss must be one of mse, l1, smooth_l1, huber")  # noqa: B023


@pytest.mark.parametrize(
    ("name", "module"), [("DDIM", "samplers"), ("Huber", "losses"), ("LogitNormal", "timesteps"), ("Philox", "ops")]
)
def test_a_name_that_is_in_a_module(name, module):
    where = f"'fastdiff' has no attribute '{name}': it is fastdiff.{module}.{name}"
    with pytest.raises(AttributeError, match=re.escape(where) + "$"):
        getattr(fastdiff, name)


def test_a_name_that_is_in_none():
    with pytest.raises(AttributeError, match="no attribute 'torch'$"):  # which each of them imports
        fastdiff.torch  # noqa: B018
    done = subprocess.run([sys.executable, "-c", "import fastdiff; fastdiff.MinSnr"], capture_output=True, text=True)
    assert done.stderr.rstrip().endswith("Did you mean: 'MinSNR'?")


def test_a_mask_of_all_channels():
    noised = V.noise(X0)
    refused(lambda: V.loss(X0, noised, mask=torch.ones(4, 8, 8)), "A mask of all channels is mask.view(4, 1, 8, 8)")
    refused(lambda: V.loss(X0, noised, mask=torch.ones(8, 8)), "A mask of the last dimensions is mask.view(1, 1, 8, 8)")
    refused(lambda: V.loss(X0, noised, mask=np.ones((4, 1, 8, 8))), "mask must be a tensor; got ndarray")
    for mask in (torch.ones(5, 5), X0[..., None]):
        assert "view" not in refused(lambda: V.loss(X0, noised, mask=mask), f"mask has shape {tuple(mask.shape)}")  # noqa: B023


def test_a_time_that_is_a_text():
    refused(lambda: V.noise(X0, "500"), "t must be a tensor, a number or a list of numbers; got '500'")


def test_a_table_of_weights():
    refused(
        lambda: fastdiff.Objective(VP, weighting=torch.ones(1000)), "a table of one weight a timestep is PerTimestep("
    )


# ------------------------------------------------------------------------------------------------------------- numbers


def numbers_of(module):
    """(a class of the module, a field that is declared a number, whether it may be None), for all of them."""
    for cls in vars(module).values():
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__.startswith(module.__name__):
            for field in dataclasses.fields(cls):
                if field.init and str(field.type).split(" | ")[0] in ("float", "int"):
                    yield pytest.param(cls, field.name, "None" in field.type, id=f"{cls.__name__}-{field.name}")


NUMBERS = [
    case
    for module in (fastdiff.weighting, fastdiff.timesteps, fastdiff.losses, samplers)
    for case in numbers_of(module)
    if case.id not in ("Plan-initial_std", "Plan-clip")  # made by samplers
]


def test_the_numbers_are_found():
    ids = {case.id for case in NUMBERS}
    assert {"MinSNR-gamma", "P2-k", "LogitNormal-std", "Huber-delta", "DDIM-eta", "Euler-s_churn", "UniPC-order"} <= ids
    assert len(ids) == len(NUMBERS) > 100


@pytest.mark.parametrize(("cls", "name", "optional"), NUMBERS)
def test_what_is_no_number(cls, name, optional):
    needed = {
        fastdiff.timesteps.Shifted: {"inner": fastdiff.timesteps.Uniform(), "shift": 2.0},
        fastdiff.timesteps.Within: {"inner": fastdiff.timesteps.Uniform()},
        fastdiff.timesteps.Beta: {"a": 2.0, "b": 2.0},
    }.get(cls, {})
    for value in ("5", [5], torch.ones(2)) if optional else ("5", [5], torch.ones(2), None):
        call = lambda: cls(**needed | {name: value})  # noqa: B023, E731
        assert refused(call, "must be a number").startswith(f"{name} must be a number; got ")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (fastdiff.RectifiedFlow, ("shift", "sigma_min")),
        (fastdiff.EDM, ("sigma_data",)),
        (fastdiff.VPSDE, ("beta_min", "beta_max", "t_min")),
        (fastdiff.SubVPSDE, ("beta_min", "beta_max", "t_min")),
        (fastdiff.VESDE, ("sigma_min", "sigma_max", "t_min")),
        (fastdiff.TrigFlow, ("sigma_data",)),
        (fastdiff.VariancePreserving, ("beta_start", "beta_end")),
        (lambda **given: fastdiff.Objective(VP, **given), ("noise_offset", "input_perturbation")),
        (lambda **given: V.sample(never, (2, 3), **given), ("guidance_rescale", "dynamic_thresholding")),
        (
            lambda **given: V.sample(never, (2, 3), cond=torch.ones(2), uncond=torch.ones(2), **given),
            ("guidance",),
        ),
        (lambda **given: V.loss(X0, V.noise(X0), **given), ("weight",)),
        (lambda **given: fastdiff.ops.step(X0, X0, torch.ones(18), **given), ("clip",)),
    ],
)
def test_what_is_no_number_elsewhere(make, names):
    for name in names:
        refused(lambda: make(**{name: "0.5"}), f"{name} must be a number; got '0.5'.")  # noqa: B023


def test_numbers_of_every_kind_are_taken():
    for five in (5, 5.0, np.float32(5), np.int64(5), np.array(5.0), torch.tensor(5.0), Fraction(5)):
        assert fastdiff.MinSNR(five).gamma == 5
        assert fastdiff.EDM(five).sigma_data == 5.0


def test_betas_that_are_none():
    for given in (None, 1000):
        refused(
            lambda: fastdiff.VariancePreserving(given),  # noqa: B023
            f"betas must be a name, linear, scaled_linear, cosine, or the betas themselves; got {given}. How many",
        )
    refused(lambda: samplers.DDPM(timesteps="999"), "timesteps must be numbers, the noisiest first; got '999'")
    refused(lambda: V.sample(never, (2, 3), dtype="float32"), "such as torch.float32; got 'float32'")


def test_a_name_inside_of_timesteps():
    inner = fastdiff.timesteps.LogitNormal()
    assert fastdiff.timesteps.Stratified("logit-normal") == fastdiff.timesteps.Stratified(inner)
    assert fastdiff.timesteps.Shifted("logit_normal", 3.0) == fastdiff.timesteps.Shifted(inner, 3.0)
    refused(lambda: fastdiff.timesteps.Stratified("logitnormal"), "did you mean 'logit_normal'?")


# -------------------------------------------------------------------------------------------------------- integrations


class Pipeline:
    scheduler = DDIMScheduler()


def test_a_pipeline_or_a_class_for_a_scheduler():
    fuse, scripts = fastdiff.integrations.diffusers.fuse, fastdiff.integrations.training_scripts
    calls = {"fuse": fuse, "Objective.from_scheduler": fastdiff.Objective.from_scheduler}
    for name, call in calls.items():
        refused(
            lambda: call(Pipeline()),  # noqa: B023
            f"scheduler is a Pipeline, which has a scheduler: write {name}(pipeline.scheduler)",
        )
    refused(lambda: scripts.text_to_image(Pipeline()), "which has a scheduler: write pipeline.scheduler")
    for call in (*calls.values(), scripts.text_to_image, scripts.text_to_image_sdxl, scripts.sd3):
        refused(lambda: call(DDIMScheduler), "scheduler is the class DDIMScheduler: make one, such as DDIMScheduler()")  # noqa: B023


def test_integrations_are_reached_without_an_import_of_their_own():
    """In a process where nothing else has imported them; until then none of them is imported."""
    script = """if True:
        import sys, fastdiff
        def loaded():
            return sorted(name for name in sys.modules if name.startswith("fastdiff.integrations"))
        print(loaded())
        fastdiff.integrations.flow.noise, fastdiff.integrations.diffusers.fuse, fastdiff.integrations.diffusers.patch
        fastdiff.integrations.training_scripts.text_to_image
        print("diffusers" in sys.modules, "integrations" in dir(fastdiff), "k_diffusion" in dir(fastdiff.integrations))
        print("fastdiff.integrations.k_diffusion" in loaded())
        for module in fastdiff, fastdiff.integrations:
            try:
                module.nonsense
            except AttributeError as error:
                print(error)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, *others, names = done.stdout.splitlines()
    assert first == "[]"
    assert others == ["False True True", "False", "module 'fastdiff' has no attribute 'nonsense'"]
    assert names.startswith("fastdiff.integrations has no 'nonsense'; it has denoising_diffusion, diffusers, edm, flow")


# ------------------------------------------------------------------------------------------------------ what is printed


BIG = torch.randn(16, 4, 64, 64)
SHORT = [
    (VP, "VariancePreserving(betas='linear', steps=1000)"),
    (
        fastdiff.VariancePreserving("linear", 50, beta_end=0.3, zero_terminal_snr=True),
        "VariancePreserving(betas='linear', steps=50, beta_end=0.3, zero_terminal_snr=True)",
    ),
    (fastdiff.VariancePreserving([0.1, 0.2]), "VariancePreserving(betas='given', steps=2)"),
    (fastdiff.EDM(), "EDM(sigma_data=0.5)"),
    (EPSILON, "Objective(VariancePreserving(betas='linear', steps=1000), 'epsilon')"),
    (
        fastdiff.Objective(fastdiff.RectifiedFlow(3.0), "flow", "cosmap", "huber", error_space="sample"),
        "Objective(RectifiedFlow(shift=3.0, sigma_min=0.0), 'flow', weighting=CosMap(), loss=Huber(delta=1.0), "
        "error_space='sample')",
    ),
    (
        V.noise(BIG),
        "Noised(x_t=tensor float32 [16, 4, 64, 64], t=tensor int64 [16], "
        "VariancePreserving(betas='linear', steps=1000), 'v_prediction')",
    ),
    (samplers.DDIM(), "DDIM()"),
    (samplers.get("dpmpp_2m_sde_karras"), "DPMSolverPP(sigmas='karras', eta=1.0)"),
    (samplers.DDPM(timesteps=range(999, -1, -1)), "DDPM(timesteps=range(999, -1, -1))"),
    (
        samplers.get("heun").plan(VP, 50, "epsilon"),
        "Plan(50 steps, 99 calls of the network, 0 draws, t from 999 to 19)",
    ),
    (samplers.DDPM().plan(VP, 10, "epsilon"), "Plan(10 steps, 10 calls of the network, 9 draws, t from 999 to 99)"),
    (fastdiff.ops.Philox(3), "Philox(seed=3)"),
    (
        fastdiff.ops.Philox(torch.tensor([3]), 4, rng="fast"),
        "Philox(seed=tensor int64 [1], sample_offset=4, rng='fast')",
    ),
    (fastdiff.PerTimestep(torch.ones(1000)), "PerTimestep(table=tensor float64 [1000])"),
]


@pytest.mark.parametrize(("thing", "shown"), SHORT, ids=[type(thing).__name__ for thing, _ in SHORT])
def test_what_is_printed_is_short(thing, shown):
    assert repr(thing) == shown


def objective_of_a_weight(count):
    return fastdiff.Objective(VP, weighting=lambda levels: torch.where(levels.t < count, math.inf, 1 / levels.snr))


WARNED = {
    "an infinite weight": (lambda: objective_of_a_weight(1), r"is infinite at t = \[0\]: these"),
    "three of them": (lambda: objective_of_a_weight(3), r"is infinite at t = \[0, 1, 2\]: these"),
    "more of them": (lambda: objective_of_a_weight(4), r"is infinite at t = \[0, 1, 2\]\.\.\.: these"),
    "a mask of nothing": (lambda: V.loss(X0, V.noise(X0), mask=torch.zeros(4)), "mask is 0 everywhere"),
    "the same, of a call": (
        lambda: fastdiff.diffusion_loss(X0, X0, X0, torch.tensor([1, 2, 3, 4]), VP, mask=torch.zeros(4)),
        "mask is 0 everywhere",
    ),
    "the same, of an operation": (
        lambda: fastdiff.ops.loss(X0, None, X0, q=1.0, mask=torch.zeros(4)),
        "mask is 0 everywhere",
    ),
    "a form without effect": (
        lambda: fastdiff.Objective(VP, "v_prediction", fastdiff.MinSNR(5.0, "shifted"), error_space="sample"),
        "has no effect",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_a_warning_points_at_the_line_that_led_to_it(name):
    call, words = WARNED[name]
    with pytest.warns(UserWarning, match=words) as found:
        call()
    assert [warning.filename for warning in found] == [__file__]


def test_a_sampler_of_ones_own_is_printed():
    class Mine(samplers.Sampler):
        def __init__(self):
            self.order = 1

    assert repr(Mine()) == "Mine()"


@pytest.mark.parametrize("name", samplers.NAMES)
def test_what_a_sampler_prints_makes_it(name):
    sampler = samplers.get(name)
    assert eval(f"samplers.{sampler!r}") == sampler and len(repr(sampler)) < 50


def test_a_prediction_that_is_no_name():
    refused(lambda: fastdiff.Objective(VP, X0), "prediction must be a name", "got Tensor")
