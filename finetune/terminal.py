"""What a person sees while waiting: one line that renews itself on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO

SECONDS_BETWEEN_LINES = 10.0  # where the output is a file
SECONDS_BETWEEN_FRAMES = 0.2  # on a terminal


def duration(seconds: float) -> str:
    """`45 s`, `3 m 20 s`, `2 h 05 m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


class Progress:
    """Progress of one stage: `show(done, total, note)` as often as you like; `end()` closes the line."""

    def __init__(self, stage: str, stream: TextIO | None = None, enabled: bool = True) -> None:
        self._stage, self._stream, self._enabled = stage, stream or sys.stderr, enabled
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()
        self._start_done: int | None = None
        self._shown = 0.0 if self._terminal else time.monotonic() - SECONDS_BETWEEN_LINES + 2
        self._dirty = False

    def show(self, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` are finished; shown only as often as a person or a log can take it."""
        if self._start_done is None:
            self._start, self._start_done = time.monotonic(), done
        now = time.monotonic()
        if not self._enabled or (
            now - self._shown < (SECONDS_BETWEEN_FRAMES if self._terminal else SECONDS_BETWEEN_LINES) and done < total
        ):
            return
        self._shown = now
        advanced = done - self._start_done
        left = f"{duration((now - self._start) / advanced * (total - done))} left" if advanced else ""
        line = " · ".join(part for part in (f"{self._stage} {done}/{total}", note, left) if part)
        if self._terminal:
            self._stream.write(f"\r\x1b[2K{line}")
            self._dirty = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Close the line, so that what is said next stands on one of its own."""
        if self._dirty:
            self._stream.write("\n")
            self._stream.flush()
            self._dirty = False


WIDTH = 100  # characters of a rule; texts may be longer


CONTROL = dict.fromkeys([*range(32), *range(127, 160)], "\ufffd")


Row = tuple[str, str]


def table(title: str, rows: Sequence[Row]) -> str:
    """A ruled title over aligned rows, for a terminal: control characters in other people's names and captions become �."""
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"── {title} {'─' * (WIDTH - len(title) - 4)}"]
    return "\n".join(lines + [f"   {name:<{width}}  {text}".rstrip().translate(CONTROL) for name, text in rows])
