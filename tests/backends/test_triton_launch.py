"""The cached launcher, without a GPU: what makes two variants, what is compiled for them, and how they are called."""

import pytest
import torch
from costs import python_calls
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from asked import triton as operations

from fastdiff.backends.interface import run
from fastdiff.backends.triton import arguments as taken
from fastdiff.backends.triton import fast as fast_calls
from fastdiff.backends.triton import launch, sequence, workspace
from fastdiff.backends.triton.affine import affine
from fastdiff.backends.triton.loss import loss
from fastdiff.backends.triton.programs import coefficients
from fastdiff.backends.triton.step import step
from fastdiff.calls import LossCall, NoiseCall

X = torch.zeros(1, 64)


def captured(monkeypatch, call):
    """The (kernel, arguments, constants) of a launch that does not happen."""
    found = []
    monkeypatch.setattr(launch.Kernel, "__call__", lambda kernel, device, grid, *rest: found.append((kernel, *rest)))
    monkeypatch.setattr(taken, "runs_on", lambda device: True)
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
    source = affine.source(types, aligned, constants)
    assert list(source.signature) == affine.runtime + affine.constants
    assert source.signature["u"] == "*fp32" and source.signature["kept"] == "constexpr"
    assert source.signature["stream"] == "i64" and source.signature["units"] == "i32"
    assert source.signature["gamma"] == "fp32"
    position = affine.runtime.index("u")
    assert source.attrs[(position,)] == [["tt.divisibility", 16]]
    assert (affine.runtime.index("a"),) not in source.attrs  # a row may lie anywhere
    assert not affine.source(types, False, constants).attrs


def test_contraction_only_where_no_bits_are_promised(monkeypatch):
    from fastdiff import ops

    def options(n, nvidia=False):
        monkeypatch.setattr(launch, "has_approximate_instructions", lambda device: nvidia)
        one = torch.ones(1, 1)
        how = None, one, None, one, None, None, "mse", "none", "mean"
        ((kernel, _, constants),) = captured(monkeypatch, lambda: operations.loss(X, None, n, *how))
        return kernel.options(constants)["enable_fp_fusion"]

    assert options(X) and options(ops.Philox(1, rng="fast")) and not options(ops.Philox(1))
    assert options(ops.Philox(1), nvidia=True) and not options(ops.Philox(1, offset=0.1), nvidia=True)

    for n in (X, ops.Philox(1), ops.Philox(1, rng="fast")):
        _, _, constants, _ = noising(monkeypatch, n=n)
        fast = n is not X and n.rng == "fast"
        assert affine.options(constants)["enable_fp_fusion"] == fast


