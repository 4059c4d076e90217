"""The speed of this machine's CPU: calibrations, stored in the user's cache folder.

On a CPU, kernels do not overlap with their launches, and their rate depends on their size (small ones fit into the
caches). So a calibration holds curves: seconds by FLOPs, or by bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from finetune.data.cache_dir import cache_folder
from finetune.paths import ASSETS
from finetune.system.cpu_info import cpu_name

# From glibc's <malloc.h>: options of `mallopt`, and the largest block it allows on the heap.
TRIM_THRESHOLD, MMAP_THRESHOLD, LARGEST = -1, -3, 32 << 20
FILE = "cpu.json"  # in the user's cache folder; in the assets, the speed assumed for CPUs that are not calibrated


@final
@dataclass(frozen=True)
class Curve:
    """Seconds by amount: linear interpolation on logarithmic axes; beyond the largest amount, proportional."""

    points: tuple[tuple[float, float], ...]

    def seconds(self, amount: float) -> float:
        """Seconds of one kernel of this size."""
        points = self.points
        if amount <= points[0][0]:
            return points[0][1]  # the cost of starting a kernel
        if amount >= points[-1][0]:
            return points[-1][1] * amount / points[-1][0]
        (low, fast), (high, slow) = next(pair for pair in itertools.pairwise(points) if amount < pair[1][0])
        share = math.log(amount / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(fast) + share * math.log(slow))

    @property
    def rate(self) -> float:
        """Amount per second at the largest size."""
        return self.points[-1][0] / self.points[-1][1]


@final
@dataclass(frozen=True)
class Calibration:
    """The measured speed of a CPU.

    Attributes:
        name: the CPU's name as the system reports it.
        threads: number of threads in the measurement.
        date: date of the measurement.
        matmul, conv, attention: seconds by FLOPs, float32.
        random, other: seconds by bytes of random numbers drawn, and by bytes read and written.
        launch, launch_engine: overhead in seconds per operator run by Python with autograd, and by autograd's engine.
        held: bytes of a process before it loads a model.
        measured: whether this machine was measured; if not, the bundled CPU's speed is assumed.
    """

    name: str
    threads: int
    date: str
    matmul: Curve
    conv: Curve
    attention: Curve
    random: Curve
    other: Curve
    launch: float
    launch_engine: float
    held: int
    measured: bool = True


BY_BYTES = ("random", "other")
KINDS = ("matmul", "conv", "attention", *BY_BYTES)


def keep_freed_memory() -> None:
    """Let this process keep memory freed by a step for the next one, so that steps do not request new pages each time.

    glibc gives back the end of its heap whenever enough of it is free, and maps large blocks one by one; the kernel
    then clears every page again. A process's peak stays as it was. Other C libraries have other ways, and are left
    alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(MMAP_THRESHOLD, LARGEST)


def threads(processes: int = 1) -> int:
    """Threads per process: OMP_NUM_THREADS, else the available physical cores divided by the number of processes."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed) // processes)


def calibration(count: int) -> Calibration:
    """The calibration of this machine with `count` threads; if there is none, the bundled core's, scaled by `count`."""
    name = cpu_name()
    for kept in _read(_kept()):
        if (kept.name, kept.threads) == (name, count):
            return kept
    core = _read(ASSETS / FILE)[0]
    faster: Any = {
        kind: Curve(tuple((amount, seconds / count) for amount, seconds in getattr(core, kind).points))
        for kind in KINDS
    }
    return dataclasses.replace(core, threads=count, measured=False, **faster)


def keep(found: Calibration) -> Path:
    """Save a calibration in the user's cache folder, next to those of other CPUs and thread counts; returns the file."""
    return _write([*(one for one in _read(_kept()) if (one.name, one.threads) != (found.name, found.threads)), found])


def discard(found: Calibration) -> None:
    """Delete a calibration from the user's cache folder, so that its CPU is measured again; a newer one stays."""
    _write([one for one in _read(_kept()) if one != found])


def _kept() -> Path:
    return cache_folder(None) / FILE


def _write(calibrations: list[Calibration]) -> Path:
    file = _kept()
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    aside.write_text(json.dumps([plain(one) for one in calibrations], indent=1) + "\n", encoding="utf-8")
    os.replace(aside, file)
    return file


def plain(one: Calibration) -> dict[str, object]:
    """A calibration as plain values for the file."""
    curves = {kind: getattr(one, kind).points for kind in KINDS}
    return {**dataclasses.asdict(one), **curves}


def _read(file: Path) -> list[Calibration]:
    """The calibrations in a file; none if it is missing or damaged (it is only a cache)."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        entries = json.loads(file.read_text(encoding="utf-8"))
        return [
            Calibration(**entry | {kind: Curve(tuple((a, s) for a, s in entry[kind])) for kind in KINDS})
            for entry in entries
        ]
    return []
