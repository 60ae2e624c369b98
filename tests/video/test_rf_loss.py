"""video.RFLoss against NumPy: times of samples, frames and tokens, shifts, frames kept clean, what divides."""

import copy
import pickle

import numpy as np
import oracle
import pytest
import torch
from accuracy import assert_rounded, to_numpy
from oracle import assert_close

import fastdiff
from fastdiff import losses, video
from fastdiff.video import shifts

B, C, F, H, W = 2, 3, 5, 4, 6
VIDEO, FIRST, TOKENS = (B, C, F, H, W), (B, F, C, H, W), (B, 10, 7)
SEED = 11
# of what is drawn, by per and by frame_dim (None: tokens): the shape of t, and how many of a sample are drawn
ROWS = {
    ("sample", 2): ((B,), 1),
    ("sample", 1): ((B,), 1),
    ("sample", None): ((B,), 1),
    ("frame", 2): ((B, 1, F, 1, 1), F),
    ("frame", 1): ((B, F, 1, 1, 1), F),
    ("token", None): ((B, 10), 10),
}


def batch(frame_dim, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = {2: VIDEO, 1: FIRST, None: TOKENS}[frame_dim]
    return torch.randn(shape, generator=g).to(dtype), torch.randn(shape, generator=g).to(dtype)


def spread(rows, like):
    """Rows as they broadcast to the data."""
    rows = np.asarray(rows, np.float64)
    return rows.reshape(*rows.shape, *(1,) * (like.ndim - rows.ndim))


def truth(x0, n, m, sigma, weight=1.0, left=1.0):
    """float64 (x_t, loss, gradient): the mean over what is left of w (m - (n - x0))^2."""
    x0, n, m = map(to_numpy, (x0, n, m))
    left = np.broadcast_to(left, m.shape).astype(np.float64)
    e = m - (n - x0)
    count = left.sum()
    return (1 - sigma) * x0 + sigma * n, (weight * left * e**2).sum() / count, 2 * weight * left * e / count, e


def check(objective, noised, m, sigma, weight=1.0, left=1.0):
    m = m.clone().requires_grad_()
    loss = objective.loss(m, noised)
    loss.backward()
    x_t, expected, gradient, e = truth(noised.x0, noised.noise, m, sigma, weight, left)
    x0, n = to_numpy(noised.x0), to_numpy(noised.noise)
    assert_rounded(noised.x_t, x_t, np.abs(x0) + np.abs(n))
    assert_close(loss.detach().double(), expected, rel=1e-6)
    size = np.abs(to_numpy(m)) + np.abs(x0) + np.abs(n)
    assert_rounded(m.grad, gradient, np.abs(weight) * 2 * left * size / np.broadcast_to(left, e.shape).sum(), 8)
    return m.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("per, frame_dim", list(ROWS))
def test_drawn_times_loss_and_gradient(per, frame_dim, dtype, backend):
    """Each row has the uniform of its place in its sample, through the logit-normal and the shift."""
    x0, m = batch(frame_dim, dtype)
    objective = video.RFLoss(per=per, shift=3.0, frame_dim=frame_dim or 2, timesteps="logit_normal")
    noised = objective.noise(x0, seed=SEED, sample_offset=4)
    shape, count = ROWS[per, frame_dim]
    u = oracle.uniforms(SEED, B, count, stream=3, sample_offset=4)
    t = np.asarray(oracle.flow_shift(oracle.quantile_logit_normal(u), 3.0), np.float64).reshape(shape)
    assert noised.t.shape == shape and noised.t.dtype == torch.float64
    assert_close(noised.t, t, rel=1e-12)
    assert_close(noised.model_time.double(), t, rel=1e-7)
    expected = oracle.normal(SEED, x0.shape, sample_offset=4)
    assert np.array_equal(to_numpy(noised.noise), expected.astype(np.float64))
    check(objective, noised, m, spread(to_numpy(noised.t), x0))


@pytest.mark.parametrize("per, frame_dim", list(ROWS))
def test_given_times_are_levels_and_are_not_shifted(per, frame_dim, backend):
    x0, m = batch(frame_dim)
    shape, count = ROWS[per, frame_dim]
    t = torch.rand((B, count) if count > 1 else (B,), dtype=torch.float64)
    objective = video.RFLoss(frame_dim=frame_dim or 2, shift=5.0)
    noised = objective.noise(x0, t, seed=SEED)
    assert noised.t.shape == shape
    check(objective, noised, m, spread(t.numpy().reshape(shape), x0))
    for again in (objective.noise(x0, noised.t, seed=SEED), objective.noise(x0, sigma=t, seed=SEED)):
        assert torch.equal(again.x_t, noised.x_t) and torch.equal(again.t, noised.t)
    assert torch.equal(objective.noise(x0, 0.25, seed=SEED).t, torch.full((B,), 0.25, dtype=torch.float64))


def test_as_many_frames_as_channels(backend):
    """[B, F] is frames here, where an Objective cannot tell."""
    x0, m = torch.randn(2, B, F, F, H, W)
    t = torch.rand(B, F, dtype=torch.float64)
    for frame_dim, shape in ((2, (B, 1, F, 1, 1)), (1, (B, F, 1, 1, 1))):
        objective = video.RFLoss(frame_dim=frame_dim)
        check(objective, objective.noise(x0, t, seed=SEED), m, t.view(shape).numpy())


def test_large_video_whose_frames_fill_no_vectors(backend):
    """60 x 90 latents: rows begin in the middle of a cache line, and results go past the caches."""
    if backend == "triton":
        pytest.skip("the interpreter takes a minute for so many elements, and has no caches")
    g = torch.Generator().manual_seed(0)
    objective = video.RFLoss()
    for dtype in (torch.float32, torch.bfloat16):
        x0, n, m = (torch.randn(1, 16, 33, 60, 90, generator=g).to(dtype) for _ in range(3))
        t = torch.rand(1, 33, dtype=torch.float64, generator=g)
        check(objective, objective.noise(x0, t, n), m, t.view(1, 1, 33, 1, 1).numpy())


def test_uniforms_of_frames_do_not_depend_on_how_many_there_are():
    x0 = batch(2)[0]
    objective = video.RFLoss(per="frame")
    whole = objective.noise(x0, seed=SEED).t
    assert torch.equal(objective.noise(x0[:, :, :3], seed=SEED).t, whole[:, :, :3])
    assert torch.equal(objective.noise(x0[1:], seed=SEED, sample_offset=1).t, whole[1:])
    ids = torch.tensor([1, 0])
    assert torch.equal(objective.noise(x0, seed=SEED, ids=ids).t, whole[ids])
    objective.per = "sample"
    assert torch.equal(objective.noise(x0, seed=SEED).t, whole[:, 0, 0, 0, 0])


@pytest.mark.parametrize("timesteps", ["uniform", "mode", "cosmap", "stratified", fastdiff.timesteps.Uniform(0.2, 0.6)])
def test_the_sampler_draws_each_frame(timesteps, backend):
    objective = video.RFLoss(per="frame", timesteps=timesteps)
    u = oracle.uniforms(SEED, B, F, stream=3)
    expected = {
        "uniform": oracle.quantile_uniform,
        "mode": oracle.quantile_mode,
        "cosmap": oracle.quantile_cosmap,
        "stratified": lambda u: np.stack([oracle.stratify(column) for column in u.T], 1),
    }.get(timesteps, lambda u: oracle.quantile_uniform(u, 0.2, 0.6))(u)
    found = objective.noise(batch(2)[0], seed=SEED).t.flatten(1)
    assert_close(found, np.asarray(expected, np.float64), rel=1e-12, absolute=1e-15)


# ---------------------------------------------------------------------------------------------------------------- clean

BEFORE = np.arange(F) < 2  # the first two frames
LATER = np.array([[0, 1, 0, 0, 1], [0, 0, 0, 0, 1]], bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per", ["sample", "frame"])
@pytest.mark.parametrize("frame_dim", [2, 1])
@pytest.mark.parametrize("clean", [2, BEFORE, LATER], ids=["two", "mask", "of each"])
def test_clean_frames(per, frame_dim, clean, dtype, backend):
    x0, m = batch(frame_dim, dtype)
    objective = video.RFLoss(per=per, frame_dim=frame_dim)
    given = clean if isinstance(clean, int) else torch.from_numpy(clean)
    noised = objective.noise(x0, seed=SEED, clean=given)
    shape = ROWS["frame", frame_dim][0]
    kept = np.broadcast_to(BEFORE if isinstance(clean, int) else clean, (B, F)).reshape(shape)
    u = oracle.uniforms(SEED, B, F, stream=3)
    t = np.where(kept, 0, (u if per == "frame" else np.repeat(u[:, :1], F, 1)).reshape(shape))
    assert noised.t.shape == noised.clean.shape == shape and np.array_equal(noised.clean.numpy(), kept)
    assert_close(noised.t, t, rel=1e-12)
    everywhere = torch.from_numpy(np.broadcast_to(kept, x0.shape).copy())
    assert torch.equal(noised.x_t[everywhere], x0[everywhere])
    m[everywhere] = torch.nan  # left out, whatever it holds
    gradient = check(objective, noised, torch.where(everywhere, 0.0, m), t, left=~kept)
    m.requires_grad_()
    loss = objective.loss(m, noised)
    loss.backward()
    assert torch.equal(m.grad, gradient) and bool((m.grad[everywhere] == 0).all())
    assert torch.equal(loss, objective.loss(torch.where(everywhere, 0.0, m.detach()), noised))


@pytest.mark.parametrize("per", ["sample", "frame", "token"])
def test_clean_tokens_and_frames_of_tokens(per, backend):
    x0, m = batch(None)
    objective = video.RFLoss(per=per)
    noised = objective.noise(x0, seed=SEED, clean=1, frames=5)
    kept = np.repeat(np.arange(5) < 1, 2)
    u = oracle.uniforms(SEED, B, 10, stream=3)
    t = {"sample": np.repeat(u[:, :1], 10, 1), "frame": np.repeat(u[:, :5], 2, 1), "token": u}[per]
    assert noised.t.shape == noised.clean.shape == (B, 10)
    check(objective, noised, m, spread(np.where(kept, 0, t), x0), left=spread(np.broadcast_to(~kept, (B, 10)), x0))
    mask = torch.rand(B, 10) < 0.5
    noised = objective.noise(x0, seed=SEED, clean=mask, frames=5)
    left = spread(~mask.numpy(), x0)
    check(objective, noised, m, spread(np.where(mask.numpy(), 0, t), x0), left=left)


@pytest.mark.parametrize("whole", [True, False])
def test_times_and_a_mask_of_frames_that_are_tokens(whole):
    """Five frames of two tokens each; or the part of them that begins with the fourth token."""
    x0, m = batch(None)
    t, mask = torch.rand(B, 5, dtype=torch.float64), torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 1, 0]]).bool()
    part = None if whole else fastdiff.distributed.Part(TOKENS, (0, 3, 0))
    of = slice(0 if whole else 3, 10)
    sigma, kept = (np.repeat(rows.numpy(), 2, 1)[:, of] for rows in (t, mask))
    noised = video.RFLoss().noise(x0[:, of], t, seed=SEED, frames=5, part=part)
    np.testing.assert_array_equal(noised.t, sigma)
    for clean, rows in ((mask, kept), (mask[1], np.repeat(kept[1:], B, 0))):
        noised = video.RFLoss().noise(x0[:, of], t, seed=SEED, frames=5, clean=clean, part=part)
        np.testing.assert_array_equal(noised.t, np.where(rows, 0, sigma))
        np.testing.assert_array_equal(noised.clean, rows)


