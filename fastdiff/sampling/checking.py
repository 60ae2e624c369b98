"""The checks of the arguments of a run, before anything is drawn or computed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .. import prediction as kinds
from .. import samplers
from ..guidance import Rule
from ..ops.checks import check_floating, check_tensor
from ..philox import samples_of, whole
from ..prediction import Prediction
from ..process import Process, check_process
from ..samplers import Plan
from ..showing import brief
from .cuda_graph import check_capture
from .guidance import Guidance
from .noise_source import check_seeds
from .plans import planned
from .request import Request, TrainedOn


def check(request: Request) -> tuple[Request, Plan, Guidance]:
    """(the request with what is left out filled in, the sampler's plan, the options that look at the output).

    Raises TypeError or ValueError for what is unfit.
    """
    shape = _shape(request.model, request.shape)
    process, prediction = trained_on(request.process, request.prediction)
    sampler = samplers.get(request.sampler)
    steps = None if request.steps is None else whole("steps", request.steps)
    step_offset = whole("step_offset", request.step_offset)
    if step_offset < 0:
        raise ValueError(f"step_offset must be at least 0; got {step_offset}.")
    x, noise, dtype = request.x, request.noise, request.dtype
    for name, tensor in (("x", x), ("known", request.known)):
        if tensor is not None:
            check_floating(**{name: tensor})
    if request.mask is not None:
        check_tensor("mask", request.mask, "mask")
    if noise is not None and not callable(noise):
        raise TypeError(
            f"noise must be a function (step, shape) -> tensor; got {brief(noise)}. A start is passed as x=."
        )
    plan = planned(sampler, process, steps, prediction)
    uncond = _uncond(request.cond, request.uncond, request.guidance)
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, but shape is {shape}.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, such as torch.float32; got {dtype!r}.")
    device = _device(request.model, x, request.device)
    samples = samples_of(request.ids, request.sample_offset, shape[0], device, request.seed)
    generator = check_seeds(request.seed, request.generator, shape[0])
    if request.ids is not None and (noise is not None or isinstance(generator, list)):
        given, equal = ("a list of generators", "generators of one seed") if noise is None else ("noise=", "noise")
        raise ValueError(
            f"ids choose the noise of samples from that of a seed, but {given} gives it: leave ids out, and give equal "
            f"{equal} to samples that are to have the same noise."
        )
    if isinstance(request.guidance, Rule):
        request.guidance.check(process, prediction, shape)
    guidance = Guidance(
        plan, sampler, request.guidance, uncond is not None, request.guidance_interval, request.guidance_rescale,
        request.dynamic_thresholding, request.sample_max_value, request.cond_fn, step_offset,
    )  # fmt: skip
    if request.cuda_graph:
        check_capture(device, plan, guidance)
    checked = request._replace(
        shape=shape, process=process, sampler=sampler, steps=steps, prediction=prediction, uncond=uncond,
        generator=generator, sample_offset=samples, step_offset=step_offset, device=device,
    )  # fmt: skip
    return checked, plan, guidance


def _shape(model: Any, shape: Any) -> tuple[int, ...]:
    """``shape`` as a tuple. Raises TypeError where one of the two is something else, or they are swapped."""
    if callable(shape):
        raise TypeError("the arguments are swapped: the network comes first, then the shape of the samples.")
    if not callable(model):
        raise TypeError(f"model must be the network, called as model(x, t); got {brief(model)}.")
    try:
        return tuple([whole("shape", n) for n in shape])
    except TypeError:
        raise TypeError(
            f"shape must be [batch, ...] of the samples, such as (16, 4, 64, 64); got {brief(shape)}."
        ) from None


def trained_on(process: Process | TrainedOn, prediction: str | Prediction | None) -> tuple[Process, Prediction]:
    """The process and the prediction kind of a network. Raises TypeError or ValueError where they are not known."""
    if isinstance(getattr(process, "process", None), Process):  # an Objective
        own = process.prediction
        if prediction is not None and kinds.get(prediction) is not own:
            raise ValueError(
                f"the objective predicts {own.name!r}, but prediction is {kinds.get(prediction).name!r}: leave it out."
            )
        return process.process, own
    check_process(process)
    if prediction is None:
        raise TypeError(
            "prediction is missing: samples depend on what the network was trained to predict. Write "
            "objective.sample(model, shape, ...), or give its kind, such as prediction='epsilon' or 'v_prediction'."
        )
    return process, kinds.get(prediction)


def _uncond(cond: Any, uncond: Any, guidance: float | Tensor | Rule) -> Any:
    """The condition of the unconditional half; None where there is no guidance."""
    if uncond is not None and cond is None:
        raise ValueError("uncond was given without cond: guidance needs the condition of both halves.")
    if isinstance(guidance, (int, float)) and guidance == 1.0:
        return None
    if uncond is None:
        raise ValueError(f"guidance={guidance} needs uncond: the condition of the unconditional half.")
    return uncond


def _device(model: Any, x: Tensor | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if x is not None:
        return x.device
    if isinstance(model, torch.nn.Module):
        parameter = next(model.parameters(), None)
        if parameter is not None:
            return parameter.device
    return torch.device("cpu")


def explain_call(error: TypeError, model: Any, cond: Any) -> None:
    """Raise another error for one of calling ``model``, where its signature shows that the condition is why."""
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # it has none
        return

    def takes(*arguments: str) -> bool:
        try:
            signature.bind(*arguments)
        except TypeError:
            return False
        return True

    if takes("x", "t", "cond") == takes("x", "t") or takes("x", "t") == (cond is None):
        return
    if cond is None:
        name = [*signature.parameters][2]
        raise TypeError(
            f"the network takes a condition, {name!r}, but none was given: pass it as sample(..., cond=...)."
        ) from error
    raise TypeError(
        f"the network takes no condition, its arguments are {signature}, but cond was given: leave it out, or give "
        f"the network a third argument."
    ) from error
