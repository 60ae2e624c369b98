"""The sampler step in CUDA. Without a GPU: what nvcc makes of it for every architecture, and the same source compiled
for the CPU (step_on_host.cpp), held against the reference. On a GPU: the kernel itself."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from accuracy import assert_same
from asked import cuda, native, reference
from devices import examples, in_turn, nightly
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import ops
from fastdiff.backends import registry
from fastdiff.backends.cuda import step as on
from fastdiff.backends.cuda.trajectory import Trajectory as CudaTrajectory
from fastdiff.backends.interface import able
from fastdiff.calls import LossCall, RunCall

ROOT = Path(__file__).resolve().parents[2]
COMPILED = ROOT / "benchmarks" / "cuda_compiled.py"
K = len(ops.COLUMNS)
AT = {name: k for k, name in enumerate(ops.COLUMNS)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# --- as compiled


def compiled():
    if not COMPILED.exists():
        pytest.skip("needs the sources")
    spec = importlib.util.spec_from_file_location("cuda_compiled", COMPILED)
    assert spec and spec.loader
    module = sys.modules["cuda_compiled"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.compiler() is None:
        pytest.skip("needs nvcc")
    return module


@pytest.mark.parametrize(
    "architecture", [80, 90, 100, *(pytest.param(other, marks=nightly) for other in (86, 89, 120))]
)
def test_compiles_without_spills_and_with_wide_accesses(architecture, tmp_path):
    tool = compiled()
    assert tool.architectures() == [80, 86, 89, 90, 100, 120]
    kernels = tool.compile_for(architecture, tmp_path)
    assert set(kernels) == set(tool.KERNELS.values())
    for name, kernel in kernels.items():
        assert kernel.spilled_bytes == 0 and kernel.stack_bytes == 0, name
        assert kernel.registers <= (80 if name.endswith("options") else 64), name
    if tool.disassembler() is None:
        pytest.skip("needs cuobjdump for the rest")
    for name, kernel in kernels.items():
        assert tool.double_precision(kernel) == 0 and kernel.count(r"(LDL|STL)(\..*)?") == 0, name
        assert kernel.count("FFMA.*") > 20, "the normal transform is there: the listing is of a kernel"
        if "not aligned" not in name:
            # x, m and uncond at the least; y, x0, the entry and twice what the network sees. float32 needs two each.
            twice = 2 if name == "float32" else 1
            assert kernel.count(r"LDG\..*128.*") >= 3 * twice and kernel.count(r"STG\..*128.*") >= 4 * twice, name
        if name in ("float32", "bfloat16", "float16"):
            # Narrow loads are of numbers: coefficients, seed, index.
            assert kernel.count(r"STG(\..*)?") == kernel.count(r"STG\..*128.*") + 1, "and the index that moves on"


def test_the_committed_table_lists_every_kernel():
    tool, table = compiled(), ROOT / "benchmarks" / "results" / "cuda_step_compiled.md"
    for architecture in tool.architectures():
        for name in tool.KERNELS.values():
            assert f"| {architecture} | {name} |" in table.read_text()


# --- compiled for the CPU


@pytest.fixture(scope="module")
def host_module(tmp_path_factory):
    """fastdiff._C's CUDA step with a loop over the groups in the place of the launch."""
    source = Path(__file__).with_name("step_on_host.cpp")
    if not (ROOT / "csrc" / "cuda").exists():
        pytest.skip("needs the sources")
    pybind11 = pytest.importorskip("pybind11")
    name = "step_on_host" + sysconfig.get_config_var("EXT_SUFFIX")
    target = tmp_path_factory.mktemp("host") / name
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    try:
        done = subprocess.run(
            ["g++", *flags, *includes, str(source), "-o", str(target)], capture_output=True, text=True
        )
    except OSError:
        pytest.skip("needs g++")
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("step_on_host", target)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def host(host_module, monkeypatch):
    """The CUDA backend on tensors of the CPU."""
    monkeypatch.setattr(on, "_C", host_module)
    monkeypatch.setattr(on, "built", True)
    monkeypatch.setattr(on, "on_device", lambda tensor: tensor.is_cpu)
    monkeypatch.setattr(on, "ordinal", lambda tensor: 0)
    monkeypatch.setattr(on, "queue", lambda device: 0)
    monkeypatch.setattr(on, "unfit_because", lambda device: "")
    monkeypatch.setattr(registry, "_forced", "cuda")
    return host_module