def test_what_divides(backend):
    """docs/video.md: "global", "sample", "row" and "none", with a mask of elements besides."""
    x0, m = batch(2)
    objective = video.RFLoss(per="frame")
    noised = objective.noise(x0, seed=SEED, clean=torch.from_numpy(LATER))
    e2 = truth(x0, noised.noise, m, 0.5)[3] ** 2
    mask = torch.rand(B, 1, F, H, W) < 0.7
    for given, seen in ((None, np.ones(VIDEO)), (mask, np.broadcast_to(mask.numpy(), VIDEO))):
        left = seen * ~LATER.reshape(B, 1, F, 1, 1)
        videos = [(left * e2)[b].sum() / left[b].sum() for b in range(B)]
        frames = (left * e2).sum((1, 3, 4)) / np.maximum(left.sum((1, 3, 4)), 1)
        expected = {
            "global": (left * e2).sum() / left.sum(),
            "sample": np.mean(videos),
            "row": frames.sum() / (left.sum((1, 3, 4)) > 0).sum(),
            "none": (left * e2).mean(),
        }
        for how, value in expected.items():
            found = objective.loss(m, noised, given, mask_normalization=how)
            assert_close(found.double(), value, rel=1e-6, label=how)
        assert torch.equal(
            objective.loss(m, noised, given), objective.loss(m, noised, given, mask_normalization="global")
        )
        found = objective.loss(m, noised, given, "none")
        assert found.shape == (B, 1, F, 1, 1)
        assert_close(found.double().flatten(1), frames, rel=1e-6)
        assert_close(objective.loss(m, noised, given, "sum").double(), (left * e2).sum(), rel=1e-6)


