"""`Machine`: the device that trains."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.schema import Precision


@dataclass(frozen=True)
class Machine:
    """The hardware of a run.

    Attributes:
        device: cpu, cuda or mps.
        processes: one per device that trains.
        threads: torch's, on a CPU.
        memory_bytes: of one device.
        launcher_precision: given to `accelerate launch --mixed_precision`.
        sharded: whether weights, gradients and optimizer state are split among the processes (FSDP2).
    """

    device: str
    name: str
    processes: int
    threads: int
    bfloat16: bool
    memory_bytes: int
    launcher_precision: Precision | None = None
    sharded: bool = False
