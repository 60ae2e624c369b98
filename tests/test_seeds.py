"""Seeds that the host draws from a GPU's generator: the numbers that the GPU would draw."""

import pytest
import torch
from oracle import philox4x32
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import philox
from fastdiff.torch_access import _C

pytestmark = pytest.mark.skipif(_C is None or torch.version.hip is not None, reason="needs the native extension")
CUDA = torch.device("cuda", 0)


class Generator:
    """A GPU's, as far as it is asked."""

    def __init__(self, seed, offset=0):
        self.seed, self.offset = seed, offset

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset


@pytest.mark.parametrize("offset", [0, 4, 400, 2**34 - 4, 2**34, 2**40 + 8])
@pytest.mark.parametrize("seed", [0, 1, 0x299F31D0A4093822, 2**64 - 1])
def test_the_number_is_that_of_torch_randint(seed, offset):
    """PyTorch draws a number of 64 bits below 2^64 - 1 from the first thread's first four words: of the first two, as
    they are, modulo that; then it adds the lower bound, -2^63, in 64 bits."""
    generator, group = Generator(seed, offset), offset // 4
    words = philox4x32([group % 2**32, group >> 32, 0, 0], (seed % 2**32, seed >> 32)).tolist()
    want = ((words[0] << 32 | words[1]) % (2**64 - 1) - 2**63) % 2**64
    assert _C.draw_seed(generator) % 2**64 == want
    assert generator.offset == offset + 4
    assert _C.draw_seed(generator) % 2**64 != want


def test_what_is_known_of_philox():
    assert philox4x32([0, 0, 0, 0], (0, 0)).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _C.draw_seed(Generator(0)) == 0x6627E8D5E169C58D - 2**63


def test_a_generator_that_refuses_is_not_moved():
    class Captured(Generator):
        def get_offset(self):
            raise RuntimeError("while a graph is captured")

    generator = Captured(1)
    with pytest.raises(RuntimeError, match="while a graph is captured"):
        _C.draw_seed(generator)
    assert generator.offset == 0


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_who_draws(monkeypatch):
    """The host, but where a draw is captured, watched, or another device's."""
    default, drawn = Generator(3), []
    capturing = False
    monkeypatch.setattr(philox, "_drawn_on_host", False)
    monkeypatch.setattr(torch.cuda, "default_generators", (default,))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(philox, "draw_seed", lambda *how: drawn.append(how) or torch.zeros(1, dtype=torch.int64))
    how = None, None, None, None, 2

    assert philox.seeded(*how, CUDA, False)[0] is None and default.offset == 0 and not philox.draws_on_host()
    first, samples = philox.seeded(*how, CUDA)
    second, _ = philox.seeded(*how, torch.device("cuda"))
    assert type(first) is type(second) is int and first != second and samples == 0
    assert default.offset == 8 and not drawn and philox.draws_on_host()

    by_device = {"another device": torch.device("cuda", 1), "the CPU": torch.device("cpu")}
    for device in by_device.values():
        assert isinstance(philox.seeded(*how, device)[0], torch.Tensor)
    with Watching():
        assert isinstance(philox.seeded(*how, CUDA)[0], torch.Tensor)
    capturing = True
    assert isinstance(philox.seeded(*how, CUDA)[0], torch.Tensor)
    capturing = False
    generator = torch.Generator()  # the CPU's
    assert isinstance(philox.seeded(None, generator, None, None, 2, CUDA)[0], torch.Tensor)
    assert len(drawn) == 5 and default.offset == 8


def test_a_batch_of_a_drawn_number_is_one_of_its_seed(monkeypatch):
    """Whether the seed is a number or a tensor, noise and loss are the same, and the batch goes to another process."""
    objective = fastdiff.Objective(fastdiff.VariancePreserving(), "v_prediction")
    x0 = torch.randn(2, 3, 4, 4)
    monkeypatch.setattr(philox, "draw_seed", lambda generator, device: -12345)
    drawn = objective.noise(x0)
    given = objective.noise(x0, seed=torch.tensor([-12345]))
    assert torch.equal(drawn.x_t, given.x_t) and torch.equal(drawn.t, given.t)
    assert torch.equal(objective.loss(x0, drawn), objective.loss(x0, given))
    again = fastdiff.Noised.from_tensors(objective, drawn.tensors())
    assert torch.equal(again.noise, given.noise)
