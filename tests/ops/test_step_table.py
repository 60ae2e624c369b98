"""Prepared rows give what the operations give, to the bit, on every backend and for whatever tensors come."""

import copy
import pickle

import pytest
import torch

from fastdiff import ops

K = len(ops.COLUMNS)
SHAPE = (2, 3, 4, 5)


def table(rows=5):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tensors(count, dtype, shape=SHAPE):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]


def same(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b):
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == right.dtype and torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("history", [0, 2, 4])
@pytest.mark.parametrize("noisy, learned, clip", [(False, False, None), (True, False, 1.0), (True, True, 0.5)])
@pytest.mark.parametrize("entry", [False, True])
def test_a_row_is_a_step(backend, dtype, history, noisy, learned, clip, entry):
    prepared = ops.PreparedSteps(table())
    x, m, z, v, *past = tensors(4 + history, dtype)
    given = {
        "clip": clip,
        "history": past,
        "noise": z if noisy else None,
        "log_variance": v if learned else None,
        "return_entry": entry,
    }
    for k in (0, 3):
        same(prepared(k, x, m, **given), ops.step(x, m, table()[k], **given))


@pytest.mark.parametrize("kind", ["transposed", "parameter", "empty", "differentiable", "mixed"])
def test_a_row_of_whatever_comes(backend, kind):
    prepared = ops.PreparedSteps(table())
    x, m = tensors(2, torch.float32)
    if kind == "transposed":
        m = m.transpose(2, 3).contiguous().transpose(2, 3)
    elif kind == "parameter":
        m = torch.nn.Parameter(m, requires_grad=False)
    elif kind == "empty":
        x, m = x[:0], m[:0]
    elif kind == "differentiable":
        m.requires_grad_()
    else:
        m = m.bfloat16()
    got, expected = prepared(1, x, m), ops.step(x, m, table()[1], return_entry=False)
    same(got, expected)
    if kind == "differentiable":
        (gradient,) = torch.autograd.grad(got[0].sum(), m)
        row = dict(zip(ops.COLUMNS, table()[1].float()))
        torch.testing.assert_close(gradient, (row["c_m"] + row["c_x0"] * row["p_m"]).expand(SHAPE))


def test_the_result_in_another_dtype(backend):
    x, m = tensors(2, torch.float32)
    y, x0, _ = ops.PreparedSteps(table())(2, x, m.bfloat16(), dtype=torch.bfloat16)
    expected = ops.step(x, m.bfloat16(), table()[2], return_entry=False)
    assert y.dtype == x0.dtype == torch.bfloat16
    assert torch.equal(y, expected[0].bfloat16()) and torch.equal(x0, expected[1].bfloat16())


def test_a_threshold(backend):
    x, m = tensors(2, torch.float32)
    s = torch.tensor([0.5, 1.5])
    got = ops.PreparedSteps(table())(0, x, m, threshold=s)
    same(got, ops.step(x, m, table()[0], threshold=s, return_entry=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [3, [1, 4], [2, 2], [0], [-1, 0]])
def test_noise_of_rows(backend, dtype, index):
    rows = torch.randn(5, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x0, n = tensors(2, dtype)
    if isinstance(index, int):
        alpha, sigma = rows[index]
    else:
        index = torch.tensor(index)
        alpha, sigma = rows[index].expand(2, 2).unbind(-1)
    got = ops.PreparedNoise(rows)(index, x0, n)
    assert got.dtype == dtype and torch.equal(got, ops.noise(x0, alpha, sigma, n)[0])


def test_noise_for_other_tensors(backend):
    rows = torch.randn(5, 2, dtype=torch.float64)
    x0, n = tensors(2, torch.float32)
    index = torch.tensor([0, 3])
    alpha, sigma = rows[index].unbind(-1)
    expected = ops.noise(x0, alpha, sigma, n)[0]
    prepared = ops.PreparedNoise(rows)
    assert torch.equal(prepared(index.int(), x0, n), expected)
    assert torch.equal(prepared(index, x0.transpose(2, 3).contiguous().transpose(2, 3), n), expected)
    x0.requires_grad_()
    (gradient,) = torch.autograd.grad(prepared(index, x0, n).sum(), x0)
    torch.testing.assert_close(gradient, alpha.float().view(2, 1, 1, 1).expand(SHAPE))


def test_wrong_input(backend):
    x, m = tensors(2, torch.float32)
    with pytest.raises(ValueError, match=r"table must be \[rows, 2\]"):
        ops.PreparedNoise(torch.zeros(3, 3, dtype=torch.float64))
    steps, noise = ops.PreparedSteps(table()), ops.PreparedNoise(torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="they must be equal"):
        steps(0, x, m[:1])
    with pytest.raises(ValueError, match="they must be equal"):
        steps(0, x, m, noise=m[..., :2])
    with pytest.raises(TypeError, match="floating point"):
        steps(0, x.int(), m)
    with pytest.raises(ValueError, match="clip"):
        steps(0, x, m, clip=-1.0)
    with pytest.raises(IndexError):
        steps(5, x, m)
    with pytest.raises(ValueError, match="they must be equal"):
        noise(0, x, m[:1])
    for index in (3, torch.tensor([0, 3])):
        with pytest.raises(IndexError):
            noise(index, x, m)


def test_copies_share_no_memory(backend):
    """What is kept for the launches points into the table: a copy must find its own."""
    x, m = tensors(2, torch.float32)
    first = ops.PreparedSteps(table())
    expected = first(1, x, m)[0]
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert not other.held
        assert torch.equal(other(1, x, m)[0], expected)
