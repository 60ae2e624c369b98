"""Devices that a backend's code does not fit: found out once, said once, and done by the next backend. There is no GPU
here: what a driver and a compiler would answer is put in their place, the rest is real."""

import contextlib
import dataclasses
import importlib.util
import json
import warnings

import pytest
import torch
from asked import cuda, reference

import fastdiff
from fastdiff import backends, doctor, ops
from fastdiff.backends import devices, registry
from fastdiff.backends.cuda import step as on
from fastdiff.backends.cuda.trajectory import Trajectory as CudaTrajectory
from fastdiff.backends.triton import availability
from fastdiff.backends.triton.availability import unfit_because

GPUS = [torch.device("cuda", k) for k in range(3)]
NO_CODE = "the CUDA kernels cannot be loaded: no kernel image is available for execution (CUDA error 209, device 1)"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


class Machine:
    """Three GPUs, of which the first is current."""

    def __init__(self, monkeypatch):
        self.current, self.capturing, self.tries = 0, set(), []
        self.unfit = {"cuda": {}, "triton": {}}  # device -> what is raised there
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(GPUS))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current in self.capturing)
        monkeypatch.setattr(torch.cuda, "device", self.on)
        described = type("Properties", (), {"name": "GPU", "total_memory": 2**34, "major": 7, "minor": 0})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: described)
        monkeypatch.setattr(registry, "_chosen", {})
        monkeypatch.setitem(registry._CHOICE, "cuda", "cuda")
        monkeypatch.setattr(on, "built", True)
        monkeypatch.setattr(on, "_C", self)
        status = [
            dataclasses.replace(backend, available=True, reason="") if backend.name in self.unfit else backend
            for backend in registry._STATUS
        ]
        monkeypatch.setattr(registry, "_STATUS", tuple(status))
        for trial in registry._TRIED.values():
            monkeypatch.setattr(trial, "found", {})
        # ``Kernel.__call__`` would need a device's memory, so it is the launch as a whole that is put in its place.
        monkeypatch.setattr(availability, "no_device_because", lambda: "")
        monkeypatch.setattr(registry._TRIED["triton"], "_attempt", lambda device: self.try_on("triton", device.index))

    @contextlib.contextmanager
    def on(self, device):
        before, self.current = self.current, torch.device(device).index
        yield
        self.current = before

    def try_on(self, name, device):
        self.tries.append((name, device))
        if device in self.unfit[name]:
            raise self.unfit[name][device]

    def cuda_load(self, device):
        self.try_on("cuda", device)

    def cuda_architectures(self):
        return (80, 90)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def silently(call, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*arguments)


def test_each_device_is_tried_once(machine):
    for _ in range(3):
        assert silently(lambda: [backends.choose(gpu) for gpu in GPUS]) == ["cuda"] * 3
        assert [registry.get(gpu).name for gpu in GPUS] == ["cuda"] * 3
    assert machine.tries == [("cuda", 0), ("cuda", 1), ("cuda", 2)]
    assert backends.choose("cuda") == "cuda", "the current one"


def test_a_device_without_code_for_the_step_has_tritons(machine):
    machine.unfit["cuda"][1] = RuntimeError(NO_CODE + ".")
    assert silently(backends.choose, GPUS[0]) == "cuda"
    with pytest.warns(UserWarning, match=r"'cuda' cannot run on cuda:1: .*CUDA error 209.*'triton' does") as found:
        assert registry.get(GPUS[1]).name == "triton"
    assert len(found) == 1
    assert [silently(registry.get, gpu).name for gpu in GPUS[1:]] == ["triton", "cuda"]
    assert machine.tries.count(("cuda", 1)) == 1


def test_a_device_that_nothing_fits_has_the_reference(machine):
    machine.unfit["cuda"][2] = RuntimeError(NO_CODE)
    machine.unfit["triton"][2] = RuntimeError("ptxas failed\nstderr:\nno such target.\n\n.version 8")
    with pytest.warns(UserWarning) as found:
        assert registry.get(GPUS[2]).name == "reference"
    assert [str(one.message) for one in found] == [
        f"the backend 'cuda' cannot run on cuda:2: {NO_CODE}. 'reference' does.",
        "the backend 'triton' cannot run on cuda:2: ptxas failed stderr: no such target. 'reference' does.",
    ]
    assert silently(backends.choose, GPUS[2]) == "reference" and not registry.remakes_noise(GPUS[2])


