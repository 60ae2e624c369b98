"""losses.Combined: weighted sums of error functions against NumPy, in every backend."""

import math
import pickle

import numpy as np
import oracle
import pytest
import torch
from accuracy import assert_same, to_numpy
from devices import in_turn

import fastdiff
from fastdiff import losses, ops
from fastdiff.calls import Combination
from fastdiff.losses import Combined, Huber, PseudoHuber, SmoothL1

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SUMS = {
    "OneTrainer's": (
        Combined(mse=0.5, l1=0.3, log_cosh=0.2, huber=0.7),
        lambda e: 0.5 * oracle.loss_mse(e) + 0.3 * oracle.loss_l1(e) + 0.2 * oracle.loss_log_cosh(e)
        + 0.7 * oracle.loss_huber(e, 1.0),
    ),
    "two": (
        Combined((0.5, "mse"), (0.3, Huber(0.1))), lambda e: 0.5 * oracle.loss_mse(e) + 0.3 * oracle.loss_huber(e, 0.1)
    ),
    "all": (
        Combined((1, "mse"), (2, "l1"), (0.25, SmoothL1(0.6)), (3, PseudoHuber(0.2, "scaled")), (4, "log_cosh")),
        lambda e: oracle.loss_mse(e) + 2 * oracle.loss_l1(e) + 0.25 * oracle.loss_smooth_l1(e, 0.6)
        + 3 * oracle.loss_pseudo_huber(e, 0.2, "scaled") + 4 * oracle.loss_log_cosh(e),
    ),
    "one function twice": (
        Combined((0.5, Huber(0.4)), (1.5, SmoothL1(0.4)), (1, "log_cosh")),
        lambda e: 0.5 * oracle.loss_huber(e, 0.4) + 1.5 * oracle.loss_smooth_l1(e, 0.4) + oracle.loss_log_cosh(e),
    ),
}  # fmt: skip


@in_turn(name=list(SUMS), dtype=DTYPES, reduction=["none", "sum", "elements"])
def test_values(everywhere, name, dtype, reduction):
    loss, formula = SUMS[name]
    prediction, n = (torch.randn(4, 3, 5, 6).to(dtype) for _ in range(2))
    w, mask = torch.rand(4), torch.rand(4, 1, 5, 6) < 0.7
    got = ops.loss(prediction, None, n, q=1.0, weight=w, mask=mask, function=loss, reduction=reduction)
    e = to_numpy(prediction) - to_numpy(n)
    truth = to_numpy(w)[:, None, None, None] * to_numpy(mask) * formula(e)
    wanted = {"none": truth.mean((1, 2, 3)), "sum": truth.sum(), "elements": truth}[reduction]
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    np.testing.assert_allclose(to_numpy(got), wanted.astype(np.float64), rtol=32 * unit, atol=4 * unit)


def test_a_sum_worked_out_by_hand(everywhere):
    """Of e = 0.5 and e = -2: 2 e^2 + 3 abs(e) + 4 huber(e; 1)."""
    m = torch.tensor([[0.5], [-2.0]], requires_grad=True)
    loss = Combined((2, "mse"), (3, "l1"), (4, "huber"))
    found = ops.loss(m, None, None, function=loss, reduction="none")
    assert found.tolist() == [0.5 + 1.5 + 0.5, 8.0 + 6.0 + 6.0]
    found.backward(torch.tensor([1.0, 0.5]))
    assert m.grad.flatten().tolist() == [2.0 + 3.0 + 2.0, 0.5 * (-8.0 - 3.0 - 4.0)]


@pytest.mark.parametrize("name", ["mse", "l1", "smooth_l1", "huber", "pseudo_huber", "log_cosh"])
def test_one_of_strength_1_has_the_bits_of_that_function(everywhere, name):
    x0, m = torch.randn(2, 4, 3, 5, 6)
    kind = losses.get(name)
    for alone, combined in (
        (kind, Combined((1, name))),
        (kind, Combined(**{name: 1.0, "mse" if name != "mse" else "l1": 0})),
    ):
        found = []
        for loss in (alone, combined):
            objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", "cosmap", loss=loss)
            leaf = m.clone().requires_grad_()
            value = objective.loss(leaf, objective.noise(x0, seed=4))
            found.append((value, *torch.autograd.grad(value, leaf)))
        for a, b in zip(*found):
            assert_same(a, b)


def test_parts_of_strength_0_are_left_out_whatever_they_hold(everywhere):
    """An infinite error has an infinite L1, and no NaN of 0 times an infinite square."""
    m = torch.tensor([[math.inf, 1.0], [-math.inf, 1.0]], requires_grad=True)
    rows = ops.loss(m, None, None, function=Combined(l1=0.5, log_cosh=0.5, mse=0), reduction="none")
    assert rows.tolist() == [math.inf, math.inf]
    (gradient,) = torch.autograd.grad(rows.sum(), m)
    assert gradient[:, 0].tolist() == [0.5, -0.5]  # of a mean of two


