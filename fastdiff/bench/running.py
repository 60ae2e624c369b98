"""A run: compile what is to be compiled, then measure every case in sweeps, the peers in turn within each."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch

from . import counting, peers
from .cases import Case, Operands, operand_bytes, operands
from .measuring import Copy, Spread, Timer, cache_bytes, free_bytes, summary
from .peers import Missing
from .progress import Progress

SWEEPS = 2  # so that the spread takes in what drifts within minutes
BURST_SECONDS = 1e-3  # a sample is the mean of as many calls in a row as take so long
MAX_BURST = 50  # calls
MAX_QUEUED = 500  # launches of a burst on a GPU; its queue takes about a thousand
LAUNCHING_SECONDS, FEW_CALLS = 3e-3, 4  # a GPU waits no longer than this for a burst of more calls to be launched
SETTLE_SECONDS = 4e-3  # a shorter call is made once untimed before, so that its threads are awake
MAX_SETS = 32  # sets of operands to rotate through; a case that would need more stays in the cache
MAX_ROUNDS = 60
MIN_SWEEP_ROUNDS = 3
BLOCKS = 6  # of rounds in a sweep: each gives one ratio
HOPELESS = 1.5  # times a case's time: a reference that takes more a call is timed once, or not at all


@dataclass
class Measurement:
    """What is known of one peer in one case."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # its time over fastdiff's, block of rounds by block
    host_seconds: float | None = None
    count: counting.Count | None = None
    peak_bytes: int | None = None
    queued: bool = True  # on a GPU, its calls were launched ahead, so that ``seconds`` is the device's time alone
    missing: str | None = None

    @property
    def spread(self) -> Spread | None:
        return summary(self.seconds) if self.seconds else None

    @property
    def ratio(self) -> Spread | None:
        return summary(self.ratios) if self.ratios else None


