"""ops.noise and the noise it makes: values, dtypes, rows, layouts, autograd."""

import numpy as np
import pytest
import torch
from accuracy import assert_rounded, to_numpy
from devices import on_every_device
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff import ops

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_noise_equals_float64_up_to_one_rounding(dtype):
    x0, n = (torch.randn(5, 3, 7, 9).to(dtype) for _ in range(2))
    alpha, sigma = torch.rand(2, 5, dtype=torch.float64)
    x_t, kept = ops.noise(x0, alpha, sigma, n)
    assert x_t.dtype == dtype and kept is n
    # Coefficients reach the arithmetic rounded once to the compute dtype: 2 terms x (coefficient, product) + 1 sum.
    a, s = (to_numpy(row)[:, None, None, None] for row in (alpha, sigma))
    terms = np.abs(a * to_numpy(x0)) + np.abs(s * to_numpy(n))
    assert_rounded(x_t, a * to_numpy(x0) + s * to_numpy(n), terms, operations=3)


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=5), rows=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_rows_of_any_leading_dimensions(shape, rows, seed):
    torch.manual_seed(seed)
    rows = min(rows, len(shape))
    x0, n = torch.randn(2, *shape)
    alpha, sigma = torch.rand(2, *shape[:rows])
    x_t, _ = ops.noise(x0, alpha, sigma, n)
    view = shape[:rows] + [1] * (len(shape) - rows)
    torch.testing.assert_close(x_t, alpha.view(view) * x0 + sigma.view(view) * n, rtol=0, atol=0)


def test_rows_of_frames_behind_the_channels():
    x0, n = torch.randn(2, 2, 4, 6, 5, 5)  # two videos of 4 channels and 6 frames
    alpha, sigma = torch.rand(2, 2, 6)
    with pytest.raises(ValueError, match=r"\(2, 1, 6, 1, 1\)"):
        ops.noise(x0, alpha, sigma, n)
    x_t, _ = ops.noise(x0, alpha.view(2, 1, 6, 1, 1), sigma.view(2, 1, 6, 1, 1), n)
    for frame in range(6):
        expected, _ = ops.noise(x0[:, :, frame], alpha[:, frame], sigma[:, frame], n[:, :, frame])
        assert torch.equal(x_t[:, :, frame], expected)


@on_every_device
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded", "sliced"])
def test_any_strides(layout, device):
    x0, n = torch.randn(2, 4, 3, 6, 6, device=device)
    change = {
        "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
        "sliced": lambda x: torch.cat([x, x], -1)[..., ::2],
    }[layout]
    alpha, sigma = torch.rand(2, 4, device=device)
    a, b = change(x0), change(n)
    torch.testing.assert_close(
        ops.noise(a, alpha, sigma, b)[0],
        ops.noise(a.contiguous(), alpha, sigma, b.contiguous())[0],
        rtol=0,
        atol=0,
    )


@on_every_device
def test_batch_of_8_is_4_and_4(device):
    """Noise and t of a sample depend on the seed and its index alone."""
    objective = fastdiff.Objective(
        fastdiff.VariancePreserving(), "v_prediction", noise_offset=0.1, input_perturbation=0.1
    )
    x0 = torch.randn(8, 3, 5, 5, device=device)
    whole = objective.noise(x0, seed=5)
    halves = [objective.noise(x0[:4], seed=5), objective.noise(x0[4:], seed=5, sample_offset=4)]
    for name in ("x_t", "t", "noise", "target", "weight"):
        parts = torch.cat([getattr(half, name) for half in halves])
        assert torch.equal(getattr(whole, name), parts), name


