"""Which tests run where, and which of many like it run each time."""

import itertools
import os

import pytest

NIGHTLY = os.environ.get("FASTDIFF_NIGHTLY", "0") != "0"
nightly = pytest.mark.nightly


def examples(many: int) -> int:
    """How many examples a fuzzer tries: ``many`` at night."""
    return many if NIGHTLY else min(many, 1000)


def every_pair(cases: list[tuple]) -> set[int]:
    """The places of few of the ``cases`` that have every pair of two values that any of them has. Of a value that is a
    tuple, each part counts."""

    def values(case):
        parts = ((k, v) if isinstance(v, tuple) else (k, (v,)) for k, v in enumerate(case))
        return [(k, j, repr(part)) for k, value in parts for j, part in enumerate(value)]

    pairs = [set(itertools.combinations(values(case), 2)) for case in cases]
    missing, chosen = set().union(*pairs), set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen


def in_turn(**lists):
    """Parametrizes by every combination of the lists. Each time run those that go through all lists at once, each from
    its start again at its end; the others at night."""
    turns = {tuple(k % len(values) for values in lists.values()) for k in range(max(map(len, lists.values())))}
    places = itertools.product(*(range(len(values)) for values in lists.values()))
    cases = itertools.product(*lists.values())
    marks = (() if place in turns else nightly for place in places)
    return pytest.mark.parametrize(list(lists), [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks)])


def pairwise(**lists):
    """Parametrizes by every combination of the lists. Few that have every pair run each time, the others at night."""
    cases = list(itertools.product(*lists.values()))
    chosen = every_pair(cases)
    return pytest.mark.parametrize(
        list(lists), [pytest.param(*case, marks=() if i in chosen else nightly) for i, case in enumerate(cases)]
    )


BACKENDS = ["reference", "native", "native, no fast calls"]
# For a test that takes a ``device`` too: on a GPU, once, with what is chosen there.
on_every_device = pytest.mark.parametrize(
    "backend", [*BACKENDS, pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


def why_skipped(file, keywords, chosen, gpu):
    """Why a test with these keywords is skipped; None if it is run. ``chosen``: what was given as -m."""
    if "large" in keywords and "large" not in chosen:
        return "needs 14 GiB: run with -m large"
    if not gpu:
        return "needs a CUDA device" if "gpu" in keywords else None
    if "compiles" in keywords and "compiles" not in chosen:
        return "compiles for minutes, and needs no GPU: run with -m compiles"
    if file == "test_triton_operations.py" and "gpu_variants" not in keywords and "gpu_variants" not in chosen:
        return "a GPU would compile its kernel variants, minutes of them all: the interpreter runs it"
    return None
