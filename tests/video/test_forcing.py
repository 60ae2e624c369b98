"""Diffusion forcing: fused-SNR weights, schedules and sampling, against rewritings of the authors' code."""

import numpy as np
import oracle
import pytest
import torch
from accuracy import to_numpy
from oracle import assert_close

import fastdiff
from fastdiff import video

VP = fastdiff.VariancePreserving()
SCORES = fastdiff.Objective(fastdiff.VPSDE(), "score")
ABAR = oracle.alpha_bar(oracle.betas_linear(1000)).astype(np.float64)


def fused(snr, kind, gamma, decay):
    """Frame by frame, [F, B], as the authors do."""
    part, clipped = snr / gamma, np.minimum(snr, gamma) / gamma
    weights, average = np.empty_like(snr), None
    for f in range(len(snr)):
        known = 0 if average is None else decay * average
        average = clipped[f] if average is None else decay * average + (1 - decay) * clipped[f]
        with np.errstate(invalid="ignore"):
            c, s = (1 - (1 - known) * (1 - value) for value in (clipped[f], part[f]))
        weights[f] = {
            "sample": gamma * c,
            "epsilon": c / s,
            "v_prediction": gamma * c / (gamma * s + 1),
            "flow": gamma * c / (1 + np.sqrt(gamma * s)) ** 2,
        }[kind]
    return weights


@pytest.mark.parametrize("gamma, decay", [(5.0, 0.9), (2.0, 0.3)])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_fused_snr_of_the_authors(kind, gamma, decay):
    x0 = torch.randn(3, 7, 2, 4, 4)
    objective = fastdiff.Objective(VP, kind)
    t = torch.randint(0, 1000, (3, 7))
    t[0] = torch.tensor([999, 0, 3, 500, 999, 0, 1])
    noised = objective.noise(x0, t, seed=1)
    weight = video.fused_snr(noised, gamma, decay)
    assert weight.dtype == torch.float64 and weight.shape == (3, 7)
    snr = ABAR[t.numpy()] / (1 - ABAR[t.numpy()])
    assert_close(weight, fused(snr.T, kind, gamma, decay).T, rel=1e-9)
    m = torch.randn_like(x0)
    e2 = (to_numpy(m) - to_numpy(noised.target)) ** 2
    loss = (fused(snr.T, kind, gamma, decay).T.reshape(3, 7, 1, 1, 1) * e2).mean()
    assert_close(objective.loss(m, noised, weight=weight).double(), loss, rel=1e-5)


@pytest.mark.parametrize("frame_dim", [1, 2])
def test_fused_snr_of_a_flow(frame_dim):
    x0 = torch.randn(2, 5, 5, 4, 4)
    objective = video.RFLoss(per="frame", frame_dim=frame_dim)
    noised = objective.noise(x0, seed=3, clean=1)
    t = to_numpy(noised.t).reshape(2, 5)
    with np.errstate(divide="ignore"):
        right = fused((((1 - t) / t) ** 2).T, "flow", 5.0, 0.9).T
    right[:, 0] = 0  # clean
    weight = video.fused_snr(noised)
    assert weight.shape == noised.t.shape
    assert_close(weight.flatten(1), right, rel=1e-9)
    m = torch.randn_like(x0)
    e2 = np.moveaxis((to_numpy(m) - to_numpy(noised.target)) ** 2, frame_dim, 1)[:, 1:]
    loss = (right.reshape(2, 5, 1, 1, 1)[:, 1:] * e2).mean()
    assert_close(objective.loss(m, noised, weight=weight).double(), loss, rel=1e-5)


def test_fused_snr_of_frames_that_are_tokens():
    """A frame's weight does not depend on how many tokens it is."""
    x0 = torch.randn(2, 12, 3)
    objective = video.RFLoss(per="frame")
    noised = objective.noise(x0, seed=3, frames=4)
    t = to_numpy(noised.t)[:, ::3]
    right = fused((((1 - t) / t) ** 2).T, "flow", 5.0, 0.9).T
    weight = video.fused_snr(noised, frames=4)
    assert weight.shape == (2, 12)
    assert_close(weight, right.repeat(3, 1), rel=1e-9)


