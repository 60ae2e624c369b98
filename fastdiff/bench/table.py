"""The report as a table: for the terminal, for Markdown, and as CSV with every number."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .report import case_name

OURS = "fastdiff"


@dataclass(frozen=True)
class Column:
    """A heading, what stands below it, and how soon it is dropped where there is no room (0 never)."""

    heading: str
    cell: Callable[[dict[str, Any]], str]
    expendable: int = 0


def columns(peers: list[str]) -> list[Column]:
    """The columns: what fastdiff takes, then how many times as long the others take, and what they cost the host."""

    def ours(show: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
        return lambda case: show(case["peers"][OURS])

    def theirs(peer: str, show: Callable[[Any], str], name: str) -> Callable[[dict[str, Any]], str]:
        return lambda case: show(case["peers"].get(peer, {}).get(name))

    found = [
        Column("case", case_name),
        Column("time", ours(lambda m: time(m["seconds"] and m["seconds"]["median"]))),
        Column("p20 to p80", ours(lambda m: spread_of_time(m["seconds"])), 4),
        Column("host", ours(lambda m: time(m["host_seconds"])), 3),
        Column("launches", ours(lambda m: count(m["launches"])), 6),
        Column("moved", ours(lambda m: size(m["bytes"])), 5),
        Column("extra memory", ours(lambda m: size(m["peak_bytes"])), 7),
        Column("GB/s", ours(lambda m: number(m["bytes_per_second"], 1e-9)), 2),
        Column("of copy", ours(lambda m: share(m["of_ceiling"]))),
        Column("images/s", ours(lambda m: rate(m["images_per_second"])), 1),
    ]
    for peer in peers:
        if peer != OURS:
            found.append(Column(f"{peer} ×", lambda case, peer=peer: ratio(case["peers"].get(peer))))
    for peer in peers:
        if peer != OURS:
            found += [
                Column(f"{peer} host", theirs(peer, time, "host_seconds"), 8),
                Column(f"{peer} launches", theirs(peer, count, "launches"), 9),
            ]
    return found


def text(report: dict[str, Any], width: int | None = None) -> str:
    """Aligned columns; the least telling ones are dropped until the table fits into ``width``.

    Where that is not enough, what cases share stands in a line above them, and a wide spread is not shown.
    """
    chosen = columns(report["peers"])
    while True:
        lines = [[column.heading for column in chosen]]
        lines += [[column.cell(case) for column in chosen] for case in report["cases"]]
        rows = _rows(lines)
        expendable = max(chosen, key=lambda column: column.expendable)
        if width is None or max(map(len, rows)) <= width:
            return "\n".join(rows)
        if not expendable.expendable:
            return _narrow(report, chosen, width)
        chosen.remove(expendable)


def _narrow(report: dict[str, Any], chosen: list[Column], width: int) -> str:
    """``text`` for a terminal of 80 columns: peers are dropped from the last on where even that is too much."""
    chosen = list(chosen)
    while True:
        lines, above = [["", *(column.heading.removesuffix(" ×") for column in chosen[1:])]], [""]
        for case in report["cases"]:
            cells = (column.cell(case) for column in chosen[1:])
            lines.append([f"  {case['operation']}", *("wide" if cell.startswith("wide") else cell for cell in cells)])
            above.append(f"{case['kind']} {case['dtype']} {'x'.join(map(str, case['shape']))}")
        rows = _rows(lines)
        if max(map(len, rows)) <= width or len(chosen) <= 3:
            break
        chosen.pop()
    found = [rows[0]]
    for before, shared, row in zip(above, above[1:], rows[1:]):
        found += [row] if shared == before else [shared, row]
    return "\n".join(found)


def _rows(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    return ["  ".join(_aligned(cell, widths, index) for index, cell in enumerate(line)).rstrip() for line in lines]


def _aligned(cell: str, widths: list[int], index: int) -> str:
    return cell.ljust(widths[index]) if index == 0 else cell.rjust(widths[index])


def markdown(report: dict[str, Any]) -> str:
    """The whole table, with what it was measured on above it."""
    chosen = columns(report["peers"])
    lines = [
        "# Benchmark: " + report["device"]["description"],
        "",
        *(f"- {line}" for line in summary(report)),
        "",
        LEGEND,
        "",
        "| " + " | ".join(column.heading for column in chosen) + " |",
        "|" + "---|" * len(chosen),
    ]
    lines += ["| " + " | ".join(column.cell(case) for column in chosen) + " |" for case in report["cases"]]
    if report["model"]:
        lines += ["", model_text(report["model"])]
    return "\n".join(lines) + "\n"


LEGEND = (
    "time: median of a call of fastdiff; host: until the call returns on a GPU; on a CPU, which does the work itself, "
    "the call on one element; launches: of kernels, or operations of PyTorch; NAME host, NAME launches: those of NAME; "
    "moved: bytes counted; of copy: the least bytes there can be over the time, as a share of the measured copy; "
    "NAME ×: how many times as long NAME takes, medians of rounds in the same run; 'wide' and the spread where it "
    "varies too much."
)


def summary(report: dict[str, Any]) -> list[str]:
    """What was measured where, and what is missing."""
    versions, ceiling, device = report["versions"], report["ceiling"], report["device"]
    copy = "not measured"
    if ceiling:
        copy = (
            f"{ceiling['bytes_per_second'] / 1e9:.1f} GB/s ({ceiling['p20'] / 1e9:.1f} to {ceiling['p80'] / 1e9:.1f}) "
            f"between buffers of {size(ceiling['buffer_bytes'])}"
        )
    lines = [
        f"{device['description']}, backend {device['backend']}, {device['threads']} CPU threads",
        f"fastdiff {versions['fastdiff']}, PyTorch {versions['torch']}, Python {versions['python']}, "
        f"preset {report['preset']}, {report['created']}, {report['seconds']:.0f} s",
        f"copy ceiling: {copy}",
    ]
    if not report["complete"]:
        lines.append("this run is not complete")
    return lines + [f"missing: {note}" for note in report["notes"]]


def model_text(model: dict[str, Any]) -> str:
    """The share of a training step, in words."""
    before, after = model["before"], model["after"]
    return (
        f"{model['name']} ({model['parameters'] / 1e6:.1f}M parameters, {'x'.join(map(str, model['shape']))} "
        f"{model['dtype']}): noising and loss take {share(before['share'])} of an eager training step "
        f"({time(before['objective_seconds']['median'])} of {time(before['seconds']['median'])}), "
        f"{share(after['share'])} with fastdiff ({time(after['objective_seconds']['median'])} of "
        f"{time(after['seconds']['median'])}); "
        + (
            f"the whole step takes {model['ratio']['median']:.3f} times as long without it "
            f"({model['ratio']['p20']:.3f} to {model['ratio']['p80']:.3f})."
            if model["ratio"]["steady"]
            else "the whole step varies too much for a ratio."
        )
    )


def ranks_text(report: dict[str, Any]) -> str:
    """Images a second of each process and of all."""
    rows = [["case", "processes", "images/s each", "images/s together", "GB/s together"]]
    for entry in report["ranks"]["cases"]:
        each = entry["images_per_second"]
        known = [value for value in each if value]
        moved = [value for value in entry["bytes_per_second"] if value]
        rows.append(
            [
                entry["case"],
                f"{len(known)} of {len(each)}",
                f"{rate(min(known, default=None))} to {rate(max(known, default=None))}",
                rate(sum(known) or None),
                number(sum(moved) or None, 1e-9),
            ]
        )
    return "\n".join(_rows(rows))


def as_csv(report: dict[str, Any]) -> str:
    """One line for each case and peer, every number in full."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    numbers = ("host_seconds", "launches", "bytes", "counted_by", "peak_bytes", "bytes_per_second", "of_ceiling")
    spread = ("median", "p20", "p80", "rounds")
    writer.writerow(
        ["operation", "kind", "dtype", "shape", "elements", "floor_bytes", "rotated", "peer"]
        + [f"seconds_{name}" for name in spread]
        + list(numbers)
        + ["images_per_second"]
        + [f"ratio_{name}" for name in (*spread, "steady")]
        + ["missing", "device", "torch", "fastdiff"]
    )
    for case in report["cases"]:
        for peer, m in case["peers"].items():
            writer.writerow(
                [case["operation"], case["kind"], case["dtype"], "x".join(map(str, case["shape"]))]
                + [case["elements"], case["floor_bytes"], case["rotated"], peer]
                + [(m["seconds"] or {}).get(name) for name in spread]
                + [m[name] for name in (*numbers, "images_per_second")]
                + [(m["ratio"] or {}).get(name) for name in (*spread, "steady")]
                + [m["missing"], report["device"]["model"], report["versions"]["torch"]]
                + [report["versions"]["fastdiff"]]
            )
    return buffer.getvalue()