def test_a_mask_without_clean_frames_divides_by_itself(backend):
    x0, m = batch(2)
    objective = video.RFLoss()
    noised = objective.noise(x0, seed=SEED)
    mask = torch.rand(VIDEO) < 0.5
    e2 = truth(x0, noised.noise, m, 0.5)[3] ** 2
    assert_close(objective.loss(m, noised, mask).double(), e2[mask.numpy()].mean(), rel=1e-6)


def test_without_a_mask_what_divides_is_said_too():
    x0, m = batch(2)
    objective = video.RFLoss(per="frame")
    noised = objective.noise(x0, seed=SEED)
    e2 = truth(x0, noised.noise, m, noised.t.numpy())[3] ** 2
    for how in (None, "global", "sample", "row", "none"):
        assert_close(objective.loss(m, noised, mask_normalization=how).double(), e2.mean(), rel=1e-6)
    found = objective.loss(m, noised, reduction="none", mask_normalization="sample")
    assert found.shape == (B,)
    assert_close(found.double(), e2.mean((1, 2, 3, 4)), rel=1e-6)
    with pytest.raises(ValueError, match="mask_normalization must be one of"):
        objective.loss(m, noised, mask_normalization="rows")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("frame_dim", [2, 1, None])
def test_weights_of_clean_rows_count_as_0(frame_dim, value, backend):
    """Such as 1 / t there; one a row, one a sample, and one an element."""
    x0, m = batch(frame_dim)
    per = "frame" if frame_dim else "token"
    objective = video.RFLoss(per=per, frame_dim=frame_dim or 2)
    kept = torch.arange(F if frame_dim else 10) < 2
    noised = objective.noise(x0, seed=SEED, clean=kept)
    everywhere = noised.clean.view(*noised.t.shape, *(1,) * (x0.ndim - noised.t.ndim)).expand(x0.shape)
    weight = torch.where(noised.clean, value, 1 / noised.t)
    own = spread(torch.where(noised.clean, 0.0, weight).numpy(), x0)
    m.requires_grad_()
    loss = objective.loss(m, noised, weight=weight)
    loss.backward()
    _, expected, gradient, _ = truth(x0, noised.noise, m.detach(), 0.5, own, ~everywhere.numpy())
    assert_close(loss.detach().double(), expected, rel=1e-6)
    assert_close(m.grad.double(), gradient, rel=1e-4, absolute=1e-6)
    wide = torch.where(everywhere, value, torch.from_numpy(np.broadcast_to(own, x0.shape).copy()))
    assert_close(objective.loss(m.detach(), noised, weight=wide).double(), expected, rel=1e-6)
    by_sample = objective.loss(m.detach(), noised, weight=torch.tensor([2.0, 0.5]))
    of_each = spread([2.0, 0.5], x0)
    _, expected, _, _ = truth(x0, noised.noise, m.detach(), 0.5, of_each, ~everywhere.numpy())
    assert_close(by_sample.double(), expected, rel=1e-6)


