"""Work done by threads ahead of whoever needs it, handed over in the order it was asked for: timing changes nothing."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_THREADS = 8  # decoding and scaling release Python's lock, what is between does not


def threads() -> int:
    """One for each core that this process may use, up to `MOST_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MOST_THREADS))


def ahead(work: Callable[[Item], Result], items: Iterable[Item], depth: int | None = None) -> Iterator[Result]:
    """`map(work, items)`, by threads, at most `depth` items further than the consumer. An error comes in its item's place."""
    pool = ThreadPoolExecutor(threads(), thread_name_prefix="ft-data")
    depth = depth or 2 * threads()
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
