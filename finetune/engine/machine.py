"""What this process runs on."""

from __future__ import annotations

import os

import torch

from finetune.planning import Machine
from finetune.recipe import Precision

_LAUNCHER: dict[str, Precision] = {"fp16": "float16", "bf16": "bfloat16"}


def this_machine() -> Machine:
    """The device that Accelerate will choose, and what `accelerate launch` said of processes and precision."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = _LAUNCHER.get(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    if torch.cuda.is_available() and not on_cpu:  # untested where no GPU is at hand
        properties = torch.cuda.get_device_properties(0)
        return Machine(
            "cuda",
            properties.name,
            processes,
            torch.get_num_threads(),
            torch.cuda.is_bf16_supported(including_emulation=False),
            properties.total_memory,
            launcher,
        )
    if torch.backends.mps.is_available() and not on_cpu:  # untested likewise
        return Machine("mps", "Apple GPU", processes, torch.get_num_threads(), False, _host_memory(), launcher)
    return Machine("cpu", _cpu_name(), processes, torch.get_num_threads(), False, _host_memory(), launcher)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or "CPU"


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