@pytest.mark.parametrize("clean", [torch.arange(F) < 2, torch.arange(F)[None].expand(B, F) < 2])
def test_the_users_mask_of_clean_frames_may_be_written_into(clean):
    x0, m = batch(2)
    objective, given = video.RFLoss(per="frame"), clean.clone()
    noised = objective.noise(x0, seed=SEED, clean=given)
    before = objective.loss(m, noised)
    given.fill_(False)
    assert torch.equal(objective.loss(m, noised), before)


def test_masks_of_fewer_rows_beside_clean_frames():
    x0, m = batch(2)
    objective = video.RFLoss()
    noised = objective.noise(x0, seed=SEED, clean=1)
    e2 = truth(x0, noised.noise, m, 0.5)[3] ** 2
    for mask, right in (
        (torch.tensor([True, False]), e2[0, :, 1:].mean()),
        (torch.tensor([0.0, 1.0]).view(B, 1, 1, 1, 1), e2[1, :, 1:].mean()),
        (torch.arange(C).view(1, C) == 1, e2[:, 1, 1:].mean()),
    ):
        assert_close(objective.loss(m, noised, mask).double(), right, rel=1e-6)
    for mask, error, words in (
        (torch.ones(3, dtype=torch.bool), ValueError, r"mask has shape \(3,\), which does not fit"),
        (torch.ones(1, *VIDEO), ValueError, "which does not fit"),
        (torch.ones(B, dtype=torch.complex64), TypeError, "mask must be bool or real"),
        ([True, False], TypeError, "mask"),
    ):
        with pytest.raises(error, match=words):
            objective.loss(m, noised, mask)
    with pytest.raises(ValueError, match="prediction"):
        objective.loss(m[:, :1], noised)
    square = objective.noise(torch.zeros(B, F, F, H, W), seed=SEED, clean=1)
    with pytest.raises(ValueError, match="could be one a frame or one a channel"):
        objective.loss(square.x_t, square, torch.ones(B, F, dtype=torch.bool))


