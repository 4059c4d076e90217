"""What this process runs on."""

from __future__ import annotations

import os

import torch
from torch import Tensor

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


def forget_peak() -> None:
    """Begin to count the peak of `memory_peak` anew."""
    if torch.cuda.is_initialized():  # untested where no GPU is at hand
        torch.cuda.reset_peak_memory_stats()


def memory_peak(device: torch.device) -> int | None:
    """The most bytes that PyTorch has reserved on the device; None where it does not count them, as on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


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


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or "CPU"


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
