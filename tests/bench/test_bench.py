"""``fastdiff bench``: who computes the same, what is counted, how it sums up, what it writes, and how it fails.

No test asks how long anything takes.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from drawn import described
from known import Clock

import fastdiff
from fastdiff.bench import (
    BenchError,
    command,
    compare,
    counting,
    measuring,
    models,
    page,
    peers,
    plots,
    processes,
    report,
    running,
    table,
)
from fastdiff.bench.cases import KINDS, OPERATIONS, PRESETS, Case, choose, operands
from fastdiff.bench.measuring import Spread, Timer, summary
from fastdiff.bench.progress import Progress
from fastdiff.cli import _parser, main

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
        moments = [(case.shape, case.dtype) for case in full if case.operation == "row moments"]
        assert sorted(moments) == sorted((shape, dtype) for shape in PRESETS["full"].shapes + ((16, 3, 512, 512),)
                                         for dtype in ("fp32", "bf16"))  # fmt: skip
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

    def test_policies(self):
        """Chunks of actions, small enough that the host's time is all there is, with the gradient both ways."""
        chosen = choose("policy")
        assert (64, 16, 14) in {case.shape for case in chosen} and max(case.elements for case in chosen) <= 2**19
        assert {"loss+gradient", "loss and gradient"} <= {case.operation for case in chosen}

    def test_unknown(self):
        with pytest.raises(BenchError, match="unknown preset 'huge': use one of quick, full"):
            choose("huge")
        with pytest.raises(BenchError, match="unknown dtype 'int8': use one of fp32"):
            choose("quick", ["int8"])

    def test_dtypes_by_pytorchs_names(self):
        ours, pytorchs = ["fp32", "bf16", "fp16"], ["float32", "bfloat16", "float16"]
        assert choose("full", pytorchs) == choose("full", ours) != []


# ---- the peers compute the same, so that their times can be compared


class TestPeers:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("operation", ["noising", "loss", "sampler step", "row moments"])
    @pytest.mark.parametrize("peer", ["eager", "reference", DIFFUSERS])
    def test_same_values(self, peer, operation, kind):
        ours, o, case = call("fastdiff", operation, kind)
        try:
            theirs = peers.build(peer, case, CPU)
        except peers.Missing:
            assert peer == "diffusers"
            return
        if operation == "row moments":  # sums of up to 2^-7 of what is added up
            for got, expected in zip(theirs(o), ours(o), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-3)
            return
        if peer == "diffusers" and kind == "flow" and operation == "noising":
            # Its t are those of its own table: sigma = 1 - t / 1000.
            sigma = (1 - o.t / 1000).view(-1, 1, 1, 1)
            expected = (1 - sigma) * o.x0 + sigma * o.noise
        else:
            expected = ours(o)
        # float32 arithmetic in another order: some ulp of values of about 1 (of 1 / alpha, 3.4, in the sampler step).
        torch.testing.assert_close(theirs(o), expected, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("peer", ["eager", "reference"])
    def test_same_divergence_and_gradient(self, peer):
        ours, o, case = call("fastdiff", "divergence+gradient", "epsilon")
        loss, gradient = ours(o).detach(), o.output.grad
        theirs = peers.build(peer, case, CPU)(o).detach()
        torch.testing.assert_close(theirs, loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(o.output.grad, gradient, rtol=1e-5, atol=1e-9)

    def test_same_latents(self, monkeypatch):
        """For the noise that ours made."""
        ours, o, case = call("fastdiff", "latents", "epsilon")
        noised = ours(o)
        mean, log_variance = o.output.detach().chunk(2, 1)
        xi = ((noised.x0 / 0.3611 + 0.1159) - mean) / torch.exp(log_variance / 2)
        drawn = iter([xi, noised.noise])
        monkeypatch.setattr(torch, "randn_like", lambda x: next(drawn))
        z, x_t = peers.build("eager", case, CPU)(o)
        torch.testing.assert_close(z, noised.x0, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(x_t, noised.x_t, rtol=1e-5, atol=2e-6)
        assert abs(float(xi.mean())) < 0.1 and abs(float(xi.std()) - 1) < 0.1

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("peer", ["eager", "reference"])
    def test_same_images_and_tokens(self, peer, kind, dtype):
        """Scripts compute in the network's dtype, so some units of it."""
        unit = 2**-6 if dtype == "bf16" else 2e-6
        ours, o, case = call("fastdiff", "noising images", kind, dtype)
        theirs = peers.build(peer, case, CPU)(o)
        torch.testing.assert_close(theirs, ours(o), rtol=unit, atol=unit)
        ours, o, case = call("fastdiff", "noising+loss of tokens", kind, dtype)
        x_t, loss = ours(o)
        gradient = o.tokens.grad
        their_x_t, their_loss = peers.build(peer, case, CPU)(o)
        assert x_t.shape == gradient.shape == (3, 16, 16) and gradient is not o.tokens.grad
        torch.testing.assert_close(their_x_t, x_t, rtol=unit, atol=unit)
        torch.testing.assert_close(their_loss, loss, rtol=10 * unit, atol=0)
        torch.testing.assert_close(o.tokens.grad, gradient, rtol=unit, atol=10 * unit * float(gradient.abs().max()))

    @pytest.mark.parametrize("at_0", [False, True])
    @pytest.mark.parametrize("peer", ["eager", "reference"])
    def test_same_hybrid_loss_and_gradient(self, peer, at_0):
        ours, o, case = call("fastdiff", "hybrid loss", "epsilon")
        o.t[:] = o.t.clamp(min=1)
        if at_0:  # bins, of data near the means and far from them
            o.t[::2] = 0
            with torch.no_grad():
                o.output[:, : SHAPE[1]] = o.noise + 0.3 * torch.randn(SHAPE)
            o.x0.clamp_(-1, 1)
        expected = ours(o).detach()
        gradient, o.output.grad = o.output.grad.chunk(2, 1), None
        found = peers.build(peer, case, CPU)(o).detach()
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
        # Differences of normal distribution functions lose digits.
        near = {"rtol": 1e-3 if at_0 and peer == "eager" else 1e-4}
        for half, truth in zip(o.output.grad.chunk(2, 1), gradient):
            torch.testing.assert_close(half, truth, **near, atol=1e-4 * float(truth.abs().max()))
        assert gradient[1].abs().max() > 0

    def test_the_bound_of_the_hybrid_loss(self):
        """Of the linear schedule: v from -1 to 1 goes from the posterior's log-variance to that of beta."""
        scale, l_0, l_v, l_q, half_width, weight = peers._variance_bound(CPU).double().unbind(1)
        betas = oracle.betas_linear(1000)
        low, high = oracle.posterior_log_variance(betas, "repeat"), np.log(betas)
        np.testing.assert_allclose(l_0 - l_v, low.astype(float), rtol=1e-6)
        np.testing.assert_allclose(l_0 + l_v, high.astype(float), rtol=1e-6)
        np.testing.assert_allclose(l_q, low.astype(float), rtol=1e-6)
        # The mean is (x_t - beta / sqrt(1 - alpha_bar) epsilon) / sqrt(alpha).
        by_epsilon = -betas / np.sqrt(1 - oracle.alpha_bar(betas)) / np.sqrt(1 - betas)
        np.testing.assert_allclose(scale, by_epsilon.astype(float), rtol=1e-6)
        assert half_width[0] == pytest.approx(1 / 255) and bool((half_width[1:] < 0).all())
        assert torch.equal(weight.float(), torch.full((1000,), 0.001))

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
    @pytest.mark.parametrize("peer", ["eager", "reference"])
    def test_same_loss_and_gradient(self, peer, kind):
        ours, o, case = call("fastdiff", "loss and gradient", kind)
        loss, gradient = ours(o)
        assert o.prediction.grad is None
        found = peers.build(peer, case, CPU)(o)
        found = found if peer == "reference" else (found.detach(), o.prediction.grad)
        torch.testing.assert_close(found[0], loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(found[1], gradient, rtol=1e-5, atol=1e-8)

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

    @pytest.mark.parametrize("operation", ["loss+gradient", "training step"])
    @pytest.mark.parametrize("peer", ["fastdiff", "eager", "reference", DIFFUSERS])
    def test_a_call_adds_to_no_gradient(self, peer, operation):
        step, o, _ = call(peer, operation, "epsilon")
        o.prediction.grad = torch.full_like(o.prediction, torch.nan)
        step(o)
        assert o.prediction.grad.isfinite().all()

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
        if peer == "fastdiff":  # what ``sample`` draws in step 10
            drawn = fastdiff.ops.materialize(fastdiff.ops.Philox(0, stream=26), o.x0.shape, CPU)
            # Some ulp of values up to 8, over a scale of 0.2.
            torch.testing.assert_close(z, drawn, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("kind, more", [("epsilon", 0), ("v_prediction", 1)])
    def test_weights_are_min_snr_of_5(self, kind, more):
        """min(S, 5) / S on epsilon, / (S + 1) on v: of a prediction of 0 and a target of known squares."""
        eager, o, _ = call("eager", "loss", kind)
        o.t = torch.tensor([20, 300, 900])  # S = 78, 0.65 and 2.7e-4
        with torch.no_grad():
            o.prediction.zero_()
        alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[o.t]
        ratio = alpha_bar / (1 - alpha_bar)
        a, s = (row.sqrt().view(3, 1, 1, 1) for row in (alpha_bar, 1 - alpha_bar))
        target = a * o.noise - s * o.x0 if more else o.noise.double()
        expected = (ratio.clamp(max=5.0) / (ratio + more) * target.square().mean((1, 2, 3))).mean()
        # The float32 alpha_bar is known to 6e-8, of 1 - alpha_bar = 0.013.
        torch.testing.assert_close(eager(o), expected.float(), rtol=1e-5, atol=0)

    def test_the_reference_is_the_reference(self):
        assert peers._with_reference(lambda o: fastdiff.backends.choose("cpu"))(None) == "reference"

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
            ("loss and gradient", "epsilon", 3),
            ("loss and gradient", "flow", 4),
            ("hybrid loss", "epsilon", 5),
            ("latents", "epsilon", 4),
            ("divergence+gradient", "epsilon", 4),
            ("training step", "epsilon", 4),
            ("training step", "v_prediction", 5),
            ("sampler step", "epsilon", 4),
            ("sampler step", "flow", 3),
            ("sampler step+noise", "v_prediction", 3),
            ("row moments", "epsilon", 2),
            ("noising images", "flow", 2.25),
            ("noising+loss of tokens", "epsilon", 6),
            ("noising+loss of tokens", "flow", 7),
        ],
    )
    def test_floor_and_known_operands(self, operation, kind, tensors):
        ours, o, case = call("fastdiff", operation, kind)
        result = ours(o)
        assert counting.floor_bytes(case) == tensors * BYTES
        kept = 0
        if operation == "training step" and isinstance(result[0].noise_source, torch.Tensor):
            kept = 2 * result[0].noise_source.nbytes  # written by noising, read by the loss
        if operation == "latents" and isinstance(result.noise_source, torch.Tensor):
            kept = result.noise_source.nbytes
        count = counting.known_operands(case, o, result)
        assert count.bytes == tensors * BYTES + kept and count.launches is None

    @pytest.mark.parametrize("seen, expected", [(("CPU", "CUDA", "CPU", "CUDA"), 2), (("CPU",), None), (None, None)])
    def test_launches_by_the_profiler(self, seen, expected, monkeypatch):
        """What it saw the device do; a build without a profiler of GPUs sees nothing, or fails."""
        types, called = torch.autograd.DeviceType, []

        @contextlib.contextmanager
        def profile(activities):
            if seen is None:
                raise RuntimeError("there is none")
            events = [SimpleNamespace(device_type=lambda kind=kind: getattr(types, kind)) for kind in seen]
            yield SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events)))

        monkeypatch.setattr(torch.profiler, "profile", profile)
        monkeypatch.setattr(torch.cuda, "synchronize", called.append)
        found = counting.profiled_launches(lambda: called.append("the call"), torch.device("cuda", 0))
        assert found == expected and called == ([] if seen is None else ["the call", torch.device("cuda", 0)])

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

    def test_sizes_of_the_types_in_generated_code(self):
        assert {"torch.float32", "torch.bfloat16", "torch.float64", "torch.int64", "torch.int32"} < set(counting._ITEM)
        for name, size in counting._ITEM.items():
            assert getattr(torch, name.removeprefix("torch.")).itemsize == size, name

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

    def test_peak_memory_of_a_gpu(self, monkeypatch):
        """Above what was allocated before the call, when all before and of it is done."""
        events = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append("reset"))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 350)
        assert counting.peak_memory(lambda: events.append("call"), CUDA) == 250
        assert events == ["synchronize", "reset", "call", "synchronize"]
        assert counting.peak_memory(lambda: None, torch.device("meta")) is None

    def test_what_the_profiler_says_is_not_seen(self, capfd):
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        with counting._quiet_stderr():
            os.write(2, b"inside")
        os.write(2, b"after")
        again = os.open(os.devnull, os.O_RDONLY)
        os.close(again)
        assert again == free, "a file is left open"
        assert capfd.readouterr().err == "after"

    def test_the_compiler_is_left_as_it_was(self):
        from torch._inductor.graph import GraphLowering

        before = GraphLowering.save_output_code
        with counting.Generated() as found:
            GraphLowering.save_output_code("a source")
            GraphLowering.save_output_code("a source")
        assert found.sources == ["a source"] and GraphLowering.save_output_code is before

    def test_recorder(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "fastdiff.backends.triton.launch", None)
        assert counting.recorded(lambda: None) is None

        class Launches(list):
            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        found = Launches()
        launch = type("Launch", (), {"bytes": 12})
        monkeypatch.setitem(sys.modules, "fastdiff.backends.triton.launch", type("M", (), {"launches": lambda: found}))
        count = counting.recorded(lambda: found.extend([launch(), launch()]))
        assert (count.bytes, count.launches, count.by) == (24, 2, "launch recorder")
        found.clear()
        x = torch.ones(3)  # what PyTorch launches around ours counts too
        count = counting.recorded(lambda: (found.append(launch()), x + 1))
        assert (count.bytes, count.launches) == (12 + 2 * 12, 2)


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

    def test_times_are_those_of_the_clock(self, monkeypatch):
        """A call of 2 s and one of 4 are 3 a call; the host's are their median."""
        clock = Clock()
        monkeypatch.setattr(measuring, "time", clock)
        timer = Timer(CPU)
        assert timer.seconds([lambda: clock.take(2.0), lambda: clock.take(4.0)]) == 3.0
        takes = iter([9.0, 1.0, 2.0, 5.0])
        assert timer.host_seconds(lambda: clock.take(next(takes))) == 2.0  # three, however long they take
        counted = []
        assert timer.host_seconds(lambda: (counted.append(1), clock.take(1e-3))) == pytest.approx(1e-3)
        assert len(counted) in (20, 21)  # until 20 ms are over
        counted.clear()
        assert timer.host_seconds(lambda: (counted.append(1), clock.take(1e-6))) == pytest.approx(1e-6, rel=1e-6)
        assert len(counted) == 30

    def test_ceiling_of_a_known_copy(self, monkeypatch):
        """A byte is read and written: twice the buffer over the time."""
        clock = Clock()
        monkeypatch.setattr(measuring, "time", clock)
        made = measuring.Copy(Timer(CPU), megabytes=1)
        takes = iter([99.0, 99.0, *(1e-4 * k for k in range(1, 11))])  # two warm up
        moved = []
        copy = lambda target, source: (moved.append((target.nbytes, source.nbytes)), clock.take(next(takes)))  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "copy_", copy)
        made.measure()
        assert set(moved) == {(2**20, 2**20)} and len(moved) == 12
        assert made.rates == pytest.approx([2 * 2**20 / (1e-4 * k) for k in range(1, 11)], rel=1e-6)
        ordered = sorted(made.rates)
        found = made.values()
        assert found["bytes_per_second"] == pytest.approx((ordered[4] + ordered[5]) / 2)
        assert found["p20"] == pytest.approx(0.2 * ordered[1] + 0.8 * ordered[2])
        assert found["p80"] == pytest.approx(0.8 * ordered[7] + 0.2 * ordered[8])

    @pytest.mark.parametrize(
        "cache, free, size",
        [(2**20, None, 64 * 2**20), (2**30, None, 2**32), (2**30, 2**31, 2**28), (2**20, 2**40, 64 * 2**20)],
    )
    def test_buffers_of_the_ceiling(self, monkeypatch, cache, free, size):
        """Four times the cache, 64 MiB at least, and an eighth of what is free at most."""
        monkeypatch.setattr(measuring, "cache_bytes", lambda device: cache)
        monkeypatch.setattr(measuring, "free_bytes", lambda device: free)
        assert measuring.Copy(Timer(CPU)).buffer_bytes == size

    def test_what_the_machine_says(self, monkeypatch, tmp_path):
        for level, text in enumerate(("32K", "2M", "48M", "1024K")):
            (tmp_path / f"index{level}").mkdir()
            (tmp_path / f"index{level}" / "size").write_text(f"{text}\n")
        (tmp_path / "meminfo").write_text("MemTotal: 9999 kB\nMemFree: 5 kB\nMemAvailable:   1234 kB\n")
        files = {"/sys/devices/system/cpu/cpu0/cache": tmp_path, "/proc/meminfo": tmp_path / "meminfo"}
        monkeypatch.setattr(measuring, "Path", files.get)
        assert measuring.cache_bytes(CPU) == 48 * 2**20 and measuring.free_bytes(CPU) == 1234 * 1024
        files["/sys/devices/system/cpu/cpu0/cache"] = tmp_path / "index0"
        assert measuring.cache_bytes(CPU) == 64 * 2**20

    @pytest.mark.parametrize("kind", ["mps", "xpu", "cpu"])
    def test_which_devices_are_waited_for(self, monkeypatch, kind):
        waited = []
        for name in ("mps", "xpu"):
            monkeypatch.setattr(getattr(torch, name), "synchronize", lambda name=name: waited.append(name))
        Timer(torch.device(kind)).synchronize()
        assert waited == ([kind] if kind != "cpu" else [])

    def test_what_a_gpu_says(self, monkeypatch):
        said = {"L2_cache_size": 50 * 2**20}
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 80))  # free, in all
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**said))
        assert measuring.free_bytes(CUDA) == 10 and measuring.cache_bytes(CUDA) == 50 * 2**20
        said["L2_cache_size"] = 0
        assert measuring.cache_bytes(CUDA) == 64 * 2**20

    def test_ceiling(self):
        made = measuring.Copy(Timer(CPU), megabytes=1)
        assert made.values() is None
        made.measure()
        made.measure()
        found = made.values()
        assert found["rounds"] == len(made.rates) == 20
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
        made = measuring.Copy(timer, megabytes=1)
        monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: gpu.launch(1e-4))
        made.measure()
        assert made.rates == pytest.approx([2 * 2**20 / 1e-4] * 10)

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

    def test_launches_and_host_time_of_each(self, monkeypatch):
        """Those that are recorded, or those that the profiler sees; and the time until a call returns."""
        gpu = FakeGpu(monkeypatch)
        monkeypatch.setattr(running, "Copy", lambda timer: None)
        monkeypatch.setattr(counting, "peak_memory", lambda call, device: 5)
        made = running.Run(TINY[3:], ("fastdiff", "eager"), CUDA, 1e-3, 0.0)
        o, call = operands(TINY[3].shape, "bf16", CPU), gpu.call(3, 1e-6)
        ours = lambda o: (call(), o.x0)[1]  # noqa: E731
        for record, profiled, launches in ((None, 3, 3), (None, None, None), (counting.Count(9, 4, "recorded"), 7, 4)):
            monkeypatch.setattr(counting, "recorded", lambda call, record=record: record)
            monkeypatch.setattr(counting, "profiled_launches", lambda call, device, found=profiled: found)
            found = running.Measurement()
            made._count("fastdiff", TINY[3], ours, o, found)
            assert found.count.launches == launches and found.host_seconds == pytest.approx(15e-6)
            assert found.count.bytes == (9 if record else counting.floor_bytes(TINY[3]))
        found = running.Measurement()
        made._count("eager", TINY[3], lambda o: (gpu.launch(1e-6), o.x0 + 1, gpu.launch(1e-6), o.x0 * 2), o, found)
        assert found.count.launches == 2 and found.host_seconds == pytest.approx(10e-6)


