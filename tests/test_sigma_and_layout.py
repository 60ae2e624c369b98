"""Noise levels given as sigma, what goes by sigma in place of the time before a flow's shift, and data whose channels
are not dimension 1."""

import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import losses, timesteps, video, weighting
from fastdiff.integrations.losses_per_timestep import TimestepLosses
from fastdiff.tabulated import TabulatedFlow

SIGMA = torch.tensor([0.1, 0.45, 0.98], dtype=torch.float64)
SHAPE = (3, 2, 4, 4)


def unshifted(sigma, shift):
    return sigma / (shift - (shift - 1) * sigma)


def data():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=g) for _ in range(3)]


# ---------------------------------------------------------------------------------------------------- sigma in the hand


@pytest.mark.parametrize(
    "process",
    [
        fastdiff.RectifiedFlow(),
        fastdiff.RectifiedFlow(shift=3.0),
        fastdiff.RectifiedFlow(shift=0.4),
        fastdiff.RectifiedFlow(shift=2.0, sigma_min=0.01),
        fastdiff.EDM(),
        fastdiff.VPSDE(),
        fastdiff.SubVPSDE(),
        fastdiff.VESDE(),
        fastdiff.Cosine(),
        fastdiff.TrigFlow(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("form", ["tensor", "float32", "list", "frames"])
def test_noise_at_a_sigma(backend, process, form):
    """The factor of the noise for a flow, sigma / alpha for the others."""
    x0, n, _ = data()
    kind = {"RectifiedFlow": "flow", "EDM": "edm"}.get(type(process).__name__, "score")
    objective = fastdiff.Objective(process, kind)
    given = {
        "tensor": SIGMA, "float32": SIGMA.float(), "list": SIGMA.tolist(), "frames": torch.stack([SIGMA, SIGMA], 1)
    }[form]  # fmt: skip
    noised = objective.noise(x0, noise=n, sigma=given)
    sigma = SIGMA.float().double() if form == "float32" else SIGMA
    assert noised.t.shape == ((3, 2) if form == "frames" else (3,))
    levels = process.levels(noised.t)
    found = levels.sigma if isinstance(process, fastdiff.RectifiedFlow) else levels.sigma / levels.alpha
    torch.testing.assert_close(found, sigma[:, None].expand(3, 2) if form == "frames" else sigma, rtol=1e-12, atol=0)
    rows = [row.reshape(3, -1, 1, 1) for row in (levels.alpha, levels.sigma)]
    torch.testing.assert_close(noised.x_t.double(), rows[0] * x0 + rows[1] * n, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 1.1, 0.3])
def test_both_ends_are_sigmas(shift):
    process = fastdiff.RectifiedFlow(shift=shift)
    assert process.time_of([0.0, 1.0]).tolist() == [0.0, 1.0]


def test_a_given_sigma_is_not_shifted_again():
    """What the network is told is what was given; as t it would be another."""
    x0, n, _ = data()
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(shift=3.0), "flow")
    torch.testing.assert_close(objective.noise(x0, noise=n, sigma=SIGMA).model_time, SIGMA.float())
    assert (objective.noise(x0, SIGMA, n).model_time - SIGMA).abs().max() > 0.2


def test_gradients_of_a_sigma():
    x0, n, p = (tensor.double() for tensor in data())
    sigma = SIGMA.clone().requires_grad_()
    noised = fastdiff.Objective(fastdiff.RectifiedFlow(shift=3.0), "flow").noise(x0, noise=n, sigma=sigma)
    (noised.x_t * p).sum().backward()
    torch.testing.assert_close(sigma.grad, ((n - x0) * p).sum((1, 2, 3)))


@pytest.mark.parametrize("data_at", [0, 1])
def test_a_shift_of_one_a_sample(data_at):
    """By the number of tokens of each: as three processes, each with its own shift, would noise them."""
    x0, n, p = data()
    t, shift = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), video.shifts.flux(torch.tensor([256, 1024, 4096]))
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(data_at=data_at), "flow")
    noised = objective.noise(x0, sigma=video.shifts.shifted(t, shift), noise=n)
    assert noised.sigma.diff().min() > 0.1
    for k in range(3):
        one = fastdiff.Objective(fastdiff.RectifiedFlow(shift=math.exp((0.5, 0.63, 1.15)[k])), "flow")
        alone = one.noise(x0[k : k + 1], t[k : k + 1], n[k : k + 1])
        torch.testing.assert_close(noised.x_t[k : k + 1], alone.x_t, rtol=1e-5, atol=1e-5)


