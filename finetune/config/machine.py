"""`Machine`: the device that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.config.schema import Precision

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Machine:
    """What trains: `device` is cpu, cuda or mps; `threads` are torch's on a CPU; memory in bytes, of one device."""

    device: str
    name: str
    processes: int
    threads: int
    bfloat16: bool
    memory_bytes: int
    launcher_precision: Precision | None = None  # given to `accelerate launch --mixed_precision`
    sharded: bool = False  # weights, gradients and optimizer state shared out among the processes (FSDP2)
