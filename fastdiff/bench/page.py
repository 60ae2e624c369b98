"""bench.html: one page that needs nothing else, for a desktop and a phone, light and dark."""

from __future__ import annotations

import base64
import html
from typing import Any

from . import plots, table
from .plots import Look

PHONE = "(max-width: 700px)"
ELSEWHERE = ("p20 to p80", "launches", "moved", "extra memory", "GB/s")  # columns that the main table has no room for
DARK = "(prefers-color-scheme: dark)"

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #ffffff; --faint: #6b7280; --line: #e2e4e8; --band: #f5f6f8;
  --accent: #0072b2; --warn: #9a5b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --faint: #9aa0a9; --line: #33373e;
  --band: #1e2126; --accent: #56b4e9; --warn: #e0a84c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.2rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, figcaption, li { max-width: 75ch; }
.faint, figcaption { color: var(--faint); font-size: .9rem; }
.warn { color: var(--warn); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--band); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; color: var(--accent); }
.tile span { font-size: .85rem; color: var(--faint); }
figure { margin: 1.5rem 0; } figure img { display: block; width: 100%; height: auto; }
pre { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .85rem; font-variant-numeric: tabular-nums;
  width: 100%; border: 1px solid var(--line); border-radius: 8px; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
thead th { position: sticky; top: 0; background: var(--band); z-index: 1; vertical-align: bottom; }
th:first-child { text-align: left; background: var(--band); font-weight: 500; }
td[colspan] { text-align: left; color: var(--faint); }
@media (max-width: 900px) { body { padding: .8rem; }
  table, tbody, tr, th, td { display: block; } thead { display: none; }
  tr { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); column-gap: .6rem;
    border-bottom: 1px solid var(--line); }
  tbody th, td[colspan] { grid-column: 1 / -1; } td[colspan] { display: block; }
  th, td { border: 0; padding: .2rem .5rem; } td { display: flex; flex-wrap: wrap; justify-content: flex-end; }
  td::before { content: attr(data-is); color: var(--faint); white-space: nowrap; margin-right: auto;
    padding-right: .4rem; }
  td.none { display: none; } }
