"""Packed sequences of videos' tokens, in ``RFLoss``: each has what it has alone."""

import pytest
import torch

from fastdiff.video import RFLoss, shifts

LENGTHS = [5, 0, 12, 7]


def alone(objective, x0, seed):
    """Each sequence as a batch of its own, [1, L, D]."""
    return [
        objective.noise(sequence[None], seed=seed, ids=torch.tensor([k]))
        for k, sequence in enumerate(x0.split(LENGTHS))
    ]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("shift", [1.0, "flux", "ltx", lambda frames, height, width, tokens: 1 + tokens / 10])
def test_a_sequence_has_its_own_shift(shift, batched):
    x0 = torch.randn(sum(LENGTHS), 8)
    objective = RFLoss(shift=shift, timesteps="logit_normal")
    noised = objective.noise(x0[None] if batched else x0, seed=3, lengths=LENGTHS)
    each = alone(objective, x0, 3)
    assert noised.t.shape == (4,) and noised.x_t.shape == ((1, 24, 8) if batched else (24, 8))
    there = torch.tensor(LENGTHS) > 0
    torch.testing.assert_close(noised.t[there], torch.cat([one.t for one in each])[there], rtol=1e-15, atol=0)
    assert torch.equal(noised.x_t.view(24, 8), torch.cat([one.x_t[0] for one in each]))
    prediction = torch.randn_like(noised.x_t).requires_grad_()
    objective.loss(prediction, noised).backward()
    want = 2 * (prediction.detach() - noised.target) / prediction.numel()
    torch.testing.assert_close(prediction.grad, want)
    if shift == "flux":
        plain = RFLoss(timesteps="logit_normal").noise(x0, seed=3, lengths=LENGTHS).t
        for t, before, length in zip(noised.t, plain, LENGTHS):
            s = float(shifts.flux(max(1, length)))
            assert float(t) == pytest.approx(float(s * before / (1 + (s - 1) * before)), rel=1e-12)


@pytest.mark.parametrize("batched", [False, True])
def test_tokens_that_are_kept_clean(batched):
    x0, clean = torch.randn(24, 8), torch.rand(24) < 0.4
    clean[0] = True
    objective = RFLoss(shift="flux")
    given = x0[None] if batched else x0
    noised = objective.noise(given, seed=3, lengths=LENGTHS, clean=clean)
    plain = objective.noise(given, seed=3, lengths=LENGTHS)
    rest = ~clean
    assert torch.equal(noised.x_t.view(24, 8)[clean], x0[clean])
    assert torch.equal(noised.x_t.view(24, 8)[rest], plain.x_t.view(24, 8)[rest])
    assert noised.t.shape == given.shape[:-1]
    assert torch.equal(noised.t.view(24)[rest], plain.t.repeat_interleave(torch.tensor(LENGTHS))[rest])
    prediction = torch.randn_like(noised.x_t)
    prediction.view(24, 8)[clean] = torch.nan
    prediction.requires_grad_()
    loss = objective.loss(prediction, noised)
    loss.backward()
    e = (prediction.detach() - noised.target).view(24, 8)[rest]
    torch.testing.assert_close(loss, e.square().mean())
    assert torch.equal(prediction.grad.view(24, 8)[clean], torch.zeros(int(clean.sum()), 8))
    torch.testing.assert_close(prediction.grad.view(24, 8)[rest], 2 * e / e.numel())


@pytest.mark.parametrize(
    ("settings", "how", "words"),
    [
        ({"per": "token"}, {}, "drawn one a sequence; got per='token'"),
        ({"per": "frame"}, {}, "drawn one a sequence"),
        ({}, {"frames": 2}, "packed sequences have lengths: leave it out"),
        ({}, {"clean": 2}, "must be bool, one a token"),
        ({}, {"clean": torch.zeros(4, dtype=torch.bool)}, "must be bool, one a token"),
        ({}, {"lengths": [5, 5]}, "add up to the 24 tokens"),
    ],
)
def test_refused(settings, how, words):
    with pytest.raises(ValueError, match=words):
        RFLoss(**settings).noise(torch.randn(24, 8), seed=1, **({"lengths": LENGTHS} | how))
