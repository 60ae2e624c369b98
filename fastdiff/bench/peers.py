"""Who is measured: fastdiff, and what one would use instead."""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

import fastdiff
from fastdiff import ops

from . import eager
from .cases import AT_ONCE, PATCH, Case, Operands

Call = Callable[[Operands], Any]

AGAINST = ("eager", "compile", "diffusers", "reference")
SAMPLING_STEPS = 50
STEP = 10  # of the sampling run: one in the middle, where nothing is special
CLIP = 1.0
STEP_STREAM = 16 + STEP  # the stream of noise that ``fastdiff.sample`` uses in this step


class Missing(Exception):
    """Why a peer has no measurement of a case."""


def build(peer: str, case: Case, device: torch.device) -> Call:
    """What ``peer`` does for ``case``, as a function of the operands. Raises Missing if it has no such thing.

    What is returned keeps alive what a trainer would keep: ours the ``Noised`` and the loss, so that its noise can be
    looked at.
    """
    if peer == "fastdiff":
        return _ours(case, device)
    if peer == "reference":
        return _with_reference(_ours(case, device))
    if peer == "eager":
        return _plain(case, device, lambda function: function)
    if peer == "compile":
        return _plain(case, device, compiled)
    if peer == "diffusers":
        return _diffusers(case, device)
    raise ValueError(f"unknown peer {peer!r}")


def _process(kind: str) -> fastdiff.Process:
    return fastdiff.RectifiedFlow() if kind == "flow" else fastdiff.VariancePreserving()


@cache
def _objective(kind: str) -> fastdiff.Objective:
    return fastdiff.Objective(_process(kind), kind, None if kind == "flow" else fastdiff.MinSNR(eager.SNR_GAMMA))


@cache
def sampling_plan(kind: str) -> fastdiff.samplers.Plan:
    """The sampling run that the sampler steps are a part of."""
    sampler = fastdiff.samplers.DDIM() if kind == "flow" else fastdiff.samplers.DDPM(clip=CLIP)
    return sampler.plan(_process(kind), SAMPLING_STEPS, kind)


@cache
def _variance_bound(device: torch.device) -> torch.Tensor:
    """float32 [1000, 6]: scale, l_0, l_v, l_q, half-width and weight of ``ops.gaussian_kl`` after Nichol and Dhariwal
    2021: L = (1 + v) / 2 ln beta + (1 - v) / 2 ln beta~, their weight 0.001, and bins of 8 bits where t is 0."""
    alpha_bar = fastdiff.VariancePreserving().alpha_bar
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    posterior = beta * (1 - before) / (1 - alpha_bar)
    posterior[0] = posterior[1]  # which is not 0
    low, high = posterior.log(), beta.log()
    scale = -beta / ((1 - beta) * (1 - alpha_bar)).sqrt()
    half_width = torch.full_like(beta, -1.0)
    half_width[0] = 1 / 255
    weight = torch.full_like(beta, 0.001)
    return torch.stack([scale, (high + low) / 2, (high - low) / 2, low, half_width, weight], 1).to(
        device, torch.float32
    )


