"""The sum of an objective's loss and terms of its x0 estimate: what each adds, to which rows, and what it costs."""

import math

import numpy as np
import pytest
import torch
from accuracy import to_numpy
from oracle import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import losses
from fastdiff.losses import Sum, Term
from fastdiff.losses.adversarial import Discriminator
from fastdiff.losses.features import Alignment, Classification, Fourier, Perceptual, Wavelet

VP = fastdiff.VariancePreserving()
T = torch.tensor([900, 100, 500, 300, 700, 0])
ORDER = [5, 1, 3, 2, 4, 0]  # from the least noisy on
BATCH = len(T)


def batch(prediction="v_prediction", process=VP, t=T, dtype=torch.float64, **how):
    """(objective, noised, prediction that requires a gradient)"""
    objective = fastdiff.Objective(process, prediction, **how)
    noised = objective.noise(torch.randn(len(t), 2, 4, 4, dtype=dtype), t, seed=1)
    output = torch.randn(len(t), 2, 4, 4, dtype=dtype, requires_grad=True)
    return objective, noised, output


class Counted:
    """A loss, or a decoder, and what it was called with."""

    def __init__(self, function):
        self.function, self.given = function, []

    def __call__(self, estimate, truth):
        self.given.append((estimate, truth))
        return self.function(estimate, truth)


def error(estimate, truth):
    return (estimate - truth).square().flatten(1).mean(1)


def decoder():
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.Softplus(), nn.Upsample(scale_factor=2)).double()


def extractor():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus()).double()


def gradient(loss, by):
    return torch.autograd.grad(loss, by, retain_graph=True)[0]


# ------------------------------------------------------------------------------------------------------ what it adds up


def test_the_sum_is_that_of_its_parts_and_so_is_its_gradient():
    objective, noised, output = batch(weighting=fastdiff.MinSNR(5.0))
    decode, features, phi = decoder(), extractor(), nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double()
    d = nn.Sequential(nn.Flatten(), nn.Linear(32, 1)).double()
    critic = Discriminator(d, torch.optim.SGD(d.parameters(), 0.1))
    condition, labels = torch.randn(BATCH, 5).double(), torch.arange(BATCH) % 5
    mask = (torch.rand(BATCH, 1, 4, 4) < 0.5).double()
    perceptual, align, classify = Perceptual(features), Alignment(phi), Classification(phi)
    total = Sum(
        objective,
        decoder=decode,
        perceptual=Term(perceptual, 0.3),
        align=Term(align, lambda step: 0.01 * step),
        label=Term(classify, 0.2),
        wavelet=Term(Wavelet(), 0.7, of="latents"),
        noise=Term(Fourier(alpha=0.5), 1.1, of="noise"),
        critic=Term(critic, 0.4, of="latents"),
    )
    found = total(output, noised, condition=condition, labels=labels, mask=mask, step=7)
    x0_hat = objective.predict_x0(output, noised)
    images, true_images = decode(x0_hat), decode(noised.x0)
    epsilon = objective.convert(output, noised, "epsilon")
    parts = {
        "objective": (1.0, objective.loss(output, noised, mask)),
        "perceptual": (0.3, perceptual(images, true_images).mean()),
        "align": (0.07, align(images, condition).mean()),
        "label": (0.2, classify(images, labels).mean()),
        "wavelet": (0.7, Wavelet()(x0_hat, noised.x0).mean()),
        "noise": (1.1, Fourier(alpha=0.5)(epsilon, noised.noise).mean()),
        "critic": (0.4, critic(x0_hat).mean()),
    }
    assert list(total.values) == list(parts)
    for name, (_, value) in parts.items():
        assert_close(to_numpy(total.values[name]), to_numpy(value), rel=1e-12, label=name)
        assert not total.values[name].requires_grad
    expected = sum(weight * value for weight, value in parts.values())
    assert_close(to_numpy(found), to_numpy(expected), rel=1e-12)
    gradients = sum(weight * gradient(value, output) for weight, value in parts.values())
    assert_close(to_numpy(gradient(found, output)), to_numpy(gradients), rel=1e-9, absolute=1e-12)
    found.backward()
    networks = nn.ModuleList([decode, features, phi, d])
    assert all(part.requires_grad and part.grad is None for part in networks.parameters())


def test_gradcheck():
    objective, noised, output = batch()
    total = Sum(objective, decoder=decoder(), p=Term(Perceptual(extractor()), 0.3, share=0.5), w=Term(error, 0.5))
    assert torch.autograd.gradcheck(lambda output: total(output, noised), output)


def test_without_terms_it_is_the_objectives_loss():
    objective, noised, output = batch()
    weight = torch.rand(BATCH).double()
    found = Sum(objective)(output, noised, weight=weight, target=noised.x_t)
    assert torch.equal(found, objective.loss(output, noised, weight=weight, target=noised.x_t))


