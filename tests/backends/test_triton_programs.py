"""Coefficient programs by Triton's kernel: the formulas' numbers, in few launches. On a GPU, or in the interpreter."""

import math

import pytest
import torch
from accuracy import assert_same
from asked import reference
from devices import in_turn

import fastdiff
from fastdiff import losses
from fastdiff import timesteps as ts
from fastdiff.calls import UniformCall
from fastdiff.coefficients import drawn
from fastdiff.process import Levels
from fastdiff.program import OPERATIONS, Program

pytest.importorskip("triton")
from asked import triton

from fastdiff.backends.triton import interpreted, programs
from fastdiff.backends.triton.launch import launches

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
if DEVICE.type == "cpu" and not interpreted():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)
# The interpreter's own: numpy's announcements, and what becomes of infinity and of a division by zero.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")

PROCESSES = [
    fastdiff.RectifiedFlow(3.0),
    fastdiff.RectifiedFlow(sigma_min=1e-3),
    fastdiff.EDM(),
    fastdiff.VPSDE(),
    fastdiff.SubVPSDE(),
    fastdiff.VESDE(),
    fastdiff.TrigFlow(),
]
KINDS = ["flow", "edm", "epsilon", "score", "sample", "trigflow"]
WEIGHTS = [None, "min_snr", "cosmap", "sigma_sqrt", "debiased", "bell", fastdiff.weighting.SNR(-0.37)]
LOSSES = ["mse", losses.PseudoHuber(0.2, schedule="snr"), "huber", losses.PseudoHuber(0.2, "scaled", "exponential")]


@in_turn(process=PROCESSES, kind=KINDS, weight=WEIGHTS, loss=LOSSES)
def test_the_kernel_has_the_formulas_numbers(process, kind, weight, loss):
    try:
        objective = fastdiff.Objective(process, kind, weight, loss, error_space="sample")
    except (ValueError, TypeError):
        pytest.skip("they do not go together")
    coefficients = objective._coefficients
    t = process.t_min + (min(process.t_max, 50.0) - process.t_min) * torch.rand(500, dtype=torch.float64)
    expected = coefficients.formulas(Levels(t, *process.alpha_sigma(t), process))
    program = coefficients.program()
    with launches() as launched:
        found = triton.evaluate(program, t.to(DEVICE), torch.float32)
    assert launched == ["coefficients"]
    # 1 in 2^28 may lie so near to the middle of two numbers that the last bits of float64 decide: none of these few.
    for name, row in zip(program.names, found):
        assert_same(row.cpu(), expected[name].float())


@pytest.mark.parametrize("operation", [name for name, meaning in OPERATIONS.items() if meaning is not None])
def test_each_operation_is_what_it_is_in_pytorch(operation):
    """Also of zeros, infinities and NaN: to a unit of float32, and to all of its bits in the interpreter, whose
    functions are PyTorch's. (Those of a GPU are good to 2 units of float64; ndtri, which is ours, to 64.)"""
    special = [0.0, -0.0, 1.0, -1.0, 2.0, 0.5, math.inf, -math.inf, math.nan, 1e-30, 1e30, 3.7, -2.5]
    a = torch.cat([torch.tensor(special, dtype=torch.float64), torch.randn(100, dtype=torch.float64) * 3])
    a = torch.cat([a, torch.rand(100, dtype=torch.float64), 10.0 ** -torch.arange(1.0, 30.0).double()])
    first = list(OPERATIONS).index("add")
    count = {"where": 3}.get(operation, 2 if list(OPERATIONS).index(operation) >= first else 1)
    for others in ([0.5, -2.0], [math.nan, 3.0], [-0.0, math.inf], [1.0, 1.0])[: 1 if count == 1 else 4]:
        code = (("input",), *(("number", k) for k in range(count - 1)), (operation, *range(count)))
        program = Program(code, tuple(others[: count - 1]), ("y",), (count,))
        (found,) = triton.evaluate(program, a.to(DEVICE), torch.float32)
        expected = program.run(a)[0].float()
        torch.testing.assert_close(found.cpu(), expected, rtol=2.0**-23, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("timesteps", "process"),
    [
        (ts.Uniform(), fastdiff.VPSDE()),
        (ts.Uniform(), fastdiff.VariancePreserving()),
        (ts.LogitNormal(0.2, 1.3), fastdiff.RectifiedFlow(3.0)),
        (ts.LogitNormal(), fastdiff.VariancePreserving(steps=17)),
        (ts.Mode(), fastdiff.RectifiedFlow()),
        (ts.CosMap(), fastdiff.RectifiedFlow()),
        (ts.LogNormal(), fastdiff.EDM()),
        (ts.LogNormal(), fastdiff.TrigFlow()),
        (ts.UniformLogSNR(), fastdiff.VPSDE(t_min=1e-5)),
        (ts.UniformLogSNR(0.01, 0.99), fastdiff.Cosine()),
    ],
    ids=repr,
)
def test_times_are_those_of_the_formula(timesteps, process):
    traced = drawn(timesteps, process)
    for samples, count in ((2000, None), (7, 31)):
        expected = timesteps(reference.uniform(7, samples, 3, 2**33, "cpu", count), process)
        for seed in (7, torch.tensor([7], device=DEVICE)):
            call = UniformCall(seed, samples, 3, 2**33, DEVICE, count)
            found = triton.times(traced.program(), call, process.discrete)
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=0)


