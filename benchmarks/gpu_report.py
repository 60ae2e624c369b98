"""The three files of ``gpu_check.sh``, from its records and logs: summary.txt, numbers.json and logs.tar.gz.

    python benchmarks/gpu_report.py MODE OUT WORK [--short]

OUT has records.jsonl and, while a stage runs, running.log; WORK the logs of stages that ended. Each file is written
under another name and renamed. It prints the summary, or with --short what is new. It needs the standard library alone.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_records

MOST_BYTES = 15 * 2**20  # a file
LOG_BYTES = 2**20  # of the beginning and of the end of a log
TABLE_CHARACTERS = 9000
# Of each kernel that was counted: a heading and ncu's name; and of which the largest are shown.
COUNTERS = (
    ("time", "gpu__time_duration.sum"),
    ("instructions", "smsp__inst_executed.sum"),
    ("read", "dram__bytes_read.sum"),
    ("written", "dram__bytes_write.sum"),
    ("issuing", "smsp__issue_active.avg.pct_of_peak_sustained_active"),
)
LARGEST = {
    "pipes, % of their peak": r"sm__inst_executed_pipe_(\w+)\.avg\.pct_of_peak_sustained_active",
    "stalls, warps an issue": r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio",
}


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["record"] == kind]


# ---- the summary


def summary(mode: str, records: list[dict[str, Any]], work: Path, out: Path) -> str:
    """What ran, what did not and why, and the tables last."""
    parts = [stages(records, work, out), machine(records), smoke(records), tests(records)]
    parts += [counters(records), steps(records), kernels(records)]
    if mode == "tests":
        parts.append(_text(work / "bench" / "bench.md"))
    return f"gpu_check {mode}\n\n" + "\n\n".join(part for part in parts if part)


def stages(records: list[dict[str, Any]], work: Path, out: Path) -> str:
    lines = []
    for stage in of_kind(records, "stage"):
        lines.append(outcome(stage))
        if stage["outcome"] not in ("passed", "skipped"):
            log = _text(work / "logs" / f"{stage['name']}.log") or _text(out / "running.log")
            lines += [f"        {line[:160]}" for line in log.splitlines()[-3:] if line.strip()]
    for record in of_kind(records, "compilations"):
        if record["kernels"] + record["launchers"]:
            counts = f"{record['kernels']} kernels and {record['launchers']} launchers"
            lines.append(f"compiled while {record['command']} ran: {counts}")
    failed = [record for record in of_kind(records, "compiled") if "error" in record]
    lines += [f"not compiled: {record['name']}: {record['error']}" for record in failed[:5]]
    return "\n".join([*lines, *(note["text"] for note in of_kind(records, "note"))])


def outcome(stage: dict[str, Any]) -> str:
    why = f": {stage['why']}" if stage.get("why") else ""
    return f"{stage['outcome']:9} {stage['name']:12} {stage['seconds']:6.1f} of {stage['cap']:g} s{why}"


def machine(records: list[dict[str, Any]]) -> str:
    found = of_kind(records, "machine")
    if not found or "device" not in found[-1]:
        return ""
    device, versions = found[-1]["device"], found[-1]["doctor"]["versions"]
    after = [*found[-1:], *of_kind(records, "clocks")][-1]  # those after the kernels, where there are such
    clocks = (after.get("nvidia_smi") or "").splitlines()
    return "\n".join([
        f"{device['name']}, {device['multi_processor_count']} multiprocessors, L2 {device['L2_cache_size']} bytes",
        f"torch {versions['torch']}, Triton {found[-1]['triton']}, Python {versions['python']}", *clocks,
    ])  # fmt: skip


def smoke(records: list[dict[str, Any]]) -> str:
    found = of_kind(records, "smoke")
    failed = [f"FAILED smoke: {check['name']}: {check['line']}" for check in found if not check["passed"]]
    return "\n".join([f"smoke: {len(found) - len(failed)} of {len(found)} checks passed", *failed]) if found else ""


def tests(records: list[dict[str, Any]], most: int = 20) -> str:
    """How many tests of each stage ran, and the first line of what went wrong."""
    order = ("passed", "skipped", "failed")
    # A test can have more than one: its call's, and that of a set-up or tear-down that failed.
    worst: dict[tuple, dict[str, Any]] = {}
    for test in of_kind(records, "test"):
        before = worst.setdefault((test["stage"], test["name"]), test)
        if order.index(test["outcome"]) > order.index(before["outcome"]):
            worst[test["stage"], test["name"]] = test
    lines = []
    for stage in dict.fromkeys(test["stage"] for test in worst.values()):
        counts = Counter(test["outcome"] for test in worst.values() if test["stage"] == stage)
        lines.append(f"{stage}: {', '.join(f'{counts[word]} {word}' for word in order if counts[word])}")
    failed = [test for test in worst.values() if test["outcome"] == "failed"]
    lines += [f"FAILED {test['name']}: {test['line']}"[:200] for test in failed[:most]]
    if len(failed) > most:
        lines.append(f"and {len(failed) - most} more")
    return "\n".join(lines)


def kernels(records: list[dict[str, Any]]) -> str:
    """A line a kernel: for each size its time, and the share of a copy's rate that it reaches, counting the bytes that
    must move; for the largest also that rate, and the share that was predicted."""
    found, copy = of_kind(records, "kernel"), ceiling(records)
    sizes = sorted({record["elements"] for record in found}, reverse=True)
    names = list(dict.fromkeys(record["name"] for record in found))
    if not names:
        return ""
    by = {(record["name"], record["elements"]): record for record in found}
    heads = [f"| {f'2^{size.bit_length() - 1}':4} us {'  GB/s pred' * (not k)} copy " for k, size in enumerate(sizes)]
    ceiling_text = f"copy ceiling {copy / 1e9:.0f} GB/s" if copy else "no copy ceiling"
    lines = [
        f"Kernels ({ceiling_text}; copy: share of it, pred: as predicted; in/el: instructions an element)",
        f"{'':28} in/el " + "".join(heads),
    ]
    for name in names:
        rows = [by.get((name, size)) for size in sizes]
        per_element = next((row["instructions"] for row in rows if row and row.get("instructions")), None)
        line = f"{name:28} {per_element:5.1f} " if per_element else f"{name:28} {'':5} "
        lines.append(line + "".join(f"| {_cell(row, whole=not k)} " for k, row in enumerate(rows)))
    errors = [
        f"not measured: {r['name']} 2^{r['elements'].bit_length() - 1}: {r['error']}" for r in found if "error" in r
    ]
    return "\n".join([*lines, *errors[:5]])


def _cell(record: dict[str, Any] | None, whole: bool) -> str:
    if not record or not record.get("gpu_us"):
        return f"{'-':>7} {' ' * 11 * whole} {'':4}"
    rate = f" {record['bytes_per_second'] / 1e9:5.0f} {_percent(record.get('predicted'))}" if whole else ""
    return f"{record['gpu_us']:7.2f} {rate} {_percent(record['of_copy'])}"


def _percent(share: float | None) -> str:
    return f"{100 * share:3.0f}%" if share else " " * 4


def ceiling(records: list[dict[str, Any]]) -> float | None:
    """Bytes a second of the fastest copy of the largest size, in this run."""
    copies = [r for r in of_kind(records, "kernel") if r["name"].startswith("copy") and r.get("gpu_us")]
    largest = max((r["elements"] for r in copies), default=0)
    return max((r["bytes"] / r["gpu_us"] * 1e6 for r in copies if r["elements"] == largest), default=None)


def compared(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, with what only several of them tell: of a kernel its rate and the share of the copy's, of a training
    step its times over those of fastdiff's."""
    copy, found = ceiling(records), []
    ours = {_case(record): record for record in of_kind(records, "step") if record["peer"] == "fastdiff"}
    for record in records:
        if record["record"] == "kernel" and record.get("gpu_us"):
            rate = record["bytes"] / record["gpu_us"] * 1e6
            record = record | {"bytes_per_second": rate, "of_copy": rate / copy if copy else None}
        elif record["record"] == "step":
            own = ours.get(_case(record), {})
            record = record | {
                f"{name}_ratio": record[name] / own[name] if record.get(name) and own.get(name) else None
                for name in ("gpu_us", "wall_us", "host_us")
            }
        found.append(record)
    return found


