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


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("given", [None, 0.3, [0.3]])
def test_one_sequence_with_clean_tokens(given, batched):
    x0, clean = torch.randn(6, 4), torch.arange(6) < 2
    noised = RFLoss().noise(x0[None] if batched else x0, given, seed=3, lengths=[6], clean=clean)
    whole = RFLoss().noise(x0[None], given, seed=3, clean=clean)
    assert noised.t.shape == ((1, 6) if batched else (6,))
    assert torch.equal(noised.t.view(6), whole.t[0]) and torch.equal(noised.x_t.view(6, 4), whole.x_t[0])


def test_a_shift_of_each_sequence():
    x0, lengths = torch.randn(24, 8), torch.tensor(LENGTHS)
    right = RFLoss(shift="flux").noise(x0, seed=3, lengths=lengths)
    given = shifts.flux(lengths.clamp(min=1))
    for noised in (
        RFLoss(shift=given).noise(x0, seed=3, lengths=LENGTHS),
        RFLoss().noise(x0, seed=3, lengths=lengths, shift=given),
    ):
        torch.testing.assert_close(noised.t, right.t, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match=r"shift must be one a sequence, \[4\]"):
        RFLoss().noise(x0, seed=3, lengths=LENGTHS, shift=given[:3])


@pytest.mark.parametrize("shift", ["flux", 3.0])
def test_compiled(shift):
    objective, x0 = RFLoss(shift=shift), torch.randn(24, 8)

    def step(x0, lengths, seed):
        return objective.noise(x0, seed=seed, lengths=lengths).t

    how = x0, torch.tensor(LENGTHS), torch.tensor([3])
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*how)
    torch.testing.assert_close(found, step(*how), rtol=1e-14, atol=0)


def test_what_divides_without_a_mask():
    """The mean over sequences of their own means, and over all elements."""
    x0, m = torch.randn(2, 24, 8)
    objective = RFLoss()
    noised = objective.noise(x0, seed=3, lengths=LENGTHS)
    squares = (m - noised.target).square()
    own = [part.mean() for part in squares.split(LENGTHS) if len(part)]
    torch.testing.assert_close(objective.loss(m, noised, mask_normalization="row"), torch.stack(own).mean())
    for how in (None, "global", "none"):
        torch.testing.assert_close(objective.loss(m, noised, mask_normalization=how), squares.mean())
    with pytest.raises(ValueError, match="mask_normalization must be one of"):
        objective.loss(m, noised, mask_normalization="rows")


def test_offsets_are_of_channels():
    """Of a token's numbers, as in each sequence alone."""
    x0 = torch.zeros(24, 8)
    found = RFLoss(noise_offset=2.0).noise(x0, seed=3, lengths=LENGTHS)
    plain = RFLoss().noise(x0, seed=3, lengths=LENGTHS)
    assert torch.equal(found.t, plain.t)
    for k, part in enumerate((found.noise - plain.noise).split(LENGTHS)):
        offset = part[:1] if len(part) else part
        torch.testing.assert_close(part, offset.expand_as(part), atol=1e-5, rtol=0)
        assert not len(part) or float(offset.std()) > 0.1, k
    assert torch.equal(found.noise, torch.cat([one.noise[0] for one in alone(RFLoss(noise_offset=2.0), x0, 3)]))


@pytest.mark.parametrize(
    ("settings", "how", "words"),
    [
        ({"per": "token"}, {}, "drawn one a sequence; got per='token'"),
        ({"per": "frame"}, {}, "drawn one a sequence"),
        ({"frame_noise": "mixed"}, {}, "frame_noise is shared by the frames of video.*got packed tokens"),
        ({}, {"frames": 2}, "packed sequences have lengths: leave it out"),
        ({}, {"clean": 2}, "must be bool, one a token"),
        ({}, {"clean": torch.zeros(4, dtype=torch.bool)}, "must be bool, one a token"),
        ({}, {"lengths": [5, 5]}, "add up to the 24 tokens"),
    ],
)
def test_refused(settings, how, words):
    with pytest.raises(ValueError, match=words):
        RFLoss(**settings).noise(torch.randn(24, 8), seed=1, **({"lengths": LENGTHS} | how))
