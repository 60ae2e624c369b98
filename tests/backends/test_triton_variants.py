"""The Triton tests that a GPU runs: few variants of the kernels, and all their branches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from devices import nightly, why_skipped

pytest.importorskip("triton")

HERE = Path(__file__).parent
MOST = 275  # of 0.7 seconds each, on as many cores as there are


@pytest.fixture(scope="module")
def tests(tmp_path_factory):
    """In another process, which has no assertions and launches nothing."""
    out = tmp_path_factory.mktemp("variants") / "variants.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent)))}
    done = subprocess.run(
        [sys.executable, "-O", HERE / "variants.py", out], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def variants(tests):
    """What a test draws at random is not promised to any."""
    return {json.dumps(v): v for test in tests if not test["drawn"] for v in test["variants"]}.values()


def branches(variant):
    """What a variant reaches: each of its values, and the pairs that have a branch of their own."""
    kernel = variant["kernel"]
    if kernel == "coefficients":  # of a program, each operation that it has
        operations, variant = variant["CODE"][::5], {k: v for k, v in variant.items() if k not in ("CODE", "OUTPUTS")}
        return {(kernel, name, value) for name, value in variant.items()} | {(kernel, "CODE", o) for o in operations}
    found = {(kernel, name, value) for name, value in variant.items()}
    if kernel == "affine":
        found.add((kernel, "V, XI", variant["V"], variant["XI"]))
    if kernel == "loss":
        found.add((kernel, "FUNCTION, mask", variant["FUNCTION"], variant["MASK_DIMS"] >= 0))
        found.add((kernel, "N, P_KIND", variant["N"], variant["P_KIND"]))
        if variant["result"] != "None":
            sums = [variant[name] for name in ("NORMALIZATION", "REDUCTION", "SPLIT")]
            found.add((kernel, "NORMALIZATION, REDUCTION, SPLIT", *sums))
    if kernel == "gaussian_kl":
        found.add(
            (kernel, "HALF_WIDTH_KIND, P_KIND", variant["HALF_WIDTH_KIND"] == "none", variant["P_KIND"] == "none")
        )
        found.add((kernel, "L_V_KIND, SAMPLES", variant["L_V_KIND"] == "none", variant["SAMPLES"]))
        found.add((kernel, "FREEZE_MEAN, SIMPLE", variant["FREEZE_MEAN"], variant["SIMPLE_WEIGHT_KIND"] == "none"))
    return found


@nightly
def test_a_gpu_reaches_every_branch_in_few_variants(tests):
    whole, chosen = variants(tests), variants(test for test in tests if test["chosen"])
    assert {v["kernel"] for v in whole} == {
        *("affine", "coefficients", "gaussian_kl", "loss", "row_moments", "row_moments_gradient", "step"),
        *("kl_normal", "posterior", "posterior_gradient"),
    }
    assert len(chosen) <= MOST < len(whole)
    missed = set().union(*map(branches, whole)) - set().union(*map(branches, chosen))
    assert not missed, sorted(missed, key=str)


@nightly
def test_what_draws_its_cases_compiles_nothing_on_a_gpu(tests):
    assert any(test["drawn"] for test in tests)
    assert not any(test["drawn"] and test["chosen"] for test in tests)


def test_the_others_are_skipped_on_a_gpu():
    def skipped(*keywords, file="test_triton_operations.py", chosen="", gpu=True):
        return why_skipped(file, keywords, chosen, gpu) is not None

    assert skipped() and not skipped("gpu_variants") and not skipped(chosen="not gpu_variants")
    assert not skipped(gpu=False) and not skipped(file="test_triton_gpu.py")
    ptx = "test_triton_ptx.py"
    assert skipped("compiles", file=ptx) and not skipped("compiles", file=ptx, gpu=False)
    assert not skipped("compiles", file=ptx, chosen="compiles")
    assert skipped("gpu", gpu=False) and not skipped("gpu", file="test_cuda_step.py")
    assert skipped("large", gpu=False) and skipped("large") and not skipped("large", chosen="large", gpu=False)