def _case(record: dict[str, Any]) -> tuple:
    return record["kind"], tuple(record["shape"])


def steps(records: list[dict[str, Any]]) -> str:
    """Whole training steps: the GPU's time, a call's in a row, the host's; times of the others over ours."""
    found = of_kind(records, "step")
    if not found:
        return ""
    launches = {(*_case(r), r["peer"]): r["launches"] for r in of_kind(records, "launches")}
    lines = [
        "Training steps, bf16 (gpu: queued; row: calls in a row; host: until a call returns; x: time over fastdiff's)",
        f"{'':24} {'':9} {'gpu us':>9} {'x':>6} {'row us':>9} {'x':>6} {'host us':>9} {'x':>6} launches",
    ]
    cases = list(dict.fromkeys(_case(record) for record in found))
    for record in sorted(found, key=lambda record: cases.index(_case(record))):
        kind, shape = _case(record)
        line = f"{kind[:7]:7} {'x'.join(map(str, shape)):16} {record['peer']:9} "
        for field in ("gpu_us", "wall_us", "host_us"):
            line += f"{_number(record.get(field), 9, 1)} {_number(record[f'{field}_ratio'], 6, 2)} "
        line += str(launches.get((kind, shape, record["peer"])) or "")
        lines.append(line + (f" {record['error'][:80]}" if "error" in record else ""))
    return "\n".join(line.rstrip() for line in lines)


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def counters(records: list[dict[str, Any]]) -> str:
    lines = []
    for record in of_kind(records, "counters"):
        metrics = record["metrics"]
        texts = [f"{head} {metrics[name][0]:g} {metrics[name][1]}" for head, name in COUNTERS if name in metrics]
        instructions = metrics.get("smsp__inst_executed.sum")
        if instructions:
            texts.append(f"instructions an element {32 * instructions[0] / record['elements']:.1f}")
        lines.append(f"ncu, {record['name']}, 2^{record['elements'].bit_length() - 1}: {', '.join(texts)}")
        for head, pattern in LARGEST.items():
            named = (
                (value, match[1]) for name, (value, _) in metrics.items() if (match := re.fullmatch(pattern, name))
            )
            texts = [f"{name} {value:.1f}" for value, name in sorted(named, reverse=True)[:5]]
            lines += [f"    {head}: {', '.join(texts)}"] if texts else []
    return "\n".join(lines)


