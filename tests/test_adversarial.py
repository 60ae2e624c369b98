"""Adversarial losses, against formulas in NumPy; and the discriminator's own step, written out."""

import numpy as np
import pytest
import torch
from accuracy import to_numpy
from oracle import assert_close
from torch import nn

import fastdiff
from fastdiff.losses import adversarial
from fastdiff.losses.adversarial import Discriminator, discriminator_loss, generator_loss, r1_penalty


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.longdouble)))


# The losses of the papers, of logits [B, ...].
GENERATOR = {
    "non_saturating": lambda fake: -np.log(sigmoid(fake)),
    "hinge": lambda fake: -fake,
    "minmax": lambda fake: np.log(1 - sigmoid(fake)),
}
DISCRIMINATOR = {
    "non_saturating": lambda real, fake: -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean(),
    "hinge": lambda real, fake: -np.minimum(0, real - 1).mean() - np.minimum(0, -fake - 1).mean(),
    "minmax": lambda real, fake: -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean(),
}


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Softplus(), nn.Linear(5, 2)).double()


def data(batch=4):
    return torch.randn(batch, 3, 2, 2, dtype=torch.float64)


def sgd(module, rate=0.1):
    return torch.optim.SGD(module.parameters(), rate)


# --------------------------------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("kind", adversarial.KINDS)
def test_the_losses_are_those_of_the_papers(kind, shape):
    fake, real = (3 * torch.randn(*shape, dtype=torch.float64) for _ in range(2))
    a, b = (to_numpy(x).reshape(5, -1) for x in (fake, real))
    assert_close(to_numpy(generator_loss(fake, kind)), GENERATOR[kind](a).mean(1), rel=1e-12)
    assert_close(to_numpy(discriminator_loss(real, fake, kind)), DISCRIMINATOR[kind](b, a), rel=1e-12)
    assert_close(to_numpy(discriminator_loss(real[:2], fake, kind)), DISCRIMINATOR[kind](b[:2], a), rel=1e-12)


def test_the_default_does_not_saturate():
    logits = torch.tensor([-200.0, 0.0, 200.0], dtype=torch.float64, requires_grad=True)
    found = generator_loss(logits)
    assert_close(to_numpy(found), [200, np.log(2), 0], rel=1e-14, absolute=1e-80)
    (slope,) = torch.autograd.grad(found.sum(), logits)
    assert_close(to_numpy(slope), [-1, -0.5, 0], rel=1e-14, absolute=1e-80)
    (slope,) = torch.autograd.grad(generator_loss(logits, "minmax").sum(), logits)
    assert_close(to_numpy(slope), [0, -0.5, -1], rel=1e-14, absolute=1e-80)
    assert discriminator_loss(logits, -logits).item() == pytest.approx(2 * (200 + np.log(2)) / 3)


def test_logits_of_bfloat16_are_taken_in_float32():
    logits = torch.randn(4).bfloat16()
    for kind in adversarial.KINDS:
        assert torch.equal(generator_loss(logits, kind), generator_loss(logits.float(), kind))
        assert discriminator_loss(logits, logits, kind).dtype == torch.float32


@pytest.mark.parametrize("gamma", [10.0, 0.3])
def test_the_penalty_of_a_quadratic(gamma):
    """D(x) = a . x + x . x / 2, whose gradient is a + x."""
    a, real = data(1)[0], data()
    found = r1_penalty(lambda x: (a * x + x * x / 2).flatten(1).sum(1), real, gamma)
    expected = gamma / 2 * ((to_numpy(a) + to_numpy(real)) ** 2).sum((1, 2, 3)).mean()
    assert_close(to_numpy(found), expected, rel=1e-13)


def test_the_penalty_reaches_the_parameters():
    d, real = network(), data()
    parameters = tuple(d.parameters())

    def penalty(*_):
        return r1_penalty(d, real, 2.0)

    assert torch.autograd.gradcheck(penalty, parameters)
    assert torch.equal(r1_penalty(d, real), r1_penalty(d, real, 10.0)) and not real.requires_grad
    with torch.no_grad():
        assert r1_penalty(d, real).requires_grad
    conditional = r1_penalty(lambda x, y: d(x) * y, real, 2.0, 3.0)
    assert_close(to_numpy(conditional), 9 * to_numpy(penalty()), rel=1e-12)


# ---------------------------------------------------------------------------------------------------- the discriminator


@pytest.mark.parametrize("kind", adversarial.KINDS)
def test_the_generators_loss_moves_the_network_and_not_the_discriminator(kind):
    d = network()
    critic = Discriminator(d, sgd(d), kind)
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction")
    noised = objective.noise(data(), torch.tensor([100, 300, 500, 900]), seed=1)

    def loss(prediction):
        return critic(objective.predict_x0(prediction, noised))

    prediction = data().requires_grad_()
    found = loss(prediction)
    estimate = objective.predict_x0(prediction, noised)
    assert_close(to_numpy(found), GENERATOR[kind](to_numpy(d(estimate))).mean(1), rel=1e-12)
    found.sum().backward()
    assert prediction.grad.any() and all(part.grad is None and part.requires_grad for part in d.parameters())
    assert torch.equal(critic.seen, estimate) and not critic.seen.requires_grad
    assert torch.autograd.gradcheck(loss, prediction)


