"""Tensors of more than 2^31 elements. They take 14 GiB: run with ``pytest -m large``."""

import pytest
import torch

import fastdiff
from fastdiff.backends.reference import philox

pytestmark = pytest.mark.large


def last_noise(seed: int, sample: int, elements: int) -> torch.Tensor:
    """The last four values of a sample, from the definition of the noise: its size is a multiple of four."""
    counter = torch.tensor([elements // 4 - 1, 0, sample, 0])
    words = philox.philox4x32(counter, (seed, 0)).unbind(-1)
    return torch.stack([*philox._box_muller(words[0], words[1]), *philox._box_muller(words[2], words[3])])


def test_more_elements_than_32_bits_count():
    if fastdiff.backends.native.backend.unavailable_because:
        pytest.skip("needs the native backend")
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would take the time of the test twice
    elements = 2**30 + 8
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "epsilon")
    x0 = torch.zeros(2, elements, dtype=torch.bfloat16)
    noised = objective.noise(x0, torch.tensor([3, 999]), seed=77, keep_noise=False)
    for sample in range(2):
        expected = noised.sigma[sample] * last_noise(77, sample, elements)
        assert torch.equal(noised.x_t[sample, -4:], expected.to(torch.bfloat16))

    prediction = x0.requires_grad_()
    loss = objective.loss(prediction, noised)
    loss.backward()
    assert loss.item() == pytest.approx(1.0, abs=1e-4)  # the mean of 2^31 squared normals: 1 within 2^-15.5
    for sample in range(2):
        expected = -last_noise(77, sample, elements) / elements  # 2 (0 - n) / (2 elements)
        torch.testing.assert_close(prediction.grad[sample, -4:].float(), expected, rtol=2**-8, atol=0)