@pytest.mark.parametrize(
    "process, kind", [(VP, "epsilon"), (VP, "v_prediction"), (VP, "sample"), (fastdiff.RectifiedFlow(), "flow")]
)
def test_without_memory_it_is_min_snr(process, kind):
    x0 = torch.zeros(2, 4, 1)
    objective = fastdiff.Objective(process, kind, fastdiff.MinSNR(5.0))
    noised = objective.noise(x0, process.time(torch.rand(2, 4, dtype=torch.float64)), seed=1)
    assert_close(video.fused_snr(noised, decay=0.0, frames=4).float().double(), to_numpy(noised.weight), rel=2e-7)


def test_limits_of_fused_snr():
    """Of no signal: the limit; of no noise: 0 but for errors of x0."""
    zero = fastdiff.VariancePreserving(zero_terminal_snr=True)
    x0, t = torch.zeros(1, 3, 1), torch.tensor([[999, 999, 500]])
    for kind, first in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        objective = fastdiff.Objective(zero, kind)
        weight = video.fused_snr(objective.noise(x0, t, seed=1), frames=3)
        assert bool(weight.isfinite().all()) and float(weight[0, 0]) == first


def matrix(kind, steps, frames, uncertainty):
    """The authors' scheduling matrix, [rows, F]; a trapezoid that is the same from both ends."""
    if kind == "full_sequence":
        return np.arange(steps, -1, -1)[:, None].repeat(frames, axis=1) / steps
    late = [int(f * {"autoregressive": steps, "pyramid": uncertainty}.get(kind, 0)) for f in range(frames)]
    if kind == "trapezoid":
        late = [int(min(f, frames - 1 - f) * uncertainty) for f in range(frames)]
    rows = [[min(max(steps + late[f] - m, 0), steps) for f in range(frames)] for m in range(steps + max(late) + 1)]
    return np.array(rows) / steps


@pytest.mark.parametrize(
    "steps, frames, uncertainty", [(4, 3, 1.0), (5, 6, 1.7), (3, 1, 2.0), (4, 5, 0.0), (1, 4, 0.5)]
)
@pytest.mark.parametrize("kind", ["full_sequence", "autoregressive", "pyramid", "trapezoid"])
def test_schedules(kind, steps, frames, uncertainty):
    found = video.frame_schedule(kind, steps, frames, uncertainty=uncertainty)
    assert found.dtype == torch.float64
    assert np.array_equal(found.numpy(), matrix(kind, steps, frames, uncertainty))
    chunked = video.frame_schedule(kind, steps, frames, uncertainty=uncertainty, chunk=2).numpy()
    parts = [(first, matrix(kind, steps, min(2, frames - first), uncertainty)) for first in range(0, frames, 2)]
    done = 0
    for first, part in parts:
        rows = chunked[done : done + len(part)]
        assert np.array_equal(rows[:, first : first + part.shape[1]], part)
        assert (rows[:, :first] == 0).all() and (rows[:, first + part.shape[1] :] == 1).all()
        done += len(part) - 1
    assert done + 1 == len(chunked) and (chunked[-1] == 0).all()


def linear(x, t, dim):
    """A network of x and of each frame's time."""
    shape = [1] * x.ndim
    shape[0], shape[dim] = t.shape
    return 0.3 * x + t.reshape(shape) - 0.1


@pytest.mark.parametrize("frame_dim", [1, 2])
@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction", "sample"])
def test_sampling_is_ddim_with_a_level_for_each_frame(kind, frame_dim, backend):
    process = fastdiff.RectifiedFlow() if kind == "flow" else VP
    objective = video.RFLoss(frame_dim=frame_dim) if kind == "flow" else fastdiff.Objective(process, kind)
    shape = (2, 4, 4, 3, 3)
    schedule = video.frame_schedule("pyramid", 5, 4, uncertainty=1.5)[1 if kind == "epsilon" else 0 :]
    found = video.sample(
        lambda x, t: linear(x, t.float() / (1 if kind == "flow" else 1000), frame_dim),
        shape, objective, schedule, frame_dim=frame_dim, seed=9,
    )  # fmt: skip
    x = np.moveaxis(oracle.normal(9, shape, stream=4).astype(np.float64), frame_dim, 0)
    for now, then in zip(schedule.numpy(), schedule.numpy()[1:]):
        for f in range(4):
            if now[f] == then[f]:
                continue
            if kind == "flow":
                t, (a, s), (b, r) = now[f], (1 - now[f], now[f]), (1 - then[f], then[f])
            else:
                place = [round(level[f] * 1000) - 1 for level in (now, then)]
                (a, s), (b, r) = ((np.sqrt(ABAR[i]), np.sqrt(1 - ABAR[i])) if i >= 0 else (1, 0) for i in place)
                t = max(place[0], 0) / 1000
            m = 0.3 * x[f] + t - 0.1
            x0 = np.asarray(oracle.to_x0(kind, x[f], m, a, s), np.float64)
            x[f] = b * x0 + r * (x[f] - a * x0) / s
    assert_close(found.double(), np.moveaxis(x, 0, frame_dim), rel=1e-4, absolute=1e-4)


