"""This process's rank, known before Accelerate is imported."""

from __future__ import annotations

import os


def rank() -> int:
    """The global rank of this process, from the launcher's environment; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the process that writes files and messages."""
    return rank() == 0