def test_a_strength_of_each_step():
    """Set anew, it is that of the next batch; of a strength of 0 nothing is drawn."""
    x0, t = data()[0], torch.tensor([3, 500, 998])
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    plain = objective.noise(x0, t, seed=1).noise
    xi = objective.noise(x0, t, seed=1).x_t
    for strength in (0.3, 0.05, 0.0):
        objective.noise_offset = strength
        again = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon", noise_offset=strength)
        offset = objective.noise(x0, t, seed=1).noise - plain
        torch.testing.assert_close(objective.noise(x0, t, seed=1).x_t, again.noise(x0, t, seed=1).x_t, rtol=0, atol=0)
        assert offset.std((2, 3)).max() < 1e-6 and (offset.abs().max() > strength / 10 or strength == 0)
        objective.input_perturbation = strength
        seen = objective.noise(x0, t, seed=1)
        torch.testing.assert_close(seen.noise, plain + offset)
        assert (not torch.equal(seen.x_t, again.noise(x0, t, seed=1).x_t)) == (strength > 0)
        objective.input_perturbation = 0.0
    assert torch.equal(objective.noise(x0, t, seed=1).x_t, xi)


# ------------------------------------------------------------------------------------------------------------- by sigma


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("c", [0.1, 0.7])
def test_a_constant_by_sigma(backend, shift, c):
    x0, n, p = data()
    loss = losses.PseudoHuber(c, schedule="exponential", by="sigma")
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(shift=shift), "flow", loss=loss)
    found = objective.loss(p, objective.noise(x0, unshifted(SIGMA, shift), n), reduction="none")
    error = (p - (n - x0)).double()
    rows = (c**SIGMA).view(3, 1, 1, 1)
    right = ((error**2 + rows**2).sqrt() - rows).mean((1, 2, 3))
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=0)
    if shift != 1:
        other = fastdiff.Objective(
            fastdiff.RectifiedFlow(shift=shift), "flow", loss=losses.PseudoHuber(c, schedule="exponential")
        )
        assert (other.loss(p, other.noise(x0, unshifted(SIGMA, shift), n), reduction="none") - found).abs().max() > 1e-3


def bell_table(steps=1000):
    """As trainers tabulate it."""
    y = np.exp(-2 * ((np.arange(steps) - steps / 2) / steps) ** 2)
    y -= y.min()
    return y * steps / y.sum()


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_bell_on_a_flow(shift):
    """Of the sigma, as trainers look it up at 1000 sigma; or of the time before the shift."""
    flow, table = fastdiff.RectifiedFlow(shift=shift), bell_table()
    at = torch.tensor([0.25, 0.5, 0.8], dtype=torch.float64)
    right = torch.from_numpy(table[(at * 1000).long().numpy()])
    by_sigma = fastdiff.Objective(flow, "flow", weighting.Bell(by="sigma"))
    x0 = data()[0].double()
    torch.testing.assert_close(by_sigma.noise(x0, unshifted(at, shift)).weight, right, rtol=1e-3, atol=0)
    by_time = fastdiff.Objective(flow, "flow", weighting.Bell())
    torch.testing.assert_close(by_time.noise(x0, at).weight, right, rtol=1e-3, atol=0)
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert weighting.evaluate(weighting.Bell(), flow.levels(u), "flow").mean() == pytest.approx(1, abs=1e-8)