def _ours(case: Case, device: torch.device) -> Call:
    objective = _objective(case.kind)
    flow = case.kind == "flow"

    def noised(o: Operands) -> fastdiff.Noised:
        return objective.noise(o.x0, o.time if flow else o.t, o.noise)

    if case.operation == "noising":
        return lambda o: noised(o).x_t
    if case.operation == "noising images":
        return lambda o: objective.noise(o.images, o.time if flow else o.t, o.noise, dtype=o.noise.dtype).x_t
    if case.operation == "noising+loss of tokens":
        tokens = fastdiff.Tokens(PATCH)

        def of_tokens(o: Operands) -> Any:
            noised = objective.noise(o.x0, o.time if flow else o.t, o.noise, tokens=tokens)
            return noised.x_t, objective.loss(o.tokens, noised)

        return _step_on_tokens(of_tokens)
    if case.operation == "row moments":
        return _no_grad(lambda o: ops.row_moments(o.x0, o.prediction)[:-1])
    if case.operation in ("loss", "loss+gradient", AT_ONCE):
        made: dict[int, fastdiff.Noised] = {}

        def before(o: Operands) -> fastdiff.Noised:
            if id(o) not in made:  # a trainer has it from before the network
                made[id(o)] = noised(o)
            return made[id(o)]

        def loss(o: Operands) -> Any:
            return objective.loss(o.prediction, before(o))

        if case.operation == AT_ONCE:
            return lambda o: objective.loss_and_gradient(o.prediction, before(o))
        return _without_gradient(loss) if case.operation == "loss" else _with_gradient(loss)
    if case.operation == "training step":

        def step(o: Operands) -> Any:
            noised = objective.noise(o.x0)
            loss = objective.loss(o.prediction, noised)
            loss.backward()
            return noised, loss

        return _fresh_gradient(step)
    if case.operation == "hybrid loss":
        table = _variance_bound(device)

        def hybrid(o: Operands) -> Any:
            scale, l_0, l_v, l_q, half_width, weight = table[o.t].unbind(1)
            how = {"scale": scale, "l_0": l_0, "l_v": l_v, "l_q": l_q, "half_width": half_width, "weight": weight}
            return ops.gaussian_kl(o.output, o.x0, o.noise, q=1.0, **how, simple_weight=1.0, freeze_mean=True)

        return _with_gradient(hybrid, "output")
    if case.operation == "latents":
        how = {"shift": eager.LATENT_SHIFT, "scale": eager.LATENT_SCALE}
        return _no_grad(lambda o: fastdiff.autoencoder.noise_latents(objective, o.output, o.t, **how))
    if case.operation == "divergence+gradient":
        return _with_gradient(lambda o: ops.kl_normal(o.output), "output")
    row = sampling_plan(case.kind).table[STEP].float().to(device)
    clip = None if flow else CLIP
    made_here = ops.Philox(0, stream=STEP_STREAM)

    def sampler_step(o: Operands) -> Any:
        noise = None if flow else o.noise if case.operation == "sampler step" else made_here
        return ops.step(o.x0, o.prediction, row, clip=clip, noise=noise, return_x0=False, return_entry=False)[0]

    return _no_grad(sampler_step)


def _with_reference(call: Call) -> Call:
    def run(o: Operands) -> Any:
        with fastdiff.use_backend("reference"):
            return call(o)

    return run


