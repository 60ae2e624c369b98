"""Every test runs with fresh buffers poisoned with NaN, a fixed seed and the automatic choice of backend."""

import contextlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton looks at this when kernels are first imported: without a GPU, its interpreter runs them. It is a forced
    # backend then (use_backend("triton")); nothing else changes. What is compiled is compiled in another process.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Looked at when CUDA starts: matrix products that are the same each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from asked import triton
from devices import BACKENDS, NIGHTLY, why_skipped

import fastdiff


def pytest_configure():
    # One thread: the tests run in parallel processes, and the tensors are small.
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # on a GPU, float32 convolutions round to 10 bits by default


def pytest_collection_modifyitems(config, items):
    if not NIGHTLY and "nightly" not in config.option.markexpr:
        late = [item for item in items if "nightly" in item.keywords]
        config.hook.pytest_deselected(items=late)
        items[:] = [item for item in items if "nightly" not in item.keywords]
    gpu = torch.cuda.is_available()
    for item in items:
        reason = why_skipped(item.path.name, item.keywords, config.option.markexpr, gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def clean_state():
    # In this mode torch.empty is filled with NaN, so a result that reads what nobody wrote cannot pass.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    fastdiff.use_backend(None)
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def forced(backend, monkeypatch):
    """A backend of the CPU, the native one perhaps without its calls for the plain case; or Triton's interpreter."""
    name = backend.split(",")[0]
    found = {status.name: status for status in fastdiff.backends.status()}[name]
    because = triton.no_device_because() if name == "triton" else "" if found.available else found.reason
    if because:
        pytest.skip(because)
    if name != backend:
        monkeypatch.setattr(fastdiff.backends.native.backend, "fast", None)
    with fastdiff.use_backend(name):
        yield name


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Runs the test once with each backend of the CPU; the native one also without its calls for the plain case."""
    if request.param == "cuda":
        yield request.param
        return
    with forced(request.param, monkeypatch) as name:
        yield name


@pytest.fixture(params=["reference", "native", "native, no fast calls", "triton"])
def everywhere(request, monkeypatch):
    """Each backend of the CPU, and Triton's interpreter."""
    with forced(request.param, monkeypatch) as name:
        yield name


@pytest.fixture
def device(backend):
    """Where the test's tensors are: see ``on_every_device``."""
    return torch.device("cuda" if backend == "cuda" else "cpu")
