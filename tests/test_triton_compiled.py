"""What the Triton kernels compile to, for targets that need not be there: no GPU is used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton

pytestmark = pytest.mark.compiles
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"]
# Instructions per element on sm_90. The losses are those of the forward pass, which writes the gradient too.
BUDGETS = {
    "noising, fast": 25, "noising, exact": 40,
    "loss epsilon, fast": 28, "loss v, fast": 33, "loss flow, fast": 30,
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """In another process: this one's kernels may be the interpreter's. Other instruction counts than those of the
    pinned version mean nothing."""
    if not triton.__version__.startswith("3.6."):
        pytest.skip(f"budgets are for Triton 3.6; this is {triton.__version__}")
    out = tmp_path_factory.mktemp("compiled") / "compiled.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "triton_compiled.py", "--json", out],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spills_or_float64(compiled, target):
    found = [r for r in compiled if r["target"] == target]
    assert {r["kernel"] for r in found} == {"affine", "loss", "rational", "step", "uniforms"}
    for r in found:
        assert r["spills"] == 0, r
        assert r["kernel"] in ("rational", "uniforms") or not r["float64"], r


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_loads_and_stores_of_128_bits(compiled, target, dtype):
    """Rows that are a multiple of 8 elements long: all full-size data is read and written by vectors."""
    width = {"bf16": 8, "fp32": 4}[dtype]
    for r in compiled:
        if r["target"] == target and r["case"] in (f"noising, given, {dtype}", f"loss v, given, {dtype}"):
            each = r["elements"] / width
            inputs = 2 if r["kernel"] == "affine" else 3
            if target != "gfx942":  # its warps are of 64
                assert r["wide_stores"] == each and r["wide_loads"] == inputs * each, r
            assert r["wide_stores"] > 0 and r["wide_loads"] >= inputs * r["wide_stores"], r


def test_noise_that_goes_into_two_results_is_made_once(compiled):
    """By the threads that store it. What a second result adds is a few instructions for each element, not its noise."""
    found = {r["case"]: r["instructions"] / r["elements"] for r in compiled if r["target"] == "sm_90"}
    for rng in ("fast", "exact"):
        assert found[f"noising with target, {rng}, bf16"] <= found[f"noising, {rng}, bf16"] + 5
    assert found["noising, kept, bf16"] <= found["noising, exact, bf16"] + 5


def test_frames_of_a_video_are_read_by_vectors(compiled):
    """5400 elements a row, no multiple of 16."""
    for operation, inputs in (("noising", 2), ("loss v", 3)):
        (r,) = [r for r in compiled if r["case"] == f"{operation}, given, frames of a video, bf16"]
        assert (r["wide_loads"], r["wide_stores"]) == (inputs * r["elements"] / 8, r["elements"] / 8), r


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("case", BUDGETS)
def test_budgets_of_instructions(compiled, case, dtype):
    (r,) = [r for r in compiled if r["target"] == "sm_90" and r["case"] == f"{case}, {dtype}"]
    assert r["instructions"] / r["elements"] <= BUDGETS[case]
