"""The cached launcher, without a GPU: what makes two variants, what is compiled for them, and how they are called."""

import pytest
import torch

pytest.importorskip("triton")
from fastdiff.backends.triton import launch, operations, workspace

X = torch.zeros(1, 64)


def captured(monkeypatch, call):
    """The (kernel, arguments, constants) of a launch that does not happen."""
    found = []
    monkeypatch.setattr(launch.Kernel, "__call__", lambda kernel, device, grid, *rest: found.append((kernel, *rest)))
    monkeypatch.setattr(operations, "_runs_on", lambda device: True)
    call()
    return found


def noising(monkeypatch, x0=X, n=X, rows=None):
    rows = torch.ones(len(x0), 1) if rows is None else rows
    ((kernel, arguments, constants),) = captured(
        monkeypatch, lambda: operations.noise(x0, n, rows, rows, 0.0, None, False)
    )
    return kernel.key(arguments, constants, 0)


def test_what_makes_a_variant(monkeypatch):
    first = noising(monkeypatch)
    assert first == noising(monkeypatch, X + 1, X + 2) and hash(first) == hash(noising(monkeypatch))
    assert noising(monkeypatch, torch.zeros(1, 64 * 3)) != first  # another tile
    large, larger = torch.zeros(8, 4096), torch.zeros(24, 8192)
    assert noising(monkeypatch, large, large) == noising(monkeypatch, larger, larger)  # sizes are arguments
    assert noising(monkeypatch, X.bfloat16()) != first
    assert noising(monkeypatch, torch.zeros(65)[1:].view(1, 64)) != first  # not aligned
    assert not noising(monkeypatch, torch.zeros(65)[1:].view(1, 64))[1]


def test_the_source_of_a_variant(monkeypatch):
    types, aligned, constants, _ = noising(monkeypatch)
    source = launch.affine.source(types, aligned, constants)
    assert list(source.signature) == launch.affine.runtime + launch.affine.constants
    assert source.signature["u"] == "*fp32" and source.signature["kept"] == "constexpr"
    assert source.signature["stream"] == "i64" and source.signature["units"] == "i32"
    assert source.signature["gamma"] == "fp32"
    position = launch.affine.runtime.index("u")
    assert source.attrs[(position,)] == [["tt.divisibility", 16]]
    assert (launch.affine.runtime.index("a"),) not in source.attrs  # a row may lie anywhere
    assert not launch.affine.source(types, False, constants).attrs


def test_contraction_only_where_no_bits_are_promised(monkeypatch):
    from fastdiff import ops

    def options(n):
        one = torch.ones(1, 1)
        how = None, one, None, one, None, None, "mse", "none", "mean"
        ((kernel, _, constants),) = captured(monkeypatch, lambda: operations.loss(X, None, n, *how))
        return kernel.options(constants)["enable_fp_fusion"]

    assert options(X) and options(ops.Philox(1, rng="fast")) and not options(ops.Philox(1))

    for n in (X, ops.Philox(1), ops.Philox(1, rng="fast")):
        _, _, constants, _ = noising(monkeypatch, n=n)
        fast = n is not X and n.rng == "fast"
        assert launch.affine.options(constants)["enable_fp_fusion"] == fast


def test_how_a_compiled_kernel_is_called():
    calls = []

    class Compiled:
        run = staticmethod(lambda *arguments: calls.append(arguments))
        function, packed_metadata = "function", "metadata"

    launch._Direct(Compiled())((5, 2), 77, (X, None, 3, 0.5), ("exact", 64))
    assert calls == [(5, 2, 1, 77, "function", "metadata", None, None, None, X.data_ptr(), None, 3, 0.5, "exact", 64)]


def test_workspaces_are_shared_by_a_stream_and_grow(monkeypatch):
    monkeypatch.setattr(workspace, "_workspaces", {})
    monkeypatch.setattr(workspace, "current_stream", lambda device: stream)
    cpu, stream = torch.device("cpu"), 1
    first = workspace.workspace(cpu, 3, 100)
    assert workspace.workspace(cpu, 2, 50) is first and not first.counters.any()
    first.assumed.fill_(0.25)
    larger = workspace.workspace(cpu, 300, 100)
    assert larger is not first and larger.counters.numel() >= 300 and float(larger.assumed) == 0.25
    stream = 2
    assert workspace.workspace(cpu, 2, 50) is not larger
    monkeypatch.setattr(workspace, "is_capturing", lambda device: True)
    assert workspace.workspace(cpu, 2, 50) is not workspace.workspace(cpu, 2, 50)


@pytest.mark.parametrize("has_triton", [True, False])
def test_noise_is_kept_unless_triton_makes_it(has_triton, monkeypatch):
    """The CUDA backend has no noise of its own: whether it is made again is up to the one that makes it there."""
    import fastdiff
    from fastdiff import backends, ops

    kept = {name: not backends.remakes_noise(name) for name in ("cpu", "meta")}
    assert kept == {"cpu": True, "meta": True}
    monkeypatch.setattr(backends._MODULES["triton"], "available", has_triton)
    monkeypatch.setitem(backends._CHOICE, "cpu", "cuda")
    assert backends.remakes_noise("cpu") == has_triton
    noised = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow").noise(X, seed=1)
    assert isinstance(noised.noise_source, ops.Philox if has_triton else torch.Tensor)
