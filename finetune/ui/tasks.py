"""Short jobs of the page besides training, such as an export: one `ft` process each, so that the server needs no torch."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import final

LINES = 12  # of an error message


@final
@dataclass
class Task:
    """A process and how it ended."""

    title: str
    process: subprocess.Popen[str]
    output: str = ""
    done: bool = False

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self.done and self.process.returncode != 0


@final
class Tasks:
    """The last task of each key, such as a run's name."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._lock = threading.Lock()

    def start(self, key: str, title: str, arguments: list[str]) -> bool:
        """Run `ft` with arguments, unless a task of this key is running; returns whether it started."""
        with self._lock:
            now = self._tasks.get(key)
            if now is not None and not now.done:
                return False
            process = subprocess.Popen(
                [sys.executable, "-m", "finetune", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            task = self._tasks[key] = Task(title, process)
        threading.Thread(target=self._wait, args=(task,), name="ft-task", daemon=True).start()
        return True

    def of(self, key: str) -> Task | None:
        """The last task of a key."""
        return self._tasks.get(key)

    @staticmethod
    def _wait(task: Task) -> None:
        output, _ = task.process.communicate()
        task.output = "\n".join(output.splitlines()[-LINES:])
        task.done = True
