"""Runs of steps on the CPU: the native trajectory against the reference's, and what a network may do."""

import pytest
import torch
from accuracy import assert_same
from devices import in_turn

import fastdiff
from fastdiff import ops
from fastdiff.backends import native, reference, registry
from fastdiff.backends.native import operations

if not native.available:
    pytest.skip(native.unavailable_because, allow_module_level=True)

_C = operations._C
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
K = len(ops.COLUMNS)
AT = {name: k for k, name in enumerate(ops.COLUMNS)}
STEPS = 7


@pytest.fixture(params=_C.simd_variants())
def simd(request):
    before = _C.simd()
    _C.set_simd(request.param)
    yield request.param
    _C.set_simd(before)


def table(history, scaled, noisy):
    """Rows that read up to ``history`` entries, not all of them each time, and keep one in most steps."""
    rows = torch.randn(STEPS, K, dtype=torch.float64) / 2
    for name in ("l_0", "l_v"):
        rows[:, AT[name]] = 0
    for j in range(history, 4):
        rows[:, AT["c_h1"] + j] = 0
    for k in range(STEPS):
        rows[k, AT["c_h1"] + min(k, history) :][: 4 - min(k, history)] = 0
    if history > 1:
        rows[4, AT["c_h2"]] = 0
    if not history:
        rows[:, [AT["h_x"], AT["h_m"], AT["h_x0"]]] = 0
    rows[3, [AT["h_x"], AT["h_m"], AT["h_x0"]]] = 0
    if not scaled:
        rows[:, AT["c_in"]] = 1
    if not noisy:
        rows[:, AT["c_noise"]] = 0
    rows[2, AT["c_noise"]] = 0
    return rows


def both(x, rows, guided, network, streams, **how):
    """The states of a native run and of a reference run, each seen before it can be written over."""
    philox = ops.Philox(9, 3, 16)
    results = []
    for backend in (native, reference):
        wanted = {"guidance": how.get("guidance", 1.0), "mask": None, "known": None, "known_noise": None} | how
        run = backend.Trajectory(
            backend.step, x.clone(), ops.PreparedSteps(rows), wanted["guidance"], wanted.get("clip"), wanted["mask"],
            wanted["known"], wanted["known_noise"], philox, how.get("reuse", True),
        )  # fmt: skip
        run.begin(0.5, 1 + guided[0])
        states = []
        for k in range(len(rows)):
            copies = 1 + guided[k + 1] if k + 1 < len(rows) else 0
            run.step(k, network(run.seen), guided[k], streams and 16 + k, copies, k == 3)
            states.append((run.x.clone(), run.seen.clone() if copies else None))
        results.append([*states, run.x0])
    for got, want in zip(*results):
        for a, b in zip(*((s if isinstance(s, tuple) else (s,)) for s in (got, want))):
            if b is not None:
                assert_same(a, b)