def test_a_device_with_the_step_but_without_triton(machine):
    """The CUDA backend has all but the step from Triton's, whose operations go to the reference there."""
    from fastdiff.backends.triton import arguments as taken

    machine.unfit["triton"][1] = AssertionError()
    assert silently(backends.choose, GPUS[1]) == "cuda"
    assert not taken.runs_on(GPUS[1]) and taken.runs_on(GPUS[0])
    assert registry.remakes_noise(GPUS[0]) and not registry.remakes_noise(GPUS[1])
    assert unfit_because(GPUS[1]) == "AssertionError"


def test_nothing_is_tried_during_a_capture(machine):
    """And what is chosen then is not for later."""
    machine.capturing.add(1)
    assert silently(backends.choose, GPUS[1]) == "reference"
    assert machine.tries == [] and on.unfit_because(GPUS[1]).startswith("nothing ran on it before")
    assert silently(backends.choose, GPUS[0]) == "cuda", "the other device is not captured"
    machine.capturing.clear()
    assert silently(backends.choose, GPUS[1]) == "cuda"
    machine.capturing.add(1)
    assert backends.choose(GPUS[1]) == "cuda", "it is known by now"


def test_a_capture_is_asked_about_on_the_device_it_is_about(machine):
    machine.capturing.add(2)
    assert [devices.is_capturing(gpu) for gpu in GPUS] == [False, False, True] and machine.current == 0
    machine.current = 2
    assert [devices.is_capturing(gpu) for gpu in GPUS] == [False, False, True]
    assert devices.is_capturing(torch.device("cuda")) and not devices.is_capturing(torch.device("cpu"))


def test_a_run_is_captured_on_a_stream_of_its_device(machine, monkeypatch):
    """PyTorch's own choice of a stream is of the device that was captured on first."""

    class Stream:
        def __init__(self):
            self.device = machine.current

        def wait_stream(self, other):
            assert self.device == other.device

    @contextlib.contextmanager
    def graph(graph, pool=None, stream=None):
        stream = stream or first
        captured.append(stream.device)
        with machine.on(GPUS[stream.device]):
            yield

    first, captured = Stream(), []
    current = {}
    for gpu in GPUS:
        with machine.on(gpu):
            current[gpu.index] = Stream()
    for name, value in {"Stream": Stream, "graph": graph, "stream": lambda stream: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[machine.current])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": lambda self: None})())
    ran = []
    for gpu in GPUS:
        fastdiff.sampling.cuda_graph.record(lambda: ran.append(machine.current), lambda: None, gpu)
        assert ran[-1] == gpu.index
    assert captured == [0, 1, 2]


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_backend_says_why(machine, name):
    machine.unfit[name][1] = RuntimeError("no code for it")
    with fastdiff.use_backend(name):
        assert backends.choose(GPUS[0]) == name
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"'{name}' cannot run on cuda:1: no code for it"):
                registry.get(GPUS[1])
    machine.current = 1
    with fastdiff.use_backend(name):  # it runs on one that was tried
        assert backends.choose("meta") == name, "whose operations go to the reference there"
        assert name != "cuda" or backends.choose(torch.device("xpu", 0)) == name
    registry._TRIED[name].found.clear()
    with pytest.raises(RuntimeError, match=f"'{name}' is not available: not on cuda:1: no code for it"):
        fastdiff.use_backend(name)
    with fastdiff.use_backend("reference"):
        assert silently(backends.choose, GPUS[1]) == "reference"


def test_running_out_of_memory_says_nothing_about_the_kernels(machine):
    machine.unfit["cuda"][0] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        backends.choose(GPUS[0])
    del machine.unfit["cuda"][0]
    assert backends.choose(GPUS[0]) == "cuda"


def test_fake_tensors_are_not_what_is_tried(machine, monkeypatch):
    from torch._subclasses import FakeTensorMode

    kinds = []
    monkeypatch.setattr(unfit_because, "_attempt", lambda device: kinds.append(type(torch.empty(1))))
    with FakeTensorMode():
        assert unfit_because(GPUS[0]) == ""
    assert kinds == [torch.Tensor]