def random(shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


SHAPES = [(3, 4, 8, 8), (2, 3, 5, 7), (1, 16, 7), (2, 1), (70, 16), (5,)]
# What goes into a step beyond x, m and the row.
OPTIONS = {
    "nothing": {},
    "history, noise given, clip": {"history": 4, "noise": "given", "clip": 0.7},
    "guided, noise made": {"uncond": True, "guidance": 7.5, "noise": "made", "model_input": 2},
    "guided a sample, rows a sample": {"uncond": True, "guidance": "each", "rows": True, "noise": "made", "history": 1},
    "threshold": {"threshold": "each", "noise": "seed on the device", "model_input": 1},
    "inpainting": {"mask": "bool", "known_noise": "made", "noise": "made", "history": 2, "model_input": 2},
    "inpainting, noise given": {"mask": "float", "known_noise": "given", "rows": True},
    "inpainting without noise": {"mask": "each", "threshold": "one"},
    "learned variance": {"noise": "given", "log_variance": True, "rows": True},
    "offset noise": {"noise": "offset"},
    "mixed": {"mixed": True, "history": 3, "uncond": True, "guidance": 2.0, "noise": "given", "model_input": 1},
}


def arguments_for(shape, dtype, options, device="cpu"):
    """The arguments of a backend's step: (positional, keywords)."""
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    if not options.get("mixed"):
        other = dtype

    def made(*sizes, of=dtype):
        return random(sizes or shape, of).to(device)

    def noise(kind):
        seed = torch.tensor(2**62 + 9, device=device) if kind == "seed on the device" else -5
        if kind is None or kind == "given":
            return None if kind is None else made(of=torch.float32)
        return ops.Philox(seed, 2**33 + 1, 19, 0.3 if kind == "offset" and len(shape) > 2 else 0.0)

    ones = (1,) * (len(shape) - 1)
    guidance = options.get("guidance", 1.0)
    if guidance == "each":
        guidance = made(shape[0], *ones, of=torch.float32)
    threshold = options.get("threshold")
    if threshold is not None:
        threshold = 0.1 + made(shape[0] if threshold == "each" else 1, *ones, of=torch.float32).abs()
    mask = {
        "bool": lambda: made(1, *(1,) * (len(shape) > 2), *shape[min(2, len(shape)) :])[:, ...] > 0,
        "float": lambda: made(of=torch.float32).sigmoid(),
        "each": lambda: made(shape[0], *ones, of=torch.float16).sigmoid(),
    }.get(options.get("mask"), lambda: None)()
    if options.get("mask") == "bool" and len(shape) <= 2:
        mask = made(*shape[-1:]) > 0
    positional = (
        made(), made(of=other), made() if options.get("uncond") else None, guidance,
        made(*((shape[0], K) if options.get("rows") else (K,)), of=torch.float32), options.get("clip"),
        tuple(made(of=torch.float32 if j or other is dtype else other) for j in range(options.get("history", 0))),
        noise(options.get("noise")), made() if options.get("log_variance") else None, dtype,
        (True, True),
    )  # fmt: skip
    keywords = {
        "threshold": threshold,
        "mask": mask,
        "known": None if mask is None else made(),
        "known_noise": noise(options.get("known_noise")),
    }
    return positional, keywords


def run(backend, positional, keywords, copies):
    x = positional[0]
    seen = torch.full((copies * len(x), *x.shape[1:]), 5.0, dtype=x.dtype, device=x.device) if copies else None
    return *backend.step(*positional, **keywords, model_input=seen), seen


def assert_as_reference(got, want, option):
    for a, b in zip(got, want):
        if b is None:
            assert a is None
        elif option == "learned variance":
            # exp is the library's, to two ulps; the terms around it are of the size of a few.
            eps = torch.finfo(b.dtype).eps
            torch.testing.assert_close(a, b, rtol=2 * eps, atol=16 * torch.finfo(torch.float32).eps)
        else:
            assert_same(a.cpu(), b.cpu())


@in_turn(option=list(OPTIONS), dtype=DTYPES)
def test_the_arithmetic_is_the_references_to_the_bit(host, dtype, option):
    options = OPTIONS[option]
    variants = set()
    for shape in SHAPES:
        arguments = arguments_for(shape, dtype, options)
        copies = options.get("model_input", 0)
        assert_as_reference(run(cuda, *arguments, copies), run(reference, *arguments, copies), option)
        variants.add(host.last())
    full = "threshold" in options or "mask" in options or "log_variance" in options or "mixed" in options
    assert variants == {"scalar", "vector" if full else "simple"}, "both kernels ran"


@pytest.mark.parametrize("shape", [(2, 8), (3, 5), (1, 1), (2, 3, 16, 8), (4, 7, 3)])
@pytest.mark.parametrize("seed", [0, -7, 2**62 + 5, 2**64 - 1])
def test_noise_has_the_same_bits(host, shape, seed):
    row = torch.zeros(K)
    row[AT["c_noise"]] = 1.0
    zero = torch.zeros(shape)
    for stream, offset in ((0, 0), (16, 2**33 + 3), (2**32 - 1, 1)):
        arguments = (zero, zero, None, 1.0, row, None, ())
        want = reference.normal(seed, shape, stream, offset)
        for key in (seed, torch.tensor(seed - 2**64 if seed >= 2**63 else seed)):
            noise = ops.Philox(key, offset, stream)
            y, _, _ = cuda.step(*arguments, noise, None, torch.float32, (False, False))
            # 0 + z has the bits of z, but for a z of -0.
            assert torch.equal(y, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_numbers_are_rounded_as_in_pytorch(host, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    row = torch.zeros(K)
    for factor in (1.0, 1 / 3, 3.0):
        row[AT["c_x"]] = factor
        arguments = (every, torch.zeros_like(every), None, 1.0, row, None, (), None, None, dtype, (False, False))
        assert_same(cuda.step(*arguments)[0], reference.step(*arguments)[0])


def test_special_values_and_strides(host):
    x = random((4, 6, 8, 8))
    x.view(-1)[:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 1e-40])
    last = x.contiguous(memory_format=torch.channels_last)
    row, m = random((K,)), random(x.shape).transpose(2, 3)
    for sample in (x, last):
        arguments = (sample, m, None, 1.0, row, 1.0, (m,), None, None, torch.float32, (True, True))
        got, want = cuda.step(*arguments), reference.step(*arguments)
        for a, b in zip(got, want):
            assert_same(a, b)
        assert got[0].is_contiguous(memory_format=torch.channels_last) == (sample is last)


def test_what_the_kernel_does_not_do_goes_elsewhere(host, monkeypatch):
    monkeypatch.setattr(on, "_C", None)  # a call would raise
    x, row = random((2, 8)), random((K,))
    wide = torch.float64
    for change in (
        {0: x.double(), 4: row.double(), 9: wide},
        {1: x.clone().requires_grad_()},
        {3: random((2, 8)), 2: x},
        {9: torch.float16},
        {0: x[:0], 1: x[:0]},
    ):
        arguments = [x, x, None, 1.0, row, None, (), None, None, torch.float32, (True, True)]
        for k, value in change.items():
            arguments[k] = value
        for a, b in zip(cuda.step(*arguments), reference.step(*arguments)):
            assert torch.equal(a, b)
    gradient = torch.func.grad(
        lambda v: cuda.step(v, x, None, 1.0, row, None, (), None, None, v.dtype, (True, True))[0].sum()
    )
    assert gradient(x).shape == x.shape
    call = LossCall(x, x, None, row[0], None, None, row[0])
    assert not cuda.supports(call)[0] and able(cuda.backend, call).name in ("triton", "reference")


def network(x, t, cond=None):
    return 0.1 * x + 0.01 if cond is None else 0.1 * x + 0.01 * cond.view(-1, *(1,) * (x.ndim - 1))


@in_turn(
    sampler=[name for name in fastdiff.samplers.NAMES if name not in ("edm",)], dtype=[torch.float32, torch.bfloat16]
)
def test_whole_runs(host, sampler, dtype, monkeypatch):
    flow = sampler.startswith("flow")
    process = fastdiff.RectifiedFlow() if flow else fastdiff.VariancePreserving()
    cond, uncond = torch.ones(4), torch.zeros(4)
    known, mask = random((4, 3, 8, 8), dtype), torch.rand(1, 1, 8, 8) < 0.5
    for extra in (
        {},
        {"cond": cond, "uncond": uncond, "guidance": 2.0},
        {"known": known, "mask": mask},
        {"cond": cond, "uncond": uncond, "guidance": 2.0, "guidance_rescale": 0.7, "return_trajectory": True},
        # Steps that the kernel does after some that it does not, with their history.
        {"cond": cond, "uncond": uncond, "guidance": 2.0, "guidance_rescale": 0.7, "guidance_interval": (0.3, 500.0)},
        {"noise": lambda k, shape: torch.full(shape, 1.0 + k)},
    ):
        results = []
        for backend in ("cuda", "reference"):
            monkeypatch.setattr(registry, "_forced", backend)
            results.append(
                fastdiff.sample(
                    network,
                    (4, 3, 8, 8),
                    process,
                    sampler,
                    7,
                    "flow" if flow else "epsilon",
                    seed=3,
                    dtype=dtype,
                    progress=False,
                    **extra,
                )
            )
        for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in results)):
            assert_same(a, b)


