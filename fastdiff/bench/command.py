"""``fastdiff bench``: what happens in which order, what is written, and what is said."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ..demo.run import pick_device
from ..files import write_atomically
from ..showing import printable
from . import BenchError, compare, models, page, plots, report, table
from .cases import PRESETS, choose
from .interrupts import Interrupts
from .peers import AGAINST
from .processes import Group, launch
from .progress import Progress
from .running import Run

MODEL_SECONDS = 25.0


@dataclass(frozen=True)
class BenchOptions:
    """What ``fastdiff bench`` was asked for. None: as the preset has it."""

    preset: str = "quick"
    device: str = "auto"
    dtypes: tuple[str, ...] | None = None
    against: tuple[str, ...] = AGAINST
    model: str = "none"
    out: Path | None = None
    seconds: float | None = None
    threads: int | None = None


def bench(options: BenchOptions) -> dict[str, Any]:
    """Measure, write the report, and print the table. Returns the report.

    Ctrl-C ends the measuring: what was measured is written and printed, and KeyboardInterrupt raised again. On a CPU
    nothing is left anywhere but in the folder of the run, and in TORCHINDUCTOR_CACHE_DIR where that is set.
    """
    started = time.perf_counter()
    for peer in options.against:
        if peer not in AGAINST:
            raise BenchError(f"unknown --against {peer!r}: use some of {', '.join(AGAINST)}, or none.")
    if options.model not in (*models.MODELS, "none"):
        raise BenchError(f"unknown model {options.model!r}: use one of {', '.join(models.MODELS)}, none.")
    if options.threads is not None and options.threads < 1:
        raise BenchError(f"--threads must be at least 1; got {options.threads}.")
    if options.seconds is not None and not options.seconds > 0:
        raise BenchError(f"--seconds must be positive; got {options.seconds}.")
    cases = choose(options.preset, options.dtypes)
    device = pick_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    out = _folder(options.out)
    group = Group.join()
    device = group.device(device)
    preset = PRESETS[options.preset]
    measuring = preset.seconds if options.seconds is None else options.seconds
    compiling = preset.compile_seconds if "compile" in options.against else 0.0
    if options.seconds is not None:
        compiling = min(compiling, options.seconds)
    modelling = 0.0 if options.model == "none" else min(MODEL_SECONDS, 2 * measuring)
    run = Run(cases, ("fastdiff", *options.against), device, measuring, compiling, before_case=group.wait)
    if options.device == "auto" and device.type == "cpu":
        run.notes.append("a GPU: there is none here, this is the CPU")
    model = None
    progress = Progress(0.0, quiet=True)
    compiles = "compile" in options.against
    caches = _caches_in(out, compiles) if device.type == "cpu" else contextlib.nullcontext()
    with Interrupts() as interrupts, caches:
        try:
            run.measure_copy()
            progress = Progress(run.planned_in_all() + modelling, quiet=group.rank != 0)
            run.measure(progress)
            if run.complete and modelling:
                model = _model(options.model, run, modelling, progress)
            interrupts.hold()
        except KeyboardInterrupt:
            run.complete = False
            run.notes.append("interrupted")
        progress.close()
        found = report.build(run, options.preset, time.perf_counter() - started)
        found["model"] = model
        if run.complete:
            found["ranks"] = group.gather(found)
        if group.rank == 0:
            _write(found, out)
            _print(found, out)
    if not run.complete or interrupts.waiting:
        raise KeyboardInterrupt
    group.leave()
    return found


def compare_files(a: Path, b: Path) -> None:
    """Print what changed from one report to the other."""
    found = [report.load(path) for path in (a, b)]
    try:
        text = compare.text(*found)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BenchError(
            f"{a} and {b} cannot be compared: one has not the fields of a report ({type(error).__name__}: {error})."
        ) from error
    print(printable(text))


def in_processes(processes: int, arguments: list[str]) -> int:
    """Run in several processes; returns the exit status."""
    return launch(processes, arguments)


def _model(name: str, run: Run, seconds: float, progress: Progress) -> dict[str, Any] | None:
    try:
        return models.share(name, run.device, run.cases[0].dtype, seconds, progress)
    except (BenchError, RuntimeError, MemoryError) as error:
        run.notes.append(f"{name}: {error}")
        return None


def _folder(out: Path | None) -> Path:
    folder = Path("runs") / f"bench-{datetime.now():%Y%m%d-%H%M%S}" if out is None else out
    if folder.exists() and not folder.is_dir():
        raise BenchError(f"--out {folder} is a file: name a folder.")
    folder.mkdir(parents=True, exist_ok=True)  # before the measuring, so that a wrong one is not found after it
    return folder


# Where torch.compile and matplotlib keep what they have compiled and found for the next time.
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR")


@contextlib.contextmanager
def _caches_in(out: Path, compiles: bool) -> Iterator[None]:
    """Caches that have no place of their own go to a folder in ``out`` that is removed at the end."""
    names = [name for name in _CACHES if name not in os.environ]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix=".caches-", dir=out.resolve(), ignore_cleanup_errors=True)
        )
        for name in names:
            stack.callback(os.environ.pop, name, None)
            os.environ[name] = folder
        if compiles and "TORCHINDUCTOR_CACHE_DIR" in names:
            _keep_headers_in(folder, stack)
        yield


def _keep_headers_in(folder: str, stack: contextlib.ExitStack) -> None:
    """The precompiled headers of torch.compile's C++ have a place of their own, which no setting moves."""
    from torch._inductor import codecache

    for name in ("_HEADER_DIR", "_HEADER_LOCK_DIR"):
        if hasattr(codecache, name):
            stack.callback(setattr, codecache, name, getattr(codecache, name))
            setattr(codecache, name, os.path.join(folder, "headers" + name.lower()))
    if hasattr(codecache, "_precompile_header"):  # it remembers where a header is
        codecache._precompile_header.cache_clear()
        stack.callback(codecache._precompile_header.cache_clear)


def _write(found: dict[str, Any], out: Path) -> None:
    """Every output, each whole or not there: the numbers first."""
    _text(out / "bench.json", json.dumps(found, indent=1) + "\n")
    _text(out / "bench.csv", table.as_csv(found))
    _text(out / "bench.md", table.markdown(found))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        found["notes"].append("no plots: matplotlib is not installed (pip install fastdiff[bench])")
        _text(out / "bench.json", json.dumps(found, indent=1) + "\n")
    else:
        if plots.plots(found):
            write_atomically(out / "bench.png", lambda file: file.write(plots.png(found)))
    _text(out / "bench.html", page.page(found))


def _text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _print(found: dict[str, Any], out: Path) -> None:
    width = shutil.get_terminal_size((200, 24)).columns
    print(table.text(found, width))
    print()
    said = table.summary(found)
    if found["model"]:
        said.append(table.model_text(found["model"]))
    for line in said:
        print(textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False))
    if found["ranks"]:
        print()
        print(table.ranks_text(found))
    print()
    others = ", ".join(peer for peer in found["peers"] if peer != table.OURS)
    end = "time: median of a call; "
    if others:
        end += f"{others}: how many times as long they take (wide: it varies too much); "
    print(textwrap.fill(f"{end}more in {out / 'bench.html'}", width, break_on_hyphens=False, break_long_words=False))
