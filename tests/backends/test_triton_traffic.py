"""What launches move, against numbers worked out by hand, and against what the bench says of the operands."""

import pytest
import torch

pytest.importorskip("triton")
from asked import triton

import fastdiff
from fastdiff import ops
from fastdiff.backends.triton.launch import launches
from fastdiff.bench import counting, peers
from fastdiff.bench.cases import Case, operands
from fastdiff.program import trace
from fastdiff.tensors import Gathered

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SHAPE, ELEMENTS, SAMPLES = (3, 4, 8, 8), 768, 3
ROWS = SAMPLES * 4  # bytes of rows of float32, one a sample
INDEX = SAMPLES * 8


def data(dtype=torch.float32):
    return torch.randn(SHAPE, device=DEVICE).to(dtype)


def row():
    return torch.rand(SAMPLES, 1, 1, 1, device=DEVICE)


def gathered(*columns):
    t = torch.tensor([1, 999, 5], device=DEVICE).view(3, 1, 1, 1)
    table = torch.rand(1000, 5, device=DEVICE)
    return [Gathered(table[:, column], t) for column in columns]


def moved(call):
    """(name, bytes read, bytes written) of each launch."""
    with launches() as records:
        call()
    return [(str(record), record.read, record.written) for record in records]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noising(dtype):
    full, stored = ELEMENTS * dtype.itemsize, ELEMENTS * 4
    x0, n, seed = data(dtype), data(), torch.tensor([3], device=DEVICE)

    def noised(n, keep=False, rows=None):
        alpha, sigma = rows or (row(), row())
        return moved(lambda: triton.noise(x0, n, alpha, sigma, 0.0, None, keep))

    assert noised(n) == [("affine", full + stored + 2 * ROWS, full)]
    assert noised(n, keep=True) == noised(n)  # it is there already
    assert noised(ops.Philox(seed)) == [("affine", full + 2 * ROWS + 8, full)]
    assert noised(ops.Philox(3)) == [("affine", full + 2 * ROWS, full)]
    assert noised(ops.Philox(seed), keep=True) == [("affine", full + 2 * ROWS + 8, full + stored)]
    assert noised(n, rows=gathered(1, 3)) == [("affine", full + stored + 2 * ROWS + INDEX, full)]
    one = torch.rand(1, 1, 1, 1, device=DEVICE).expand(SAMPLES, 1, 1, 1)
    assert noised(n, rows=(one, row())) == [("affine", full + stored + 4 + ROWS, full)]
    p, q = gathered(0, 1)
    with_target = lambda: triton.noise_and_target(x0, n, p, q, 0.0, None, False, p, q)  # noqa: E731
    assert moved(with_target) == [("affine", full + stored + 4 * ROWS + INDEX, 2 * full)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_backward(dtype):
    full = ELEMENTS * dtype.itemsize
    prediction, x0, n = data(dtype), data(dtype), data(dtype)
    p, q, w = gathered(0, 1, 2)
    how = p, q, None, w, None, None, "mse", "none"
    rows = 3 * ROWS + INDEX
    assert moved(lambda: triton.loss(prediction, x0, n, *how, "mean")) == [("loss", 3 * full + rows, 4)]
    assert moved(lambda: triton.loss(prediction, x0, n, *how, "none")) == [("loss", 3 * full + rows, ROWS)]
    assert moved(lambda: triton.loss(prediction, x0, ops.Philox(3), *how, "mean")) == [("loss", 2 * full + rows, 4)]
    third = lambda: triton.loss(prediction, x0, ops.Philox(3), *how, "mean", y=n, r=row())  # noqa: E731
    assert moved(third) == [("loss", 3 * full + rows + ROWS, 4)]  # read once, in the same launch
    wanted = prediction.requires_grad_()
    forward = ("loss", 3 * full + rows + 4, full + 4 + 4)  # the gradient, and for which upstream one it is
    assert moved(lambda: triton.loss(wanted, x0, n, *how, "mean").backward()) == [forward, ("loss", 8, 0)]
    # float16 computes it in the backward, as does a loss that is not reduced.
    upstream = row()
    backward = ("loss", 3 * full + rows + ROWS, full)
    call = lambda: triton.loss(wanted, x0, n, *how, "none").backward(upstream)  # noqa: E731
    assert moved(call) == [("loss", 3 * full + rows, ROWS), backward]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_by_elements(dtype):
    """The errors are written in one pass. One more reads the upstream gradient, of each or of a row."""
    full, stored = ELEMENTS * dtype.itemsize, ELEMENTS * 4
    prediction, x0, n = data(dtype).requires_grad_(), data(dtype), data(dtype)
    how = *gathered(0, 1), None, *gathered(2), None, None, "mse", "none", "elements"
    read = 3 * full + 3 * ROWS + INDEX
    for upstream, more in (
        (data(), stored),
        (row().expand(SHAPE), ROWS),
        (torch.tensor(0.5, device=DEVICE).expand(SHAPE), 4),
    ):
        call = lambda upstream=upstream: triton.loss(prediction, x0, n, *how).backward(upstream)  # noqa: E731
        assert moved(call) == [("loss", read, stored), ("loss", read + more, full)]


def test_masks_count_as_what_they_store():
    prediction, n = data().requires_grad_(), data()
    mask, full = torch.ones(1, 1, 8, 8, dtype=torch.bool, device=DEVICE), ELEMENTS * 4

    def call(mask, normalization):
        one = torch.ones(SAMPLES, 1, 1, 1, device=DEVICE)
        how = None, one, None, one, None, mask, "mse", normalization, "mean"
        return moved(lambda: triton.loss(prediction, None, n, *how).backward())

    read = 2 * full + 2 * ROWS + 64
    assert call(mask, "none") == [("loss", read + 4, full + 4 + 4), ("loss", 8, 0)]
    # What a row is divided by, and how many rows count, is written with the loss and read in its backward.
    assert call(mask, "row") == [("loss", read, 4 + ROWS + 4), ("loss", read + ROWS + 4 + 4, full)]
    whole = mask.expand(SHAPE).float()
    assert call(whole, "global") == [("loss", read - 64 + 4 * 768, 4 + 4), ("loss", read - 64 + 4 * 768 + 8, full)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conversion_and_the_step(dtype):
    full, wide = ELEMENTS * dtype.itemsize, ELEMENTS * 4
    x, m, uncond = data(dtype), data(dtype), data(dtype)
    assert moved(lambda: triton.convert(m, x, row(), row())) == [("affine", 2 * full + 2 * ROWS, full)]
    table, history = torch.rand(18, device=DEVICE), (data(), data())

    def step(uncond, guidance, table, history, noise, wanted, seen=None):
        arguments = x, m, uncond, guidance, table, None, history, noise, None, dtype, wanted
        return moved(lambda: triton.step(*arguments, model_input=seen))

    assert step(None, 1.0, table, (), None, (False, False)) == [("step", 2 * full + 72, full)]
    got = step(uncond, 7.5, table, history, None, (True, True))
    assert got == [("step", 3 * full + 2 * wide + 72, 2 * full + wide)]
    twice = torch.empty(2 * SAMPLES, *SHAPE[1:], dtype=dtype, device=DEVICE)
    got = step(uncond, row(), table.expand(3, 18).contiguous(), (), ops.Philox(1), (False, False), twice)
    assert got == [("step", 3 * full + 3 * 72 + ROWS, 3 * full)]


def test_small_launches():
    assert moved(lambda: triton.uniform(3, 5, 0, 0, DEVICE)) == [("coefficients", 0, 5 * 8)]
    program, t = trace(lambda t: {"a": 2 * t, "b": 1 / t}, 0.0, 1.0), torch.ones(SAMPLES, device=DEVICE)
    assert moved(lambda: triton.evaluate(program, t, torch.float32)) == [("coefficients", 8 + ROWS, 2 * ROWS)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("operation", ["noising", "loss", "loss+gradient", "training step", "sampler step"])
def test_the_bench_says_the_same_of_the_operands(operation, kind, dtype):
    """What it knows without a recorder, on a CPU, is what is full-size here; the rest is rows, and single numbers."""
    shape = (2, 4, 16, 16)
    case, o = Case(operation, kind, dtype, shape), operands(shape, dtype, DEVICE, 0)
    with fastdiff.use_backend("triton"):
        call = peers.build("fastdiff", case, DEVICE)
        call(o)
        with launches() as records:
            result = call(o)
    assert isinstance(result[0].noise_source, ops.Philox) if operation == "training step" else True
    known = counting.known_operands(case, o, result).bytes
    small = sum(record.bytes for record in records) - known
    assert 0 < small < 500 and known >= counting.floor_bytes(case)
    assert len(records) == {"loss+gradient": 2, "training step": 4}.get(operation, 1) + (
        kind == "flow" and operation == "noising"
    )


def test_the_bench_counts_what_moves():
    x0, n = data(), data()
    rows = row(), row()
    count = counting.recorded(lambda: triton.noise(x0, n, *rows, 0.0, None, False))
    assert count.bytes == 3 * ELEMENTS * 4 + 2 * ROWS
    assert (count.launches, count.by) == (1, "launch recorder")
    around = counting.recorded(lambda: triton.noise(x0, n, *rows, 0.0, None, False)[0] + 1)
    assert around.bytes == count.bytes + 2 * ELEMENTS * 4 and around.launches == count.launches + 1
    assert counting.recorded(lambda: x0 + 1) is None
