"""What the training scripts of the diffusers library compute between the latents and ``backward``, in two calls::

    script = training_scripts.text_to_image_sdxl(noise_scheduler, snr_gamma=5.0)
    noised = script.noise(latents)                                       # noise, timesteps and add_noise
    prediction = unet(noised.model_input, noised.model_time, ...).sample
    loss = script.loss(prediction, noised)                               # target, weights, error and mean

One function a script, named after it. With the same generator the draws are the script's, number for number; with
``own_noise=True`` the noise is made in the kernel from one seed instead, which saves drawing and storing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops, torch_randn
from .. import weighting as weightings
from ..from_scheduler import (
    config_value,
    edm_table,
    flow_table,
    kind_of,
    prediction_of,
    vp_process,
)
from ..losses import Loss
from ..noised import Noised
from ..objective import Objective
from ..ops.checks import check_floating, compute_dtype
from ..prediction import SAMPLE, Prediction
from ..prediction import get as prediction_kind
from ..tensors import cached, gather_rows
from ..weighting import SNR, MinSNR, SigmaSqrt, WeightingLike

__all__ = [
    "TrainingScript",
    "cogvideox",
    "compute_density_for_timestep_sampling",
    "compute_loss_weighting_for_sd3",
    "compute_snr",
    "dreambooth",
    "dreambooth_sdxl",
    "flux",
    "sd3",
    "text_to_image",
    "text_to_image_sdxl",
    "unconditional",
]

# (batch size, device, generator) -> indices into the scheduler's tables, int64 [batch].
DrawTimes = Callable[[int, torch.device, "torch.Generator | None"], Tensor]


class TrainingScript:
    """A script's arithmetic around its network. Made by the functions of this module.

    Args:
        objective: process, prediction, weighting and error.
        draw_times: how timesteps are drawn when they are not given.
        noise_offset, input_perturbation: as in ``Objective``, drawn as the scripts draw them.
        prior_loss_weight: not None: the second half of a batch are class images (prior preservation), and the loss is
            the mean over the first half plus this times the mean over the second.
        prior_weighting: whether the weighting of the objective holds for the second half too.
        own_noise: make the noise from a seed instead of drawing a tensor of it.
    """

    def __init__(
        self,
        objective: Objective,
        draw_times: DrawTimes,
        *,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
        prior_loss_weight: float | None = None,
        prior_weighting: bool = True,
        own_noise: bool = False,
    ):
        for name, value in (("noise_offset", noise_offset), ("input_perturbation", input_perturbation)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0; got {value!r}.")
        if prior_loss_weight is not None and not prior_loss_weight >= 0:
            raise ValueError(f"prior_loss_weight must be at least 0, or None; got {prior_loss_weight!r}.")
        if own_noise:
            objective.noise_offset, objective.input_perturbation = float(noise_offset), float(input_perturbation)
        self.weighting, self._tables = None, {}
        if prior_loss_weight is not None and not prior_weighting:
            # The weights of the first half multiply rows of an unweighted objective.
            self.weighting, objective = objective.weighting, _unweighted(objective)
        self.objective, self.draw_times = objective, draw_times
        self.noise_offset, self.input_perturbation = float(noise_offset), float(input_perturbation)
        self.prior_loss_weight, self.own_noise = prior_loss_weight, own_noise

    def __repr__(self) -> str:
        return f"TrainingScript({self.objective!r})"

    def noise(
        self,
        x0: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Noised:
        """Noise the latents.

        Args:
            x0: latents [batch, ...], floating point.
            t: indices into the scheduler's table of timesteps, int64 [batch]; None draws them as the script does.
            noise: shaped as x0, used as it is (no offset is added); None draws it.
            generator: for all draws; None: PyTorch's default one.

        Returns a ``Noised``: ``x_t``, ``model_input`` (x_t, or scaled for the network), ``model_time`` (the scheduler's
        timesteps), ``t``, ``noise``, ``target``. Raises TypeError or ValueError for unfit inputs.
        """
        check_floating(x0=x0)
        if x0.ndim < 2:
            raise ValueError(f"latents must be [batch, ...]; got shape {tuple(x0.shape)}.")
        if self.own_noise:
            if t is None:
                t = self.draw_times(len(x0), x0.device, generator)
            return self.objective.noise(x0, t, noise, generator)
        if noise is None:
            noise = torch_randn.randn_like(x0, generator=generator)
            if self.noise_offset:
                shape = (*x0.shape[:2], *(1,) * (x0.ndim - 2))
                noise += self.noise_offset * torch.randn(shape, device=x0.device, generator=generator)
        xi = torch_randn.randn_like(x0, generator=generator) if self.input_perturbation else None
        if t is None:
            t = self.draw_times(len(x0), x0.device, generator)
        if xi is None:
            return self.objective.noise(x0, t, noise)
        rows, t = self.objective._rows_at(t, x0, compute_dtype(x0, noise))
        x_t, noise = ops.noise(
            x0, rows.alpha, rows.sigma, noise, perturbation=self.input_perturbation, perturbation_noise=xi
        )
        return Noised(self.objective, x0, x_t, t, noise, rows)

    def loss(self, prediction: Tensor, noised: Noised, reduction: str = "mean") -> Tensor:
        """The script's loss of the network's output, float32; arguments as in ``Objective.loss``.

        Raises ValueError for a batch that prior preservation cannot halve.
        """
        weight = None if self.prior_loss_weight is None else self._halves(noised)
        return self.objective.loss(prediction, noised, reduction=reduction, weight=weight)

    def loss_and_gradient(
        self, prediction: Tensor, noised: Noised, scale: Tensor | float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The script's loss, and the gradient of scale * loss by the network's output, in one pass: see
        ``Objective.loss_and_gradient``.

        ``prediction.backward(gradient)`` stands in place of ``accelerator.backward(loss)``, and ``scale`` is what that
        multiplies the loss by: one over ``accelerator.gradient_accumulation_steps``, and with fp16
        ``accelerator.scaler.scale`` of that as a tensor. Not with DeepSpeed, whose engine calls backward itself.
        """
        weight = None if self.prior_loss_weight is None else self._halves(noised)
        return self.objective.loss_and_gradient(prediction, noised, scale, weight=weight)

    def _halves(self, noised: Noised) -> Tensor:
        """What the mean over the batch is weighted with to be (mean of the first half) + w (mean of the second)."""
        batch = len(noised.x0)
        if batch % 2:
            raise ValueError(
                f"prior preservation needs as many class images as instance images; got a batch of {batch}."
            )
        t = noised.t
        half = (batch // 2, *t.shape[1:])  # of the shape of t, which may be one a frame
        first = torch.full(half, 2.0, dtype=torch.float32, device=t.device)
        second = torch.full(half, 2.0 * self.prior_loss_weight, dtype=torch.float32, device=t.device)
        if self.weighting is not None:
            first = first * self._weights_of(t[: batch // 2])
        return torch.cat([first, second])

    def _weights_of(self, t: Tensor) -> Tensor:
        def make() -> Tensor:
            process = self.objective.process
            levels = process.levels(torch.arange(process.steps, device="cpu"))
            table = weightings.evaluate(self.weighting, levels, self.objective.error_space)
            return table.to(t.device, torch.float32).unsqueeze(-1)

        return gather_rows(cached(self._tables, t.device, make), t).squeeze(-1)


def _unweighted(objective: Objective) -> Objective:
    return Objective(
        objective.process,
        objective.prediction,
        loss=objective.loss_function,
        timesteps=objective.timesteps,
        error_space=objective.error_space,
        noise_offset=objective.noise_offset,
        input_perturbation=objective.input_perturbation,
    )


def text_to_image(
    scheduler: Any,
    *,
    prediction_type: str | None = None,
    snr_gamma: float | None = None,
    snr_form: str = "paper",
    noise_offset: float = 0.0,
    input_perturbation: float = 0.0,
    loss: str | Loss = "mse",
    own_noise: bool = False,
) -> TrainingScript:
    """train_text_to_image(_lora), train_controlnet and their kin: Stable Diffusion 1.5 and 2.

    Args:
        scheduler: one with ``alphas_cumprod``.
        prediction_type: "epsilon", "v_prediction" or "sample"; None: the scheduler's.
        snr_gamma, snr_form: min-SNR weights: "paper" min(S, g)/S for epsilon, /(S + 1) for v, as this script has it;
            "plus_one" min(S, g)/S + 1 for v, as some others have it; "shifted" min(S + 1, g)/(S + 1) for v; "epsilon"
            min(g/S, 1) for v.
        noise_offset, input_perturbation: as the options of that name.
        loss: another error than MSE; ``losses.PseudoHuber(c, form="scaled", schedule="snr")`` is scheduled Huber's.
        own_noise: see the module.

    Raises TypeError for an unfit scheduler, ValueError for unknown options.
    """
    return _vp_script(
        scheduler, prediction_type, snr_gamma, snr_form, loss,
        noise_offset=noise_offset, input_perturbation=input_perturbation, own_noise=own_noise,
    )  # fmt: skip


def text_to_image_sdxl(
    scheduler: Any,
    *,
    prediction_type: str | None = None,
    snr_gamma: float | None = None,
    snr_form: str = "paper",
    noise_offset: float = 0.0,
    loss: str | Loss = "mse",
    own_noise: bool = False,
) -> TrainingScript:
    """train_text_to_image_sdxl and train_text_to_image_lora_sdxl. Arguments as in ``text_to_image``.

    "sample" is what that script does: noise is subtracted from the output before it is compared with x0, so the network
    learns x0 + noise, and min-SNR weights are min(S, g). Biased timesteps: draw t yourself, ``script.noise(x0, t)``.
    """
    weighting = None
    found = prediction_kind(prediction_type or config_value(scheduler, "prediction_type", "epsilon"))
    if found is SAMPLE:
        if snr_gamma is not None:
            MinSNR(snr_gamma)  # checks it
            gamma, snr_gamma = snr_gamma, None

            def weighting(levels):
                return levels.snr.clamp(max=gamma)

        prediction_type = _SAMPLE_PLUS_NOISE
    return _vp_script(
        scheduler, prediction_type, snr_gamma, snr_form, loss, weighting=weighting,
        noise_offset=noise_offset, own_noise=own_noise,
    )  # fmt: skip


_SAMPLE_PLUS_NOISE = Prediction(
    "sample_plus_noise", lambda levels: (torch.ones_like(levels.alpha), torch.ones_like(levels.alpha))
)


def unconditional(scheduler: Any, *, own_noise: bool = False) -> TrainingScript:
    """train_unconditional: images of a scheduler with ``alphas_cumprod``, epsilon or "sample" as the scheduler says.

    The error of "sample" is weighted with the SNR alpha_bar / (1 - alpha_bar) of its timestep, which makes it that of
    the noise (Salimans and Ho 2022, section 4). Raises ValueError for another prediction type, as the script does, and
    TypeError for an unfit scheduler.
    """
    kind = config_value(scheduler, "prediction_type", "epsilon")
    weighting = SNR() if kind == "sample" else None
    script = _vp_script(scheduler, None, None, "paper", "mse", weighting=weighting, own_noise=own_noise)
    if kind not in ("epsilon", "sample"):
        raise ValueError(
            f"train_unconditional trains prediction_type epsilon or sample; the scheduler's is {kind!r}, for which use "
            f"text_to_image(scheduler)."
        )
    return script


def dreambooth(
    scheduler: Any,
    *,
    snr_gamma: float | None = None,
    offset_noise: bool = False,
    prior_loss_weight: float | None = None,
    own_noise: bool = False,
) -> TrainingScript:
    """train_dreambooth: ``text_to_image`` with prior preservation.

    ``offset_noise`` has the strength 0.1. With ``prior_loss_weight`` the second half of a batch are class images, which
    min-SNR weights leave out.
    """
    return _vp_script(
        scheduler, None, snr_gamma, "paper", "mse", noise_offset=0.1 if offset_noise else 0.0,
        prior_loss_weight=prior_loss_weight, prior_weighting=False, own_noise=own_noise,
    )  # fmt: skip


def dreambooth_sdxl(
    scheduler: Any,
    *,
    snr_gamma: float | None = None,
    edm_style: bool = False,
    prior_loss_weight: float | None = None,
    own_noise: bool = False,
) -> TrainingScript:
    """train_dreambooth_lora_sdxl: min-SNR for v is min(S, g)/S + 1; ``edm_style`` is its ``--do_edm_style_training``.

    In EDM style the network's output is preconditioned and compared with x0: at the sigmas of an EDM scheduler
    unweighted, at those of an Euler scheduler with sigma^-2. Min-SNR weights do not go with it (ValueError).
    """
    if not edm_style:
        return _vp_script(
            scheduler, None, snr_gamma, "plus_one", "mse",
            prior_loss_weight=prior_loss_weight, prior_weighting=False, own_noise=own_noise,
        )  # fmt: skip
    if snr_gamma is not None:
        raise ValueError("min-SNR weights are not defined for EDM-style training: leave snr_gamma out.")
    process = edm_table(scheduler)
    if kind_of(scheduler) == "edm":
        prediction, weighting = prediction_of(scheduler), None
    else:
        name = config_value(scheduler, "prediction_type", "epsilon")
        if name not in ("epsilon", "v_prediction"):
            raise ValueError(f"EDM-style training needs prediction_type epsilon or v_prediction; got {name!r}.")
        prediction, weighting = _scaled_input(name), SigmaSqrt()
    objective = Objective(process, prediction, weighting, timesteps="uniform", error_space="sample")
    return TrainingScript(
        objective, _uniform_on_host(process.steps), prior_loss_weight=prior_loss_weight, own_noise=own_noise
    )


def _scaled_input(name: str) -> Prediction:
    """The kind of that name, for a network that is given x_t / sqrt(sigma^2 + 1)."""
    kind = prediction_kind(name)
    return Prediction(
        name,
        kind.coefficients,
        kind.uses_x0,
        kind.uses_noise,
        lambda levels: ((levels.sigma**2 + 1) ** -0.5, levels.process.model_time(levels)),
    )


def sd3(
    scheduler: Any,
    *,
    weighting_scheme: str = "logit_normal",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    precondition_outputs: bool = True,
    prior_loss_weight: float | None = None,
    own_noise: bool = False,
) -> TrainingScript:
    """train_dreambooth_sd3, train_dreambooth_lora_sd3, train_controlnet_sd3.

    Args:
        scheduler: a flow-matching one, as it is before ``set_timesteps``.
        weighting_scheme: "logit_normal" and "mode" are densities of t, "sigma_sqrt" and "cosmap" weights of the loss,
            "none" neither.
        logit_mean, logit_std, mode_scale: of the densities.
        precondition_outputs: compare x_t - sigma m with x0 instead of m with n - x0. False for scripts that do not,
            such as Sana's; ``noised.model_time`` is the timesteps themselves.
        prior_loss_weight, own_noise: see ``TrainingScript``.
    """
    return _flow_script(
        scheduler, weighting_scheme, logit_mean, logit_std, mode_scale, "sample" if precondition_outputs else None,
        prior_loss_weight, own_noise, 1.0,
    )  # fmt: skip


def flux(
    scheduler: Any,
    *,
    weighting_scheme: str = "none",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    prior_loss_weight: float | None = None,
    own_noise: bool = False,
) -> TrainingScript:
    """train_dreambooth_flux and train_dreambooth_lora_flux, and scripts whose network is given the same (Qwen-Image).

    Arguments as in ``sd3``. ``noised.model_time`` is timesteps / 1000, as the networks of Flux and Qwen-Image are given
    it. Sana's is given the timesteps themselves (923, not 0.923): for it use
    ``sd3(scheduler, weighting_scheme="none", precondition_outputs=False)``.
    """
    return _flow_script(
        scheduler, weighting_scheme, logit_mean, logit_std, mode_scale, None, prior_loss_weight, own_noise, 1e-3
    )


def cogvideox(scheduler: Any, *, own_noise: bool = False) -> TrainingScript:
    """train_cogvideox_lora: v is predicted, its x0 is compared with x0 and weighted with 1 / (1 - alpha_bar).

    Latents are [batch, frames, channels, height, width].
    """
    process = vp_process(scheduler)
    objective = Objective(process, "v_prediction", SigmaSqrt(), error_space="sample")
    return TrainingScript(objective, _uniform_on_device(process.steps), own_noise=own_noise)


def compute_snr(scheduler: Any, timesteps: Tensor) -> Tensor:
    """alpha_bar / (1 - alpha_bar) of a scheduler at integer ``timesteps``: float32, of their shape and device.

    The arguments and numbers (to rounding) of ``diffusers.training_utils.compute_snr``.
    """
    process = vp_process(scheduler)
    process.check_t(timesteps)
    alpha, sigma = process.alpha_sigma(timesteps)
    return ((alpha / sigma) ** 2).float()


def compute_density_for_timestep_sampling(
    weighting_scheme: str,
    batch_size: int,
    logit_mean: float | None = None,
    logit_std: float | None = None,
    mode_scale: float | None = None,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The densities of the SD3 scripts (Esser et al. 2024, section 3.1): float32 [batch_size] in [0, 1).

    The arguments and draws of the function of that name in ``diffusers.training_utils``. 1 itself, which the rounding
    of both densities can give and which indexes past the end of a schedule, becomes the float32 below it.
    """
    if weighting_scheme == "logit_normal":
        if logit_mean is None or logit_std is None:
            raise ValueError("logit_normal needs logit_mean and logit_std, 0.0 and 1.0 for example.")
        u = torch.normal(logit_mean, logit_std, (batch_size,), device=device, generator=generator).sigmoid()
    else:
        u = torch.rand((batch_size,), device=device, generator=generator)
        if weighting_scheme == "mode":
            if mode_scale is None:
                raise ValueError("mode needs mode_scale, 1.29 for example.")
            u = 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u.clamp(0, 1 - 2**-24)


def compute_loss_weighting_for_sd3(weighting_scheme: str, sigmas: Tensor) -> Tensor:
    """The loss weights of the SD3 scripts: sigma^-2 ("sigma_sqrt"), "cosmap", or 1; float32 of the shape of ``sigmas``.

    The arguments of the function of that name in ``diffusers.training_utils``. Computed in float32 or better whatever
    the dtype of ``sigmas``: in float16 sigma^-2 is infinite below 0.0039.
    """
    check_floating(sigmas=sigmas)
    wide = sigmas if sigmas.dtype == torch.float64 else sigmas.float()
    if weighting_scheme == "sigma_sqrt":
        return (wide**-2).float()
    if weighting_scheme == "cosmap":
        return (2 / (math.pi * (1 - 2 * wide + 2 * wide**2))).float()
    return torch.ones_like(wide, dtype=torch.float32)


def _vp_script(scheduler, prediction_type, snr_gamma, snr_form, loss, *, weighting=None, **options) -> TrainingScript:
    if kind_of(scheduler) != "vp":
        raise TypeError(
            f"this script needs a scheduler with alphas_cumprod (DDPMScheduler); got {type(scheduler).__name__}. "
            f"For flow matching use sd3 or flux, for EDM schedulers dreambooth_sdxl(edm_style=True)."
        )
    process = vp_process(scheduler)
    if not isinstance(prediction_type, Prediction):
        prediction_type = prediction_of(scheduler, prediction_type)
    if snr_gamma is not None:
        weighting = MinSNR(float(snr_gamma), snr_form)
    objective = Objective(process, prediction_type, weighting, loss)
    return TrainingScript(objective, _uniform_on_device(process.steps), **options)


_FLOW_WEIGHTS: dict[str, WeightingLike] = {"sigma_sqrt": "sigma_sqrt", "cosmap": "cosmap"}


def _flow_script(
    scheduler, scheme, logit_mean, logit_std, mode_scale, error_space, prior_loss_weight, own_noise, time_scale
) -> TrainingScript:
    if scheme not in ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none"):
        raise ValueError(f"weighting_scheme must be sigma_sqrt, logit_normal, mode, cosmap or none; got {scheme!r}.")
    process = flow_table(scheduler, time_scale)
    objective = Objective(process, "flow", _FLOW_WEIGHTS.get(scheme), error_space=error_space)

    def draw(batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        where = "cpu" if generator is None else generator.device
        u = compute_density_for_timestep_sampling(
            scheme, batch, logit_mean, logit_std, mode_scale, device=where, generator=generator
        )
        return (u * process.steps).long().to(device, non_blocking=True)

    return TrainingScript(objective, draw, prior_loss_weight=prior_loss_weight, own_noise=own_noise)


def _uniform_on_device(steps: int) -> DrawTimes:
    return lambda batch, device, generator: torch.randint(0, steps, (batch,), device=device, generator=generator)


def _uniform_on_host(steps: int) -> DrawTimes:
    def draw(batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        where = "cpu" if generator is None else generator.device
        return torch.randint(0, steps, (batch,), device=where, generator=generator).to(device, non_blocking=True)

    return draw