def test_a_bell_of_a_table_of_sigmas():
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2], dtype=torch.float64)
    flow = TabulatedFlow(sigmas, sigmas)
    found = weighting.evaluate(weighting.Bell(by="sigma"), flow.levels([1, 2, 3]), "flow")
    right = torch.from_numpy(bell_table()[[800, 500, 200]])
    torch.testing.assert_close(found, right, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("low, high", [(0.2, 0.8), (0.0, 1.0), (0.5, 0.6)])
def test_uniform_sigmas(shift, low, high):
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    flow = fastdiff.RectifiedFlow(shift=shift)
    t = timesteps.Uniform(low, high, by="sigma")(u, flow)
    torch.testing.assert_close(flow.levels(t).sigma, low + (high - low) * u, rtol=1e-12, atol=0)
    objective = fastdiff.Objective(flow, "flow", timesteps=timesteps.Uniform(low, high, by="sigma"))
    told = objective.noise(torch.zeros(2000, 1), seed=3).model_time
    assert low <= told.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < told.max() <= high
    assert told.mean() == pytest.approx((low + high) / 2, abs=4 * (high - low) / math.sqrt(12 * 2000))


def test_losses_by_sigma():
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(shift=3.0), "flow")
    noised = objective.noise(data()[0], noise=data()[1], sigma=[0.15, 0.45, 0.98])
    rows = torch.tensor([1.0, 2.0, 4.0])
    for by, names in (("sigma", (0.1, 0.4, 0.9)), ("fraction", (0.0, 0.2, 0.9))):
        kept = TimestepLosses(10, by=by)
        kept.update(noised, rows)
        name = "sigma" if by == "sigma" else "t"
        assert kept.compute() == {f"loss/{name}_{at:.2f}-{at + 0.1:.2f}": row for at, row in zip(names, (1, 2, 4))}


# ----------------------------------------------------------------------------------------------- where the channels are


@pytest.mark.parametrize(
    ("shape", "dim", "same"),
    [((2, 96, 8), 2, 1), ((2, 96, 8), -1, 1), ((2, 5, 3, 4, 4), 2, 2), ((2, 8, 8, 3), 3, 3), ((2, 8, 96), 1, 1)],
)
@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_offsets_along_the_channels(backend, shape, dim, same, strength):
    """One normal a (sample, channel), whatever the layout: those of channels at dimension 1."""
    flow, t, x0 = fastdiff.RectifiedFlow(), torch.tensor([0.25, 0.5]), torch.zeros(shape)
    channels = shape[dim]
    plain = fastdiff.Objective(flow, "flow").noise(x0, t, seed=3).noise
    objective = fastdiff.Objective(flow, "flow", noise_offset=strength, noise_offset_dim=dim)
    noised = objective.noise(x0, t, seed=3, keep_noise=False)
    found = ((noised.noise - plain) / strength).movedim(dim, 1).flatten(2)
    assert found.std(2).max() < 1e-5
    first = fastdiff.Objective(flow, "flow", noise_offset=1.0), torch.zeros(2, channels, 4)
    offsets = (
        first[0].noise(first[1], t, seed=3).noise - fastdiff.Objective(flow, "flow").noise(first[1], t, seed=3).noise
    )
    torch.testing.assert_close(found.mean(2), offsets.mean(2), rtol=0, atol=1e-5)
    right = t.view(2, *(1,) * (len(shape) - 1)) * noised.noise
    torch.testing.assert_close(noised.x_t, right, rtol=1e-6, atol=1e-6)
    half = objective.noise(x0[1:], t[1:], seed=3, sample_offset=1)
    assert torch.equal(half.x_t, noised.x_t[1:])


def test_a_time_a_frame_where_it_is_clear():
    """[batch, frames] fits frames before the channels; with as many channels as frames all dimensions are needed."""
    flow, t = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow"), torch.rand(2, 3)
    for channels in (2, 3, 4):
        x0 = torch.randn(2, 3, channels, 4, 4)
        n = torch.randn_like(x0)
        expected = (1 - t).view(2, 3, 1, 1, 1) * x0 + t.view(2, 3, 1, 1, 1) * n
        torch.testing.assert_close(flow.noise(x0, t.view(2, 3, 1, 1, 1), n).x_t, expected)
        if channels != 3:
            torch.testing.assert_close(flow.noise(x0, t, n).x_t, expected)
    tokens = torch.randn(2, 3, 3)
    flow.noise(tokens, t)  # as many channels as tokens: rows are leading dimensions
    flow.noise(torch.randn(2, 1, 1, 4, 4), torch.rand(2, 1))  # one: it is the same
