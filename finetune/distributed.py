"""This process's rank, known before Accelerate is imported."""

from __future__ import annotations

import os


def rank() -> int:
    """Of this process among the run's; known before Accelerate is there to ask."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process speaks for all of a run's."""
    return rank() == 0
