"""The cases of ``fastdiff bench`` under pytest-benchmark: on the GPU where there is one, with ``--preset`` (quick).

python -m pytest benchmarks --preset full --benchmark-json=out.json

On a GPU a time is that of a call and of waiting for it; the device's own is in extra_info, ``device_seconds``.
"""

import pytest
import torch

import fastdiff
from fastdiff.bench import peers
from fastdiff.bench.cases import PRESETS, choose, operands
from fastdiff.bench.counting import floor_bytes
from fastdiff.bench.measuring import Timer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PEERS = ("fastdiff", "eager", "compile", "diffusers")


def pytest_addoption(parser):
    parser.addoption("--preset", default="quick", choices=sorted(PRESETS), help="the cases, as of fastdiff bench")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        whole = metafunc.function.__name__ == "test_training_step"
        chosen = choose(metafunc.config.getoption("--preset"))
        chosen = [case for case in chosen if (case.operation == "training step") == whole]
        metafunc.parametrize("case", chosen, ids=lambda case: case.name.replace(" ", "-"))
        metafunc.parametrize("peer", PEERS)


@pytest.fixture(autouse=True, scope="session")
def many_graphs():
    with peers.many_graphs():
        yield


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture
def measure(benchmark):
    """Measures a case for a peer: the time of a call that has been made before, with what it works on as extra_info."""

    def run(case, peer):
        o = operands(case.shape, case.dtype, DEVICE)
        try:
            call = peers.build(peer, case, DEVICE)
        except peers.Missing as missing:
            pytest.skip(str(missing))

        def once():
            call(o)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        once()
        benchmark.group = case.name
        benchmark.extra_info |= {"peer": peer, "floor_bytes": floor_bytes(case), "elements": case.elements}
        if peer == "fastdiff":
            benchmark.extra_info["backend"] = fastdiff.backends.choose(DEVICE)
        benchmark.pedantic(once, rounds=100 if case.elements < 1e5 else 15, iterations=1, warmup_rounds=2)
        if DEVICE.type == "cuda":
            timer, calls = Timer(DEVICE), [lambda: call(o)] * 10
            benchmark.extra_info["device_seconds"] = timer.seconds(calls, timer.host_seconds(calls[0]))

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
