"""The records of ``gpu_check.sh``: one JSON line each, on disk before the next thing is done, so that a run that is
killed loses nothing. As a pytest plugin (``-p gpu_records``) it writes one for every test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def append(kind: str, /, **values: Any) -> None:
    """Add a record to the file that FASTDIFF_RECORDS names, or print it where there is none."""
    line = json.dumps({"record": kind, "stage": os.environ.get("FASTDIFF_STAGE"), **values}) + "\n"
    name = os.environ.get("FASTDIFF_RECORDS")
    if name is None:
        print(line, end="")
        return
    with open(name, "a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def load(path: Path) -> list[dict[str, Any]]:
    """All records but those that are not whole: the last of a killed run."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in found if isinstance(record, dict) and "record" in record]


def pytest_runtest_logreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the controller hears of every test too
    if report.when == "call" or report.outcome != "passed":
        append("test", name=report.nodeid, outcome=report.outcome, seconds=report.duration, line=_first_line(report))


def pytest_collectreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ and report.outcome == "failed":
        append("test", name=report.nodeid, outcome="failed", seconds=0.0, line=_first_line(report))


def _first_line(report: Any) -> str:
    """What went wrong, or why a test was skipped, in one line."""
    if report.outcome == "passed" or report.longrepr is None:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:200]
