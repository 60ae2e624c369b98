"""Fast calls on a GPU by C++ (csrc/gpu_launch.cpp), without a GPU: a stand-in for the driver writes every launch down
(tests/bench/stand_in/cuda.c). They must be the launches that Python makes of the same call, whatever the call.

Kernels are not compiled here, but in ``test_triton_launchers.py``: a function of the driver is a number."""

import ctypes
import itertools
import struct
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench" / "stand_in"))
import driver

import fastdiff
from fastdiff import objective as objectives
from fastdiff import process, torch_access
from fastdiff.backends.triton import arguments as taken
from fastdiff.backends.triton import fast, launch, sequence, workspace
from fastdiff.backends.triton.affine import affine
from fastdiff.backends.triton.loss import loss
from fastdiff.backends.triton.programs import coefficients

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not torch_access.reads_tensors,
    reason="needs a machine without a GPU, the native extension, and PyTorch 2.10",
)
DATA = torch.float32, torch.bfloat16, torch.float16


def python_calls(call):
    """How many functions of Python a call enters."""
    entered = 0

    def count(frame, event, argument):
        nonlocal entered
        entered += event == "call"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


class Configuration(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_uint * 7), ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    ]  # fmt: skip


class Compiled:
    """Stands in for a compiled kernel. Python's launcher calls the driver as Triton's would."""

    packed_metadata = 4, 1, 0
    global_scratch_size = profile_scratch_size = launch_cooperative_grid = launch_pdl = 0

    def __init__(self, library, kernel, key, number):
        self.library, self.kernel, self.key, self.function = library, kernel, key, number
        self.layout = kernel.layout(key[0], key[2])
        kinds = [kind for kind in (*self.layout, "Q", "Q") if kind is not None]
        sizes = [struct.calcsize(kind) for kind in kinds]
        assert library.stand_in_parameters(number, bytes(sizes), len(sizes))
        names = {"Q": "u64", "q": "u64", "i": "u32", "f": "f32"}
        self.asm = {"ptx": ".entry k(\n" + ",\n".join(f"\t.param .{names[kind]} k" for kind in kinds) + "\n)"}
        self.run = self

    def launch(self, x, y, z, stream, function, cooperative, pdl, *rest):
        assert (z, function, cooperative, pdl, rest[2]) == (1, self.function, 0, 0, self.packed_metadata)
        values = [(kind, a) for kind, a in zip((*self.layout, "Q", "Q"), (*rest[6:][: len(self.layout)], 0, 0)) if kind]
        packed = [ctypes.create_string_buffer(struct.pack(kind, value)) for kind, value in values]
        pointers = (ctypes.c_void_p * len(packed))(*map(ctypes.addressof, packed))
        how = Configuration((ctypes.c_uint * 7)(x, y, 1, 128, 1, 1, 0), stream, None, 0)
        self.library.cuLaunchKernelEx(ctypes.byref(how), ctypes.c_void_p(function), pointers, None)


class GPU:
    """What the driver was asked for."""

    numbers = itertools.count(1)  # no two tests have the same function

    def __init__(self, library):
        self.library, self.kernels = library, {}

    def compile(self, kernel, key, target):
        number = next(self.numbers)
        self.kernels[number] = Compiled(self.library, kernel, key, number)
        return self.kernels[number]

    def written(self, since):
        """The launches from number ``since`` on."""
        found = []
        for k in range(since, self.library.stand_in_launched()):
            entry = self.library.stand_in_written(k).contents
            kernel = self.kernels[entry.function]
            names = [name for name, kind in zip(kernel.kernel.runtime, kernel.layout) if kind is not None]
            kinds = [kind for kind in kernel.layout if kind is not None]
            assert entry.count == len(names) + 2 and not any(entry.values[len(names) : entry.count])  # no scratch
            arguments = {name: (kind, entry.values[i]) for i, (name, kind) in enumerate(zip(names, kinds))}
            how = entry.function, tuple(entry.grid), entry.threads, entry.shared, entry.stream, entry.device
            found.append((how, arguments, entry.thread))
        return found


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return driver.build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def gpu(library, monkeypatch):
    """Tensors lie on a GPU, as far as launches are concerned."""
    found = GPU(library)
    monkeypatch.setattr(launch.Kernel, "compile", lambda *how: found.compile(*how))
    monkeypatch.setattr(launch, "_direct", lambda device: True)
    monkeypatch.setattr(launch, "_stream", lambda device: library.stand_in_stream())
    for module in (fast, workspace):
        monkeypatch.setattr(module, "current_stream", lambda device: library.stand_in_stream())
    target = type("Driver", (), {"get_current_target": staticmethod(lambda: None)})
    monkeypatch.setattr(launch.triton.runtime, "driver", type("Drivers", (), {"active": target}))
    monkeypatch.setattr(taken, "runs_on", lambda device: True)
    for name in ("_workspaces", "_cells", "_reserved"):
        monkeypatch.setattr(workspace, name, {})
    for module in (fast, objectives, process):
        monkeypatch.setattr(module, "value_checks_are_free", lambda tensor: False)
    for kernel in (affine, coefficients, loss):
        monkeypatch.setattr(kernel, "_variants", {})
    api = ctypes.pythonapi
    pointer_of, capsule_of = api.PyCapsule_GetPointer, api.PyCapsule_New
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule_of.restype, capsule_of.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    name, table = b"dlpack_exchange_api", torch.Tensor.__dlpack_c_exchange_api__
    torch_access.show_tensors(capsule_of(library.stand_in_table(pointer_of(table, name)), name, None))
    library.stand_in_here(0, 7, 0, 0)
    with fastdiff.use_backend("triton"):
        yield found
    torch_access.show_tensors(table)