def test_history_and_what_has_not_begun_stay_as_they_are():
    x0, start = torch.randn(2, 1, 3, 6, 2, 2)
    objective = video.RFLoss(per="frame")
    schedule = video.frame_schedule("autoregressive", 3, 6)
    schedule[:, :2] = 0  # two frames of history
    seen = []

    def model(x, t):
        seen.append((x.clone(), t))
        return torch.full_like(x, 0.5)

    found = video.sample(model, x0.shape, objective, schedule, known=x0, x=start)
    assert torch.equal(found[:, :, :2], x0[:, :, :2])
    for (x, t), row in zip(seen, schedule):
        assert torch.equal(t, row.float().expand(1, -1))
        assert torch.equal(x[:, :, :2], x0[:, :, :2]) and torch.equal(x[:, :, row == 1], start[:, :, row == 1])
    torch.testing.assert_close(found[:, :, 2:], start[:, :, 2:] - 0.5)  # from 1 to 0 along the velocity


def test_seeds_and_dtypes_of_samples():
    objective, schedule = video.RFLoss(), video.frame_schedule("full_sequence", 2, 3)
    whole = video.sample(lambda x, t: 0 * x, (2, 1, 3, 2, 2), objective, schedule, seed=4)
    again = video.sample(lambda x, t: 0 * x, (1, 1, 3, 2, 2), objective, schedule, seed=4, sample_offset=1)
    assert torch.equal(whole[1:], again)
    narrow = video.sample(lambda x, t: 0 * x, (2, 1, 3, 2, 2), objective, schedule, seed=4, dtype=torch.bfloat16)
    assert torch.equal(narrow, whole.bfloat16())
    drawn = video.sample(
        lambda x, t: 0 * x, (2, 1, 3, 2, 2), objective, schedule, generator=torch.Generator().manual_seed(1)
    )
    assert not torch.equal(drawn, whole)


def test_ranks_draw_noise_of_their_own():
    """Without a seed each rank counts its samples from a place of its own, as Objective.noise does."""
    how = (1, 1, 3, 2, 2), video.RFLoss(), video.frame_schedule("full_sequence", 2, 3)

    def drawn():
        given = {"generator": torch.Generator().manual_seed(1)}
        return video.sample(lambda x, t: 0 * x, *how, **given), video.frame_noise(torch.zeros(how[0]), **given)

    alone = drawn()
    try:
        fastdiff.distributed.data_parallel((0, 2))
        first = drawn()
        fastdiff.distributed.data_parallel((1, 2))
        second = drawn()
        seeded = video.sample(lambda x, t: 0 * x, *how, seed=4)
    finally:
        fastdiff.distributed.data_parallel(None)
    for own, of_first, of_second in zip(alone, first, second):
        assert torch.equal(own, of_first) and not torch.equal(own, of_second)
    assert torch.equal(seeded, video.sample(lambda x, t: 0 * x, *how, seed=4))


