"""``fastdiff doctor --verify``: how exact training steps are here, fused and as trainers write them, against float64.

What is compared is what a trainer uses: x_t, the loss and the gradient of the network's output, for the user's shapes,
dtypes and device. Truth are the formulas of the papers in float64, of the very numbers that each step was given. An
eager step computes in the data's dtype, as scripts do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .bench import eager
from .bench.cases import DTYPES
from .objective import Objective
from .process import RectifiedFlow, VariancePreserving
from .weighting import MinSNR

# Latents of SDXL, of Flux, and of a video of 33 x 480 x 720 at Wan's compression.
SHAPES = ((4, 4, 128, 128), (1, 16, 128, 128), (1, 16, 9, 60, 90))
KINDS = ("epsilon", "v_prediction", "flow")
# Some of the 1,000 times: the first, where eager steps lose most digits, and where weights are clamped and are not.
TIMES = (0, 44, 400, 933)
_ROUNDING = torch.finfo(torch.float32).eps
_SEED = 0


@dataclass(frozen=True)
class Errors:
    """How far a step is from float64.

    Attributes:
        who: "fastdiff" or "eager".
        x_t, gradient: the largest error of an element, over the root mean square of the truth.
        loss: relative.
        cosine: 1 - the cosine between the gradient and the true one.
        bias: how much too long the gradient is along the true one, relative: what averaging does not take away.
        worse: which of these are worse than the eager step's, beyond rounding; the loss, if it is off by more than
            rounding, however far the eager one is, which would hide an epsilon in a weight. Empty for an eager step.
    """

    shape: tuple[int, ...]
    kind: str
    dtype: str
    who: str
    x_t: float
    loss: float
    gradient: float
    cosine: float
    bias: float
    worse: tuple[str, ...] = ()


def verify(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: Sequence[str] = ("bf16", "fp32"),
    device: torch.device | str = "cpu",
) -> list[Errors]:
    """The errors of training steps of epsilon and v with min-SNR weights and of a flow, fastdiff's and eager ones.

    Args:
        shapes: of the data, [batch, ...].
        dtypes: of data and network's output: "fp32", "bf16", "fp16".
        device: where the steps run. Truth is computed on the CPU.

    A batch of fewer samples than ``TIMES`` makes several steps, of which each figure is the worst.
    """
    device = torch.device(device)
    found = []
    for shape in shapes:
        for kind in KINDS:
            for dtype in dtypes:
                fused, plain = (
                    _worst([step(shape, kind, dtype, device, number) for number in range(len(_times(shape[0])))])
                    for step in (_fused, _eager)
                )
                found += [_judged(fused, plain), plain]
    return found


def _times(batch: int) -> tuple[Tensor, ...]:
    """t of each step, int64 [batch]: ``TIMES``, and behind them whatever comes."""
    steps = -(-len(TIMES) // batch)
    t = torch.randint(0, 1000, (steps * batch,), generator=torch.Generator("cpu").manual_seed(_SEED), device="cpu")
    t[: len(TIMES)] = torch.tensor(TIMES, device="cpu")
    return t.split(batch)


def _worst(steps: Sequence[Errors]) -> Errors:
    """Of each figure the one that is farthest from 0; NaN before all others."""
    worst = {
        name: max((getattr(errors, name) for errors in steps), key=lambda value: (math.isnan(value), abs(value)))
        for name in ("x_t", "loss", "gradient", "cosine", "bias")
    }
    return replace(steps[0], **worst)


def show(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], device: torch.device, as_json: bool) -> bool:
    """Print the table. Returns whether fastdiff was nowhere worse."""
    found = verify(shapes, dtypes, device)
    fine = not any(errors.worse for errors in found)
    if as_json:
        print(json.dumps([asdict(errors) for errors in found], indent=2))
        return fine
    print(f"training steps on {device}, against float64 (x_t, gradient: largest error over the root mean square)")
    width = max(len("shape"), *(len(_shown(errors.shape)) for errors in found))
    heads = "  ".join(f"{head:>8}" for head in ("x_t", "loss", "gradient", "1-cosine", "bias"))
    print(f"{'shape':{width}}  {'kind':12}  dtype  {'':8}  {heads}")
    for errors in found:
        numbers = "  ".join(f"{value:8.1e}" for value in (errors.x_t, errors.loss, errors.gradient, errors.cosine))
        said = f"  WORSE: {', '.join(errors.worse)}" if errors.worse else ""
        print(
            f"{_shown(errors.shape):{width}}  {errors.kind:12}  {errors.dtype:5}  {errors.who:8}  {numbers}  "
            f"{errors.bias:8.1e}{said}"
        )
    print(
        "fastdiff is as exact as eager steps, or more."
        if fine
        else "fastdiff is LESS exact than eager steps or rounding allow."
    )
    return fine


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _operands(shape: tuple[int, ...], dtype: str, device: torch.device, number: int = 0) -> tuple[Tensor, ...]:
    """x0, noise and the network's output in ``dtype``, and the times of step ``number``."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    data = (torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for _ in range(3))
    return *data, _times(shape[0])[number].to(device)