# ---- a run

TINY = [
    Case("training step", "v_prediction", "fp32", (2, 4, 8, 8)),
    Case("training step", "v_prediction", "fp32", (8, 4, 16, 16)),
    Case("noising", "v_prediction", "fp32", (8, 4, 16, 16)),
    Case("sampler step", "v_prediction", "bf16", (8, 4, 16, 16)),
]


def make_tiny(patch):
    """A preset of tiny cases, a small ceiling, and a wide terminal."""
    patch.setenv("COLUMNS", "200")
    patch.setattr(command, "choose", lambda preset, dtypes: list(TINY))
    patch.setitem(PRESETS, "quick", dataclasses.replace(PRESETS["quick"], seconds=0.2))
    patch.setattr(running, "Copy", lambda timer: measuring.Copy(timer, megabytes=1))


@pytest.fixture
def tiny(monkeypatch):
    make_tiny(monkeypatch)


def run(*arguments):
    return main(["bench", "--against", "eager,diffusers,reference", "--device", "cpu", *map(str, arguments)])


def refused(capsys, *arguments):
    assert main(["bench", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdiff: error: ") and error.count("\n") == 1
    return error


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, what was printed) of a run of the tiny cases."""
    out, printed = tmp_path_factory.mktemp("bench"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        make_tiny(patch)
        assert run("--out", out) == 0
    return out, printed.getvalue()


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "plots", lambda found: {})


class TestRun:
    def test_writes_everything(self, finished):
        out, output = finished
        files = {"bench.json", "bench.csv", "bench.md", "bench.html"} | ({"bench.png"} if PLOTS else set())
        assert {path.name for path in out.iterdir()} == files
        found = report.load(out / "bench.json")
        assert found["schema"] == report.SCHEMA and found["complete"] and found["preset"] == "quick"
        assert found["versions"]["torch"] == torch.__version__ and found["device"]["name"] == "cpu"
        assert found["device"]["backend"] == fastdiff.backends.choose("cpu")
        assert [report.case_name(case) for case in found["cases"]] == [case.name for case in TINY]
        for case in found["cases"]:
            seconds = case["peers"]["fastdiff"]["seconds"]
            assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"] and seconds["rounds"] >= 6
            assert case["peers"]["fastdiff"]["host_seconds"] > 0 and case["peers"]["fastdiff"]["missing"] is None
            eager = case["peers"]["eager"]
            assert eager["launches"] > 1 and eager["bytes"] > case["floor_bytes"] and eager["peak_bytes"] > 0
            assert eager["ratio"]["rounds"] >= 5
        for text in ("training step v_prediction fp32 8x4x16x16", "copy ceiling", "eager ×", "missing: diffusers"):
            assert text in output

    @pytest.mark.skipif(not PLOTS, reason="needs matplotlib")
    def test_page(self, finished):
        text = (finished[0] / "bench.html").read_text()
        assert text.count("<picture>") == 3 and text.count("data:image/svg+xml;base64,") == 12
        assert "http" not in text.replace("http-equiv", "")  # it needs nothing else
        assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
        Image = pytest.importorskip("PIL.Image")
        with Image.open(finished[0] / "bench.png") as image:
            image.load()
            assert image.width > 900 and image.height > 1000

    def test_compare(self, finished, tmp_path, capsys):
        path, other = finished[0] / "bench.json", tmp_path / "bench.json"
        changed = report.load(path)
        for values in (
            changed["cases"][0]["peers"]["eager"]["seconds"],
            changed["cases"][0]["peers"]["eager"]["ratio"],
        ):
            values |= dict.fromkeys(("median", "p20", "p80"), 1000 * values["median"])  # whatever the spread was
        other.write_text(json.dumps(changed))
        assert main(["bench", "--compare", str(path), str(other)]) == 0
        output = capsys.readouterr().out
        assert "training step v_prediction fp32 2x4x8x8" in output and "eager" in output
        assert "times changed beyond the noise" in output
        (entry,) = [
            entry
            for entry in compare.differences(report.load(path), changed)
            if entry["peer"] == "eager" and entry["case"] == TINY[0].name
        ]
        assert entry["changed"] and entry["ratio_changed"]

    @pytest.mark.parametrize(
        "change",
        [
            lambda r: r.pop("device"),
            lambda r: r.update(cases=5),
            lambda r: r["cases"][0].pop("shape"),
            lambda r: r["cases"][0]["peers"]["eager"].update(seconds={"median": 0.0}),
            lambda r: r["cases"][0]["peers"]["fastdiff"].update(seconds=[1]),
            lambda r: r.update(ceiling={"bytes_per_second": "fast"}),
        ],
    )
    def test_compare_of_a_made_up_report(self, finished, tmp_path, capsys, change):
        path, other = finished[0] / "bench.json", tmp_path / "bench.json"
        made_up = report.load(path)
        change(made_up)
        other.write_text(json.dumps(made_up))
        assert main(["bench", "--compare", str(path), str(other)]) == 2
        assert "cannot be compared" in capsys.readouterr().err

    def test_compare_shows_nothing_that_a_terminal_obeys(self, finished, tmp_path, capsys):
        path, other = finished[0] / "bench.json", tmp_path / "bench.json"
        changed = report.load(path)
        changed["device"]["description"] = "\x1b[2J\x07device"
        other.write_text(json.dumps(changed))
        assert main(["bench", "--compare", str(path), str(other)]) == 0
        output = capsys.readouterr().out
        assert "device" in output and "\x1b" not in output and "\x07" not in output

    def test_compare_of_a_report_with_itself(self, finished):
        found = report.load(finished[0] / "bench.json")
        assert not any(entry["changed"] or entry["ratio_changed"] for entry in compare.differences(found, found))
        times = sum(peer["seconds"] is not None for case in found["cases"] for peer in case["peers"].values())
        assert times >= 12 and f"0 of {times} times changed" in compare.text(found, found)


KNOWN = [
    Case("training step", "v_prediction", "fp32", (2, 4, 8, 8)),
    Case("training step", "v_prediction", "fp32", (8, 4, 16, 16)),
    Case("sampler step", "v_prediction", "bf16", (8, 4, 16, 16)),
]
TAKES = {"fastdiff": 2e-4, "eager": 7e-4, "reference": 15e-3}  # seconds a call of the first case; then 4 and 8 times
ON_ONE = {"fastdiff": 3e-6, "eager": 5e-6, "reference": 8e-6}  # seconds of a call on one element


class KnownPeers:
    """Peers that take known times on a clock of their own. ``used``: the operands of each call, by peer and case."""

    def __init__(self, monkeypatch):
        self.clock, self.used, self.copies, self.waits, self.limits = Clock(), {}, 0, 0, set()
        known = self

        class KnownCopy(measuring.Copy):
            def measure(self):
                known.copies += 1
                self.rates += [1e9, 2e9, 2e9, 2e9, 3e9]

        monkeypatch.setattr(running, "Copy", lambda timer: KnownCopy(timer, megabytes=3))

        def wait(group):
            known.waits += 1

        monkeypatch.setattr(processes.Group, "wait", wait)
        monkeypatch.setattr(peers, "build", self.build)
        monkeypatch.setattr(counting, "peak_memory", lambda call, device: (call(), 5_500_000)[1])
        monkeypatch.setattr(running, "cache_bytes", lambda device: 2**14)
        for module in (measuring, running, command):
            monkeypatch.setattr(module, "time", self.clock)

    def build(self, peer, case, device):
        if peer == "diffusers":
            raise peers.Missing("it has no such thing")

        def call(o):
            one = o.x0.numel() == 1
            self.clock.take(ON_ONE[peer] if one else TAKES[peer] * (1, 4, 8)[KNOWN.index(case)])
            if not one:
                self.used.setdefault((peer, case), []).append(o)
                self.limits.add(torch._dynamo.config.recompile_limit)
            if peer != "fastdiff":
                return o.x0 + o.noise  # one launch, three tensors
            o.prediction.grad = torch.zeros_like(o.prediction)
            return (SimpleNamespace(noise_source=None, x_t=o.x0), None) if "training" in case.operation else o.x0

        return call


@pytest.mark.usefixtures("no_pictures")
class TestKnownRun:
    """A run whose clock, copy and peers are known: each number of its report, and its operands."""

    @pytest.fixture
    def known(self, monkeypatch):
        monkeypatch.setattr(command, "choose", lambda preset, dtypes: list(KNOWN))
        return KnownPeers(monkeypatch)

    def test_report(self, known, tmp_path):
        assert run("--out", tmp_path, "--seconds", 0.2) == 0  # a thirtieth of a second a case and sweep
        found = report.load(tmp_path / "bench.json")
        assert known.copies == 3  # before, and after each sweep
        assert known.waits == 6  # for other processes, before each case
        assert known.limits == {256}  # of graphs of a function: PyTorch's own is a few
        assert found["ceiling"] == {
            "buffer_bytes": 3 * 2**20,
            "bytes_per_second": 2e9,
            "p20": pytest.approx(1.8e9),
            "p80": pytest.approx(2.2e9),
            "rounds": 15,
        }
        assert found["peers"] == ["fastdiff", "eager", "diffusers", "reference"]
        assert found["seconds"] == pytest.approx(known.clock.now - 100.0, abs=0.05)
        for case, factor, tensors, made in zip(found["cases"], (1, 4, 8), (5, 5, 4), KNOWN):
            assert (case["operation"], case["kind"], case["dtype"], tuple(case["shape"])) == dataclasses.astuple(made)
            elements = made.shape[0] * made.shape[1] * made.shape[2] * made.shape[3]
            full = elements * (2 if made.dtype == "bf16" else 4)
            assert (case["elements"], case["floor_bytes"], case["rotated"]) == (elements, tensors * full, True)
            for peer, m in case["peers"].items():
                if peer == "diffusers":
                    assert m["missing"] == "it has no such thing" and m["seconds"] is m["ratio"] is None
                    continue
                seconds = TAKES[peer] * factor
                assert m["missing"] is None and m["peak_bytes"] == 5_500_000
                assert [m["seconds"][part] for part in ("median", "p20", "p80")] == pytest.approx([seconds] * 3)
                assert m["host_seconds"] == pytest.approx(ON_ONE[peer])
                ours = peer == "fastdiff"
                count = (None, tensors * full, "known operands") if ours else (1, 3 * full, "dispatch trace")
                assert (m["launches"], m["bytes"], m["counted_by"]) == count
                assert m["bytes_per_second"] == pytest.approx(count[1] / seconds)
                assert m["of_ceiling"] == pytest.approx(tensors * full / seconds / 2e9)
                assert m["images_per_second"] == pytest.approx(made.shape[0] / seconds)
                once = peer == "reference" and factor > 1  # longer than its share: once a sweep, and no ratio
                if ours or once:
                    assert m["ratio"] is None
                else:
                    ratio = TAKES[peer] / TAKES["fastdiff"]
                    assert [m["ratio"][part] for part in ("median", "p20", "p80")] == pytest.approx([ratio] * 3)
                    assert m["ratio"]["steady"] and m["ratio"]["rounds"] == 6
                if once:
                    assert m["seconds"]["rounds"] == 2
        assert found["notes"] == ["diffusers: it has no such thing (3 of 3 cases)"]

    def test_each_call_has_other_operands(self, known):
        """As many sets as three caches hold, in turn."""
        made = running.Run(KNOWN[:2], ("fastdiff", "eager"), CPU, 0.02, 0.0)
        made.measure(Progress(1, quiet=True))
        for case, sets in zip(KNOWN, (6, 2)):  # 3 x 16384 bytes in sets of 4 x 2048, and 2 of 131072
            used = [id(o) for o in known.used["fastdiff", case]]
            assert len(set(used)) == sets * 2  # those of each sweep
            assert all(a != b for a, b in zip(used[4:10], used[5:11]))
            assert made.rotated[case]

    @pytest.mark.parametrize(
        "cache, free, sets, rotated",
        [
            (2**14, None, 6, True),
            (2**16, None, 24, True),
            (2**20, None, 1, False),
            (2**14, 100_000, 4, True),
            (0, None, 2, True),
        ],
    )
    def test_sets_of_operands(self, known, monkeypatch, cache, free, sets, rotated):
        monkeypatch.setattr(running, "cache_bytes", lambda device: cache)
        monkeypatch.setattr(running, "free_bytes", lambda device: free)
        made = running.Run(KNOWN[:1], ("fastdiff",), CPU, 0.02, 0.0)
        found, beyond = made._operand_sets(KNOWN[0])
        assert (len(found), beyond) == (sets, rotated)
        assert len({o.x0[0, 0, 0, 0].item() for o in found}) == sets

    def test_no_memory(self, known, monkeypatch):
        """Four times the operands are wanted."""
        made = running.Run(KNOWN[:1], ("fastdiff",), CPU, 0.02, 0.0)
        monkeypatch.setattr(running, "free_bytes", lambda device: 4 * 4 * 2048)
        made._operand_sets(KNOWN[0])
        monkeypatch.setattr(running, "free_bytes", lambda device: 4 * 4 * 2048 - 1)
        with pytest.raises(MemoryError):
            made._operand_sets(KNOWN[0])

    def test_turns(self, known, monkeypatch):
        """Who comes first changes; what is short is called once before; too slow a reference is timed once."""
        made = running.Run(KNOWN[:1], ("fastdiff", "eager", "diffusers", "reference"), CPU, 0.2, 0.0)  # 0.1 a sweep
        takes, turns = {"fastdiff": 0.003, "eager": 0.01, "diffusers": 0.02, "reference": 0.16}, []

        def timed(calls, name, repeats, rotation, measured, settle=False):
            known.clock.take(takes[name])
            turns.append((name, settle))
            return takes[name]

        monkeypatch.setattr(made, "_timed", timed)
        measured = {name: running.Measurement() for name in made.names}
        made._rounds(dict.fromkeys(made.names), [None], measured, 0)
        assert [name for name, _ in turns[:4]] == list(made.names)
        short = [("fastdiff", True), ("eager", False), ("diffusers", False)]
        assert turns[4:] == [*short, *short[1:], short[0], short[2], *short[:2]]
        assert measured["reference"].seconds == [0.16] and not measured["reference"].ratios
        assert measured["eager"].ratios == pytest.approx([10 / 3] * 3)

    def test_a_reference_too_slow_is_not_tried(self, known):
        """What it took for the largest smaller case of its sort, element by element; more than 1.5 times the case's
        time is too much. Of less than 1e5 elements it says nothing."""
        cases = [Case("noising", "flow", dtype, (10**n,)) for dtype, n in (("fp32", 4), ("fp32", 6), ("bf16", 6))]
        larger = Case("noising", "flow", "fp32", (4 * 10**6,))
        made = running.Run([larger], ("reference",), CPU, 2.0, 0.0)
        for case, seconds in zip(cases, ([1.0], [0.5, 0.3], [9.0])):
            made.results[case] = {"reference": running.Measurement(seconds=seconds)}
        assert made._expected_reference(larger) == pytest.approx(1.2)
        assert made._expected_reference(cases[1]) == 0.0
        made.device = CPU
        made._case_seconds = 0.81
        made._prepare("reference", KNOWN[0])
        made._case_seconds = 0.79
        with pytest.raises(peers.Missing, match="too slow for the time of this run"):
            made._prepare("reference", larger)

    @pytest.mark.parametrize(
        "ratios, steady", [([2.0] * 5, True), ([2.0] * 4, False), ([1.0, 1.0, 2.0, 3.0, 3.0], False)]
    )
    def test_a_ratio_says_whether_it_is_steady(self, ratios, steady):
        found = report._measurement(running.Measurement(seconds=[1.0], ratios=ratios), 1, 1, None)
        assert found["ratio"]["steady"] is steady and found["ratio"]["rounds"] == len(ratios)

    def test_plan(self, known):
        """A case's share of the time, or a thousand passes at the copy's rate; every sweep; the compiler besides."""
        made = running.Run(KNOWN, ("fastdiff",), CPU, 0.6, 7.0)
        assert made.planned(KNOWN[0]) == pytest.approx(0.1)
        made.copy.rates = [1e6]
        assert made.planned(KNOWN[1]) == pytest.approx(1000 * 32768 / 1e6)
        assert made.planned_in_all() == pytest.approx(7.0 + 2 * 1000 * (2048 + 32768 + 16384) / 1e6)

    def test_burst(self, known):
        """As many calls as take a millisecond, 50 at most; on a GPU 500 launches."""
        made = running.Run(KNOWN, ("fastdiff",), CPU, 1.0, 0.0)
        count = counting.Count(0, 100, "test")
        cpu = running.Measurement(count=count)
        assert [made._repeats(seconds, cpu) for seconds in (2.0, 3e-4, 1e-9)] == [1, 4, 50]
        made.device = CUDA
        counts = (count, counting.Count(0, 1, "test"), None)
        assert [made._repeats(1e-9, running.Measurement(count=found)) for found in counts] == [5, 50, 25]
        slow = [running.Measurement(count=counts[1], host_seconds=host) for host in (1e-6, 1e-4, 1e-3, 1.0)]
        assert [made._repeats(1e-9, found) for found in slow] == [50, 30, 4, 4]

    def test_operands(self):
        o = operands((64, 2, 3), "bf16", CPU, seed=5)
        assert o.x0.dtype == o.noise.dtype == o.prediction.dtype == torch.bfloat16 and o.prediction.requires_grad
        assert o.t.shape == (64,) and 0 <= o.t.min() < 300 and 700 < o.t.max() < 1000
        torch.testing.assert_close(o.time, (o.t.float() + 0.5) / 1000)
        assert o.images.dtype == torch.uint8 and o.images is o.images
        assert (o.images / 127.5 - 1 - o.x0.float().clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
        assert not torch.equal(o.x0, o.noise) and not torch.equal(o.x0, operands((64, 2, 3), "bf16", CPU, seed=6).x0)

    def test_operands_are_those_of_their_seed(self):
        """Whatever was drawn before."""
        first = operands((64, 2, 3), "fp32", CPU, seed=5)
        torch.rand(7)
        for name, value in vars(operands((64, 2, 3), "fp32", CPU, seed=5)).items():
            assert torch.equal(value, getattr(first, name)), name
        assert not torch.equal(first.t, operands((64, 2, 3), "fp32", CPU, seed=6).t)

    def test_a_later_sweep_calls_each_once_before(self, known):
        made = running.Run(KNOWN[:1], ("fastdiff", "eager"), CPU, 0.02, 0.0)
        sets, _ = made._operand_sets(KNOWN[0])
        made._sweep_case(KNOWN[0], sets, 1)
        for name in made.names:
            assert [used is sets[0] for used in known.used[name, KNOWN[0]][:1]] == [True]
        # The rotation of what is timed begins with the first set too.
        assert known.used["fastdiff", KNOWN[0]][1] is sets[0]


# Option and value of ``fastdiff bench``, what it decides, without it and with it.
BENCH_OPTIONS = {
    "--preset policy": (lambda a: a.cases, choose("quick"), choose("policy")),
    "--dtype fp16,fp32": (lambda a: a.cases, choose("quick"), choose("quick", ["fp16", "fp32"])),
    "--against compile,eager": (
        lambda a: a.names,
        ("fastdiff", "eager", "compile", "diffusers", "reference"),
        ("fastdiff", "compile", "eager"),
    ),
    "--against none": (lambda a: (a.names, a.compiling), (("fastdiff", *peers.AGAINST), 16.0), (("fastdiff",), 0.0)),
    "--model unet-small": (lambda a: a.modelled, None, ("unet-small", "fp32", 20.0)),
    "--seconds 3": (lambda a: (a.seconds, a.compiling), (10.0, 16.0), (3.0, 3.0)),
    "--threads 2": (lambda a: a.threads, 1, 2),
    "--device cpu": (lambda a: a.notes, ["a GPU: there is none here, this is the CPU"], []),
}


class TestOptions:
    @pytest.fixture
    def asked(self, monkeypatch):
        """What a run is asked for: nothing is measured."""
        found = SimpleNamespace(modelled=None, interrupted=False)

        class Recorded(running.Run):
            def measure_copy(self):
                names = ("cases", "names", "seconds", "device", "notes")
                vars(found).update({name: getattr(self, name) for name in names}, compiling=self.compile_seconds)
                found.threads = torch.get_num_threads()

            def measure(self, progress):
                self.complete = not found.interrupted

        def share(name, device, dtype, seconds, progress):
            found.modelled = (name, dtype, seconds)
            return known_model()

        monkeypatch.setattr(command, "Run", Recorded)
        monkeypatch.setattr(running, "Copy", lambda timer: measuring.Copy(timer, megabytes=1))
        monkeypatch.setattr(models, "share", share)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        yield found
        torch.set_num_threads(1)

    @pytest.mark.parametrize("option", BENCH_OPTIONS)
    def test_decides_what_it_says(self, asked, tmp_path, option):
        read, without, with_it = BENCH_OPTIONS[option]
        for arguments, expected in (((), without), (option.split(), with_it)):
            assert main(["bench", "--out", str(tmp_path), *arguments]) == 0
            assert read(asked) == expected
        found = report.load(tmp_path / "bench.json")
        assert found["device"]["threads"] == asked.threads
        assert found["model"] == (known_model() if asked.modelled else None)

    def test_an_interrupted_run_has_no_model(self, asked, tmp_path):
        asked.interrupted = True
        assert main(["bench", "--model", "unet-small", "--out", str(tmp_path)]) == 130
        assert asked.modelled is None and not report.load(tmp_path / "bench.json")["complete"]

    def test_fresh_folder_without_out(self, asked, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert main(["bench"]) == 0
        (made,) = (tmp_path / "runs").iterdir()
        assert made.name.startswith("bench-") and (made / "bench.csv").exists()

    def test_none_is_forgotten(self):
        (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
        options = {option for action in commands.choices["bench"]._actions for option in action.option_strings}
        elsewhere = {"-h", "--help", "--out", "--nproc", "--compare"}
        assert options == {option.split()[0] for option in BENCH_OPTIONS} | elsewhere

    def test_nproc_hands_on_the_others(self, monkeypatch, tmp_path):
        """To as many processes, which share the cores; --nproc itself is not among them."""
        given = "--preset policy --dtype fp16 --against eager --model unet-small --seconds 3 --threads 2 --device cpu"
        started = []

        class Child:
            def __init__(self, line, env):
                started.append((line, env))

            def wait(self):
                if len(started) == 1:
                    started.append("interrupted")
                    raise KeyboardInterrupt  # the processes have it too, and still write
                return 3

        monkeypatch.setattr(processes.subprocess, "Popen", Child)
        monkeypatch.setattr(processes.os, "cpu_count", lambda: 12)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        line = ["bench", *given.split(), "--out", str(tmp_path)]
        assert main([*line, "--nproc", "4"]) == 3
        (python, m, module, *rest), environment = started[0]
        assert (python, m, module) == (sys.executable, "-m", "torch.distributed.run")
        assert environment["OMP_NUM_THREADS"] == "3"
        torchrun = pytest.importorskip("torch.distributed.run").get_args_parser().parse_args(rest)
        assert torchrun.standalone and torchrun.nproc_per_node == "4"
        assert torchrun.module and torchrun.training_script == "fastdiff"
        assert _parser().parse_args(torchrun.training_script_args) == _parser().parse_args(line)


class TestGroup:
    def test_of_one(self, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        group = processes.Group.join()
        assert (group.rank, group.world) == (0, 1) and group.gather({}) is None
        assert group.device(CUDA) == CUDA

    def test_each_has_its_gpu(self, monkeypatch):
        chosen = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        assert processes.Group(3, 4, local_rank=1).device(torch.device("cuda")) == torch.device("cuda", 1)
        assert chosen == [1] and processes.Group(3, 4, local_rank=1).device(CPU) == CPU
        with pytest.raises(BenchError, match="4 processes, but only 2 GPUs"):
            processes.Group(3, 4, local_rank=2).device(torch.device("cuda"))

    def test_waits_for_the_others(self, monkeypatch):
        waited = []
        monkeypatch.setattr(torch.distributed, "barrier", lambda: waited.append(1))
        processes.Group().wait()
        assert not waited
        processes.Group(0, 2).wait()
        assert waited == [1]

    def test_gathers_each_case_by_rank(self):
        class Store(dict):
            set, get = dict.__setitem__, dict.__getitem__

        store, values = Store(), {"one": (1.0, 10.0), "two": (2.0, 20.0)}
        for rank in (1, 0):
            cases = [
                {
                    "operation": name,
                    "kind": "k",
                    "dtype": "d",
                    "shape": [1],
                    "peers": {
                        "fastdiff": {"images_per_second": images + 4 * rank, "bytes_per_second": moved + 40 * rank}
                    },
                }
                for name, (images, moved) in values.items()
                if (name, rank) != ("two", 1)  # a process that has not got it
            ]
            found = processes.Group(rank, 2, rank, store).gather({"cases": cases})
            assert (found is None) == (rank == 1)
        assert found == {
            "world": 2,
            "cases": [
                {"case": "one k d 1", "images_per_second": [1.0, 5.0], "bytes_per_second": [10.0, 50.0]},
                {"case": "two k d 1", "images_per_second": [2.0, None], "bytes_per_second": [20.0, None]},
            ],
        }


def known_model():
    def part(seconds, objective, share):
        return {"seconds": known_spread(seconds), "objective_seconds": known_spread(objective), "share": share}

    model = {"name": "net", "parameters": 1_500_000, "shape": [2, 3], "dtype": "fp32"}
    model |= {"before": part(0.1, 0.02, 0.2), "after": part(0.08, 0.004, 0.05)}
    return model | {"ratio": known_spread(1.25, 1.2, 1.3, steady=True)}


def known_spread(median, p20=None, p80=None, **more):
    return {"median": median, "p20": p20 or median, "p80": p80 or median, "rounds": 9, **more}


def known_measurement(**given):
    names = ("seconds", "host_seconds", "launches", "bytes", "counted_by", "peak_bytes", "bytes_per_second")
    return dict.fromkeys((*names, "of_ceiling", "images_per_second", "ratio", "missing")) | given


@pytest.fixture
def known_report():
    """Every number another one."""
    ours = known_measurement(
        seconds=known_spread(2e-3, 1.8e-3, 2.6e-3), host_seconds=4e-6, launches=3, bytes=6_100_000, counted_by="known",
        peak_bytes=7_200_000, bytes_per_second=8.3e9, of_ceiling=0.55, images_per_second=9400.0,
    )  # fmt: skip
    theirs = known_measurement(
        seconds=known_spread(13e-3, 12e-3, 14e-3), host_seconds=15e-6, launches=16, bytes=17_000_000,
        counted_by="traced",
        peak_bytes=18_000_000, bytes_per_second=19e9, of_ceiling=0.021, images_per_second=22.0,
        ratio=known_spread(6.5, 6.25, 6.75, steady=True),
    )  # fmt: skip
    wide = known_measurement(seconds=known_spread(23e-3), ratio=known_spread(24.0, 2.5, 26.0, steady=False))
    gone = known_measurement(missing="not here")
    first = {"operation": "training step", "kind": "v_prediction", "dtype": "fp32", "shape": [16, 4, 128, 128]}
    first |= {"elements": 2**20, "floor_bytes": 5 * 2**22, "rotated": True}
    first["peers"] = {"fastdiff": ours, "eager": theirs, "compile": wide, "diffusers": gone}
    second = copy.deepcopy(first) | {"shape": [32, 4, 128, 128], "elements": 2**21, "floor_bytes": 5 * 2**23}
    second["peers"]["fastdiff"] |= {"seconds": known_spread(5e-3), "of_ceiling": 0.66}
    return {
        "schema": report.SCHEMA,
        "created": "today",
        "preset": "mine",
        "complete": True,
        "notes": ["diffusers: not here"],
        "seconds": 31.0,
        "versions": {"fastdiff": "0.32", "torch": "0.33", "python": "0.34"},
        "packages": {},
        "device": {
            "name": "cpu",
            "description": "a machine",
            "model": "its model",
            "threads": 35,
            "cache_bytes": 36,
            "backend": "native",
        },
        "ceiling": {"buffer_bytes": 37_000_000, "bytes_per_second": 38.5e9, "p20": 30e9, "p80": 40e9, "rounds": 20},
        "peers": ["fastdiff", "eager", "compile", "diffusers"],
        "cases": [first, second],
        "model": None,
        "ranks": None,
    }


class TestKnownReport:
    """What is made of a report: every figure in its place."""

    ROW = {
        "case": "training step v_prediction fp32 16x4x128x128",
        "time": "2.00 ms",
        "p20 to p80": "-10% +30%",
        "host": "4.00 µs",
        "launches": "3",
        "moved": "6.10 MB",
        "extra memory": "7.20 MB",
        "GB/s": "8.30",
        "of copy": "55%",
        "images/s": "9.40k",
        "eager ×": "6.50",
        "compile ×": "wide 2.5-26.0",
        "diffusers ×": "-",
        "eager host": "15.0 µs",
        "eager launches": "16",
        "compile host": "-",
        "compile launches": "-",
        "diffusers host": "-",
        "diffusers launches": "-",
    }

    def test_table(self, known_report):
        heading, row, _ = (
            [cell.strip() for cell in line.strip("| ").split(" | ")]
            for line in table.markdown(known_report).splitlines()
            if line.startswith("| ")
        )
        assert dict(zip(heading, row, strict=True)) == self.ROW
        lines = table.text(known_report).splitlines()
        assert (
            lines[0].split() == " ".join(self.ROW).split() and lines[1].split() == " ".join(self.ROW.values()).split()
        )

    def test_summary(self, known_report):
        assert table.summary(known_report | {"complete": False}) == [
            "a machine, backend native, 35 CPU threads",
            "fastdiff 0.32, PyTorch 0.33, Python 0.34, preset mine, today, 31 s",
            "copy ceiling: 38.5 GB/s (30.0 to 40.0) between buffers of 37.0 MB",
            "this run is not complete",
            "missing: diffusers: not here",
        ]
        assert "copy ceiling: not measured" in table.summary(known_report | {"ceiling": None})

    def test_csv(self, known_report):
        rows = list(csv.DictReader(io.StringIO(table.as_csv(known_report))))
        assert len(rows) == 8 and rows[1] == {
            "operation": "training step", "kind": "v_prediction", "dtype": "fp32", "shape": "16x4x128x128",
            "elements": "1048576", "floor_bytes": "20971520", "rotated": "True", "peer": "eager",
            "seconds_median": "0.013", "seconds_p20": "0.012", "seconds_p80": "0.014", "seconds_rounds": "9",
            "host_seconds": "1.5e-05", "launches": "16", "bytes": "17000000", "counted_by": "traced",
            "peak_bytes": "18000000", "bytes_per_second": "19000000000.0", "of_ceiling": "0.021",
            "images_per_second": "22.0", "ratio_median": "6.5", "ratio_p20": "6.25", "ratio_p80": "6.75",
            "ratio_rounds": "9", "ratio_steady": "True", "missing": "", "device": "its model", "torch": "0.33",
            "fastdiff": "0.32",
        }  # fmt: skip
        assert (rows[3]["peer"], rows[3]["missing"], rows[3]["seconds_median"]) == ("diffusers", "not here", "")

    def test_ranks(self, known_report):
        case = {"case": "noising", "images_per_second": [3.0, None, 5.0], "bytes_per_second": [2e9, None, 4.5e9]}
        heading, row = table.ranks_text(known_report | {"ranks": {"world": 3, "cases": [case]}}).splitlines()
        assert heading.split("  ")[0] == "case" and row.split() == "noising 2 of 3 3.00 to 5.00 8.00 6.50".split()

    def test_model(self, known_report):
        model = known_model()
        said = (
            "net (1.5M parameters, 2x3 fp32): noising and loss take 20% of an eager training step (20.0 ms of 100 ms), "
            "5.0% with fastdiff (4.00 ms of 80.0 ms); the whole step takes 1.250 times as long without it (1.200 to "
            "1.300)."
        )
        assert table.model_text(model) == said
        assert said in table.markdown(known_report | {"model": model})
        assert said in page.page(known_report | {"model": model, "cases": []})
        model["ratio"]["steady"] = False
        assert table.model_text(model).endswith("the whole step varies too much for a ratio.")

    def test_page(self, known_report, no_pictures):
        text = page.page(known_report)
        for number, name in (
            ("38 GB/s", "copy ceiling of this device"),
            ("2.00 ms", "training step, v_prediction fp32 16x4x128x128"),
            ("55%", "of the ceiling in that step"),
            ("6.5 times", "as long in eager"),
        ):
            assert f"<b>{number}</b><span>{name}</span>" in text
        assert text.count('class="tile"') == 4 and "What is missing (1)" in text
        every = "eager", "13.0 ms", "-8% +8%", "9", "15.0 µs", "16", "17.0 MB", "traced", "19.0", "18.0 MB"
        heading = (
            "who",
            "time",
            "p20 to p80",
            "rounds",
            "host",
            "launches",
            "moved",
            "counted by",
            "GB/s",
            "extra memory",
        )
        plain = text.replace("\u00a0", " ").replace("\u2011", "-")
        assert "".join(f'<td data-is="{name}">{cell}</td>' for name, cell in zip(heading, every, strict=True)) in plain
        assert '<td data-is="who">diffusers</td><td colspan="9">not here</td></tr>' in plain
        order = ["case", "time", "eager ×", "compile ×", "diffusers ×", "host", "of copy", "images/s"]
        assert f"<tr>{''.join(f'<th>{heading}</th>' for heading in order)}</tr>" in text
        none = {"diffusers ×": ' class="none"'}  # left out on a narrow screen
        cells = "".join(f'<td data-is="{name}"{none.get(name, "")}>{self.ROW[name]}</td>' for name in order[1:])
        assert f"<tr><th>{self.ROW['case']}</th>{cells}</tr>" in plain
        # A number stays with its unit and its sign; what is wide may be on two lines.
        assert ">2.00\u00a0ms<" in text and ">wide 2.5\u201126.0<" in text

    @pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
    @pytest.mark.parametrize("width", [1280, 390])
    def test_nothing_of_the_page_is_cut_off(self, known_report, no_pictures, tmp_path, width):
        """In a browser: neither the page nor a table is wider than the screen, and a plot is as wide as the page."""
        case = known_report["cases"][0]
        ratio = case["peers"]["eager"]["ratio"] | {"p20": 111.5, "p80": 222.5, "steady": False}
        wide = {name: found | {"ratio": found["ratio"] and ratio} for name, found in case["peers"].items()}
        shape = [64, 16, 128, 256, 256]
        case = case | {"operation": "sampler step+noise", "shape": shape, "peers": wide | {"reference": wide["eager"]}}
        text = page.page(known_report | {"cases": [case] * 3, "peers": [*known_report["peers"], "reference"]})
        svg = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 4'/%3E"
        plot = f'<figure><img src="{svg}"></figure>'
        ask = """<script>onload = () => parent.postMessage(JSON.stringify({
            page: document.documentElement.scrollWidth, screen: document.documentElement.clientWidth,
            body: document.querySelector("h1").clientWidth,
            plot: document.querySelector("img").clientWidth,
            tables: [...document.querySelectorAll("table")].map(t => [t.scrollWidth, t.getBoundingClientRect().right]),
            }), "*")</script>"""
        text = text.replace("<details>", "<details open>").replace("</body>", f"{plot}{ask}</body>")
        (tmp_path / "inner.html").write_text(text)
        (tmp_path / "outer.html").write_text(
            '<p id="found"></p><script>onmessage = e => found.textContent = e.data</script>'
            f'<iframe src="inner.html" width="{width}" height="800" style="border: 0"></iframe>'
        )
        line = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
        line += ["--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path / 'outer.html'}"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
        found = json.loads(re.search(r'<p id="found">(.+?)</p>', done.stdout)[1])
        assert width - 20 < found["page"] == found["screen"] <= width  # less a scroll bar
        assert found["plot"] == found["body"] > 0.85 * width
        assert len(found["tables"]) == 2
        for inside, right in found["tables"]:
            assert inside <= found["body"] + 2 and right <= width  # its border is 2 wide

    def test_comparison(self, known_report):
        after = copy.deepcopy(known_report)
        after["cases"][0]["peers"]["fastdiff"]["seconds"] = known_spread(4e-3)
        after["cases"][0]["peers"]["eager"]["ratio"] = known_spread(3.25, steady=True)
        after["cases"][0]["peers"]["eager"]["seconds"] = known_spread(20e-3)
        after["cases"][1]["peers"]["fastdiff"]["seconds"] = known_spread(5.2e-3)  # less than a twentieth
        after["cases"][1]["peers"]["eager"]["seconds"] = known_spread(14e-3, 13e-3, 15e-3)  # within the noise
        after["cases"].append(copy.deepcopy(after["cases"][0]) | {"dtype": "bf16"})
        after["device"] |= {"threads": 3, "backend": "reference", "description": "another"}
        after["versions"] |= {"torch": "0.44"}
        after["ceiling"]["bytes_per_second"] = 20e9
        lines = compare.text(known_report, after).splitlines()
        assert lines[:2] == ["A: today, fastdiff 0.32, a machine", "B: today, fastdiff 0.32, another"]
        assert lines[2:7] == [
            "note: the device differs: a machine and another",
            "note: the backend differs: native and reference",
            "note: the threads differs: 35 and 3",
            "note: the PyTorch differs: 0.33 and 0.44",
            "copy ceiling: 38.5 and 20.0 GB/s",
        ]
        case = self.ROW["case"]
        assert [line.split() for line in lines[9:11]] == [
            f"{case} eager 13.0 ms 20.0 ms 1.54 6.50 -> 3.25 *".split(),
            f"{case} fastdiff 2.00 ms 4.00 ms 2.00 -".split(),
        ]
        assert lines[-2].startswith("2 of 6 times changed beyond the noise, 1 of 4 ratios did")
        assert lines[-1] == "1 cases are in one of them only."

    def test_launch_bound(self, known_report):
        """Where the host's and the device's time are as long; of a CPU, where the host's and the memory's are."""
        first, second = known_report["cases"]
        ours = [case["peers"]["fastdiff"] for case in (first, second)]
        assert plots.launch_bound(known_report, [first, second]) == pytest.approx(4e-6 / (5 * 4 / 38.5e9))
        known_report["device"]["name"] = "cuda:0"
        for host, expected in (
            ((4e-3, 2.5e-3), 2**20.5),  # twice the device's time, and half of it
            ((4e-3, 10e-3), 2**22),  # all that are drawn
            ((1e-3, 1e-3), 0.0),
            ((1e-3, 20e-3), 2**22),
        ):
            for one, seconds, median in zip(ours, host, (2e-3, 5e-3)):
                one |= {"host_seconds": seconds, "seconds": known_spread(median)}
            assert plots.launch_bound(known_report, [first, second]) == pytest.approx(expected), host
        for one in ours:
            one["host_seconds"] = None
        assert plots.launch_bound(known_report, [first, second]) is None

    @pytest.mark.skipif(not PLOTS, reason="needs matplotlib")
    def test_the_hosts_times_are_drawn_on_a_gpu(self, known_report):
        from matplotlib.figure import Figure

        for name, expected in (("cpu", []), ("cuda:0", [[4.0, 4.0], [15.0, 15.0]])):
            known_report["device"]["name"], axes = name, Figure().subplots()
            plots.sizes(known_report, axes, plots.Look())
            dashed = [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "--"]
            assert dashed == [pytest.approx(line) for line in expected]

    @pytest.mark.skipif(not PLOTS, reason="needs matplotlib")
    def test_plots(self, known_report):
        """The points, bars and lines are the report's numbers."""
        from matplotlib.figure import Figure

        known_report["cases"][0]["peers"]["fastdiff"]["host_seconds"] = 4e-4
        drawn = {}
        for name in plots.plots(known_report):
            drawn[name] = Figure().subplots()
            plots.plots(known_report)[name][0](known_report, drawn[name], plots.Look())
        assert set(drawn) == {"roofline", "peers", "sizes"}
        points = {tuple(point) for part in drawn["roofline"].collections for point in part.get_offsets().tolist()}
        floors = (5 * 2**22, 5 * 2**23)
        times = [(floors[0], s) for s in (2e-3, 13e-3, 23e-3)] + [(floors[1], s) for s in (5e-3, 13e-3, 23e-3)]
        assert sorted(points) == [pytest.approx(point) for point in sorted((n, n / s / 1e9) for n, s in times)]
        assert [line.get_ydata()[0] for line in drawn["roofline"].lines] == [38.5]
        low, high = drawn["roofline"].patches[0].get_y(), drawn["roofline"].patches[0].get_height()
        assert (low, low + high) == pytest.approx((30.0, 40.0))

        # One bar a case that has a steady ratio: of the size nearest to a million elements.
        (bar,) = drawn["peers"].patches
        assert bar.get_x() == 1 and bar.get_width() == 5.5
        assert [6.25, 6.75] in [list(line.get_xdata()) for line in drawn["peers"].lines]
        assert "16x4x128x128" in drawn["peers"].get_title()

        ours, theirs, _, least = drawn["sizes"].lines
        assert list(ours.get_xdata()) == [2**20, 2**21] and list(ours.get_ydata()) == [2e3, 5e3]
        assert list(theirs.get_ydata()) == [13e3, 13e3]
        assert list(least.get_ydata()) == pytest.approx([n / 38.5e9 * 1e6 for n in floors])
        host = drawn["sizes"].patches[-1]  # where 400 us are more than the 20 bytes of an element would take
        assert host.get_x() == 2**19 and host.get_x() + host.get_width() == pytest.approx(4e-4 * 38.5e9 / 20)

    # Every word, size, colour and limit of the plots of the known report, on a desktop, in the light theme.
    LOOKS = {
        "roofline": """
            10.5 4.2 inches, #ffffff, ConstrainedLayoutEngine
            axes 'Bandwidth reached, against a copy' 10 bold #1a1a1a 6 above
             x: log, from 2.026e+07 4.342e+07, label 'least bytes of the operation' 8.5 #1a1a1a, GRID, BOTTOM
             y: log, from 0.7547 77, label 'GB/s' 8.5 #1a1a1a, GRID, LEFT
             frame: left #6b7280, bottom #6b7280 on #ffffff
             line #1a1a1a 1.2 -
             points 46 #009e738c order 2 edges 0 alpha 0.55
             points 46 #d55e008c order 2 edges 0 alpha 0.55
             points 46 #0072b2e6 order 3 edges 0 alpha 0.9
             box 0 30 1 10 #6b72804c edge 0 order 1 alpha 0.3
             text at 0.02 38.5 bottom 'copy: 38 GB/s' 8 #1a1a1a
            legend in 5 columns, no frame, 1.2 0.4
             #0072b2 None o5 'fastdiff' 7.5 #1a1a1a
             #d55e00 None o5 'eager' 7.5 #1a1a1a
             #009e73 None o5 'torch.compile' 7.5 #1a1a1a
             #cc79a7 None o5 'diffusers' 7.5 #1a1a1a
             #6b7280 None *5 'training step' 7.5 #1a1a1a""",
        "peers": """
            10.5 1.95 inches, #ffffff, ConstrainedLayoutEngine
            axes 'Against the others, 16x4x128x128' 10 bold #1a1a1a 6 above
             x: log, from 0.8 9.654, label 'time, fastdiff = 1' 8.5 #1a1a1a, GRID, BOTTOM
             y: linear, from 0.6 -0.6, label '' 8.5 #1a1a1a, LEFT
             frame: left #6b7280, bottom #6b7280 on #ffffff
             line #1a1a1a 0.8 -
             line #1a1a1a 1.2 -
             box 1 -0.3867 5.5 0.24 #d55e00 edge 1 order 1
             text at 7.088 -0.2667 center '6.5' 7 #1a1a1a
             text at 1.03 0 center 'varies too much' 6.5 #6b7280
            legend in 3 columns, no frame, 1.2 0.4
             #d55e00 None s5 'eager' 7.5 #1a1a1a
             #009e73 None s5 'torch.compile' 7.5 #1a1a1a
             #cc79a7 None s5 'diffusers' 7.5 #1a1a1a""",
        "sizes": """
            10.5 4.2 inches, #ffffff, ConstrainedLayoutEngine
            axes 'training step, v_prediction, fp32' 10 bold #1a1a1a 6 above
             x: log, from 5.243e+05 4.194e+06, label 'elements' 8.5 #1a1a1a, GRID, BOTTOM
             y: log, from 451.7 2.773e+04, label 'time, microseconds' 8.5 #1a1a1a, GRID, LEFT
             frame: left #6b7280, bottom #6b7280 on #ffffff
             line 'fastdiff' #0072b2 1.8 - o3.5
             line 'eager' #d55e00 1.1 - o3.5
             line 'torch.compile' #009e73 1.1 - o3.5
             line "least bytes at a copy's rate" #1a1a1a 1.5 :
             points  #0072b233 order 1 edges 0 alpha 0.2
             points  #d55e0033 order 1 edges 0 alpha 0.2
             points  #009e7333 order 1 edges 0 alpha 0.2
             box 5.243e+05 0 2.457e+05 1 #6b72802e edge 0 order 0 alpha 0.18
             text at 6.168e+05 0.97 top 'launch-bound' 8 #1a1a1a
            legend in 3 columns, no frame, 1.2 0.4
             #0072b2 - o3.5 'fastdiff' 7.5 #1a1a1a
             #d55e00 - o3.5 'eager' 7.5 #1a1a1a
             #009e73 - o3.5 'torch.compile' 7.5 #1a1a1a
             #1a1a1a : "least bytes at a copy's rate" 7.5 #1a1a1a""",
    }
    DARK = {"#1a1a1a": "#e6e6e6", "#ffffff": "#16181c", "#6b7280": "#8a8f98", "#0072b2": "#56b4e9"}

    @pytest.mark.skipif(not PLOTS, reason="needs matplotlib")
    @pytest.mark.parametrize("name", LOOKS)
    def test_how_plots_look(self, known_report, name):
        known_report["cases"][0]["peers"]["fastdiff"]["host_seconds"] = 4e-4
        wide = textwrap.dedent(self.LOOKS[name]).strip()
        ticks = "8 #1a1a1a long 3.5"
        for word, meaning in (
            ("GRID", "grid #6b7280 0.5 0.25"),
            ("BOTTOM", f"ticks bottom {ticks}"),
            ("LEFT", f"ticks left {ticks}"),
        ):
            wide = wide.replace(word, meaning)
        narrow = wide.replace("10.5 4.2 inches", "4 4 inches").replace("10.5 1.95", "4 1.95")
        if name != "peers":
            narrow = re.sub("legend in . columns", "legend in 2 columns", narrow)
        for light, dark in self.DARK.items():
            narrow = narrow.replace(light, dark)
        for look, expected in ((plots.Look(), wide), (plots.Look(dark=True, narrow=True), narrow)):
            figure = plots._figure(look.width, plots._height(known_report, name, look), look)
            plots._draw(known_report, name, figure, look)
            assert described(figure) == expected.splitlines()
            axes = figure.axes[0]
            assert axes.get_axisbelow() is True  # the grid, under what is drawn
            x, small, y = axes.xaxis.get_major_formatter(), axes.xaxis.get_minor_formatter(), axes.yaxis
            if name == "roofline":
                assert [x(value) for value in (1, 1500, 10**6, 2**23)] == ["1 B", "1.50 kB", "1 MB", "8.39 MB"]
                assert [y.get_major_formatter()(value) for value in (0.5, 20)] == ["0.5", "20"]
            if name == "peers":
                assert [x(value) for value in (0.5, 1, 10)] == ["0.5", "1", "10"]
                assert [small(value) for value in (0.2, 2, 3, 5, 20, 70)] == ["", "2", "", "5", "20", ""]
                (label,) = axes.get_yticklabels()
                assert label.get_text() == ("training step\nfp32" if look.narrow else "training step, fp32")
                assert label.get_fontsize() == 8  # what ``tick_params`` says, last
            if name == "sizes":
                bands = [part.get_paths()[0].get_extents().intervaly.tolist() for part in axes.collections]
                assert bands == [pytest.approx(ends) for ends in ((1.8e3, 5e3), (12e3, 14e3), (23e3, 23e3))]

    @pytest.mark.skipif(not PLOTS, reason="needs matplotlib")
    def test_files_of_plots(self, known_report):
        """130 dots an inch; the plots one below the other, with half an inch for the title. SVG: 72 points an inch."""
        image = pytest.importorskip("PIL.Image").open(io.BytesIO(plots.png(known_report)))
        assert (image.format, image.size) == ("PNG", (1365, int(130 * (4.2 + 1.95 + 4.2 + 0.5))))
        rows = np.asarray(image.convert("L")) < 128
        ends = [int(130 * height) for height in (0.5, 4.7, 6.65)]
        for begin, end in zip(ends, [*ends[1:], image.size[1]]):
            assert rows[begin:end].sum() > 1000, "one of the plots is empty"
        drawing = plots.svg(known_report, "roofline", plots.Look())
        assert b'width="756pt" height="302.4pt"' in drawing and b"<dc:date>" not in drawing
        dark = plots.darkened(drawing)
        for light, other in self.DARK.items():
            assert light.encode() in drawing and light.encode() not in dark, light
            assert dark.count(other.encode()) == drawing.count(light.encode())
        # The drawing itself is the same.
        assert re.sub(rb"#[0-9a-f]{6}", b"", dark) == re.sub(rb"#[0-9a-f]{6}", b"", drawing)

    def test_which_cases_are_in_plots(self, known_report):
        def case(shape, operation="training step", kind="v_prediction", dtype="fp32", ratios=("eager",), timed=True):
            peers = {name: {"ratio": {"median": 2.0} if name in ratios else None} for name in ("eager", "compile")}
            peers = {"fastdiff": {"seconds": {"median": 1.0} if timed else None, "ratio": None}} | peers
            found = {"operation": operation, "kind": kind, "dtype": dtype, "shape": shape, "peers": peers}
            return found | {"elements": math.prod(shape)}

        tiny, typical, large = [8, 8], [1024, 1024], [4096, 1024]
        both = ("eager", "compile")
        # Large enough to be typical comes before more ratios, more ratios before fewer elements.
        assert plots._bars({"cases": [case(tiny, ratios=both), case(large), case(typical)]}) == [case(typical)]
        assert plots._bars({"cases": [case(typical), case(large, ratios=both)]}) == [case(large, ratios=both)]
        assert plots._bars({"cases": [case([512, 1023]), case([512, 1024])]}) == [case([512, 1024])]
        assert plots._bars({"cases": [case(tiny), case(typical, ratios=())]}) == [case(tiny)]
        assert plots._bars({"cases": [case(typical, ratios=())]}) == []
        # One kind, v where there is; with it what is measured for epsilon in its place.
        mixed = [
            case(tiny, operation, kind) for operation in ("noising", "loss") for kind in ("epsilon", "v_prediction")
        ]
        assert plots._bars({"cases": mixed}) == [mixed[0], mixed[1], mixed[3]]
        others = [case(tiny, kind=kind) for kind in ("flow", "epsilon", "flow")]
        assert plots._bars({"cases": others}) == [others[0], others[2]]

        # Time against size: of a training step, then of what has the most sizes, then of v.
        def sizes(*cases):
            return plots._sizes({"cases": list(cases)})

        steps, losses = ([case(shape, operation) for shape in (large, tiny)] for operation in ("training step", "loss"))
        assert sizes(*losses, case(typical, "loss"), *steps) == ("training step, v_prediction, fp32", steps[::-1])
        halves = [case(shape, "loss", dtype="bf16") for shape in (tiny, typical, large)]
        assert sizes(*losses, *halves) == ("loss, v_prediction, bf16", halves)
        flow = [case(shape, "loss", "flow") for shape in (tiny, large)]
        assert sizes(*flow, *losses) == ("loss, v_prediction, fp32", losses[::-1])
        assert sizes(case(tiny), case(large, timed=False)) == ("", [])


@pytest.mark.usefixtures("no_pictures")
class TestWhatGoesWrong:
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
        assert (tmp_path / "bench.html").exists()
        output = capsys.readouterr().out
        assert "interrupted: 2 of 4" in output and TINY[0].name in output and TINY[2].name not in output

    # Where Ctrl-C strikes, by the function that is entered then; a second one strikes while the results are written.
    MOMENTS = {
        "the copy's rate": (running.Run, "measure_copy"),
        "compiling": (running.Run, "_compile"),
        "making tensors": (running.Run, "_operand_sets"),
        "counting": (running.Run, "_count"),
        "timing": (running.Run, "_timed"),
        "the notes": (running.Run, "_note_missing"),
        "the bar": (Progress, "close"),
        "the report": (report, "build"),
        "the files": (command, "_write"),
        "the page": (page, "page"),
        "printing": (command, "_print"),
    }

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_ctrl_c_at_any_moment(self, tiny, tmp_path, monkeypatch, capsys, moment):
        """A real signal, once at that moment and once more in the middle of writing: all files are whole."""

        def struck(real, times):
            def call(*arguments):
                if times and times.pop() == 0:
                    signal.raise_signal(signal.SIGINT)
                return real(*arguments)

            return call

        owner, name = self.MOMENTS[moment]
        late = 3 if name == "_timed" else 1 if name == "_count" else 0  # so many calls before
        monkeypatch.setattr(owner, name, struck(getattr(owner, name), list(range(late + 1))))
        monkeypatch.setattr(table, "as_csv", struck(table.as_csv, [0]))
        before = signal.getsignal(signal.SIGINT)
        assert run("--out", tmp_path) == 130
        assert signal.getsignal(signal.SIGINT) is before
        found = report.load(tmp_path / "bench.json")
        whole = moment in ("the bar", "the report", "the files", "the page", "printing")
        assert found["complete"] == whole
        if whole:
            assert len(found["cases"]) == 4
        if moment in ("timing", "counting"):
            assert found["cases"] and any("interrupted" in note for note in found["notes"])
        for written in ("bench.csv", "bench.md", "bench.html"):
            assert (tmp_path / written).stat().st_size > 100
        assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".md", ".html"}
        printed = capsys.readouterr()
        assert "writing what was measured" in printed.err and "copy ceiling" in printed.out

    def test_caches_go_to_the_folder_and_leave_with_the_run(self, tmp_path, monkeypatch):
        codecache = pytest.importorskip("torch._inductor.codecache")
        for name in ("TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"):
            monkeypatch.delenv(name, raising=False)
        headers = getattr(codecache, "_HEADER_DIR", None)
        with command._caches_in(tmp_path, compiles=True):
            (folder,) = tmp_path.iterdir()
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == os.environ["MPLCONFIGDIR"] == str(folder)
            assert headers is None or Path(codecache._HEADER_DIR).parent == folder
            (folder / "kernel.so").touch()
        assert not list(tmp_path.iterdir()) and getattr(codecache, "_HEADER_DIR", None) == headers
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ and "MPLCONFIGDIR" not in os.environ
        # A place that is set stands, and keeps what is there for another run.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/given")
        with command._caches_in(tmp_path, compiles=True):
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/given" and "MPLCONFIGDIR" in os.environ
            assert getattr(codecache, "_HEADER_DIR", None) == headers
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/given"

    @pytest.mark.nightly
    def test_a_run_on_a_cpu_writes_nowhere_else(self, tmp_path):
        """With a home, a folder for temporary files and a working folder of its own."""
        places = [tmp_path / name for name in ("home", "temporary", "here")]
        for place in places:
            place.mkdir()
        environment = os.environ | {"HOME": str(places[0]), "TMPDIR": str(places[1])}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(fastdiff.__file__).parents[1]), *sys.path])
        for name in ("TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
            environment.pop(name, None)
        line = [sys.executable, "-m", "fastdiff", "bench", "--device", "cpu", "--seconds", "1", "--against", "compile"]
        subprocess.run([*line, "--out", str(tmp_path / "out")], cwd=places[2], env=environment, check=True)
        assert [path for place in places for path in place.rglob("*") if path.is_file()] == []
        assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
        found = report.load(tmp_path / "out" / "bench.json")
        assert any(case["peers"]["compile"]["seconds"] for case in found["cases"])

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

    def test_a_peer_that_fails_later(self, tiny):
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

    def test_too_slow_a_peer_is_timed_once(self, tiny):
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
        assert f"{tmp_path / 'bench.json'} cannot be read" in refused(capsys, "--compare", tmp_path, tmp_path)

    def test_the_folder_of_a_run_is_its_report(self, known_report, tmp_path):
        (tmp_path / "bench.json").write_text(json.dumps(known_report))
        assert report.load(tmp_path) == report.load(tmp_path / "bench.json")


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
        assert [table.number(n) for n in (9.994, 9.996, 99.94, 99.96)] == ["9.99", "10.0", "99.9", "100"]

    def test_narrow_terminal(self, finished):
        found = report.load(finished[0] / "bench.json")
        wide, narrow = (table.text(found, width).splitlines() for width in (None, 110))
        assert max(map(len, narrow)) <= 110 < max(map(len, wide))
        assert "eager ×" in narrow[0] and "extra memory" in wide[0] and "extra memory" not in narrow[0]

    def test_what_is_dropped_first(self, known_report):
        """The least telling; never the case, the time, its share of a copy's and the ratios."""
        kept = table.text(known_report).splitlines()[0]
        others = [f"{peer} {what}" for what in ("launches", "host") for peer in ("eager", "compile", "diffusers")]
        for heading in (*others, "extra memory", "launches", "moved", "p20 to p80", "host", "GB/s", "images/s"):
            narrower = table.text(known_report, max(map(len, table.text(known_report, len(kept)).splitlines())) - 1)
            assert heading in kept
            assert narrower.splitlines()[0].split() == kept.replace(heading, "", 1).split(), heading
            kept = narrower.splitlines()[0]
        assert kept.split() == "case time of copy eager × compile × diffusers ×".split()

    def test_80_columns(self, known_report):
        """Operation, time and every ratio of each case, with what neighbours share above them."""
        first, second = known_report["cases"]
        alike = [first | {"operation": name} for name in ("noising", "sampler step+noise")]
        cases = [*alike, second | {"shape": [64, 16, 128, 256, 256]}]
        found = known_report | {"cases": cases, "peers": [*known_report["peers"], "reference"]}
        assert table.text(found, 80).splitlines() == [
            "                         time  of copy  eager  compile  diffusers  reference",
            "v_prediction fp32 16x4x128x128",
            "  noising             2.00 ms      55%   6.50     wide          -          -",
            "  sampler step+noise  2.00 ms      55%   6.50     wide          -          -",
            f"{second['kind']} {second['dtype']} 64x16x128x256x256",
            table.text(found, 80).splitlines()[5],
        ]
        assert table.text(found, 80).splitlines()[5].startswith(f"  {second['operation']} ")
        assert max(map(len, table.text(found, 60).splitlines())) <= 60
        assert table.text(found, 60).splitlines()[0].split() == ["time", "of", "copy", "eager", "compile"]

    def test_what_is_printed_where_there_is_no_terminal_is_wide(self, known_report, tmp_path, monkeypatch, capsys):
        monkeypatch.delenv("COLUMNS", raising=False)
        monkeypatch.setattr(table, "text", lambda found, width: f"{width} columns")
        command._print(known_report | {"model": None}, tmp_path)
        assert capsys.readouterr().out.startswith("200 columns\n")

    def test_what_is_printed_fits(self, known_report, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("COLUMNS", "80")
        command._print(known_report | {"model": known_model()}, tmp_path)
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if len(line) > 80 and str(tmp_path) not in line] == []
        assert "eager, compile, diffusers: how many times as long they take" in " ".join(lines)


def test_model():
    """The share of noising and loss is between nothing and all of a step, on a network that learns."""
    found = models.share("unet-small", CPU, "fp32", 0.0, Progress(1, quiet=True), batch=2)
    for label in ("before", "after"):
        assert 0 < found[label]["share"] < 1 and found[label]["seconds"]["rounds"] >= measuring.MIN_ROUNDS
    assert found["parameters"] > 1e5 and found["shape"] == [2, 3, 32, 32]
    assert "noising and loss take" in table.model_text(found)
    with pytest.raises(BenchError, match="unknown model"):
        models.share("nonsense", CPU, "fp32", 0.0, Progress(1, quiet=True))


@pytest.mark.parametrize(("device", "width", "images", "latents"), [("cpu", 32, 32, 4), ("meta", 64, 256, 64)])
def test_which_models(device, width, images, latents, monkeypatch):
    """DiT-B/2 of Peebles & Xie 2023, table 1 (12 layers of 12 heads, 768 wide) on latents of 32x32; of each a batch
    that an accelerator, or a CPU, is busy with."""
    device, asked, seen = torch.device(device), {}, {}

    class Transformer(torch.nn.Module):
        def __init__(self, **given):
            super().__init__()
            asked.update(given)

        def forward(self, x, **given):
            seen.update(given)
            return [2 * x]

    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(DiTTransformer2DModel=Transformer))
    network, shape = models._build("dit-b", device, torch.float32)
    assert asked.pop("num_attention_heads") * asked.pop("attention_head_dim") == 768
    assert asked == {"num_layers": 12, "sample_size": 32, "patch_size": 2, "in_channels": 4}
    assert shape == (latents, 4, 32, 32)
    x, t = torch.ones(2, 4, 8, 8), torch.tensor([3, 4])
    assert torch.equal(network(x, t), 2 * x) and seen == {"timestep": t, "class_labels": t, "return_dict": False}

    network, shape = models._build("unet-small", device, torch.bfloat16)
    assert shape == (images, 3, 32, 32)
    first = next(network.parameters())
    assert (first.device.type, first.dtype) == (device.type, torch.bfloat16)
    assert network.network.settings | {"width": width} == network.network.settings
    assert (network.network.settings["channels"], network.network.settings["size"], network.classes) == (3, 32, 10)
    monkeypatch.setattr(type(network.network), "forward", lambda network, x, t, label: (t, label))
    assert [part.tolist() for part in network(x, torch.tensor([3, 999]))] == [[3, 999], [3, 9]]

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BenchError, match="--model dit-b needs diffusers"):
        models._build("dit-b", device, torch.float32)


