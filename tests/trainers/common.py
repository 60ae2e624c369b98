"""What the tests of docs/trainers share. A recipe is run as it stands on its page, and compared with the trainer's
arithmetic, written out here again in plain PyTorch: ``lines(names, single)``, where ``single`` is the dtype that the
trainer computes its loss in. With float64 tensors and ``single=torch.float64`` the same lines are the truth."""

from types import SimpleNamespace

import pytest
import torch
from test_documents import ROOT
from test_documents import blocks as blocks_of

needs_pages = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the documents are not beside the tests")
DTYPES = [torch.float32, torch.bfloat16]
SHAPE = (6, 4, 8, 8)


def blocks(page):
    """(heading, code) of each block of Python of a page, in order."""
    return blocks_of(f"docs/trainers/{page}")


def run(page, heading, names):
    """Run the blocks below a heading, in order, with the trainer's ``names``; returns these with what was added."""
    chosen = [code for below, code in blocks(page) if below == heading]
    assert chosen, f"{page} has no block below {heading!r}"
    for code in chosen:
        exec(compile(code, f"docs/trainers/{page}: {heading}", "exec"), names)
    return names


def options(**values):
    """What a trainer's arguments or config are to it: an object of attributes."""
    return SimpleNamespace(**values)


def tensors(dtype, shape=SHAPE):
    """Latents, noise and a network's output, of which noise and output are like each other, as in training."""
    latents, noise = torch.randn(2, *shape).to(dtype)
    return latents, noise, (noise - 0.4 * latents + 0.3 * torch.randn(shape)).to(dtype)


def wide(value):
    """In float64 what is floating point."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _with_gradient(compute, prediction):
    prediction = prediction.detach().clone().requires_grad_()
    found = compute(prediction)
    (gradient,) = torch.autograd.grad(found["loss"], prediction)
    assert gradient.dtype == prediction.dtype
    return found | {"gradient": gradient}


def compare(lines, recipe, prediction, **given):
    """The loss, the gradient and what else ``lines`` returns (such as x_t), of both against float64.

    ``lines(prediction, single, **given)`` and ``recipe(prediction)`` return dicts with "loss". In float32 the recipe is
    within 2e-6 of the truth, or no farther than the trainer where that is more; in bfloat16 no farther than the trainer
    but for the same 2e-6. Returns what both returned, for what is equal to the bit.
    """
    theirs = _with_gradient(lambda m: lines(m, torch.float32, **given), prediction)
    ours = _with_gradient(recipe, prediction)
    truth = _with_gradient(
        lambda m: lines(m, torch.float64, **{name: wide(value) for name, value in given.items()}), prediction.double()
    )
    for name, true in truth.items():
        size = true.norm().item()
        assert size > 1e-6 and true.isfinite().all(), name
        off, off_theirs = ((wide(found[name]) - true).norm().item() / size for found in (ours, theirs))
        allowed = max(2e-6, off_theirs) if prediction.dtype == torch.float32 else off_theirs + 2e-6
        assert off <= allowed, f"{name}: {off:.3g} off, the trainer {off_theirs:.3g}"
    return theirs, ours
