"""``fastdiff doctor --trace``: which calls of a script went which way, and why."""

import sys
import textwrap

import pytest
import torch
from asked import native

import fastdiff
from fastdiff import cli, trace
from fastdiff.backends.reference import Reference

START = """
    import sys, torch, fastdiff
    o, x = fastdiff.Objective(fastdiff.VariancePreserving()), torch.randn(2, 4, 8, 8)
    p, t = torch.randn_like(x).requires_grad_(), torch.tensor([1, 2])
"""
pytestmark = pytest.mark.skipif(not native.available, reason="the native backend is not there")


def traced(tmp_path, capsys, lines, *arguments):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(START) + textwrap.dedent(lines))
    status = cli.main(["doctor", "--trace", str(script), *arguments])
    return status, capsys.readouterr()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("for _ in range(3): o.loss(p, o.noise(x)).backward()", ["noise 3 in one call", "loss 3 in one call"]),
        (
            "o.loss(p, o.noise(x), mask=torch.ones(2, 1, 8, 8), weight=0.5, reduction='none')",
            ["loss 1 in one call", "noise 1 in one call"],
        ),
        (
            "o.loss_and_gradient(p, o.noise(x), 0.5)\no.loss_and_gradient(p, o.noise(x), target=x)",
            [
                "loss_and_gradient 1 by the operations of a backend: it has target",
                "loss_and_gradient 1 in one call",
                "noise 2 in one call",
            ],
        ),
        (
            "fastdiff.use_backend('reference'); o.loss_and_gradient(p, o.noise(x))",
            [
                "loss_and_gradient 1 by the reference: cpu has no other backend",
                "noise 1 by the reference: cpu has no other backend",
            ],
        ),
        (
            "o.loss(p, o.noise(x), mask=torch.ones(2), mask_normalization='sample')",
            ["loss 1 by the operations of a backend: it has mask_normalization='sample'", "noise 1 in one call"],
        ),
        (
            "o.loss(p, o.noise(x), mask=torch.ones(2, dtype=torch.int64))",
            [
                "loss 1 by the operations of a backend: its times are not one a sample, or a fast call does not take",
                "noise 1 in one call",
            ],
        ),
        (
            "o.noise(x.clone().requires_grad_(), t)",
            ["noise 1 by the operations of a backend: a gradient of its data is asked for"],
        ),
        (
            "o.noise(x.transpose(0, 1), torch.arange(4), x.transpose(0, 1))",
            ["noise 1 by the operations of a backend: a tensor is not contiguous"],
        ),
        (
            "n = o.noise(x, t, x)\ntorch.func.grad(lambda p: o.loss(p, n))(x)",
            [
                "loss 1 by the reference: a transform of torch.func, forward-mode derivatives or fake tensors",
                "noise 1 in one call",
            ],
        ),
        (
            "o.loss(p, o.noise(x, t, x.clone().requires_grad_()))",
            [
                "loss 1 by the reference: gradients of data, noise or coefficients",
                "noise 1 by the operations of a backend: a gradient of its data is asked for",
            ],
        ),
        (
            "fastdiff.use_backend('reference'); o.noise(x)",
            ["noise 1 by the reference: cpu has no other backend"],
        ),
        (
            "g = torch.ones(1)\no = fastdiff.Objective(fastdiff.VPSDE(), 'epsilon', lambda levels: levels.snr * g)\n"
            "o.loss(p, o.noise(x))",
            [
                "loss 1 by the operations of a backend: its coefficients are evaluated for each batch: <lambda> (g)",
                "noise 1 in one call",
            ],
        ),
        ("m = o.predict_x0(p.detach(), o.noise(x))", ["convert 1 in one call", "noise 1 in one call"]),
        ("fastdiff.q_sample(x, t, o.process)", ["q_sample 1 in one call"]),
        (
            "from fastdiff import q_sample\nq_sample(x.clone().requires_grad_(), t, o.process)",
            ["q_sample 1 by the operations of a backend: a gradient of its data is asked for"],
        ),
        (
            "for _ in range(3): fastdiff.diffusion_loss(p, x, x, t, o.process).backward()",
            ["diffusion_loss 3 in one call"],
        ),
        (
            "fastdiff.diffusion_loss(p, x, x, t, o.process, mask=torch.ones(2, 1, 8, 8))",
            ["diffusion_loss 1 in one call"],
        ),
        (
            "fastdiff.sample(lambda x, t: x, (2, 3), o, 'ddim', 2, progress=False)",
            ["sample 1 each step in one call"],
        ),
        (
            "o.sample(lambda x, t: o.noise(x, t.clone()).x_t, (2, 3), 'ddim', 2, progress=False)",
            ["sample 1 each step in one call", "noise 2 in one call"],
        ),
        (
            "fastdiff.use_backend('reference'); o.sample(lambda x, t: x, (2, 3), 'ddim', 2, progress=False)",
            ["sample 1 by the reference: cpu has no other backend"],
        ),
        ("pass", ["no Objective, and no function of fastdiff, was called", "none was called that is fused"]),
    ],
)
def test_objectives_of_a_script(tmp_path, capsys, lines, expected):
    status, printed = traced(tmp_path, capsys, lines)
    assert status == 0
    found = [" ".join(line.split()) for line in printed.out.splitlines()]
    for line in expected:
        assert any(row.startswith(line) for row in found), (line, found)
    assert found.index("schedulers of diffusers") == 1 + len(expected) - (lines == "pass"), found  # and no other