def replayed(device, dtype, sampler, guided, replay):
    """A run in which model and step are held once, and the run of separate steps that it must equal."""
    plan = fastdiff.samplers.get(sampler).plan(fastdiff.VariancePreserving(), 6, "epsilon")
    x = random((4, 3, 8, 8), dtype).to(device)
    copies = 1 + guided
    steps = len(plan.times)
    noise = ops.Philox(torch.tensor(77, device=device), 3, 16)
    streams = torch.arange(16, 16 + steps, device=device)
    first = 1.0 if plan.model_scale is None else float(plan.model_scale[0])

    want = reference.trajectory(RunCall(x, ops.PreparedSteps(plan.table), 3.0, plan.clip, philox=noise))
    want.begin(first, copies)
    for k in range(steps):
        z = 16 + k if plan.draws[k] else None
        want.step(k, network(want.seen, None), bool(guided), z, copies)

    got = ops.trajectory(x, plan.table, guidance=3.0, clip=plan.clip)
    assert isinstance(got, CudaTrajectory)
    got.prepare_capture(first, copies)
    index, ticket = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))

    def once():
        m = network(got.seen, None)
        got.captured(index, ticket, m, bool(guided), noise if any(plan.draws) else None, streams, copies)

    replay(once, steps, (got, index, first, copies, x))
    assert int(index) == steps and int(ticket) == 0
    assert_same(got.x.cpu(), want.x.cpu())
    assert_same(got.seen.cpu(), want.seen.cpu())


