"""Noise that is paired with its data: against all permutations in NumPy float64, and over two processes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import pairing

pytest.importorskip("scipy")
ROOT = Path(fastdiff.__file__).parents[1]
WAYS = {"immiscible": (pairing.immiscible, 1), "optimal_transport": (pairing.optimal_transport, 2)}


def batch(size, seed=0, dtype=torch.float32, shape=(2, 3)):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]


def best(x0, noise, power):
    """The permutation with the least sum of norm(x0_i - n_i)^power, of all that there are."""
    x, n = (data.double().numpy().reshape(len(data), -1) for data in (x0, noise))
    costs = np.sqrt(((x[:, None] - n[None]) ** 2).sum(-1)) ** power
    return min(itertools.permutations(range(len(x))), key=lambda order: costs[range(len(x)), order].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 2, 5, 6])
@pytest.mark.parametrize("name", list(WAYS))
def test_the_least_of_all_permutations(name, size, dtype):
    way, power = WAYS[name]
    for seed in range(5):
        x0, noise = batch(size, seed, dtype)
        got = way(x0, noise)
        assert got.dtype == dtype and torch.equal(got, noise[list(best(x0, noise, power))])


def test_the_two_are_told_apart():
    """On a line, 0 and 1 with noise at 1 and 10: lengths 1 + 9 or 10 + 0 are alike, squares 1 + 81 or 100 + 0 are not.
    Off the line a little, the lengths take the long way."""
    x0, noise = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [10.0, 0.5]])
    assert pairing.optimal_transport(x0, noise).tolist() == noise.tolist()
    assert pairing.immiscible(x0, noise).tolist() == noise.flip(0).tolist()


def test_noise_that_is_the_data():
    """Shuffled, it is found again: 200 samples, where no search of permutations reaches."""
    x0, _ = batch(200, shape=(4, 3, 3))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    for way, _ in WAYS.values():
        assert torch.equal(way(x0, x0[order] * 0.9), x0 * 0.9)


@pytest.mark.parametrize("name", list(WAYS))
def test_the_target_is_of_the_pair(name):
    """x_t and target are made of the same noise, and the inputs are left as they were."""
    x0, noise = batch(6)
    kept = x0.clone(), noise.clone()
    paired = WAYS[name][0](x0, noise)
    assert not torch.equal(paired, noise)
    noised = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow").noise(x0, torch.full((6,), 0.5), paired)
    torch.testing.assert_close(noised.x_t, (x0 + paired) / 2)
    torch.testing.assert_close(noised.target, paired - x0)
    assert torch.equal(x0, kept[0]) and torch.equal(noise, kept[1])


def test_the_plan_of_torchcfm():
    sampler = pytest.importorskip("torchcfm.optimal_transport").OTPlanSampler("exact")
    x0, noise = batch(16)
    plan = torch.from_numpy(np.asarray(sampler.get_map(x0, noise)))  # 1 / 16 for each pair
    assert torch.equal(noise[plan.argmax(1)], pairing.optimal_transport(x0, noise))


def test_strides_and_none():
    x0, noise = batch(5, shape=(4, 3, 3))
    last = noise.to(memory_format=torch.channels_last)
    assert torch.equal(pairing.immiscible(x0, last), pairing.immiscible(x0, noise))
    assert pairing.immiscible(x0[:0], noise[:0]).shape == (0, 4, 3, 3)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((torch.ones(2, 3), torch.ones(2, 4)), ValueError, "noise"),
        ((torch.ones(2, 3).long(), torch.ones(2, 3)), TypeError, "x0"),
        ((torch.ones(2, 3), torch.full((2, 3), torch.nan)), ValueError, "must be finite to be paired"),
        ((torch.tensor(1.0), torch.tensor(1.0)), ValueError, "x0 must have a batch dimension"),
    ],
)
@pytest.mark.parametrize("name", list(WAYS))
def test_unfit_inputs(name, arguments, error, words):
    with pytest.raises(error, match=words):
        WAYS[name][0](*arguments)


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"needs the SciPy library: install fastdiff\[pairing\]"):
        pairing.immiscible(*batch(2))


SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from fastdiff import pairing

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
x0, noise = torch.load(f"{folder}/batch.pt")
own = slice(4 * rank, 4 * rank + 4)
found = [way(x0[own], noise[own], group=dist.group.WORLD) for way in (pairing.immiscible, pairing.optimal_transport)]
alone = pairing.immiscible(x0[own], noise[own])
said = ""
try:
    pairing.immiscible(x0[: 2 + rank], noise[: 2 + rank], group=dist.group.WORLD)
except ValueError as error:
    said = str(error)
torch.save((found, alone, said), f"{folder}/{rank}.pt")
dist.barrier()
os._exit(0)  # some processes abort while they leave a gloo group
"""


def test_over_two_processes(tmp_path):
    """As one batch of both; each rank keeps its data."""
    x0, noise = batch(8, shape=(3, 2, 2))
    torch.save((x0, noise), tmp_path / "batch.pt")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ranks = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(tmp_path)], stderr=subprocess.PIPE, env=env)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for k, (way, _) in enumerate(WAYS.values()):
        assert torch.equal(torch.cat([of[0][k] for of in found]), way(x0, noise))
    for rank, (_, alone, said) in enumerate(found):
        own = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(alone, pairing.immiscible(x0[own], noise[own]))
        assert "a batch of the same size to be paired as one; got [2, 3]" in said
    # The noise crossed over, else this shows nothing.
    assert not torch.equal(torch.cat([of[1] for of in found]), pairing.immiscible(x0, noise))