class Compiled:
    """Stands in for a compiled kernel: keeps what it is called with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.calls = []

    def run(self, *arguments):
        self.calls.append(arguments)


@pytest.fixture
def direct(monkeypatch):
    """Launches go the way they go on a GPU, to kernels that are not compiled. Gives their keys and stand-ins."""
    keys, kernels = [], []

    def compile(kernel, key, target):
        keys.append(key)
        kernels.append(Compiled())
        kernels[-1].kernel = kernel
        return kernels[-1]

    class Driver:
        get_current_target = staticmethod(lambda: None)

    monkeypatch.setattr(launch.Kernel, "compile", compile)
    monkeypatch.setattr(launch, "_direct", lambda device: True)
    monkeypatch.setattr(launch, "_stream", lambda device: 77)
    monkeypatch.setattr(launch.triton.runtime, "driver", type("Drivers", (), {"active": Driver}))
    monkeypatch.setattr(taken, "runs_on", lambda device: True)
    for kernel in (affine, coefficients, loss, step):
        monkeypatch.setattr(kernel, "_variants", {})
    return keys, kernels


def test_how_a_compiled_kernel_is_called(direct):
    """With pointers and numbers, in the order of the arguments."""
    given = {"out": torch.empty(1, 64), "u": X, "a": torch.ones(1, 1), "seed": 12}
    given |= dict.fromkeys(("kept", "target", "v", "xi", "b", "p", "q"))
    arguments = [given.get(name, 100 + k) for k, name in enumerate(affine.runtime)]
    constants = tuple(name == "WIDE" or name for name in affine.constants)
    variant = affine(X.device, (5, 2), tuple(arguments), constants)
    values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    (kernel,) = direct[1]
    assert kernel.calls == [(5, 2, 1, 77, "function", "metadata", None, None, None, *values, *constants)]
    # What each of these is packed as: a pointer, a number of 64 bits, a float32; what is not there, as nothing.
    kinds = dict(zip(affine.runtime, variant.layout))
    assert [kinds[name] for name in ("out", "v", "seed", "strength", "units")] == ["Q", None, "q", "f", "q"]


def test_one_compilation_a_variant(direct):
    """What is looked at in each launch tells apart what ``key`` does: every dtype, what is not there, alignment,
    constants, and a seed that is a number or on the device."""
    from fastdiff import ops

    keys, kernels = direct
    row, table = torch.ones(1, 1), torch.ones(18)
    bf16, odd = X.bfloat16(), torch.zeros(65)[1:].view(1, 64)
    how = None, row, None, None, "mse", "none", "mean"

    def calls():
        for n in (X, bf16, odd, ops.Philox(1), ops.Philox(torch.tensor([1])), ops.Philox(1, rng="fast")):
            operations.noise(X, n, row, row, 0.0, None, False)
            operations.noise(X, n, row, row, 0.0, None, True)
            operations.noise_and_target(X, n, row, row, 0.0, None, False, row, None)
            operations.loss(X, None, n, None, row, *how)
            operations.loss(bf16, X, n, row, row, *how)
            operations.step(X, X, None, 1.0, table, None, (), n, None, torch.float32, (True, True))
        for seed in (5, torch.tensor([5])):
            operations.uniform(seed, 3, 0, 0, X.device)

    calls()
    assert len(set(keys)) == len(keys) > 30
    made = len(keys)
    calls()
    assert len(keys) == made and all(len(kernel.calls) % 2 == 0 for kernel in kernels)


class Allocations(TorchDispatchMode):
    """Counts tensors of new memory, and names what else is computed."""

    def __init__(self):
        super().__init__()
        self.made, self.others = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "empty" in function.name():
            self.made += 1
        elif not function.is_view and "detach" not in function.name():
            self.others.append(function.name())
        return function(*args, **(kwargs or {}))


def test_what_a_launch_costs_the_host(direct):
    """Once its variant is there: no compilation, no allocation but of results, and few calls of Python. (The time that
    this takes is for the benchmarks to say.)"""
    from fastdiff import ops

    keys, kernels = direct
    x0, rows, seed = torch.zeros(1, 4, 8, 8), torch.rand(2, 1, 1, 1, 1), torch.tensor([3])
    prediction, one = torch.zeros(1, 4, 8, 8).requires_grad_(), torch.tensor(1.0)

    def noise():
        call = NoiseCall(x0, ops.Philox(seed), *rows, keep_noise=False)
        return run(operations.backend, call)

    def loss():
        call = LossCall(prediction, None, x0, None, rows[0], None, rows[1])
        return run(operations.backend, call)

    calls = {
        "noising": (noise, 1, 1),
        # The loss, its gradient, and the upstream gradient that it is for.
        "loss": (lambda: loss().backward(one), 2, 3),
    }
    most = {"noising": 55, "loss": 180}  # 44 and 150, and room for another PyTorch
    torch.use_deterministic_algorithms(False)  # which fills what is empty
    for name, (call, launched, made) in calls.items():
        for _ in range(2):
            prediction.grad = None
            call()
        compiled, before = len(keys), sum(len(kernel.calls) for kernel in kernels)
        prediction.grad = None
        with Allocations() as allocations:
            call()
        assert len(keys) == compiled and sum(len(kernel.calls) for kernel in kernels) == before + launched
        assert allocations.made == made and not allocations.others, name
        prediction.grad = None
        entered = python_calls(call)
        assert entered <= most[name], f"{name}: {entered}"


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "flow"])
def test_a_fast_call_makes_the_launches_of_the_general_way(direct, kind, monkeypatch):
    """Kernels, grids, numbers, constants, and the pointers of what is given, as they change from step to step."""
    from asked import triton

    import fastdiff

    _, kernels = direct
    flow = kind == "flow"
    process = fastdiff.RectifiedFlow() if flow else fastdiff.VariancePreserving()
    objective = fastdiff.Objective(process, kind, None if flow else fastdiff.MinSNR(5.0))
    numbers = (launch._NUMBERS | launch._INT64 | launch._FLOATS) - {"stride"}  # the tables have other columns

    def launched(samples, seed, offset, strength):
        objective.noise_offset = strength
        x0, t = torch.zeros(samples, 4, 8, 8), torch.arange(samples) / 7 if flow else torch.arange(samples)
        prediction, one = torch.zeros(samples, 4, 8, 8).requires_grad_(), torch.tensor(1.0)
        given = {tensor.data_ptr(): k for k, tensor in enumerate((x0, t, prediction, one))}
        made = {id(kernel): len(kernel.calls) for kernel in kernels}
        noised = objective.noise(x0, t, seed=seed, sample_offset=offset, rng="fast")
        objective.loss(prediction, noised).backward(one)
        found = []
        for kernel in kernels:
            for call in kernel.calls[made.get(id(kernel), 0) :]:
                named = dict(zip(kernel.kernel.runtime + kernel.kernel.constants, call[9:]))
                how = {
                    name: given.get(value, value)
                    for name, value in named.items()
                    if name in numbers or name.isupper() or value is None or value in given
                }
                found.append((kernel.kernel.name, call[:4], how))
        return sorted(found, key=repr)

    with fastdiff.use_backend("triton"):
        for case in ((2, 3, 0, 0.1), (2, 4, 2**33, 0.2), (1, -5, 7, 0.0), (3, 6, 7, 0.1), (2, 7, 1, 0.1)):
            with monkeypatch.context() as patch:
                patch.setattr(triton.backend, "fast", None)
                want = launched(*case)
            assert [name for name, *_ in want] == ["affine", *["coefficients"] * flow, "loss", "loss"]
            assert launched(*case) == want
            assert launched(*case) == want


def test_a_sequence_calls_compiled_kernels_only_for_data_like_the_first(direct, monkeypatch):
    """Aligned, on the current device, and where launches are not collected; otherwise ``Kernel`` looks at the data."""
    import fastdiff

    objective, x0 = fastdiff.Objective(fastdiff.VariancePreserving()), torch.zeros(2, 4, 8, 8)
    odd = torch.zeros(2 * 4 * 8 * 8 + 1)[1:].view(x0.shape)
    looked_at, call = [], launch.Kernel.__call__
    looks = lambda kernel, *how: looked_at.append(kernel.name) or call(kernel, *how)  # noqa: E731
    monkeypatch.setattr(launch.Kernel, "__call__", looks)

    def looked(x0):
        looked_at.clear()
        before = sum(len(kernel.calls) for kernel in direct[1])
        objective.noise(x0, seed=1)
        assert sum(len(kernel.calls) for kernel in direct[1]) == before + 2
        return looked_at

    with fastdiff.use_backend("triton"):
        assert looked(x0) == ["coefficients", "affine"]
        assert looked(x0) == []
        assert looked(odd) == looked(odd) == ["affine"]  # the times are drawn into other memory
        with launch.launches():
            assert looked(x0) == ["coefficients", "affine"]
        with monkeypatch.context() as patch:
            patch.setattr(sequence, "is_current", lambda device: False)
            assert looked(x0) == ["coefficients", "affine"]
        assert looked(x0) == []


def test_losses_of_two_objectives_are_told_apart(direct, monkeypatch):
    """Each has the upstream gradient that came last to it, so that neither computes its gradient twice."""
    import fastdiff

    kinds = []
    monkeypatch.setattr(
        fast_calls,
        "cell",
        lambda device, kind: kinds.append(kind) or workspace.Cell(torch.zeros(1), (False, device, 0)),
    )
    x0, n, t = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), torch.tensor([3, 700])
    prediction = torch.zeros(2, 4, 8, 8).requires_grad_()
    with fastdiff.use_backend("triton"):
        objectives = [fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon", loss=loss) for loss in ("mse", "l1")]
        for objective in [*objectives, *objectives]:
            objective.loss(prediction, objective.noise(x0, t, n))
    assert kinds[:2] == kinds[2:] and kinds[0] != kinds[1]


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "flow", "SD3", "edm", "VPSDE", "a function"])
def test_what_a_training_step_costs_the_host(direct, kind, monkeypatch):
    import fastdiff

    keys, kernels = direct
    monkeypatch.setattr(fast_calls, "value_checks_are_free", lambda tensor: False)  # as on a GPU
    shifted = fastdiff.RectifiedFlow(3.0)
    objective = {
        "flow": lambda: fastdiff.Objective(fastdiff.RectifiedFlow(), "flow"),
        "SD3": lambda: fastdiff.Objective(shifted, "flow", "cosmap", timesteps="logit_normal", error_space="sample"),
        "edm": lambda: fastdiff.Objective(fastdiff.EDM(), "edm", "edm"),
        "VPSDE": lambda: fastdiff.Objective(fastdiff.VPSDE(), "v_prediction", "likelihood"),
        "a function": lambda: fastdiff.Objective(fastdiff.VPSDE(), weighting=lambda levels: 1 / (1 + levels.t)),
    }.get(kind, lambda: fastdiff.Objective(fastdiff.VariancePreserving(), kind))()
    x0, prediction = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8).requires_grad_()
    torch.use_deterministic_algorithms(False)
    with fastdiff.use_backend("triton"):
        for _ in range(2):
            objective.loss(prediction, objective.noise(x0)).backward()
        launched, compiled = sum(len(kernel.calls) for kernel in kernels), len(keys)
        noised = objective.noise(x0)
        loss = objective.loss(prediction, noised)
        loss.backward()
        # The times (with the coefficients at them), x_t, the loss with its gradient, whether that is the one wanted.
        assert sum(len(kernel.calls) for kernel in kernels) == launched + 4 and len(keys) == compiled
        loss = objective.loss(prediction, noised)
        entered = {
            "noise": python_calls(lambda: objective.noise(x0)),
            "loss": python_calls(lambda: objective.loss(prediction, noised)),
            "backward": python_calls(loss.backward),
        }
    # By Python: 62, 67 and 42, and room for another PyTorch. (By C++: see test_gpu_launch.py.)
    most = {"noise": 66, "loss": 71, "backward": 46}
    assert all(entered[name] <= most[name] for name in most), entered


def jit_key(kernel, arguments, constants):
    """What ``triton.jit`` tells variants apart by: its own binder, for an AMD GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    function = kernel.function
    if not isinstance(function, JITFunction):  # the interpreter's
        function = JITFunction(function.fn, do_not_specialize=function.kwargs["do_not_specialize"])
    backend = make_backend(GPUTarget("hip", "gfx942", 64))
    binder = create_function_from_signature(function.signature, function.params, backend)
    _, specialization, options = binder(*arguments, *constants, **kernel.options(constants))
    return tuple(specialization), tuple(options.items())