CAPTURED = ["ddpm", "heun", "unipc", "dpmpp_2m", "dpmpp_3m_sde"]


@pytest.mark.parametrize("sampler", CAPTURED)
@pytest.mark.parametrize("guided", [0, 1])
def test_a_step_held_once_and_replayed(host, sampler, guided):
    def replay(once, steps, _):
        for _ in range(steps):
            once()

    for dtype in (torch.float32, torch.float16):
        replayed("cpu", dtype, sampler, guided, replay)


@pytest.fixture
def recorded(monkeypatch):
    """``cuda_graph=True`` without a device: what would be captured is run once more at each replay. Counts those."""
    replays = []

    def record(body, begin, device):
        for _ in range(3):
            begin()
            body()
        body()  # a capture runs nothing; what it would have left is put back too
        begin()

        def replay():
            replays.append(1)
            body()

        return replay

    monkeypatch.setattr(fastdiff.sampling.cuda_graph, "record", record)
    monkeypatch.setattr(fastdiff.sampling.checking, "check_capture", lambda *arguments: None)
    return replays


GRAPHED = {
    "plain": {},
    "guided": {"cond": torch.ones(4), "uncond": torch.zeros(4), "guidance": 2.0},
    "guided a sample": {"cond": torch.ones(4), "uncond": torch.zeros(4), "guidance": torch.tensor([1.0, 2.0, 3, 4])},
    "inpainting": {"known": torch.ones(4, 3, 8, 8), "mask": torch.eye(8)},
    "noise of generators": {"generator": "each", "seed": None},
    "noise of a function": {"noise": lambda k, shape: torch.full(shape, 1.0 + k)},
    "a trajectory": {"return_trajectory": True},
    "an estimate": {"callback": "store"},
    "an edit": {"callback": "edit"},
    "an edit, guided": {"callback": "edit", "cond": torch.ones(4), "uncond": torch.zeros(4), "guidance": 2.0},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}


