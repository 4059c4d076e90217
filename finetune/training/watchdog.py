"""Where a run's wall time goes, and a thread that warns when training makes no progress."""

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

BEAT = 5.0  # seconds between two checks
PATIENCE = 300.0  # seconds without progress before a warning: longer than a forward pass that compiles kernels
_PACKAGE = Path(__file__).resolve().parent.parent
# Where a process waits for others: torch's collectives, and autograd, in whose backward pass DDP reduces gradients.
_WAITING = ("torch/distributed/", "torch/autograd/graph.py", "accelerate/state.py", "accelerate/utils/operations.py")


@final
class Clock:
    """Wall seconds by activity. On a GPU they show when the host was busy, not when the kernels ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, what: str) -> None:
        """Add the time since the last call to `what`."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self.last
        self.last = now


@final
class Watchdog:
    """Within, a thread reports that this process is alive, and warns when its training stalls, and where.

    Args:
        reporter: of this process; only rank 0 warns.
        clock: each lap of it counts as progress.
        warn: called with the warning.
        beat: seconds between two checks.
        patience: seconds without progress before the warning.
    """

    def __init__(
        self,
        reporter: Reporter,
        clock: Clock,
        warn: Callable[[str], None],
        beat: float = BEAT,
        patience: float = PATIENCE,
    ) -> None:
        self._reporter, self._clock, self._warn, self._beat, self._patience = reporter, clock, warn, beat, patience
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
        warned = 0.0  # the lap that was warned about
        while not self._ended.wait(self._beat):
            last = self._clock.last
            self._reporter.beat(
                quiet := time.perf_counter() - last, *place_of(sys._current_frames().get(self._watched))
            )
            now = self._reporter.now
            if quiet > self._patience and now.phase == "training" and now.rank == 0 and warned != last:
                warned = last
                self._warn(stall(self._reporter.others() or [now], quiet))


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost line of this package in a stack, and whether it waits there for other processes."""
    waits = False
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE):
            return f"{file.relative_to(_PACKAGE)}:{frame.f_lineno} in {frame.f_code.co_name}", waits
        waits = waits or any(part in file.as_posix() for part in _WAITING)
        frame = frame.f_back
    return "", waits


def stall(processes: Sequence[Status], quiet: float) -> str:
    """The warning: which process keeps the others waiting, and where it is."""
    culprits = [one for one in processes if not one.waits] or list(processes)
    stalled = f"no progress for {duration(quiet)} in step {processes[0].step + 1}: "
    if len(processes) == 1:
        return stalled + f"the run is at {processes[0].at}"
    places = "; ".join(f"rank {status.rank} on {status.host} is at {status.at}" for status in culprits)
    if len(culprits) == len(processes):
        return stalled + places
    waiting = len(processes) - len(culprits)
    return stalled + f"{places}; {'the other rank waits' if waiting == 1 else f'the other {waiting} ranks wait'} for it"
