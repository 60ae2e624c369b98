"""Noise of a slice of each sample is a slice of the noise, to the bit: by every backend, against NumPy's Philox."""

import numpy as np
import oracle
import pytest
import torch
from asked import native

import fastdiff
from fastdiff import ops
from fastdiff.backends.triton import interpreted
from fastdiff.calls import NormalCall
from fastdiff.ops import dispatch

# The interpreter's own: numpy's announcements.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")

CPU = torch.device("cpu")
# A whole sample, where a slice begins, its sizes. Runs of all lengths, slices along one dimension or all, aligned to
# the four elements of a counter or not; nothing; all; one element.
SLICES = {
    "rows of an image": ((3, 8, 8), (0, 2, 0), (3, 3, 8)),
    "columns": ((3, 8, 8), (0, 0, 3), (3, 8, 2)),
    "one column": ((3, 8, 8), (0, 0, 5), (3, 8, 1)),
    "channels": ((5, 7), (1, 0), (3, 7)),
    "a corner": ((2, 3, 5, 6), (1, 1, 2, 1), (1, 2, 2, 4)),
    "in fours": ((4, 8, 16), (1, 4, 8), (2, 2, 4)),
    "every dimension": ((3, 4, 5, 3, 7), (1, 1, 1, 1, 1), (2, 2, 3, 2, 5)),
    "tokens": ((33, 8), (29, 0), (4, 8)),
    "long runs": ((2, 1400), (0, 17), (2, 1300)),
    "all": ((2, 3, 4), (0, 0, 0), (2, 3, 4)),
    "one element": ((3, 3), (1, 2), (1, 1)),
    "nothing": ((3, 4), (1, 4), (2, 0)),
    "one dimension": ((64,), (13,), (22,)),
    # 2^32 groups of four and more: the counter's word for the group is full.
    "across the 2^34th element": ((2**33, 4), (2**32 - 3, 0), (6, 4)),
    "across it, unaligned": ((2**40,), (2**34 - 3,), (9,)),
    "far apart": ((3, 2**18, 2**20), (0, 2**18 - 2, 2**20 - 5), (3, 2, 5)),
    "the last of 2^42": ((2**20, 2**22), (2**20 - 1, 2**22 - 9), (1, 9)),
}


@pytest.fixture(params=["reference", "native", "triton"])
def made(request):
    """The noise of a ``Window``, by one of the backends."""
    if request.param == "triton" and not interpreted():
        pytest.skip("on CPU tensors Triton's kernels run in its interpreter")
    if request.param == "native" and not native.available:
        pytest.skip(native.unavailable_because)
    with fastdiff.use_backend(request.param):
        yield lambda *arguments, **how: ops.materialize(*arguments, CPU, **how).numpy()


def places(whole, start, sizes):
    """The number of each element of a slice in the whole sample."""
    ranges = [range(s, s + n) for s, n in zip(start, sizes)]
    coordinates = np.meshgrid(*[np.array(r, dtype=np.int64) for r in ranges], indexing="ij")
    return np.ravel_multi_index(coordinates, whole) if coordinates[0].size else np.empty(sizes, dtype=np.int64)


@pytest.mark.parametrize("name", SLICES)
def test_normals_of_a_slice(name, made):
    whole, start, sizes = SLICES[name]
    at = places(whole, start, sizes)
    for seed, samples, stream in ((7, [5, 6], 0), (-3, [2**40 + 1, -2, 2**40 + 1], 2**32 - 1)):
        ids = 5 if samples == [5, 6] else torch.tensor(samples)
        got = made(ops.Philox(seed, ids, stream), (len(samples), *sizes), window=ops.Window(whole, start))
        want = np.stack([oracle.normals_of_elements(seed, sample, at, stream) for sample in samples])
        assert got.dtype == np.float32 and np.array_equal(got.view(np.uint32), want.view(np.uint32))


def test_offsets_are_those_of_the_slices_channels(made):
    shape, philox = (2, 5, 4, 6), ops.Philox(3, 9, offset=0.5)
    whole = made(philox, shape)
    part = made(philox, (2, 2, 3, 6), window=ops.Window(shape[1:], (2, 1, 0)))
    assert np.array_equal(part, whole[:, 2:4, 1:])


def test_dtypes_and_the_operator(made):
    """The normals are float32 whatever they are stored in; a program that is traced gives the same."""
    window = ops.Window((3, 6, 5), (1, 1, 2))
    want = ops.materialize(ops.Philox(1), (2, 3, 6, 5), CPU)[:, 1:3, 1:5, 2:]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        call = NormalCall(1, (2, 2, 4, 3), 0, 0, dtype, CPU, "exact", window)
        assert torch.equal(dispatch.run(call, CPU), want.to(dtype))
    how = 0, 0, None, torch.float32, "exact", *window, None, None
    traced = torch.ops.fastdiff.normal(torch.tensor(1), (2, 2, 4, 3), *how)
    assert torch.equal(traced, want)


def test_threads_share_a_slice():
    """Above the size from which there are threads: runs that are cut anywhere."""
    window, sizes = ops.Window((3, 300, 301), (0, 11, 7)), (3, 280, 290)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(ops.materialize(ops.Philox(5), (1, *sizes), CPU, window=window))
        finally:
            torch.set_num_threads(before)
    whole = ops.materialize(ops.Philox(5), (1, *window.shape), CPU)
    for got in found:
        assert torch.equal(got, whole[:, :, 11:291, 7:297])


def test_what_cannot_be_is_refused():
    philox = ops.Philox(0)
    for whole, start, sizes in (
        ((3, 4), (0, 2), (3, 3)), ((3, 4), (-1, 0), (3, 4)), ((3,), (0, 0), (3, 4)), ((3, 4), (0, 0), (12,)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="is none of a sample"):
            ops.materialize(philox, (2, *sizes), CPU, window=ops.Window(whole, start))
    with pytest.raises(ValueError, match=r"at most 2\^42 elements"):
        ops.materialize(philox, (2, 1), CPU, window=ops.Window((2**42 + 1,), (0,)))
    large = torch.zeros(1, 1).expand(2, 2**34 + 1)  # of no memory
    with pytest.raises(ValueError, match=r"at most 2\^34 elements in a process.*fastdiff\.distributed\.Part"):
        fastdiff.Objective(fastdiff.RectifiedFlow(), "flow").noise(large)
    with pytest.raises(ValueError, match=r"at most 2\^34 elements in a process"):
        ops.materialize(philox, large.shape, CPU)