@pytest.mark.parametrize("kind", adversarial.KINDS)
def test_a_step_is_one_of_gradient_descent_on_its_loss(kind):
    d, real, fake = network(), data(), data(3).requires_grad_()
    critic = Discriminator(d, sgd(d), kind, r1_gamma=0.7)
    weight = d[1].weight.detach().clone()
    expected = torch.tensor(DISCRIMINATOR[kind](*(to_numpy(d(x)) for x in (real, fake))).astype(float))
    penalty = r1_penalty(d, real, 0.7)
    loss = discriminator_loss(d(real), d(fake.detach()), kind) + penalty
    (slope,) = torch.autograd.grad(loss, d[1].weight)
    d[1].weight.grad = torch.full_like(weight, 1e6)  # of an earlier step: it does not count
    values = critic.step(real, fake)
    torch.testing.assert_close(d[1].weight.detach(), weight - 0.1 * slope, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(values["discriminator"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(values["r1"], penalty.detach(), rtol=1e-12, atol=0)
    assert not any(value.requires_grad for value in values.values()) and fake.grad is None


def test_a_lazy_penalty_counts_as_often_as_it_is_left_out():
    d, real, fake = network(), data(), data()
    critic = Discriminator(d, sgd(d, 0.0), r1_gamma=0.7, r1_every=3)
    plain = Discriminator(d, sgd(d, 0.0))
    gradients, names = [], []
    for _ in range(4):
        names.append(list(critic.step(real, fake)))
        gradients.append(d[1].weight.grad.clone())
    plain.step(real, fake)
    base = d[1].weight.grad.clone()
    (slope,) = torch.autograd.grad(3 * r1_penalty(d, real, 0.7), d[1].weight)
    with_penalty, without = ["discriminator", "r1"], ["discriminator"]
    assert names == [with_penalty, without, without, with_penalty]
    assert torch.equal(gradients[1], base) and torch.equal(gradients[2], base)
    for gradient in (gradients[0], gradients[3]):
        torch.testing.assert_close(gradient, base + slope, rtol=1e-12, atol=1e-14)


def test_a_conditional_discriminator():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.label = network(), nn.Embedding(3, 2).double()

        def forward(self, x, y):
            return (self.net(x) * self.label(y)).sum(1)

    d, real, fake, y = Conditional(), data(), data(), torch.tensor([0, 2, 1, 2])
    critic = Discriminator(d, sgd(d), "hinge", r1_gamma=0.5, conditional=True)
    torch.testing.assert_close(critic(fake, y), -d(fake, y).detach())
    expected = discriminator_loss(d(real, y), d(fake, y), "hinge").detach()
    penalty = r1_penalty(d, real, 0.5, y).detach()
    values = critic.step(real, fake, y)
    torch.testing.assert_close(values, {"discriminator": expected, "r1": penalty})
    with pytest.raises(TypeError, match="needs condition="):
        critic(fake)
    with pytest.raises(TypeError, match="needs condition="):
        critic.step(real, fake)
    # One that is not conditional passes over a condition that is there for others.
    d = network()
    assert torch.equal(Discriminator(d, sgd(d))(fake, y), Discriminator(d, sgd(d))(fake))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("kind", adversarial.KINDS)
def test_what_a_sample_that_is_left_out_holds_reaches_nothing(kind, bad):
    real, x = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    kept = torch.tensor([True, False, True])
    fake = torch.where(kept[:, None], x, bad).requires_grad_()
    made = []
    for given in ((fake, kept), (x[kept], None)):
        d = nn.Linear(3, 2).double()
        nn.init.constant_(d.weight, 0.3)
        nn.init.constant_(d.bias, -0.1)
        critic = Discriminator(d, sgd(d), kind)
        each = critic(given[0], kept=given[1])
        if given[1] is not None:
            assert each[kept].isfinite().all()
            (slope,) = torch.autograd.grad(each[kept].sum(), fake)
            assert slope.isfinite().all() and slope[kept].any() and not slope[1].any()
        made.append((critic.step(real), d.weight.detach(), d.bias.detach()))
    torch.testing.assert_close(*made, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("kind", adversarial.KINDS)
def test_the_loss_of_logits_that_are_left_out_has_no_gradient(kind, bad):
    real, x, kept = torch.randn(2, 5).double(), torch.randn(3, 5).double(), torch.tensor([True, False, True])
    fake = torch.where(kept[:, None], x, bad).requires_grad_()
    found = discriminator_loss(real, fake, kind, kept)
    assert_close(to_numpy(found), DISCRIMINATOR[kind](to_numpy(real), to_numpy(x[kept])), rel=1e-12)
    (slope,) = torch.autograd.grad(found, fake)
    assert slope.isfinite().all() and slope[kept].any() and not slope[1].any()


def test_two_networks_learn_a_distribution():
    """A generator that shifts normal noise finds the mean 3 of the data; without the critic's steps it does not."""
    shifts = {}
    for trained in (True, False):
        torch.manual_seed(0)
        shift = nn.Parameter(torch.zeros(1))
        d = nn.Sequential(nn.Linear(1, 16), nn.Softplus(), nn.Linear(16, 1))
        critic = Discriminator(d, torch.optim.Adam(d.parameters(), 0.02, (0.0, 0.99)), r1_gamma=0.2, r1_every=2)
        optimizer = torch.optim.Adam([shift], 0.05, (0.0, 0.99))
        for _ in range(200):
            loss = critic(torch.randn(128, 1) + shift).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if trained:
                critic.step(torch.randn(128, 1) + 3, critic.seen)
        shifts[trained] = shift.item()
    assert abs(shifts[True] - 3) < 0.5 < abs(shifts[False] - 3)


def test_compiled_it_has_the_same_numbers():
    d, fake = network(), data()
    critic = Discriminator(d, sgd(d))
    x, y = (fake.clone().requires_grad_() for _ in range(2))
    compiled = torch.compile(lambda x: critic(x).sum(), fullgraph=True, backend="aot_eager")
    critic(x).sum().backward()
    compiled(y).backward()
    torch.testing.assert_close(y.grad, x.grad)
    assert torch.equal(critic.seen, fake) and all(part.grad is None for part in d.parameters())


# ---------------------------------------------------------------------------------------------------------- wrong input

D = network()
X = data()


def critic(d=D, **how):
    return Discriminator(d, sgd(D), **how)


def detached(d):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.d = d

        def forward(self, x):
            return self.d(x).detach()

    return Detached()


WRONG = {
    "an unknown loss of a generator": (lambda: generator_loss(X, "wgan"), ValueError, "non_saturating, hinge, minmax"),
    "an unknown loss": (lambda: discriminator_loss(X, X, "wgan"), ValueError, "got 'wgan'"),
    "an unknown kind": (lambda: critic(kind="wgan"), ValueError, "got 'wgan'"),
    "logits that are none": (lambda: generator_loss([1.0]), TypeError, "fake must be a tensor; got list"),
    "real logits that are none": (lambda: discriminator_loss(None, X), TypeError, "real must be a tensor"),
    "whole logits": (lambda: generator_loss(torch.ones(2).long()), TypeError, "fake must be floating point"),
    "one logit": (lambda: generator_loss(torch.ones(())), ValueError, r"logits \[batch, ...\]"),
    "a function for a network": (lambda: Discriminator(D.forward, sgd(D)), TypeError, "must be a torch.nn.Module"),
    "no optimizer": (lambda: Discriminator(D, 1e-4), TypeError, "must be a torch.optim.Optimizer; got 0.0001"),
    "a frozen network": (
        lambda: critic(network().requires_grad_(False)), ValueError, "no parameter of the discriminator requires"),
    "a negative penalty": (lambda: critic(r1_gamma=-1.0), ValueError, "r1_gamma must be at least 0"),
    "a penalty as a text": (lambda: critic(r1_gamma="1"), TypeError, "r1_gamma must be a number"),
    "a penalty in no step": (lambda: critic(r1_every=0), ValueError, "r1_every must be a whole number of steps"),
    "an output without a gradient": (
        lambda: critic(detached(D))(X.clone().requires_grad_()), ValueError, "output has no gradient: it was detached"),
    "an output without a gradient, in a step": (lambda: critic(detached(D)).step(X, X), ValueError, "has no gradient"),
    "the same for the penalty": (lambda: r1_penalty(lambda x: x.detach(), X), ValueError, "has no gradient"),
    "an output of another batch": (
        lambda: r1_penalty(lambda x: x[:1], X), ValueError, r"output must be .* batch of 4; got .*\[1, 3, 2, 2\]"),
    "a penalty that is no number": (lambda: r1_penalty(D, X, "1"), TypeError, "gamma must be a number"),
    "real data that is none": (lambda: r1_penalty(D, None), TypeError, "real must be a tensor"),
    "the kept of another batch": (
        lambda: discriminator_loss(X, X, kept=torch.ones(3) > 0), ValueError, r"kept must be bool \[4\].*got .*\[3\]"),
    "the kept of each logit": (
        lambda: discriminator_loss(X, X, kept=torch.ones(4, 1) > 0), ValueError, r"kept must be bool \[4\].*\[4, 1\]"),
    "kept as weights": (lambda: critic()(X, kept=torch.ones(4)), ValueError, "kept must be bool .*got .*float32"),
    "kept as a list": (lambda: critic()(X, kept=[True] * 4), TypeError, "kept must be a tensor"),
    "nothing seen yet": (lambda: critic().step(X), ValueError, "has no estimates to learn from"),
    "an estimate that is none": (lambda: critic()(None), TypeError, "estimate must be a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input(case):
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        call()


def test_without_gradients_the_generators_loss_is_still_a_number():
    with torch.no_grad():
        assert critic(detached(D))(X.clone().requires_grad_()).shape == (4,)
    assert critic(detached(D))(X).shape == (4,)