def test_a_term_of_the_latents_is_one_of_x0_where_there_is_no_decoder():
    objective, noised, output = batch()
    found = [Sum(objective, e=Term(error, of=of))(output, noised) for of in ("x0", "latents")]
    assert torch.equal(*found)
    torch.testing.assert_close(
        found[0], objective.loss(output, noised) + error(objective.predict_x0(output, noised), noised.x0).mean()
    )


def test_images_are_the_truth_of_decoded_estimates():
    objective, noised, output = batch()
    images, calls = torch.randn(BATCH, 3, 8, 8).double(), []
    decode = decoder()

    def counted(latents):
        calls.append(latents)
        return decode(latents)

    total = Sum(objective, decoder=counted, e=Term(error, share=0.5))
    total(output, noised, images=images)
    expected = error(decode(objective.predict_x0(output, noised)), images)[ORDER[:3]].sum() / BATCH
    torch.testing.assert_close(total.values["e"], expected.detach())
    assert [len(latents) for latents in calls] == [3]
    total(output, noised)
    assert [len(latents) for latents in calls] == [3, 3, 3]


def test_it_is_decoded_once_and_the_truth_only_if_it_is_asked_for():
    objective, noised, output = batch()
    calls = []
    decode = decoder()

    def counted(latents):
        calls.append(latents.requires_grad)
        return decode(latents)

    def mean(estimate):
        return estimate.flatten(1).mean(1)

    Sum(objective, decoder=counted, a=Term(mean), b=Term(mean, 2.0), c=Term(mean, of="latents"))(output, noised)
    assert calls == [True]
    Sum(objective, decoder=counted, a=Term(mean), b=Term(error), c=Term(error))(output, noised)
    assert calls == [True, True, False]


@pytest.mark.parametrize("of", ["x0", "latents", "noise"])
def test_a_term_of_weight_0_is_not_computed(of):
    objective, noised, output = batch()
    loss, decodings = Counted(error), []
    decode = decoder()

    def counted(latents):
        decodings.append(1)
        return decode(latents)

    total = Sum(objective, decoder=counted, e=Term(loss, lambda step: 0.5 if step >= 10 else 0, of=of), z=Term(loss, 0))
    for step in (0, 9):
        assert torch.equal(total(output, noised, step=step), objective.loss(output, noised))
        assert list(total.values) == ["objective"]
    assert not loss.given and not decodings
    total(output, noised, step=10)
    assert len(loss.given) == 1 and list(total.values) == ["objective", "e"]
    assert len(decodings) == (2 if of == "x0" else 0)


def test_checkpointing_runs_the_decoder_again_and_changes_no_number():
    objective, noised, output = batch()
    decode, calls = decoder(), []
    decode.register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for checkpoint in (False, True):
        calls.clear()
        total = Sum(objective, decoder=decode, checkpoint=checkpoint, p=Term(Perceptual(extractor_of(3)), 0.3))
        loss = total(output, noised)
        assert len(calls) == 2
        found.append((loss, gradient(loss, output)))
        assert len(calls) == 2 + checkpoint
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert all(part.grad is None for part in decode.parameters())


def extractor_of(seed):
    torch.manual_seed(seed)
    return extractor()


# ----------------------------------------------------------------------------------------------------------- which rows


@pytest.mark.parametrize("share", [1.0, 0.5, 0.34, 0.01])
def test_a_share_is_the_least_noisy_rows(share):
    objective, noised, output = batch()
    rows = ORDER[: {1.0: 6, 0.5: 3, 0.34: 2, 0.01: 1}[share]]
    loss = Counted(error)
    found = Sum(objective, e=Term(loss, 0.5, share=share))(output, noised)
    each = error(objective.predict_x0(output, noised), noised.x0)
    expected = objective.loss(output, noised) + 0.5 * each[rows].sum() / BATCH
    assert_close(to_numpy(found), to_numpy(expected), rel=1e-13)
    slope, truth = gradient(found, output), gradient(expected, output)
    torch.testing.assert_close(slope, truth, rtol=1e-11, atol=1e-14)
    ((estimate, truth),) = loss.given
    assert len(estimate) == len(truth) == len(rows)
    if share < 1:
        assert torch.equal(truth, noised.x0[rows])