def _plain(case: Case, device: torch.device, prepare: Callable[[Callable], Callable]) -> Call:
    """The functions of ``eager``, each passed through ``prepare``: as they are, or compiled."""
    if case.operation == "row moments":
        moments = prepare(eager.row_moments)
        return _no_grad(lambda o: moments(o.x0, o.prediction))
    if case.operation == "divergence+gradient":
        divergence = prepare(eager.divergence)
        return _with_gradient(lambda o: divergence(o.output), "output")
    flow = case.kind == "flow"
    alpha_bar = fastdiff.VariancePreserving().alpha_bar.to(device, torch.float32)
    of_data = {"noising images": "images", "noising+loss of tokens": "tokens"}.get(case.operation, "noising")
    noising_function = prepare(getattr(eager, f"{of_data}_{'flow' if flow else 'ddpm'}"))
    loss_function = {"epsilon": eager.loss_epsilon, "v_prediction": eager.loss_v, "flow": eager.loss_flow}[case.kind]

    def noising(x0, noise, t):
        return noising_function(x0, noise, t) if flow else noising_function(x0, noise, t, alpha_bar)

    if case.operation == "noising":
        return lambda o: noising(o.x0, o.noise, o.time if flow else o.t)
    draw = prepare(torch.randn_like) if device.type != "cpu" else torch.randn_like
    if case.operation == "latents":
        latents = prepare(eager.latents)
        return _no_grad(lambda o: latents(o.output, draw(o.x0), draw(o.x0), o.t, alpha_bar))
    if case.operation == "noising images":
        return lambda o: noising(o.images, o.noise, o.time if flow else o.t)
    if case.operation == "noising+loss of tokens":
        name = {"v_prediction": "v"}.get(case.kind, case.kind)
        token_loss = prepare(getattr(eager, f"token_loss_{name}"))

        def of_tokens(o: Operands) -> Any:
            how = (o.time,) if flow else (o.t, alpha_bar)
            return noising(o.x0, o.noise, how[0]), token_loss(o.tokens, o.x0, o.noise, *how)

        return _step_on_tokens(of_tokens)
    if case.operation in ("loss", "loss+gradient", AT_ONCE, "training step"):
        loss_function = prepare(loss_function)

        def loss_of(prediction, x0, noise, t):
            return (
                loss_function(prediction, x0, noise, t) if flow else loss_function(prediction, x0, noise, t, alpha_bar)
            )

        if case.operation == "training step":

            def step(o: Operands) -> Any:
                noise = draw(o.x0)
                batch = o.x0.shape[0]
                t = torch.rand(batch, device=device) if flow else torch.randint(0, 1000, (batch,), device=device)
                x_t = noising(o.x0, noise, t)
                loss = loss_of(o.prediction, o.x0, noise, t)
                loss.backward()
                return x_t, loss

            return _fresh_gradient(step)

        def loss(o: Operands) -> Any:
            return loss_of(o.prediction, o.x0, o.noise, o.time if flow else o.t)

        return _without_gradient(loss) if case.operation == "loss" else _with_gradient(loss)
    if case.operation == "hybrid loss":
        table, function = _variance_bound(device), prepare(eager.hybrid_loss)
        return _with_gradient(lambda o: function(o.output, o.x0, o.noise, o.t, table), "output")
    if flow:
        sigma, next_sigma = sampling_plan("flow").times[STEP : STEP + 2].float().unbind()
        euler = prepare(eager.euler)
        return _no_grad(lambda o: euler(o.x0, o.prediction, sigma, next_sigma))
    now, following = (int(t) for t in sampling_plan(case.kind).times[STEP : STEP + 2])
    # On the CPU, as a scheduler keeps them: numbers to a kernel of any device.
    a, b = (fastdiff.VariancePreserving().alpha_bar[t].float() for t in (now, following))
    function = prepare(eager.ddpm_epsilon if case.kind == "epsilon" else eager.ddpm_v)
    made_here = case.operation == "sampler step+noise"

    def sampler_step(o: Operands) -> Any:
        return function(o.x0, o.prediction, torch.randn_like(o.x0) if made_here else o.noise, a, b)

    return _no_grad(sampler_step)


@cache
def compiled(function: Callable) -> Callable:
    """``torch.compile`` of a function, once: cases share what is compiled for a shape and dtype."""
    return torch.compile(function, dynamic=False, fullgraph=True)


@contextlib.contextmanager
def many_graphs():
    """Let a function have a graph for each shape and dtype. By default PyTorch gives up after a few."""
    import torch._dynamo as dynamo

    limit = "recompile_limit" if hasattr(dynamo.config, "recompile_limit") else "cache_size_limit"
    with dynamo.config.patch({limit: 256}):
        yield


def graphs(case: Case) -> list[tuple[str, str, tuple[int, ...], bool]]:
    """What torch.compile must make for a case: (function, dtype, shape, with gradient)."""
    noising = "noising_flow" if case.kind == "flow" else "noising_ddpm"
    names = {
        "noising": [(noising, False)],
        "loss": [(f"loss_{case.kind}", False)],
        "loss+gradient": [(f"loss_{case.kind}", True)],
        AT_ONCE: [(f"loss_{case.kind}", True)],
        "row moments": [("row_moments", False)],
        "training step": [(noising, False), (f"loss_{case.kind}", True)],
        "hybrid loss": [("hybrid_loss", True)],
        "latents": [("latents", False)],
        "divergence+gradient": [("divergence", True)],
        "noising images": [(noising.replace("noising", "images"), False)],
        "noising+loss of tokens": [(noising.replace("noising", "tokens"), False), (f"token_loss_{case.kind}", True)],
    }.get(case.operation, [(f"step_{case.kind}", False)])
    return [(name, case.dtype, case.shape, gradient) for name, gradient in names]