@pytest.mark.parametrize(
    "dtype, wide",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_model_is_told_the_time_of_training(dtype, wide):
    told, schedule = [], video.frame_schedule("pyramid", 7, 3)

    def model(x, t):
        told.append(t)
        return 0 * x

    video.sample(model, (1, 1, 3, 2, 2), video.RFLoss(), schedule, seed=4, dtype=dtype)
    for t, row in zip(told, schedule):
        assert t.dtype == wide
        torch.testing.assert_close(t, row.to(wide)[None], rtol=1e-15 if wide == torch.float64 else 0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_frames_that_stay_are_left_whatever_the_network_says(value):
    x0 = torch.randn(2, 1, 3, 2, 2)
    schedule = video.frame_schedule("full_sequence", 2, 3)
    schedule[:, 0] = 0

    def model(x, t):
        return torch.where((t == 0).view(2, 1, 3, 1, 1), value, torch.zeros_like(x))

    found = video.sample(model, x0.shape, video.RFLoss(), schedule, known=x0, seed=1)
    assert torch.equal(found[:, :, 0], x0[:, :, 0]) and bool(found.isfinite().all())


OF_TOKENS = video.RFLoss(per="token").noise(torch.zeros(2, 6, 2), seed=1)


def drawing(**changed):
    how = {"shape": (1, 1, 3, 2, 2), "schedule": video.frame_schedule("pyramid", 2, 3), "objective": video.RFLoss()}
    return lambda: video.sample(changed.pop("model", lambda x, t: x), **how | changed)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (drawing(schedule=torch.rand(4, 2)), ValueError, r"schedule must be \[rows, 3\], of at least two rows"),
        (drawing(schedule=torch.tensor([[0.5] * 3, [0.6] * 3])), ValueError, "do not rise from a row to the next"),
        (drawing(schedule=torch.tensor([[1.5] * 3, [0.6] * 3])), ValueError, r"fractions in \[0, 1\]"),
        (drawing(schedule=torch.tensor([[0.0, 1, 1], [0, 0, 0]])), ValueError, "pass known=, the data that they hold"),
        (drawing(known=torch.zeros(2)), ValueError, "known must have the shape of the samples"),
        (drawing(frame_dim=7), ValueError, "frame_dim must be a dimension of"),
        (drawing(seed=1, generator=torch.Generator()), ValueError, "a generator or a seed, not both"),
        (drawing(model=lambda x, t: x[:, :, :1]), ValueError, "the model's output"),
        (drawing(objective=fastdiff.Objective(fastdiff.EDM(), "edm")), ValueError, "EDM's t is sigma"),
        (drawing(objective=fastdiff.Objective(fastdiff.VariancePreserving(zero_terminal_snr=True), "epsilon")),
         ValueError, "does not determine x0 where the schedule begins"),
        (lambda: video.frame_schedule("pyramids", 2, 3), ValueError, r"did you mean 'pyramid'\?"),
        (lambda: video.frame_schedule("pyramid", 0, 3), ValueError, "steps must be a whole number of at least 1"),
        (lambda: video.frame_schedule("pyramid", 2, 3, chunk=0), ValueError, "chunk must be a whole number"),
        (lambda: video.frame_schedule("pyramid", 2, 3, uncertainty=-1), ValueError, "uncertainty must be at least 0"),
        (lambda: video.fused_snr(video.RFLoss().noise(torch.zeros(1, 1, 2, 2, 2))), ValueError, "a time for each fr"),
        (lambda: video.fused_snr(OF_TOKENS), ValueError, "pass frames=, how many frames the tokens are; got None"),
        (lambda: video.fused_snr(OF_TOKENS, frames=4), ValueError, "how many frames the tokens are; got 4"),
        (lambda: video.fused_snr(OF_TOKENS, frames=3), ValueError, "the tokens of a frame must share a time"),
        (lambda: video.fused_snr(video.RFLoss(per="frame").noise(torch.zeros(1, 1, 2, 2, 2)), frames=2),
         ValueError, "a video has its frames in its shape"),
        (lambda: video.fused_snr(video.RFLoss().noise(torch.zeros(6, 2), torch.rand(6), lengths=[2, 4])),
         ValueError, "fused SNR takes a batch"),
        (lambda: video.fused_snr(None, gamma=0.0), ValueError, "gamma must be positive"),
        (lambda: video.fused_snr(None, decay=1.0), ValueError, r"decay must lie in \[0, 1\); got 1.0"),
        (lambda: video.fused_snr(SCORES.noise(torch.zeros(1, 2, 2), torch.rand(1, 2)), frames=2),
         ValueError, "fused SNR is of errors of 'sample'"),
    ],
)  # fmt: skip
def test_wrong_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
