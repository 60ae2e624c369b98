"""Fast calls on a GPU by C++ (csrc/gpu_launch.cpp), without a GPU: a stand-in for the driver writes every launch down
(tests/bench/stand_in/cuda.c). They must be the launches that Python makes of the same call, whatever the call.

Kernels are not compiled here, but in ``test_triton_launchers.py``: a function of the driver is a number."""

import ctypes
import itertools
import random as randoms
import shutil
import struct
import sys
import threading
from pathlib import Path

import pytest
import torch
from costs import python_calls
from devices import NIGHTLY
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench" / "stand_in"))
import driver

import fastdiff
from fastdiff import objective as objectives
from fastdiff import philox, process, torch_access
from fastdiff.backends.triton import arguments as taken
from fastdiff.backends.triton import fast, launch, sequence, workspace
from fastdiff.backends.triton.affine import affine
from fastdiff.backends.triton.loss import loss
from fastdiff.backends.triton.programs import coefficients

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not torch_access.reads_tensors or sys.platform != "linux" or not shutil.which("cc"),
    reason="needs Linux without a GPU, a C compiler, the native extension, and PyTorch 2.10",
)
DATA = torch.float32, torch.bfloat16, torch.float16


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


_libraries = []  # of a process: fastdiff._C opens one


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not _libraries:
        _libraries.append(driver.build(tmp_path_factory.mktemp("driver")))
    return _libraries[0]


@pytest.fixture
def gpu(library, monkeypatch):
    """Tensors lie on a GPU, as far as launches are concerned."""
    found = GPU(library)
    monkeypatch.setattr(launch.Kernel, "compile", lambda *how: found.compile(*how))
    monkeypatch.setattr(launch, "_direct", lambda device: True)
    monkeypatch.setattr(launch, "_stream", lambda device: library.stand_in_stream())
    monkeypatch.setattr(workspace, "current_stream", lambda device: library.stand_in_stream())
    target = type("Driver", (), {"get_current_target": staticmethod(lambda: None)})
    monkeypatch.setattr(launch.triton.runtime, "driver", type("Drivers", (), {"active": target}))
    monkeypatch.setattr(taken, "runs_on", lambda device: True)
    for name in ("_workspaces", "_cells", "_reserved"):
        monkeypatch.setattr(workspace, name, {})
    for module in (fast, objectives, process):
        monkeypatch.setattr(module, "value_checks_are_free", lambda tensor: False)
    for kernel in (affine, coefficients, loss):
        monkeypatch.setattr(kernel, "_variants", {})
    launch.unprepared.clear()
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
    "combined": lambda: fastdiff.Objective(
        fastdiff.VariancePreserving(), loss=fastdiff.losses.Combined(mse=0.5, huber=0.2)
    ),
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
            for scale in (0.5, one):
                at_once = lambda n=noised, scale=scale: objective.loss_and_gradient(prediction, n, scale)  # noqa: E731
                raised, launched, (value, gradient), by_cpp = both(at_once)
                assert raised is None and by_cpp and launched == 1
                assert value.shape == () and gradient.shape == x0.shape and gradient.dtype == dtype


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
    both = lambda: objective.loss_and_gradient(prediction, noised, 0.5)  # noqa: E731
    both(), both()
    entered["both"] = python_calls(both)
    # 40, 30, 23 and 33, and room for another PyTorch.
    most = {"noise": 44, "loss": 34, "backward": 27, "both": 37}
    assert all(entered[name] <= most[name] for name in most), entered


def odd(shape, dtype):
    """Contiguous, and not aligned to 16 bytes."""
    return torch.zeros(1 + torch.Size(shape).numel(), dtype=dtype)[1:].view(shape)


def some_tensor(random, shape, dtype):
    """Of a shape, or like it: not aligned, not contiguous, of another size, an expanded one, empty, of a class."""
    rare = "odd", "strided", "longer", "shorter", "expanded", "empty", "parameter", "grad"
    kind = random.choice(rare) if random.random() < 0.15 else "plain"
    shape = tuple(shape)
    if kind == "odd":
        return odd(shape, dtype)
    if kind == "strided":
        return torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    if kind == "longer":
        return torch.zeros(*shape, 2, dtype=dtype)
    if kind == "shorter":
        return torch.zeros(shape[:-1], dtype=dtype)
    if kind == "expanded":
        return torch.zeros((), dtype=dtype).expand(shape)
    if kind == "empty":
        return torch.zeros(0, *shape[1:], dtype=dtype)
    made = torch.zeros(shape, dtype=dtype)
    if kind == "parameter":
        return torch.nn.Parameter(made, requires_grad=dtype.is_floating_point)
    return made.requires_grad_() if kind == "grad" and dtype.is_floating_point else made