def _diffusers(case: Case, device: torch.device) -> Call:
    if case.operation == "hybrid loss":
        raise Missing("its training scripts learn no variance")
    schedulers = diffusers_schedulers()
    if case.operation in ("latents", "divergence+gradient"):
        raise Missing("its autoencoder runs the lines of eager")
    if case.operation in ("row moments", "noising images", "noising+loss of tokens"):
        raise Missing("it has no such operation")
    flow = case.kind == "flow"
    if case.operation == "sampler step":
        if not flow:
            raise Missing("the scheduler's step makes its own noise: see sampler step+noise")
    elif flow and case.operation != "noising":
        raise Missing("its flow scheduler has no such operation")
    if flow:
        scheduler = schedulers.FlowMatchEulerDiscreteScheduler()
        if case.operation == "noising":
            timesteps = scheduler.timesteps
            return lambda o: scheduler.scale_noise(o.x0, timesteps[o.t.cpu()].to(device), o.noise)
        times = sampling_plan("flow").times
        scheduler.set_timesteps(sigmas=times.tolist(), device=device)
        timestep = scheduler.timesteps[STEP]

        def euler(o: Operands) -> Any:
            scheduler._step_index = STEP  # a step moves it on
            return scheduler.step(o.prediction, timestep, o.x0, return_dict=False)[0]

        return _no_grad(euler)
    scheduler = schedulers.DDPMScheduler(prediction_type=case.kind, timestep_spacing="trailing")
    if case.operation == "noising":
        return lambda o: scheduler.add_noise(o.x0, o.noise, o.t)
    if case.operation == "sampler step+noise":
        scheduler.set_timesteps(SAMPLING_STEPS)
        timestep = int(scheduler.timesteps[STEP])
        return _no_grad(lambda o: scheduler.step(o.prediction, timestep, o.x0, return_dict=False)[0])
    alpha_bar = scheduler.alphas_cumprod.to(device)

    def loss_of(prediction, x0, noise, t):
        ratio = eager.snr(t, alpha_bar)
        if case.kind == "epsilon":
            return eager.weighted_mse(prediction, noise, ratio.clamp(max=eager.SNR_GAMMA) / ratio)
        target = scheduler.get_velocity(x0, noise, t)
        return eager.weighted_mse(prediction, target, ratio.clamp(max=eager.SNR_GAMMA) / (ratio + 1))

    if case.operation == "training step":

        def step(o: Operands) -> Any:
            noise = torch.randn_like(o.x0)
            t = torch.randint(0, 1000, o.x0.shape[:1], device=device)
            x_t = scheduler.add_noise(o.x0, noise, t)
            loss = loss_of(o.prediction, o.x0, noise, t)
            loss.backward()
            return x_t, loss

        return _fresh_gradient(step)

    def loss(o: Operands) -> Any:
        return loss_of(o.prediction, o.x0, o.noise, o.t)

    return _without_gradient(loss) if case.operation == "loss" else _with_gradient(loss)


@cache
def diffusers_schedulers() -> types.SimpleNamespace:
    """The schedulers of the installed diffusers. Raises Missing if there is none."""
    try:
        ddpm = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
        euler = importlib.import_module("diffusers.schedulers.scheduling_flow_match_euler_discrete")
        return types.SimpleNamespace(
            DDPMScheduler=ddpm.DDPMScheduler,
            FlowMatchEulerDiscreteScheduler=euler.FlowMatchEulerDiscreteScheduler,
        )
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Missing(f"diffusers is not installed or too old ({error}): pip install diffusers") from error


def _fresh_gradient(call: Call) -> Call:
    def run(o: Operands) -> Any:
        o.prediction.grad = None
        return call(o)

    return run


def _with_gradient(loss: Call, leaf: str = "prediction") -> Call:
    def run(o: Operands) -> Any:
        getattr(o, leaf).grad = None
        result = loss(o)
        result.backward()
        return result

    return run


def _step_on_tokens(call: Call) -> Call:
    """``call`` gives x_t and the loss."""

    def run(o: Operands) -> Any:
        o.tokens.grad = None
        x_t, loss = call(o)
        loss.backward()
        return x_t, loss

    return run


def _without_gradient(loss: Call) -> Call:
    return _no_grad(loss)


def _no_grad(call: Call) -> Call:
    def run(o: Operands) -> Any:
        with torch.no_grad():
            return call(o)

    return run
