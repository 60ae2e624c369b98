"""``fastdiff bench``: who computes the same, what is counted, how it sums up, what it writes, and how it fails.

No test asks how long anything takes.
"""

import csv
import dataclasses
import functools
import importlib.util
import io
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

import fastdiff
from fastdiff.bench import (
    BenchError,
    command,
    compare,
    counting,
    measuring,
    models,
    peers,
    report,
    running,
    table,
)
from fastdiff.bench.cases import KINDS, OPERATIONS, PRESETS, Case, choose, operands
from fastdiff.bench.measuring import Spread, Timer, summary
from fastdiff.bench.progress import Progress
from fastdiff.cli import main

CPU = torch.device("cpu")
SHAPE = (3, 4, 8, 8)
BYTES = 3 * 4 * 8 * 8 * 4  # of one float32 tensor of that shape
PLOTS = importlib.util.find_spec("matplotlib") is not None
DIFFUSERS = pytest.param(
    "diffusers", marks=pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
)


def call(peer, operation, kind, dtype="fp32", shape=SHAPE, seed=0):
    case = Case(operation, kind, dtype, shape)
    o = operands(shape, dtype, CPU, seed)
    return peers.build(peer, case, CPU), o, case


# ---- the cases


class TestCases:
    def test_full_has_what_was_promised(self):
        full = choose("full")
        assert {case.operation for case in full} == set(OPERATIONS)
        assert {case.kind for case in full} == set(KINDS) and {case.dtype for case in full} == {"fp32", "bf16"}
        shapes = {case.shape for case in full}
        assert {(1, 4, 32, 32), (64, 4, 64, 64), (16, 3, 256, 256), (16, 3, 512, 512), (1, 16, 33, 60, 90)} <= shapes
        for operation in ("loss+gradient", "training step", "sampler step"):
            for shape in shapes - {case.shape for case in PRESETS["full"].extra}:
                for dtype in ("fp32", "bf16"):
                    kinds = {
                        case.kind
                        for case in full
                        if (case.operation, case.shape, case.dtype) == (operation, shape, dtype)
                    }
                    assert kinds == set(KINDS)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_presets(self, preset):
        chosen = choose(preset)
        assert len(chosen) == len(set(chosen)) > 0
        assert [case.elements for case in chosen] == sorted(case.elements for case in chosen)
        assert choose(preset, ["fp16"]) == [] or {case.dtype for case in choose(preset, ["fp16"])} == {"fp16"}

    def test_unknown(self):
        with pytest.raises(BenchError, match="unknown preset 'huge': use one of quick, full"):
            choose("huge")
        with pytest.raises(BenchError, match="unknown dtype 'int8': use one of fp32"):
            choose("quick", ["int8"])


# ---- the peers compute the same, so that their times can be compared