def test_model_of_known_times(monkeypatch):
    """Noising and loss take 20 of 100 ms before, 5 of 80 after."""
    clock = Clock()
    monkeypatch.setattr(models, "time", clock)
    monkeypatch.setattr(measuring, "time", clock)
    monkeypatch.setattr(models, "_build", lambda *_: (torch.nn.Linear(3, 2), (4, 3, 2, 2)))
    steps = iter((0.1, 0.08))  # before, after
    monkeypatch.setattr(models, "_training_step", lambda *_: functools.partial(clock.take, next(steps)))
    alone = {"eager": 0.02, "fastdiff": 0.005}
    monkeypatch.setattr(peers, "build", lambda peer, case, device: lambda o: clock.take(alone[peer]))
    found = models.share("mine", CPU, "fp32", 3.0, Progress(1, quiet=True))
    for label, step, objective in (("before", 0.1, 0.02), ("after", 0.08, 0.005)):
        assert found[label]["seconds"]["median"] == pytest.approx(step)
        assert found[label]["objective_seconds"]["median"] == pytest.approx(objective)
        assert found[label]["share"] == pytest.approx(objective / step)
        assert found[label]["images_per_second"] == pytest.approx(4 / step)
    assert found["ratio"]["median"] == pytest.approx(1.25) and found["ratio"]["steady"]
    # A round is 0.1 + 0.08 and five of each objective: the tenth ends after 3 seconds.
    assert found["before"]["seconds"]["rounds"] == 10
    assert (found["parameters"], found["shape"], found["dtype"]) == (8, [4, 3, 2, 2], "fp32")