def test_triton_jit_makes_no_more_variants(monkeypatch):
    """Sizes, counts, strides, streams, offsets and rows that lie anywhere: where ours is one variant, its is one."""
    from fastdiff import ops
    from fastdiff.program import trace
    from fastdiff.tensors import Gathered

    table, how = torch.ones(1000, 5), ("mse", "none", "mean")
    program = trace(lambda t: {"a": 2 * t, "b": 1 / t}, 0.0, 1.0)
    launched = []

    def calls(samples, width, stream, offset, seed, column):
        x = torch.zeros(samples, width)
        t = torch.zeros(samples, 1, dtype=torch.int64)
        first, second = (Gathered(table[:, k % 5], t) for k in (column, column + 1))
        row, coefficients = torch.ones(samples + 1, 1)[column % 2 :][:samples], torch.ones(19)[column % 2 :][:18]
        for n in (x, ops.Philox(torch.tensor([seed]), offset, stream), ops.Philox(seed, offset, stream)):
            operations.noise(x, n, first, second, 0.0, None, False)
            operations.noise(x, n, row, row, 0.0, None, False)
            operations.loss(x, x, n, first, second, None, row, None, None, *how)
            operations.step(x, x, None, 1.0, coefficients, None, (), n, None, x.dtype, (True, False))
        operations.uniform(torch.tensor([seed]), samples, stream, offset, x.device)
        operations.evaluate(program, torch.ones(samples), torch.float32)

    def record(kernel, device, grid, arguments, constants):
        launched.append((kernel, arguments, constants))

    monkeypatch.setattr(launch.Kernel, "__call__", record)
    monkeypatch.setattr(taken, "runs_on", lambda device: True)
    for k, (samples, width) in enumerate([(1, 4096), (2, 8192), (3, 4096 * 3), (16, 4096 * 5), (17, 4096), (4, 65536)]):
        for stream, offset, seed in ((0, 0, 2**40), (1, 1, -(2**62)), (16, 2**33 + 1, 2**63 - 1)):
            calls(samples, width, stream, offset, seed, k)
    ours, theirs = {}, {}
    for kernel, arguments, constants in launched:
        key = kernel.name, kernel.key(arguments, constants, 0)
        ours.setdefault(key, set()).add(jit_key(kernel, arguments, constants))
        theirs.setdefault((kernel.name, jit_key(kernel, arguments, constants)), set()).add(key)
    assert {name for name, _ in ours} == {"affine", "coefficients", "loss", "step"}
    assert len(launched) > 10 * len(ours)
    assert all(len(keys) == 1 for keys in ours.values())
    assert len(theirs) == len(ours)