class TestPeers:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("operation", ["noising", "loss", "sampler step"])
    @pytest.mark.parametrize("peer", ["eager", "reference", DIFFUSERS])
    def test_same_values(self, peer, operation, kind):
        ours, o, case = call("fastdiff", operation, kind)
        try:
            theirs = peers.build(peer, case, CPU)
        except peers.Missing:
            assert peer == "diffusers"
            return
        if peer == "diffusers" and kind == "flow" and operation == "noising":
            # Its t are those of its own table: sigma = 1 - t / 1000.
            sigma = (1 - o.t / 1000).view(-1, 1, 1, 1)
            expected = (1 - sigma) * o.x0 + sigma * o.noise
        else:
            expected = ours(o)
        # float32 arithmetic in another order: some ulp of values of about 1 (of 1 / alpha, 3.4, in the sampler step).
        torch.testing.assert_close(theirs(o), expected, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("peer", ["eager", "reference", DIFFUSERS])
    def test_same_gradient(self, peer, kind):
        ours, o, case = call("fastdiff", "loss+gradient", kind)
        ours(o)
        expected = o.prediction.grad.clone()
        try:
            peers.build(peer, case, CPU)(o)
        except peers.Missing:
            assert (peer, kind) == ("diffusers", "flow")
            return
        torch.testing.assert_close(o.prediction.grad, expected, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("peer", ["fastdiff", "eager", "reference", DIFFUSERS])
    def test_training_step(self, peer, kind):
        if peer == "diffusers" and kind == "flow":
            with pytest.raises(peers.Missing, match="no such operation"):
                call(peer, "training step", kind)
            return
        step, o, _ = call(peer, "training step", kind, shape=(64, 4, 16, 16))
        first = step(o)[1].item()
        assert 0.1 < first < 100 and first != step(o)[1].item()  # fresh noise each time
        assert o.prediction.grad.isfinite().all() and o.prediction.grad.abs().sum() > 0

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
    @pytest.mark.parametrize("peer", ["fastdiff", "eager", "reference", DIFFUSERS])
    def test_sampler_step_that_draws(self, peer, kind):
        """Mean and variance are those of the step that is given its noise."""
        step, o, case = call(peer, "sampler step+noise", kind, shape=(64, 4, 32, 32))
        given, _, _ = call("fastdiff", "sampler step", kind, shape=(64, 4, 32, 32))
        o.noise.zero_()
        mean = given(o)
        scale = peers.sampling_plan(kind).table[peers.STEP, fastdiff.ops.COLUMNS.index("c_noise")].item()
        z = (step(o) - mean) / scale
        # Of 2^18 normals the mean and the variance are known to 1 / 512 and 1 / 362: five times that.
        assert abs(z.mean().item()) < 5 / 512 and abs(z.var().item() - 1) < 5 / 362

    def test_missing(self, monkeypatch):
        def gone(name):
            raise ModuleNotFoundError("No module named 'diffusers'")

        peers.diffusers_schedulers.cache_clear()
        monkeypatch.setattr(peers.importlib, "import_module", gone)
        with pytest.raises(peers.Missing, match="diffusers is not installed or too old .*: pip install diffusers"):
            peers.build("diffusers", Case("noising", "epsilon", "fp32", SHAPE), CPU)
        peers.diffusers_schedulers.cache_clear()


# ---- bytes, launches, memory


class TestCounting:
    def test_trace_of_known_operations(self):
        a, b = torch.ones(100, 10), torch.ones(10)
        full, row = 4000, 40

        def moved(function):
            count = counting.trace(function)
            return count.bytes, count.launches

        assert moved(lambda: a + 1) == (2 * full, 1)
        assert moved(lambda: a + b) == (2 * full + row, 1)
        assert moved(lambda: a + b.expand(100, 10)) == (2 * full + row, 1)  # a broadcast tensor is as large as it is
        assert moved(lambda: (a * 2 + b).sum()) == (2 * full + (2 * full + row) + (full + 4), 3)
        assert moved(lambda: a.view(10, 100).t().unsqueeze(0)) == (0, 0)  # views move nothing
        assert moved(lambda: torch.empty_like(a)) == (0, 0)
        assert moved(lambda: torch.randn_like(a)) == (full, 1)
        assert moved(lambda: a.to(torch.bfloat16)) == (full + full // 2, 1)
        assert moved(lambda: a.clone().zero_()) == (2 * full + full, 2)
        assert moved(lambda: a.clone().add_(1)) == (4 * full, 2)
        assert moved(lambda: torch.add(a, a, out=torch.empty_like(a)))[0] == 3 * full
        index = torch.tensor([1, 3])  # a gather reads what it returns, and the indices
        assert moved(lambda: a[index]) == (2 * 80 + 16, 1)

    def test_trace_takes_in_the_backward(self):
        a = torch.ones(1000, requires_grad=True)
        # The product; its sum; 1, written; the gradient of the sum, a number that is expanded, times 2.
        assert counting.trace(lambda: (a * 2).sum().backward()).bytes == 8000 + 4004 + 4 + (4 + 4000)

    def test_eager_noising(self):
        eager, o, _ = call("eager", "noising", "epsilon")
        count = counting.trace(lambda: eager(o))
        # Two products (read and write) and a sum (two read, one written): seven tensors, and the rows.
        assert 7 * BYTES < count.bytes < 7 * BYTES + 300
        assert count.by == "dispatch trace"

    @pytest.mark.parametrize("kind", KINDS)
    def test_more_than_the_floor(self, kind):
        for operation in OPERATIONS:
            if operation == "sampler step+noise" and kind == "flow":
                continue
            eager, o, case = call("eager", operation, kind)
            assert counting.trace(functools.partial(eager, o)).bytes >= counting.floor_bytes(case)

    @pytest.mark.parametrize(
        "operation, kind, tensors",
        [
            ("noising", "flow", 3),
            ("loss", "epsilon", 2),
            ("loss", "flow", 3),
            ("loss+gradient", "epsilon", 3),
            ("loss+gradient", "v_prediction", 4),
            ("training step", "epsilon", 4),
            ("training step", "v_prediction", 5),
            ("sampler step", "epsilon", 4),
            ("sampler step", "flow", 3),
            ("sampler step+noise", "v_prediction", 3),
        ],
    )
    def test_floor_and_known_operands(self, operation, kind, tensors):
        ours, o, case = call("fastdiff", operation, kind)
        result = ours(o)
        assert counting.floor_bytes(case) == tensors * BYTES
        kept = 0
        if operation == "training step" and isinstance(result[0].noise_source, torch.Tensor):
            kept = 2 * result[0].noise_source.nbytes  # written by noising, read by the loss
        count = counting.known_operands(case, o, result)
        assert count.bytes == tensors * BYTES + kept and count.launches is None

    def test_known_operands_without_kept_noise(self):
        ours, o, case = call("fastdiff", "training step", "epsilon")
        noised, loss = ours(o)
        noised.noise_source = fastdiff.ops.Philox(0)
        assert counting.known_operands(case, o, (noised, loss)).bytes == counting.floor_bytes(case)

    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
    def test_generated_code_of_known_functions(self):
        a, b = torch.ones(64, 100), torch.ones(64, 100)
        full = 25600

        def pointwise(x, y):
            return (x * 2 + y).sin()

        with counting.Generated() as found:
            torch.compile(pointwise, dynamic=False)(a, b)
        count = counting.generated(found.sources)
        assert (count.bytes, count.launches, count.by) == (3 * full, 1, "generated code")

    def test_generated_code_that_was_read(self):
        # The shape of what Inductor writes: two kernels, one that also updates a buffer, a view, an outer call.
        source = """
cpp_fused_a_0 = async_compile.cpp_pybinding(['float*', 'const float*'], r'''
extern "C"  void  kernel(float* in_out_ptr0,
                       const float* in_ptr0)
{ }
''')
triton_poi_b_1 = async_compile.triton('triton_poi_b_1', '''
def triton_poi_b_1(in_ptr0, out_ptr0, xnumel, XBLOCK : tl.constexpr):
    pass
''', device_str='cuda')

class Runner:
    def call(self, args):
        arg0_1, arg1_1 = args
        buf0 = empty_strided_cpu((8, 16), (16, 1), torch.float32)
        aten.randint.low_out(-9223372036854775808, 9223372036854775807, [2], out=buf0)
        cpp_fused_a_0(buf0, arg0_1)
        buf1 = buf0; del buf0  # reuse
        buf2 = empty_strided_cuda((8, 16), (16, 1), torch.bfloat16)
        triton_poi_b_1.run(reinterpret_tensor(buf1, (128, ), (1, ), 0), buf2, 128, stream=stream0)
        return (buf2, )

def get_args():
    arg0_1 = rand_strided((8, 16), (0, 1), device='cpu', dtype=torch.float32)
    arg1_1 = rand_strided((8, ), (1, ), device='cpu', dtype=torch.int64)
    return [arg0_1, arg1_1]
"""
        count = counting.generated([source])
        randint, first, second = 512, 2 * 512 + 64, 512 + 256
        assert (count.bytes, count.launches) == (randint + first + second, 3)
        assert counting.generated([]) is None

    def test_peak_memory(self):
        x = torch.ones(1000)
        assert 4000 <= counting.peak_memory(lambda: (x + 1).add_(1), CPU) < 4100  # a number or two beside
        assert 12000 <= counting.peak_memory(lambda: (x + 1) + (x + 2), CPU) < 12100
        assert counting.peak_memory(lambda: None, CPU) == 0

    def test_peak_memory_of_ours(self):
        step, o, case = call("fastdiff", "training step", "v_prediction", shape=(64, 4, 32, 32))
        step(o)
        o.prediction.grad = None
        noised, _ = step(o)
        kept = noised.noise_source.nbytes if isinstance(noised.noise_source, torch.Tensor) else 0
        o.prediction.grad = noised = None
        peak = counting.peak_memory(lambda: step(o), CPU)
        if fastdiff.backends.choose(CPU) == "native":
            # x_t, its gradient and the noise, and rows; nothing else of full size.
            assert 2 * case.tensor_bytes + kept <= peak < 2.1 * case.tensor_bytes + kept

    def test_recorder(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "fastdiff.backends.triton", None)
        assert counting.recorded(lambda: None) is None

        class Launches(list):
            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        found = Launches()
        launch = type("Launch", (), {"bytes": 12})
        monkeypatch.setitem(sys.modules, "fastdiff.backends.triton", type("M", (), {"launches": lambda: found}))
        count = counting.recorded(lambda: found.extend([launch(), launch()]))
        assert (count.bytes, count.launches, count.by) == (24, 2, "launch recorder")


# ---- times


class TestMeasuring:
    def test_summary(self):
        found = summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
        assert (found.median, found.p20, found.p80, found.rounds) == (3.5, 2.0, 5.0, 6)
        assert summary([7.0]) == Spread(7.0, 7.0, 7.0, 1)

    def test_steady(self):
        assert summary([1.0, 1.1, 1.2, 1.0, 1.1]).steady
        assert not summary([1.0, 1.1, 1.2]).steady  # too few
        assert not summary([1.0, 2.0, 1.0, 2.0, 1.5]).steady  # too wide

    def test_agreement(self):
        a = Spread(10.0, 9.0, 11.0, 9)
        assert a.noise == (8.0, 12.0)
        assert a.agrees(Spread(14.0, 13.0, 15.0, 9)) and Spread(14.0, 13.0, 15.0, 9).agrees(a)
        assert not a.agrees(Spread(15.0, 14.0, 16.0, 9)) and not Spread(15.0, 14.0, 16.0, 9).agrees(a)

    def test_timer(self):
        made = []
        assert Timer(CPU).seconds([lambda: made.append(1)] * 3) > 0 and len(made) == 3
        assert Timer(CPU).host_seconds(lambda: None) > 0

    def test_ceiling(self):
        copy = measuring.Copy(Timer(CPU), megabytes=1)
        assert copy.values() is None
        copy.measure()
        copy.measure()
        found = copy.values()
        assert found["rounds"] == len(copy.rates) == 20
        assert found["p20"] <= found["bytes_per_second"] <= found["p80"] and found["buffer_bytes"] == 2**20
        assert measuring.cache_bytes(CPU) >= 2**17

    def test_ratios_by_blocks(self):
        # A slow machine slows both; a call that was interrupted is one of a block.
        rounds = [{"a": 2.0 * drift, "b": 1.0 * drift} for drift in (1, 1, 1, 1, 1, 3, 3, 3, 3, 3) * 3]
        rounds[8]["b"] = 100.0
        found = running.block_ratios(rounds, "a", "b")
        assert len(found) == 6 and found == pytest.approx([2.0] * 6)
        assert running.block_ratios([{"a": 1.0}], "a", "b") == []


class FakeGpu:
    """A host and a device with a clock each, in seconds: a launch costs the host 5 us, and waits where 1000 are queued.
    It stands in for torch.cuda and for the module ``time``."""

    LAUNCH, DEPTH, CYCLES = 5e-6, 1000, 1.5e9

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        self.ends = []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.time = max(gpu.host, gpu.device)

            def query(self):
                return self.time <= gpu.host

            def synchronize(self):
                gpu.host = max(gpu.host, self.time)

            def elapsed_time(self, other):
                return (other.time - self.time) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.launch(cycles / gpu.CYCLES))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: gpu.wait())
        for module in (measuring, running):
            monkeypatch.setattr(module, "time", self)

    def perf_counter(self):
        return self.host

    def launch(self, seconds):
        self.host += self.LAUNCH
        self.ends = [end for end in self.ends if end > self.host]
        if len(self.ends) >= self.DEPTH:
            self.host = self.ends[-self.DEPTH]
        self.device = max(self.host, self.device) + seconds
        self.ends.append(self.device)

    def wait(self):
        self.host = max(self.host, self.device)

    def call(self, launches, seconds):
        """A call of so many kernels, which take so long each."""
        return lambda *_: [self.launch(seconds) for _ in range(launches)]


CUDA = torch.device("cuda", 0)


class TestTimesOfAGpu:
    @pytest.mark.parametrize("guess", [1.0, 0.2])  # of what a call costs the host
    @pytest.mark.parametrize(("launches", "seconds"), [(1, 2e-6), (20, 2e-6), (3, 1e-3)])
    def test_are_its_own(self, launches, seconds, guess, monkeypatch):
        """Also where launching takes longer than the work."""
        gpu = FakeGpu(monkeypatch)
        timer, calls = Timer(CUDA), [gpu.call(launches, seconds)] * 25
        host = guess * launches * gpu.LAUNCH
        assert timer.seconds(calls, host) == pytest.approx(launches * seconds) and timer.queued
        assert timer.seconds(calls) == pytest.approx(launches * max(seconds, gpu.LAUNCH), rel=0.05)
        assert timer.host_seconds(calls[0]) == pytest.approx(launches * gpu.LAUNCH)

    def test_are_not_where_a_call_waits_for_the_device(self, monkeypatch):
        gpu = FakeGpu(monkeypatch)
        timer = Timer(CUDA)
        assert timer.seconds([lambda: (gpu.launch(2e-6), gpu.wait())] * 5, gpu.LAUNCH) >= gpu.LAUNCH
        assert not timer.queued
        timer.seconds([gpu.call(1, 2e-6)], gpu.LAUNCH)
        assert timer.queued

    def test_are_the_ceilings_too(self, monkeypatch):
        """A copy's launch, 5 us, is not in it."""
        gpu = FakeGpu(monkeypatch)
        timer = Timer(CUDA)
        timer.device = CPU  # where its buffers are
        copy = measuring.Copy(timer, megabytes=1)
        monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: gpu.launch(1e-4))
        copy.measure()
        assert copy.rates == pytest.approx([2 * 2**20 / 1e-4] * 10)

    def test_in_a_run(self, monkeypatch):
        """In bursts that the queue takes; what could not be launched ahead is noted."""
        gpu = FakeGpu(monkeypatch)
        monkeypatch.setattr(running, "Copy", lambda timer: None)
        made = running.Run(TINY[:1], ("fastdiff", "eager", "diffusers"), CUDA, 1e-3, 0.0)
        measured = {name: running.Measurement() for name in made.names}
        made.results[TINY[0]] = measured
        calls = {"fastdiff": gpu.call(3, 1e-6), "eager": gpu.call(40, 2e-6)}
        calls["diffusers"] = lambda *_: (gpu.launch(2e-6), gpu.wait())
        for name, launches in (("fastdiff", 3), ("eager", 40), ("diffusers", None)):
            measured[name].count = counting.Count(0, launches, "test")
            measured[name].host_seconds = made.timer.host_seconds(calls[name])
        made._rounds(calls, [None], measured, 0)
        made._note_missing()
        assert measured["fastdiff"].seconds == pytest.approx([3e-6] * len(measured["fastdiff"].seconds))
        assert measured["eager"].spread.median == pytest.approx(80e-6)
        assert measured["eager"].ratio.median == pytest.approx(80 / 3)
        (note,) = made.notes
        assert note.startswith("diffusers: not all calls could be launched ahead of the device")