def test_parts_of_a_model_take_turns(monkeypatch):
    """Who comes first changes from round to round."""
    monkeypatch.setattr(models, "_build", lambda *_: (torch.nn.Linear(3, 2), (4, 3, 2, 2)))
    order, names = [], iter(("before", "after"))
    monkeypatch.setattr(models, "_training_step", lambda *_: functools.partial(order.append, next(names)))
    monkeypatch.setattr(peers, "build", lambda peer, case, device: lambda o: order.append(peer))
    models.share("mine", CPU, "fp32", 0.0, Progress(1, quiet=True))
    once = ["before", "after", "eager", "fastdiff"]
    forth = ["before", "after", *["eager"] * 5, *["fastdiff"] * 5]
    rounds = [forth if k % 2 else forth[::-1] for k in range(measuring.MIN_ROUNDS)]
    assert order == once + [name for each in rounds for name in each]


def test_the_bar_is_closed(monkeypatch):
    progress, closed = Progress(1, quiet=True), []
    progress.close()
    progress._bar = SimpleNamespace(close=lambda: closed.append(True))
    progress.close()
    assert closed == [True]


def test_training_steps_of_a_model():
    """Both learn, from a gradient of their own; both losses are min-SNR's of v, which of a network that says 0 is
    known: the mean of the target's square by weight."""
    x0 = torch.randn(512, 1, 4, 4)
    alpha_bar = fastdiff.VariancePreserving().alpha_bar
    # E |v|^2 = alpha_bar + 1 - alpha_bar times the data's, which is 1; the weight is min(S, 5) / (S + 1).
    ratio = alpha_bar / (1 - alpha_bar)
    expected = (ratio.clamp(max=5.0) / (ratio + 1)).mean().item()
    for objective in (models._eager(CPU), models._fastdiff()):
        losses = [objective(lambda x, t: torch.zeros_like(x), x0).item() for _ in range(20)]
        # The weight's deviation is 0.3 and v's square is known to 0.06 a row: 0.4 / sqrt(20 * 512), five times.
        assert abs(sum(losses) / 20 - expected) < 5 * 0.4 / (20 * 512) ** 0.5
    network = torch.nn.Linear(4, 1, bias=False)
    before = network.weight.detach().clone()
    step = models._training_step(network, SimpleNamespace(x0=x0), lambda net, x: net(x).sum())
    for _ in range(2):
        step()
        # 2048 float32 numbers of about 1 are summed in pairs: 11 roundings of less than 1600.
        torch.testing.assert_close(network.weight.grad[0], x0.sum((0, 1, 2)), rtol=0, atol=11 * 1600 / 2**24)
    # AdamW's two steps of 1e-4, against the gradient, and its decay.
    assert torch.allclose(network.weight, before - 2e-4 * network.weight.grad.sign(), atol=3e-6)


