"""benchmarks/gpu_memory.py, which a GPU runs under compute-sanitizer: in the interpreter it finds what is wrong."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from devices import nightly

pytest.importorskip("triton")
from fastdiff.backends.triton import interpreted, launch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_memory.py"
if not SCRIPT.exists():
    pytest.skip("without the benchmarks", allow_module_level=True)
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="compiles nothing: it is for the interpreter")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_memory", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_memory", found)  # where its dataclass looks
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # which it sets: so that it is as before afterwards
    spec.loader.exec_module(found)
    return found


@nightly
@needs_interpreter
def test_every_case_equals_the_reference(script, capsys):
    from triton_kernels import KERNELS

    assert script.main(["--device", "cpu"]) == 0
    assert "0 failed" in capsys.readouterr().out
    launched = set(KERNELS)
    assert {name for name, _ in script.variants(list(script.cases()))} == launched


@needs_interpreter
@pytest.mark.parametrize(
    ("kernel", "result", "case"),
    [
        ("affine", "out", "noising, given (3, 2, 33) rows (3, 1, 1)"),
        ("affine", "target", "with target, exact (3, 2, 33) rows (3, 1, 1)"),
        ("affine", "kept", "noising, kept, exact (3, 2, 33) rows (3, 1, 1)"),
        ("affine", "out", "noising, fast (3, 2, 33) rows (3, 1, 1)"),
        ("loss", "result", "loss, one row, mse none mean"),
        ("loss", "gradient", "loss, float16, mse none mean"),
        ("loss", "means", "loss, mask, several tiles, mse global none"),
        ("gaussian_kl", "result", "gaussian_kl, (3, 2, 33), learned none"),
        ("gaussian_kl", "gradient", "gaussian_kl, (3, 2, 33), learned, bins mean"),
        ("posterior", "z", "latents, given (3, 2, 33) rows (3, 1, 1) torch.float32"),
        ("posterior", "x_t", "latents, fast (2, 1301) rows (2, 1) torch.bfloat16"),
        ("posterior", "kept", "latents, exact (3, 2, 33) rows (3, 2, 1) torch.float32"),
        ("posterior_gradient", "gradient", "gradient of latents, exact (3, 2, 33) rows (3, 1, 1) torch.bfloat16"),
        ("kl_normal", "result", "kl_normal, (3, 2, 33) rows (1, 2, 1) none"),
        ("kl_normal", "gradient", "kl_normal, (3, 2, 33) rows (3, 1, 1) mean"),
        ("row_moments", "sum_ss", "moments, (2, 1301) rows (2, 1)"),
        ("row_moments", "sum_v1", "moments, (3, 2, 33) rows (3, 1, 1)"),
        ("row_moments_gradient", "d_u", "gradient of moments of one, (2, 3, 4, 7) rows (2, 1, 4, 1)"),
        ("row_moments_gradient", "d_v", "gradient of moments, (2, 4, 8, 8) rows (2, 1, 1, 1)"),
        ("step", "y", "step, triton, everything (3, 2, 33) torch.float32"),
        ("step", "seen", "step, triton, noise made (3, 2, 33) torch.float32"),
        ("coefficients", "drawn", "uniforms, seed a number"),
        ("coefficients", "columns", "rows of a flow, torch.float64"),
    ],
)
def test_a_spoilt_result_is_found(kernel, result, case, script, monkeypatch, capsys):
    assert script.main(["--device", "cpu", "--only", case]) == 0
    real = launch.Kernel.__call__

    def spoilt(self, device, grid, arguments, constants):
        real(self, device, grid, arguments, constants)
        value = arguments[self.runtime.index(result)] if self.name == kernel else None
        if value is not None:  # one element, by a hundredth of the largest
            value.view(-1)[-1] += 0.01 * max(1.0, float(value.abs().max()))

    monkeypatch.setattr(launch.Kernel, "__call__", spoilt)
    assert script.main(["--device", "cpu", "--only", case]) == 1
    assert f"FAILED  {case}" in capsys.readouterr().out


@needs_interpreter
def test_a_launch_that_fails_is_told(script, monkeypatch, capsys):
    def failing(*_):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(launch.Kernel, "__call__", failing)
    assert script.main(["--device", "cpu", "--only", "rows of a flow"]) == 1
    output = capsys.readouterr().out
    assert output.count("RuntimeError: an illegal memory access") == 2 and "2 cases, 2 failed" in output


def test_kernels_are_compiled_without_a_gpu(tmp_path):
    environment = os.environ | {
        "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(SCRIPT.parent.parent),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, SCRIPT, "--compile-only", "--only", "uniforms"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 kernels compiled for sm_90\n"
    assert len(list(tmp_path.rglob("coefficients.cubin"))) == 2
