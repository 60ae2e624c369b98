"""Normals as torch.randn draws them: the same bits, and the same state of the generator afterwards."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastdiff import ops, torch_randn
from fastdiff.ops.step_table import DRAW, DRAW_FLOAT, ENTRY, X0
from fastdiff.torch_access import _C, reads_tensors

if torch_randn.reason():
    pytest.skip(f"torch.randn draws: {torch_randn.reason()}", allow_module_level=True)

SIZES = (16, 17, 31, 32, 33, 63, 64, 79, 100, 255, 256, 257, 608, 624, 625, 640, 1000, 4096, 5000, 16384, 40001)
# What was drawn before: uniforms, then single normals, of which a second one is left over.
BEFORE = ((0, 0), (1, 0), (3, 1), (609, 2), (623, 0), (624, 3), (625, 0), (2000, 1))


def generators(seed, uniforms=0, normals=0):
    """Two in the same state."""
    both = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    for generator in both:
        torch.rand(uniforms, generator=generator)
        for _ in range(normals):
            torch.randn(1, generator=generator)
    return both


def bits(x):
    return x.view(torch.int32)


def draw(shape, generator=None):
    """``torch_randn.randn``, where torch.randn must not have been called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", None)
        return torch_randn.randn(shape, generator=generator)


@pytest.mark.parametrize("simd", [name for name in _C.simd_variants()])
@pytest.mark.parametrize("uniforms, normals", BEFORE)
def test_the_bits_and_the_state(simd, uniforms, normals):
    before = _C.simd()
    _C.set_simd(simd)
    try:
        for size in SIZES:
            ours, theirs = generators(size, uniforms, normals)
            expected, drawn = torch.randn(size, generator=theirs), draw((size,), ours)
            assert torch.equal(bits(drawn), bits(expected)), size
            assert torch.equal(ours.get_state(), theirs.get_state()), size
    finally:
        _C.set_simd(before)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads(threads):
    torch.set_num_threads(threads)
    try:
        for size in (65536, 100_003, 1_000_000):
            ours, theirs = generators(size, 5)
            assert torch.equal(bits(draw((size,), ours)), bits(torch.randn(size, generator=theirs)))
            assert torch.equal(ours.get_state(), theirs.get_state())
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("simd", _C.simd_variants())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_narrow_dtypes(simd, dtype, threads):
    if not torch_randn._draws_narrow():
        pytest.skip("this PyTorch draws them otherwise")
    before = _C.simd()
    _C.set_simd(simd)
    torch.set_num_threads(threads)
    try:
        for size in (16, 32, 496, 512, 528, 4096, 100_000):
            ours, theirs = generators(size, size % 700, size % 3)
            expected = torch.randn(size, generator=theirs, dtype=dtype)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "randn", None)
                drawn = torch_randn.randn((size,), generator=ours, dtype=dtype)
            assert torch.equal(drawn.view(torch.int16), expected.view(torch.int16)), size
            assert torch.equal(ours.get_state(), theirs.get_state()), size
    finally:
        torch.set_num_threads(1)
        _C.set_simd(before)


def test_narrow_dtypes_are_drawn_here_where_they_are_rounded_normals():
    def drawn(dtype):
        return torch.randn(200_000, generator=torch.Generator().manual_seed(1), dtype=dtype)

    narrow = torch.bfloat16, torch.float16
    assert torch_randn._draws_narrow() == all(
        torch.equal(drawn(dtype), drawn(torch.float32).to(dtype)) for dtype in narrow
    )


def drawn_in_turn(randn, g):
    for _ in range(3):
        yield randn((5, 7, 11), generator=g)
        yield torch.rand(13, generator=g)
        yield randn((3,), generator=g)
        yield torch.randn(1, generator=g)
        yield torch.randint(0, 1000, (4,), generator=g)
        yield randn((16,), generator=g)
        yield torch.randn(50, generator=g, dtype=torch.float64)
        yield torch.randperm(9, generator=g)


