"""Ctrl-C during a run: it ends the measuring, and never the writing of what was measured."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """While it is entered, the first Ctrl-C raises KeyboardInterrupt. Later ones, and any after ``hold``, only wait.

    Attributes:
        held: from here on Ctrl-C waits.
        waiting: one does.
    """

    def __init__(self) -> None:
        self.held = self.waiting = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # no other may set it
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def hold(self) -> None:
        self.held = True

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self.held:
            self.waiting = True
            print("\nwriting what was measured", file=sys.stderr, flush=True)
            return
        self.held = True
        raise KeyboardInterrupt
