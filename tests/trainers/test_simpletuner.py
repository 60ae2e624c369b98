"""docs/trainers/simpletuner.md against the arithmetic of SimpleTuner."""

import enum
import math
import random

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, blocks, compare, needs_pages, options, run, tensors

diffusers = pytest.importorskip("diffusers")
pytestmark = needs_pages
PAGE = "simpletuner.md"


class PredictionTypes(enum.Enum):
    EPSILON, V_PREDICTION, FLOW_MATCHING = "epsilon", "v_prediction", "flow_matching"


class ModelFoundation:
    """What the recipe asks of a model."""

    def __init__(self, kind, config, direction=1.0, zero_snr=False, scheduler_kind=None):
        self.PREDICTION_TYPE, self.config, self.direction = PredictionTypes(kind), config, direction
        if kind == "flow_matching":
            self.noise_schedule = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        else:
            self.noise_schedule = diffusers.DDPMScheduler(
                1000, 0.00085, 0.012, "scaled_linear",
                prediction_type=scheduler_kind or kind, rescale_betas_zero_snr=zero_snr,
            )  # fmt: skip

    def flow_matching_target_direction(self):
        return self.direction

    def get_prediction_target(self):
        raise NotImplementedError


CONFIG = dict(snr_gamma=None, snr_weight=1.0, loss_type="l2", huber_c=0.1, huber_schedule="constant")
CONFIG |= dict(masked_loss_probability=1.0)
CASES = {
    "epsilon": ("epsilon", dict(snr_weight=0.3)),
    "epsilon, min-SNR": ("epsilon", dict(snr_gamma=5.0)),
    "v, min-SNR": ("v_prediction", dict(snr_gamma=5.0)),
    "v, min-SNR, zero terminal": ("v_prediction", dict(snr_gamma=5.0, zero=True)),
    "v, min-SNR by an epsilon scheduler": ("v_prediction", dict(snr_gamma=2.0, scheduler="epsilon")),
    "epsilon, huber by snr": ("epsilon", dict(loss_type="huber", huber_schedule="snr", snr_weight=0.3)),
    "v, smooth l1, exponential, min-SNR": (
        "v_prediction",
        dict(loss_type="smooth_l1", huber_schedule="exponential", snr_gamma=5.0),
    ),
    "epsilon, mask": ("epsilon", dict(mask="mask")),
    "flow": ("flow_matching", {}),
    "flow, segmentation": ("flow_matching", dict(mask="segmentation", legacy=True)),
    "flow, dataward": ("flow_matching", dict(direction=-1.0)),
    "flow, huber": ("flow_matching", dict(loss_type="huber", huber_c=0.4)),
    "flow, smooth l1, exponential": ("flow_matching", dict(loss_type="smooth_l1", huber_schedule="exponential")),
}


def of(case):
    kind, given = CASES[case][0], dict(CASES[case][1])
    kept = {name: given.pop(name, None) for name in ("mask", "legacy", "zero", "scheduler", "direction")}
    model = ModelFoundation(
        kind, options(**CONFIG | given), kept["direction"] or 1.0, bool(kept["zero"]), kept["scheduler"]
    )
    return model, kept["mask"], kept["legacy"]