@pytest.mark.parametrize("clean", [None, 1])
@pytest.mark.parametrize("frame_dim", [2, 1])
def test_times_for_all_videos(frame_dim, clean):
    """model_time.flatten(1) is [B, F]; with a part too."""
    x0, m = batch(frame_dim)
    objective = video.RFLoss(frame_dim=frame_dim)
    rows = torch.rand(1, F, dtype=torch.float64)
    part = fastdiff.distributed.Part(x0.shape, (0,) * 5)
    for t in (rows, rows.expand(B, F)):
        for given in (None, part):
            noised = objective.noise(x0, t, seed=SEED, clean=clean, part=given)
            assert noised.model_time.flatten(1).shape == (B, F)
            sigma = noised.t.numpy()
            left = np.broadcast_to(sigma > 0, x0.shape)
            check(objective, noised, m, sigma, left=left)
    with pytest.raises(ValueError, match="t has shape"):
        objective.noise(x0, torch.rand(3, 1, 1, 1, 1), seed=SEED)
    assert objective.noise(x0, torch.full((1,) * 5, 0.3), seed=SEED).t.shape == (B,)
    if clean:
        assert objective.noise(x0, 0.3, seed=SEED, clean=1, part=part).t.flatten(1).shape == (B, F)


def test_a_slice_of_one_frame_from_tensors():
    """The part that the user has is enough: the objective knows where its frames are."""
    x0, m = batch(2)
    part = fastdiff.distributed.Part(VIDEO, (0, 0, 2, 0, 0))
    objective = video.RFLoss(per="frame")
    noised = objective.noise(x0[:, :, 2:3], seed=SEED, part=part)
    again = fastdiff.Noised.from_tensors(objective, noised.tensors(), part=part)
    for reduction in ("mean", "none"):
        how = {"reduction": reduction, "mask_normalization": "row"}
        found, right = (objective.loss(m[:, :, 2:3], each, **how) for each in (again, noised))
        assert torch.equal(found, right)


def test_offsets_of_tokens_are_of_their_numbers(backend):
    x0 = torch.zeros(TOKENS)
    noised = video.RFLoss(noise_offset=0.5).noise(x0, seed=SEED, sample_offset=3)
    offsets = oracle.normal(SEED, (B, 7), stream=1, sample_offset=3).astype(np.float64)
    right = oracle.normal(SEED, TOKENS, sample_offset=3).astype(np.float64) + 0.5 * offsets[:, None]
    assert_close(noised.noise.double(), right, rel=0, absolute=4e-6)
    assert torch.equal(noised.t, video.RFLoss().noise(x0, seed=SEED, sample_offset=3).t)
    part = fastdiff.distributed.Part(TOKENS, (0, 4, 0))
    whole = video.RFLoss(noise_offset=0.5).noise(x0, seed=SEED).noise
    sliced = video.RFLoss(noise_offset=0.5).noise(x0[:, 4:6], seed=SEED, part=part).noise
    assert torch.equal(sliced, whole[:, 4:6])


@pytest.mark.parametrize("name", ["l1", "huber", "pseudo_huber"])
def test_other_errors_and_weights(name, backend):
    x0, m = batch(2)
    objective = video.RFLoss("sigma_sqrt", name, per="frame")
    noised = objective.noise(x0, seed=SEED, clean=1)
    e = truth(x0, noised.noise, m, 0.5)[3]
    t = noised.t.numpy()
    weight = np.where(t > 0, 1 / np.where(t > 0, t, 1) ** 2, 0)
    error = np.asarray(getattr(oracle, f"loss_{name}")(e), np.float64)
    own = torch.rand(B, F)
    expected = (weight * own.numpy().reshape(B, 1, F, 1, 1) * error)[:, :, 1:].mean()
    assert_close(objective.loss(m, noised, weight=own.view(B, 1, F, 1, 1)).double(), expected, rel=2e-6)