def test_everything_else_stays_in_step():
    ours, theirs = generators(7)
    both = zip(drawn_in_turn(torch_randn.randn, ours), drawn_in_turn(torch.randn, theirs))
    assert all([torch.equal(drawn, expected) for drawn, expected in both])


def test_the_default_generator():
    torch.manual_seed(3)
    expected = torch.randn(4, 100), torch.rand(3), torch.randn(4, 100)
    torch.manual_seed(3)
    drawn = draw((4, 100)), torch.rand(3), torch_randn.randn_like(torch.empty(4, 100))
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected))


@pytest.mark.parametrize(
    "make",
    [
        lambda f, g: f((5,), generator=g),
        lambda f, g: f((0, 3), generator=g),
        lambda f, g: f((100,), generator=g, dtype=torch.float64),
        lambda f, g: f((100,), generator=g, dtype=torch.bfloat16),
        lambda f, g: f((7,), generator=g, dtype=torch.float16),
        lambda f, g: f((100,), generator=g, device="cpu", dtype=torch.float32),
    ],
    ids=["few", "none", "float64", "bfloat16", "few float16", "named"],
)
def test_whatever_is_asked_for(make):
    ours, theirs = generators(11)
    drawn, expected = make(torch_randn.randn, ours), make(torch.randn, theirs)
    assert drawn.dtype == expected.dtype and drawn.shape == expected.shape and torch.equal(drawn, expected)
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_like_a_tensor_in_another_order():
    x = torch.empty(2, 3, 8, 8).to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    expected = torch.randn_like(x)
    torch.manual_seed(0)
    drawn = torch_randn.randn_like(x)
    assert drawn.stride() == expected.stride() and torch.equal(drawn, expected)
    assert not torch_randn.randn_like(torch.empty(40, requires_grad=True)).requires_grad


def test_the_default_dtype_and_device():
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = generators(2)
        assert torch.equal(torch_randn.randn((40,), generator=ours), torch.randn(40, generator=theirs))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch_randn.randn((40,)).is_meta


def test_what_torch_refuses():
    with pytest.raises(RuntimeError, match="negative dimension"):
        torch_randn.randn((-1,))
    with pytest.raises(TypeError, match="invalid combination of arguments.*generator=int"):
        torch_randn.randn((40,), generator=3)


def test_under_a_transform_and_traced():
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: x + torch_randn.randn((20,)))(torch.zeros(2, 20))
    with FakeTensorMode():
        assert isinstance(torch_randn.randn((20,)), FakeTensor)
    torch.manual_seed(0)
    expected = torch.randn(40) + 1
    torch.manual_seed(0)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(lambda: torch_randn.randn((40,)) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(), expected)


def test_other_bits_are_noticed(monkeypatch):
    """The trial fails where one number, or the state, is another."""
    monkeypatch.setattr(torch_randn, "_reason", None)
    fill = torch_randn._fill

    def other(z, generator):
        done = fill(z, generator)
        z[-1] = torch.nextafter(z[-1], torch.tensor(9.0))
        return done

    monkeypatch.setattr(torch_randn, "_fill", other)
    try:
        assert torch_randn.reason() == "this build of PyTorch draws other bits than expected"
        ours, theirs = generators(1)
        assert torch.equal(torch_randn.randn((64,), generator=ours), torch.randn(64, generator=theirs))
        table = torch.randn(1, len(ops.COLUMNS), dtype=torch.float64)
        x = torch.randn(64)
        assert ops.PreparedSteps(table).run(0, x, x, None, (), ours, None, DRAW) is None
        monkeypatch.setattr(
            torch_randn, "_fill", lambda z, generator: fill(z, generator) and bool(torch.rand(1, generator=generator))
        )
        assert not torch_randn._same_bits()
    finally:
        monkeypatch.undo()
        _C.allow_draws(2 if torch_randn._narrow else 1)
    assert torch_randn._same_bits()


