"""Without the packages that are optional, everything is collected, and what needs one is skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("without the benchmarks", allow_module_level=True)
WITHOUT = """
import importlib.metadata, sys

names = "accelerate denoising_diffusion_pytorch diffusers einops ema_pytorch flow_matching k_diffusion".split()
names += "lightning lpips matplotlib ot ruff torchcfm torchdiffeq transformers".split()
sys.modules |= dict.fromkeys(names)
distribution = importlib.metadata.distribution

def found(name):
    if name.replace("-", "_") in names:
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(name)

importlib.metadata.distribution = found
importlib.metadata.version = lambda name: found(name).version
import pytest

sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def without(*arguments):
    """pytest's output and its exit status, in a process in which the packages cannot be imported or asked for."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    return done.stdout + done.stderr, done.returncode


def test_everything_is_collected():
    output, code = without("tests", "benchmarks", "--collect-only")
    assert code == 0, output[-3000:]
    for file in (
        "tests/backends/test_triton_operations.py",
        "benchmarks/test_sampling_loops.py",
        "benchmarks/test_operations.py",
    ):
        assert f"{file}::" in output, file


def test_what_compares_with_them_is_skipped():
    cases = "tests/bench/test_bench.py::TestPeers", "tests/bench/test_bench.py::TestRun::test_page"
    output, code = without(*cases, "benchmarks/test_diffusers_schedulers.py", "--benchmark-disable")
    assert code == 0 and "skipped" in output, output[-3000:]
