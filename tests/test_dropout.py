"""fastdiff.drop_condition: which samples, by the uniforms' definition in NumPy, and what stands in their place."""

import collections

import numpy as np
import oracle
import pytest
import torch

import fastdiff
from fastdiff import drop_condition
from fastdiff.philox import Stream

B, SEED = 64, 7
LABELS = torch.arange(B) % 10
TOKENS = torch.arange(B * 3 * 2, dtype=torch.float32).view(B, 3, 2) + 1
BYTES = LABELS.to(torch.uint8)
MASK = torch.ones(B, 3, dtype=torch.bool)
WHICH = torch.from_numpy(oracle.uniform(SEED, B, stream=8) < 0.3)  # of the seed, at a probability of 0.3
pytestmark = pytest.mark.usefixtures("backend")


def expected(cond, null, which=WHICH):
    """Sample by sample."""
    return torch.stack([torch.as_tensor(null).to(cond.dtype).expand_as(row) if drop else row
                        for row, drop in zip(cond, which.tolist())])  # fmt: skip


def test_labels():
    got, dropped = drop_condition(LABELS, 0.3, 10, seed=SEED)
    assert torch.equal(dropped, WHICH) and dropped.any() and not dropped.all()
    assert got.dtype == torch.int64 and torch.equal(got, expected(LABELS, 10)) and LABELS.max() == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_embeddings(dtype):
    """Zeros, a number, the embedding of the empty prompt [tokens, channels] or [1, tokens, channels]."""
    tokens, empty = TOKENS.to(dtype), torch.full((3, 2), -1.0)
    for null, wanted in ((None, 0.0), (0.5, 0.5), (2, 2.0), (empty, empty), (empty[None], empty), (empty[0], empty)):
        got, _ = drop_condition(tokens, 0.3, null, seed=SEED)
        assert got.dtype == dtype and torch.equal(got, expected(tokens, wanted))


Pair = collections.namedtuple("Pair", "tokens labels")


def test_one_decision_for_all_of_a_condition():
    empty_mask = torch.tensor([True, False, False])
    cond = {"tokens": TOKENS, "mask": MASK, "more": [(TOKENS[:, 0], LABELS), Pair(TOKENS, LABELS)]}
    null = {"tokens": None, "mask": empty_mask, "more": ([None, 10], Pair(7.0, 11))}
    got, dropped = drop_condition(cond, 0.3, null, seed=SEED)
    assert torch.equal(dropped, WHICH)
    assert torch.equal(got["tokens"], expected(TOKENS, 0.0)) and torch.equal(got["mask"], expected(MASK, empty_mask))
    (pooled, labels), pair = got["more"]
    assert torch.equal(pooled, expected(TOKENS[:, 0], 0.0)) and torch.equal(labels, expected(LABELS, 10))
    assert isinstance(pair, Pair) and torch.equal(pair.tokens, expected(TOKENS, 7.0))
    assert torch.equal(pair.labels, expected(LABELS, 11))
    assert isinstance(got["more"], list) and type(got["more"][0]) is tuple
    for given in (collections.OrderedDict(a=TOKENS), collections.defaultdict(list, a=TOKENS)):
        got, _ = drop_condition(given, 0.3, seed=SEED)
        assert type(got) is type(given) and torch.equal(got["a"], expected(TOKENS, 0.0)) and given["a"] is TOKENS
    assert got["b"] == [], "what is missing is made as before"
    alone, _ = drop_condition([TOKENS, TOKENS], 0.3, seed=SEED)
    assert all(torch.equal(entry, expected(TOKENS, 0.0)) for entry in alone)


def test_the_rate():
    """Of 200,000: four standard deviations. 0 drops none, 1 drops all."""
    labels = torch.zeros(200_000, dtype=torch.int64)
    for p in (0.1, 0.5):
        share = drop_condition(labels, p, 1, seed=3)[0].double().mean().item()
        assert abs(share - p) < 4 * (p * (1 - p) / len(labels)) ** 0.5
    assert not drop_condition(labels, 0, 1, seed=3)[1].any() and drop_condition(labels, 1.0, 1, seed=3)[1].all()


def test_a_sample_is_dropped_below_the_probability():
    """Not at it: the probability of a sample's own uniform keeps the sample."""
    u = oracle.uniform(SEED, B, stream=8)
    assert torch.equal(drop_condition(LABELS, float(u[5]), 10, seed=SEED)[1], torch.from_numpy(u < u[5]))


def test_a_decision_does_not_depend_on_the_batch():
    parts = [
        drop_condition(part, 0.3, 10, seed=SEED, sample_offset=16 * k)[1] for k, part in enumerate(LABELS.split(16))
    ]
    assert torch.equal(torch.cat(parts), WHICH)
    far = drop_condition(LABELS, 0.3, 10, seed=SEED, sample_offset=2**40)[1]
    assert torch.equal(far, torch.from_numpy(oracle.uniform(SEED, B, 8, 2**40) < 0.3)) and not torch.equal(far, WHICH)
    assert torch.equal(drop_condition(LABELS, 0.3, 10, seed=torch.tensor([SEED]))[1], WHICH)


