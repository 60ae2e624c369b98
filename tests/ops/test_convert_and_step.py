"""ops.convert and ops.step: values, dtypes, rows, history, learned variance, autograd."""

import numpy as np
import pytest
import torch
from accuracy import assert_rounded, to_numpy
from devices import on_every_device

from fastdiff import ops

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def row(**columns):
    """A row of coefficients in which what is not named is 0."""
    return torch.tensor([columns.get(name, 0.0) for name in ops.COLUMNS], dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_convert_values(dtype):
    m, x_t = (torch.randn(4, 3, 5).to(dtype) for _ in range(2))
    k_x, k_m = torch.randn(2, 4, dtype=torch.float64)
    got = ops.convert(m, x_t, k_x, k_m)
    assert got.dtype == dtype
    a, b = (to_numpy(k)[:, None, None] for k in (k_x, k_m))
    terms = np.abs(a * to_numpy(x_t)) + np.abs(b * to_numpy(m))
    assert_rounded(got, a * to_numpy(x_t) + b * to_numpy(m), terms, operations=3)


def test_convert_gradcheck():
    m, x_t = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    k_x, k_m = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(ops.convert, (m, x_t, k_x, k_m))


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_step_does_what_its_table_says(dtype, batched, clip, device):
    x, m, uncond, z, *history = (torch.randn(3, 2, 5, device=device).to(dtype) for _ in range(8))
    table = torch.randn(3, len(ops.COLUMNS), dtype=torch.float64, device=device)
    rows = table if batched else table[0]
    how = {"uncond": uncond, "guidance": 2.5, "clip": clip, "history": history, "noise": z}
    y, x0, entry = ops.step(x, m, rows, **how)

    x, m, uncond, z, *history = (to_numpy(tensor) for tensor in (x, m, uncond, z, *history))
    c = {name: to_numpy(rows)[..., k] for k, name in enumerate(ops.COLUMNS)}
    c = {name: value[:, None, None] if batched else value for name, value in c.items()}
    guided = uncond + 2.5 * (m - uncond)
    raw = c["p_x"] * x + c["p_m"] * guided
    expected = np.clip(raw, -0.5, 0.5) if clip else raw
    size = 4 * (np.abs(uncond) + 2.5 * (np.abs(m) + np.abs(uncond)))
    x0_size = np.abs(c["p_x"] * x) + np.abs(c["p_m"]) * size
    assert_rounded(x0, expected, x0_size, operations=6)
    terms = [
        c["c_x"] * x,
        c["c_m"] * guided,
        c["c_x0"] * expected,
        c["c_noise"] * z,
        *(c[f"c_h{j}"] * h for j, h in enumerate(history, 1)),
    ]
    terms_size = sum(np.abs(term) for term in terms) + np.abs(c["c_m"]) * size + np.abs(c["c_x0"]) * x0_size
    assert_rounded(y, sum(terms), terms_size, operations=12)
    kept = c["h_x"] * x + c["h_m"] * guided + c["h_x0"] * expected
    kept_size = np.abs(c["h_x"] * x) + np.abs(c["h_m"]) * size + np.abs(c["h_x0"]) * x0_size
    assert_rounded(entry, kept, kept_size, operations=8)
    assert y.dtype == x0.dtype == dtype and entry.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_what_is_not_wanted_is_none():
    x = torch.randn(2, 3)
    full = ops.step(x, x, row(p_x=1.0, c_x0=2.0, h_x=1.0))
    y, x0, entry = ops.step(x, x, row(p_x=1.0, c_x0=2.0, h_x=1.0), return_x0=False, return_entry=False)
    assert x0 is None and entry is None and torch.equal(y, full[0])


def test_learned_variance_scales_the_noise():
    x, m, z, v = torch.randn(4, 2, 3, dtype=torch.float64)
    y, _, _ = ops.step(x, m, row(c_noise=2.0, l_0=-1.0, l_v=0.5), noise=z, log_variance=v)
    torch.testing.assert_close(y, 2 * torch.exp((-1 + 0.5 * v) / 2) * z)


def test_no_noise_means_none_is_added():
    x = torch.randn(2, 3)
    assert torch.equal(ops.step(x, x, row(c_x=1.0, c_noise=5.0))[0], x)


def test_guidance_by_row():
    x, m, uncond = torch.randn(3, 4, 5)
    scale = torch.tensor([0.0, 1.0, 2.0, 7.5])
    y, _, _ = ops.step(x, m, row(c_m=1.0), uncond=uncond, guidance=scale)
    torch.testing.assert_close(y, uncond + scale[:, None] * (m - uncond))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_the_output(value):
    x, m = torch.zeros(2, 2, 3)
    x[0, 1] = value
    y, x0, _ = ops.step(x, m, row(p_x=1.0, c_x0=1.0, c_x=1.0))
    assert not y[0, 1].isfinite() and not x0[0, 1].isfinite() and int(y.isfinite().sum()) == 5
    assert not ops.convert(m, x, 1.0, 1.0)[0, 1].isfinite()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4)])
def test_zero_size(shape):
    x = torch.empty(shape)
    y, x0, entry = ops.step(x, x, row(c_x=1.0))
    assert y.shape == x0.shape == entry.shape == ops.convert(x, x, 1.0, 1.0).shape == shape


def test_step_gradcheck():
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    table = torch.randn(len(ops.COLUMNS), dtype=torch.float64)

    def step(x, m, uncond, z, v, h):
        how = {"uncond": uncond, "guidance": 1.5, "noise": z, "log_variance": v, "history": [h]}
        return ops.step(x, m, table, **how)

    assert torch.autograd.gradcheck(step, inputs)
