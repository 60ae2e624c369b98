"""What is said while a run goes on: a bar with the time left, where it can be shown."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_EVERY = 5.0  # seconds, where there is no bar


class Progress:
    """Counts planned seconds. A bar where tqdm is installed and someone looks at it, else a line now and then.

    The work is planned in seconds, so what is left is estimated from the plan and from how it has held so far.
    """

    def __init__(self, planned: float, quiet: bool = False):
        self._planned, self._done, self._quiet = max(planned, 1e-9), 0.0, quiet
        self._started = self._said = time.perf_counter()
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            form = "{percentage:3.0f}% |{bar}| {desc}"
            self._bar = tqdm(total=1.0, bar_format=form, file=sys.stderr, dynamic_ncols=True, leave=False)

    def say(self, what: str) -> None:
        """What is being done now."""
        if self._quiet:
            return
        text = f"{what}, {self.left()}"
        if self._bar is not None:
            self._bar.set_description_str(text)
        elif time.perf_counter() - self._said >= LINE_EVERY:
            self._said = time.perf_counter()
            print(f"{self._done / self._planned:4.0%}  {text}", file=sys.stderr, flush=True)

    def advance(self, seconds: float) -> None:
        """So much of the plan is done."""
        self._done = min(self._planned, self._done + seconds)
        if self._bar is not None:
            self._bar.n = self._done / self._planned
            self._bar.refresh()

    def left(self) -> str:
        """The estimate of the time left."""
        elapsed = time.perf_counter() - self._started
        slower = elapsed / self._done if self._done > 0.05 * self._planned else 1.0
        seconds = (self._planned - self._done) * slower
        return f"about {seconds:.0f} s left" if seconds < 90 else f"about {seconds / 60:.0f} min left"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
