"""A model of PyTorch's caching allocator: how much GPU memory a sequence of allocations makes it *reserve*.

A step allocates the bytes of its tensors; the GPU must hold what PyTorch reserves to serve them. The rules
are those of `c10/cuda/CUDACachingAllocator.cpp` (class `DeviceCachingAllocator`) and of the constants in
`c10/core/AllocatorConfig.h`, torch 2.6–2.13; each is cited by name where it is applied. Not modeled, all off
by default: `roundup_power2_divisions`, `garbage_collection_threshold`, private pools of CUDA graphs; nor
`record_stream`, which delays a free until another stream has caught up.

The addresses that the driver returns are unknown: segments get ascending ones here. Addresses matter only if two free
blocks have the same size: the lower one is taken (`BlockComparatorSize`).

All sizes are bytes. Torch is not needed.
"""

from __future__ import annotations

import sys
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, final

from finetune.estimate.allocator.expandable import (
    ADDRESS_BITS,
    GAP,
    LARGE_BUFFER,
    MIN_BLOCK_SIZE,
    SMALL_SIZE,
    Expandable,
    Pool,
    Segments,
    segment_size,
)


class Event(NamedTuple):
    """One allocation, or one release if `size` is None. Made by `allocate` and `free`."""

    identifier: int
    size: int | None
    stream: int = 0


def allocate(identifier: int, size: int, stream: int = 0) -> Event:
    """Allocate `size` bytes as `identifier`, a number ≥ 0 that is not live, on a CUDA stream with its own cache."""
    return Event(identifier, size, stream)


def free(identifier: int) -> Event:
    """Release the allocation `identifier`."""
    return Event(identifier, None)


EMPTY_CACHE = Event(-1, None)  # torch.cuda.empty_cache()


@final
@dataclass(frozen=True)
class OutOfMemory:
    """The allocation that failed after all unused cached segments were released."""

    event: int  # index in the sequence
    size: int  # requested bytes
    segment: int  # bytes that the allocator would have to reserve
    allocated: int
    reserved: int
    live: dict[int, int]  # identifier → bytes of its block, in the order of allocation


@final
@dataclass(frozen=True)
class Reserved:
    """The result of a replay; if it ran out of memory, peaks up to the failure."""

    peak_allocated: int  # torch.cuda.max_memory_allocated()
    peak_reserved: int  # torch.cuda.max_memory_reserved()
    retries: int  # "num_alloc_retries": how often the GPU was full and the cache was released
    out_of_memory: OutOfMemory | None
    timeline: list[tuple[int, int]] | None  # (allocated, reserved) after each event, if requested

    @property
    def fragmentation(self) -> int:
        """Peak reserved minus peak allocated bytes."""
        return self.peak_reserved - self.peak_allocated