@dataclass
class Run:
    """The state and the results of a run.

    Attributes:
        results: by case, then by peer; a case that was not reached is not in it.
        rotated: whether the operands of a case came from beyond the cache.
        notes: what is missing, in words.
        complete: whether every case was reached.
    """

    cases: list[Case]
    names: tuple[str, ...]
    device: torch.device
    seconds: float
    compile_seconds: float
    sweeps: int = SWEEPS
    before_case: Callable[[], None] = lambda: None
    results: dict[Case, dict[str, Measurement]] = field(default_factory=dict)
    rotated: dict[Case, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    complete: bool = False

    def __post_init__(self):
        self.timer = Timer(self.device)
        self.copy = Copy(self.timer)
        self._graphs: dict[tuple, list[str]] = {}  # sources by graph
        self._not_compiled: dict[Case, str] = {}
        self._host: dict[tuple, float] = {}
        self._case_seconds = self.seconds / max(1, len(self.cases) * self.sweeps)

    # ---- the whole

    def measure_copy(self) -> None:
        """Measure the ceiling, for the first time or again."""
        try:
            self.copy.measure()
        except (RuntimeError, MemoryError) as error:
            self.notes.append(f"the copy ceiling: {_first_line(error)}")

    def measure(self, progress: Progress) -> None:
        """Measure everything. Ctrl-C ends it early; what was measured stays."""
        try:
            with peers.many_graphs():
                self._compile(progress)
                for sweep in range(self.sweeps):
                    for (shape, dtype), group in groupby(self.cases, key=lambda case: (case.shape, case.dtype)):
                        self._sweep_group(shape, dtype, list(group), sweep, progress)
                    self.measure_copy()
            self.complete = True
        except KeyboardInterrupt:
            times = [self.results[case]["fastdiff"].seconds for case in self.cases if case in self.results]
            unreached = len(self.cases) - sum(bool(seconds) for seconds in times)
            self.notes.append(f"interrupted: {unreached} of {len(self.cases)} cases not measured")
        self._note_missing()

    def planned(self, case: Case) -> float:
        """Seconds that a sweep of a case will take: its share of the time, or for large ones the fewest rounds, which
        are about a thousand passes over a tensor."""
        return max(
            self._case_seconds,
            1000 * case.tensor_bytes / (summary(self.copy.rates).median if self.copy.rates else 3e10),
        )

    def planned_in_all(self) -> float:
        return self.compile_seconds + self.sweeps * sum(self.planned(case) for case in self.cases)

    # ---- torch.compile

    def _compile(self, progress: Progress) -> None:
        if "compile" not in self.names:
            return
        clock = _Clock()
        for case in sorted(self.cases, key=_compile_priority):
            new = [graph for graph in self._graph_names(case) if graph not in self._graphs]
            if not new:
                continue
            if clock.seconds() >= self.compile_seconds:
                self._not_compiled[case] = "the time for compiling was used up"
                continue
            before = clock.seconds()
            progress.say(f"torch.compile: {case.name}")
            try:
                made = operands(case.shape, case.dtype, self.device)
                with counting.Generated() as generated:
                    peers.build("compile", case, self.device)(made)
            except Exception as error:
                self._not_compiled[case] = f"torch.compile failed: {_first_line(error)}"
            else:
                for graph in new:
                    self._graphs[graph] = []
                self._graphs[new[0]] = generated.sources
            progress.advance(min(clock.seconds(), self.compile_seconds) - min(before, self.compile_seconds))
        progress.advance(max(0.0, self.compile_seconds - clock.seconds()))

    def _graph_names(self, case: Case) -> list[tuple]:
        names = peers.graphs(case)
        if case.operation == "training step" and self.device.type != "cpu":
            names.append(("randn", case.dtype, case.shape, False))
        return names

    # ---- measuring

    def _sweep_group(self, shape: tuple, dtype: str, group: list[Case], sweep: int, progress: Progress) -> None:
        try:
            sets, rotated = self._operand_sets(max(group, key=operand_bytes))
        except Exception as error:
            for case in group:
                self._set_missing(case, f"no memory for its tensors: {_first_line(error)}")
                self.before_case()
                progress.advance(self.planned(case))
            return
        for case in group:
            progress.say(case.name)
            self.before_case()
            self.rotated[case] = rotated
            self._sweep_case(case, sets, sweep)
            progress.advance(self.planned(case))

    def _operand_sets(self, case: Case) -> tuple[list[Operands], bool]:
        size, cache, free = operand_bytes(case), cache_bytes(self.device), free_bytes(self.device)
        # Eager code holds several float32 tensors more.
        if free is not None and size * 4 > free:
            raise MemoryError(f"about {size * 4 / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free")
        number = max(2, math.ceil(3 * cache / size))
        rotated = number <= MAX_SETS
        if not rotated:
            number = 1
        if free is not None:
            number = max(1, min(number, int(0.4 * free // size)))
        return [operands(case.shape, case.dtype, self.device, seed) for seed in range(number)], rotated

    def _sweep_case(self, case: Case, sets: list[Operands], sweep: int) -> None:
        measured = self.results.setdefault(case, {name: Measurement() for name in self.names})
        calls: dict[str, peers.Call] = {}
        for name in self.names:
            found = measured[name]
            if found.missing is not None:
                continue
            try:
                calls[name] = self._prepare(name, case)
                if sweep == 0:
                    self._count(name, case, calls[name], sets[0], found)
                else:
                    calls[name](sets[0])
            except Exception as error:
                calls.pop(name, None)
                if isinstance(error, Missing):
                    found.missing = str(error)
                    continue
                found.missing = _failure(error)
                self._release()
        if calls:
            self._rounds(calls, sets, measured, sweep)
        for o in sets:
            o.prediction.grad = None

    def _prepare(self, name: str, case: Case) -> peers.Call:
        if name == "compile" and case in self._not_compiled:
            raise Missing(self._not_compiled[case])
        if name == "reference" and self._expected_reference(case) > HOPELESS * self._case_seconds:
            raise Missing("too slow for the time of this run")
        return peers.build(name, case, self.device)

    def _expected_reference(self, case: Case) -> float:
        """Seconds a call, from the largest smaller case of its sort; 0 where there is none."""
        smaller = [
            (other.elements, min(found["reference"].seconds))
            for other, found in self.results.items()
            if (other.operation, other.kind, other.dtype) == (case.operation, case.kind, case.dtype)
            and 1e5 < other.elements < case.elements
            and found["reference"].seconds
        ]
        if not smaller:
            return 0.0
        elements, seconds = max(smaller)
        return seconds * case.elements / elements

    def _count(self, name: str, case: Case, call: peers.Call, o: Operands, found: Measurement) -> None:
        """The first calls of a peer: they warm it up, and what they move and keep is counted."""
        if name in ("eager", "diffusers", "reference"):
            found.count = counting.trace(lambda: call(o))
        elif name == "compile":
            call(o)
            sources = [source for graph in self._graph_names(case) for source in self._graphs.get(graph, [])]
            found.count = _with_drawn_noise(case, self.device, counting.generated(sources))
        else:
            result = call(o)
            found.count = counting.recorded(lambda: call(o)) if self.device.type != "cpu" else None
            if found.count is None:
                found.count = counting.known_operands(case, o, result)
                if self.device.type == "cuda":  # launched by C++, which records nothing
                    launches = counting.profiled_launches(lambda: call(o), self.device)
                    found.count = replace(found.count, launches=launches)
            del result
        o.prediction.grad = None
        if name != "reference" or case.elements < 2e6:  # there it would take as long as measuring it
            found.peak_bytes = counting.peak_memory(lambda: call(o), self.device)
            o.prediction.grad = None
        found.host_seconds = self._host_seconds(name, case, call, o)

    def _host_seconds(self, name: str, case: Case, call: peers.Call, o: Operands) -> float | None:
        """What a call costs the host: on a GPU until it returns; on a CPU, which does the work itself, a call on one
        element."""
        if self.device.type != "cpu":
            return self.timer.host_seconds(lambda: call(o))
        if name == "compile":  # it would be another graph
            return None
        key = (name, case.operation, case.kind, case.dtype, len(case.shape))
        if key not in self._host:
            one = operands((1,) * len(case.shape), case.dtype, self.device)
            call = peers.build(name, case, self.device)
            call(one)
            self._host[key] = self.timer.host_seconds(lambda: call(one))
        return self._host[key]

    def _rounds(
        self, calls: dict[str, peers.Call], sets: list[Operands], measured: dict[str, Measurement], sweep: int
    ) -> None:
        rotation, clock = _Rotation(sets), _Clock()
        once = {name: self._timed(calls, name, 1, rotation, measured) for name in list(calls)}
        once = {name: seconds for name, seconds in once.items() if seconds is not None}
        repeats = {name: self._repeats(seconds, measured[name]) for name, seconds in once.items()}
        if once.get("reference", 0.0) > HOPELESS * self._case_seconds:
            measured["reference"].seconds.append(once.pop("reference"))
        rounds: list[dict[str, float]] = []
        try:
            with _no_garbage_collection():
                while len(rounds) < MIN_SWEEP_ROUNDS or (
                    len(rounds) < MAX_ROUNDS and clock.seconds() < self._case_seconds
                ):
                    # Who comes first changes, so that no one always finds what the same other left behind.
                    first = len(rounds) % max(1, len(once))
                    taken = {}
                    for name in [*list(once)[first:], *list(once)[:first]]:
                        settle = once[name] < SETTLE_SECONDS
                        seconds = self._timed(calls, name, repeats[name], rotation, measured, settle)
                        if seconds is None:
                            del once[name]
                        else:
                            taken[name] = seconds
                    if not taken:
                        break
                    rounds.append(taken)
        finally:  # Ctrl-C too
            for name in once:
                measured[name].seconds += [taken[name] for taken in rounds if name in taken]
                if name != "fastdiff":
                    measured[name].ratios += block_ratios(rounds, name, "fastdiff")

    def _repeats(self, seconds: float, found: Measurement) -> int:
        """Calls in a burst, of a call that takes ``seconds``. A GPU pauses until all are launched, so there are fewer
        of what takes the host longer than it."""
        most = MAX_BURST
        if self.device.type == "cuda":
            launches = found.count.launches if found.count is not None and found.count.launches else 20
            most = min(most, MAX_QUEUED // launches)
            if found.host_seconds:
                most = min(most, max(FEW_CALLS, int(LAUNCHING_SECONDS / found.host_seconds)))
        return max(1, min(most, math.ceil(BURST_SECONDS / seconds)))

    def _timed(
        self,
        calls: dict[str, peers.Call],
        name: str,
        repeats: int,
        rotation: _Rotation,
        measured: dict[str, Measurement],
        settle: bool = False,
    ) -> float | None:
        call = calls[name]
        try:
            if settle:
                call(rotation.next())
            found = measured[name]
            seconds = self.timer.seconds([_bound(call, rotation.next()) for _ in range(repeats)], found.host_seconds)
            found.queued = found.queued and self.timer.queued
            return seconds
        except Exception as error:
            measured[name].missing = _failure(error)
            self._release()
            return None

    # ---- what is missing

    def _set_missing(self, case: Case, reason: str) -> None:
        measured = self.results.setdefault(case, {name: Measurement() for name in self.names})
        for found in measured.values():
            found.missing = reason

    def _note_missing(self) -> None:
        """One note for each reason, with how often it struck."""
        reasons: dict[tuple[str, str], int] = {}
        for measured in self.results.values():
            for name, found in measured.items():
                reason = found.missing
                if reason is None and not found.queued:
                    reason = "not all calls could be launched ahead of the device: the time has the host's in it"
                if reason is not None:
                    reasons[name, reason] = reasons.get((name, reason), 0) + 1
        for (name, reason), number in sorted(reasons.items()):
            self.notes.append(f"{name}: {reason} ({number} of {len(self.cases)} cases)")

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class _Rotation:
    """The sets of operands, one after the other."""

    def __init__(self, sets: list[Operands]):
        self._sets, self._next = sets, 0

    def next(self) -> Operands:
        found = self._sets[self._next]
        self._next = (self._next + 1) % len(self._sets)
        return found


class _Clock:
    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start


def _bound(call: peers.Call, o: Operands) -> Callable[[], Any]:
    return lambda: call(o)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def block_ratios(rounds: list[dict[str, float]], name: str, to: str) -> list[float]:
    """Ratios of ``name``'s time to that of ``to``, one for each of about ``BLOCKS`` blocks of rounds that follow each
    other: of the medians within the block, so that a single call that was interrupted does not show."""
    both = [taken for taken in rounds if name in taken and to in taken]
    size = max(1, len(both) // BLOCKS)
    blocks = [both[start : start + size] for start in range(0, len(both) - size + 1, size)]
    return [
        summary([taken[name] for taken in block]).median / summary([taken[to] for taken in block]).median
        for block in blocks
    ]


def _compile_priority(case: Case) -> tuple:
    """Cases of one graph first, so that a graph's source is known to be its own; among them what says most: v before
    the others, mid-sized before tiny, large and odd ones."""
    kinds = ("v_prediction", "epsilon", "flow")
    return (
        len(peers.graphs(case)),
        case.operation == "loss",
        kinds.index(case.kind),
        case.dtype != "fp32",
        abs(math.log2(case.elements / 2**20)),
        case.shape,
    )


def _with_drawn_noise(case: Case, device: torch.device, count: counting.Count | None) -> counting.Count | None:
    """On a CPU noise is drawn outside of the graphs, each by one operation that writes it."""
    draws = {"training step": 1, "sampler step+noise": 1, "latents": 2}.get(case.operation, 0)
    if count is None or device.type != "cpu" or not draws:
        return count
    return counting.Count(count.bytes + draws * case.tensor_bytes, (count.launches or 0) + draws, count.by)


def _failure(error: BaseException) -> str:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"failed: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
