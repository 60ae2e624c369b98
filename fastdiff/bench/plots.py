"""The plots of a report: bandwidth against the ceiling, bars against the peers, time against size."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import table

OURS = "fastdiff"
NAMES = {"compile": "torch.compile", "reference": "fastdiff reference"}
# Okabe and Ito's colours, told apart also by the colour-blind; the markers tell the operations.
COLOURS = {
    "fastdiff": "#0072b2",
    "eager": "#d55e00",
    "compile": "#009e73",
    "diffusers": "#cc79a7",
    "reference": "#999999",
}
DARK_COLOURS = COLOURS | {"fastdiff": "#56b4e9", "reference": "#8c8c8c"}
MARKERS = {
    "noising": "o",
    "loss": "s",
    "loss+gradient": "D",
    "loss and gradient": "h",
    "hybrid loss": "P",
    "latents": "X",
    "divergence+gradient": "d",
    "training step": "*",
    "sampler step": "^",
    "sampler step+noise": "v",
    "row moments": "P",
    "noising images": "X",
    "noising+loss of tokens": "d",
}
TYPICAL = 2**20  # elements: about what the bars show


@dataclass(frozen=True)
class Look:
    """A theme and a width: what a page needs for desktop and phone, light and dark."""

    dark: bool = False
    narrow: bool = False

    @property
    def width(self) -> float:
        return 4.0 if self.narrow else 10.5

    @property
    def ink(self) -> str:
        return "#e6e6e6" if self.dark else "#1a1a1a"

    @property
    def paper(self) -> str:
        return "#16181c" if self.dark else "#ffffff"

    @property
    def faint(self) -> str:
        return "#8a8f98" if self.dark else "#6b7280"

    def colour(self, peer: str) -> str:
        return (DARK_COLOURS if self.dark else COLOURS)[peer]


Plot = Callable[[dict[str, Any], Any, Look], None]


def plots(report: dict[str, Any]) -> dict[str, tuple[Plot, str]]:
    """The plots that this report has data for, each with a caption."""
    found: dict[str, tuple[Plot, str]] = {}
    measured = [case for case in report["cases"] if case["peers"][OURS]["seconds"]]
    if measured and report["ceiling"]:
        found["roofline"] = (
            roofline,
            "The least bytes that an operation can move over the time it takes, against what a plain copy reaches on "
            "this device (line; band: p20 to p80). Above the line, the data came from the cache.",
        )
    if _bars(report):
        found["peers"] = (
            bars,
            "How many times as long the others take (1: as long as fastdiff), in rounds that take turns. The thin "
            "lines reach from p20 to p80; what varies too much has no bar.",
        )
    if _sizes(report)[1]:
        found["sizes"] = (
            sizes,
            "Time against size. In the shaded region the host's time for a call of fastdiff is more than the device's, "
            "or on a CPU than the memory would need: there the number of launches decides, not their bytes. On a GPU "
            "the host's times are dashed.",
        )
    return found


def svg(report: dict[str, Any], name: str, look: Look) -> bytes:
    """One plot as an SVG file, in the light theme; see ``darkened``."""
    figure = _figure(look.width, _height(report, name, look), look)
    _draw(report, name, figure, look)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", facecolor=look.paper, metadata={"Date": None})
    return buffer.getvalue()


def darkened(drawing: bytes) -> bytes:
    """A plot in the dark theme: the same drawing with other colours, which takes no time."""
    light, dark = Look(), Look(dark=True)
    pairs = [(light.ink, dark.ink), (light.paper, dark.paper), (light.faint, dark.faint)]
    pairs += [(light.colour(peer), dark.colour(peer)) for peer in COLOURS]
    new = {old.encode(): new.encode() for old, new in pairs}
    return re.sub(rb"#[0-9a-f]{6}\b", lambda found: new.get(found[0], found[0]), drawing)


def png(report: dict[str, Any]) -> bytes:
    """All plots, one below the other, as a PNG file."""
    look = Look()
    names = list(plots(report))
    heights = [_height(report, name, look) for name in names]
    figure = _figure(look.width, sum(heights) + 0.5, look)
    figure.suptitle(f"fastdiff bench: {report['device']['description']}", fontsize=10, color=look.ink)
    parts = figure.subfigures(len(names), 1, height_ratios=heights, squeeze=False)[:, 0]
    for name, part in zip(names, parts):
        part.set_facecolor(look.paper)
        _draw(report, name, part, look)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor=look.paper)
    return buffer.getvalue()


def roofline(report: dict[str, Any], axes: Any, look: Look) -> None:
    """Useful bandwidth against the bytes of an operation."""
    ceiling = report["ceiling"]
    shown = [peer for peer in report["peers"] if peer != "reference"]
    for peer in reversed(shown):
        for operation, marker in MARKERS.items():
            points = [
                (case["floor_bytes"], case["floor_bytes"] / case["peers"][peer]["seconds"]["median"] / 1e9)
                for case in report["cases"]
                if case["operation"] == operation and case["peers"][peer]["seconds"]
            ]
            if points:
                axes.scatter(
                    *zip(*points),
                    marker=marker,
                    s=46 if marker == "*" else 22,
                    color=look.colour(peer),
                    alpha=0.9 if peer == OURS else 0.55,
                    linewidths=0,
                    zorder=3 if peer == OURS else 2,
                )
    axes.axhspan(ceiling["p20"] / 1e9, ceiling["p80"] / 1e9, color=look.faint, alpha=0.3, linewidth=0)
    axes.axhline(ceiling["bytes_per_second"] / 1e9, color=look.ink, linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="least bytes of the operation", ylabel="GB/s")
    axes.set_title("Bandwidth reached, against a copy")
    axes.set_ylim(top=max(axes.get_ylim()[1], 2 * ceiling["bytes_per_second"] / 1e9))
    axes.text(
        0.02,
        ceiling["bytes_per_second"] / 1e9,
        f"copy: {ceiling['bytes_per_second'] / 1e9:.0f} GB/s",
        transform=axes.get_yaxis_transform(),
        va="bottom",
        color=look.ink,
        fontsize=8,
    )
    handles = [_handle(look.colour(peer), "o", NAMES.get(peer, peer)) for peer in shown]
    used = {case["operation"] for case in report["cases"]}
    handles += [_handle(look.faint, marker, name) for name, marker in MARKERS.items() if name in used]
    _legend(axes, look, handles, columns=2 if look.narrow else 5)
    axes.xaxis.set_major_formatter(lambda value, _: table.size(int(value)).replace(".00", "").replace(".0", ""))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def bars(report: dict[str, Any], axes: Any, look: Look) -> None:
    """Ratios to fastdiff, one group an operation."""
    groups = _bars(report)
    others = [peer for peer in report["peers"] if peer not in (OURS, "reference")]
    height = 0.8 / max(1, len(others))
    for group, case in enumerate(groups):
        for index, peer in enumerate(others):
            found = case["peers"][peer]["ratio"]
            y = group - 0.4 + (index + 0.5) * height
            if found is None:
                continue
            if not found["steady"]:
                axes.text(1.03, y, "varies too much", va="center", fontsize=6.5, color=look.faint)
                continue
            axes.barh(y, found["median"] - 1, left=1, height=0.9 * height, color=look.colour(peer))
            axes.plot([found["p20"], found["p80"]], [y, y], color=look.ink, linewidth=0.8)
            axes.text(
                max(found["p80"], 1.0) * 1.05, y, f"{found['median']:.1f}", va="center", fontsize=7, color=look.ink
            )
    axes.axvline(1, color=look.ink, linewidth=1.2)
    axes.set_xscale("log")
    labels = [_bar_label(case, "\n" if look.narrow else ", ") for case in groups]
    axes.set_yticks(range(len(groups)), labels, fontsize=7 if look.narrow else 8)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), high * 1.3)
    axes.set_xlabel("time, fastdiff = 1")
    axes.set_title(f"Against the others, {'x'.join(map(str, groups[0]['shape']))}")
    _legend(axes, look, [_handle(look.colour(peer), "s", NAMES.get(peer, peer)) for peer in others], columns=3)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(
        lambda value, _: f"{value:g}" if str(value)[0] in "25" and high < 200 or value in (2, 5) else ""
    )


def sizes(report: dict[str, Any], axes: Any, look: Look) -> None:
    """Time of one operation against its number of elements."""
    title, cases = _sizes(report)
    for peer in report["peers"]:
        found = [(case["elements"], case["peers"][peer]["seconds"]) for case in cases if case["peers"][peer]["seconds"]]
        if not found:
            continue
        host = [(n, seconds * 1e6) for n, seconds in _of_host(report, cases, peer)]
        if host:
            axes.plot(*zip(*host), linewidth=0.9, linestyle="--", color=look.colour(peer))
        x = [elements for elements, _ in found]
        axes.plot(
            x,
            [seconds["median"] * 1e6 for _, seconds in found],
            marker="o",
            markersize=3.5,
            linewidth=1.8 if peer == OURS else 1.1,
            color=look.colour(peer),
            label=NAMES.get(peer, peer),
        )
        low, high = ([seconds[end] * 1e6 for _, seconds in found] for end in ("p20", "p80"))
        axes.fill_between(x, low, high, color=look.colour(peer), alpha=0.2, linewidth=0)
    rate = report["ceiling"]["bytes_per_second"] if report["ceiling"] else None
    x = [case["elements"] for case in cases]
    if rate:
        per_element = cases[-1]["floor_bytes"] / cases[-1]["elements"]
        axes.plot(
            x,
            [per_element * n / rate * 1e6 for n in x],
            color=look.ink,
            linestyle=":",
            label="least bytes at a copy's rate",
        )
    edge = launch_bound(report, cases)
    if edge is not None:
        axes.axvspan(min(x) / 2, max(edge, min(x) / 2), color=look.faint, alpha=0.18, linewidth=0, zorder=0)
        axes.text(
            min(x) / 1.7,
            0.97,
            "launch-bound",
            transform=axes.get_xaxis_transform(),
            va="top",
            fontsize=8,
            color=look.ink,
        )
        axes.set_xlim(min(x) / 2, max(x) * 2)
    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="time, microseconds")
    axes.set_title(title)
    _legend(axes, look, None, columns=2 if look.narrow else 3)


def _of_host(report: dict[str, Any], cases: list[dict[str, Any]], peer: str) -> list[tuple[int, float]]:
    """(elements, seconds until a call returns) by size, on a GPU; on a CPU that is the whole time."""
    if report["device"]["name"] == "cpu":
        return []
    found = [(case["elements"], case["peers"][peer]["host_seconds"]) for case in cases]
    return [(elements, seconds) for elements, seconds in found if seconds]


def launch_bound(report: dict[str, Any], cases: list[dict[str, Any]]) -> float | None:
    """Below how many elements the host's time for a call of fastdiff is more than the device's, by straight lines
    between the logarithms of what was measured; on a CPU, than the memory would need. None where that is not known.

    Args:
        cases: of one operation, by size; each has a time of fastdiff's.
    """
    if report["device"]["name"] == "cpu":
        on_one, ceiling = cases[0]["peers"][OURS]["host_seconds"], report["ceiling"]
        if not on_one or not ceiling:
            return None
        return on_one * ceiling["bytes_per_second"] * cases[-1]["elements"] / cases[-1]["floor_bytes"]
    device = {case["elements"]: case["peers"][OURS]["seconds"]["median"] for case in cases}
    excess = [(math.log(n), math.log(host / device[n])) for n, host in _of_host(report, cases, OURS)]
    if not excess:
        return None
    bound = [place for place, (_, more) in enumerate(excess) if more > 0]
    if not bound:
        return 0.0
    size, more = excess[bound[-1]]
    if bound[-1] + 1 == len(excess):
        return 2.0 * math.exp(size)  # all of the sizes that are drawn
    next_size, less = excess[bound[-1] + 1]
    return math.exp(size + (next_size - size) * more / (more - less))


def _bars(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of the bars: one shape, the one with the most ratios and then nearest to a typical size."""
    shapes: dict[tuple, list[dict[str, Any]]] = {}
    for case in report["cases"]:
        ratios = [m["ratio"] for peer, m in case["peers"].items() if peer != "reference"]
        if any(ratios):
            shapes.setdefault(tuple(case["shape"]), []).append(case)
    if not shapes:
        return []

    def telling(shape: tuple) -> tuple:
        cases = shapes[shape]
        ratios = sum(m["ratio"] is not None for case in cases for m in case["peers"].values())
        large = cases[0]["elements"] >= TYPICAL / 2
        return (large, ratios, -cases[0]["elements"])

    cases = shapes[max(shapes, key=telling)]
    kind = _kind(cases)
    alike = ("noising", "sampler step+noise") if kind == "v_prediction" else ()  # measured for epsilon, where both are
    return [
        case
        for case in cases
        if case["kind"] == kind
        or (case["kind"] == "epsilon" and case["operation"] in alike)
        or case["operation"] == "row moments"  # of no kind
    ]