SHAPES = [(3, 4, 8, 8), (2, 3, 5, 7), (1, 16, 7), (2, 1), (5,), (2, 3, 50, 41)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("history", [0, 1, 2, 4])
@pytest.mark.parametrize("guided", ["no", "all", "some"])
def test_every_step_has_the_references_bits(dtype, history, guided, simd):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    turns = {"no": [False] * STEPS, "all": [True] * STEPS, "some": [k % 3 == 1 for k in range(STEPS)]}[guided]
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        for scaled, noisy, clip, guidance in (
            (False, False, None, 3.0),
            (True, True, 0.7, torch.rand((shape[0],) + (1,) * (len(shape) - 1), dtype=wide)),
        ):
            both(
                x, table(history, scaled, noisy), turns, lambda seen: (seen.double().sin() * 0.9).to(dtype), noisy,
                clip=clip, guidance=guidance,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_data(dtype, simd):
    x, known, z = torch.randn(3, 2, 4, 9, 5).to(dtype).unbind(0)
    for mask, noise in ((torch.rand(9, 5) < 0.5, ops.Philox(5, 3, 4)), (torch.rand(2, 1, 9, 1), z)):
        how = {"mask": mask, "known": known, "known_noise": noise, "guidance": 2.0}
        both(x, table(2, True, True), [True] * STEPS, torch.tanh, True, **how)


class Tagged(torch.Tensor):
    pass


OUTPUTS = {
    "its input": lambda seen: seen,
    "not contiguous": lambda seen: seen.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda seen: seen[..., :1].expand(seen.shape),
    "of another dtype": lambda seen: seen.double().cos(),
    "of 16 bits": lambda seen: seen.bfloat16(),
    "a parameter": lambda seen: torch.nn.Parameter(seen * 0.5),
    "a subclass": lambda seen: (seen * 0.5).as_subclass(Tagged),
    # The first half of the memory of x, as numbers of half the size: written over before it would be read.
    "across its input": lambda seen: seen.view(torch.bfloat16).flatten()[: seen.numel()].view(seen.shape),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_outputs_that_share_memory_or_are_unusual(kind, guided, scaled):
    def network(seen):
        with torch.no_grad():
            return OUTPUTS[kind](seen)

    with torch.no_grad():
        # Small, and of several units of work. "across" makes numbers of any size: bits, and NaN, are compared.
        for shape in ((2, 3, 8, 8), (1, 3, 64, 64)):
            both(torch.randn(shape), table(2, scaled, False), [guided] * STEPS, network, False)


def test_a_tensor_that_is_passed_in_is_not_written_to():
    x = torch.randn(2, 3, 8, 8)
    before = x.clone()
    for reuse in (True, False):
        run = ops.trajectory(x, table(1, False, False), reuse=reuse)
        run.begin(1.0, 1)
        for k in range(STEPS):
            run.step(k, run.seen * 0.5)
            assert run.x.data_ptr() != x.data_ptr() and torch.equal(x, before)


def test_x_stays_where_it_is_if_it_may_and_moves_if_it_may_not():
    for reuse in (True, False):
        run, seen = ops.trajectory(torch.randn(2, 3, 8, 8), table(1, False, False), reuse=reuse), []
        run.begin(1.0, 1)
        for k in range(STEPS):
            run.step(k, run.seen * 0.5)
            seen.append((run.x.data_ptr(), None if reuse else run.x))
        assert len({at for at, _ in seen}) == (1 if reuse else STEPS)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_input_that_the_network_keeps_is_left_to_it(guided, scaled):
    rows, kept = table(2, scaled, False), []

    def network(seen):
        kept.append((seen, seen.clone()))
        return seen * 0.5

    both(torch.randn(2, 3, 8, 8), rows, [guided] * STEPS, network, False)
    for now, then in kept:
        assert_same(now, then)


@in_turn(dtype=[torch.float32, torch.bfloat16], reuse=[True, False])
def test_tensors_larger_than_the_cache(dtype, reuse, simd):
    """Written past the caches where they are written elsewhere than they were read."""
    rows = table(2, False, False)[:4]
    both(torch.randn(3, 2_000_003).to(dtype), rows, [False] * 4, lambda seen: seen * 0.5, False, clip=1.0, reuse=reuse)


def test_wrong_outputs():
    run = ops.trajectory(torch.zeros(2, 3, 4), table(0, False, False), philox=None)
    run.begin(1.0, 1)
    for wrong, error, message in (
        (torch.zeros(2, 3, 5), ValueError, "the model returned shape"),
        (torch.zeros(4, 3, 4), ValueError, "the model returned shape"),
        (torch.zeros(24), ValueError, "the model returned shape"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), TypeError, "floating-point"),
        ((torch.zeros(2, 3, 4),), TypeError, "must return a tensor; got tuple"),
        ((0, 0, 24), TypeError, "must return a tensor; got tuple"),
        (None, TypeError, "must return a tensor; got NoneType"),
        (torch.zeros(2, 3, 4, device="meta"), ValueError, "on meta"),
    ):
        with pytest.raises(error, match=message):
            run.step(0, wrong)
    with pytest.raises(ValueError, match="the model returned shape"):
        run.step(0, torch.zeros(2, 3, 4), guided=True)
    with pytest.raises(ValueError, match="noise has shape"):
        run.step(0, torch.zeros(2, 3, 4), noise=torch.zeros(3))
    with pytest.raises(ValueError, match="no seed"):
        run.step(0, torch.zeros(2, 3, 4), noise=16)


def test_a_network_may_change_the_time_that_it_is_given():
    """Also with one sample: the numbers are kept with the plan, from run to run."""
    process = fastdiff.VariancePreserving()
    told = []

    def network(x, t):
        told.append(t.clone())
        t.mul_(0)
        return x

    for _ in range(2):
        fastdiff.sample(network, (1, 4), process, "ddim", 5, "epsilon", seed=1, progress=False)
    assert torch.stack(told[:5]).tolist() == torch.stack(told[5:]).tolist() and told[0].item() > 0


def test_runs_of_one_plan_do_not_share_a_history():
    """The rows are kept from run to run; what a run makes is its own."""
    process = fastdiff.VariancePreserving()
    how = process, "dpmpp_3m", 6, "epsilon"
    runs = [fastdiff.sample(lambda x, t: x * 0.3, (2, 3, 8), *how, seed=s, progress=False) for s in (1, 2, 1)]
    assert torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[1])
    with fastdiff.use_backend("reference"):
        again = fastdiff.sample(lambda x, t: x * 0.3, (2, 3, 8), *how, seed=1, progress=False)
    assert_same(again, runs[0])
    assert registry._forced is None
