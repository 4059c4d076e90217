#!/usr/bin/env python3
"""Check the allocator model (finetune/estimate/allocator/caching.py) against PyTorch's documented behavior.

    python benchmarks/check_allocator.py

Short sequences with figures worked out by hand from the cited source. Prints expected and replayed figures, then how
long a million events take; the exit code is 1 on any difference. `.cpp` is c10/cuda/CUDACachingAllocator.cpp, `.h` is
c10/core/AllocatorConfig.h, "notes" is pytorch.org/docs/stable/notes/cuda.html.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.estimate.allocator.caching import EMPTY_CACHE, Event, allocate, free, replay

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@final
@dataclass(frozen=True)
class Case:
    name: str
    source: str
    events: list[Event]
    expected: dict[
        str, int
    ]  # allocated and reserved are what is left at the end; failed: the event that found no memory, −1 if none
    capacity: int | None = None
    max_split_size: int | None = None
    expandable_segments: bool = False

    def got(self) -> dict[str, int]:
        """The expected figures as the replay has them."""
        options = {"max_split_size": self.max_split_size, "expandable_segments": self.expandable_segments}
        result = replay(self.events, self.capacity, timeline=True, **options)  # type: ignore[arg-type]
        failed = result.out_of_memory
        assert result.timeline is not None
        allocated, reserved = (failed.allocated, failed.reserved) if failed else result.timeline[-1]
        figures = {
            "allocated": allocated,
            "reserved": reserved,
            "peak allocated": result.peak_allocated,
            "peak reserved": result.peak_reserved,
            "retries": result.retries,
            "failed": failed.event if failed else -1,
        }
        return {name: figures[name] for name in self.expected}


def held(allocated: int, reserved: int, **more: int) -> dict[str, int]:
    return {
        "allocated": allocated,
        "reserved": reserved,
        **{name.replace("_", " "): value for name, value in more.items()},
    }


def blocks(*sizes: int) -> list[Event]:
    return [allocate(place, size) for place, size in enumerate(sizes)]


SIZES = [
    Case(
        "one byte takes 512, in a segment of 2 MiB",
        ".h kMinBlockSize, kSmallBuffer; notes: multiples of 512",
        blocks(1),
        held(512, 2 * MIB),
    ),
    Case("513 bytes take 1,024", ".cpp round_size", blocks(513), held(1024, 2 * MIB)),
    Case("nothing takes nothing", ".cpp raw_alloc: nbytes == 0", blocks(0), held(0, 0)),
    Case(
        "1 MiB is small; two fill a segment", ".h kSmallSize; .cpp get_pool", blocks(MIB, MIB), held(2 * MIB, 2 * MIB)
    ),
    Case("a third opens the next", ".cpp get_allocation_size", blocks(MIB, MIB, MIB), held(3 * MIB, 4 * MIB)),
    Case(
        "1 MiB and a byte is large: 20 MiB",
        ".h kSmallSize, large_segment_size",
        blocks(MIB + 1),
        held(MIB + 512, 20 * MIB),
    ),
    Case(
        "9 MiB twice in one such segment",
        ".cpp get_allocation_size: < kMinLargeAlloc",
        blocks(9 * MIB, 9 * MIB),
        held(18 * MIB, 20 * MIB),
    ),
    Case(
        "a third does not fit the 2 MiB left", ".cpp get_free_block", blocks(*[9 * MIB] * 3), held(27 * MIB, 40 * MIB)
    ),
    Case("10 MiB gets a segment of its own", ".h kMinLargeAlloc", blocks(10 * MIB), held(10 * MIB, 10 * MIB)),
    Case("10 MiB and a byte: one of 12 MiB", ".h kRoundLarge", blocks(10 * MIB + 1), held(10 * MIB + 512, 12 * MIB)),
]
SPLITS = [
    Case(
        "a rest of 1 MiB stays with a large block",
        ".cpp should_split: remaining > kSmallSize",
        blocks(11 * MIB),
        held(12 * MIB, 12 * MIB),
    ),
    Case("a rest 512 larger is split off", ".cpp should_split", blocks(11 * MIB - 512), held(11 * MIB - 512, 12 * MIB)),
    Case(
        "a small rest of 512 is split off, and used",
        ".cpp should_split: remaining >= kMinBlockSize",
        blocks(MIB, MIB - 512, 1),
        held(2 * MIB, 2 * MIB),
    ),
]
CACHE = [
    Case(
        "freed memory stays reserved",
        "notes: unused memory held by the allocator still shows as used",
        [allocate(0, 100 * MIB), free(0)],
        held(0, 100 * MIB, peak_allocated=100 * MIB),
    ),
    Case(
        "… and serves the next",
        ".cpp malloc: get_free_block",
        [allocate(0, 100 * MIB), free(0), allocate(1, 100 * MIB)],
        held(100 * MIB, 100 * MIB),
    ),
    Case(
        "the best fit: 18 MiB into 20, so that 30 is there for 30",
        ".cpp head: smallest cached block that will fit",
        [allocate(0, 30 * MIB), allocate(1, 20 * MIB), free(0), free(1), allocate(2, 18 * MIB), allocate(3, 30 * MIB)],
        held(48 * MIB, 50 * MIB),
    ),
    Case(
        "free neighbors merge",
        ".cpp try_merge_blocks",
        [
            allocate(0, 60 * MIB),
            free(0),
            allocate(1, 20 * MIB),
            allocate(2, 20 * MIB),
            allocate(3, 20 * MIB),
            free(1),
            free(2),
            allocate(4, 40 * MIB),
        ],
        held(60 * MIB, 60 * MIB),
    ),
    Case(
        "free blocks apart do not",
        ".cpp try_merge_blocks",
        [
            allocate(0, 60 * MIB),
            free(0),
            allocate(1, 20 * MIB),
            allocate(2, 20 * MIB),
            allocate(3, 20 * MIB),
            free(1),
            free(3),
            allocate(4, 40 * MIB),
        ],
        held(60 * MIB, 100 * MIB),
    ),
    Case(
        "small requests do not use large segments",
        ".cpp head: separate pools",
        [allocate(0, 20 * MIB), free(0), allocate(1, KIB)],
        held(KIB, 22 * MIB),
    ),
    Case(
        "nor one stream another's",
        ".cpp head: not on any other stream",
        [allocate(0, 30 * MIB), free(0), allocate(1, 30 * MIB, stream=1)],
        held(30 * MIB, 60 * MIB),
    ),
    Case(
        "empty_cache gives back whole segments",
        "torch.cuda.empty_cache; .cpp release_blocks",
        [allocate(0, 30 * MIB), allocate(1, 30 * MIB), free(0), EMPTY_CACHE],
        held(30 * MIB, 30 * MIB),
    ),
    Case(
        "… but none with anything live in it",
        ".cpp release_blocks: !prev && !next",
        [allocate(0, 60 * MIB), free(0), allocate(1, 20 * MIB), EMPTY_CACHE],
        held(20 * MIB, 60 * MIB),
    ),
]
FULL = [
    Case(
        "a full GPU: the cache is given back, and it fits",
        'torch.cuda.memory_stats "num_alloc_retries"',
        [allocate(0, 60 * MIB), free(0), allocate(1, 80 * MIB)],
        held(80 * MIB, 80 * MIB, peak_reserved=80 * MIB, retries=1, failed=-1),
        capacity=100 * MIB,
    ),
    Case(
        "a segment in part use cannot be: out of memory with 80 of 100 MiB free",
        ".cpp malloc: the only remaining cached memory is split",
        [allocate(0, 60 * MIB), free(0), allocate(1, 20 * MIB), allocate(2, 50 * MIB)],
        held(20 * MIB, 60 * MIB, retries=1, failed=3),
        capacity=100 * MIB,
    ),
    Case(
        "twice half the GPU does not fit",
        "test_cuda.py test_out_of_memory_retry (24 GiB, half a GiB for the context)",
        blocks(12 * GIB, 12 * GIB),
        held(12 * GIB, 12 * GIB, failed=1),
        capacity=24 * GIB - GIB // 2,
    ),
    Case(
        "… unless the first was freed",
        "the same",
        [allocate(0, 12 * GIB), free(0), allocate(1, 12 * GIB)],
        held(12 * GIB, 12 * GIB, failed=-1, retries=0),
        capacity=24 * GIB - GIB // 2,
    ),
]
MAX_SPLIT = [
    Case(
        "max_split_size_mb: 40: 60 MiB are not split for 30",
        "notes, max_split_size_mb; .cpp get_free_block",
        [allocate(0, 60 * MIB), free(0), allocate(1, 30 * MIB)],
        held(30 * MIB, 90 * MIB),
        max_split_size=40 * MIB,
    ),
    Case(
        "76 MiB serve 60 whole, being less than 20 MiB more",
        ".h max_non_split_rounding_size",
        [allocate(0, 76 * MIB), free(0), allocate(1, 60 * MIB)],
        held(76 * MIB, 76 * MIB),
        max_split_size=40 * MIB,
    ),
    Case(
        "… and not 56",
        ".cpp get_free_block",
        [allocate(0, 76 * MIB), free(0), allocate(1, 56 * MIB)],
        held(56 * MIB, 132 * MIB),
        max_split_size=40 * MIB,
    ),
    Case(
        "on a full GPU the nearest oversize block goes first, alone",
        ".cpp release_available_cached_blocks",
        [allocate(0, 100 * MIB), allocate(1, 50 * MIB), allocate(2, 40 * MIB), free(0), free(1), allocate(3, 60 * MIB)],
        held(100 * MIB, 150 * MIB, retries=0),
        capacity=200 * MIB,
        max_split_size=40 * MIB,
    ),
    Case(
        "or several, the largest first",
        ".cpp release_available_cached_blocks",
        [allocate(0, 100 * MIB), allocate(1, 50 * MIB), free(0), free(1), allocate(3, 120 * MIB)],
        held(120 * MIB, 120 * MIB, retries=0),
        capacity=200 * MIB,
        max_split_size=40 * MIB,
    ),
]
EXPANDABLE = [
    Case(
        "expandable_segments: pages of 20 MiB, split to the byte",
        ".cpp Note [Expandable Segments]",
        blocks(11 * MIB),
        held(11 * MIB, 20 * MIB),
        expandable_segments=True,
    ),
    Case(
        "pages of 2 MiB for small ones",
        ".cpp Note [Expandable Segments]",
        blocks(1),
        held(512, 2 * MIB),
        expandable_segments=True,
    ),
    Case(
        "a segment grows: 50 MiB where 30 were",
        ".cpp try_allocate_expandable_block",
        [allocate(0, 30 * MIB), free(0), allocate(1, 50 * MIB)],
        held(50 * MIB, 60 * MIB),
        expandable_segments=True,
    ),
    Case(
        "a hole goes before the end, which can grow",
        ".cpp get_free_block: expandable_size",
        [*blocks(15 * MIB, 13 * MIB), free(0), allocate(2, 12 * MIB), allocate(3, 32 * MIB)],
        held(57 * MIB, 60 * MIB),
        expandable_segments=True,
    ),
    Case(
        "a full GPU: free pages are unmapped, the part used stays",
        ".cpp unmap_block",
        [allocate(0, 60 * MIB), allocate(1, 20 * MIB), free(0), allocate(2, 10 * MIB), allocate(3, 70 * MIB)],
        held(100 * MIB, 120 * MIB, retries=1, failed=-1),
        capacity=120 * MIB,
        expandable_segments=True,
    ),
]
CASES = [*SIZES, *SPLITS, *CACHE, *FULL, *MAX_SPLIT, *EXPANDABLE]


def million(seed: int = 0, live: int = 3000) -> list[Event]:
    """A million allocations and releases in random order, sizes from 64 bytes to 128 MiB, evenly on a log scale."""
    draw, events, held_now = random.Random(seed), [], []
    for identifier in range(500_000 + live):
        events.append(allocate(identifier, int(2 ** draw.uniform(6, 27))))
        held_now.append(identifier)
        if len(held_now) > live:
            place = draw.randrange(len(held_now))
            held_now[place], held_now[-1] = held_now[-1], held_now[place]
            events.append(free(held_now.pop()))
    return events


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0]).parse_args(
        [] if __name__ != "__main__" else None
    )
    wrong = 0
    for case in CASES:
        got = case.got()
        wrong += got != case.expected
        print(f"{'ok   ' if got == case.expected else 'WRONG'} {case.name}  [{case.source}]")
        print(
            "      " + ", ".join(f"{name} {got[name]:,} (expected {value:,})" for name, value in case.expected.items())
        )
    events = million()
    start = time.process_time()
    result = replay(events)
    seconds = time.process_time() - start
    print(f"{len(CASES) - wrong} of {len(CASES)} as documented")
    peaks = f"{result.peak_allocated / GIB:.2f} GiB allocated, {result.peak_reserved / GIB:.2f} GiB reserved"
    print(f"{len(events):,} events in {seconds:.2f} CPU seconds: {peaks}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
