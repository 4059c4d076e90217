"""What people see: messages, tables and progress. Styled with rich on a terminal, plain lines in pipes, logs and CI.

The library logs through `logging.getLogger("finetune…")`; a command calls `configure` once, which shows those messages.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import importlib.abc
import importlib.machinery
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, TextIO, final

from finetune.distributed import is_main_process

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

SECONDS_BETWEEN_LINES = 10.0  # where the output is a file
SECONDS_BETWEEN_FRAMES = 0.2  # on a terminal
WIDTH = 100  # characters of a plain table's rule; texts may be longer
BAR_WIDTH = 24

CONTROL = dict.fromkeys([*range(32), *range(127, 160)], "\ufffd")
# What ASCII terminals get instead of "?".
ASCII = {
    "─": "-",
    "━": "-",
    "│": "|",
    "█": "#",
    "·": "-",
    "×": "x",
    "÷": "/",
    "−": "-",
    "–": "-",
    "—": "-",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "±": "+/-",
    "…": "...",
    "’": "'",
    "“": '"',
    "”": '"',
    "é": "e",
    "ε": "eps",
    "δ": "delta",
    "β": "beta",
    "γ": "gamma",
    "✓": "+",
    "✗": "x",
    "▸": ">",
    "‖": "=",
    "†": "!",
    "µ": "u",
    "²": "^2",
}

Row = tuple[str, str]
log = logging.getLogger("finetune")


# -- words ------------------------------------------------------------------------------------------------------------


def plural(count: int, noun: str, several: str | None = None) -> str:
    """`1 image`, `2 images`, `1,280 images`; `several` is the plural of a noun that takes no `s`."""
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@final
class Table(str):
    """A table as plain text, which also keeps its heading and rows, so that a terminal can style and wrap it."""

    heading: str
    rows: tuple[Row, ...]

    def __new__(cls, title: str, rows: Sequence[Row]) -> Table:
        title = title.translate(CONTROL)
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"── {title} {'─' * (WIDTH - len(title) - 4)}"]
        lines += [f"   {name:<{width}}  {text}".rstrip().translate(CONTROL) for name, text in rows]
        self = super().__new__(cls, "\n".join(lines))
        self.heading, self.rows = title, tuple(rows)
        return self


def table(title: str, rows: Sequence[Row]) -> Table:
    """A ruled title over aligned rows; control characters in file names and captions become �."""
    return Table(title, rows)


# -- output -----------------------------------------------------------------------------------------------------------


@final
class _Lossy(io.FileIO):
    """A file descriptor whose failed writes are dropped: a closed pipe or a full disk must not end a training run."""

    def write(self, data: Any, /) -> int:
        try:
            written = super().write(data)
        except OSError:
            return memoryview(data).nbytes
        return memoryview(data).nbytes if written is None else written


def _replace(error: UnicodeError) -> tuple[str, int]:
    """For streams that cannot write every character: an ASCII form, else `?`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ASCII.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error("finetune", _replace)


def _tolerant(stream: TextIO) -> TextIO:
    """`stream`, or another on the same descriptor, to which every character can be written even if nobody reads it."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    if stream is sys.__stdout__ or stream is sys.__stderr__:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
            buffered: IO[bytes] = io.BufferedWriter(_Lossy(stream.fileno(), "wb", closefd=False))
            return io.TextIOWrapper(
                buffered,
                encoding=stream.encoding,
                errors="finetune",
                line_buffering=stream.line_buffering or stream is sys.__stderr__,
                write_through=stream.write_through,
            )
    stream.reconfigure(errors="finetune")
    return stream


class _Handler(logging.Handler):
    """Shows log messages: information on stdout, warnings and errors on stderr, of the main process only."""

    def emit(self, record: logging.LogRecord) -> None:
        if not is_main_process() and record.levelno < logging.ERROR:
            return
        try:
            if isinstance(record.msg, Table) and not record.args:
                echo(record.msg)
                return
            label = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            echo(label + self.format(record), err=bool(label))
        except Exception:
            self.handleError(record)


def configure(verbose: bool = True) -> None:
    """Prepare this process for a command: output that cannot fail, and the library's log messages on it.

    Args:
        verbose: show what the library logs as information, too; else only warnings and errors.
    """
    sys.stdout, sys.stderr = _tolerant(sys.stdout), _tolerant(sys.stderr)
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    if not any(isinstance(handler, _Handler) for handler in log.handlers):
        log.addHandler(_Handler())


def silence_libraries() -> None:
    """Silence progress bars, warnings and log messages of other libraries that users cannot act on.

    Errors and download bars stay. Call it before those libraries are imported: they read these settings as they load.
    """
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn at every fork otherwise
    # Optional kernels that are not installed; signals that were sent on purpose.
    for name in ("bitsandbytes", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    if not any(isinstance(finder, _WithoutBars) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WithoutBars())


@final
class _WithoutBars(importlib.abc.MetaPathFinder):
    """Switches off the loading bars of diffusers and transformers when they are imported: no variable does it."""

    MODULES = ("diffusers.utils.logging", "transformers.utils.logging")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                module.disable_progress_bar()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def echo(text: str = "", err: bool = False) -> None:
    """Print `text` (a `Table` styled, on a terminal) to stdout or stderr, above a progress bar that is shown."""
    stream = sys.stderr if err else sys.stdout
    if not stream.isatty():
        stream.write(f"{text}\n")
        stream.flush()
        return
    console = _live[0].console if _live else _console(stream)
    console.print(_styled(text) if isinstance(text, Table) else _text(text), soft_wrap=not isinstance(text, Table))


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False, legacy_windows=False)


def _text(text: str) -> RenderableType:
    from rich.text import Text

    for label, style in (("warning: ", "yellow"), ("error: ", "bold red")):
        if text.startswith(label):
            return Text.assemble((label, style), text.removeprefix(label))
    return Text(text)


def _styled(text: Table) -> RenderableType:
    """A rule with the title over a grid whose second column wraps."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, content in text.rows:
        grid.add_row(Text(name.translate(CONTROL)), Text(content.translate(CONTROL)))
    rule = Text.assemble("── ", (text.heading, "bold"), f" {'─' * (WIDTH - len(text.heading) - 4)}", no_wrap=True)
    rule.overflow = "crop"
    return Group(rule, Padding(grid, (0, 0, 0, 3)))