def test_only_the_rows_of_the_largest_share_are_decoded():
    objective, noised, output = batch()
    decode, sizes = decoder(), []
    decode.register_forward_hook(lambda module, given, _: sizes.append(len(given[0])))
    small, large = Counted(error), Counted(error)
    total = Sum(objective, decoder=decode, s=Term(small, share=1 / 3), l=Term(large, share=2 / 3))
    total(output, noised)
    assert sizes == [4, 4]
    assert all(torch.equal(few, many[:2]) for few, many in zip(small.given[0], large.given[0]))
    each = error(decode(objective.predict_x0(output, noised)), decode(noised.x0)).detach()
    torch.testing.assert_close(total.values["s"], each[ORDER[:2]].sum() / BATCH)
    torch.testing.assert_close(total.values["l"], each[ORDER[:4]].sum() / BATCH)


def test_noisier_samples_are_left_out():
    """SNR of t = 300 is 0.65, that of t = 500 is 0.085."""
    objective, noised, output = batch()
    each = error(objective.predict_x0(output, noised), noised.x0)
    snr = VP.alpha_bar[T] / (1 - VP.alpha_bar[T])
    assert (snr >= 0.3).tolist() == [False, True, False, True, False, True]
    for share in (1.0, 0.5):
        found = Sum(objective, e=Term(error, min_snr=0.3, share=share))(output, noised)
        expected = objective.loss(output, noised) + each[[1, 3, 5]].sum() / BATCH
        assert_close(to_numpy(found), to_numpy(expected), rel=1e-13)
        torch.testing.assert_close(gradient(found, output), gradient(expected, output), rtol=1e-11, atol=1e-14)


def test_a_sample_at_the_bound_itself_counts():
    """The SNR of a flow at t = 1 / 2 is 1."""
    t = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    objective, noised, output = batch("flow", fastdiff.RectifiedFlow(), t)
    each = error(objective.predict_x0(output, noised), noised.x0).detach()
    for bound, rows in ((0.999, 2), (1.0, 2), (1.001, 1)):
        total = Sum(objective, e=Term(error, min_snr=bound))
        total(output, noised)
        torch.testing.assert_close(total.values["e"], each[:rows].sum() / 3)


def test_a_weighting_over_the_noise_levels():
    objective, noised, output = batch()
    alpha_bar = to_numpy(VP.alpha_bar)[T]
    each = to_numpy(error(objective.predict_x0(output, noised), noised.x0))
    total = Sum(
        objective,
        a=Term(error, weighting=lambda levels: levels.alpha**2),
        b=Term(error, weighting=lambda levels: levels.snr.clamp(max=5.0), min_snr=0.3),
        c=Term(error, weighting=lambda levels: (levels.sigma < 0.5).double(), share=2 / 3),
    )
    total(output, noised)
    snr = alpha_bar / (1 - alpha_bar)
    assert_close(to_numpy(total.values["a"]), (alpha_bar * each).mean(), rel=1e-12)
    assert_close(to_numpy(total.values["b"]), (np.where(snr >= 0.3, np.minimum(snr, 5), 0) * each).mean(), rel=1e-12)
    assert_close(to_numpy(total.values["c"]), (np.where(np.sqrt(1 - alpha_bar) < 0.5, each, 0)).mean(), rel=1e-12)


@pytest.mark.parametrize("of", ["x0", "latents", "noise"])
@pytest.mark.parametrize("share", [1.0, 5 / 6])
def test_what_is_left_out_adds_nothing_whatever_it_holds(share, of):
    """A sample of pure noise, of which epsilon does not say x0, with NaN in it."""
    process = fastdiff.VariancePreserving(zero_terminal_snr=True)
    objective = fastdiff.Objective(process, "epsilon", fastdiff.SNR())
    t = torch.tensor([999, 100, 500, 999, 999, 0])
    x0, noise = (torch.randn(BATCH, 2, 4, 4, dtype=torch.float64) for _ in range(2))
    output = torch.randn_like(x0)
    output[0] = x0[0] = noise[0] = math.nan
    output.requires_grad_()
    noised = objective.noise(x0, t, noise)
    decode = decoder()

    def summed(share):
        return Sum(
            objective, decoder=decode, p=Term(error, min_snr=1e-6, share=share, of=of), w=Term(error, 0.0, of=of),
            q=Term(error, weighting=lambda levels: (levels.snr > 1).double(), share=share, of=of),
        )  # fmt: skip

    total, alone = summed(share), summed(1.0)
    found = total(output, noised)
    rest = [1, 2, 5]
    ours = output[rest].detach().requires_grad_()
    smaller = alone(ours, objective.noise(x0[rest], t[rest], noise[rest]))
    for name in ("p", "q"):
        torch.testing.assert_close(total.values[name], alone.values[name] / 2)
    torch.testing.assert_close(found, smaller / 2)
    slope = gradient(found, output)
    torch.testing.assert_close(slope[rest], gradient(smaller, ours) / 2)
    assert not slope[[0, 3, 4]].any()