@in_turn(option=list(GRAPHED), backend=["cuda", "reference", "native"])
def test_graphed_runs_equal_plain_ones(host, recorded, backend, option, monkeypatch):
    """All samplers but the one that no graph holds: what is replayed is the run of separate steps, noise and history
    and all."""
    if backend == "native" and not native.available:
        pytest.skip(native.unavailable_because)
    monkeypatch.setattr(registry, "_forced", backend)
    captured = []
    real = CudaTrajectory.captured
    monkeypatch.setattr(CudaTrajectory, "captured", lambda *a, **how: captured.append(1) or real(*a, **how))
    every = [name for name in fastdiff.samplers.NAMES if name != "predictor_corrector"]
    for sampler in every if option == "plain" else [*CAPTURED, "edm", "flow_lcm"]:
        flow = sampler.startswith("flow")
        process = fastdiff.RectifiedFlow() if flow else fastdiff.VariancePreserving()
        results = []
        for graphed in (False, True):
            how, stored = {"seed": 3, "progress": False} | GRAPHED[option], []
            if "generator" in how:
                how["generator"] = [torch.Generator().manual_seed(k) for k in range(4)]
            if how.get("callback") == "edit":
                how["callback"] = lambda k, t, x, x0: x.mul_(0.9)
            elif "callback" in how:
                how["callback"] = lambda k, t, x, x0, stored=stored: stored.extend((x, x0, torch.tensor(float(t))))

            def network(x, t, c=None):  # the time counts
                return torch.tanh(x + t.view(-1, 1, 1, 1) / 1000) if c is None else torch.sin(x * c.view(-1, 1, 1, 1))

            del recorded[:], captured[:]
            got = fastdiff.sample(
                network, (4, 3, 8, 8), process, sampler, 6, "flow" if flow else "epsilon", cuda_graph=graphed, **how
            )
            results.append([*(got if isinstance(got, tuple) else (got,)), *stored])
        rows = len(fastdiff.samplers.get(sampler).plan(process, 6, "flow" if flow else "epsilon").times)
        assert len(recorded) == rows, "one replay a row"
        assert len(captured) == (rows + 4 if backend == "cuda" and option != "float64" else 0), "and one launch"
        assert len(results[0]) == len(results[1])
        for a, b in zip(*results):
            assert_same(a, b)


def test_a_graphed_network_of_the_wrong_shape(host, recorded):
    with pytest.raises(ValueError, match="the model returned shape"):
        fastdiff.sample(
            lambda x, t: x[:, :1], (4, 3, 8, 8), fastdiff.VariancePreserving(), "ddim", 4, "epsilon", seed=1,
            cuda_graph=True, progress=False,
        )  # fmt: skip


