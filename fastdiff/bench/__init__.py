"""``fastdiff bench``: what the operations take on this machine, against what one would use instead and against what the
memory allows. docs/performance.md says how it measures."""


class BenchError(Exception):
    """Something the user can put right. The command line prints the message alone and exits with status 2."""
