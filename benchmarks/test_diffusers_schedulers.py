"""diffusers' schedulers, fused against original, at 1x4x64x64 float32: one ``step`` in the middle of a run, a run of 20
steps with its ``set_timesteps``, and ``add_noise``. The draw of the noise, the same by both, is a case of its own.

    python -m pytest benchmarks/test_diffusers_schedulers.py --benchmark-json=results.json
    python benchmarks/test_diffusers_schedulers.py results.json        # the table
"""

import importlib.util
import inspect
import json
import sys

import pytest
import torch

SHAPE = (1, 4, 64, 64)
CLASSES = {
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDIMParallelScheduler": {},
    "LCMScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "EDMEulerScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepScheduler (sde)": {"algorithm_type": "sde-dpmsolver++"},
    "UniPCMultistepScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
}
STEPS, AT = 20, 8
pytestmark = [
    pytest.mark.benchmark(max_time=0.15, min_rounds=30, warmup=True, warmup_iterations=20),
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers"),
]


def scheduler_of(name, implementation):
    import diffusers

    from fastdiff.integrations.diffusers import fuse

    scheduler = getattr(diffusers, name.split()[0])(**CLASSES[name])
    return fuse(scheduler) if implementation == "fastdiff" else scheduler


def tensors(device):
    g = torch.Generator(device).manual_seed(0)
    x, m = (torch.randn(SHAPE, generator=g, device=device) for _ in range(2))
    return x, m, g


def run_of(scheduler, x, m, g, steps):
    scheduler.set_timesteps(STEPS, device=x.device)
    draws = {"generator": g} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps[:steps]:
        scale(x, t)
        scheduler.step(m, t, x, **draws)
    return draws


def record(benchmark, group, implementation, run):
    benchmark.group = group
    benchmark.extra_info["implementation"] = implementation
    benchmark(run)


@pytest.mark.parametrize("implementation", ["diffusers", "fastdiff"])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_step(benchmark, device, name, implementation):
    scheduler, (x, m, g) = scheduler_of(name, implementation), tensors(device)
    draws = run_of(scheduler, x, m, g, AT)
    t, calls = scheduler.timesteps[AT], 2 if "Heun" in name else 1

    def run():
        scheduler._step_index = AT
        for _ in range(calls):
            scheduler.step(m, t, x, **draws)

    record(benchmark, f"{name} | step{' (two calls)' if calls == 2 else ''}", implementation, run)


@pytest.mark.parametrize("implementation", ["diffusers", "fastdiff"])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_run(benchmark, device, name, implementation):
    scheduler, (x, m, g) = scheduler_of(name, implementation), tensors(device)
    record(benchmark, f"{name} | {STEPS} steps", implementation, lambda: run_of(scheduler, x, m, g, None))


@pytest.mark.parametrize("implementation", ["diffusers", "fastdiff"])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_add_noise(benchmark, device, name, implementation):
    scheduler, (x, n, _) = scheduler_of(name, implementation), tensors(device)
    scheduler.set_timesteps(STEPS, device=device)
    t = scheduler.timesteps[AT : AT + 1]
    if "FlowMatchHeun" in name:
        run = lambda: scheduler.scale_noise(x, scheduler.timesteps[AT], n)  # noqa: E731
    elif "FlowMatch" in name:
        run = lambda: scheduler.scale_noise(x, t, n)  # noqa: E731
    else:
        run = lambda: scheduler.add_noise(x, n, t)  # noqa: E731
    record(benchmark, f"{name} | {'scale' if 'Flow' in name else 'add'}_noise", implementation, run)


@pytest.mark.parametrize("implementation", ["diffusers", "fastdiff"])
def test_draw(benchmark, device, implementation):
    from diffusers.utils.torch_utils import randn_tensor

    from fastdiff import torch_randn

    g = torch.Generator(device).manual_seed(0)
    draw = randn_tensor if implementation == "diffusers" else torch_randn.randn
    record(benchmark, "draw", implementation, lambda: draw(SHAPE, generator=g, device=device, dtype=torch.float32))


def main(path: str) -> None:
    with open(path) as file:
        runs = json.load(file)["benchmarks"]
    times: dict[str, dict[str, float]] = {}
    for run in runs:
        times.setdefault(run["group"], {})[run["extra_info"]["implementation"]] = run["stats"]["median"] * 1e6
    draw = times.pop("draw")
    print(f"Medians in microseconds. The draw alone: {draw['diffusers']:.1f}, {draw['fastdiff']:.1f} here.\n")
    print("| scheduler | call | diffusers | fastdiff | ratio |")
    print("|---|---|---|---|---|")
    for group, of in times.items():
        name, call = group.split(" | ")
        theirs, ours = of["diffusers"], of["fastdiff"]
        print(f"| {name} | {call} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.1f} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