# ---- a run

TINY = [
    Case("training step", "v_prediction", "fp32", (2, 4, 8, 8)),
    Case("training step", "v_prediction", "fp32", (8, 4, 16, 16)),
    Case("noising", "v_prediction", "fp32", (8, 4, 16, 16)),
    Case("sampler step", "v_prediction", "bf16", (8, 4, 16, 16)),
]


@pytest.fixture
def tiny(monkeypatch):
    """A preset of tiny cases, and a small ceiling."""
    monkeypatch.setattr(command, "choose", lambda preset, dtypes: list(TINY))
    monkeypatch.setitem(PRESETS, "quick", dataclasses.replace(PRESETS["quick"], seconds=0.2))
    monkeypatch.setattr(running, "Copy", lambda timer: measuring.Copy(timer, megabytes=1))


def run(*arguments):
    return main(["bench", "--against", "eager,diffusers,reference", "--device", "cpu", *map(str, arguments)])


def refused(capsys, *arguments):
    assert main(["bench", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdiff: error: ") and error.count("\n") == 1
    return error


class TestRun:
    def test_writes_everything(self, tiny, tmp_path, capsys):
        assert run("--out", tmp_path) == 0
        files = {"bench.json", "bench.csv", "bench.md", "bench.html"} | ({"bench.png"} if PLOTS else set())
        assert {path.name for path in tmp_path.iterdir()} == files
        found = json.loads((tmp_path / "bench.json").read_text())
        assert found["schema"] == report.SCHEMA and found["complete"] and found["preset"] == "quick"
        assert found["versions"]["torch"] == torch.__version__ and found["device"]["name"] == "cpu"
        assert found["device"]["backend"] == fastdiff.backends.choose("cpu")
        assert [report.case_name(case) for case in found["cases"]] == [case.name for case in TINY]
        for case in found["cases"]:
            ours = case["peers"]["fastdiff"]
            seconds = ours["seconds"]
            assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"] and seconds["rounds"] >= 6
            rate = found["ceiling"]["bytes_per_second"]
            assert ours["of_ceiling"] == pytest.approx(case["floor_bytes"] / seconds["median"] / rate)
            assert ours["bytes_per_second"] == pytest.approx(ours["bytes"] / seconds["median"])
            assert ours["images_per_second"] == pytest.approx(case["shape"][0] / seconds["median"])
            assert ours["host_seconds"] > 0 and ours["ratio"] is None and ours["missing"] is None
            eager = case["peers"]["eager"]
            assert eager["launches"] > 1 and eager["bytes"] > case["floor_bytes"] and eager["peak_bytes"] > 0
            assert eager["ratio"]["rounds"] >= 5
        rows = list(csv.DictReader(io.StringIO((tmp_path / "bench.csv").read_text())))
        assert len(rows) == len(TINY) * 4 and float(rows[0]["seconds_median"]) > 0
        assert rows[0]["torch"] == torch.__version__
        output = capsys.readouterr().out
        for text in ("training step v_prediction fp32 8x4x16x16", "copy ceiling", "eager ×", "missing: diffusers"):
            assert text in output
        assert "| training step v_prediction fp32 8x4x16x16 |" in (tmp_path / "bench.md").read_text()

    @pytest.mark.skipif(not PLOTS, reason="needs matplotlib")
    def test_page(self, tiny, tmp_path):
        assert run("--out", tmp_path) == 0
        page = (tmp_path / "bench.html").read_text()
        assert page.count("<picture>") == 3 and page.count("data:image/svg+xml;base64,") == 12
        assert "http" not in page.replace("http-equiv", "")  # it needs nothing else
        assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page
        Image = pytest.importorskip("PIL.Image")
        with Image.open(tmp_path / "bench.png") as image:
            image.load()
            assert image.width > 900 and image.height > 1000

    def test_compare(self, tiny, tmp_path, capsys):
        for name in ("a", "b"):
            assert run("--out", tmp_path / name) == 0
        path = tmp_path / "b" / "bench.json"
        changed = json.loads(path.read_text())
        for values in (
            changed["cases"][0]["peers"]["eager"]["seconds"],
            changed["cases"][0]["peers"]["eager"]["ratio"],
        ):
            values |= dict.fromkeys(("median", "p20", "p80"), 1000 * values["median"])  # whatever the spread was
        path.write_text(json.dumps(changed))
        capsys.readouterr()
        assert main(["bench", "--compare", str(tmp_path / "a" / "bench.json"), str(path)]) == 0
        output = capsys.readouterr().out
        assert "training step v_prediction fp32 2x4x8x8" in output and "eager" in output
        assert "times changed beyond the noise" in output
        (entry,) = [
            entry
            for entry in compare.differences(json.loads((tmp_path / "a" / "bench.json").read_text()), changed)
            if entry["peer"] == "eager" and entry["case"] == TINY[0].name
        ]
        assert entry["changed"] and entry["ratio_changed"]

    def test_compare_of_a_report_with_itself(self, tiny, tmp_path, capsys):
        assert run("--out", tmp_path) == 0
        found = report.load(tmp_path / "bench.json")
        assert not any(entry["changed"] or entry["ratio_changed"] for entry in compare.differences(found, found))
        times = sum(peer["seconds"] is not None for case in found["cases"] for peer in case["peers"].values())
        assert times >= 12 and f"0 of {times} times changed" in compare.text(found, found)

    def test_interrupted(self, tiny, tmp_path, monkeypatch, capsys):
        real, seen = running.Run._sweep_case, []

        def interrupt(self, case, sets, sweep):
            if len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(case)
            real(self, case, sets, sweep)

        monkeypatch.setattr(running.Run, "_sweep_case", interrupt)
        assert run("--out", tmp_path) == 130
        found = report.load(tmp_path / "bench.json")
        assert not found["complete"] and len(found["cases"]) == 2
        assert "interrupted: 2 of 4 cases not measured" in found["notes"]
        assert (tmp_path / "bench.html").exists() and (tmp_path / "bench.png").exists() == PLOTS
        output = capsys.readouterr().out
        assert "interrupted: 2 of 4" in output and TINY[0].name in output and TINY[2].name not in output

    def test_out_of_memory(self, tiny, tmp_path, monkeypatch, capsys):
        real = peers.build

        def build(peer, case, device):
            found = real(peer, case, device)

            def fail(o):
                if case.elements > 1000 and o.x0.numel() > 1 and peer == "eager":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
                return found(o)

            return fail

        monkeypatch.setattr(peers, "build", build)
        assert run("--out", tmp_path) == 0
        found = report.load(tmp_path / "bench.json")
        assert found["complete"] and "eager: out of memory (3 of 4 cases)" in found["notes"]
        assert found["cases"][1]["peers"]["eager"]["missing"] == "out of memory"
        assert found["cases"][1]["peers"]["fastdiff"]["seconds"] and found["cases"][0]["peers"]["eager"]["seconds"]

    def test_no_memory_for_the_tensors(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr(running, "free_bytes", lambda device: 200_000)
        assert run("--out", tmp_path) == 0
        found = report.load(tmp_path / "bench.json")
        assert found["cases"][0]["peers"]["fastdiff"]["seconds"]
        assert "no memory for its tensors" in found["cases"][1]["peers"]["fastdiff"]["missing"]

    def test_a_peer_that_fails_later(self, tmp_path):
        made = running.Run(TINY[:1], ("fastdiff", "eager"), CPU, 0.05, 0.0)
        calls = {"number": 0}
        real = peers.build

        def build(peer, case, device):
            found = real(peer, case, device)
            if peer == "fastdiff":
                return found

            def later(o):
                calls["number"] += 1
                if calls["number"] > 20:
                    raise RuntimeError("it broke\nwith details")
                return found(o)

            return later

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(peers, "build", build)
            made.measure(Progress(1, quiet=True))
        assert made.results[TINY[0]]["eager"].missing == "failed: RuntimeError: it broke"
        assert made.results[TINY[0]]["fastdiff"].seconds

    def test_without_matplotlib(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert run("--out", tmp_path) == 0
        assert not (tmp_path / "bench.png").exists()
        assert "matplotlib is not installed" in (tmp_path / "bench.html").read_text()
        assert any("matplotlib" in note for note in report.load(tmp_path / "bench.json")["notes"])

    def test_too_slow_a_peer_is_timed_once(self):
        made = running.Run(TINY[:1], ("fastdiff", "reference"), CPU, 1e-9, 0.0)
        made.measure(Progress(1, quiet=True))
        measured = made.results[TINY[0]]["reference"]
        assert measured.ratio is None and measured.seconds
        assert table.ratio({"ratio": None}) == "-"

    def test_refusals(self, capsys, tmp_path):
        assert "unknown preset" in refused(capsys, "--preset", "nonsense")
        assert "unknown dtype" in refused(capsys, "--dtype", "fp32,nonsense")
        assert "unknown --against 'jax'" in refused(capsys, "--against", "jax")
        assert "unknown model" in refused(capsys, "--model", "gpt")
        assert "--threads must be at least 1" in refused(capsys, "--threads", 0)
        assert "--seconds must be positive" in refused(capsys, "--seconds", -1)
        assert "cannot be used" in refused(capsys, "--device", "nonsense")
        assert "--nproc must be at least 1" in refused(capsys, "--nproc", 0)
        if not torch.cuda.is_available():
            assert "'cuda' cannot be used" in refused(capsys, "--device", "cuda")
        (tmp_path / "file").write_text("{}")
        assert "is a file" in refused(capsys, "--out", tmp_path / "file", "--device", "cpu")
        assert "is no report" in refused(capsys, "--compare", tmp_path / "file", tmp_path / "file")
        assert "cannot be read" in refused(capsys, "--compare", tmp_path / "gone", tmp_path / "file")


class TestTable:
    def test_wide_spreads_have_no_ratio(self):
        wide = {"median": 2.0, "p20": 1.0, "p80": 3.0, "rounds": 9, "steady": False}
        assert table.ratio({"ratio": wide}) == "wide 1.0-3.0"
        assert table.ratio({"ratio": wide | {"steady": True}}) == "2.00"

    def test_units(self):
        assert [table.time(t) for t in (None, 2.5, 2.5e-3, 2.5e-5)] == ["-", "2.50 s", "2.50 ms", "25.0 µs"]
        assert [table.size(n) for n in (None, 12, 1234, 5_600_000)] == ["-", "12 B", "1.23 kB", "5.60 MB"]
        assert [table.share(s) for s in (None, 0.5, 0.012, 0.00012)] == ["-", "50%", "1.2%", "0.012%"]
        assert [table.rate(r) for r in (None, 5.0, 12345.0, 3e6)] == ["-", "5.00", "12.3k", "3.00M"]

    def test_narrow_terminal(self, tiny, tmp_path, capsys):
        assert run("--out", tmp_path) == 0
        found = report.load(tmp_path / "bench.json")
        wide, narrow = (table.text(found, width).splitlines() for width in (None, 110))
        assert max(map(len, narrow)) <= 110 < max(map(len, wide))
        assert "eager ×" in narrow[0] and "extra memory" in wide[0] and "extra memory" not in narrow[0]


def test_model():
    """The share of noising and loss is between nothing and all of a step, on a network that learns."""
    found = models.share("unet-small", CPU, "fp32", 0.0, Progress(1, quiet=True), batch=2)
    for label in ("before", "after"):
        assert 0 < found[label]["share"] < 1 and found[label]["seconds"]["rounds"] >= measuring.MIN_ROUNDS
    assert found["parameters"] > 1e5 and found["shape"] == [2, 3, 32, 32]
    assert "noising and loss take" in table.model_text(found)
    with pytest.raises(BenchError, match="unknown model"):
        models.share("nonsense", CPU, "fp32", 0.0, Progress(1, quiet=True))


def test_progress_estimates_from_how_the_plan_held(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fastdiff.bench.progress.time.perf_counter", lambda: now[0])
    progress = Progress(100.0)
    assert progress.left() == "about 2 min left"
    progress.advance(50.0)
    now[0] = 25.0
    assert progress.left() == "about 25 s left"
    progress.say("something")
    assert "50%  something, about 25 s left" in capsys.readouterr().err
    progress.close()


def test_several_processes(tmp_path):
    """Two processes measure at once; the first reports each and all."""
    command_line = [sys.executable, "-m", "fastdiff", "bench", "--nproc", "2", "--device", "cpu", "--threads", "1"]
    command_line += ["--against", "none", "--preset", "policy", "--seconds", "0.2", "--out", str(tmp_path)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    ranks = report.load(tmp_path / "bench.json")["ranks"]
    assert ranks["world"] == 2
    for case in ranks["cases"]:
        assert len(case["images_per_second"]) == 2 and all(value > 0 for value in case["images_per_second"])
    assert done.stdout.count("images/s together") == 1  # one process speaks
    assert not math.isnan(ranks["cases"][0]["images_per_second"][0])
