"""The launches of C++ are those that Triton's own launchers make of the same kernels: the same parameters, in the same
places. Kernels are compiled, in another process, and launched into a stand-in for the driver."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff import torch_access

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.compiles
STAND_IN = Path(__file__).parents[1] / "bench" / "stand_in"


def test_a_training_step_is_launched_as_by_triton():
    if not triton.__version__.startswith("3.6.") or torch.cuda.is_available() or not torch_access.reads_tensors:
        pytest.skip("needs Triton 3.6, PyTorch 2.10, the native extension, and no GPU")
    if sys.platform != "linux" or not shutil.which("cc"):
        pytest.skip("needs Linux and a C compiler")
    root = str(STAND_IN.parents[2])
    done = subprocess.run(
        [sys.executable, STAND_IN / "launchers.py"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["declined"] == ""
    python, cpp = found["python"], found["cpp"]
    assert len(python) == len(cpp) == 4  # times and coefficients, x_t, the loss, its backward
    pointers = {}
    for ours, theirs in zip(cpp, python):
        assert ours[:5] == theirs[:5] and len(ours[5]) == len(theirs[5]) > 5
        # Tensors that each step makes are others; one stands for one. All else is the same, to the bit.
        for own, other in zip(ours[5], theirs[5]):
            assert own == other or (min(own, other) > 2**41 and pointers.setdefault(own, other) == other)
    values = [value for launch in cpp for value in launch[5]]
    assert values.count(2**40 + 5) == 4 and values.count(2**33) == 4 and 0x3DCCCCCD in values  # seed, first, 0.1