def test_schedulers_of_a_script(tmp_path, capsys):
    pytest.importorskip("diffusers")
    from fastdiff.integrations import diffusers as fused

    fused.reset_counts()
    _, printed = traced(
        tmp_path,
        capsys,
        """
        from diffusers import DDIMScheduler
        from fastdiff.integrations.diffusers import fuse
        s = fuse(DDIMScheduler())
        s.set_timesteps(4)
        s.step(x, 750, x), s.step(x, 500, x), s.step(x.half(), torch.tensor([750]), x.half())
        """,
    )
    assert "  DDIMScheduler.step  2  fused" in printed.out
    assert "  DDIMScheduler.step  1  left to diffusers: a timestep of shape [1] with samples in half" in printed.out
    fused.reset_counts()


def test_a_script_is_run_as_python_runs_it(tmp_path, capsys):
    """Its arguments, its name, its exit status and its errors; and all is as before afterwards."""
    before = sys.argv, fastdiff.Objective._fast_noise, Reference.run, fastdiff.Objective.noise
    status, printed = traced(tmp_path, capsys, "print(__name__, sys.argv[1:]); sys.exit(7)", "--size", "3")
    assert status == 7 and "__main__ ['--size', '3']" in printed.out and "objectives" in printed.out
    status, printed = traced(tmp_path, capsys, "o.noise(x)\nraise KeyError('inside')")
    assert status == 1 and "KeyError: 'inside'" in printed.err and "noise" in printed.out
    status, printed = traced(tmp_path, capsys, "sys.exit('no such thing')")
    assert status == 1 and "no such thing" in printed.err
    assert (sys.argv, fastdiff.Objective._fast_noise, Reference.run, fastdiff.Objective.noise) == before
    for given in ([], [str(tmp_path / "none.py")]):
        assert cli.main(["doctor", "--trace", *given]) == 2
        assert "--trace needs a script; got" in capsys.readouterr().err


def test_counting_changes_no_number():
    objective, x = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow"), torch.randn(2, 3, 4, 4)
    p = torch.randn_like(x)
    expected = objective.loss(p, objective.noise(x, seed=1))
    found = trace.Trace()
    with found.counting():
        assert torch.equal(objective.loss(p, objective.noise(x, seed=1)), expected)
    objective.loss(p, objective.noise(x, seed=1))
    assert sum(found.calls.values()) == 2
