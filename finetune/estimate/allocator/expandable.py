"""The pools of PyTorch's caching allocator for one stream: how free blocks are found, split, merged and released.

The rules of `c10/cuda/CUDACachingAllocator.cpp` (class `DeviceCachingAllocator`); names in backquotes are its
functions, and the constants are those of `c10/core/AllocatorConfig.h`. All sizes are bytes.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from typing import final

MIN_BLOCK_SIZE = 512  # kMinBlockSize: every size is rounded up to a multiple of it (round_size)
SMALL_SIZE = 1 << 20  # kSmallSize: the largest request that the small pool serves
SMALL_BUFFER = 2 << 20  # kSmallBuffer: a segment of the small pool
MIN_LARGE_ALLOC = 10 << 20  # kMinLargeAlloc: larger requests get a segment of their own size
LARGE_BUFFER = (
    20 << 20
)  # kLargeBuffer, now large_segment_size(): a segment for requests between the two; also max_non_split_rounding_size()
ROUND_LARGE = 2 << 20  # kRoundLarge: those sizes are rounded up to a multiple of it

# A free block is one integer, its size in the high bits, so that a sorted list has BlockComparatorSize's order.
ADDRESS_BITS = 64
ADDRESS = (1 << ADDRESS_BITS) - 1
# Gap between segments: blocks of different segments never touch, so adjacent free blocks can always merge.
GAP = ROUND_LARGE
# Size of the address space of an expandable segment: more than any GPU has.
SPACE = 1 << 50


def segment_size(size: int) -> int:
    """Bytes requested from cudaMalloc for a block of `size` bytes (`get_allocation_size`)."""
    if size <= SMALL_SIZE:
        return SMALL_BUFFER
    return LARGE_BUFFER if size < MIN_LARGE_ALLOC else -(-size // ROUND_LARGE) * ROUND_LARGE


class Pool(ABC):
    """The cached memory of one stream, small or large blocks (`BlockPool`).

    Free blocks are indexed by size and address for the best fit, and by start and end to find neighbors.
    """

    __slots__ = ("blocks", "ends", "split_below", "split_from", "starts")

    def __init__(self, split_from: int, split_below: int = sys.maxsize) -> None:
        self.blocks: list[int] = []
        self.starts: dict[int, int] = {}  # start → end
        self.ends: dict[int, int] = {}  # end → start
        self.split_from = split_from  # the smallest remainder that becomes a block (should_split) …
        self.split_below = split_below  # … if the request is smaller than this

    def put(self, start: int, end: int) -> None:
        """Free a block and merge it with free neighbors (`free_block`, `try_merge_blocks`)."""
        blocks, starts, ends = self.blocks, self.starts, self.ends
        before = ends.pop(start, None)
        if before is not None:
            del blocks[bisect_left(blocks, (start - before) << ADDRESS_BITS | before)]
            start = before
        after = starts.pop(end, None)
        if after is not None:
            del blocks[bisect_left(blocks, (after - end) << ADDRESS_BITS | end)]
            end = after
        starts[start] = end
        ends[end] = start
        insort(blocks, (end - start) << ADDRESS_BITS | start)

    def take(self, start: int, end: int) -> None:
        """Remove a free block from the cache."""
        blocks = self.blocks
        del blocks[bisect_left(blocks, (end - start) << ADDRESS_BITS | start)]
        del self.starts[start]
        del self.ends[end]

    @abstractmethod
    def find(self, size: int) -> tuple[int, int] | None:
        """Take a free block for `size` from the cache (`get_free_block`); returns start and end."""

    @abstractmethod
    def grow(self, size: int, room: int) -> tuple[int, int, int]:
        """Get a new block of `size` within `room` more bytes; returns start, end (0 if there is no room) and bytes
        reserved.
        """

    @abstractmethod
    def release(self) -> int:
        """Release all unused segments (`release_blocks`); returns bytes."""


@final
class Segments(Pool):
    """Memory from cudaMalloc, one segment at a time."""

    __slots__ = ("addresses", "max_split_size", "segments")

    def __init__(self, small: bool, addresses: list[int], max_split_size: int) -> None:
        super().__init__(MIN_BLOCK_SIZE if small else SMALL_SIZE + 1, sys.maxsize if small else max_split_size)
        self.addresses = addresses  # the next free address, shared by all pools
        self.max_split_size = max_split_size
        self.segments: dict[int, int] = {}  # start → end

    def find(self, size: int) -> tuple[int, int] | None:
        """Take the smallest free block that can serve `size` bytes; returns (start, end) or None (`get_free_block`)."""
        blocks = self.blocks
        place = bisect_left(blocks, size << ADDRESS_BITS)
        if place == len(blocks):
            return None
        block = blocks[place]
        # A block too large to split serves only requests too large to split that nearly fill it.
        found = block >> ADDRESS_BITS
        if found >= self.max_split_size and (size < self.max_split_size or found >= size + LARGE_BUFFER):
            return None
        del blocks[place]
        start = block & ADDRESS
        end = self.starts.pop(start)
        del self.ends[end]
        return start, end

    def grow(self, size: int, room: int) -> tuple[int, int, int]:
        segment = segment_size(size)
        if segment > room:
            return 0, 0, 0
        start = self.addresses[0]
        end = self.segments[start] = start + segment
        self.addresses[0] = end + GAP
        return start, end, segment

    def release(self) -> int:
        whole = [(start, end) for start, end in self.starts.items() if self.segments.get(start) == end]
        return sum(self._release(start, end) for start, end in whole)

    def release_oversize(self, size: int) -> tuple[int, bool]:
        """Release just enough blocks too large to split (`release_available_cached_blocks`); returns bytes, and
        whether enough.
        """
        # Blocks this large are whole segments, since they must not be split.
        wanted = max(size, self.max_split_size)
        place = bisect_left(self.blocks, wanted << ADDRESS_BITS)
        if place < len(self.blocks):
            return self._release_block(self.blocks[place]), True
        released = 0
        while released < wanted and self.blocks and self.blocks[-1] >> ADDRESS_BITS >= self.max_split_size:
            released += self._release_block(self.blocks[-1])
        return released, released >= wanted

    def _release_block(self, block: int) -> int:
        start = block & ADDRESS
        return self._release(start, self.starts[start])

    def _release(self, start: int, end: int) -> int:
        self.take(start, end)
        del self.segments[start]
        return end - start


@final
class Expandable(Pool):
    """One address space whose pages are mapped on demand (`ExpandableSegment`,
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True).

    PyTorch's is an eighth larger than the GPU; this one is unlimited.
    """

    __slots__ = ("base", "holes", "page", "unmapped")

    def __init__(self, small: bool, addresses: list[int]) -> None:
        super().__init__(MIN_BLOCK_SIZE)
        self.page = SMALL_BUFFER if small else LARGE_BUFFER
        self.base = addresses[0]
        addresses[0] += SPACE + GAP
        self.unmapped: dict[int, int] = {
            self.base: self.base + SPACE
        }  # start → end, all multiples of a page from the base
        self.holes = [self.base]  # their starts, sorted

    def find(self, size: int) -> tuple[int, int] | None:
        """Take a free block of at least `size` bytes, preferring those that can grow least; returns (start, end) or
        None.
        """
        blocks = self.blocks
        place = bisect_left(blocks, size << ADDRESS_BITS)
        if place == len(blocks):
            return None
        # A block that can grow counts with its maximal size, so that others are taken first.
        while place + 1 < len(blocks) and self._extent(blocks[place + 1]) < self._extent(blocks[place]):
            place += 1
        start = blocks[place] & ADDRESS
        end = self.starts[start]
        self.take(start, end)
        return start, end

    def grow(self, size: int, room: int) -> tuple[int, int, int]:
        """Map pages for `size` bytes, at most `room`; returns (start, end, bytes added), or (0, 0, bytes added)
        without room.
        """
        start = self._lowest(size)
        end = self.starts.get(start, start)
        added = 0
        while end - start < size:  # invariant: `end` is the start of a hole (try_allocate_expandable_block)
            hole_end = self.unmapped[end]
            mapped = -(-min(size - (end - start), hole_end - end) // self.page) * self.page
            if mapped > room - added:
                return 0, 0, added
            self._map(end, end + mapped, hole_end)
            added += mapped
            end = self.starts[start]
        self.take(start, end)
        return start, end, added

    def release(self) -> int:
        """Unmap unused pages (`unmap_block`)."""
        released = 0
        for start, end in list(self.starts.items()):
            first = self.base + -(-(start - self.base) // self.page) * self.page
            last = end - (end - self.base) % self.page
            if first < last:
                self.take(start, end)
                if start < first:
                    self.put(start, first)
                if last < end:
                    self.put(last, end)
                self._unmap(first, last)
                released += last - first
        return released

    def _extent(self, block: int) -> int:
        end = self.starts[block & ADDRESS]
        return (block >> ADDRESS_BITS) + self.unmapped.get(end, end) - end

    def _lowest(self, size: int) -> int:
        """The lowest address from which free blocks and holes span `size` bytes (`find_expandable_block`)."""
        for hole in self.holes:
            start = reach = self.ends.get(hole, hole)
            while reach - start < size and (further := self.starts.get(reach) or self.unmapped.get(reach)):
                reach = further
            if reach - start >= size:
                return start
        raise AssertionError("the last hole has no end")

    def _map(self, start: int, end: int, hole_end: int) -> None:
        del self.unmapped[start]
        place = bisect_left(self.holes, start)
        if end < hole_end:
            self.unmapped[end] = hole_end
            self.holes[place] = end
        else:
            del self.holes[place]
        self.put(start, end)

    def _unmap(self, start: int, end: int) -> None:
        end = self.unmapped.pop(end, end)
        place = bisect_left(self.holes, start)
        if place and self.unmapped[self.holes[place - 1]] == start:
            place -= 1
            start = self.holes[place]
        self.holes[place : bisect_left(self.holes, end)] = [start]
        self.unmapped[start] = end
