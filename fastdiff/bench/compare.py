"""What changed between two reports, beyond the noise that both state."""

from __future__ import annotations

from typing import Any

from . import table
from .report import case_name, spread

SMALLEST = 0.05  # a change of less is not called one, however narrow the spreads


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Every measurement that both reports have: time before and after, and whether it changed beyond noise: the ranges
    of ``Spread.noise`` do not meet, and the medians are more than 5% apart."""
    found = []
    others = {case_name(case): case for case in b["cases"]}
    for case in a["cases"]:
        other = others.get(case_name(case))
        if other is None:
            continue
        for peer, measured in case["peers"].items():
            before, after = (spread(m.get("seconds")) for m in (measured, other["peers"].get(peer, {})))
            if before is None or after is None:
                continue
            change = after.median / before.median
            ratios = [spread(m["ratio"]) for m in (measured, other["peers"][peer])]
            found.append(
                {
                    "case": case_name(case),
                    "peer": peer,
                    "before": before,
                    "after": after,
                    "change": change,
                    "changed": not before.agrees(after) and abs(change - 1) > SMALLEST,
                    "ratio_before": ratios[0],
                    "ratio_after": ratios[1],
                    "ratio_changed": None not in ratios
                    and not ratios[0].agrees(ratios[1])
                    and abs(ratios[1].median / ratios[0].median - 1) > SMALLEST,
                }
            )
    return found


def text(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The comparison in words and a table of what changed."""
    found = differences(a, b)
    lines = [f"A: {_head(a)}", f"B: {_head(b)}"]
    for name, values in (
        ("device", [r["device"]["description"] for r in (a, b)]),
        ("backend", [r["device"]["backend"] for r in (a, b)]),
        ("threads", [r["device"]["threads"] for r in (a, b)]),
        ("PyTorch", [r["versions"]["torch"] for r in (a, b)]),
    ):
        if values[0] != values[1]:
            lines.append(f"note: the {name} differs: {values[0]} and {values[1]}")
    if a["ceiling"] and b["ceiling"]:
        rates = [r["ceiling"]["bytes_per_second"] / 1e9 for r in (a, b)]
        lines.append(f"copy ceiling: {rates[0]:.1f} and {rates[1]:.1f} GB/s")
    changed = [entry for entry in found if entry["changed"]]
    if changed:
        rows = [["case", "who", "A", "B", "B / A", "ratio to fastdiff"]]
        for entry in sorted(changed, key=lambda entry: entry["change"]):
            rows.append(
                [
                    entry["case"],
                    entry["peer"],
                    table.time(entry["before"].median),
                    table.time(entry["after"].median),
                    f"{entry['change']:.2f}",
                    _ratios(entry),
                ]
            )
        widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
        lines.append("")
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines.append("")
    ratios = [entry for entry in found if entry["ratio_before"] is not None and entry["ratio_after"] is not None]
    moved = sum(entry["ratio_changed"] for entry in ratios)
    lines.append(
        f"{len(changed)} of {len(found)} times changed beyond the noise, {moved} of {len(ratios)} ratios did; the "
        f"others agree within the noise that the two runs state."
    )
    only = {case_name(case) for case in a["cases"]} ^ {case_name(case) for case in b["cases"]}
    if only:
        lines.append(f"{len(only)} cases are in one of them only.")
    return "\n".join(lines)


def _head(report: dict[str, Any]) -> str:
    return f"{report['created']}, fastdiff {report['versions']['fastdiff']}, {report['device']['description']}"


def _ratios(entry: dict[str, Any]) -> str:
    if entry["ratio_before"] is None or entry["ratio_after"] is None:
        return "-"
    text = f"{entry['ratio_before'].median:.2f} -> {entry['ratio_after'].median:.2f}"
    return text + (" *" if entry["ratio_changed"] else "")