# ---- one call, made by both


def outcome(gpu, call, named):
    """(what a call raises or None, its launches with ``named`` pointers by name and others in the order in which they
    appear, what it returned)."""
    since, names = gpu.library.stand_in_launched(), {}
    try:
        raised, found = None, call()
    except Exception as error:
        raised, found = (type(error), str(error)), None
    launches = []
    for how, arguments, _ in gpu.written(since):
        values = {
            name: names.setdefault(value, named.get(value, f"made {len(names)}")) if kind == "Q" else value
            for name, (kind, value) in arguments.items()
        }
        launches.append((*how, values))
    return raised, launches, found


class Both:
    """Makes calls by Python alone, and by C++, and asserts that these are the same launches."""

    def __init__(self, gpu, monkeypatch, named):
        self.gpu, self.monkeypatch, self.named = gpu, monkeypatch, named
        self.by_cpp = []  # what each function of C++ returned in the last call
        kept = fast._kept

        def watched(program):
            found = kept(program)
            run = lambda *given: self.by_cpp.append(found.run(*given)) or self.by_cpp[-1]  # noqa: E731
            return type("Kept", (), {"run": staticmethod(run), "get": found.get, "keep": found.keep})

        monkeypatch.setattr(fast, "_kept", watched)

    def python(self, call):
        with self.monkeypatch.context() as patch:
            patch.setattr(sequence.Kept, "keep", lambda *how: None)
            patch.setattr(fast, "_kept", lambda program: program.kept.setdefault("python's", sequence.Kept()))
            return outcome(self.gpu, call, self.named)

    def __call__(self, call):
        """(what the call raised, how many launches it made, what it returned, whether C++ made them)"""
        want = self.python(call)
        for _ in range(2):
            self.by_cpp.clear()
            found = outcome(self.gpu, call, self.named)
            assert found[:2] == want[:2], (found, want)
        return want[0], len(want[1]), found[2], [type(value) for value in self.by_cpp] == [tuple]


