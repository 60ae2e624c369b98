"""Transforms of ``torch.func`` over the loss of a batch leave nothing behind in it."""

import pytest
import torch
from torch.func import grad, jvp, vmap

import fastdiff

FLOW = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow", weighting=lambda levels: 1 + levels.sigma)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["plain", "weight", "reduction", "mask"])
def test_a_batch_is_used_again_after_a_transform(name):
    given = {"weight": 2.0, "reduction": "none", "mask": torch.tensor([1.0, 0.5])}
    how = {name: given[name]} if name in given else {}
    x0, output = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    noised = FLOW.noise(x0, torch.tensor([0.2, 0.7]), seed=1)
    want = FLOW.loss(output, FLOW.noise(x0, torch.tensor([0.2, 0.7]), seed=1), **how)

    def loss(prediction):
        return FLOW.loss(prediction, noised, **how).sum()

    slope = grad(loss)(output)
    tangent = torch.randn_like(output)
    value, along = jvp(loss, (output,), (tangent,))
    many = vmap(grad(loss))(torch.stack([output, output]))
    leaf = output.clone().requires_grad_()
    again = FLOW.loss(leaf, noised, **how)
    torch.testing.assert_close(again, want, rtol=1e-6, atol=0)
    (plain,) = torch.autograd.grad(again.sum(), leaf)
    torch.testing.assert_close(slope, plain, rtol=2e-6, atol=1e-8)
    torch.testing.assert_close(many[1], plain, rtol=2e-6, atol=1e-8)
    torch.testing.assert_close(value, want.sum(), rtol=2e-6, atol=0)
    torch.testing.assert_close(along, (plain * tangent).sum(), rtol=2e-5, atol=1e-6)