@pytest.mark.parametrize("process", [fastdiff.VariancePreserving(), fastdiff.RectifiedFlow()])
def test_noise_that_is_not_kept_is_made_again(process):
    prediction = "v_prediction" if process.discrete else "flow"
    objective = fastdiff.Objective(process, prediction, noise_offset=0.1, input_perturbation=0.1)
    x0, m = torch.randn(2, 4, 3, 5)
    kept, remade = (objective.noise(x0, seed=1, keep_noise=keep) for keep in (True, False))
    assert isinstance(remade.noise_source, ops.Philox) and isinstance(kept.noise_source, torch.Tensor)
    for name in ("x_t", "t", "noise", "target"):
        assert torch.equal(getattr(kept, name), getattr(remade, name)), name
    assert torch.equal(objective.loss(m, kept), objective.loss(m, remade))
    given = objective.noise(x0, noise=m, keep_noise=False)
    assert given.noise is m


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_target_written_with_the_noise(prediction):
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), prediction, input_perturbation=0.1)
    x0 = torch.randn(2, 3, 3, 5).bfloat16()
    given = torch.randn(2, 3, 3, 5)
    for noise, keep in ((None, True), (None, False), (given, True)):
        plain, with_target = (
            objective.noise(x0, noise=noise, seed=1, keep_noise=keep, with_target=wanted) for wanted in (False, True)
        )
        assert plain.written_target is None and with_target.target is with_target.written_target
        for name in ("x_t", "noise", "target"):
            assert torch.equal(getattr(plain, name), getattr(with_target, name)), name
        assert with_target.target.dtype == x0.dtype
    leaf = x0.float().requires_grad_()
    gradients = [
        torch.autograd.grad((n.x_t + n.target).sum(), leaf)[0]
        for n in (objective.noise(leaf, seed=1, with_target=wanted) for wanted in (False, True))
    ]
    assert torch.equal(*gradients)


def test_seeds_and_generators():
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow")
    x0 = torch.randn(3, 2, 4)
    first = objective.noise(x0, generator=torch.Generator().manual_seed(1))
    again = objective.noise(x0, generator=torch.Generator().manual_seed(1))
    other = objective.noise(x0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first.x_t, again.x_t) and torch.equal(first.t, again.t)
    assert not torch.equal(first.noise, other.noise) and not torch.equal(first.t, other.t)
    torch.manual_seed(3)
    a, b = objective.noise(x0), objective.noise(x0)
    torch.manual_seed(3)
    assert torch.equal(objective.noise(x0).x_t, a.x_t) and not torch.equal(a.x_t, b.x_t)
    with pytest.raises(ValueError, match="not both"):
        objective.noise(x0, generator=torch.Generator(), seed=1)


def test_given_noise_and_t_draw_nothing():
    """A trainer that passes its own t and noise keeps its random numbers as they were."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving())
    x0 = torch.randn(2, 3)
    state = torch.get_rng_state()
    objective.noise(x0, torch.tensor([1, 2]), torch.zeros_like(x0))
    torch.set_rng_state(state)
    before = torch.get_rng_state()
    objective.noise(x0, torch.tensor([1, 2]), x0)
    assert torch.equal(before, torch.get_rng_state())


def test_seed_as_tensor_of_any_64_bits():
    x0 = torch.zeros(2, 8)
    one, _ = ops.noise(x0, 0.0, 1.0, ops.Philox(-1))
    same, _ = ops.noise(x0, 0.0, 1.0, ops.Philox(torch.tensor([-1])))
    assert torch.equal(one, same)
    high, _ = ops.noise(x0, 0.0, 1.0, ops.Philox(1 << 40))
    low, _ = ops.noise(x0, 0.0, 1.0, ops.Philox(0))
    assert not torch.equal(high, low), "the high word of the seed must matter"


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (0,)])
def test_zero_size(shape):
    x_t, n = ops.noise(torch.empty(shape), torch.ones(shape[0]), 1.0, ops.Philox(0))
    assert x_t.shape == n.shape == shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_reach_the_output(value, dtype):
    x0, n = torch.zeros(2, 2, 3, dtype=dtype)
    x0[1, 2] = value
    x_t, _ = ops.noise(x0, 0.5, 0.5, n)
    assert not x_t[1, 2].isfinite() and int(x_t.isfinite().sum()) == 5


def test_noise_is_the_same_in_every_dtype():
    made = [ops.noise(torch.zeros(2, 9, dtype=d), 1.0, 1.0, ops.Philox(3))[1] for d in DTYPES]
    assert made[0].dtype == torch.float32 and made[3].dtype == torch.float64
    for n in made[1:]:
        assert torch.equal(n.double(), made[0].double())


def test_gradcheck():
    x0, n = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    alpha, sigma = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *a: ops.noise(*a)[0], (x0, alpha, sigma, n))
    assert torch.autograd.gradcheck(lambda x: ops.noise(x, 0.3, 0.7, ops.Philox(1))[0], (x0,))