# --------------------------------------------------------------------------------------------------------------- shifts


@pytest.mark.parametrize(
    "shift, patch, expected",
    [
        ("sd3", None, 3.0),
        ("hunyuanvideo", None, 7.0),
        ("wan", None, 3.0),
        ("resolution", None, (F * 2 * 3 / 256) ** 0.5),
        ("resolution", (2, 3, 3), (3 * 2 * 2 / 256) ** 0.5),
        ("flux", None, np.exp(0.5 + (F * 2 * 3 - 256) * 0.65 / 3840)),
        ("ltx", None, np.exp(0.95 + (F * H * W - 1024) * 1.1 / 3072)),
        (lambda frames, height, width, tokens: frames + height / width, None, F + H / W),
        (2.5, None, 2.5),
    ],
)
@pytest.mark.parametrize("frame_dim", [2, 1])
def test_shift_of_the_data(shift, patch, expected, frame_dim):
    x0 = batch(frame_dim)[0]
    objective = video.RFLoss(shift=shift, patch=patch, frame_dim=frame_dim, per="frame")
    assert objective.shift_of(x0.shape) == pytest.approx(expected, rel=1e-12)
    u = oracle.uniforms(SEED, B, F, stream=3)
    assert_close(objective.noise(x0, seed=SEED).t.flatten(1), oracle.flow_shift(u, expected), rel=1e-12)
    plain = video.RFLoss(frame_dim=frame_dim, per="frame")
    assert_close(plain.noise(x0, seed=SEED, shift=expected).t.flatten(1), oracle.flow_shift(u, expected), rel=1e-12)


@pytest.mark.parametrize("per", ["sample", "token"])
def test_a_shift_of_each_sample(per, backend):
    """Of a batch of different lengths."""
    lengths = torch.tensor([1000, 4096])
    objective = video.RFLoss(per=per)
    t = objective.noise(batch(None)[0], seed=SEED, shift=shifts.flux(lengths)).t
    u = oracle.uniforms(SEED, B, 10 if per == "token" else 1, stream=3)
    for b, tokens in enumerate(lengths.tolist()):
        assert_close(t[b], oracle.flow_shift(u[b], shifts.flux(tokens)).squeeze(), rel=1e-12)


def test_samples_are_drawn_with_the_shift():
    objective = video.RFLoss(shift="hunyuanvideo")
    told = []

    def model(x, t):
        told.append(float(t[0]))
        return x - 0.25

    for sampler, times in (("flow_euler", 4), (fastdiff.samplers.FlowEuler(), 4)):
        told.clear()
        x = objective.sample(model, (1, 2, 3, 4, 4), sampler, times, seed=1, progress=False)
        grid = np.array([1, 0.75, 0.5, 0.25])
        right = oracle.flow_shift(grid, 7.0) if isinstance(sampler, str) else grid
        assert told == pytest.approx(right.tolist(), rel=1e-6) and x.shape == (1, 2, 3, 4, 4)
    told.clear()
    objective.sample(model, (1, 2, 3, 4, 4), "flow_euler_karras", 4, seed=1, progress=False)
    assert told[1] != pytest.approx(oracle.flow_shift(0.75, 7.0), rel=1e-3)  # a schedule that was asked for


def test_from_a_scheduler():
    diffusers = pytest.importorskip("diffusers")
    static = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert video.RFLoss.from_scheduler(static, per="frame").shift_of(VIDEO) == 5.0
    how = dict(base_image_seq_len=1024, max_image_seq_len=4096, base_shift=0.95, max_shift=2.05)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **how)
    objective = video.RFLoss.from_scheduler(dynamic, patch=(1, 1, 1))
    assert objective.shift_of(VIDEO) == pytest.approx(video.RFLoss(shift="ltx").shift_of(VIDEO), rel=1e-14)
    with pytest.raises(TypeError, match="a flow-matching scheduler is needed; got DDPMScheduler"):
        video.RFLoss.from_scheduler(diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match=r"inverts its sigmas.*: use Objective.from_scheduler"):
        video.RFLoss.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


# --------------------------------------------------------------------------------------------- the rest of an Objective


