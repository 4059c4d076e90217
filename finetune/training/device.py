"""What this process runs on."""

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
    """The device that Accelerate will choose, and what `accelerate launch` said of processes and precision."""
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
    if torch.backends.mps.is_available() and not on_cpu:  # untested likewise
        return Machine("mps", "Apple GPU", processes, torch.get_num_threads(), False, host_memory(), launcher, sharded)
    return Machine("cpu", cpu_name(), processes, torch.get_num_threads(), False, host_memory(), launcher, sharded)


def forget_peak() -> None:
    """Begin to count the peak of `memory_peak` anew."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # only Linux counts it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory_peak(device: torch.device) -> int | None:
    """The most bytes that PyTorch has reserved on the device, or on a CPU that this process has held; None where nothing counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if device.type == "cpu" else []
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return None


def empty_cache(device: torch.device) -> None:
    """Give back what PyTorch keeps of a GPU's memory and nothing lives in: the next phase needs blocks of other sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def from_empty_cache(device: torch.device) -> Iterator[None]:
    """A phase that neither finds nor leaves behind blocks of sizes that are of use to itself alone."""
    empty_cache(device)
    try:
        yield
    finally:
        empty_cache(device)


def memory_left(device: torch.device) -> float | None:
    """The share of the device's memory that no process has taken; None where it is not a GPU's own."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return float(free / total)


def memory_live(device: torch.device, parts: dict[str, list[Tensor]]) -> dict[str, int]:
    """Bytes on `device` of each part's tensors, of all other live ones, and of what PyTorch keeps besides; on a CPU of the parts alone."""
    found = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in parts.items()}
    if device.type == "cuda":  # untested where no GPU is at hand
        allocated = torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        found |= {"activations and others": allocated - sum(found.values()), "kept by PyTorch": reserved - allocated}
        found["other processes and CUDA itself"] = total - free - reserved
    return found
