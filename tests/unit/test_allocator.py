"""The replayed allocator: PyTorch's documented behavior, invariants, and a naive reference implementation."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.check_allocator import CASES, Case
from finetune.estimate.allocator.caching import EMPTY_CACHE, Allocator, Event, allocate, free, replay

MIB = 1 << 20
SIZES = st.one_of(
    st.integers(0, 3 * MIB),
    st.integers(0, 70 * MIB),
    st.sampled_from([1, 512, MIB, MIB + 1, 10 * MIB, 11 * MIB, 20 * MIB, 60 * MIB]),
)


@st.composite
def sequences(draw: st.DrawFn, streams: int = 2) -> list[Event]:
    """Allocations, frees of live blocks, and occasionally an emptied cache."""
    events: list[Event] = []
    live: list[int] = []
    for identifier in range(draw(st.integers(1, 40))):
        action = draw(st.integers(0, 9))
        if action < 4 and live:
            events.append(free(live.pop(draw(st.integers(0, len(live) - 1)))))
        elif action == 4:
            events.append(EMPTY_CACHE)
        else:
            events.append(allocate(identifier, draw(SIZES), draw(st.integers(0, streams - 1))))
            live.append(identifier)
    return events


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_allocator_replays_the_documented_cases(case: Case) -> None:
    assert case.got() == case.expected


@final
@dataclass
class Part:
    size: int
    holder: int | None = None


@final
class Naive:
    """The same rules without an index: each segment is a list of parts.

    Segments, ordered by address, are searched linearly.
    """

    def __init__(self, capacity: int, max_split: int) -> None:
        self.capacity, self.max_split, self.retries = capacity, max_split, 0
        self.segments: list[tuple[tuple[bool, int], list[Part]]] = []  # ((small, stream), parts)

    def levels(self) -> tuple[int, int]:
        parts = [part for _, parts in self.segments for part in parts]
        return sum(part.size for part in parts if part.holder is not None), sum(part.size for part in parts)

    def whole(self, pool: tuple[bool, int]) -> list[int]:
        found = [
            place
            for place, (of, parts) in enumerate(self.segments)
            if len(parts) == 1 and parts[0].holder is None and of == pool
        ]
        return sorted(found, key=lambda place: self.segments[place][1][0].size)

    def drop(self, gone: list[int]) -> int:
        dropped = sum(self.segments[place][1][0].size for place in gone)
        self.segments = [segment for place, segment in enumerate(self.segments) if place not in gone]
        return dropped

    def empty(self) -> None:
        for pool in {pool for pool, _ in self.segments}:
            self.drop(self.whole(pool))

    def free(self, identifier: int) -> None:
        for _, parts in self.segments:
            for part in parts:
                if part.holder == identifier:
                    part.holder = None
            for place in range(len(parts) - 1, 0, -1):
                if parts[place - 1].holder is None and parts[place].holder is None:
                    parts[place - 1 : place + 1] = [Part(parts[place - 1].size + parts[place].size)]

    def allocate(self, identifier: int, size: int, stream: int) -> bool:
        size = (size + 511) // 512 * 512
        pool = (size <= MIB, stream)
        mine = [(place, parts) for place, (of, parts) in enumerate(self.segments) if of == pool]
        fits = [
            (part.size, place, k)
            for place, parts in mine
            for k, part in enumerate(parts)
            if part.holder is None and part.size >= size
        ]
        found = min(fits, default=None)
        if found and (found[0] >= self.max_split > size or (size >= self.max_split and found[0] >= size + 20 * MIB)):
            found = None
        if found is None:
            if not self.open(pool, size):
                return False
            found = (0, len(self.segments) - 1, 0)
        parts, k = self.segments[found[1]][1], found[2]
        rest = parts[k].size - size
        if rest >= 512 if pool[0] else (rest > MIB and size < self.max_split):
            parts[k : k + 1] = [Part(size, identifier), Part(rest)]
        else:
            parts[k].holder = identifier
        return True

    def open(self, pool: tuple[bool, int], size: int) -> bool:
        new = 2 * MIB if size <= MIB else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
        wanted = max(size, self.max_split)
        if self.levels()[1] + new > self.capacity:
            oversize = [place for place in self.whole(pool) if self.segments[place][1][0].size >= self.max_split]
            enough = [place for place in oversize if self.segments[place][1][0].size >= wanted]
            dropped = 0
            while (oversize and not enough and dropped < wanted) or (enough and not dropped):
                last = (enough or oversize)[0 if enough else -1]
                dropped += self.drop([last])
                oversize = [place for place in self.whole(pool) if self.segments[place][1][0].size >= self.max_split]
            if dropped < wanted or self.levels()[1] + new > self.capacity:
                self.retries += 1
                self.empty()
        if self.levels()[1] + new > self.capacity:
            return False
        self.segments.append((pool, [Part(new)]))
        return True


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    sequences(), st.sampled_from([60 * MIB, 130 * MIB, 300 * MIB, 1 << 40]), st.sampled_from([None, 21 * MIB, 40 * MIB])
)
def test_allocator_agrees_with_the_naive_model(events: list[Event], capacity: int, max_split: int | None) -> None:
    compare(events, capacity, max_split)


@pytest.mark.parametrize("max_split", [None, 21 * MIB, 40 * MIB])
def test_allocator_with_a_nearly_full_gpu_agrees_with_the_naive_model(max_split: int | None) -> None:
    """Large blocks with at most two thirds of the GPU allocated, so the cache must be released again and again."""
    for seed in range(150):
        draw, capacity = random.Random(seed), 300 * MIB
        events: list[Event] = []
        live: dict[int, int] = {}
        for identifier in range(60):
            size = draw.choice([draw.randint(1, 12), draw.randint(10, 80), 20 * draw.randint(1, 5)]) * MIB
            while live and sum(live.values()) + size > capacity * 2 // 3:
                events.append(free(draw.choice(list(live))))
                del live[events[-1].identifier]
            events.append(allocate(identifier, size))
            live[identifier] = size
        compare(events, capacity, max_split)


def compare(events: list[Event], capacity: int, max_split: int | None) -> None:
    result = replay(events, capacity, max_split_size=max_split, timeline=True)
    model = Naive(capacity, max_split or 1 << 60)
    levels: list[tuple[int, int]] = []
    for identifier, size, stream in events:
        if size is None:
            model.empty() if identifier < 0 else model.free(identifier)
        elif size and not model.allocate(identifier, size, stream):
            break
        levels.append(model.levels())
    assert result.timeline == levels
    assert result.retries == model.retries
    assert (result.out_of_memory is None) == (len(levels) == len(events))
    if result.out_of_memory:
        assert result.out_of_memory.event == len(levels)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sequences(), st.sampled_from([None, 100 * MIB]), st.booleans())
def test_allocator_invariants_hold_for_any_sequence(
    events: list[Event], capacity: int | None, expandable: bool
) -> None:
    allocator = Allocator(capacity, expandable_segments=expandable)
    sizes: dict[int, int] = {}
    for identifier, size, stream in events:
        if size is not None:
            if allocator.allocate(identifier, size, stream):
                break
            sizes[identifier] = size
        elif identifier < 0:
            allocator.empty_cache()
        else:
            allocator.free(identifier)
            del sizes[identifier]
        blocks = allocator.blocks()
        assert all(before[1] <= after[0] for before, after in pairwise(blocks)), "two blocks overlap"
        assert not any(a[2] is None and b[2] is None and a[1] == b[0] for a, b in pairwise(blocks)), (
            "neighbors not merged"
        )
        assert sum(end - start for start, end, _ in blocks) == allocator.reserved
        assert sum(allocator.live().values()) == allocator.allocated <= allocator.reserved
        assert all(allocator.live()[one] >= size for one, size in sizes.items())
        assert allocator.reserved % (2 * MIB) == 0
        assert capacity is None or allocator.reserved <= capacity
    for identifier in list(allocator.live()):
        allocator.free(identifier)
    assert allocator.allocated == 0
    assert all((end - start) % (2 * MIB) == 0 for start, end, _ in allocator.blocks()), (
        "a segment is not one free block"
    )
    allocator.empty_cache()
    assert allocator.reserved == 0 and allocator.blocks() == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(SIZES, min_size=1, max_size=30), st.randoms(use_true_random=False), st.booleans())
def test_allocator_after_all_frees_does_not_depend_on_their_order(
    sizes: list[int], shuffle: object, expandable: bool
) -> None:
    """Once everything is free, the blocks are the same in any order: merging is commutative."""
    ends = []
    for turn in range(2):
        allocator = Allocator(expandable_segments=expandable)
        for identifier, size in enumerate(sizes):
            assert allocator.allocate(identifier, size) == 0
        order = list(range(len(sizes)))
        if turn:
            shuffle.shuffle(order)  # type: ignore[attr-defined]
        for identifier in order:
            allocator.free(identifier)
        ends.append(allocator.blocks())
    assert ends[0] == ends[1]


def test_allocator_with_equal_free_blocks_takes_the_lower_address() -> None:
    allocator = Allocator()
    for identifier in range(3):
        allocator.allocate(identifier, 20 * MIB)
    allocator.free(2)
    allocator.free(0)
    allocator.allocate(3, 20 * MIB)
    assert [holder for _, _, holder in allocator.blocks()] == [3, 1, None]


def test_allocator_out_of_memory_reports_live_allocations() -> None:
    result = replay([allocate(7, 30 * MIB), allocate(8, 100), allocate(9, 25 * MIB)], capacity=50 * MIB)
    failed = result.out_of_memory
    assert failed is not None
    assert (failed.event, failed.size, failed.segment) == (2, 25 * MIB, 26 * MIB)
    assert failed.live == {7: 30 * MIB, 8: 512}
    assert failed.reserved == result.peak_reserved == 32 * MIB
    assert result.fragmentation == 2 * MIB - 512


@pytest.mark.parametrize(
    ("events", "complaint"),
    [
        ([allocate(0, 1), allocate(0, 1)], "0 is allocated already"),
        ([allocate(0, -1)], "0 has a size of -1"),
        ([free(3)], "3 is not allocated"),
    ],
)
def test_allocator_refuses_an_impossible_sequence(events: list[Event], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replay(events)


@pytest.mark.parametrize(
    "options", [{"max_split_size": 20 * MIB}, {"max_split_size": 40 * MIB, "expandable_segments": True}]
)
def test_allocator_refuses_unsupported_options(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="max_split_size"):
        Allocator(**options)  # type: ignore[arg-type]