# ---- cells


def time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{_three(seconds * factor)} {unit}"
    return f"{_three(seconds * 1e6)} µs"


def spread_of_time(values: dict[str, Any] | None) -> str:
    if values is None:
        return "-"
    median = values["median"]
    return f"{values['p20'] / median - 1:+.0%} {values['p80'] / median - 1:+.0%}"


def size(found: int | None) -> str:
    if found is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if found >= factor:
            return f"{_three(found / factor)} {unit}"
    return f"{found} B"


def count(found: int | None) -> str:
    return "-" if found is None else str(found)


def number(found: float | None, factor: float = 1.0) -> str:
    return "-" if found is None else _three(found * factor)


def share(found: float | None) -> str:
    if found is None:
        return "-"
    return f"{found:.0%}" if found >= 0.095 else f"{found:.1%}" if found >= 0.00095 else f"{found:.3%}"


def rate(found: float | None) -> str:
    if found is None:
        return "-"
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if found >= factor:
            return f"{_three(found / factor)}{unit}"
    return _three(found)


def ratio(measured: dict[str, Any] | None) -> str:
    """A ratio; or, where the spread is too wide for one, the spread; or - where there is none."""
    if measured is None or measured["ratio"] is None:
        return "-"
    found = measured["ratio"]
    if found["steady"]:
        return _three(found["median"])
    return f"wide {found['p20']:.1f}-{found['p80']:.1f}"


def _three(value: float) -> str:
    """About three digits."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