@pytest.mark.parametrize("schedule", ["snr", "exponential"])
@pytest.mark.parametrize("process", [fastdiff.VariancePreserving(), fastdiff.RectifiedFlow()], ids=repr)
def test_a_constant_that_follows_the_level(everywhere, schedule, process):
    """One part's c by the time of each sample, beside another's that is a number."""
    c = PseudoHuber(0.1, "normalized", schedule)
    objective = fastdiff.Objective(process, "epsilon", loss=Combined((0.5, "mse"), (0.3, c), (2, Huber(0.3))))
    t = torch.tensor([10, 400, 900]) if process.discrete else torch.tensor([0.01, 0.4, 0.9])
    x0, m = torch.randn(2, 3, 4, 5, 6)
    noised = objective.noise(x0, t, seed=2)
    got = objective.loss(m.requires_grad_(), noised, reduction="none")
    alpha, sigma = (to_numpy(row) for row in process.alpha_sigma(t.double() if not process.discrete else t))
    of_row = oracle.pseudo_huber_c(
        schedule, 0.1, t=to_numpy(t), steps=process.steps if process.discrete else 1, alpha=alpha, sigma=sigma
    )
    e = to_numpy(m) - to_numpy(noised.noise)
    error = 0.5 * oracle.loss_mse(e) + 2 * oracle.loss_huber(e, 0.3)
    error = error + 0.3 * oracle.loss_pseudo_huber(e, np.asarray(of_row).reshape(3, 1, 1, 1), "normalized")
    np.testing.assert_allclose(to_numpy(got), error.mean((1, 2, 3)).astype(np.float64), rtol=1e-6)
    separately = 0
    for strength, part in ((0.5, "mse"), (0.3, c), (2, Huber(0.3))):
        other = fastdiff.Objective(process, "epsilon", loss=part)
        separately = separately + strength * other.loss(m, other.noise(x0, t, seed=2))
    mean = objective.loss(m, noised)
    gradients = [torch.autograd.grad(loss, m)[0] for loss in (mean, separately)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)