def test_pytorch_without_vectors():
    """It draws with the C library's functions then, whose bits are others: torch.randn is left to draw."""
    code = (
        "import torch; from fastdiff import torch_randn;"
        "g = torch.Generator().manual_seed(0); z = torch_randn.randn((5000,), generator=g); g.manual_seed(0);"
        "assert torch.equal(z, torch.randn(5000, generator=g)); print(torch_randn.reason())"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "this build of PyTorch draws other bits than expected"


# ------------------------------------------------------------------------------------------------------------ in a step

in_c = pytest.mark.skipif(not reads_tensors, reason="this PyTorch does not show its tensors to C")


@in_c
@pytest.mark.parametrize("shape", [(16,), (1, 4, 64, 64), (2, 3, 4, 6), (3, 4, 100, 100)])
@pytest.mark.parametrize("history, entry", [(0, False), (0, True), (2, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_that_draws(shape, history, entry, dtype, threads):
    table = torch.randn(3, len(ops.COLUMNS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = ops.PreparedSteps(table)
    ours, theirs = generators(5, 77)
    x, m, *past = (torch.randn(shape).to(dtype) for _ in range(2 + history))
    flags = X0 | DRAW_FLOAT | (ENTRY if entry else 0)
    torch.set_num_threads(threads)
    try:
        got = steps.run(1, x, m, 1.0, tuple(past), ours, None, flags)
        z = torch.randn(shape, generator=theirs)
        expected = steps(1, x, m, clip=1.0, history=past, noise=z, return_entry=entry)
    finally:
        torch.set_num_threads(1)
    assert got is not None
    for one, other in zip(got, expected):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))
    assert torch.equal(ours.get_state(), theirs.get_state())


@in_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_that_draws_in_its_own_dtype(dtype):
    if dtype is not torch.float32 and not torch_randn._draws_narrow():
        pytest.skip("this PyTorch draws it otherwise")
    steps = ops.PreparedSteps(torch.randn(3, len(ops.COLUMNS), dtype=torch.float64))
    ours, theirs = generators(5, 77)
    x, m = (torch.randn(2, 3, 20, 20).to(dtype) for _ in range(2))
    got = steps.run(1, x, m, None, (), ours, None, X0 | DRAW)
    expected = steps(1, x, m, noise=torch.randn(x.shape, generator=theirs, dtype=dtype))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert torch.equal(ours.get_state(), theirs.get_state())


@in_c
def test_a_step_that_is_refused_draws_nothing():
    steps = ops.PreparedSteps(torch.randn(3, len(ops.COLUMNS), dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    x = torch.randn(2, 3, 4, 6)
    other = torch.nn.Buffer(x).to(torch.float64)
    learns = x.clone().requires_grad_()
    refused = [
        (3, x, x, None, (), generator, None, DRAW),
        (-1, x, x, None, (), generator, None, DRAW),
        (0, x, other, None, (), generator, None, DRAW),
        (0, learns, x, None, (), generator, None, DRAW),
        (0, x, x[:1], None, (), generator, None, DRAW),
        (0, x, x.transpose(0, 1), None, (), generator, None, DRAW),
        (0, x, x, 0.0, (), generator, None, DRAW),
        (0, x, x, None, (None,), generator, None, DRAW),
        (0, x, x, None, (x,) * 5, generator, None, DRAW),
        (0, x, x, None, (), [generator, generator], None, DRAW),
        (0, x, x, None, (), "generator", None, DRAW),
        (0, x.double(), x.double(), None, (), generator, None, DRAW_FLOAT),
        (0, x[..., :5].clone(), x[..., :5].clone(), None, (), generator, None, DRAW),
    ]
    for arguments in refused:
        assert steps.run(*arguments) is None
        assert torch.equal(generator.get_state(), before)
    assert steps.run(0, x, x, None, (), [generator], None, DRAW) is not None
    assert not torch.equal(generator.get_state(), before)