@pytest.mark.parametrize("start", range(70 if NIGHTLY else 4))
def test_what_is_wrong_or_rare_ends_as_by_python(gpu, monkeypatch, start):
    """Calls with arguments of any kind: the same launches, or the same error and none."""
    random, shapes = randoms.Random(start), [(2, 3, 8), (1, 4, 4, 4), (5, 7), (3,), (2, 2, 31)]
    objectives = [KINDS[kind]() for kind in ("v, min-SNR", "SD3")]
    floating = [*DATA, torch.float64, torch.int64, torch.uint8]
    by_cpp, raised, both = 0, 0, Both(gpu, monkeypatch, {})
    for _ in range(60):
        objective, shape = random.choice(objectives), random.choice(shapes)
        dtype = random.choice(DATA) if random.random() < 0.8 else random.choice(floating)
        x0, prediction = some_tensor(random, shape, dtype), some_tensor(random, shape, random.choice(DATA))
        if random.random() < 0.8 and prediction.is_leaf and prediction.is_floating_point():
            prediction = prediction.detach().requires_grad_()
        seeds = [0, -1, 2**63, 2**64 - 1, 2**64, None, 1.5, torch.tensor([4]), torch.tensor([4, 5])]
        how = {"seed": random.choice(seeds) if random.random() < 0.5 else 7}
        if random.random() < 0.5:
            discrete = objective.process.discrete
            kinds = [torch.int64] * 3 + [torch.float32] if discrete else [torch.float64, torch.float32, torch.int64]
            how["t"] = some_tensor(random, shape[:1], random.choice(kinds))
        if random.random() < 0.3:
            how["noise"] = some_tensor(random, shape, random.choice([*DATA, torch.float64]))
        if random.random() < 0.3:
            ids = torch.arange(shape[0])
            how |= random.choice([{"sample_offset": 2**62}, {"sample_offset": 2**70}, {"ids": ids}, {"ids": ids + 1}])
        if random.random() < 0.2:
            how["rng"] = random.choice(["fast", "exact", "slow"])
        if random.random() < 0.2:
            how["dtype"] = random.choice(DATA)
        objective.noise_offset = random.choice([0.0, 0.0, 0.25])
        given = {"x0": x0, "prediction": prediction, **how}
        named = {v.data_ptr(): name for name, v in given.items() if isinstance(v, torch.Tensor) and v.numel()}
        both.named = named
        state = torch.get_rng_state()

        def noise(objective=objective, x0=x0, how=how, state=state):
            torch.set_rng_state(state)
            return objective.noise(x0, **how)

        failed, _, noised, by = both(noise)
        raised, by_cpp = raised + (failed is not None), by_cpp + by
        if noised is not None:
            failed, _, value, by = both(lambda o=objective, p=prediction, n=noised: o.loss(p, n))
            raised, by_cpp = raised + (failed is not None), by_cpp + by
            if failed is None and value.requires_grad:
                values = iter([objective.loss(prediction, noised) for _ in range(3)])
                both(lambda values=values: next(values).backward(retain_graph=True))
                prediction.grad = None
    assert by_cpp > 20 and raised > 5, (by_cpp, raised)


def test_data_that_is_not_aligned_and_other_contexts_are_for_python(gpu, monkeypatch):
    """And what is collected, traced or captured. Launches are made all the same; those of C++ go on afterwards."""
    objective, shape = KINDS["v, min-SNR"](), (2, 4, 8, 8)
    x0, wrong = torch.zeros(shape), odd(shape, torch.float32)
    both = Both(gpu, monkeypatch, {x0.data_ptr(): "x0", wrong.data_ptr(): "wrong"})
    library = gpu.library

    def by_cpp(x0=x0):
        """What the function of C++ returned; launches were two, on the stream and the GPU that are current."""
        both.by_cpp.clear()
        since = library.stand_in_launched()
        objective.noise(x0, seed=1)
        assert len(gpu.written(since)) == 2
        return both.by_cpp

    assert by_cpp() == [None] and type(by_cpp()[0]) is tuple
    assert by_cpp(wrong) == [False] == by_cpp(wrong)
    with launch.launches() as found:
        assert by_cpp() == [] and found == ["coefficients", "affine"]
    library.stand_in_here(0, 8, 0, 0)  # another stream
    since = library.stand_in_launched()
    assert type(by_cpp()[0]) is tuple and [how[4] for how, *_ in gpu.written(since)] == [8, 8]
    library.stand_in_here(1, 8, 0, 0)  # another GPU: it is another call
    since = library.stand_in_launched()
    assert by_cpp() == [None] and type(by_cpp()[0]) is tuple
    assert {how[5] for how, *_ in gpu.written(since)} == {1}
    library.stand_in_here(0, 7, 0, 0)
    with fastdiff.modes.forward_ad.dual_level():
        assert both.by_cpp.clear() is None and objective.noise(x0, seed=1) and both.by_cpp == [False]
    assert type(by_cpp()[0]) is tuple


