"""Sampler steps by C++, without a GPU: see test_gpu_launch.py. They are the launches of the backend's ``step``."""

import pytest
import torch

pytest.importorskip("triton")
from test_gpu_launch import gpu, library, outcome, pytestmark, python_calls  # noqa: F401

import fastdiff
from fastdiff import samplers
from fastdiff.backends.reference import Trajectory as General
from fastdiff.backends.triton import backend, launch, sequence, trajectory
from fastdiff.backends.triton.step import step

SAMPLERS = {
    "ddpm": lambda: samplers.DDPM(clip=1.0),
    "ddim": samplers.DDIM,
    "dpm++": samplers.DPMSolverPP,
    "dpm++, order 3": lambda: samplers.DPMSolverPP(order=3),
    "ddim with noise": lambda: samplers.DDIM(eta=0.5),
    "unipc": samplers.UniPC,
}


@pytest.fixture
def steps(gpu, monkeypatch):  # noqa: F811
    """Counts the steps of C++. What a run makes is held, so that no pointer stands for two tensors."""
    monkeypatch.setattr(step, "_variants", {})
    monkeypatch.setattr(trajectory, "_kept", sequence.Kept())
    found = {"cpp": 0, "held": []}
    take, general = trajectory.Trajectory._take, General.step

    def taken(self, *how):
        done = take(self, *how)
        found["cpp"] += done
        found["held"] += [self.x, self.seen, *self._history]
        return done

    def held(self, *how):
        general(self, *how)
        found["held"] += [self.x, self.seen, *self._history]

    monkeypatch.setattr(trajectory.Trajectory, "_take", taken)
    monkeypatch.setattr(General, "step", held)
    return found


@pytest.mark.parametrize("guided", [False, True, "in the middle"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_run_makes_the_launches_of_the_general_step(gpu, steps, monkeypatch, sampler, guided):  # noqa: F811
    process = fastdiff.VariancePreserving()
    outputs = [torch.zeros(2 + 2 * bool(guided), 4, 8, 8, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    ids, count = torch.tensor([7, 2**40]), 6

    def run(way):
        dtype = torch.bfloat16 if way.get("half") else torch.float32
        out = outputs[dtype is torch.bfloat16]
        more = {} if "ids" not in way else {"ids": ids}
        if guided:
            more |= {"cond": torch.zeros(2, 1), "uncond": torch.zeros(2, 1), "guidance": 3.0}
        if guided == "in the middle":
            more["guidance_interval"] = 300, 700
        network = lambda x, *_: out[: len(x)]  # noqa: E731
        how = dict(seed=way["seed"], progress=False, dtype=dtype, x=torch.zeros(2, 4, 8, 8), **more)
        return fastdiff.sample(network, (2, 4, 8, 8), process, SAMPLERS[sampler](), count, "v_prediction", **how)

    named = {out.data_ptr(): "m" for out in outputs} | {ids.data_ptr(): "ids"}
    for way in ({"seed": 5}, {"seed": -(2**62), "half": True}, {"seed": 6, "ids": True}):
        with monkeypatch.context() as patch:
            patch.setattr(type(backend), "trajectory", lambda self, call: General(self, call))
            want = outcome(gpu, lambda way=way: run(way), named)
        assert want[0] is None and len(want[1]) == count
        for _ in range(2):
            steps["cpp"] = 0
            found = outcome(gpu, lambda way=way: run(way), named)
            assert found[1] == want[1]
            assert steps["cpp"] == count - (guided == "in the middle")  # but for that before the first guided one
            assert found[2].dtype == want[2].dtype and found[2].shape == want[2].shape


def test_rare_steps_are_the_backends(gpu, steps):  # noqa: F811
    """Inpainting, guidance by sample, a callback that wants x0, an output of another layout, and of a wrong shape."""
    process, out = fastdiff.VariancePreserving(), torch.zeros(2, 4, 8, 8)

    def run(network=lambda x, *_: out, **how):
        return fastdiff.sample(network, (2, 4, 8, 8), process, "ddim", 3, "epsilon", progress=False, seed=1, **how)

    run()
    assert steps["cpp"] == 3
    ones = torch.ones(2, 4, 8, 8)
    run(known=ones, mask=torch.ones(2, 1, 8, 8))
    both = {"cond": torch.zeros(2, 1), "uncond": torch.zeros(2, 1)}
    run(lambda x, *_: torch.cat([out, out]), guidance=torch.tensor([2.0, 3.0]), **both)
    run(callback=lambda *_: None)
    run(lambda x, t: torch.zeros(2, 8, 8, 4).permute(0, 3, 1, 2))
    with launch.launches() as found:
        run()
    assert found == ["affine", *["step"] * 3] and steps["cpp"] == 3  # where to start is the first
    with pytest.raises(ValueError, match=r"the model returned shape \(2, 4, 8, 7\)"):
        run(lambda x, t: torch.zeros(2, 4, 8, 7))
    run()
    assert steps["cpp"] == 6


def test_what_a_step_costs_the_host(gpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(step, "_variants", {})
    monkeypatch.setattr(trajectory, "_kept", sequence.Kept())
    ran, made = [], trajectory.Trajectory.__init__
    monkeypatch.setattr(trajectory.Trajectory, "__init__", lambda self, *how: (ran.append(self), made(self, *how))[1])
    out = torch.zeros(2, 4, 8, 8)
    objective = fastdiff.Objective(fastdiff.VariancePreserving())
    objective.sample(lambda x, t: out, (2, 4, 8, 8), samplers.DPMSolverPP(), 6, progress=False, seed=1)
    (run,) = ran
    # 5, and room for another PyTorch.
    assert python_calls(lambda: run.step(4, out, False, None, 1)) <= 7
