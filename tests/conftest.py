"""Every test runs with fresh buffers poisoned with NaN, a fixed seed and the automatic choice of backend."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton looks at this when kernels are first imported: without a GPU, its interpreter runs them. It is a forced
    # backend then (use_backend("triton")); nothing else changes. What is compiled is compiled in another process.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Looked at when CUDA starts: matrix products that are the same each time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

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


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Runs the test once with each backend of the CPU; the native one also without its calls for the plain case."""
    if request.param == "cuda":
        yield request.param
        return
    name = request.param.split(",")[0]
    found = {status.name: status for status in fastdiff.backends.status()}[name]
    if not found.available:
        pytest.skip(found.reason)
    if name != request.param:
        monkeypatch.setattr(fastdiff.backends.native.backend, "fast", None)
    with fastdiff.use_backend(name):
        yield name


@pytest.fixture
def device(backend):
    """Where the test's tensors are: see ``on_every_device``."""
    return torch.device("cuda" if backend == "cuda" else "cpu")