class Made(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "detach" not in function.name():
            self.made.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_was_warmed_up_is_captured(gpu, monkeypatch, kind):
    """With seeds that are drawn on the host before: all kernels that take one from the GPU are loaded. C++ makes no
    tensor; what Python makes, PyTorch takes from the graph's memory. Nothing is looked at or copied."""
    objective = KINDS[kind]()
    x0, prediction = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8).requires_grad_()
    capturing, one = False, torch.tensor(1.0)
    monkeypatch.setattr(philox, "_drawn_on_host", False)
    objective.explain(x0)  # with a seed that is given: nothing more is loaded
    given = len(gpu.kernels)
    monkeypatch.setattr(philox, "_drawn_on_host", True)
    on_gpu = philox.draw_seed
    drawn = lambda generator, device: on_gpu(generator, device) if capturing else 5  # noqa: E731
    monkeypatch.setattr(philox, "draw_seed", drawn)
    for module in (launch, workspace):
        monkeypatch.setattr(module, "is_capturing", lambda device: capturing)
    both = Both(gpu, monkeypatch, {})

    def step():
        noised = objective.noise(x0)
        torch.autograd.grad(objective.loss(prediction, noised), prediction, one)
        return noised

    torch.use_deterministic_algorithms(False)
    for _ in range(2):
        assert type(step().noise_source.seed) is int
    capturing, compiled = True, len(gpu.kernels)
    assert compiled > given
    gpu.library.stand_in_here(0, 7, 1, 0)
    both.by_cpp.clear()
    since = gpu.library.stand_in_launched()
    with Made() as found:
        noised = step()
    assert both.by_cpp == [None] * 3 and len(gpu.written(since)) == 4 and len(gpu.kernels) == compiled
    assert isinstance(noised.noise_source.seed, torch.Tensor)
    made = {
        "aten::empty.memory_format",
        "aten::empty_like",
        "aten::zeros",
        "aten::randint.low_generator",
        "aten::split.Tensor",
    }
    assert set(found.made) <= made, set(found.made) - made
    capturing = False
    gpu.library.stand_in_here(0, 7, 0, 0)
    assert type(step().noise_source.seed) is int and {type(value) for value in both.by_cpp[3:]} == {tuple}


def test_threads_streams_and_devices_do_not_meet(gpu):
    """Eight threads on four streams and two GPUs, each with tensors of its own."""
    objective = KINDS["SD3"]()
    objective._program()  # two threads may trace it at once, and what is theirs alone is computed twice
    problems, barrier = [], threading.Barrier(8)

    def work(number):
        device, stream = number % 2, 100 + number % 4
        gpu.library.stand_in_here(device, stream, 0, number)
        x0 = torch.zeros(2, 4, 8, 8)
        prediction = torch.zeros(2, 4, 8, 8).requires_grad_()
        own[number] = x0, prediction
        try:
            barrier.wait()
            with fastdiff.use_backend("triton"):
                for k in range(25):
                    noised = objective.noise(x0, seed=1000 * number + k)
                    objective.loss(prediction, noised).backward()
        except Exception as error:
            problems.append(error)

    own = {}
    since = gpu.library.stand_in_launched()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    written = gpu.written(since)
    assert len(written) == 8 * 25 * 4
    shared = {}
    for (_, _, _, _, stream, device), arguments, thread in written:
        assert (stream, device) == (100 + thread % 4, thread % 2)
        values = {name: value for name, (_, value) in arguments.items()}
        x0, prediction = own[thread]
        assert values.get("u", x0.data_ptr()) == values.get("x0", x0.data_ptr()) == x0.data_ptr()
        assert values.get("prediction", prediction.data_ptr()) == prediction.data_ptr()
        assert "seed" not in values or values["seed"] // 1000 == thread
        for name in ("counters", "partials", "assumed"):
            if name in values:
                shared.setdefault((name, values[name]), set()).add(stream)
    assert all(len(streams) == 1 for streams in shared.values()), shared


def test_a_launch_that_the_driver_refuses(gpu, monkeypatch):
    objective, x0 = KINDS["epsilon"](), torch.zeros(2, 4, 8, 8)
    monkeypatch.setattr(Compiled, "packed_metadata", (5, 1, 0))  # the stand-in takes four warps
    objective.noise(x0, seed=1)
    with pytest.raises(RuntimeError, match=r"not launched: the stand-in refuses this \(CUDA error 1\)"):
        objective.noise(x0, seed=1)


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