def test_an_index_beyond_the_table_gives_nan(host):
    x, y, table = random((2, 8)), torch.empty(2, 8), torch.ones(3, K)
    index = torch.tensor([1, 3])
    numbers = [on.memory(t) for t in (x, y, table, index)]
    arguments = call(*numbers[:2], table=numbers[2], index=numbers[3])
    host.cuda_step(*arguments)
    assert bool(y[0].isfinite().all()) and bool(y[1].isnan().all())


# --- the binding


def call(x, y, samples=2, /, **changes):
    """The arguments of cuda_step, in order."""
    names = (
        *("device", "stream", "layout", "table", "index", "ticket", "x", "m", "uncond", "guidance", "clip"),
        *("threshold", "history", "shift", "noise", "log_variance", "mask", "known", "known_noise", "y", "x0"),
        *("entry", "model_input"),
    )
    values = dict.fromkeys(names) | {
        "device": 0, "stream": 0, "layout": (samples, x[2] // samples), "x": x, "m": x, "guidance": 1.0, "history": (),
        "shift": False, "y": y,
    }  # fmt: skip
    values |= changes
    return [values[name] for name in names]


class TestBinding:
    X = torch.zeros(2048)  # room for 64 elements of any dtype, twice, and for a table
    I = torch.zeros(64, dtype=torch.int64)  # noqa: E741
    P = X.data_ptr()
    GOOD = (P, 0, 64)

    def good(self):
        return call(self.GOOD, self.GOOD, 4, table=(self.P, 0, K))

    @settings(max_examples=examples(3000), deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_fuzz(self, host_module, data):
        """Anything at all in the place of any argument: run on memory that is there, or refused, never a crash."""
        self.I.zero_()
        integers = st.integers(-(2**65), 2**65) | st.sampled_from([0, -1, 2**31, 2**62, 2**63, 64])
        memory = st.tuples(
            st.sampled_from([0, self.P, -1]), st.integers(-2, 4), st.sampled_from([0, 1, 4, 16, 18, 64, 72, -1, 2**60])
        )
        indices = st.tuples(st.just(self.I.data_ptr()), st.just(5), st.sampled_from([0, 1, 4, 64]))
        noise = st.tuples(integers | indices, integers | indices, integers, st.sampled_from([0.0, 1.0, None]))
        mask = st.tuples(st.just(self.P), st.integers(-1, 5), st.sampled_from([1, 64, 1024]), integers, integers)
        small = st.tuples(*[st.sampled_from([-1, 0, 1, 4, 16, 64, 2**40])] * 2)
        junk = (
            st.none() | st.booleans() | st.floats() | st.text(max_size=3) | integers | memory | indices | noise | mask
            | small | st.tuples(memory) | st.tuples(memory, memory) | st.lists(integers, max_size=3)
        )  # fmt: skip
        arguments = self.good()
        for _ in range(data.draw(st.integers(1, 3))):
            arguments[data.draw(st.integers(0, len(arguments) - 1))] = data.draw(junk)
        try:
            host_module.cuda_step(*arguments)
        except (ValueError, TypeError, OverflowError):
            pass

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"device": -1}, "device"),
            ({"layout": (4, 15)}, "x"),
            ({"layout": (4, 2**60)}, "layout"),
            ({"layout": None}, "layout"),
            ({"table": (P, 0, 17)}, "table"),
            ({"table": (P, 0, 36)}, "table"),
            ({"table": (P, 1, 18)}, "table"),
            ({"table": (0, 0, 18)}, "table"),
            ({"index": (P, 0, 1)}, "indices"),
            ({"index": (I.data_ptr(), 5, 3)}, "index"),
            ({"ticket": (I.data_ptr(), 5, 1)}, "ticket"),
            ({"x": (0, 0, 64)}, "x"),
            ({"x": (P, 1, 64)}, "x: must be float32, bfloat16 or float16"),
            ({"x": (P, 9, 64)}, "dtype"),
            ({"m": None}, "m"),
            ({"guidance": None}, "guidance"),
            ({"guidance": (P, 0, 3)}, "guidance"),
            ({"clip": -1.0}, "clip"),
            ({"threshold": (P, 1, 4)}, "threshold"),
            ({"history": (None,)}, "history"),
            ({"history": (GOOD,) * 5}, "history"),
            ({"shift": True}, "shift"),
            ({"shift": True, "history": ((P, 2, 64),)}, "history: must be float32"),
            ({"noise": (1, 2**32, 0, 0.0)}, "stream"),
            ({"noise": (1, (I.data_ptr(), 5, 2), 0, 0.0)}, "stream"),
            ({"noise": (1, 0, 0, 0.5)}, "offset"),
            ({"mask": (P, 0, 64, 16, 16)}, "mask"),
            ({"mask": (P, 0, 63, 16, 16), "known": GOOD}, "mask"),
            ({"mask": (P, 0, 64, 5, 0), "known": GOOD}, "mask"),
            ({"known_noise": GOOD}, "known_noise"),
            ({"y": (P, 2, 64)}, "y"),
            ({"entry": (P, 2, 64)}, "entry"),
            ({"model_input": (P, 0, 65)}, "model_input"),
        ],
    )
    def test_messages_name_the_argument(self, host_module, changes, message):
        changes = {"table": (self.P, 0, K)} | changes
        with pytest.raises(ValueError, match=message):
            host_module.cuda_step(*call(self.GOOD, self.GOOD, 4, **changes))


