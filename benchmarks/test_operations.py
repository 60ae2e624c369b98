"""Each operation alone, with the noise given: noising, loss with gradient, a DDPM sampler step; against the same
arithmetic as trainers and schedulers write it, eager and compiled. Bytes are the floor: every input read once, every
result written once."""

import pytest
import torch

import fastdiff
from fastdiff import ops

SHAPES = [(1, 4, 32, 32), (64, 4, 64, 64), (16, 3, 256, 256)]
PROCESS = fastdiff.VariancePreserving()


def noising(x0, n, t):
    alpha_bar = PROCESS.alpha_bar.to(x0.device, torch.float32)
    objective = fastdiff.Objective(PROCESS)

    def eager():
        a = alpha_bar.to(x0.dtype)[t]
        return a.sqrt().view(-1, 1, 1, 1) * x0 + (1 - a).sqrt().view(-1, 1, 1, 1) * n

    return eager, lambda: objective.noise(x0, t, n).x_t, 3


def loss_and_gradient(x0, n, t):
    alpha_bar = PROCESS.alpha_bar.to(x0.device, torch.float32)
    prediction = torch.randn_like(x0).requires_grad_()
    objective = fastdiff.Objective(PROCESS, "v_prediction", fastdiff.MinSNR(5.0))
    noised = objective.noise(x0, t, n)

    def eager():
        a = alpha_bar[t]
        alpha, sigma = a.sqrt().view(-1, 1, 1, 1).to(x0.dtype), (1 - a).sqrt().view(-1, 1, 1, 1).to(x0.dtype)
        snr = a / (1 - a)
        target = alpha * n - sigma * x0
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="none")
        return (loss.mean(dim=[1, 2, 3]) * snr.clamp(max=5.0) / (snr + 1)).mean()

    def run(loss):
        def step():
            prediction.grad = None
            loss().backward()

        return step

    return run(eager), run(lambda: objective.loss(prediction, noised)), 4, (eager, run)


def ddpm_step(x, n, t):
    model_output = torch.randn_like(x)
    row = fastdiff.samplers.DDPM(clip=1.0).plan(PROCESS, 50, "epsilon").table[10].float().to(x.device)
    a, b = PROCESS.alpha_bar[799].float(), PROCESS.alpha_bar[779].float()

    lean = {"return_x0": False, "return_entry": False}

    def eager():
        beta = 1 - a / b
        x0 = ((x - (1 - a) ** 0.5 * model_output) / a**0.5).clamp(-1, 1)
        mean = b**0.5 * beta / (1 - a) * x0 + (a / b) ** 0.5 * (1 - b) / (1 - a) * x
        return mean + ((1 - b) / (1 - a) * beta) ** 0.5 * n

    return eager, lambda: ops.step(x, model_output, row, clip=1.0, noise=n, **lean)[0], 4


OPERATIONS = {"noising": noising, "loss and gradient": loss_and_gradient, "DDPM step": ddpm_step}


@pytest.mark.parametrize("implementation", ["eager", "compiled", "fastdiff"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(benchmark, operation, shape, dtype, implementation, device):
    x, n = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    t = torch.randint(0, 1000, shape[:1], device=device)
    eager, ours, passes, *parts = OPERATIONS[operation](x, n, t)
    call = ours if implementation == "fastdiff" else eager
    if implementation == "compiled":
        torch._dynamo.reset()
        call = parts[0][1](torch.compile(parts[0][0])) if parts else torch.compile(eager)

    def run():
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    run()
    benchmark.group = f"{operation} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info["implementation"] = implementation
    benchmark.extra_info["bytes"] = passes * x.numel() * x.element_size()
    if implementation == "fastdiff":
        benchmark.extra_info["backend"] = fastdiff.backends.choose(device)
    small = x.numel() < 1e5
    benchmark.pedantic(run, rounds=200 if small else 25, iterations=1, warmup_rounds=3)