def short(records: list[dict[str, Any]]) -> str:
    """The last stage, and what it measured in a few lines."""
    last = of_kind(records, "stage")[-1:]
    lines = [outcome(stage) for stage in last]
    if last and last[0]["name"] == "smoke":
        lines.append(smoke(records))
    if last and last[0]["name"] == "kernels":
        lines.append("\n".join(kernels(records).splitlines()[:10]))
    if last and last[0]["name"] == "steps":
        lines.append("\n".join(steps(records).splitlines()[:8]))
    if last and last[0]["name"] in ("gpu-tests", "operations", "reduction"):
        lines.append(tests([r for r in records if r.get("stage") == last[0]["name"]], 3))
    return "\n".join(lines)


# ---- the files


def write(path: Path, content: bytes) -> None:
    other = path.with_name(f"{path.name}.new")
    other.write_bytes(content[:MOST_BYTES])
    other.replace(path)


def numbers(mode: str, records: list[dict[str, Any]], work: Path) -> bytes:
    """Everything as plain values; where that is too much, without what came last."""
    found: dict[str, Any] = {"schema": 1, "mode": mode, "copy_bytes_per_second": ceiling(records)}
    bench = _text(work / "bench" / "bench.json")
    try:
        found["bench"] = json.loads(bench) if bench else None
    except ValueError:
        found["bench"] = None
    kept = list(records)
    while True:
        text = json.dumps(found | {"left_out": len(records) - len(kept), "records": kept}, indent=1).encode()
        if len(text) <= MOST_BYTES or not kept:
            return text
        kept = kept[: len(kept) // 2]


def logs(work: Path, out: Path) -> bytes:
    """All logs, the middle of long ones left out."""
    paths = sorted(path for path in (work / "logs").glob("*") if path.is_file())
    paths += sorted(path for path in (work / "bench").glob("*") if path.is_file() and path.suffix != ".png")
    paths += [path for path in (out / "running.log", out / "records.jsonl") if path.exists()]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path in paths:
            content = path.read_bytes()
            if len(content) > 2 * LOG_BYTES:
                content = content[:LOG_BYTES] + b"\n... left out ...\n" + content[-LOG_BYTES:]
            entry = tarfile.TarInfo(path.name)
            entry.size, entry.mtime = len(content), int(path.stat().st_mtime)
            tar.addfile(entry, io.BytesIO(content))
            if buffer.tell() > MOST_BYTES - 2 * LOG_BYTES:
                break
    return buffer.getvalue()


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def cut(path: Path) -> None:
    """A file of lines that has grown too large loses those at its end."""
    if path.exists() and path.stat().st_size > MOST_BYTES:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES)
        write(path, content[: content.rfind(b"\n") + 1])


def main() -> None:
    mode, out, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    cut(out / "records.jsonl")
    records = compared(gpu_records.load(out / "records.jsonl"))
    text = summary(mode, records, work, out)
    write(out / "numbers.json", numbers(mode, records, work))
    write(out / "summary.txt", text.encode() + b"\n")
    write(out / "logs.tar.gz", logs(work, out))
    print(short(records) if "--short" in sys.argv else text[-TABLE_CHARACTERS:], flush=True)


if __name__ == "__main__":
    main()