def test_a_kernel_that_is_first_needed_in_a_capture(direct, monkeypatch):
    """CUDA may refuse to load it there. Then the error says what to do, and nothing is kept of the attempt."""

    def refused(kernel, key, target):
        raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")

    rows = torch.ones(2, 1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(launch.Kernel, "compile", refused)
        with pytest.raises(RuntimeError, match="operation not permitted"):
            operations.noise(X, X, *rows, 0.0, None, False)
        patch.setattr(launch, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="'affine' could not be loaded .* once before") as found:
            operations.noise(X, X, *rows, 0.0, None, False)
        assert "operation not permitted" in str(found.value.__cause__)
    operations.noise(X, X, *rows, 0.0, None, False)
    assert len(direct[0]) == 1


def test_workspaces_are_shared_by_a_stream_and_grow(monkeypatch):
    monkeypatch.setattr(workspace, "_workspaces", {})
    monkeypatch.setattr(workspace, "current_stream", lambda device: stream)
    cpu, stream = torch.device("cpu"), 1
    first = workspace.workspace(cpu, 3, 100)
    assert workspace.workspace(cpu, 2, 50) is first and not first.counters.any()
    larger = workspace.workspace(cpu, 300, 100)
    assert larger is not first and larger.counters.numel() >= 300
    stream = 2
    assert workspace.workspace(cpu, 2, 50) is not larger
    monkeypatch.setattr(workspace, "is_capturing", lambda device: True)
    assert workspace.workspace(cpu, 2, 50) is not workspace.workspace(cpu, 2, 50)


@pytest.mark.parametrize("has_triton", [True, False])
def test_noise_is_kept_unless_triton_makes_it(has_triton, monkeypatch):
    """The CUDA backend has no noise of its own: whether it is made again is up to the one that makes it there."""
    import fastdiff
    from fastdiff import ops
    from fastdiff.backends import registry

    kept = {name: not registry.remakes_noise(torch.device(name)) for name in ("cpu", "meta")}
    assert kept == {"cpu": True, "meta": True}
    because = "" if has_triton else "not there"
    monkeypatch.setattr(registry._BACKENDS["triton"], "unavailable_because", because)
    monkeypatch.setitem(registry._CHOICE, "cpu", "cuda")
    assert registry.remakes_noise(torch.device("cpu")) == has_triton
    noised = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow").noise(X, seed=1)
    assert isinstance(noised.noise_source, ops.Philox if has_triton else torch.Tensor)