def _sizes(report: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """What time is drawn for, and its cases by size: a training step where there is one."""
    sorts: dict[tuple, dict[int, dict[str, Any]]] = {}
    for case in report["cases"]:
        if case["peers"][OURS]["seconds"]:
            sorts.setdefault((case["operation"], case["kind"], case["dtype"]), {})[case["elements"]] = case
    several = {sort: cases for sort, cases in sorts.items() if len(cases) > 1}
    if not several:
        return "", []
    best = max(several, key=lambda sort: (sort[0] == "training step", len(several[sort]), sort[1] == "v_prediction"))
    return ", ".join(best), [several[best][elements] for elements in sorted(several[best])]


def _kind(cases: list[dict[str, Any]]) -> str:
    kinds = [case["kind"] for case in cases]
    return "v_prediction" if "v_prediction" in kinds else max(kinds, key=kinds.count)


def _bar_label(case: dict[str, Any], separator: str) -> str:
    return f"{case['operation']}{separator}{case['dtype']}"


def _height(report: dict[str, Any], name: str, look: Look) -> float:
    if name == "peers":
        others = len([peer for peer in report["peers"] if peer not in (OURS, "reference")])
        return 1.5 + 0.15 * max(2, others) * len(_bars(report))
    return 4.0 if look.narrow else 4.2


def _figure(width: float, height: float, look: Look) -> Any:
    # No pyplot: nothing global, no display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor=look.paper)


def _draw(report: dict[str, Any], name: str, figure: Any, look: Look) -> None:
    axes = figure.subplots()
    axes.set_facecolor(look.paper)
    plots(report)[name][0](report, axes, look)
    axes.title.set(color=look.ink, fontsize=10, fontweight="bold")
    axes.tick_params(which="both", colors=look.ink, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=look.ink, fontsize=8.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(look.faint)
    axes.grid(which="major", axis="x" if name == "peers" else "both", alpha=0.25, linewidth=0.5, color=look.faint)
    axes.set_axisbelow(True)


def _handle(colour: str, marker: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5, label=label)


def _legend(axes: Any, look: Look, handles: list[Any] | None, columns: int) -> None:
    axes.figure.legend(
        **({} if handles is None else {"handles": handles}),
        ncols=columns,
        fontsize=7.5,
        labelcolor=look.ink,
        frameon=False,
        loc="outside lower center",
        columnspacing=1.2,
        handletextpad=0.4,
    )