def test_a_batch_that_is_left_out_as_a_whole_adds_nothing():
    process = fastdiff.VariancePreserving(zero_terminal_snr=True)
    objective, noised, output = batch("epsilon", process, torch.tensor([999, 999]), weighting=fastdiff.SNR())
    found = Sum(objective, p=Term(error, min_snr=1e-6))(output, noised)
    assert found.item() == 0 and not gradient(found, output).any()
    with pytest.raises(ValueError, match="'epsilon' does not determine 'sample' at t = 999"):
        Sum(objective, p=Term(error))(output, noised)


@pytest.mark.parametrize("other", [{"share": 0.5}, {"share": 0.5, "min_snr": 1e-9}, {"of": "noise"}], ids=str)
def test_a_sample_may_be_left_out_by_each_term_in_its_own_way(other):
    """One leaves out the pure noise, of which epsilon does not say x0, by its SNR, the other by its share, or it looks
    at what is known of it: the noise."""
    process = fastdiff.VariancePreserving(zero_terminal_snr=True)
    objective = fastdiff.Objective(process, "epsilon", fastdiff.SNR())
    t = torch.tensor([700 if "min_snr" in other else 999, 0, 10, 20])
    x0, noise = (torch.randn(4, 2, 4, 4, dtype=torch.float64) for _ in range(2))
    output = torch.randn_like(x0)
    if "of" not in other:
        output[0] = x0[0] = noise[0] = math.nan
    output.requires_grad_()
    noised = objective.noise(x0, t, noise)
    decode = nn.Conv2d(2, 3, 1).double()
    mask = torch.tensor([0.0, 1.0, 1.0, 1.0]).double()[:, None, None, None]
    terms = {"a": Term(error, **other), "b": Term(error, 0.3, min_snr=1.0)}
    total = Sum(objective, decoder=decode, **terms)
    found = total(output, noised, mask=mask)
    alone = [Sum(objective, decoder=decode, **{name: term}) for name, term in terms.items()]
    each = [one(output, noised, mask=mask) for one in alone]
    for one, name in zip(alone, terms):
        torch.testing.assert_close(total.values[name], one.values[name], rtol=1e-12, atol=0)
    expected = each[0] + each[1] - objective.loss(output, noised, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    slope = gradient(found, output)
    assert slope.isfinite().all() and slope[1:].any()
    torch.testing.assert_close(slope, gradient(expected, output), rtol=1e-10, atol=1e-13)


def test_of_many_times_the_noisiest_counts():
    t = torch.tensor([[100, 100], [900, 0], [0, 300]])
    objective = fastdiff.Objective(VP, "v_prediction")
    noised = objective.noise(torch.randn(3, 2, 4, 4).double(), t, seed=1)
    output = torch.randn(3, 2, 4, 4).double()
    each = error(objective.predict_x0(output, noised), noised.x0)
    total = Sum(
        objective, least=Term(error, share=1 / 3), some=Term(error, min_snr=0.3),
        mean=Term(error, weighting=lambda levels: levels.alpha**2),
    )  # fmt: skip
    total(output, noised)
    torch.testing.assert_close(total.values["least"], each[0] / 3)
    torch.testing.assert_close(total.values["some"], (each[0] + each[2]) / 3)
    torch.testing.assert_close(total.values["mean"], (VP.alpha_bar[t].mean(1) * each).mean())


@pytest.mark.parametrize(
    "process, kind, t",
    [
        (fastdiff.RectifiedFlow(shift=3.0), "flow", [0.9, 0.1, 0.5]),
        (fastdiff.EDM(), "edm", [20.0, 0.1, 0.5]),
        (fastdiff.VESDE(), "score", [0.9, 0.1, 0.5]),
    ],
    ids=["flow", "edm", "score"],
)
def test_other_objectives(process, kind, t):
    t = torch.tensor(t, dtype=torch.float64)
    objective, noised, output = batch(kind, process, t)
    each = error(objective.predict_x0(output, noised), noised.x0)
    found = Sum(objective, e=Term(error, share=2 / 3, min_snr=0.0))(output, noised)
    expected = objective.loss(output, noised) + each[[1, 2]].sum() / 3
    assert_close(to_numpy(found), to_numpy(expected), rel=1e-12)


# ------------------------------------------------------------------------------------------------- what terms are given


def test_terms_get_the_rows_that_they_look_at():
    objective, noised, output = batch()
    condition, text = torch.randn(BATCH, 3), {"a": torch.arange(BATCH), "b": [torch.arange(BATCH) + 10]}
    given = {}

    def loss(estimate, t, condition, text, *, other=None, absent=7):
        given.update(t=t, condition=condition, text=text, other=other, absent=absent)
        return estimate.flatten(1).mean(1)

    Sum(objective, a=Term(loss, share=0.5))(output, noised, condition=condition, text=text, other=T)
    rows = ORDER[:3]
    assert torch.equal(given["t"], T[rows]) and torch.equal(given["condition"], condition[rows])
    assert given["text"]["a"].tolist() == rows and given["text"]["b"][0].tolist() == [row + 10 for row in rows]
    assert torch.equal(given["other"], T[rows]) and given["absent"] == 7
    prompts = ["a", "b", "c", "d", "e", "f"]
    Sum(objective, a=Term(loss))(output, noised, condition=condition, text=prompts)
    assert given["text"] is prompts and given["condition"] is condition and given["other"] is None


def test_a_module_may_be_a_loss():
    class Loss(nn.Module):
        def forward(self, estimate, truth):
            return error(estimate, truth)

    objective, noised, output = batch()
    assert torch.equal(Sum(objective, a=Term(Loss()))(output, noised), Sum(objective, a=Term(error))(output, noised))


def test_a_discriminator_gets_its_condition_and_takes_its_step_with_what_it_saw():
    objective, noised, output = batch()
    d = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).double()
    critic = Discriminator(d, torch.optim.SGD(d.parameters(), 0.1))
    decode = decoder()
    Sum(objective, decoder=decode, critic=Term(critic, 0.1, share=0.5))(output, noised).backward()
    torch.testing.assert_close(critic.seen, decode(objective.predict_x0(output, noised))[ORDER[:3]].detach())
    before = d[1].weight.detach().clone()
    critic.step(decode(noised.x0))
    assert not torch.equal(before, d[1].weight)


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_a_discriminator_does_not_learn_from_what_its_term_leaves_out(kind):
    objective, noised, output = batch()
    d = nn.Sequential(nn.Flatten(), nn.Linear(32, 1)).double()
    critic = Discriminator(d, torch.optim.SGD(d.parameters(), 0.0), kind)
    snr = noised.snr
    Sum(objective, critic=Term(critic, 0.1, min_snr=float(snr[3])))(output, noised).backward()
    assert critic.kept.tolist() == (snr >= snr[3]).tolist() and 0 < critic.kept.sum() < BATCH
    found = critic.step(noised.x0)["discriminator"]
    real, fake = d(noised.x0), d(objective.predict_x0(output, noised)[snr >= snr[3]])
    if kind == "hinge":
        expected = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    else:
        expected = torch.log1p(torch.exp(-real)).mean() + torch.log1p(torch.exp(fake)).mean()
    assert_close(found, expected.detach(), 1e-12)
    Sum(objective, critic=Term(critic, 0.1, min_snr=1e9))(output, noised)
    assert_close(critic.step(noised.x0)["discriminator"], critic_of_real(real, kind), 1e-12)


