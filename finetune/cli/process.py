"""How a command or a training process starts, stops and ends: error messages, exit codes, signals."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from finetune import terminal
from finetune.distributed import is_main_process
from finetune.errors import Stopped, UserError

# Set by `ft train` for the processes of a launch. The first names a file in which a process leaves its exit code and
# its last message: launchers turn every failure into exit code 1 and print reports of their own. Beside that file, each
# process leaves one named after its process id: `ft train` passes its signals on to those. The second is the process id
# of `ft train`.
LAST_WORDS, LAUNCHER = "FT_LAST_WORDS", "FT_LAUNCHER"
GRACE = 300.0  # seconds that a run whose launcher is gone has for its step and its checkpoint
YIELD = 3.0  # seconds that a failed process waits for another one's message
MISTAKE = 2  # exit code
STOPPED = "stopped; --resume continues from the last checkpoint"
_ending = threading.Event()  # this process has left its last message, or is about to


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Print a `UserError` without a traceback and exit with code 2; after signal n, exit with 128 + n."""
    try:
        yield
    except UserError as error:
        _end(MISTAKE, "\n".join(error.lines()))
    except Stopped as stopped:
        _end(128 + stopped.number, f"\n{stopped}")
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT, "\nstopped")


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within, Ctrl-C, SIGTERM and a closed terminal (SIGHUP) raise `Stopped`; `nohup` still protects from SIGHUP."""
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    except Stopped:
        raise
    except KeyboardInterrupt as interrupt:
        raise Stopped(STOPPED, signal.SIGINT) from interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def training_process() -> Iterator[None]:
    """`report_errors` and `stoppable` for a script under `accelerate launch`, which does not outlive its launcher."""
    terminal.configure()
    place = os.environ.get(LAST_WORDS)
    if place:
        # `ft train` starts its launcher with SIGINT ignored, and so this process.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Path(place).with_name(str(os.getpid())).touch()
    if place or "ACCELERATE_MIXED_PRECISION" in os.environ:  # the parent is Accelerate's launcher
        launcher = int(os.environ.get(LAUNCHER, "0"))
        threading.Thread(target=_follow, args=(os.getppid(), launcher, place), daemon=True).start()
    with report_errors(), stoppable():
        try:
            yield
        except UserError:
            raise
        except Exception:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                _give_way()  # another process may have ended first, and broken our exchange: its message counts
            raise


def _follow(parent: int, launcher: int, last_words: str | None) -> None:
    """End as by SIGTERM once the process that started this one, or `ft train` behind it, is gone.

    End silently once another process has left its last message: on GPUs, an exchange with it would wait for days.
    """
    while os.getppid() == parent and _exists(launcher):
        if last_words and os.path.exists(last_words) and not _ending.is_set():
            os._exit(0)
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only checks; process 0 is our own group, which exists
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Stopped(STOPPED, number)


def _end(code: int, message: str) -> NoReturn:
    _ending.set()
    terminal.stop_live()
    if place := os.environ.get(LAST_WORDS):
        # Of several processes, the first one's message counts.
        with contextlib.suppress(FileExistsError), open(place, "x", encoding="utf-8") as file:
            file.write(f"{code}\n{message}")
        sys.exit(0)  # a launcher that sees a failure prints a report of its own
    if not is_main_process():
        _give_way()  # the main process reports it
    terminal.echo(message, err=True)
    sys.exit(code)


def _give_way() -> None:
    """Wait for another process's message: once it has ended, its launcher ends this one, or `_follow` does."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(YIELD)
