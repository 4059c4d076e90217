"""Where a run's wall time goes, and a thread that says so when it goes nowhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import final

from finetune.terminal import duration
from finetune.training.run_status import Reporter, Status

BEAT = 5.0  # seconds between two looks
PATIENCE = (
    300.0  # seconds in which nothing moves before it is said: longer than a forward pass that compiles its kernels
)
_PACKAGE = Path(__file__).resolve().parent.parent
# Where a process waits for the others: torch's collectives, and autograd, in whose backward pass DDP exchanges gradients.
_WAITING = ("torch/distributed/", "torch/autograd/graph.py", "accelerate/state.py", "accelerate/utils/operations.py")


@final
class Clock:
    """Wall seconds by what they went to. On a GPU they show when the host was busy, not when the kernels ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, what: str) -> None:
        """Book the time since the last call on `what`."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self.last
        self.last = now


@final
class Watchdog:
    """Within, a thread reports that this process lives, and says when its training stands still, and where.

    Args:
        reporter: of this process; that of rank 0 speaks for all.
        clock: whose laps are the signs of life.
        say: takes the sentence.
        beat, patience: in seconds.
    """

    def __init__(
        self,
        reporter: Reporter,
        clock: Clock,
        say: Callable[[str], None],
        beat: float = BEAT,
        patience: float = PATIENCE,
    ) -> None:
        self._reporter, self._clock, self._say, self._beat, self._patience = reporter, clock, say, beat, patience
        self._ended = threading.Event()
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        said = 0.0  # the lap that was complained of
        while not self._ended.wait(self._beat):
            last = self._clock.last
            self._reporter.beat(quiet := time.perf_counter() - last, *place(sys._current_frames().get(self._watched)))
            now = self._reporter.now
            if quiet > self._patience and now.phase == "training" and now.rank == 0 and said != last:
                said = last
                self._say(stall(self._reporter.others() or [now], quiet))


def place(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line of this package that `frame` stands on, and whether it waits there for other processes."""
    waits = False
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE):
            return f"{file.relative_to(_PACKAGE)}:{frame.f_lineno} in {frame.f_code.co_name}", waits
        waits = waits or any(part in file.as_posix() for part in _WAITING)
        frame = frame.f_back
    return "", waits


def stall(processes: Sequence[Status], quiet: float) -> str:
    """Which process keeps all of them waiting, and where it stands."""
    culprits = [one for one in processes if not one.waits] or list(processes)
    stalled = f"no progress for {duration(quiet)} in step {processes[0].step + 1}: "
    if len(processes) == 1:
        return stalled + f"the run is at {processes[0].at}"
    places = "; ".join(f"rank {status.rank} on {status.host} is at {status.at}" for status in culprits)
    if len(culprits) == len(processes):
        return stalled + places
    waiting = len(processes) - len(culprits)
    return stalled + f"{places}; {'the other rank waits' if waiting == 1 else f'the other {waiting} ranks wait'} for it"
