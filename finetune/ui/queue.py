"""The queue of runs: one `ft train` process after another. Runs outlive the server; their folders tell how they are."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

from finetune.errors import UserError
from finetune.training.run_list import Seen, all_runs, look

LAST_LINES = 30  # of a log
LOG_BYTES = 64 << 10  # that are read from a log's end
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass
class Job:
    """One entry of the queue.

    Attributes:
        name: of the run's folder.
        recipe: a file, or the name of a bundled recipe.
        error: the last lines of the log if the process failed.
    """

    number: int
    name: str
    recipe: str
    folder: Path
    overrides: tuple[str, ...] = ()
    resume: bool = False
    state: Literal["waiting", "running", "done", "stopped", "failed"] = "waiting"
    error: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def command(self) -> list[str]:
        """The arguments after `ft`."""
        overrides = (f"output.folder={self.folder}", *self.overrides)
        sets = [part for assignment in overrides for part in ("--set", assignment)]
        return ["train", self.recipe, *sets, *(["--resume"] if self.resume else [])]


@final
class Queue:
    """Starts jobs one after another, in processes of their own that outlive this one.

    Args:
        runs: the folder of all runs; logs are written beside them.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self._jobs: list[Job] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def jobs(self) -> list[Job]:
        """All jobs of this server, oldest first."""
        with self._lock:
            return list(self._jobs)

    def add(self, recipe: str, name: str, overrides: tuple[str, ...] = (), resume: bool = False) -> Job:
        """Put a run at the end of the queue.

        Raises:
            UserError: it is in the queue, or its folder exists and `resume` is not set.
        """
        folder = self.runs / name
        if not resume and folder.exists():
            raise UserError(f"the run {name} exists already", remedy="choose another name, or resume that run")
        if resume and look(folder).state == "running":
            raise UserError(f"the run {name} is training already", remedy="wait for it, or stop it first")
        with self._lock:
            if any(job.name == name and job.state in ("waiting", "running") for job in self._jobs):
                raise UserError(f"the run {name} is in the queue already", remedy="choose another name")
            job = Job(len(self._jobs) + 1, name, recipe, folder, overrides, resume)
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="ft-queue", daemon=True)
                self._thread.start()
        return job

    def remove(self, number: int) -> None:
        """Take a waiting job out of the queue, or a failed one off the page."""
        with self._lock:
            self._jobs = [job for job in self._jobs if job.number != number or job.state == "running"]

    def stop(self, name: str) -> None:
        """Let a run finish its step, save and stop.

        Raises:
            UserError: it is not training on this machine.
        """
        with self._lock:
            job = next((job for job in self._jobs if job.name == name and job.state == "running"), None)
        if job is not None and job.process is not None and job.process.poll() is None:
            job.process.send_signal(signal.SIGTERM)
            return
        seen = look(self.runs / name)  # started by hand, or by an earlier server
        here = [process for process in seen.processes if process.host == socket.gethostname()]
        if seen.state != "running" or not here:
            raise UserError(f"the run {name} is not training on this machine", remedy="reload the page")
        with contextlib.suppress(ProcessLookupError):
            os.kill(here[0].pid, signal.SIGTERM)

    def close(self) -> None:
        """Start nothing more. Runs that train go on."""
        self._closed.set()

    def seen(self) -> list[Seen]:
        """The runs in the folder, newest first."""
        return all_runs(self.runs) if self.runs.is_dir() else []

    def log(self, name: str) -> list[str]:
        """The last lines that a run's process printed."""
        with contextlib.suppress(OSError), open(self._log(name), "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - LOG_BYTES))
            return file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()[-LAST_LINES:]
        return []

    def _log(self, name: str) -> Path:
        return self.runs / f"{name}.log"

    def _work(self) -> None:
        while not self._closed.wait(SECONDS_BETWEEN_LOOKS):
            with self._lock:
                job = next((job for job in self._jobs if job.state == "waiting"), None)
            # A run that somebody started in a terminal uses the device as well.
            if job is None or any(run.state == "running" for run in self.seen()):
                continue
            self._run(job)

    def _run(self, job: Job) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        with open(self._log(job.name), "ab" if job.resume else "wb") as log:
            # A session of its own: Ctrl-C in the server's terminal does not reach it.
            job.process = subprocess.Popen(
                [sys.executable, "-m", "finetune", *job.command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            job.state = "running"
        code = job.process.wait()
        if code == 0:
            job.state = "done"
        elif code in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT):
            job.state = "stopped"
        else:
            job.state, job.error = "failed", "\n".join(self.log(job.name)[-12:])
