"""Asks the tests about one planted fault: forked processes, each in a copy of the tree, that have imported what takes
long and nothing of fastdiff."""

from __future__ import annotations

import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest

NOTICED, SURVIVED, TIMED_OUT, BROKEN = "noticed", "survived", "timed out", "broken"
_CODES = {10: NOTICED, 11: SURVIVED, 12: BROKEN}
_FIRST = 3  # cases of a test function that are asked before its others
_TURNS = (2.0, 10.0, math.inf)  # seconds that a function takes at most to be asked in the first turn, the second, ...
_KILLED = 240  # seconds after which a process that takes no processor time either is stopped


def preload():
    """What the tests import, but for fastdiff."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    modules = (
        "torch numpy hypothesis matplotlib.pyplot PIL.Image sklearn.datasets scipy.stats triton.language diffusers"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in [*modules.split(), "torch.utils.data", "torch.testing", "torch._dynamo"]:
            try:
                __import__(module)
            except ImportError:
                pass
    assert "fastdiff" not in sys.modules


class Trees:
    """Copies of the tree, one for each process that runs at a time."""

    def __init__(self, root: Path, count: int):
        self.root, self.folder = root, Path(tempfile.mkdtemp(prefix="fastdiff-mutants-"))
        left_out = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "runs", "*.egg-info")
        self.free = []
        for i in range(count):
            shutil.copytree(root, self.folder / str(i), ignore=left_out)
            self.free.append(self.folder / str(i))

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


class Asked:
    """A fault that is being asked about: ``tests`` says which functions of which files, in this order, and how many
    seconds each takes; "*" stands for all others of the file."""

    def __init__(self, mutant, tree: Path, tests: dict[str, dict[str, float]], limit: float):
        self.mutant, self.tree, self.began = mutant, tree, time.monotonic()
        (tree / mutant.file).write_text(mutant.place.planted(mutant.text))
        self.log = tree / "asked.log"
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            os._exit(_child(tree, tests, limit, self.log))

    def outcome(self) -> str | None:
        """None as long as it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.monotonic() - self.began < _KILLED:
            return None
        self.stop()
        self.by = self._failed()
        if not pid:
            os.waitpid(self.pid, 0)
            return TIMED_OUT
        if os.WIFSIGNALED(status):
            return TIMED_OUT if os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM) else NOTICED
        return _CODES.get(os.WEXITSTATUS(status), NOTICED)

    def stop(self):
        """Ends it with everything that it started, and puts the file back."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        (self.tree / self.mutant.file).write_text(self.mutant.place.source)

    def _failed(self) -> str:
        """The test that failed."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return next((line.split(" ")[1] for line in reversed(lines) if line.startswith(("FAILED ", "ERROR "))), "")


def _child(tree: Path, tests, limit: float, log: Path) -> int:
    os.chdir(tree)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2)
    sys.path[:0] = [str(tree)]
    os.environ["PYTHONPATH"] = str(tree)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    try:
        import fastdiff
    except Exception as error:
        print(f"ERROR import {error!r}", flush=True)
        return 10
    if not Path(fastdiff.__file__).is_relative_to(tree):
        return 12
    started = time.process_time()
    for turn in range(len(_TURNS)):
        for file, functions in tests.items():
            left = limit - (time.process_time() - started)
            if left <= 0:
                return 11
            if turn > max(map(_turn, functions.values())):
                continue
            asked = _Choice(functions, turn, left)
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "no:xdist", "--tb=line"]
            code = pytest.main([*options, f"--rootdir={tree}", "-c", str(tree / "pyproject.toml"), file], [asked])
            if code in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED) and not asked.out_of_time:
                return 10
            if code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR):
                return 12
    return 11


def _turn(seconds: float) -> int:
    return next(turn for turn, most in enumerate(_TURNS) if seconds <= most)


class _Choice:
    """Which cases of a file are run, cheap functions first. In the first turn come those that take little time, all
    cases of a function or a few that are drawn at random; later the others."""

    def __init__(self, functions: dict[str, float], turn: int, limit: float):
        self.functions, self.turn, self.limit = functions, turn, limit
        self.began, self.out_of_time = time.process_time(), False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        names = [".".join(item.nodeid.split("[")[0].split("::")[1:]) for item in items]
        order = list(enumerate(zip(names, items)))
        random.Random(0).shuffle(order)
        cases, counts, kept = Counter(names), Counter(), []
        for place, (name, item) in order:
            seconds = self.functions.get(name, self.functions.get("*"))
            if seconds is not None and not item.get_closest_marker("skip"):
                counts[name] += 1
                few = 0.0 if seconds == math.inf else seconds * min(1.0, _FIRST / cases[name])
                if self.turn == _turn(few if counts[name] <= _FIRST else seconds):
                    # A test whose resources are shared by its class runs beside the others of its class.
                    kept.append((0.0 if item.cls else seconds, place, item))
        items[:] = [item for _, _, item in sorted(kept)]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        # A test that never ends is ended by the signal's default action, also inside of a kernel.
        left = self.limit - (time.process_time() - self.began)
        signal.setitimer(signal.ITIMER_PROF, max(left, 0) + 30)
        yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        if left <= 0:
            self.out_of_time = True
            item.session.shouldstop = "out of time"
