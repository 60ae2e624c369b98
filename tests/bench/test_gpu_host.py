"""benchmarks/gpu_host.py, in small. It compiles kernels, so it is another process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff import torch_access

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("without the benchmarks", allow_module_level=True)
pytestmark = pytest.mark.compiles
CALLS = {
    "noise", "loss", "backward", "training step", "loss_and_gradient", "noise + loss_and_gradient",
    "prediction.backward", "sampler step",
}  # fmt: skip


def script(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"},
    )  # fmt: skip


def test_every_call_is_measured_in_each_way():
    if not triton.__version__.startswith("3.6.") or torch.cuda.is_available() or not torch_access.reads_tensors:
        pytest.skip("needs Triton 3.6, PyTorch 2.10, the native extension, and no GPU")
    if sys.platform != "linux" or not shutil.which("cc"):
        pytest.skip("needs Linux and a C compiler")
    done = script(ROOT / "benchmarks" / "gpu_host.py", *("--rounds", "3", "--calls", "20", "--objectives", "SD3"))
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows[0] == ["call", "launched by C++", "launched by Python", "the CPU's own"]
    found = {call: [float(cell.split()[0]) for cell in cells] for call, *cells in rows[1:]}
    assert found.keys() == CALLS and all(len(cells) == 3 and min(cells) > 0 for cells in found.values())
    for call in ("loss", "sampler step"):  # three to six times as long
        cpp, python, _ = found[call]
        assert cpp < python


def test_on_a_gpu_another_script_measures():
    on_a_gpu = "import torch; torch.cuda.is_available = lambda: True; import gpu_host; gpu_host.main([])"
    done = script("-c", on_a_gpu)
    assert done.returncode == 2 and "benchmarks/gpu_numbers.py measures" in done.stderr