def capped(levels):
    return levels.snr.clamp(max=5.0) / levels.snr


OBJECTIVES = {
    "DDPM": lambda: fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon", "min_snr"),
    "SD3": lambda: fastdiff.Objective(
        fastdiff.RectifiedFlow(3.0), "flow", "cosmap", timesteps="logit_normal", error_space="sample"
    ),
    "SD3, sigma_sqrt": lambda: fastdiff.Objective(
        fastdiff.RectifiedFlow(3.0), "flow", "sigma_sqrt", timesteps="logit_normal", error_space="sample"
    ),
    "EDM": lambda: fastdiff.Objective(fastdiff.EDM(), "edm", "edm"),
    "VPSDE": lambda: fastdiff.Objective(fastdiff.VPSDE(), "v_prediction", "likelihood"),
    "a function": lambda: fastdiff.Objective(fastdiff.VPSDE(), "epsilon", capped),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("given", [False, True], ids=["times drawn", "times given"])
def test_a_training_step_is_four_launches(name, given):
    """Times and coefficients, x_t, the loss with its gradient, the comparison of the upstream gradient."""
    objective = OBJECTIVES[name]()
    x0, prediction = torch.randn(3, 2, 8, 8, device=DEVICE), torch.randn(3, 2, 8, 8, device=DEVICE).requires_grad_()
    seed = torch.tensor([5], device=DEVICE)
    t = objective.noise(x0, seed=9).t if given else None
    with fastdiff.use_backend("triton"):
        with launches() as launched:
            noised = objective.noise(x0, t, seed=seed)
            loss = objective.loss(prediction, noised)
            loss.backward()
        looked_up = objective.process.discrete and given
        assert launched == [*([] if looked_up else ["coefficients"]), "affine", "loss", "loss"]
        with launches() as launched:
            weight, snr = noised.weight, noised.snr
        assert launched == [], "they are there"
    with fastdiff.use_backend("reference"):
        again = prediction.detach().clone().requires_grad_()
        expected = objective.noise(x0, noised.t, seed=seed)
        objective.loss(again, expected).backward()
        torch.testing.assert_close(noised.t, objective.noise(x0, t, seed=seed).t, rtol=1e-12, atol=0)
    assert_same(noised.x_t, expected.x_t)
    torch.testing.assert_close((weight, snr), (expected.weight, expected.snr), rtol=1e-6, atol=0)
    torch.testing.assert_close(prediction.grad, again.grad)


def test_a_mask_takes_its_coefficients_from_the_same_launch():
    objective = OBJECTIVES["SD3"]()
    x0, mask = torch.randn(3, 2, 8, 8, device=DEVICE), torch.ones(3, 1, 8, 8, device=DEVICE)
    prediction = torch.randn(3, 2, 8, 8, device=DEVICE).requires_grad_()
    with fastdiff.use_backend("triton"), launches() as launched:
        objective.loss(prediction, objective.noise(x0), mask=mask).backward()
    assert launched == ["coefficients", "affine", "loss", "loss"]


def test_a_process_that_is_changed_between_noising_and_loss():
    """The loss is of the process as it is then, on every backend."""
    found = []
    x0 = torch.linspace(-1, 1, 48, device=DEVICE).view(3, 2, 8)
    for backend in ("triton", "reference"):
        objective = OBJECTIVES["EDM"]()
        with fastdiff.use_backend(backend):
            noised = objective.noise(x0, torch.tensor([0.1, 0.5, 2.0], device=DEVICE), seed=3)
            objective.process.sigma_data = 2.0
            found.append([objective.loss(x0, noised), objective.loss(x0, noised, torch.ones(3, 1, 1, device=DEVICE))])
    torch.testing.assert_close(*found)


def test_one_kernel_whatever_the_numbers():
    """Programs that differ in their constants alone are one kernel."""
    one, other = (
        fastdiff.Objective(fastdiff.VPSDE(0.1, b), "epsilon", fastdiff.MinSNR(g))._coefficients.program()
        for b, g in ((20.0, 5.0), (15.0, 3.0))
    )
    assert one.numbers != other.numbers
    assert programs.flat(one.code) == programs.flat(other.code) and one.outputs == other.outputs
