"""``fastdiff doctor --verify``: its figures against known errors, and that it finds what is wrong."""

import json
import math
import types
from dataclasses import dataclass

import pytest
import torch

import fastdiff
from fastdiff import verify
from fastdiff.cli import main
from fastdiff.weighting import Weighting

SHAPE = (3, 4, 16, 16)


def of(found, kind, dtype, who):
    (errors,) = (e for e in found if (e.kind, e.dtype, e.who) == (kind, dtype, who))
    return errors


def test_a_training_step_is_as_exact_as_rounding_allows():
    found = verify.verify([SHAPE], ("bf16", "fp32", "fp16"))
    assert len(found) == 3 * 3 * 2 and {e.shape for e in found} == {SHAPE}
    for errors in found:
        assert errors.worse == ()
        half = torch.finfo(verify.DTYPES[errors.dtype]).eps / 2
        if errors.who == "fastdiff":
            # One rounding of an element of up to 8 times the root mean square, and a few of float32.
            assert 0 < errors.x_t < 8 * (half + 4 * 2.0**-24) and errors.loss < 4 * 2.0**-24
            assert 0 < errors.gradient < 16 * (half + 4 * 2.0**-24) and errors.cosine < half**2
            assert abs(errors.bias) < half
    eager_v, fused_v = (of(found, "v_prediction", "bf16", who) for who in ("eager", "fastdiff"))
    assert eager_v.loss > 1e-5 > fused_v.loss and eager_v.x_t > fused_v.x_t


@pytest.mark.parametrize("who", ["fastdiff", "eager"])
def test_what_the_figures_mean(who):
    """Of numbers that are off by known amounts."""
    x0, n, m, t = verify._operands(SHAPE, "fp32", torch.device("cpu"))
    sigma = ((t.double() + 0.5) / 1000).view(3, 1, 1, 1)
    x_t = (1 - sigma) * x0.double() + sigma * n.double()
    e = m.double() - (n.double() - x0.double())
    gradient = 2 * e / e.numel()
    m.requires_grad_()
    off = x_t.clone()
    off[1, 2, 3, 4] += 0.5
    m.grad = (1.25 * gradient).float()
    got = verify._errors(SHAPE, "flow", "fp32", who, x0, n, m, t, off, (e * e).mean() * 0.75)
    assert got.x_t == pytest.approx(0.5 / float(x_t.square().mean().sqrt()))
    assert got.loss == pytest.approx(0.25) and got.bias == pytest.approx(0.25) and got.cosine < 1e-12
    assert got.gradient == pytest.approx(0.25 * float(gradient.abs().max() / gradient.square().mean().sqrt()))
    other = torch.randn(SHAPE, dtype=torch.float64)
    other -= gradient * (other * gradient).sum() / gradient.square().sum()
    m.grad = (gradient + other * gradient.norm() / other.norm()).float()  # at a right angle, as long
    got = verify._errors(SHAPE, "flow", "fp32", who, x0, n, m, t, x_t, (e * e).mean())
    assert got.cosine == pytest.approx(1 - math.sqrt(0.5), abs=1e-6) and abs(got.bias) < 1e-6


PLANTED = {
    "weights of another gamma": ("MinSNR", lambda gamma: fastdiff.MinSNR(gamma + 1e-3), {"loss", "bias"}),
    "another schedule": (
        "VariancePreserving", lambda: fastdiff.VariancePreserving(beta_end=0.0201), {"x_t", "loss", "gradient"}),
    "a longer gradient": (
        "Objective", lambda *how: types.SimpleNamespace(
            noise=fastdiff.Objective(*how).noise,
            loss=lambda m, noised: fastdiff.Objective(*how).loss(m, noised) * 1.0001), {"loss", "bias"}),
    "another target": (
        "Objective", lambda process, kind, *how: fastdiff.Objective(
            process, "reversed_flow" if kind == "flow" else kind, *how), {"loss", "gradient", "cosine", "bias"}),
}  # fmt: skip