def critic_of_real(real, kind):
    return ((1 - real).clamp(min=0) if kind == "hinge" else torch.log1p(torch.exp(-real))).mean().detach()


class Conditional(nn.Module):
    """A discriminator that notes the pairs of data and condition that it is given."""

    def __init__(self):
        super().__init__()
        self.layer, self.given = nn.Linear(1, 1).double(), []

    def forward(self, x, y):
        index, text = y["index"], y["text"][0]
        self.given.append((x.detach(), index, text))
        return self.layer(x.flatten(1).mean(1, keepdim=True) * index[:, None]) + text.mean(1, keepdim=True)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_conditional_discriminator_learns_each_estimate_with_its_own_condition(share):
    """In a sum the estimates come in the order of their noise levels, if any term has a share; the real data do not."""
    objective, noised, output = batch()
    d = Conditional()
    critic = Discriminator(d, torch.optim.SGD(d.parameters(), 0.1), conditional=True, r1_gamma=0.1)
    text = torch.randn(BATCH, 3).double().requires_grad_()  # from an encoder that is trained
    condition = {"index": torch.arange(BATCH), "text": [2 * text]}
    total = Sum(objective, a=Term(critic, 0.1, share=share), b=Term(error, share=0.5))
    total(output, noised, condition=condition).backward()
    slope = text.grad.clone()
    d.given.clear()
    critic.step(noised.x0, condition=condition)
    (real, index, _), (fake, order, words) = d.given[:2]
    rows = ORDER if share == 1 else ORDER[:3]
    assert index.tolist() == list(range(BATCH)) and order.tolist() == rows
    assert torch.equal(real, noised.x0) and torch.equal(words, 2 * text[rows])
    torch.testing.assert_close(fake, objective.predict_x0(output, noised)[rows].detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(text.grad, slope)  # the discriminator's step is its own


def test_what_a_discriminator_saw_is_not_learned_in_a_step_without_its_term():
    objective, noised, output = batch()
    d = nn.Sequential(nn.Flatten(), nn.Linear(32, 1)).double()
    critic = Discriminator(d, torch.optim.SGD(d.parameters(), 0.1))
    total = Sum(objective, critic=Term(critic, lambda step: 0.1 * (step % 2)))
    total(output, noised, step=1)
    assert "critic" in total.values and len(critic.step(noised.x0)) == 1
    total(output, noised, step=1)
    total(output, noised, step=2)
    assert "critic" not in total.values and critic.seen is None
    before = d[1].weight.detach().clone()
    with pytest.raises(ValueError, match="no estimates.*in steps in which its term has weight 0"):
        critic.step(noised.x0)
    assert torch.equal(before, d[1].weight)


@pytest.mark.parametrize("place", [0, 1])
def test_a_loss_that_writes_into_what_others_see_is_refused(place):
    """The first module of an extractor may work in place."""
    objective, noised, output = batch()

    def loss(*given):
        given[place].mul_(2.0)
        return error(*given)

    def named(estimate, truth):
        return loss(estimate, truth)

    for share in (1.0, 0.5):
        with pytest.raises(ValueError, match="the loss of 'a' wrote into the estimate or the truth"):
            Sum(objective, a=Term(named, share=share), b=Term(error))(output, noised)


def test_a_discriminator_that_saw_nothing_has_no_step():
    d = nn.Linear(4, 1)
    critic = Discriminator(d, torch.optim.SGD(d.parameters(), 0.1))
    with pytest.raises(ValueError, match="has no estimates to learn from"):
        critic.step(torch.zeros(2, 4))


# ------------------------------------------------------------------------------------------ dtypes and modes of PyTorch


def test_terms_see_the_dtype_of_the_data():
    objective, noised, output = batch(dtype=torch.float32)
    seen = []

    def loss(estimate, truth):
        seen.append((estimate.dtype, truth.dtype))
        return error(estimate, truth).bfloat16()

    total = Sum(objective, a=Term(loss), b=Term(loss, share=0.5), n=Term(loss, of="noise"))
    found = total(output.bfloat16(), noised)
    assert seen == [(torch.float32, torch.float32)] * 3 and found.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in total.values.values())
    x0 = noised.x0.bfloat16()
    Sum(objective, n=Term(loss, of="noise"))(output, objective.noise(x0, T, seed=1))
    assert seen[-1] == (torch.bfloat16, torch.bfloat16)


