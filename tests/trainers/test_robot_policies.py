"""docs/trainers/robot_policies.md against the arithmetic of lerobot and diffusion_policy."""

import pytest
import torch
from common import DTYPES, blocks, compare, needs_pages, options, run, tensors

diffusers = pytest.importorskip("diffusers")
pytestmark = needs_pages
PAGE, SHAPE = "robot_policies.md", (6, 16, 7)
TIMESTEPS = torch.tensor([0, 1, 30, 62, 98, 99])


def scheduler_of(kind):
    return diffusers.DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type=kind)


def noised_by(scheduler, x0, noise):
    kept = scheduler.alphas_cumprod.to(x0.dtype)
    a, s = ((part**0.5)[TIMESTEPS].view(-1, 1, 1) for part in (kept, 1 - kept))
    return a * x0 + s * noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_lerobots_diffusion_policy(kind, padding, dtype):
    actions, eps, prediction = tensors(dtype, SHAPE)
    prediction = actions + 0.3 * prediction if kind == "sample" else prediction
    batch = {"action_is_pad": torch.arange(16) > torch.tensor([16, 3, 7, 0, 12, 9])[:, None]}
    scheduler = scheduler_of("epsilon")  # lerobot's config decides, not the scheduler's

    def lines(m, single, actions, eps):
        x_t = noised_by(scheduler, actions, eps)
        loss = (m - (eps if kind == "epsilon" else actions)) ** 2
        if not padding:
            return {"x_t": x_t, "loss": loss.mean()}
        mask = ~batch["action_is_pad"].unsqueeze(-1)
        return {"x_t": x_t, "loss": (loss * mask).sum() / (mask.sum() * loss.shape[-1]).clamp_min(1)}

    config = options(prediction_type=kind, do_mask_loss_for_padding=padding)
    model = options(noise_scheduler=scheduler, config=config)
    run(PAGE, "lerobot's diffusion policy: once", dict(self=model, config=config))
    names = dict(self=model, batch=batch, trajectory=actions, timesteps=TIMESTEPS, eps=eps, global_cond=None)

    def recipe(m):
        def unet(x_t, timesteps, global_cond):
            assert timesteps is TIMESTEPS
            return m

        model.unet = unet
        found = run(PAGE, "lerobot's diffusion policy: a step", dict(names))
        return {"x_t": found["noised"].x_t, "loss": found["loss"]}

    theirs, ours = compare(lines, recipe, prediction, actions=actions, eps=eps)
    if dtype == torch.float32:
        assert torch.equal(theirs["x_t"], ours["x_t"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pi0(dtype):
    actions, noise, prediction = tensors(dtype, SHAPE)
    time = torch.tensor([0.001, 0.2, 0.4, 0.66, 0.9, 1.0])

    def lines(m, single, actions, noise, time):
        t = time[:, None, None]
        x_t, u_t = (t * noise + (1 - t) * actions).to(actions.dtype), noise - actions
        return {"x_t": x_t, "u_t": u_t, "loss": ((u_t - m) ** 2)[:, :, :5].mean()}

    names = run(PAGE, "lerobot's pi0 and pi0.5", dict(actions=actions, noise=noise, time=time))

    def recipe(m):
        return {"x_t": names["x_t"], "u_t": names["u_t"], "loss": ((names["u_t"] - m) ** 2)[:, :, :5].mean()}

    compare(lines, recipe, prediction, actions=actions, noise=noise, time=time)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_diffusion_policy(kind, dtype):
    trajectory, noise, prediction = tensors(dtype, SHAPE)
    prediction = trajectory + 0.3 * prediction if kind == "sample" else prediction
    scheduler, condition = scheduler_of(kind), torch.zeros(SHAPE, dtype=torch.bool)
    condition[:, :2, 3:] = True

    def lines(m, single, trajectory, noise):
        x_t = noised_by(scheduler, trajectory, noise)
        x_t[condition] = trajectory[condition]
        loss = (m - (noise if kind == "epsilon" else trajectory)) ** 2 * (~condition).to(m.dtype)
        return {"x_t": x_t, "loss": loss.flatten(1).mean(1).mean()}

    policy = options()
    run(PAGE, "diffusion_policy: once", dict(self=policy, noise_scheduler=scheduler))
    before, after = (code for heading, code in blocks(PAGE) if heading == "diffusion_policy: a step")
    names = dict(self=policy, trajectory=trajectory, timesteps=TIMESTEPS, noise=noise, loss_mask=~condition)

    def recipe(m):
        exec(before, names)
        names["noisy_trajectory"][condition] = trajectory[condition]
        names["pred"] = m
        exec(after, names)
        return {"x_t": names["noisy_trajectory"], "loss": names["loss"]}

    theirs, ours = compare(lines, recipe, prediction, trajectory=trajectory, noise=noise)
    if dtype == torch.float32:
        assert torch.equal(theirs["x_t"], ours["x_t"])
