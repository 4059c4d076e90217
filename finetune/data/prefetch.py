"""Prefetch with threads, in a fixed order, so that timing never changes a result. Torch-free."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar, final

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

MOST_THREADS = 8  # only decoding and scaling release the GIL


def threads() -> int:
    """The number of cores that this process may use, at most `MOST_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MOST_THREADS))


def ahead(work: Callable[[Item], Result], items: Iterable[Item], depth: int | None = None) -> Iterator[Result]:
    """`map(work, items)` with threads, at most `depth` items ahead of the consumer; errors are raised in item order."""
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


@final
class Prefetcher(Generic[Key, Result]):
    """Results by key, computed by threads before they are requested."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._futures: dict[Key, Future[Result]] = {}

    def get(
        self,
        key: Key,
        work: Callable[[], Result],
        upcoming: Mapping[Key, Callable[[], Result]],
        current: Callable[[Key], bool],
    ) -> Result:
        """The result for `key`, computed by `work` unless a thread has started on it.

        Args:
            upcoming: the work for keys that will be requested soon; threads start on it.
            current: whether a key may still be requested; other results are dropped.
        """
        self._futures = {known: future for known, future in self._futures.items() if current(known)}
        self._pool = self._pool or ThreadPoolExecutor(threads(), thread_name_prefix="ft-data")
        for later, its_work in upcoming.items():
            if later not in self._futures:
                self._futures[later] = self._pool.submit(its_work)
        future = self._futures.get(key)
        return future.result() if future is not None else work()