def test_terms_see_packed_tokens_as_images():
    """The numbers are those of the batch that is not packed; the gradient comes back as tokens."""
    objective, _, _ = batch()
    tokens, x0 = fastdiff.Tokens(2), torch.randn(BATCH, 2, 4, 4)
    output = torch.randn(BATCH, 2, 4, 4, requires_grad=True)
    packed = tokens.pack(output.detach()).requires_grad_()
    total = Sum(objective, error=Term(error, 0.3, share=0.5), noise=Term(error, 0.2, of="noise"))
    expected = total(output, objective.noise(x0, T, seed=1))
    found = total(packed, objective.noise(x0, T, seed=1, tokens=tokens))
    assert_close(found.detach(), expected.detach().double(), 1e-6)
    (wanted,) = torch.autograd.grad(expected, output)
    torch.testing.assert_close(torch.autograd.grad(found, packed)[0], tokens.pack(wanted), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_see_images_of_bytes_decoded(dtype):
    objective, _, _ = batch()
    images = torch.randint(0, 256, (BATCH, 2, 4, 4), dtype=torch.uint8)
    output = torch.randn(BATCH, 2, 4, 4, dtype=dtype)
    counted = Counted(error)
    total = Sum(objective, error=Term(counted, 0.3))
    found = total(output, objective.noise(images, T, seed=1, dtype=dtype))
    x0 = images.float() / 127.5 - 1
    assert torch.equal(counted.given[0][1], x0.to(dtype))
    if dtype == torch.float32:
        assert_close(found, total(output, objective.noise(x0, T, seed=1)).double(), 1e-6)


def test_under_autocast():
    objective, noised, output = batch(dtype=torch.float32)
    total = Sum(objective, decoder=decoder().float(), p=Term(Perceptual(extractor().float()), share=0.5))
    layer = nn.Conv2d(2, 2, 1)
    plain = total(layer(noised.x_t), noised)
    (expected,) = torch.autograd.grad(plain, layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = total(layer(noised.x_t), noised)
    (slope,) = torch.autograd.grad(found, layer.weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=0.02, atol=0)
    torch.testing.assert_close(slope, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_compiled_it_has_the_same_numbers_and_no_graph_of_its_own_for_each_step(checkpoint):
    from torch._dynamo.testing import CompileCounterWithBackend

    objective, noised, output = batch()
    decode = decoder()
    total = Sum(
        objective, decoder=decode, checkpoint=checkpoint, p=Term(Perceptual(extractor()), lambda step: 0.01 * step),
        w=Term(Wavelet(), 0.5, share=0.5, min_snr=0.1, of="latents"), n=Term(Fourier("focal", 0.0), of="noise"),
    )  # fmt: skip
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda output, step: total(output, noised, step=step), fullgraph=True, backend=counter)
    for step in range(5):
        expected = total(output, noised, step=step)
        values = total.values
        found = compiled(output, step)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        (slope,) = torch.autograd.grad(found, output)
        torch.testing.assert_close(slope, gradient(expected, output), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(total.values, values, rtol=1e-12, atol=1e-14)
    assert counter.frame_count == 2  # with the weight 0 and without


class NoWaiting(TorchDispatchMode):
    """What would wait for a device: a number read from a tensor, a result whose size is found in one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item"), name
        if name in ("index", "index_put", "index_put_"):
            assert not any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]), name
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(monkeypatch):
    objective, noised, output = batch()
    total = Sum(
        objective, decoder=decoder(), p=Term(Perceptual(extractor()), 0.3, share=0.5, min_snr=0.1),
        w=Term(Wavelet(), weighting=lambda levels: levels.alpha), n=Term(Fourier(), of="noise"),
        a=Term(Alignment(nn.Flatten()), 0.1),
    )  # fmt: skip
    # As on a GPU, where no values are looked at.
    for module in (fastdiff.objective, fastdiff.process, fastdiff.tensors):
        monkeypatch.setattr(module, "value_checks_are_free", lambda tensor: False)
    condition = torch.randn(BATCH, 192).double()
    total(output, noised, condition=condition).backward()
    with fastdiff.use_backend("reference"), NoWaiting():
        total(output, noised, condition=condition).backward()


# ---------------------------------------------------------------------------------------------------------- wrong input

OBJECTIVE, NOISED, OUTPUT = batch()


def made(*terms, call=None, **how):
    total = Sum(OBJECTIVE, **how, **{f"t{number}": term for number, term in enumerate(terms)})
    return total(OUTPUT, NOISED, **(call or {}))


def align(**how):
    return Term(Alignment(nn.Flatten()), **how)


WRONG = {
    "no objective": (lambda: Sum(VP), TypeError, "objective must be a fastdiff.Objective"),
    "a loss without its Term": (lambda: Sum(OBJECTIVE, p=error), TypeError, "p must be a losses.Term"),
    "a decoder that is none": (lambda: Sum(OBJECTIVE, decoder=3), TypeError, "decoder must be a callable of latents"),
    "a checkpoint of nothing": (lambda: Sum(OBJECTIVE, checkpoint=True), ValueError, "pass a decoder too"),
    "a loss that is none": (lambda: Term(3), TypeError, "loss must be a callable of the estimate"),
    "a class for a loss": (lambda: Term(Fourier), TypeError, "the class Fourier, not an object of it"),
    "a negative weight": (lambda: Term(error, -0.1), ValueError, "weight must be at least 0, and finite; got -0.1"),
    "an infinite weight": (lambda: Term(error, math.inf), ValueError, "weight must be .*finite; got inf"),
    "a weight that is NaN": (lambda: Term(error, math.nan), ValueError, "weight must be at least 0"),
    "a weight as a tensor": (lambda: Term(error, torch.tensor(1.0)), TypeError, "a number, not a tensor"),
    "a weight as a flag": (lambda: Term(error, True), TypeError, "weight must be a number"),
    "a negative weight at a step": (
        lambda: made(Term(error, lambda step: 1.0 - step), call={"step": 3}), ValueError, "weight of 't0' .*got -2.0"),
    "a tensor at a step": (
        lambda: made(Term(error, torch.tensor), call={"step": 3}), TypeError, "weight of 't0' must be a number"),
    "no step": (lambda: made(Term(error, lambda step: 1.0)), TypeError, "callable of the training step: pass step="),
    "a weighting by name": (lambda: Term(error, weighting="snr"), TypeError, "callable of the noise levels"),
    "a weighting that gives a number": (
        lambda: made(Term(error, weighting=lambda levels: 1.0)), TypeError, "weighting of 't0' must be a tensor"),
    "a weighting of another shape": (
        lambda: made(Term(error, weighting=lambda levels: levels.snr[:1])), ValueError, r"times, \[6\]; got .*\[1\]"),
    "a share of nothing": (lambda: Term(error, share=0.0), ValueError, r"share must lie in \(0, 1\]"),
    "more than all": (lambda: Term(error, share=1.1), ValueError, r"share must lie in \(0, 1\]"),
    "a share as a text": (lambda: Term(error, share="1"), TypeError, "share must be a number"),
    "a negative SNR": (lambda: Term(error, min_snr=-1.0), ValueError, "min_snr must be at least 0"),
    "an infinite SNR": (lambda: Term(error, min_snr=math.inf), ValueError, "min_snr must be .*finite"),
    "of something else": (lambda: Term(error, of="pixels"), ValueError, "x0, latents, noise; got 'pixels'"),
    "a loss of nothing": (lambda: Term(lambda: 0), TypeError, "estimate as its first parameter"),
    "a loss without names": (lambda: Term(lambda *x: 0), TypeError, r"got one of \(\*x\)"),
    "a loss with one name": (lambda: Term(lambda x, *y: 0), TypeError, "a name for each other"),
    "a loss that asks for what is the sum's": (
        lambda: Term(lambda x, mask: 0), ValueError, "cannot ask for 'mask', which is a keyword of the sum"),
    "an unknown keyword": (
        lambda: made(align(), call={"condtion": 3}), TypeError, "'condtion' is a keyword .*there are condition, step"),
    "a keyword of no term": (lambda: made(Term(error), call={"labels": 3}), TypeError, "'labels' is a keyword that no"),
    "a reduction": (lambda: made(call={"reduction": "none"}), TypeError, "'reduction' is a keyword that no term"),
    "no condition": (lambda: made(align()), TypeError, "'t0' needs condition="),
    "a condition that is None": (lambda: made(align(), call={"condition": None}), TypeError, "'t0' needs condition="),
    "no condition, of a term that does not count yet": (
        lambda: made(align(weight=0.0)), TypeError, "'t0' needs condition="),
    "a condition of another batch": (
        lambda: made(align(), call={"condition": torch.ones(5, 32)}), ValueError, "condition must be .*batch of 6"),
    "prompts, of some rows": (
        lambda: made(align(share=0.5), call={"condition": ["a"] * 6}), TypeError, "only some rows .* Encode it first"),
    "a loss that is a number": (lambda: made(Term(lambda x: x.mean())), ValueError, r"one a sample, .*\[6\]"),
    "a loss of another batch": (
        lambda: made(Term(lambda x: x.flatten(1).mean(1), share=0.5), Term(lambda x: x[:, 0, 0, 0].repeat(2))),
        ValueError, r"loss of 't1' must be one a sample, floating point \[6\]; got .*\[12\]"),
    "a loss that is no tensor": (lambda: made(Term(lambda x: 1.0)), TypeError, "loss of 't0' must be a tensor"),
    "a loss of whole numbers": (
        lambda: made(Term(lambda x: torch.ones(6).long())), ValueError, "floating point .*int64"),
    "a decoder that changes the batch": (
        lambda: made(Term(error), decoder=lambda z: z[:2]), ValueError, "for each of 6 latents; got .*\\[2, 2"),
    "a decoder that gives no tensor": (
        lambda: made(Term(error), decoder=lambda z: [z]), TypeError, "decoder's output must be a tensor; got list"),
    "images without a decoder": (
        lambda: made(Term(error), call={"images": torch.ones(6, 3)}), ValueError, "there is no decoder"),
    "images of another batch": (
        lambda: made(Term(error), decoder=nn.ReLU(), call={"images": torch.ones(5, 3)}), ValueError, "batch of 6"),
    "images of whole numbers": (
        lambda: made(decoder=nn.ReLU(), call={"images": torch.ones(6).long()}), TypeError, "images must be floating"),
    "images of another size": (
        lambda: made(Term(error), decoder=nn.ReLU(), call={"images": torch.ones(6, 3)}), ValueError,
        r"decoded estimate has shape \(6, 2, 4, 4\), but images \(6, 3\)"),
    "swapped arguments": (lambda: Sum(OBJECTIVE)(NOISED, OUTPUT), TypeError, "the arguments are swapped"),
    "a prediction that is none": (lambda: Sum(OBJECTIVE)(None, NOISED), TypeError, "prediction must be a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input(case):
    call, error_, words = WRONG[case]
    with pytest.raises(error_, match=words):
        call()


def test_wrong_keywords_are_found_before_any_work():
    loss = Counted(error)
    total = Sum(OBJECTIVE, a=Term(loss), b=align())
    with pytest.raises(TypeError, match="needs condition="):
        total(OUTPUT, NOISED)
    with pytest.raises(TypeError, match="no term asks for"):
        total(OUTPUT, NOISED, condition=OUTPUT.flatten(1), label=3)
    assert not loss.given and not total.values


def test_a_noised_batch_that_was_written_into_is_refused():
    objective, noised, output = batch()
    noised.t[0] = 3
    with pytest.raises(RuntimeError, match="t was"):
        Sum(objective, a=Term(error, share=0.5))(output, noised)


def test_the_sum_is_found_by_its_name():
    assert losses.Sum is Sum and losses.Term is Term