@final
class Allocator:
    """The allocator of one GPU.

    Args:
        capacity: bytes that PyTorch may reserve: GPU memory without the CUDA context and other processes; None:
            unlimited.
    """

    def __init__(
        self, capacity: int | None = None, *, max_split_size: int | None = None, expandable_segments: bool = False
    ) -> None:
        """The options are those of PYTORCH_CUDA_ALLOC_CONF; `max_split_size_mb` in bytes, over 20 MiB.

        Raises:
            ValueError: PyTorch would reject the option, or both are used, which is not modeled.
        """
        if max_split_size is not None and (max_split_size <= LARGE_BUFFER or expandable_segments):
            raise ValueError(
                f"max_split_size is {max_split_size}: it must be over {LARGE_BUFFER}, and without expandable_segments"
            )
        self.capacity = sys.maxsize if capacity is None else capacity
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = self.retries = 0
        self._max_split_size = max_split_size or sys.maxsize
        self._expandable = expandable_segments
        self._addresses = [GAP]
        self._small: dict[int, Pool] = {}  # by stream
        self._large: dict[int, Pool] = {}
        self._live: dict[int, tuple[Pool, int, int]] = {}  # identifier → pool, start, end

    def allocate(self, identifier: int, size: int, stream: int = 0) -> int:
        """`malloc`: returns 0, or the bytes that could not be reserved if the GPU is full.

        Raises:
            ValueError: `identifier` is live, or `size` negative.
        """
        live = self._live
        if identifier in live or size < 0:
            raise ValueError(
                f"{identifier} is allocated already" if identifier in live else f"{identifier} has a size of {size}"
            )
        size = -(-size // MIN_BLOCK_SIZE) * MIN_BLOCK_SIZE
        pools = self._small if size <= SMALL_SIZE else self._large
        pool = pools.get(stream) or self._open(pools, stream)
        if size == 0:  # raw_alloc: no block at all
            live[identifier] = pool, 0, 0
            return 0
        block = pool.find(size)
        if block is not None:
            start, end = block
        else:
            start, end = self._grow(pool, size)
            if not end:
                return segment_size(size)
        rest = start + size
        if end - rest >= pool.split_from and size < pool.split_below:
            pool.starts[rest] = end
            pool.ends[end] = rest
            insort(pool.blocks, (end - rest) << ADDRESS_BITS | rest)
            end = rest
        live[identifier] = pool, start, end
        self.allocated += end - start  # the whole block: a remainder that was not split off counts as allocated
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return 0

    def free(self, identifier: int) -> None:
        """Raises:
        ValueError: `identifier` is not live.
        """
        try:
            pool, start, end = self._live.pop(identifier)
        except KeyError:
            raise ValueError(f"{identifier} is not allocated") from None
        if end:
            self.allocated -= end - start
            pool.put(start, end)

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache()`: release segments without live blocks (`release_cached_blocks`)."""
        for pool in (*self._large.values(), *self._small.values()):
            self.reserved -= pool.release()

    def live(self) -> dict[int, int]:
        """Bytes of every live block, by identifier."""
        return {identifier: end - start for identifier, (_, start, end) in self._live.items()}

    def blocks(self) -> list[tuple[int, int, int | None]]:
        """All blocks by address, as in `memory_snapshot()`: start, end, and identifier (None: free)."""
        held: list[tuple[int, int, int | None]] = [
            (start, end, identifier) for identifier, (_, start, end) in self._live.items() if end
        ]
        pools = (*self._large.values(), *self._small.values())
        return sorted(
            held + [(start, end, None) for pool in pools for start, end in pool.starts.items()],
            key=lambda block: block[0],
        )

    def _open(self, pools: dict[int, Pool], stream: int) -> Pool:
        small = pools is self._small
        pool = (
            Expandable(small, self._addresses)
            if self._expandable
            else Segments(small, self._addresses, self._max_split_size)
        )
        pools[stream] = pool
        return pool

    def _grow(self, pool: Pool, size: int) -> tuple[int, int]:
        """`alloc_block`; if the GPU is full, retry after releasing blocks too large to split, then after releasing
        all free ones.
        """
        start, end = self._alloc(pool, size)
        if not end and self._max_split_size < sys.maxsize and isinstance(pool, Segments):
            released, enough = pool.release_oversize(size)
            self.reserved -= released
            if enough:
                start, end = self._alloc(pool, size)
        if not end:
            self.empty_cache()
            self.retries += 1
            start, end = self._alloc(pool, size)
        return start, end

    def _alloc(self, pool: Pool, size: int) -> tuple[int, int]:
        start, end, added = pool.grow(size, self.capacity - self.reserved)
        self.reserved += added
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return start, end


def replay(
    events: Iterable[Event],
    capacity: int | None = None,
    *,
    max_split_size: int | None = None,
    expandable_segments: bool = False,
    timeline: bool = False,
) -> Reserved:
    """Replay the events on an empty GPU; stops at the first allocation that fails.

    Raises:
        ValueError: an identifier is allocated twice, or freed while not live.
    """
    allocator = Allocator(capacity, max_split_size=max_split_size, expandable_segments=expandable_segments)
    levels: list[tuple[int, int]] | None = [] if timeline else None
    failed: OutOfMemory | None = None
    for place, (identifier, size, stream) in enumerate(events):
        if size is None:
            if identifier == EMPTY_CACHE.identifier:
                allocator.empty_cache()
            else:
                allocator.free(identifier)
        elif segment := allocator.allocate(identifier, size, stream):
            failed = OutOfMemory(place, size, segment, allocator.allocated, allocator.reserved, allocator.live())
            break
        if levels is not None:
            levels.append((allocator.allocated, allocator.reserved))
    return Reserved(allocator.peak_allocated, allocator.peak_reserved, allocator.retries, failed, levels)
