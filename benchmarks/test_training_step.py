"""One training step without the network: noising, loss, gradient. fastdiff against a trainer's own lines.

    python -m pytest benchmarks/test_training_step.py --benchmark-json=out.json && python benchmarks/table.py out.json

``extra_info["bytes"]`` is the floor: what a step that stores no noise must move (x0 read and x_t written; prediction
read, its gradient written, x0 read again where the target needs it).
"""

import pytest
import torch

import fastdiff

CASES = ["epsilon", "v_prediction", "flow"]
SHAPES = [(1, 4, 32, 32), (64, 4, 64, 64), (16, 3, 256, 256)]


def trainer(kind, x0, process):
    """The lines of a fine-tuning script for ``kind``, with min-SNR weights where it has them."""
    alpha_bar = process.alpha_bar.to(x0.device, torch.float32) if kind != "flow" else None
    batch, spread = x0.shape[0], (-1,) + (1,) * (x0.ndim - 1)

    def step(prediction):
        noise = torch.randn_like(x0)
        if kind == "flow":
            sigma = torch.rand(batch, device=x0.device)
            sigmas = sigma.view(spread).to(x0.dtype)
            x_t = (1 - sigmas) * x0 + sigmas * noise
            target, weight = noise - x0, torch.ones_like(sigma)
        else:
            t = torch.randint(0, 1000, (batch,), device=x0.device)
            a = alpha_bar[t]
            alpha, sigma = a.sqrt().view(spread).to(x0.dtype), (1 - a).sqrt().view(spread).to(x0.dtype)
            x_t = alpha * x0 + sigma * noise
            snr = a / (1 - a)
            if kind == "epsilon":
                target, weight = noise, snr.clamp(max=5.0) / snr
            else:
                target, weight = alpha * noise - sigma * x0, snr.clamp(max=5.0) / (snr + 1)
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="none")
        loss = (loss.mean(dim=list(range(1, loss.ndim))) * weight).mean()
        loss.backward()
        return x_t, loss

    return step


def fused(kind, x0, process):
    objective = fastdiff.Objective(process, kind, None if kind == "flow" else fastdiff.MinSNR(5.0))

    def step(prediction):
        noised = objective.noise(x0)
        loss = objective.loss(prediction, noised)
        loss.backward()
        return noised.x_t, loss

    return step


@pytest.mark.parametrize("implementation", ["eager", "compiled", "fastdiff"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("kind", CASES)
def test_training_step(benchmark, kind, shape, dtype, implementation, device):
    x0 = torch.randn(shape, device=device).to(dtype)
    prediction = torch.randn(shape, device=device).to(dtype).requires_grad_()
    process = fastdiff.RectifiedFlow() if kind == "flow" else fastdiff.VariancePreserving()
    step = (fused if implementation == "fastdiff" else trainer)(kind, x0, process)
    if implementation == "compiled":
        torch._dynamo.reset()
        step = torch.compile(step)

    def run():
        prediction.grad = None
        step(prediction)
        if device.type == "cuda":
            torch.cuda.synchronize()

    run()
    passes = 4 if kind == "epsilon" else 5
    benchmark.group = f"{kind} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info["implementation"] = implementation
    benchmark.extra_info["bytes"] = passes * x0.numel() * x0.element_size()
    if implementation == "fastdiff":
        benchmark.extra_info["backend"] = fastdiff.backends.choose(device)
    small = x0.numel() < 1e5
    benchmark.pedantic(run, rounds=200 if small else 25, iterations=1, warmup_rounds=3)


@pytest.mark.parametrize("megabytes", [64])
def test_copy(benchmark, megabytes, device):
    """The bandwidth ceiling: a plain copy between two buffers."""
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)

    def run():
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = "copy"
    benchmark.extra_info["implementation"] = "copy"
    benchmark.extra_info["bytes"] = 2 * source.numel()
    benchmark.pedantic(run, rounds=30, iterations=1, warmup_rounds=3)