summary { cursor: pointer; margin: 1rem 0 .5rem; font-weight: 600; }
"""


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    first, *rest = table.summary(report)
    lines = [f"<li>{_escape(line)}</li>" for line in rest if not line.startswith("missing: ")]
    missing = [line.removeprefix("missing: ") for line in rest if line.startswith("missing: ")]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>fastdiff bench: {_escape(report['device']['model'])}</title>",
            f"<style>{STYLE}</style></head><body>",
            f"<h1>fastdiff bench</h1><p>{_escape(first)}</p>",
            _tiles(report),
            f'<ul class="faint">{"".join(lines)}</ul>',
            _missing(missing),
            *(_model(report) if report["model"] else []),
            *_figures(report),
            "<h2>All cases</h2>",
            _main_table(report),
            f'<p class="faint">{_escape(table.LEGEND)}</p>',
            *(_ranks(report) if report["ranks"] else []),
            _details(report),
            "</body></html>",
            "",
        ]
    )


def _escape(text: str) -> str:
    return html.escape(text)


def _tiles(report: dict[str, Any]) -> str:
    """The few numbers that one looks for first: of the training step nearest to a million elements and more."""
    tiles = []
    if report["ceiling"]:
        tiles.append((f"{report['ceiling']['bytes_per_second'] / 1e9:.0f} GB/s", "copy ceiling of this device"))
    steps = [c for c in report["cases"] if c["operation"] == "training step" and c["peers"]["fastdiff"]["seconds"]]
    steps = [c for c in steps if c["elements"] >= plots.TYPICAL / 2] or steps
    if steps:
        v = [c for c in steps if c["kind"] == "v_prediction"] or steps
        case = min(v, key=lambda c: c["elements"])
        name = f"{case['kind']} {case['dtype']} {'x'.join(map(str, case['shape']))}"
        tiles.append((table.time(case["peers"]["fastdiff"]["seconds"]["median"]), f"training step, {name}"))
        tiles.append((table.share(case["peers"]["fastdiff"]["of_ceiling"]), "of the ceiling in that step"))
        for peer, found in case["peers"].items():
            if found["ratio"] and found["ratio"]["steady"] and peer != "reference":
                tiles.append((f"{found['ratio']['median']:.1f} times", f"as long in {plots.NAMES.get(peer, peer)}"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{_escape(a)}</b><span>{_escape(b)}</span></div>' for a, b in tiles)
        + "</div>"
    )


def _missing(notes: list[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{_escape(note)}</li>" for note in notes)
    heading = f'<summary class="warn">What is missing ({len(notes)})</summary>'
    return f'<details>{heading}<ul class="faint">{items}</ul></details>'


def _model(report: dict[str, Any]) -> list[str]:
    return ["<h2>With a network between</h2>", f"<p>{_escape(table.model_text(report['model']))}</p>"]


def _figures(report: dict[str, Any]) -> list[str]:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return ['<p class="faint">No plots: matplotlib is not installed.</p>']
    return [_figure(report, name, caption) for name, (_, caption) in plots.plots(report).items()]


def _figure(report: dict[str, Any], name: str, caption: str) -> str:
    def source(drawing: bytes) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(drawing).decode()

    narrow, wide = (plots.svg(report, name, Look(narrow=narrow)) for narrow in (True, False))
    return (
        "<figure><picture>"
        f'<source media="{PHONE} and {DARK}" srcset="{source(plots.darkened(narrow))}">'
        f'<source media="{PHONE}" srcset="{source(narrow)}">'
        f'<source media="{DARK}" srcset="{source(plots.darkened(wide))}">'
        f'<img alt="{_escape(caption)}" src="{source(wide)}">'
        f"</picture><figcaption>{_escape(caption)}</figcaption></figure>"
    )


def _main_table(report: dict[str, Any]) -> str:
    """What fits beside each other; the rest is among all measurements."""
    elsewhere = {*ELSEWHERE, *(f"{peer} {what}" for peer in report["peers"] for what in ("host", "launches"))}
    columns = [column for column in table.columns(report["peers"]) if column.heading not in elsewhere]
    # What one looks for first comes first.
    columns.sort(key=lambda column: (column.heading not in ("case", "time"), not column.heading.endswith(" ×")))
    rows = [[column.cell(case) for column in columns] for case in report["cases"]]
    return _table([column.heading for column in columns], rows)


def _ranks(report: dict[str, Any]) -> list[str]:
    return [
        f"<h2>{report['ranks']['world']} processes at once</h2>",
        f"<pre>{_escape(table.ranks_text(report))}</pre>",
    ]


def _details(report: dict[str, Any]) -> str:
    heading = ["case", "who", "time", "p20 to p80", "rounds", "host", "launches", "moved", "counted by"]
    heading += ["GB/s", "extra memory"]
    rows = []
    for case in report["cases"]:
        for peer, m in case["peers"].items():
            cells = [table.case_name(case), plots.NAMES.get(peer, peer)]
            if m["seconds"] is None:
                rows.append([*cells, m["missing"] or "not measured"])
                continue
            cells += [
                table.time(m["seconds"]["median"]),
                table.spread_of_time(m["seconds"]),
                str(m["seconds"]["rounds"]),
            ]
            cells += [table.time(m["host_seconds"]), table.count(m["launches"]), table.size(m["bytes"])]
            rate = table.number(m["bytes_per_second"], 1e-9)
            rows.append([*cells, m["counted_by"] or "-", rate, table.size(m["peak_bytes"])])
    return f"<details><summary>Every measurement</summary>{_table(heading, rows)}</details>"


def _table(heading: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_escape(cell)}</th>" for cell in heading)
    body = "".join(f"<tr><th>{_escape(row[0])}</th>{_cells(heading, row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cells(heading: list[str], row: list[str]) -> str:
    """The cells behind the first; the last of a row that is too short takes the rest of it. A narrow screen shows each
    with its heading, and leaves out those without a value."""
    cells = []
    for k, cell in enumerate(row[1:], 1):
        rest = len(heading) - k
        if k == len(row) - 1 and rest > 1:
            cells.append(f'<td colspan="{rest}">{_escape(cell)}</td>')
            continue
        none = ' class="none"' if cell == "-" else ""
        cells.append(f'<td data-is="{_escape(heading[k])}"{none}>{_unbroken(cell)}</td>')
    return "".join(cells)


def _unbroken(cell: str) -> str:
    """A number and its unit stay on one line; "wide" and a spread may be on two, as words may."""
    if cell[:1].isalpha() and not cell.startswith("wide "):
        return _escape(cell)
    return _escape(cell).replace(" ", "\u00a0").replace("wide\u00a0", "wide ").replace("-", "\u2011")