def test_frame_noise_is_the_functions():
    x0 = batch(2)[0]
    for kind in ("mixed", "progressive"):
        objective = video.RFLoss(frame_noise=kind, frame_noise_alpha=2.0)
        noised = objective.noise(x0, seed=SEED, sample_offset=3)
        expected = video.frame_noise(x0, kind, 2.0, seed=SEED, sample_offset=3)
        assert torch.equal(noised.noise, expected)
        assert torch.equal(noised.t, video.RFLoss().noise(x0, seed=SEED, sample_offset=3).t)
    images = torch.randint(0, 256, VIDEO, dtype=torch.uint8)
    noised = objective.noise(images, seed=SEED, sample_offset=3, dtype=torch.bfloat16)
    assert noised.x_t.dtype == torch.bfloat16 and torch.equal(noised.noise, expected)


def test_one_seed_is_drawn():
    x0 = batch(2)[0]
    g, alone = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    noised = video.RFLoss(per="frame", shift="wan").noise(x0, generator=g, clean=1)
    again = video.RFLoss(per="frame", shift="wan").noise(x0, seed=fastdiff.philox.draw_seed(alone, x0.device), clean=1)
    assert torch.equal(noised.x_t, again.x_t) and torch.equal(g.get_state(), alone.get_state())


def test_it_is_an_objective():
    x0, m = batch(2)
    objective = video.RFLoss(per="frame", shift="wan")
    noised = objective.noise(x0, seed=SEED, clean=1)
    other = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    same = other.noise(x0, noised.t, seed=SEED)
    assert torch.equal(same.x_t, noised.x_t) and torch.equal(same.target, noised.target)
    assert_close(objective.predict_x0(noised.target, noised).double(), to_numpy(x0), absolute=1e-6, rel=0)
    assert "the operation of the backend" in objective.explain(x0) and "RFLoss(per='frame'" in repr(objective)
    for copied in (copy.copy(objective), copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert torch.equal(copied.noise(x0, seed=SEED, clean=1).x_t, noised.x_t)
    returned = pickle.loads(pickle.dumps(noised))
    assert torch.equal(objective.loss(m, returned), objective.loss(m, noised))


@pytest.mark.parametrize("per", ["sample", "frame"])
def test_compiled(per):
    x0, m = batch(2)
    objective = video.RFLoss(per=per, shift="wan", timesteps="logit_normal")

    def step(x0, m, seed):
        noised = objective.noise(x0, seed=seed, clean=1)
        return objective.loss(m, noised), noised.x_t

    seed = torch.tensor([SEED])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x0, m, seed)
    for found, expected in zip(compiled, step(x0, m, seed)):
        assert torch.equal(found, expected)


def test_losses_of_images_look_at_the_frames_of_a_video():
    """A decoder and an extractor of images, [B F, C, H, W], in a sum: frame by frame, and their parameters stay."""
    x0, m = batch(2)
    torch.manual_seed(1)
    decoder = torch.nn.Conv2d(C, 3, 3, padding=1)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Tanh())
    objective = video.RFLoss(per="frame")
    noised = objective.noise(x0, seed=SEED, clean=1)
    perceptual = losses.features.Perceptual(video.ByFrame(network))
    total = losses.Sum(objective, decoder=video.ByFrame(decoder.forward), lpips=losses.Term(perceptual, 0.5))
    m.requires_grad_()
    loss = total(m, noised)
    loss.backward()
    assert all(parameter.grad is None for parameter in (*decoder.parameters(), *network.parameters()))
    estimate = objective.predict_x0(m.detach(), noised)
    value = 0
    for b in range(B):
        features = [[to_numpy(network(decoder(x[b].transpose(0, 1))))] for x in (estimate, x0)]
        value += oracle.lpips(*features).mean() / B
    assert_close(total.values["lpips"].double(), np.asarray(value, np.float64), rel=1e-4)
    assert_close(loss.detach().double(), to_numpy(total.values["objective"]) + 0.5 * np.float64(value), rel=1e-5)
    swapped = video.ByFrame(network, frame_dim=1)(x0.transpose(1, 2))
    assert torch.equal(swapped.transpose(1, 2), video.ByFrame(network)(x0))
    both = video.ByFrame(lambda x: {"a": [x, 2 * x]})(x0)
    assert torch.equal(both["a"][1], 2 * x0)


