"""``Objective.explain``: which way its calls go, and why not a faster one."""

import pytest
import torch

import fastdiff
from fastdiff.torch_access import reads_tensors

VP, FLOW, SDE = fastdiff.VariancePreserving(), fastdiff.RectifiedFlow(3.0), fastdiff.VPSDE()
X0 = torch.zeros(2, 3, 4, 4)


def explained(objective, x0=None):
    return dict(line.split(": ", 1) for line in objective.explain(x0).splitlines())


@pytest.mark.parametrize(
    ("objective", "coefficients"),
    [
        (fastdiff.Objective(VP), "looked up in a table of 1000 timesteps"),
        (fastdiff.Objective(FLOW, "flow", "cosmap"), "a program of "),
        (fastdiff.Objective(SDE, weighting=lambda levels: levels.snr * float(levels.snr.mean())), "evaluated in PyTor"),
    ],
    ids=["table", "program", "evaluated"],
)
def test_where_coefficients_come_from(objective, coefficients):
    found = explained(objective)
    assert list(found) == ["coefficients", "times"] and found["coefficients"].startswith(coefficients)
    assert found["times"].startswith("a program of ")


@pytest.mark.skipif(not reads_tensors, reason="this PyTorch does not show its tensors to C")
def test_which_way_a_batch_goes():
    objective = fastdiff.Objective(VP)
    fast, general = "one fast call of the backend native", "the operation of the backend native"
    found = explained(objective, X0)
    assert (found["noise"], found["loss"]) == (fast, fast)
    found = explained(objective, X0.contiguous(memory_format=torch.channels_last))
    assert (found["noise"], found["loss"]) == (fast, general)
    found = explained(objective, X0.clone().requires_grad_())
    assert found["loss"].endswith("backend native"), "the target of epsilon has no x0"
    found = explained(fastdiff.Objective(VP, "v_prediction"), X0.clone().requires_grad_())
    because = "the operation of the backend reference; native does not: gradients of data, noise or coefficients"
    assert (found["noise"], found["loss"]) == (general, because)
    with fastdiff.use_backend("reference"):
        found = explained(objective, X0)
    assert found["noise"] == found["loss"] == "the operation of the backend reference"


def test_nothing_is_drawn():
    before = torch.get_rng_state()
    fastdiff.Objective(FLOW, "flow").explain(X0)
    assert torch.equal(torch.get_rng_state(), before)
