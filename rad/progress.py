"""Progress of long work: a tqdm bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_EVERY_SECONDS = 10.0


class Progress:
    """Steps done, the latest note, and the time left."""

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "step") -> None:
        self.unit = unit
        self.title, self.total, self.done, self._first = title, total, done, done
        self._bar: Any = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, initial=self.done, desc=self.title, unit=self.unit)
        else:
            resumed = f", resumed at {self.done}" if self.done else ""
            self._print(f"{self.total} {self.unit}s{resumed}")
        return self

    def advance(self, note: str = "", steps: int = 1) -> None:
        """Count `steps` more as done."""
        self.done += steps
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(steps)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_SECONDS or self.done == self.total:
            self._last_line = now
            pace = (now - self._start) / max(1, self.done - self._first)
            left = pace * (self.total - self.done)
            self._print(f"{self.done}/{self.total} {note}, {left:.0f} s left")

    def _print(self, text: str) -> None:
        print(f"{self.title}: {text}", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
