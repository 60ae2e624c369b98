"""``fastdiff bench``: what the operations take on this machine, against what one would use instead and against what the
memory allows. docs/performance.md says how it measures.

It stands on the public API alone. ``cases`` is the one set of cases, also for pytest-benchmark in ``benchmarks/``;
``peers`` says what each peer does for a case; ``counting`` counts bytes, launches and memory; ``running`` decides what
is timed when. ``report`` makes plain values of it. The table, the plots, the page and the comparison know only those,
so they work on any report file.
"""


class BenchError(Exception):
    """Something the user can put right. The command line prints the message alone and exits with status 2."""
