"""What the Triton kernels compile to, for targets that need not be there: no GPU is used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from devices import NIGHTLY, nightly

pytest.importorskip("triton")
import triton

pytestmark = pytest.mark.compiles
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TARGETS = ["sm_80", "sm_90", "gfx942", *(pytest.param(target, marks=nightly) for target in ("sm_89", "sm_100"))]
# Instructions per element on sm_90. The losses are those of the forward pass, which writes the gradient too.
BUDGETS = {
    "noising, fast": 25, "noising, exact": 40,
    "loss epsilon, fast": 28, "loss v, fast": 33, "loss flow, fast": 30, "loss v at once, fast": 33,
    "hybrid loss, fast": 76, "hybrid loss, given": 60,
    "latents and noising, fast": 63, "latents and noising, exact": 89, "divergence from N(0, 1)": 32,
}  # fmt: skip
# Decoding adds a conversion, a product, a multiply-add and a sum.
IMAGES = {
    "noising images, fast": 30, "noising images, exact": 45, "noising images, given": 14,
    "loss v of images, fast": 38, "loss v of images, given": 20,
}  # fmt: skip
# Tokens are found element by element, and moved between threads: those of an image's row lie apart.
TOKENS = {
    "noising into tokens, fast": 56, "noising into tokens, exact": 70, "noising into tokens, given": 45,
    "loss flow of tokens, fast": 73, "loss flow of tokens, exact": 86, "loss flow of tokens, given": 57,
    "loss epsilon of tokens, fast": 69, "loss epsilon of tokens, exact": 82, "loss epsilon of tokens, given": 54,
}  # fmt: skip
# In bfloat16, with the noise given: error functions and masks cost few instructions more than a square. And moments.
FUNCTIONS = {
    "loss epsilon, given": 10, "loss smooth_l1, given": 14, "loss pseudo_huber, given": 20, "loss log_cosh, given": 42,
    "loss combined, given": 88, "loss by elements, given": 10,
    "loss, mask, given": 25, "loss, mask's mean, given": 32, "moments": 26, "moments of one": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """In another process: this one's kernels may be the interpreter's. Other instruction counts than those of the
    pinned version mean nothing."""
    if not triton.__version__.startswith("3.6."):
        pytest.skip(f"budgets are for Triton 3.6; this is {triton.__version__}")
    out = tmp_path_factory.mktemp("compiled") / "compiled.json"
    targets = [] if NIGHTLY else ["--targets", *(target for target in TARGETS if isinstance(target, str))]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "triton_compiled.py", "--json", out, *targets],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spills_or_float64(compiled, target):
    found = [r for r in compiled if r["target"] == target]
    assert {r["kernel"] for r in found} == {
        *("affine", "coefficients", "gaussian_kl", "loss", "row_moments", "row_moments_gradient", "step"),
        *("kl_normal", "posterior", "posterior_gradient", "windowed"),
    }
    for r in found:
        # A launch of a number a sample may: NVIDIA's functions of an angle have an array for huge ones, and others save
        # registers around a division.
        assert r["spills"] <= (12 if r["kernel"] == "coefficients" else 0), r
        assert r["kernel"] == "coefficients" or not r["float64"], r


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_loads_and_stores_of_128_bits(compiled, target, dtype):
    """Rows that are a multiple of 8 elements long: all full-size data is read and written by vectors."""
    width = {"bf16": 8, "fp32": 4}[dtype]
    for r in compiled:
        names = "noising", "loss v", "latents and noising"
        if r["target"] == target and r["case"] in (f"{name}, given, {dtype}" for name in names):
            each = r["elements"] / width
            # The gradient of a loss, or the zeros of a row that is left out: each by a predicate.
            inputs, stores = {"affine": (2, 1), "loss": (3, 2), "posterior": (4, 2)}[r["kernel"]]
            if target != "gfx942":  # its warps are of 64
                assert r["wide_stores"] == stores * each and r["wide_loads"] == inputs * each, r
            assert r["wide_stores"] > 0 and r["wide_loads"] * stores >= inputs * r["wide_stores"], r


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
        assert (r["wide_loads"], r["wide_stores"]) == (inputs * r["elements"] / 8, (inputs - 1) * r["elements"] / 8), r


def of_sm_90(compiled, case):
    (r,) = [r for r in compiled if r["target"] == "sm_90" and r["case"] == case]
    return r


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("case", BUDGETS)
def test_budgets_of_instructions(compiled, case, dtype):
    r = of_sm_90(compiled, f"{case}, {dtype}")
    assert r["instructions"] / r["elements"] <= BUDGETS[case]


@pytest.mark.parametrize("case", [*IMAGES, *TOKENS])
def test_budgets_of_images_and_tokens(compiled, case):
    r = of_sm_90(compiled, f"{case}, bf16")
    assert r["instructions"] / r["elements"] <= (IMAGES | TOKENS)[case]


@pytest.mark.parametrize("case", FUNCTIONS)
def test_budgets_of_error_functions_masks_and_moments(compiled, case):
    r = of_sm_90(compiled, f"{case}, bf16")
    assert r["instructions"] / r["elements"] <= FUNCTIONS[case]


@pytest.mark.parametrize("rng", ["fast", "exact"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_data_is_on_its_way_while_noise_is_made(compiled, rng, dtype):
    """The loads themselves come behind the noise; the prefetches, of 64 bytes each, near the top."""
    for case, tensors in (("noising", 1), ("loss epsilon", 1), ("loss v", 2)):
        r = of_sm_90(compiled, f"{case}, {rng}, {dtype}")
        bytes_a_thread = r["elements"] * {"bf16": 2, "fp32": 4}[dtype]
        assert len(r["prefetches"]) == tensors * bytes_a_thread / 64 and r["prefetches"][-1] < 40, r


def test_predicted_shares_of_the_copy_reach_their_goals(compiled, monkeypatch):
    """Of noising and of the losses that read x0. epsilon's loss does as much for fewer bytes."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import roofline

    for rng, goals in roofline.GOALS.items():
        for case in ("noising", "loss v", "loss flow"):
            r = of_sm_90(compiled, f"{case}, {rng}, bf16")
            for gpu, least in goals.items():
                share = roofline.share_of_copy(
                    r["instructions"] / r["elements"], r["bytes"], roofline.GPUS[gpu], r["registers"]
                )
                assert share >= least, (case, rng, gpu, share)


def test_the_roofline(monkeypatch):
    """Against numbers worked out by hand: 132 times 4 x 32 x 0.8 a clock at 1.7 GHz are 2.298e13 a second."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from roofline import GPU, gpu_of, measured, share_of_copy, warps

    gpu = GPU(132, 1.7e9, 4e12)
    assert share_of_copy(45.96, 4, gpu) == pytest.approx(0.5, rel=1e-3)
    assert share_of_copy(10, 4, gpu) == 1.0  # by the bytes
    assert share_of_copy(45.96, 4, gpu, registers=255) == pytest.approx(0.5 * 8 / 12, rel=1e-3)
    assert share_of_copy(45.96, 4, measured(gpu, clock=0.85e9, copy=2e12)) == pytest.approx(0.5, rel=1e-3)
    assert [warps(registers) for registers in (16, 64, 72, 80, 255)] == [64, 32, 28, 24, 8]
    assert gpu_of("NVIDIA H100 80GB HBM3").copy < gpu_of("NVIDIA H200").copy and gpu_of("NVIDIA A100") is None
