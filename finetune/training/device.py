"""The device of this process and its memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from finetune.config.machine import Machine
from finetune.config.schema import Precision
from finetune.system.cpu_info import cpu_name, host_memory

_LAUNCHER: dict[str, Precision] = {"fp16": "float16", "bf16": "bfloat16"}


def this_machine() -> Machine:
    """The device that Accelerate will choose, and the processes and precision set by `accelerate launch`."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = _LAUNCHER.get(os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if torch.cuda.is_available() and not on_cpu:
        properties = torch.cuda.get_device_properties(0)
        return Machine(
            "cuda",
            properties.name,
            processes,
            torch.get_num_threads(),
            torch.cuda.is_bf16_supported(including_emulation=False),
            properties.total_memory,
            launcher,
            sharded,
        )
    if torch.backends.mps.is_available() and not on_cpu:  # untested
        return Machine("mps", "Apple GPU", processes, torch.get_num_threads(), False, host_memory(), launcher, sharded)
    return Machine("cpu", cpu_name(), processes, torch.get_num_threads(), False, host_memory(), launcher, sharded)


def forget_peak() -> None:
    """Reset the peak that `memory_peak` returns."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # only Linux counts it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory_peak(device: torch.device) -> int | None:
    """Peak bytes that PyTorch reserved on a GPU, or that this process held on a CPU; None where nothing counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if device.type == "cpu" else []
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return None


def empty_cache(device: torch.device) -> None:
    """Release cached GPU memory: the next phase needs blocks of other sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def from_empty_cache(device: torch.device) -> Iterator[None]:
    """Within, a phase whose block sizes differ from the others' starts from and leaves an empty cache."""
    empty_cache(device)
    try:
        yield
    finally:
        empty_cache(device)


def memory_left(device: torch.device) -> float | None:
    """The share of the GPU's memory that is free; None on other devices."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return float(free / total)


def memory_live(device: torch.device, parts: dict[str, list[Tensor]]) -> dict[str, int]:
    """Bytes on `device` of each part's tensors, and on a GPU also of all other live tensors and of PyTorch's cache."""
    found = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in parts.items()}
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        found |= {"activations and others": allocated - sum(found.values()), "cached by PyTorch": reserved - allocated}
        found["other processes and CUDA itself"] = total - free - reserved
    return found