def scheduled(config, timesteps, kept, single):
    """c of each sample."""
    if config.huber_schedule == "exponential":
        return torch.exp(math.log(config.huber_c) / 1000 * timesteps.to(single))
    if config.huber_schedule == "snr":
        return (1 - config.huber_c) / (1 + ((1 - kept) / kept) ** 0.5) ** 2 + config.huber_c
    return torch.full_like(timesteps, config.huber_c, dtype=single)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_losses(case, dtype):
    model, mask_kind, legacy = of(case)
    config, flow = model.config, model.PREDICTION_TYPE is PredictionTypes.FLOW_MATCHING
    latents, noise, prediction = tensors(dtype)
    prediction = prediction * model.direction
    input_noise = noise + (0.1 * torch.randn(noise.shape)).to(dtype)
    sigmas = torch.tensor([0.02, 0.25, 0.5, 0.61, 0.9, 0.999])
    timesteps = sigmas * 1000 if flow else torch.tensor([0, 20, 300, 620, 998, 999])
    pixels = torch.randn(6, 3, 64, 64).clamp(-1, 1) * (torch.rand(6, 1, 1, 1) > 0.3)
    if mask_kind == "segmentation":
        pixels = torch.where(torch.rand(6, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3) > 0.5, 1.0, -1.0)
        pixels = pixels.expand(6, 3, 64, 64)

    def lines(m, single, latents, noise, input_noise, sigmas, timesteps, pixels):
        if flow:
            grid = sigmas.view(-1, 1, 1, 1).to(latents.dtype)
            x_t, target = (1 - grid) * latents + grid * input_noise, model.direction * (noise - latents)
            kept, weights = None, None
        else:
            table = model.noise_schedule.alphas_cumprod.to(single)
            a, s = ((part**0.5)[timesteps].view(-1, 1, 1, 1) for part in (table, 1 - table))
            x_t = (a * latents.to(single) + s * input_noise.to(single)).to(latents.dtype)
            target, kept = noise, table[timesteps]
            if model.PREDICTION_TYPE is PredictionTypes.V_PREDICTION:
                low = model.noise_schedule.alphas_cumprod.to(latents.dtype)
                target = (low**0.5)[timesteps].view(-1, 1, 1, 1) * noise
                target = target - ((1 - low) ** 0.5)[timesteps].view(-1, 1, 1, 1) * latents
            snr = ((table**0.5)[timesteps] / ((1 - table) ** 0.5)[timesteps]) ** 2
            divisor = snr + 1 if model.noise_schedule.config.prediction_type == "v_prediction" else snr
            weights = snr.clamp(max=config.snr_gamma) / divisor if config.snr_gamma else None
        error = m.to(single) - target.to(single)
        if config.loss_type == "l2":
            loss = error**2
            loss = loss * config.snr_weight if weights is None and not flow else loss
        else:
            c = scheduled(config, timesteps, kept, single).view(-1, 1, 1, 1)
            root = torch.sqrt(error**2 + c**2) - c
            loss = 2 * c * root if config.loss_type == "huber" else 2 * root
        if weights is not None:
            loss = loss * weights.view(-1, 1, 1, 1)
        if mask_kind == "mask":
            loss = loss * (F.interpolate(pixels[:, :1].to(single), loss.shape[2:], mode="area") / 2 + 0.5)
        elif mask_kind == "segmentation":
            mean = pixels.to(single).sum(1, keepdim=True) / 3
            loss = loss * (F.interpolate(mean, loss.shape[2:], mode="area") / 2 + 0.5 > 0).to(single)
        return {"x_t": x_t, "loss": loss.mean((1, 2, 3)).mean()}

    names = run(
        PAGE, "Once", dict(PredictionTypes=PredictionTypes, ModelFoundation=ModelFoundation, F=F, random=random)
    )
    batch = dict(latents=latents, noise=noise, timesteps=timesteps, input_noise=input_noise)
    batch |= {"conditioning_type" if legacy else "loss_mask_type": mask_kind, "conditioning_pixel_values": pixels}
    names |= dict(self=model, prepared_batch=batch, batch=batch, apply_conditioning_mask=True)
    names |= dict(latents=latents, input_noise=input_noise, interpolation_sigmas=sigmas)
    config.weight_dtype = dtype
    diffusion, flowing = (code for heading, code in blocks(PAGE) if heading == "x_t")

    def recipe(m):
        exec(flowing if flow else diffusion, names)
        found = run(PAGE, "The loss", names | {"model_output": {"model_prediction": m}})
        return {"x_t": batch["noisy_latents"], "loss": found["fused"]}

    given = dict(latents=latents, noise=noise, input_noise=input_noise, sigmas=sigmas)
    theirs, ours = compare(lines, recipe, prediction, timesteps=timesteps, pixels=pixels, **given)
    if dtype == torch.float32 and not flow:
        assert torch.equal(theirs["x_t"], ours["x_t"])


def test_what_stays_on_the_trainers_code():
    names = run(
        PAGE, "Once", dict(PredictionTypes=PredictionTypes, ModelFoundation=ModelFoundation, F=F, random=random)
    )
    latents, noise, prediction = tensors(torch.float32)
    batch = dict(latents=latents, noise=noise, timesteps=torch.rand(6) * 1000)

    class Own(ModelFoundation):
        def get_prediction_target(self):
            pass

    def left(model, **more):
        return names["fused_loss"](model, batch | more, prediction, True) is None

    flow = options(**CONFIG)
    assert not left(ModelFoundation("flow_matching", flow))
    assert left(ModelFoundation("flow_matching", flow), target=noise)
    assert left(ModelFoundation("flow_matching", flow), timesteps=torch.rand(6, 16))
    assert left(Own("flow_matching", flow))
    assert left(ModelFoundation("flow_matching", options(**CONFIG | dict(loss_type="huber", huber_schedule="snr"))))
    assert left(ModelFoundation("flow_matching", options(**CONFIG, scheduled_sampling_reflexflow=True)))
    assert left(ModelFoundation("epsilon", options(**CONFIG, diff2flow_loss=True)), timesteps=torch.arange(6))


def test_a_segmentation_mask_is_drawn_as_there():
    """One draw of ``random`` a batch, and none without such a mask."""
    model, *_ = of("flow")
    model.config.masked_loss_probability = 0.5
    names = run(
        PAGE, "Once", dict(PredictionTypes=PredictionTypes, ModelFoundation=ModelFoundation, F=F, random=random)
    )
    latents, noise, prediction = tensors(torch.float32)
    pixels = torch.where(torch.arange(64).view(1, 1, 1, 64) < 32, 1.0, -1.0).expand(6, 3, 64, 64)
    batch = dict(latents=latents, noise=noise, timesteps=torch.rand(6) * 1000, conditioning_pixel_values=pixels)
    error = (prediction - (noise - latents)) ** 2
    whole, half = error.mean(), error[..., :4].sum() / error.numel()
    for kind, expected in ((None, None), ("segmentation", [half, whole])):
        random.seed(1)
        draws = [random.random() < 0.5 for _ in range(6)]
        assert {True, False} == set(draws)
        random.seed(1)
        for masked in draws:
            loss = names["fused_loss"](model, batch | {"loss_mask_type": kind}, prediction, True)
            torch.testing.assert_close(loss, whole if kind is None else expected[not masked], rtol=2e-6, atol=0)
        assert (random.getstate() == random.Random(1).getstate()) == (kind is None)