# --- the module


@pytest.mark.skipif(not on.built, reason=on.unavailable_because)
def test_the_module_says_what_it_was_built_for():
    from fastdiff import _C

    assert set(_C.cuda_architectures()) <= {80, 86, 89, 90, 100, 120}


@pytest.mark.skipif(not on.built or torch.cuda.is_available(), reason="needs the kernel, and no device")
def test_without_a_device_a_launch_says_so():
    """It loads (this process has), and a launch raises instead of crashing."""
    from fastdiff import _C

    for attempt in (lambda: _C.cuda_step(*TestBinding().good()), lambda: _C.cuda_load(0)):
        with pytest.raises(RuntimeError, match=r"CUDA error \d+, device 0"):
            attempt()
    with pytest.raises(RuntimeError, match="no CUDA device"):
        fastdiff.use_backend("cuda")


# --- on a GPU


@pytest.fixture
def gpu():
    if not on.built:
        pytest.skip(on.unavailable_because)
    with fastdiff.use_backend("cuda"):
        yield torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_gpu_equals_the_reference(gpu, dtype, option):
    options = OPTIONS[option]
    for shape in [*SHAPES, (3, 4, 257, 129), (2, 4, 512, 512)]:
        positional, keywords = arguments_for(shape, dtype, options, "cuda")
        copies = options.get("model_input", 0)
        got = run(cuda, positional, keywords, copies)

        def on_cpu(value):
            if isinstance(value, ops.Philox) and isinstance(value.seed, torch.Tensor):
                return ops.Philox(int(value.seed), value.sample_offset, value.stream, value.offset)
            if isinstance(value, tuple):
                return tuple(on_cpu(item) for item in value)
            return value.cpu() if isinstance(value, torch.Tensor) else value

        with fastdiff.use_backend("reference"):
            want = run(reference, on_cpu(positional), {k: on_cpu(v) for k, v in keywords.items()}, copies)
        assert_as_reference([a if a is None else a.cpu() for a in got], want, option)


@pytest.mark.gpu
def test_gpu_noise_has_the_bits_of_the_cpu(gpu):
    row = torch.zeros(K, device=gpu)
    row[AT["c_noise"]] = 1.0
    for shape in ((4, 3, 512, 512), (3, 100_003)):
        zero = torch.zeros(shape, device=gpu)
        y, _, _ = cuda.step(
            zero, zero, None, 1.0, row, None, (), ops.Philox(-3, 2**35, 20), None, torch.float32, (False, False)
        )
        assert torch.equal(y.cpu(), reference.normal(-3, shape, 20, 2**35))


