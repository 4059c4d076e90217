"""Signals during training: the first one finishes the step and saves; a second Ctrl-C stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import final

import torch
from accelerate import Accelerator

from finetune.errors import Stopped


class CutShort(BaseException):
    """Raised by a first signal inside `Signals.cut_short` and caught there: no `Exception`, so by nothing else."""


@final
class Signals:
    """The signals that this process, or with `agreed` any process of the run, has received.

    A repeated SIGTERM does not stop at once: schedulers send it to every process of a job, and `ft train` passes it on.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._asked, self._cuts = 0, False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Within, signals are kept for `agreed`. Outside Python's main thread, nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        candidates = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        wanted = [number for number in candidates if signal.getsignal(number) is not signal.SIG_IGN]  # nohup's stays
        before = {number: signal.signal(number, self._receive) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            if number == signal.SIGINT:
                raise Stopped("stopped at once; --resume continues from the last checkpoint", number)
            return
        self._asked = number
        if self._accelerator.is_main_process:
            message = f"\n{signal.Signals(number).name}: finishing this step and saving; Ctrl-C now stops at once\n"
            with contextlib.suppress(OSError):  # a closed terminal
                os.write(2, message.encode())  # not through Python's buffers: this may interrupt their own work
        if self._cuts:
            raise CutShort

    def cut_short(self, work: Callable[[], None]) -> None:
        """Do `work`, which a first signal ends: samples take long, and can be made again."""
        try:
            self._cuts = not self._asked
            work()
            self._cuts = False
        except CutShort:
            pass
        finally:
            self._cuts = False

    def agreed(self) -> int:
        """The signal that any process received, or 0: the same in all, so that all stop after the same step."""
        if self._accelerator.num_processes == 1:
            return self._asked
        asked = torch.zeros(self._accelerator.num_processes, dtype=torch.int64, device=self._accelerator.device)
        asked[self._accelerator.process_index] = self._asked
        return int(self._accelerator.reduce(asked, "sum").max())