def test_nothing_is_tried_while_a_program_is_traced(monkeypatch):
    """An objective asks, when it is traced, whether the noise is to be kept."""
    tries = []
    monkeypatch.setattr(registry, "_chosen", {})
    monkeypatch.setitem(registry._CHOICE, "cuda", "triton")
    for trial in registry._TRIED.values():
        monkeypatch.setattr(trial, "found", {})
        monkeypatch.setattr(trial, "_attempt", tries.append)
    torch._dynamo.reset()

    def add(x):
        return x + 1 if registry.remakes_noise(torch.device("cuda", 0)) else x

    compiled = torch.compile(add, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert tries == []
    assert add(1) == 2 and set(tries) == {torch.device("cuda", 0)}


def test_doctor_and_status_say_so(machine, capsys):
    machine.unfit["cuda"] = {1: RuntimeError(NO_CODE)}
    machine.unfit["triton"] = {k: RuntimeError("Failed to find C compiler") for k in range(3)}
    with pytest.warns(UserWarning):
        doctor.show(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert [report["chosen"][f"cuda:{k}"] for k in range(3)] == ["cuda", "reference", "cuda"]
    found = {backend["name"]: backend for backend in report["backends"]}
    assert found["cuda"]["available"] and f"not on cuda:1: {NO_CODE}" in found["cuda"]["reason"]
    assert not found["triton"]["available"] and "not on cuda:0: Failed to find C compiler" in found["triton"]["reason"]
    assert found["reference"]["available"]


def test_status_touches_only_the_current_device(machine):
    """Each that is touched costs memory in every process."""
    machine.current = 2
    available = {status.name: status.available for status in backends.status()}
    assert available["cuda"] and available["triton"]
    assert {device for _, device in machine.tries} == {2}


class Refusing:
    """In the place of ``fastdiff._C``: loads nothing, and a launch is a failure."""

    def cuda_load(self, device):
        raise RuntimeError(NO_CODE)


@pytest.fixture
def refusing(monkeypatch):
    """A CUDA backend that takes tensors of the CPU for its own, on a device that it has no code for."""
    monkeypatch.setattr(on, "_C", Refusing())
    monkeypatch.setattr(on, "built", True)
    monkeypatch.setattr(on, "on_device", lambda tensor: tensor.is_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(on.unfit_because, "found", {})
    monkeypatch.setitem(registry._CHOICE, "cpu", "cuda")


def test_every_way_into_the_step_goes_elsewhere(refusing):
    """The step, a trajectory, and whole runs."""
    x, table = torch.randn(2, 8), torch.randn(3, len(ops.COLUMNS), dtype=torch.float64)
    arguments = (x, x, None, 1.0, table[0].float(), None, (), None, None, torch.float32, (True, True))
    for a, b in zip(cuda.step(*arguments), reference.step(*arguments)):
        assert torch.equal(a, b)
    run = ops.trajectory(x, table)
    assert type(run) is CudaTrajectory and not run.captures
    with pytest.raises(RuntimeError, match="a captured step needs"):
        run.prepare_capture()

    def sampled():
        process = fastdiff.VariancePreserving()
        return fastdiff.sample(
            lambda x, t: 0.1 * x, (2, 3, 8, 8), process, "ddpm", 5, "epsilon", seed=3, progress=False
        )

    got = sampled()
    with fastdiff.use_backend("reference"):
        torch.testing.assert_close(got, sampled(), rtol=1e-5, atol=1e-5)
    assert on.unfit_because.found == {torch.device("cpu"): NO_CODE}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_trying_triton_launches_a_kernel_and_leaves_no_record():
    from fastdiff.backends.triton import launch, programs
    from fastdiff.backends.triton.launch import launches

    with launches() as launched:
        if launch.INTERPRETED:
            programs.try_on(torch.device("cpu"))
    assert launched == []


def test_what_a_compiler_prints_is_not_shown(monkeypatch, capsys):
    """Triton prints the machine code that it could not assemble."""
    from fastdiff.backends.triton import programs

    def failing(*arguments):
        print("a listing")
        raise RuntimeError("PTXAS error: sm_110a is not defined")

    monkeypatch.setattr(programs, "coefficients", failing)
    trial = devices.Trial(programs.try_on)
    assert trial(torch.device("cpu")) == "PTXAS error: sm_110a is not defined"
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
def test_gpu_fits():
    gpu = torch.device("cuda", torch.cuda.current_device())
    assert unfit_because(gpu) == ""
    if on.built:
        assert on.unfit_because(gpu) == ""
    assert silently(backends.choose, gpu) == ("cuda" if on.built else "triton")


@pytest.mark.gpu
def test_gpu_capture_is_seen():
    gpu, graph = torch.device("cuda", torch.cuda.current_device()), torch.cuda.CUDAGraph()
    x = torch.ones(8, device=gpu)
    assert not devices.is_capturing(gpu)
    with torch.cuda.graph(graph):
        seen = devices.is_capturing(gpu)
        x.add_(1)
    assert seen and not devices.is_capturing(gpu)