@in_turn(name=list(SUMS), reduction=["mean", "none", "elements"])
def test_gradcheck(backend, name, reduction):
    prediction, n = (torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def loss(prediction, n, weight):
        return ops.loss(prediction, None, n, q=0.5, weight=weight, function=SUMS[name][0], reduction=reduction)

    assert torch.autograd.gradcheck(loss, (prediction, n, weight))
    assert torch.autograd.gradcheck(lambda m: loss(m, n.detach(), weight.detach()), prediction)


def test_second_and_forward_derivatives(backend):
    """By the error, and by the c of a row."""
    smooth = Combined((0.5, "mse"), (0.3, PseudoHuber(0.4)), (2, "log_cosh"))
    m = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda m: ops.loss(m, None, None, function=smooth), m)
    vmapped = torch.func.vmap(torch.func.grad(lambda m: ops.loss(m, None, None, function=smooth)))(m[:, None])
    torch.testing.assert_close(
        vmapped[:, 0] / 3, torch.func.grad(lambda m: ops.loss(m, None, None, function=smooth))(m)
    )
    from fastdiff.backends.reference.error_functions import Error

    c = torch.tensor([[0.3], [0.7], [2.0]], dtype=torch.float64, requires_grad=True)
    for parts in (
        Combination(mse=0.5, smooth_l1=0.4, c_smooth_l1=None),
        Combination(l1=1.0, pseudo_huber=2.0, c_pseudo_huber=None),
    ):
        assert torch.autograd.gradcheck(
            lambda e, c, parts=parts: Error.apply(e, c, parts), (m, c), check_forward_ad=True
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_is_rounded_once(everywhere, dtype):
    """Under any loss scaling: it is the float32 one, rounded."""
    prediction, n = (torch.randn(4, 3, 5, 6).to(dtype) for _ in range(2))
    for scale in (1.0, 65536.0, -3.0):
        found = []
        for m in (prediction, prediction.float()):
            leaf = m.detach().requires_grad_()
            (ops.loss(leaf, None, n, q=1.0, function=SUMS["all"][0]) * scale).backward()
            found.append(leaf.grad)
        assert torch.equal(found[0], found[1].to(dtype))


def test_fields_are_the_functions_in_their_order():
    assert Combination._fields == (*losses.FUNCTIONS, *(f"c_{name}" for name in losses.NEED_C))
    assert Combined((0.5, "l1"), (2, Huber(0.25))).function == Combination(l1=0.5, smooth_l1=0.5, c_smooth_l1=0.25)


def test_it_is_its_parts():
    """Equal, hashed and shown by them; copies too."""
    loss = Combined((0.5, "mse"), (0.3, Huber(0.1)))
    assert loss == Combined((0.3 + 0.2, losses.MSE()), (0.3, Huber(0.1)), l1=0) and hash(loss) == hash(
        pickle.loads(pickle.dumps(loss))
    )
    assert loss != Combined((0.5, "mse"), (0.4, Huber(0.1)))
    assert eval(repr(loss), {name: getattr(losses, name) for name in losses.__all__}) == loss
    assert pickle.loads(pickle.dumps(loss)).function == loss.function
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", loss=loss)
    assert "Combined((0.5, MSE()), (0.3, Huber(delta=0.1)))" in repr(objective)
    assert "a program of" in objective.explain()
    m, x0, n = torch.randn(3, 2, 3, 4)
    t = torch.tensor([0.2, 0.7])
    assert_same(
        fastdiff.diffusion_loss(m, x0, n, t, fastdiff.RectifiedFlow(), "flow", loss=loss),
        objective.loss(m, objective.noise(x0, t, n)),
    )


class Unsteady(losses.Loss):
    """One's own: its factor follows the level, as ``rows`` alone knows."""

    function = "mse"

    def rows(self, levels):
        return None, levels.alpha


class Own(losses.Loss):
    """One's own: as above, but its c does, and its factor is known."""

    function = "pseudo_huber"

    def numbers(self):
        return None, 2.0

    def rows(self, levels):
        return levels.sigma + 0.1, 2.0


def test_an_error_function_of_ones_own(everywhere):
    objective = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", loss=Combined((0.5, "l1"), (0.25, Own())))
    m, x0 = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    noised = objective.noise(x0, t, seed=1)
    e = to_numpy(m - noised.target)
    truth = 0.5 * np.abs(e) + 0.5 * oracle.loss_pseudo_huber(e, to_numpy(t)[:, None, None] + 0.1)
    np.testing.assert_allclose(to_numpy(objective.loss(m, noised)), truth.mean().astype(float), rtol=1e-13)


class Scheduled(Huber):
    """One's own: what the class that it is made of says of numbers is not true of it."""

    def rows(self, levels):
        return levels.sigma + self.delta, 1.0


class OwnSmooth(Own):
    function = "smooth_l1"


WRONG = {
    "nothing": (lambda: Combined(), ValueError, "strength above 0"),
    "all of strength 0": (lambda: Combined(mse=0, l1=0.0), ValueError, "strength above 0"),
    "a negative strength": (lambda: Combined(mse=1, l1=-0.5), ValueError, r"strength of L1\(\) must be.*got -0.5"),
    "a strength of NaN": (lambda: Combined(mse=math.nan), ValueError, "got nan"),
    "an infinite strength": (lambda: Combined(mse=math.inf), ValueError, "got inf"),
    "a strength in words": (lambda: Combined(mse="half"), TypeError, "strength of MSE.*must be a number; got 'half'"),
    "an unknown name": (lambda: Combined(hubber=1.0), ValueError, "did you mean 'huber'"),
    "no pair": (lambda: Combined("mse", "l1"), TypeError, r'\(0.3, "l1"\); got \'mse\''),
    "a pair the other way round": (lambda: Combined(("mse", 0.5)), TypeError, "loss must be one of.*got 0.5"),
    "one in another": (lambda: Combined((1, Combined(mse=1))), ValueError, "write their parts in one"),
    "two constants": (
        lambda: Combined((1, Huber(0.1)), (1, SmoothL1(0.2))), ValueError, "one function with two constants"),
    "a number and a schedule": (
        lambda: Combined((1, PseudoHuber(0.1)), (1, PseudoHuber(0.1, schedule="snr"))), ValueError, "two constants"),
    "two schedules": (
        lambda: Combined((1, PseudoHuber(0.1, schedule="snr")), (1, PseudoHuber(0.2, schedule="snr"))),
        ValueError, "two constants"),
    "two of one's own": (
        lambda: Combined((1, Own()), (1, OwnSmooth())), ValueError, "only one part of a Combined may"),
    "half the mean squared error in a variational bound": (
        lambda: fastdiff.VariationalBound(fastdiff.Objective(fastdiff.VariancePreserving(), loss=Combined(mse=0.5))),
        ValueError, "must be 'mse'; got Combined"),
    "a factor that follows the level": (
        lambda: Combined((1, "mse"), (1, PseudoHuber(0.1, "scaled", "snr"))), ValueError, "normalized"),
    "rows of one's own": (lambda: Combined((1, "l1"), (1, Scheduled())), ValueError, "factor that follows the level"),
    "one's own in an operation": (
        lambda: ops.loss(torch.ones(2, 3), None, None, function=Scheduled()), ValueError, "use an Objective"),
    "one's own factor": (lambda: Combined((1, "l1"), (1, Unsteady())), ValueError, "factor that follows the level"),
    "a constant beside it": (
        lambda: ops.loss(torch.ones(2, 3), None, None, function=Combined(mse=1, l1=1), c=0.5),
        ValueError, "leave c out"),
    "a schedule in an operation": (
        lambda: ops.loss(torch.ones(2, 3), None, None, function=PseudoHuber(0.1, schedule="snr")),
        ValueError, "use an Objective"),
    "a class": (
        lambda: ops.loss(torch.ones(2, 3), None, None, function=losses.MSE), ValueError, "function must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        call()


def test_an_operation_takes_an_error_function_with_its_constants(everywhere):
    m, n = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    with_c = ops.loss(m, None, n, q=1.0, weight=0.3, c=0.3, function="smooth_l1")
    assert_same(ops.loss(m, None, n, q=1.0, function=Huber(0.3)), with_c)
    assert_same(ops.loss(m, None, n, q=1.0, weight=torch.ones(2), function=Huber(0.3), reduction="none").mean(), with_c)
