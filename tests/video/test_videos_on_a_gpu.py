"""Slices, times of frames and packed sequences on a GPU: the numbers of the CPU."""

import math

import pytest
import torch

import fastdiff
from fastdiff import ops
from fastdiff.video import RFLoss

pytestmark = pytest.mark.gpu
CPU, SHAPE = torch.device("cpu"), (3, 4, 6, 8, 10)


def on_both(call):
    """What ``call(device)`` gives on the GPU and on the CPU, both on the CPU."""
    return [tuple(value.detach().cpu() for value in call(device)) for device in (torch.device("cuda"), CPU)]


@pytest.mark.parametrize(
    ("whole", "start", "sizes"),
    [
        ((4, 6, 8, 10), (0, 1, 0, 0), (4, 3, 8, 10)),
        ((4, 6, 8, 10), (1, 2, 3, 5), (2, 3, 4, 3)),
        ((7, 9), (2, 5), (3, 4)),
        ((2**20, 2**18), (2**19, 2**17), (2, 8)),  # beyond 2^34 elements
    ],
)
def test_normals_of_a_slice_have_the_bits_of_the_cpu(whole, start, sizes):
    window = ops.Window(whole, start)
    for samples in (5, torch.tensor([7, 2**40, 7])):
        made = [
            ops.materialize(
                ops.Philox(11, samples.to(device) if isinstance(samples, torch.Tensor) else samples),
                (3, *sizes), torch.device(device), window=window,
            )
            for device in ("cuda", "cpu")
        ]  # fmt: skip
        assert torch.equal(made[0].cpu(), made[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"per": "frame", "shift": "wan"}, {"clean": 1}),
        ({"per": "frame", "timesteps": "logit_normal", "loss": "huber"}, {}),
        ({"frame_noise": "progressive"}, {}),
        ({"timesteps": fastdiff.timesteps.Beta(2.0, 3.0)}, {}),
        ({"timesteps": "sobol", "per": "frame"}, {"with_target": True}),
    ],
)
def test_a_training_step_on_videos(settings, how, dtype):
    torch.manual_seed(0)
    x0, output = (torch.randn(SHAPE).to(dtype) for _ in range(2))
    objective = RFLoss(**settings)

    def step(device):
        noised = objective.noise(x0.to(device), seed=3, **how)
        leaf = output.to(device).requires_grad_()
        loss = objective.loss(leaf, noised, torch.ones(SHAPE, dtype=torch.bool, device=device))
        loss.backward()
        return noised.t, noised.x_t, loss, leaf.grad

    for got, want, bound in zip(*on_both(step), (1e-12, None, 2e-6, None)):
        if bound is None:
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got, want, rtol=eps, atol=4e-6 * float(want.abs().max()))
        else:
            torch.testing.assert_close(got, want, rtol=bound, atol=bound)


def test_packed_sequences():
    torch.manual_seed(0)
    lengths, x0, output = [5, 0, 700, 295], torch.randn(1000, 64), torch.randn(1000, 64)
    objective = RFLoss(shift="flux")

    def step(device):
        noised = objective.noise(x0.to(device), seed=3, lengths=lengths)
        leaf = output.to(device).requires_grad_()
        each = objective.loss(leaf, noised, reduction="none")
        each[torch.tensor(lengths) > 0].sum().backward()
        return noised.t, noised.x_t, torch.nan_to_num(each, nan=-1.0), leaf.grad

    for got, want, rtol in zip(*on_both(step), (1e-12, 1e-6, 2e-6, 1e-6)):
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-6)


def test_a_part_over_one_rank(tmp_path):
    """NCCL, with a single rank: the way of a part, and the numbers of none."""
    import torch.distributed as dist

    from fastdiff.distributed import Part

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        x0, output = torch.randn(SHAPE, device="cuda"), torch.randn(SHAPE, device="cuda")
        mask = torch.rand(3, 1, 6, 8, 10, device="cuda") < 0.5
        found = []
        for part in (None, Part(SHAPE, (0,) * 5, averaged=False)):
            objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", "min_snr")
            noised, leaf = objective.noise(x0, seed=4, part=part), output.clone().requires_grad_()
            for how in ({}, *({"mask": mask, "mask_normalization": name} for name in ("global", "row"))):
                loss = objective.loss(leaf, noised, **how)
                (gradient,) = torch.autograd.grad(loss, leaf)
                found.append((noised.x_t, loss, gradient))
        for got, want in zip(found[3:], found[:3]):
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1], rtol=2e-6, atol=0)
            torch.testing.assert_close(got[2], want[2], rtol=2e-6, atol=1e-9)
        agreed = objective.noise(x0, part=Part(SHAPE, (0,) * 5))  # a seed from the device's generator, sent by NCCL
        assert math.isfinite(float(agreed.x_t.sum()))
    finally:
        dist.destroy_process_group()
