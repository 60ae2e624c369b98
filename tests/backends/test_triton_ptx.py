"""The compiled kernels, run on the CPU: what only they have (inline assembly, vectors, layouts, shuffles) is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import triton

pytestmark = pytest.mark.compiles
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """In another process: this one's kernels may be the interpreter's."""
    if not triton.__version__.startswith("3.6."):
        pytest.skip(f"the instructions are those that Triton 3.6 makes; this is {triton.__version__}")
    out = tmp_path_factory.mktemp("ptx") / "findings.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))}
    done = subprocess.run([sys.executable, HERE / "ptx.py", out], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_noise_noising_target_and_step_have_the_bits_of_the_reference(findings):
    names = ("x_t", "x_t with its target", "target", "noise", "noise of a loss", "step")
    found = [f for f in findings if f["name"] in names]
    exact = [f for f in found if not f["case"].startswith("fast")]
    assert len(exact) == 80 + 10 + 27
    for f in exact:
        assert f["same"], f


def test_fast_noise_is_near_the_exact(findings):
    """With instructions that err as much as NVIDIA says they may. x_t is a sum with factors up to 1.1."""
    found = [f for f in findings if f["case"].startswith("fast") and f["name"] in ("x_t", "target", "noise")]
    assert len(found) == 30
    for f in found:
        # A number up to 8 rounded to its dtype: half a unit in the last place, twice.
        rounding = 8 * torch.finfo(getattr(torch, f["dtype"][6:])).eps
        assert f["largest"] < 1.1e-3 + rounding, f
        assert f["name"] != "noise" or f["largest"] < 1e-3, f


def test_losses_and_gradients(findings):
    """Sums and products in another order or contracted: a few units of 2^-23 of the largest gradient, and a rounding
    to its dtype. With fast noise, its difference."""
    found = [f for f in findings if f["name"] in ("loss", "gradient", "gradient of half")]
    assert len(found) == 180 + 135
    for f in found:
        near = 8 * 2**-23 + (torch.finfo(getattr(torch, f["dtype"][6:])).eps if f["dtype"] != "torch.float32" else 0)
        assert f["relative"] <= near + (1e-3 if f["case"].startswith("fast") else 0), f


def test_gaussian_kl_and_its_gradient(findings):
    """As near as losses are, by exponentials and logarithms of its own."""
    found = [f for f in findings if f["name"].startswith("gaussian_kl")]
    assert len(found) == 3 * 3 * 2 * 3
    for f in found:
        rounding = torch.finfo(getattr(torch, f["dtype"][6:])).eps if f["dtype"] != "torch.float32" else 0
        assert f["relative"] <= 8 * 2**-23 + rounding, f


def test_latents_and_divergences(findings):
    """The noise to the bit; the rest as near as losses are, by an exponential of its own; without one to the bit."""
    names = "z", "noised z", "its noise", "gradient of moments", "kl_normal", "gradient of kl_normal"
    found = [f for f in findings if f["name"] in names]
    assert len(found) == 2 * 3 * (4 * 4 + 3 * 2)
    for f in found:
        rounding = torch.finfo(getattr(torch, f["dtype"][6:])).eps if f["dtype"] != "torch.float32" else 0
        assert f["relative"] <= 8 * 2**-23 + rounding + (1.1e-3 if f["case"].startswith("fast") else 0), f
        if f["case"].startswith("no") or (f["name"] == "its noise" and not f["case"].startswith("fast")):
            assert f["same"], f
