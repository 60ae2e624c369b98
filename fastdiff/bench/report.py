"""The report of a run: plain values, as they are written to bench.json (docs/performance.md has its schema)."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastdiff import backends, doctor

from . import BenchError, counting
from .cases import Case
from .measuring import Spread, cache_bytes
from .running import Measurement, Run

SCHEMA = 1


def build(run: Run, preset: str, seconds: float) -> dict[str, Any]:
    """Everything that is known after a run, whole or not."""
    ceiling = run.copy.values()
    found = doctor.report()
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "preset": preset,
        "complete": run.complete,
        "notes": run.notes,
        "seconds": round(seconds, 1),
        "versions": found["versions"],
        "packages": found["packages"],
        "device": _device(run.device, found["devices"]),
        "ceiling": ceiling,
        "peers": list(run.names),
        "cases": [_case(run, case, ceiling) for case in run.cases if case in run.results],
        "model": None,
        "ranks": None,
    }


def load(path: Path) -> dict[str, Any]:
    """A report from its file, or from the folder of its run. Raises BenchError if it is none."""
    if path.is_dir():
        path /= "bench.json"
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} cannot be read: {error}") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA or "cases" not in report:
        raise BenchError(f"{path} is no report of this version's fastdiff bench (schema {SCHEMA}).")
    return report


def spread(values: dict[str, Any] | None) -> Spread | None:
    """A spread from its values in a report."""
    if values is None:
        return None
    return Spread(values["median"], values["p20"], values["p80"], values["rounds"])


def case_name(case: dict[str, Any]) -> str:
    return f"{case['operation']} {case['kind']} {case['dtype']} {'x'.join(map(str, case['shape']))}"


def _device(device: torch.device, devices: list[dict[str, Any]]) -> dict[str, Any]:
    name = "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
    found = next((entry for entry in devices if entry["name"] in (name, device.type)), {"description": name})
    return {
        "name": name,
        "description": found["description"],
        "model": found.get("model", name),
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "backend": backends.choose(device),
    }


def _case(run: Run, case: Case, ceiling: dict[str, Any] | None) -> dict[str, Any]:
    floor = counting.floor_bytes(case)
    rate = ceiling["bytes_per_second"] if ceiling else None
    return {
        "operation": case.operation,
        "kind": case.kind,
        "dtype": case.dtype,
        "shape": list(case.shape),
        "elements": case.elements,
        "floor_bytes": floor,
        "rotated": run.rotated.get(case, False),
        "peers": {name: _measurement(found, floor, case.shape[0], rate) for name, found in run.results[case].items()},
    }


def _measurement(found: Measurement, floor: int, batch: int, rate: float | None) -> dict[str, Any]:
    seconds, ratio, count = found.spread, found.ratio, found.count
    moved = count.bytes if count is not None and count.bytes else None
    return {
        "seconds": _values(seconds),
        "host_seconds": found.host_seconds,
        "launches": count.launches if count else None,
        "bytes": moved,
        "counted_by": count.by if moved else None,
        "peak_bytes": found.peak_bytes,
        "bytes_per_second": moved / seconds.median if moved and seconds else None,
        "of_ceiling": floor / seconds.median / rate if seconds and rate else None,
        "images_per_second": batch / seconds.median if seconds else None,
        "ratio": None if ratio is None else {**_values(ratio), "steady": ratio.steady},
        "missing": found.missing,
    }


def _values(found: Spread | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)