def test_a_decision_goes_with_the_id():
    ids = torch.tensor([5, 0, 2**40, 5])
    _, dropped = drop_condition(LABELS[:4], 0.3, 10, seed=SEED, ids=ids)
    u = [float(oracle.uniform(SEED, 1, stream=8, sample_offset=int(id))[0]) for id in ids]
    assert dropped.tolist() == [number < 0.3 for number in u]


def test_it_is_independent_of_the_times_of_its_seed():
    """Its stream is its own: u of the decision is not the u behind t, nor that of any other stream."""
    streams = [value for name, value in vars(Stream).items() if not name.startswith("_")]
    assert Stream.DROPOUT == 8 and len(set(streams)) == len(streams) and max(streams) == Stream.STEP
    t = fastdiff.Objective(fastdiff.RectifiedFlow(), "flow").noise(torch.zeros(4000, 1), seed=SEED).t.double()
    _, dropped = drop_condition(torch.zeros(4000, 1), 0.5, seed=SEED)
    correlation = np.corrcoef(t.numpy(), dropped.double().numpy())[0, 1]
    assert abs(correlation) < 4 / 4000**0.5


def test_a_generator_is_drawn_from_once():
    def drawn(seed, times=1):
        generator = torch.Generator().manual_seed(seed)
        return [drop_condition(LABELS, 0.3, 10, generator=generator)[1] for _ in range(times)]

    (first, second), (again,) = drawn(1, 2), drawn(1)
    assert torch.equal(first, again) and not torch.equal(first, second)
    torch.manual_seed(5)
    default = drop_condition(LABELS, 0.3, 10)[1]
    torch.manual_seed(5)
    seed = int(torch.randint(-(2**63), 2**63 - 1, (1,)))
    assert torch.equal(default, torch.from_numpy(oracle.uniform(seed % 2**64, B, 8) < 0.3))


def test_gradients():
    """What was dropped gets none, whatever it holds; a learned null gets that of all that were."""
    tokens = TOKENS.clone()
    tokens[WHICH] = float("nan")
    tokens.requires_grad_()
    null = torch.full((3, 2), 0.5, requires_grad=True)
    got, _ = drop_condition(tokens, 0.3, null, seed=SEED)
    assert got.isfinite().all()
    got.sum().backward()
    assert torch.equal(tokens.grad, (~WHICH).float().view(-1, 1, 1).expand_as(tokens))
    assert torch.equal(null.grad, torch.full((3, 2), float(WHICH.sum())))


def test_an_empty_batch():
    got, dropped = drop_condition({"a": torch.empty(0, 3)}, 0.5, seed=1)
    assert got["a"].shape == (0, 3) and dropped.shape == (0,) and dropped.dtype == torch.bool


def test_under_compile():
    step = torch.compile(
        lambda labels, seed: drop_condition(labels, 0.3, 10, seed=seed), fullgraph=True, backend="eager"
    )
    got, dropped = step(LABELS, torch.tensor([SEED]))
    assert torch.equal(dropped, WHICH) and torch.equal(got, expected(LABELS, 10))


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, lambda **entries: Pair(*entries.values())])
def test_nested_under_compile(kind):
    step = torch.compile(
        lambda cond, null, seed: drop_condition(cond, 0.3, null, seed=seed), fullgraph=True, backend="eager"
    )
    cond = kind(tokens=TOKENS, labels=LABELS)
    got, _ = step(cond, kind(tokens=None, labels=torch.tensor(10)), torch.tensor([SEED]))
    tokens, labels = got.values() if isinstance(got, dict) else got
    assert type(got) is type(cond)
    assert torch.equal(tokens, expected(TOKENS, 0.0)) and torch.equal(labels, expected(LABELS, 10))


@pytest.mark.parametrize("null", [float("-inf"), float("nan"), torch.tensor(float("-inf")), 65504.0, torch.tensor(7)])
def test_a_null_that_fits(null):
    """Also what is not finite: the -inf of a mask that is added."""
    got, _ = drop_condition(TOKENS.half(), 0.3, null, seed=SEED)
    torch.testing.assert_close(got, expected(TOKENS.half(), null), rtol=0, atol=0, equal_nan=True)


def test_the_ends_of_integers():
    for null in (0, 255, torch.tensor(255), torch.tensor(255, dtype=torch.uint16), True):
        assert torch.equal(drop_condition(BYTES, 0.3, null, seed=SEED)[0], expected(BYTES, null))