KINDS = {
    "v, min-SNR": lambda: fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", fastdiff.MinSNR(5.0)),
    "epsilon": lambda: fastdiff.Objective(fastdiff.VariancePreserving()),
    "huber": lambda: fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction", loss="huber"),
    "SD3": lambda: fastdiff.Objective(
        fastdiff.RectifiedFlow(3.0), "flow", "cosmap", timesteps="logit_normal", error_space="sample"
    ),
    "edm": lambda: fastdiff.Objective(fastdiff.EDM(), "edm", "edm"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DATA, ids=str)
def test_the_launches_are_those_of_python(gpu, monkeypatch, kind, dtype):
    objective = KINDS[kind]()
    x0, prediction = torch.zeros(2, 4, 8, 8, dtype=dtype), torch.zeros(2, 4, 8, 8, dtype=dtype).requires_grad_()
    seed, ids, noise = torch.tensor([5]), torch.tensor([3, 2**40]), torch.zeros(2, 4, 8, 8)
    t = torch.tensor([3, 700]) if objective.process.discrete else torch.tensor([0.25, 0.5])
    one = torch.tensor(1.0)
    given = {"x0": x0, "prediction": prediction, "seed": seed, "ids": ids, "noise": noise, "t": t, "one": one}
    both = Both(gpu, monkeypatch, {tensor.data_ptr(): name for name, tensor in given.items()})
    ways = [
        {"seed": 7}, {"seed": -3, "sample_offset": 2**33}, {"seed": seed}, {"seed": seed, "ids": ids},
        {"t": t, "noise": noise}, {"seed": 3, "rng": "fast", "keep_noise": True}, {"t": t, "seed": 1},
    ]  # fmt: skip
    columns = not objective.process.discrete
    for how in ways:
        for objective.noise_offset in (0.0, 0.1):
            raised, launched, noised, by_cpp = both(lambda how=how: objective.noise(x0, **how))
            assert raised is None and by_cpp and launched == 1 + (columns or "t" not in how)
            assert noised.x_t.dtype == dtype and noised.x_t.shape == x0.shape and noised.t.shape == (2,)
            assert noised.t.dtype == (t.dtype if "t" in how else torch.float64 if columns else torch.int64)
            raised, launched, value, by_cpp = both(lambda n=noised: objective.loss(prediction, n))
            assert raised is None and by_cpp and launched == 1 and value.shape == ()
            with torch.no_grad():
                assert both(lambda n=noised: objective.loss(prediction, n))[3]
            losses = iter([objective.loss(prediction, noised) for _ in range(3)])
            gradient_of = lambda of=losses: torch.autograd.grad(next(of), prediction, one)  # noqa: E731
            raised, launched, (gradient,), by_cpp = both(gradient_of)
            assert raised is None and launched == 1 and gradient.shape == x0.shape
            assert by_cpp == (dtype is not torch.float16)  # of float16 the general way makes it


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_training_step_costs_the_host(gpu, kind):
    """Functions of Python entered, and tensors made."""
    objective = KINDS[kind]()
    x0, prediction = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8).requires_grad_()
    for _ in range(2):
        objective.loss(prediction, objective.noise(x0)).backward()
    since = gpu.library.stand_in_launched()
    noised = objective.noise(x0)
    value = objective.loss(prediction, noised)
    value.backward()
    assert gpu.library.stand_in_launched() == since + 4
    entered = {
        "noise": python_calls(lambda: objective.noise(x0)),
        "loss": python_calls(lambda: objective.loss(prediction, noised)),
    }
    entered["backward"] = python_calls(objective.loss(prediction, noised).backward)
    # 41, 31 and 23, and room for another PyTorch.
    most = {"noise": 46, "loss": 36, "backward": 28}
    assert all(entered[name] <= most[name] for name in most), entered


def test_explain_says_what_is_launched_by_python_and_why(gpu, monkeypatch):
    """A driver that lacks a function, and kernels of another kind; each stays with Python for good."""
    x0 = torch.zeros(2, 4, 8, 8)
    by_cpp = KINDS["epsilon"]()
    assert "noise: one fast call of the backend triton\n" in by_cpp.explain(x0)

    def refused(*how):
        raise RuntimeError("the driver has no cuLaunchKernelEx")

    strange = [
        (Compiled, "launch_cooperative_grid", 1, "a cooperative launch"),
        (Compiled, "profile_scratch_size", 128, "scratch memory"),
        (Compiled, "packed_metadata", (4, 2, 0), "clusters"),
        (Compiled, "packed_metadata", (4, 1), "not described as Triton 3.6 does it"),
        (launch, "_SIZES", launch._SIZES | {"f32": 8}, "other parameters than its signature says"),
        (sequence, "native_because", lambda: "libcuda.so.1 cannot be opened", "libcuda.so.1 cannot be opened"),
    ]
    for where, name, value, because in strange:
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            for kernel in (affine, coefficients, loss):
                patch.setattr(kernel, "_variants", {})
            # Triton's own launcher gives such a kernel what it needs.
            patch.setattr(Compiled, "__call__", lambda self, *how: None, raising=False)
            patch.setattr(Compiled, "launch", lambda self, *how: None)
            said = KINDS["epsilon"]().explain(x0)
        assert said.count("one fast call of the backend triton (launched by Python: ") == 2 and because in said, said
    monkeypatch.setattr(sequence, "_opened", None)
    monkeypatch.setattr(sequence._C, "gpu_open", refused)
    assert sequence.native_because() == "the driver has no cuLaunchKernelEx" == sequence.native_because()