@dataclass(frozen=True)
class Epsilon(Weighting):
    """min-SNR weights whose SNR is alpha^2 / (sigma^2 + 1e-8), so that nothing is divided by 0."""

    gamma: float

    def formula(self, levels, prediction):
        snr = levels.alpha**2 / (levels.sigma**2 + 1e-8)
        return snr.clamp(max=self.gamma) / (snr if prediction.name == "epsilon" else snr + 1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_epsilon_in_the_snr_is_found(dtype, monkeypatch):
    """1e-4 of the first time's weights, where float32's 1 - alpha_bar, which eager steps have, is off by 6e-4."""
    monkeypatch.setattr(verify, "MinSNR", Epsilon)
    found = verify.verify([(1, 4, 32, 32)], (dtype,))
    assert [errors.worse for errors in found if errors.who == "fastdiff"] == [("loss",), ("loss",), ()]


def test_each_time_has_its_turn():
    """Batches that are too small for all the times make several steps, and the worst is told."""
    assert [t.tolist() for t in verify._times(1)] == [[t] for t in verify.TIMES]
    assert [len(t) for t in verify._times(3)] == [3, 3] and torch.cat(verify._times(3)).tolist()[:4] == [*verify.TIMES]
    assert len(verify._times(64)) == 1 and len(verify._times(64)[0]) == 64
    steps = [verify.Errors(SHAPE, "flow", "fp32", "eager", *row) for row in ((1, 2, 3, 4, -6), (2, math.nan, 1, 5, 5))]
    worst = verify._worst(steps)
    assert (worst.x_t, worst.gradient, worst.cosine, worst.bias) == (2, 3, 5, -6) and math.isnan(worst.loss)


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_deviation_is_found(case, monkeypatch, capsys):
    name, planted, where = PLANTED[case]
    monkeypatch.setattr(verify, name, planted)
    assert main(["doctor", "--verify", "--shape", "64x4x8x8", "--dtype", "fp32", "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "fastdiff is LESS exact" in shown
    worse = {word for line in shown.splitlines() if "WORSE: " in line for word in line.split("WORSE: ")[1].split(", ")}
    assert worse >= where


def test_a_nan_is_worse():
    fine = verify._eager(SHAPE, "flow", "fp32", torch.device("cpu"))
    bad = verify.Errors(SHAPE, "flow", "fp32", "fastdiff", math.nan, 0.0, 0.0, 0.0, 0.0)
    assert verify._judged(bad, fine).worse == ("x_t",)


def test_on_the_command_line(capsys):
    arguments = ["doctor", "--verify", "--shape", "2x3x8x8", "--shape", "1x2x3x4x4", "--device", "cpu"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 3 * 2 * 2 + 1 and lines[-1] == "fastdiff is as exact as eager steps, or more."
    assert lines[2].split()[:4] == ["2x3x8x8", "epsilon", "bf16", "fastdiff"]
    assert main([*arguments, "--json", "--dtype", "fp16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 2 * 3 * 2 and found[-1]["shape"] == [1, 2, 3, 4, 4] and found[-1]["who"] == "eager"
    direct = verify.verify([(2, 3, 8, 8)], ("fp16",))
    assert [e["x_t"] for e in found[:6]] == [e.x_t for e in direct]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shape", "4x4"), "--shape goes with --verify"),
        (("--dtype", "fp32"), "--dtype goes with --verify"),
        (("--device", "cpu"), "--device goes with --verify"),
        (("--verify", "--shape", "4"), "--shape must be sizes, the batch first, such as 4x16x128x128; got '4'"),
        (("--verify", "--shape", "4x0x2"), "got '4x0x2'"),
        (("--verify", "--dtype", "fp8"), "--dtype must be of fp32, bf16, fp16; got fp8"),
        (("--verify", "--device", "nowhere"), "nowhere"),
        (("--verify", "--trace", "x.py"), "--verify and --trace are two things"),
    ],
)
def test_asked_for_wrongly(arguments, words, capsys):
    assert main(["doctor", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastdiff: error: ") and words in said and said.count("\n") == 1