@pytest.mark.gpu
def test_gpu_runs_equal_the_cpu_and_wait_for_nothing(gpu):
    plan = fastdiff.samplers.get("ddpm").plan(fastdiff.VariancePreserving(), 8, "epsilon")
    x, seed = random((4, 3, 8, 8)), torch.tensor(5)
    runs = []
    for device in ("cuda", "cpu"):
        fastdiff.use_backend("cuda" if device == "cuda" else "reference")
        philox = ops.Philox(seed.to(device))
        run_ = ops.trajectory(x.to(device), plan.table, clip=plan.clip, philox=philox, reuse=True)
        run_.begin(1.0, 1)
        run_.step(0, network(run_.seen, None), noise=16)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for k in range(1, len(plan.times)):
                run_.step(k, network(run_.seen, None), noise=16 + k)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runs.append(run_.x.cpu())
    assert torch.equal(*runs)


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", CAPTURED)
@pytest.mark.parametrize("guided", [0, 1])
def test_gpu_graph_with_the_step_counted_on_the_device(gpu, sampler, guided):
    def replay(once, steps, held):
        run_, index, first, copies, x = held
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        for _ in range(steps):
            graph.replay()
        torch.cuda.synchronize()

    for dtype in DTYPES[:2]:
        replayed("cuda", dtype, sampler, guided, replay)


@pytest.mark.gpu
@pytest.mark.parametrize("option", ["plain", "guided", "inpainting", "noise of a function", "an estimate"])
def test_gpu_graphed_runs_equal_plain_ones(gpu, option):
    """``fastdiff.sample(cuda_graph=True)``; fresh noise at each replay, and from run to run."""
    process = fastdiff.VariancePreserving()

    def network(x, t, c=None):
        return 0.1 * x + t.view(-1, 1, 1, 1) / 1000 + (0.0 if c is None else 0.01 * c.view(-1, 1, 1, 1))

    for sampler in ("ddpm", "ddim", "heun", "dpmpp_2m_sde", "unipc"):
        runs = []
        for seed, graphed in ((3, False), (3, True), (4, True)):
            stored, how = [], {}
            for name, value in GRAPHED[option].items():
                how[name] = value.cuda() if isinstance(value, torch.Tensor) else value
            if "callback" in how:
                how["callback"] = lambda k, t, x, x0, stored=stored: stored.extend((x, x0))
            x = fastdiff.sample(
                network, (4, 3, 8, 8), process, sampler, 6, "epsilon", seed=seed, device="cuda",
                cuda_graph=graphed, progress=False, **how,
            )  # fmt: skip
            runs.append([x, *stored])
        assert all(torch.equal(a, b) for a, b in zip(*runs[:2]))
        assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.gpu
def test_gpu_streams_and_large_tensors(gpu):
    """On the current stream; and beyond 2^31 elements, where there is memory for them."""
    side, row = torch.cuda.Stream(), torch.zeros(K, device=gpu)
    row[AT["c_x"]] = 2.0
    x = torch.ones(64, 1024, 1024, device=gpu)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        slow = x
        for _ in range(20):
            slow = slow * 1.0
        y, _, _ = cuda.step(slow, slow, None, 1.0, row, None, (), None, None, x.dtype, (False, False))
    torch.cuda.current_stream().wait_stream(side)
    assert bool((y == 2).all())
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        return
    x = torch.ones(2**31 + 24, dtype=torch.bfloat16, device=gpu)
    y, _, _ = cuda.step(x, x, None, 1.0, row, None, (), None, None, x.dtype, (False, False))
    assert (
        bool((y[-1000:] == 2).all()) and bool((y[:1000] == 2).all()) and bool((y[2**31 - 500 : 2**31 + 20] == 2).all())
    )