def _fused(shape: tuple[int, ...], kind: str, dtype: str, device: torch.device, number: int = 0) -> Errors:
    x0, _, output, t = _operands(shape, dtype, device, number)
    output.requires_grad_()
    flow = kind == "flow"
    process = RectifiedFlow() if flow else VariancePreserving()
    objective = Objective(process, kind, None if flow else MinSNR(eager.SNR_GAMMA))
    noised = objective.noise(x0, (t + 0.5) / 1000 if flow else t, seed=_SEED)
    loss = objective.loss(output, noised)
    (loss * _scale(dtype)).backward()
    return _errors(shape, kind, dtype, "fastdiff", x0, noised.noise, output, t, noised.x_t, loss)


def _eager(shape: tuple[int, ...], kind: str, dtype: str, device: torch.device, number: int = 0) -> Errors:
    x0, noise, output, t = _operands(shape, dtype, device, number)
    output.requires_grad_()
    if kind == "flow":
        sigma = (t + 0.5) / 1000
        x_t, loss = eager.noising_flow(x0, noise, sigma), eager.loss_flow(output, x0, noise, sigma)
    else:
        alpha_bar = _alpha_bar(torch.float32).to(device)
        x_t = eager.noising_ddpm(x0, noise, t, alpha_bar)
        of_kind = eager.loss_epsilon if kind == "epsilon" else eager.loss_v
        loss = of_kind(output, x0, noise, t, alpha_bar)
    (loss * _scale(dtype)).backward()
    return _errors(shape, kind, dtype, "eager", x0, noise, output, t, x_t, loss)


def _scale(dtype: str) -> float:
    """Of the loss, as for ``GradScaler`` at its start: gradients in float16 are too small without."""
    return 65536.0 if dtype == "fp16" else 1.0


def _alpha_bar(dtype: torch.dtype) -> Tensor:
    """Ho et al. 2020, section 4: beta from 1e-4 to 0.02 in 1,000 steps."""
    return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=dtype, device="cpu")).cumprod(0)


def _errors(
    shape: tuple[int, ...], kind: str, dtype: str, who: str,
    x0: Tensor, noise: Tensor, output: Tensor, t: Tensor, x_t: Tensor, loss: Tensor,
) -> Errors:  # fmt: skip
    """Of what a step gave, by the formulas in float64."""
    x0, noise, m, x_t = (tensor.detach().to("cpu", torch.float64) for tensor in (x0, noise, output, x_t))
    gradient = output.grad.to("cpu", torch.float64) / _scale(dtype)
    value, t = float(loss.detach()), t.cpu()
    if kind == "flow":
        sigma = eager.spread((t.double() + 0.5) / 1000, x0)
        alpha, target, weight = 1 - sigma, noise - x0, torch.ones_like(sigma)
    else:
        a = eager.spread(_alpha_bar(torch.float64)[t], x0)
        alpha, sigma, snr = a.sqrt(), (1 - a).sqrt(), a / (1 - a)
        clipped = snr.clamp(max=eager.SNR_GAMMA)
        if kind == "epsilon":
            target, weight = noise, clipped / snr
        else:
            target, weight = alpha * noise - sigma * x0, clipped / (snr + 1)
    e = m - target
    true_x_t, true_loss, true_gradient = alpha * x0 + sigma * noise, (weight * e * e).mean(), 2 * weight * e / e.numel()
    square = true_gradient.square().sum()
    along = (gradient * true_gradient).sum()
    return Errors(
        *(shape, kind, dtype, who),
        x_t=_largest(x_t, true_x_t),
        loss=abs(value / float(true_loss) - 1),
        gradient=_largest(gradient, true_gradient),
        cosine=max(0.0, 1 - float(along / (square * gradient.square().sum()).sqrt())),
        bias=float(along / square) - 1,
    )


def _largest(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).abs().max() / truth.square().mean().sqrt())


def _judged(fused: Errors, plain: Errors) -> Errors:
    """``fused`` with what is worse than ``plain``: by more than rounding to the dtype explains."""
    rounding = torch.finfo(DTYPES[fused.dtype]).eps
    allowed = {
        "x_t": 4 * rounding,  # half a unit of an element that is 8 times as large as the root mean square
        "loss": 4 * _ROUNDING,
        "gradient": 8 * rounding,  # an error and its weight are larger against their mean
        "cosine": rounding**2,
        "bias": 4 * _ROUNDING + 4 * rounding / math.sqrt(math.prod(fused.shape)),
    }
    numbers: dict[str, Any] = asdict(fused)
    worse = tuple(
        name
        for name, more in allowed.items()
        if not abs(numbers[name]) <= more + (0 if name == "loss" else abs(getattr(plain, name)))  # a NaN is worse too
    )
    return Errors(**numbers | {"worse": worse})