# -- progress ---------------------------------------------------------------------------------------------------------

_live: list[Live] = []  # the display that is on the terminal now


def stop_live() -> None:
    """Take a progress display off the terminal and give it back its cursor."""
    while _live:
        _live.pop().stop()


atexit.register(stop_live)


class Progress:
    """Progress of one stage: call `show` as often as you like, and `end` at the end (or use it as a context manager).

    A terminal gets a bar that is redrawn in place; everything else a line now and then, such as
    `step 40/300 · 0.18 s/step · loss 0.41 · ETA 1 min 20 s`.
    """

    def __init__(self, stage: str, stream: TextIO | None = None, enabled: bool = True) -> None:
        self._stage, self._stream, self._enabled = stage, stream or sys.stderr, enabled
        self._terminal = self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._start = time.monotonic()
        self._start_done: int | None = None
        self._done = 0
        self._shown = 0.0 if self._terminal else time.monotonic() - SECONDS_BETWEEN_LINES + 2
        self._display: Live | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def show(self, done: int, total: int | None, note: str = "", status: str = "") -> None:
        """Report that `done` of `total` are finished; shown only as often as a person or a log can take it.

        Args:
            total: None where it is not known.
            note: follows the count.
            status: a second line, on a terminal only.
        """
        if self._start_done is None or done < self._done:  # another part of the stage counts from 0 again
            self._start, self._start_done = time.monotonic(), done
        self._done = done
        now = time.monotonic()
        between = SECONDS_BETWEEN_FRAMES if self._terminal else SECONDS_BETWEEN_LINES
        if not self._enabled or (now - self._shown < between and done != total):
            return
        self._shown = now
        advanced = done - self._start_done
        left = f"ETA {duration((now - self._start) / advanced * (total - done))}" if advanced and total else ""
        note = note.translate(CONTROL)
        if self._terminal:
            self._draw(done, total, " · ".join(part for part in (note, left) if part), status.translate(CONTROL))
            return
        count = f"{self._stage} {done}" + (f"/{total}" if total is not None else "")
        self._stream.write(" · ".join(part for part in (count, note, left) if part) + "\n")
        self._stream.flush()

    def _draw(self, done: int, total: int | None, note: str, status: str) -> None:
        from rich.console import Group
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.table import Table as Grid
        from rich.text import Text

        if self._display is None:
            stop_live()  # of a stage that did not end
            self._display = Live(
                console=_console(self._stream), auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            )
            self._display.start()
            _live.append(self._display)
        row = Grid.grid(padding=(0, 1))
        count = f"{done}/{total}" if total is not None else str(done)
        bar = ProgressBar(total=total or 1, completed=done, width=BAR_WIDTH) if total is not None else ""
        row.add_row(self._stage, bar, count, Text(note, no_wrap=True, overflow="ellipsis"))
        lines: list[RenderableType] = [row]
        if status:
            lines.append(Text(f"  {status}", style="dim", no_wrap=True, overflow="ellipsis"))
        self._display.update(Group(*lines), refresh=True)

    def end(self) -> None:
        """Leave the last state on the terminal; what is printed next stands below it."""
        if self._display is not None:
            if self._display in _live:
                stop_live()
            self._display = None