def test_progress_estimates_from_how_the_plan_held(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fastdiff.bench.progress.time.perf_counter", lambda: now[0])
    progress = Progress(100.0)
    assert progress.left() == "about 2 min left"
    progress.advance(50.0)
    now[0] = 25.0
    assert progress.left() == "about 25 s left"
    progress.advance(25.0)
    assert progress.left() == "about 8 s left"  # a quarter, a third of what the others took
    progress.advance(-25.0)
    progress.say("something")
    assert "50%  something, about 25 s left" in capsys.readouterr().err
    progress.close()


def test_several_processes(tmp_path, monkeypatch, capfd):
    """Two processes measure at once; the first reports each and all, and speaks."""
    script = tmp_path / "other.py"
    script.write_text(
        "import sys, pytest, test_bench\ntest_bench.make_tiny(pytest.MonkeyPatch())\n"
        "sys.exit(test_bench.main(sys.argv[1:]))\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here, path = os.path.dirname(__file__), os.environ.get("PYTHONPATH")
    helpers = os.path.dirname(here)
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    group |= {"PYTHONPATH": os.pathsep.join(filter(None, [here, helpers, os.getcwd(), path]))}
    arguments = ["bench", "--against", "none", "--device", "cpu", "--threads", "1", "--out", str(tmp_path / "out")]
    other = subprocess.Popen([sys.executable, str(script), *arguments], env={**os.environ, **group, "RANK": "1"})
    for name, value in (group | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    make_tiny(monkeypatch)
    monkeypatch.setattr(plots, "plots", lambda found: {})
    assert main(arguments) == 0
    assert other.wait(timeout=300) == 0
    ranks = report.load(tmp_path / "out" / "bench.json")["ranks"]
    assert ranks["world"] == 2 and [case["case"] for case in ranks["cases"]] == [case.name for case in TINY]
    for case in ranks["cases"]:
        assert len(case["images_per_second"]) == 2 and all(value > 0 for value in case["images_per_second"])
    assert capfd.readouterr().out.count("images/s together") == 1
