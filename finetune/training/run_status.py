"""A run's live status for other processes: `status/N.json` of each process N, and a lock held by the first.

A file is rewritten when a phase begins and at the watchdog's beat. The kernel releases the lock when the process ends,
however it ends: a run that is "running" without a lock was killed. Torch is not imported here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from finetune.errors import UserError

FOLDER, LOCK = "status", "lock"
SECONDS_BETWEEN_COUNTS = 0.05


@final
@dataclass(frozen=True)
class Status:
    """One process of a run. Times are seconds since 1970; `step` counts finished steps."""

    state: Literal["running", "stopped", "finished", "failed"]
    phase: str  # encoding, training, validating, saving, sampling, writing; "" before and after
    step: int
    steps: int
    rank: int
    host: str
    pid: int
    started: float
    since: float  # when the phase began
    beat: float  # when this was written
    quiet: float = 0.0  # seconds without progress
    at: str = ""  # the line of this package that the main thread is at
    waits: bool = False  # whether it waits there for other processes
    reason: str = ""  # why it stopped or failed
    done: int = 0  # of the phase's `total` images or captions, if it counts them
    total: int = 0


@final
class Reporter:
    """Writes the status of this process.

    Args:
        folder: of the run.
        rank: of this process.
        steps: of the run.
    """

    def __init__(self, folder: Path, rank: int, steps: int) -> None:
        now = time.time()
        self._folder = folder / FOLDER
        self._lock: int | None = None
        self.now = Status("running", "", 0, steps, rank, socket.gethostname(), os.getpid(), now, now, now)

    def lock(self) -> None:
        """Lock the run's folder for this process until the run or the process ends.

        Raises:
            UserError: another process is training in it.
            OSError: the folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.suppress(BlockingIOError, PermissionError):
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for old in self._folder.glob("*.json"):  # of earlier processes
                old.unlink(missing_ok=True)
            return
        os.close(self._lock)
        raise _locked(self._folder.parent)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, the run is in phase `name`. An exception that ends the outermost phase ends the run."""
        before = self.now
        self._write(phase=name, since=time.time(), done=0, total=0)
        try:
            yield
        except BaseException as error:
            if not before.phase:
                stopped = isinstance(error, KeyboardInterrupt)
                words = error.problem if isinstance(error, UserError) else str(error) or ("Ctrl-C" if stopped else "")
                reason = (
                    words
                    if stopped or isinstance(error, UserError)
                    else f"{type(error).__name__}: {words}".removesuffix(": ")
                )
                self._end("stopped" if stopped else "failed", reason.strip().partition("\n")[0])
            raise
        finally:
            if before.phase:
                self._write(phase=before.phase, since=before.since)
        if not before.phase:
            self._write(phase="")

    def step(self, done: int) -> None:
        """Set the number of finished steps; written at the next beat."""
        self.now = dataclasses.replace(self.now, step=done)

    def progress(self, done: int, total: int) -> None:
        """Set how much of the phase is done; written several times a second."""
        self.now = dataclasses.replace(self.now, done=done, total=total)
        if time.time() - self.now.beat > SECONDS_BETWEEN_COUNTS:
            self._write()

    def beat(self, quiet: float, at: str, waits: bool) -> None:
        """Write that this process is alive; see `Status` for the arguments."""
        self._write(quiet=quiet, at=at, waits=waits)

    def finished(self) -> None:
        """Mark the run as finished, and unlock its folder."""
        self._end("finished")

    def _end(self, state: str, reason: str = "") -> None:
        self._write(state=state, reason=reason)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def others(self) -> list[Status]:
        """The last status of every process of this run, by rank."""
        return read(self._folder.parent)

    def _write(self, **changes: Any) -> None:
        self.now = dataclasses.replace(self.now, beat=time.time(), **changes)
        path = self._folder / f"{self.now.rank}.json"
        aside = path.with_suffix(".part")
        with contextlib.suppress(OSError):  # a full disk or a deleted folder must not stop training
            self._folder.mkdir(exist_ok=True)
            aside.write_text(json.dumps(dataclasses.asdict(self.now)), encoding="utf-8")
            os.replace(aside, path)


def read(folder: Path) -> list[Status]:
    """The processes of the run in `folder`, by rank; unreadable files are skipped."""
    found = []
    for path in folder.joinpath(FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            status = Status(**json.loads(path.read_text(encoding="utf-8")))
            kinds: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool}
            if all(
                isinstance(getattr(status, field.name), kinds.get(str(field.type), str))
                for field in dataclasses.fields(status)
            ):
                found.append(status)
    return sorted(found, key=lambda status: status.rank)


def is_locked(folder: Path) -> bool:
    """Whether a process is training in `folder` now."""
    try:
        descriptor = os.open(folder / FOLDER / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def refuse_locked(folder: Path) -> None:
    """Raise if another process is training in a run's folder.

    Raises:
        UserError: as `Reporter.lock`.
    """
    if is_locked(folder):
        raise _locked(folder)


def _locked(folder: Path) -> UserError:
    return UserError(
        "another process is training in this run's folder",
        where=str(folder),
        remedy="wait for it or stop it; `ft runs show` names the process",
    )
