"""Noise and losses of parts of a whole, in 1, 2, 3 and 4 processes; what ranks draw, compare and survive.

The checks stand in the modules beside this one. All of them run in the same four processes.
"""

import checks_of_failures
import checks_of_parts
import checks_of_ranks
import checks_of_trainers
import checks_of_videos
import processes
import pytest

MODULES = (checks_of_parts, checks_of_videos, checks_of_ranks, checks_of_trainers, checks_of_failures)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return processes.run([module.__name__ for module in MODULES], 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [name for module in MODULES for name in module.CHECKS])
def test_distributed(name, found):
    results = found.get(name, [None] * 4)
    expected = ["", "", "", None] if name == "a_rank_that_dies" else [""] * 4
    assert results == expected, "\n".join(f"rank {rank}: {result}" for rank, result in enumerate(results))
