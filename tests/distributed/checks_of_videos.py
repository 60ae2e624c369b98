"""What four processes find of videos: slices of frames and of samples, clean frames, one time a frame."""

import functools

import torch
import torch.distributed as dist
from checks_of_parts import group_of, same

from fastdiff.distributed import Part
from fastdiff.video import RFLoss

VIDEO, TOKENS = (4, 2, 6, 4, 4), (4, 12, 8)  # [B, C, F, H, W]; 6 frames of 2 tokens
FRAMES = {2: [1, 5], 3: [0, 4, 2], 4: [2, 1, 0, 3]}


@functools.cache
def whole(shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(2)]


def pieces(rank, shape, dim, scale=1):
    """(part, slice) for each number of ranks that this one is among."""
    for ranks, sizes in FRAMES.items():
        group = group_of(ranks)
        if rank < ranks:
            even = [shape[0] // ranks + (k < shape[0] % ranks) for k in range(ranks)]
            sizes = [scale * size for size in sizes] if dim else even
            start = [0] * len(shape)
            start[dim] = sum(sizes[:rank])
            at = tuple(slice(s, s + sizes[rank]) if d == dim else slice(None) for d, s in enumerate(start))
            yield Part(shape, tuple(start), group, averaged=False), at


def of_slice(t, at):
    """Times or masks [B, 1, F, 1, 1], [B, L] or [B] of a slice."""
    return t[tuple(s if t.shape[d] > 1 else slice(None) for d, s in enumerate(at[: t.ndim]))]


def check_videos(rank):
    """t, x_t to the bit, and loss and gradient to 1e-6, of slices of frames, samples and tokens."""
    cases = [
        (VIDEO, (0, 2), 1, {}, {"clean": 2}),
        (VIDEO, (0, 2), 1, {"per": "frame", "shift": "wan"}, {"clean": 1}),
        (VIDEO, (2,), 1, {"per": "frame", "shift": "hunyuanvideo", "loss": "huber"}, {}),
        (TOKENS, (0, 1), 2, {"per": "token", "shift": "flux"}, {}),
        (TOKENS, (0, 1), 2, {"per": "frame", "shift": "ltx"}, {"frames": 6, "clean": 1}),
        (TOKENS, (0,), 2, {"timesteps": "stratified", "per": "frame"}, {"frames": 6}),
        (TOKENS, (0,), 2, {"timesteps": "sobol"}, {}),
    ]
    for shape, dims, scale, settings, how in cases:
        objective = RFLoss(**settings)
        x0, output = whole(shape)
        of_all = objective.noise(x0, seed=9, **how)
        leaf = output.clone().requires_grad_()
        want = objective.loss(leaf, of_all)
        want.backward()
        for dim in dims:
            for part, at in pieces(rank, shape, dim, scale):
                got = objective.noise(x0[at], seed=9, part=part, **how)
                same(got.x_t, of_all.x_t[at])
                assert torch.equal(got.t, of_slice(of_all.t, at)), (settings, dim, got.t, of_all.t)
                own = output[at].clone().requires_grad_()
                loss = objective.loss(own, got)
                loss.backward()
                torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-7)
                torch.testing.assert_close(own.grad, leaf.grad[at], rtol=1e-6, atol=1e-8)


def check_videos_of_ranks_that_say_nothing(rank):
    """Seeded alike, each rank draws other times and other noise; with a part they agree on a seed."""
    x0 = whole(VIDEO)[0]
    for settings in ({}, {"per": "frame"}, {"frame_noise": "mixed"}):
        torch.manual_seed(3)
        noised = RFLoss(**settings).noise(x0)
        every = [None] * 4
        dist.all_gather_object(every, (noised.t, noised.noise))
        assert all(not torch.equal(every[k][n], every[0][n]) for k in (1, 2, 3) for n in (0, 1)), settings
    torch.manual_seed(rank)
    part, at = next(of for of in pieces(rank, VIDEO, 2) if of[0].size == 4)
    noised = RFLoss(per="frame").noise(x0[at], part=part)
    dist.all_gather_object(every, (noised.t, noised.noise))
    t, n = (torch.cat([of[k] for of in every], 2) for k in (0, 1))
    assert t.shape[2] == n.shape[2] == 6 and t.unique().numel() == t.numel() and 0.8 < n.std() < 1.2


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
