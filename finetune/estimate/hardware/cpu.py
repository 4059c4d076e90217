"""The machine's own CPU as something to train on: how fast it is by a calibration, kept in the user's cache folder.

A CPU is its own host: its kernels do not overlap, and how fast they are depends on how large they are (small ones fit into
its caches). So a calibration holds curves: seconds by FLOPs, or by bytes.
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

# Of glibc's <malloc.h>: options of `mallopt`, and the largest blocks that it lets share a heap.
TRIM_THRESHOLD, MMAP_THRESHOLD, LARGEST = -1, -3, 32 << 20
FILE = "cpu.json"  # in the user's cache folder; and in the assets, where it is what an unmeasured core is taken to be


@final
@dataclass(frozen=True)
class Curve:
    """Seconds by amount, both rising, in straight lines on logarithmic axes; beyond the ends in proportion."""

    points: tuple[tuple[float, float], ...]

    def seconds(self, amount: float) -> float:
        """Of one kernel that does this much."""
        points = self.points
        if amount <= points[0][0]:
            return points[0][1]  # what starting a kernel costs
        if amount >= points[-1][0]:
            return points[-1][1] * amount / points[-1][0]
        (low, fast), (high, slow) = next(pair for pair in itertools.pairwise(points) if amount < pair[1][0])
        share = math.log(amount / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(fast) + share * math.log(slow))

    @property
    def rate(self) -> float:
        """Amount a second, of the largest."""
        return self.points[-1][0] / self.points[-1][1]


@final
@dataclass(frozen=True)
class Calibration:
    """How fast a CPU is.

    Attributes:
        name: of the CPU, as the system says it.
        threads: that it was measured with.
        date: of the measurement.
        matmul, conv, attention: seconds by FLOPs, float32.
        random: by bytes of what is drawn, one number after another; `other`: by bytes that are read and written.
        launch: seconds that Python, modules and autograd take for one operator besides; `launch_engine`: where autograd's engine runs it.
        held: bytes of a process before it holds a model.
        measured: whether it is this machine that was measured; if not, it is taken to be as fast as the one that the assets hold.
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
    """Let this process keep memory that a step frees for the next one, so that each step does not take all its pages anew.

    glibc gives back the end of its heap whenever enough of it is free, and maps large blocks one by one; the kernel then clears every
    page again. A process's peak stays as it was. Other C libraries have other ways, and are left alone.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(MMAP_THRESHOLD, LARGEST)


def threads(processes: int = 1) -> int:
    """Of each process: as OMP_NUM_THREADS says, else the physical cores that this process may use, shared out."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed) // processes)


def calibration(count: int) -> Calibration:
    """Of this machine with `count` threads; where it was not measured, of the assets' core, so many times as fast."""
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
    """Write a calibration to the user's cache folder, beside those of other CPUs and thread counts; returns the file."""
    return _write([*(one for one in _read(_kept()) if (one.name, one.threads) != (found.name, found.threads)), found])


def discard(found: Calibration) -> None:
    """Take a calibration out of the user's cache folder, so that its CPU is measured anew; one that was kept since stays."""
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
    """As the file holds it."""
    curves = {kind: getattr(one, kind).points for kind in KINDS}
    return {**dataclasses.asdict(one), **curves}


def _read(file: Path) -> list[Calibration]:
    """What a file holds; nothing if it is not there or not whole (it is only a cache)."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        entries = json.loads(file.read_text(encoding="utf-8"))
        return [
            Calibration(**entry | {kind: Curve(tuple((a, s) for a, s in entry[kind])) for kind in KINDS})
            for entry in entries
        ]
    return []