WRONG = {
    "a text": ((["cat"], 0.1), {}, TypeError, r"cond\[0\] must be a tensor, or a dict, tuple or list .*; got 'cat'"),
    "nothing": (({}, 0.1), {}, ValueError, "cond must hold a tensor"),
    "probability a text": ((TOKENS, "0.1"), {}, TypeError, "probability must be a number"),
    "probability of 10": ((TOKENS, 10), {}, ValueError, r"probability must lie in \[0, 1\]; got 10"),
    "a negative probability": ((TOKENS, -0.1), {}, ValueError, r"probability must lie in \[0, 1\]"),
    "labels without a null class": ((LABELS, 0.1), {}, TypeError, "cond is int64, .* null class"),
    "a mask without a null": (({"mask": MASK}, 0.1), {}, TypeError, r"cond\['mask'\] is bool, .* empty prompt"),
    "a fraction for labels": ((LABELS, 0.1, 0.5), {}, TypeError, "null of cond must be int64"),
    "fractions for labels": ((LABELS, 0.1, torch.ones(())), {}, TypeError, "null of cond must be int64"),
    "a null of another shape": ((TOKENS, 0.1, torch.ones(3)), {}, ValueError, r"\(3,\), which does not broadcast to"),
    "a null that is larger": ((TOKENS, 0.1, torch.ones(2, B, 3, 2)), {}, ValueError, "does not broadcast"),
    "a class that wraps": ((BYTES, 0.1, torch.tensor(256)), {}, ValueError, "fit into uint8, 0 to 255; got 256"),
    "a class below 0": ((BYTES, 0.1, torch.tensor(-1)), {}, ValueError, "fit into uint8, 0 to 255; got -1"),
    "a class too far of many": (
        (BYTES.char(), 0.1, torch.tensor([1000] + [5] * (B - 1))), {}, ValueError, "int8, -128 to 127; got 1000"),
    "a class of 16 bits": (
        (BYTES, 0.1, torch.tensor(65535, dtype=torch.uint16)), {}, ValueError, "uint8, 0 to 255; got 65535"),
    "a number that wraps": ((BYTES, 0.1, 256), {}, ValueError, "null of cond must fit into uint8, 0 to 255; got 256"),
    "a number of 71 bits": ((LABELS, 0.1, 2**70), {}, ValueError, f"fit into int64, .*; got {2**70}"),
    "a number that becomes infinite": ((TOKENS.half(), 0.1, 1e6), {}, ValueError, "-65504 to 65504; got 1000000.0"),
    "a number that becomes infinite below": ((TOKENS.half(), 0.1, -(10**6)), {}, ValueError, "float16.*; got -1000000"),
    "a tensor that becomes infinite": (
        (TOKENS.half(), 0.1, torch.tensor([float("nan"), -1e6])), {}, ValueError, "float16.*; got -1000000.0"),
    "integers that become infinite": ((TOKENS.half(), 0.1, torch.tensor(10**6)), {}, ValueError, "float16.*1000000"),
    "a null of another form": (({"a": TOKENS}, 0.1, 0.0), {}, TypeError, "null must be of the form of cond, a dict"),
    "a null of other entries": (({"a": TOKENS}, 0.1, {"b": 0.0}), {}, ValueError, r"got \['a'\] and \['b'\]"),
    "a null of fewer entries": (([TOKENS, TOKENS], 0.1, [0.0]), {}, ValueError, r"entries; got \[0, 1\] and \[0\]"),
    "a null that is a text": ((TOKENS, 0.1, ""), {}, TypeError, "null of cond must be a number or a tensor; got ''"),
    "another batch": (([TOKENS, LABELS[:5]], 0.1, [0, 1]), {}, ValueError, r"cond\[1\] has shape \(5,\): .*cond\[0\]"),
    "no batch": ((torch.ones(()), 0.1), {}, ValueError, r"shape \(\): its first dimension must be the batch"),
    "another device": (
        ([TOKENS, TOKENS.to("meta")], 0.1), {}, ValueError, r"cond\[1\] is on meta, but cond\[0\] on cpu"),
    "a null on another device": ((TOKENS, 0.1, TOKENS[0].to("meta")), {}, ValueError, "null of cond is on meta"),
    "a seed and a generator": ((TOKENS, 0.1), {"seed": 1, "generator": torch.Generator()}, ValueError, "not both"),
    "a seed that is a text": ((TOKENS, 0.1), {"seed": "1"}, TypeError, "seed must be an integer"),
    "a fractional offset": ((TOKENS, 0.1), {"sample_offset": 0.5}, TypeError, "sample_offset must be a whole number"),
    "ids of floats": ((TOKENS, 0.1), {"ids": torch.ones(B)}, TypeError, "ids must be a tensor of integers"),
    "too few ids": ((TOKENS, 0.1), {"ids": torch.arange(5)}, ValueError, r"ids must be \[64\], one a sample"),
    "ids and an offset": (
        (TOKENS, 0.1), {"ids": torch.arange(B), "sample_offset": 4}, ValueError, "ids and sample_offset both say"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_arguments(case):
    given, how, kind, words = WRONG[case]
    with pytest.raises(kind, match=words):
        drop_condition(*given, **how)
