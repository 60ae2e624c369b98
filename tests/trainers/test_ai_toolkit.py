"""docs/trainers/ai_toolkit.md against the arithmetic of ai-toolkit."""

import pytest
import torch
import torch.nn.functional as F
from common import DTYPES, blocks, compare, needs_pages, options, run, tensors

pytestmark = needs_pages
PAGE = "ai_toolkit.md"
TRAIN = dict(loss_type="mse", do_prior_divergence=False, train_turbo=False, weighted=None, gamma=None, fixed=False)
TRAIN |= dict(t0=False, mask=False, shape=(6, 4, 8, 8))
CASES = {
    "mse": {},
    "mae": dict(loss_type="mae"),
    "pseudo-huber": dict(loss_type="pseudo_huber"),
    "mse, mask": dict(mask=True),
    "mse, video, mask": dict(mask=True, shape=(6, 4, 3, 8, 8)),
    "pseudo-huber, mask, bell": dict(loss_type="pseudo_huber", mask=True, weighted="bell"),
    "mse, half bell, video": dict(weighted="half bell", shape=(6, 4, 3, 8, 8)),
    "min-SNR": dict(gamma=5.0),
    "fixed SNR, mae": dict(gamma=5.0, fixed=True, loss_type="mae"),
    "x0, as a velocity": dict(t0=True),
}


def scaled_mask(latents):
    """[batch, channels, height, width], 1 on average."""
    mask = F.interpolate((torch.rand(6, 1, 32, 32) > 0.3).half(), latents.shape[-2:])
    mask = mask.expand(-1, latents.shape[1], -1, -1).to(latents.dtype)
    return mask / mask.mean()


def rest(config, loss, mask, steps, snr, multipliers, scale):
    """What ``calculate_loss`` does with the errors."""
    loss = loss * scale
    if config.weighted:
        x = torch.arange(1000, dtype=loss.dtype)
        y = torch.exp(-2 * ((x - 500) / 1000) ** 2)
        weights = (y - y.min()) * (1000 / (y - y.min()).sum())
        if config.weighted == "half bell":
            weights[500:] = weights[500:].max()
        loss = loss * weights[steps].view(-1, *(1,) * (loss.ndim - 1))
    if loss.ndim == 5:
        mask = mask.unsqueeze(2).repeat(1, 1, config.shape[2], 1, 1)
    loss = (loss * mask).flatten(1).mean(1) * multipliers
    if config.gamma:
        ratio = config.gamma / snr
        loss = loss * (ratio if config.fixed else ratio.clamp(max=1))
    return loss.mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_losses(case, dtype):
    config = options(**TRAIN | CASES[case])
    latents, noise, prediction = tensors(dtype, config.shape)
    steps = torch.tensor([3, 150, 420, 500, 770, 990])
    timesteps = torch.linspace(1000, 1, 1000)[steps]
    snr, multipliers = torch.logspace(2, -3, 6), torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 0.25])
    mask = scaled_mask(latents) if config.mask else torch.ones(6, 1, 1, 1, dtype=dtype)
    batch = options(mask_tensor=mask if config.mask else None)

    def target_of(m, latents, noise, timesteps):
        """(prediction, target, scale, x_t) as the trainer makes them."""
        t = (timesteps / 1000).view(-1, *(1,) * (latents.ndim - 1))
        x_t = (1 - t) * latents + t * noise  # in float32, as t has dimensions
        if not config.t0:
            return m, noise - latents, 1.0, x_t
        t = t.to(m.dtype)
        return x_t - t * m, latents, 1 / t.clamp(min=0.1) ** 2, x_t

    def lines(m, single, latents, noise, timesteps, mask, snr, multipliers):
        pred, target, scale, x_t = target_of(m, latents, noise, timesteps)
        e = pred.to(single) - target.to(single)
        if config.loss_type == "mse":
            loss = e**2
        else:
            loss = e.abs() if config.loss_type == "mae" else torch.sqrt(e**2 + 0.01**2) - 0.01
        return {"x_t": x_t, "loss": rest(config, loss, mask, steps, snr, multipliers, scale)}

    once, noising = (code for heading, code in blocks(PAGE) if heading == "x_t")
    names = dict(torch=torch, self=options(train_config=config, is_flow_matching=True), batch=batch)
    names |= dict(original_samples=latents, noise=noise, timesteps=timesteps)
    exec(once, run(PAGE, "Once", names))

    def recipe(m):
        exec(noising, names)
        pred, target, scale, _ = target_of(m, latents, noise, timesteps)
        found = run(PAGE, "The loss", names | dict(pred=pred, target=target, mask_multiplier=mask))
        assert found["loss"].shape == (6, *(1,) * (latents.ndim - 1))
        loss = rest(config, found["loss"], found["mask_multiplier"], steps, snr, multipliers, scale)
        return {"x_t": names["noisy_latents"], "loss": loss}

    given = dict(latents=latents, noise=noise, timesteps=timesteps, mask=mask, snr=snr, multipliers=multipliers)
    theirs, ours = compare(lines, recipe, prediction, **given)
    assert theirs["x_t"].dtype == ours["x_t"].dtype == torch.float32


@pytest.mark.parametrize("left", [dict(loss_type="wavelet"), dict(do_prior_divergence=True), dict(train_turbo=True)])
def test_what_stays_on_the_trainers_code(left):
    """The mask is not touched, and there is no loss: the trainer's ``elif`` goes on."""
    config, mask = options(**TRAIN | left), torch.rand(6, 4, 8, 8)
    names = dict(self=options(train_config=config), batch=options(mask_tensor=mask), mask_multiplier=mask)
    names |= dict(pred=mask, target=mask)
    found = run(PAGE, "The loss", run(PAGE, "Once", names))
    assert "loss" not in found and found["mask_multiplier"] is mask


def test_one_time_for_a_batch():
    """As the trainer has it where all samples share a timestep."""
    latents, noise, _ = tensors(torch.float32)
    once, noising = (code for heading, code in blocks(PAGE) if heading == "x_t")
    names = dict(torch=torch, self=options(is_flow_matching=True), original_samples=latents, noise=noise)
    names["timesteps"] = torch.tensor([250])
    exec(once + noising, names)
    torch.testing.assert_close(names["noisy_latents"], 0.75 * latents + 0.25 * noise)