def wrong(**arguments):
    how = {name: arguments.pop(name) for name in ("per", "shift", "frame_dim", "patch", "frame_noise", "noise_offset")
           if name in arguments and name not in arguments.get("call", ())}  # fmt: skip
    return lambda: video.RFLoss(**how).noise(**{"x0": torch.zeros(VIDEO)} | arguments)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (wrong(per="clip"), ValueError, "unknown per 'clip': use one of sample, frame, token"),
        (wrong(per=2), TypeError, "per must be 'sample', 'frame' or 'token'; got 2"),
        (wrong(shift="wann"), ValueError, r"unknown shift 'wann' \(did you mean 'wan'\?\)"),
        (wrong(shift=0.0), ValueError, "shift must be a positive number; got 0.0"),
        (wrong(shift=lambda *sizes: -1.0), ValueError, "shift must be a positive number; got -1.0"),
        (wrong(frame_dim=3), ValueError, r"frame_dim must be 2, for \[B, C, F, H, W\]"),
        (wrong(patch=(1, 2)), ValueError, r"patch must be \(frames, rows, columns\)"),
        (wrong(frame_noise="mix"), ValueError, r"unknown kind of frame noise 'mix' \(did you mean 'mixed'\?\)"),
        (
            wrong(frame_noise="mixed", x0=torch.zeros(TOKENS)),
            ValueError,
            r"frames of video \[B, C, F, H, W\]; got tokens",
        ),
        (lambda: video.RFLoss(frame_noise_alpha=-1), ValueError, "frame_noise_alpha must be at least 0"),
        (lambda: setattr(video.RFLoss(), "frame_dim", 1), AttributeError, "frame_dim cannot be changed"),
        (lambda: video.RFLoss(shift=3).sample(lambda x, t: x, (2, 3, 8, 8)), ValueError, "data must be video"),
        (wrong(frame_noise="mixed", noise_offset=0.1), ValueError, "offset noise is not added to frame_noise"),
        (wrong(x0=torch.zeros(2, 3, 4, 4)), ValueError, r"x0 must be video \[B, C, F, H, W\], or tokens \[B, L, D\]"),
        (wrong(x0=[1.0]), TypeError, "x0"),
        (wrong(per="token"), ValueError, r"per='token' is for tokens \[B, L, D\]"),
        (wrong(per="frame", x0=torch.zeros(TOKENS)), ValueError, "needs frames=, how many there are"),
        (wrong(x0=torch.zeros(TOKENS), shift="wan"), ValueError, "goes by height and width"),
        (wrong(x0=torch.zeros(TOKENS), frames=3), ValueError, "frames must divide the 10 tokens of x0; got 3"),
        (wrong(frames=5), ValueError, "a video has its frames in its shape"),
        (wrong(t=torch.rand(2, 4)), ValueError, r"t has shape \(2, 4\), which is not one a frame, of x0"),
        (wrong(t=0.5, sigma=0.5), ValueError, "t and sigma both say which noise level"),
        (wrong(t=1.5), ValueError, "t must lie in"),
        (wrong(clean=6), ValueError, "clean must be from 0 to all 5 frames; got 6"),
        (wrong(clean=1, x0=torch.zeros(TOKENS)), ValueError, "pass frames= too, or a mask"),
        (wrong(clean=torch.ones(5)), TypeError, r"clean must be a number of frames, or bool, \[F\] or \[B, F\]"),
        (
            wrong(clean=torch.ones(4, dtype=torch.bool)),
            ValueError,
            r"clean has shape \(1, 4\), which is not one a frame",
        ),
        (wrong(seed=1, generator=torch.Generator()), ValueError, "pass a generator or a seed, not both"),
        (lambda: video.RFLoss().noise(torch.zeros(VIDEO), 0.5, shift=3.0), ValueError, "leave shift out"),
        (lambda: video.RFLoss().noise(torch.zeros(VIDEO), shift=torch.ones(3)), ValueError, r"one a sample, \[2\]"),
        (lambda: video.RFLoss(snr_gamma=5.0), TypeError, "write weighting=fastdiff.MinSNR"),
        (lambda: video.ByFrame(torch.tanh)(torch.zeros(2, 3)), ValueError, "video must have 5 dimensions"),
        (lambda: video.ByFrame(lambda x: x[:1])(torch.zeros(VIDEO)), ValueError, "one for each frame"),
        (lambda: video.ByFrame(torch.tanh, 3), ValueError, "frame_dim must be 2, for .*; got 3"),
        (lambda: video.ByFrame(torch.tanh, frame_dim=0), ValueError, "frame_dim must be 2, for .*; got 0"),
        (lambda: video.ByFrame(3), TypeError, "function must be a module or another callable"),
    ],
)
def test_wrong_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
