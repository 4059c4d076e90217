"""`ft ui --demo`: the bundled base learns the bundled emoji, in a temporary folder, while one looks on."""

from __future__ import annotations

import contextlib
import time

from finetune.errors import UserError
from finetune.training.run_status import is_locked
from finetune.ui.queue import Queue

RECIPE, NAME = "lora/emoji", "demo"
SHORT = (
    *("train.steps=200", "train.batch_size=4", "optimizer.warmup_steps=10", "train.checkpoint_every=50"),
    *("sample.every=50", "sample.steps=15", "sample.prompts=[rocket, hamburger, strawberry, soccer ball]"),
)
PATIENCE = 60.0  # seconds that the run has to save and stop


def start(queue: Queue) -> None:
    """Queue the short run of the demonstration."""
    queue.add(RECIPE, NAME, SHORT)


def stop(queue: Queue) -> None:
    """Stop it and wait, so that its temporary folder can be removed."""
    with contextlib.suppress(UserError):
        queue.stop(NAME)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and (is_locked(queue.runs / NAME) or _runs(queue)):
        time.sleep(0.2)


def _runs(queue: Queue) -> bool:
    return any(job.process is not None and job.process.poll() is None for job in queue.jobs())
