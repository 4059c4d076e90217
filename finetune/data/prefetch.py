"""Work done by threads before it is needed and handed over in order, so that timing changes no result. Torch-free."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar, final

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

MOST_THREADS = 8  # decoding and scaling release Python's lock, the rest does not


def threads() -> int:
    """One for each core that this process may use, up to `MOST_THREADS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MOST_THREADS))


def ahead(work: Callable[[Item], Result], items: Iterable[Item], depth: int | None = None) -> Iterator[Result]:
    """`map(work, items)` by threads, at most `depth` items before the consumer. An error is raised at its item's place."""
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
    """Results by key, computed by threads before they are asked for."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[Key, Future[Result]] = {}

    def get(
        self,
        key: Key,
        work: Callable[[], Result],
        upcoming: Mapping[Key, Callable[[], Result]],
        current: Callable[[Key], bool],
    ) -> Result:
        """The result of `key`, by `work` if no thread has it.

        Args:
            upcoming: the work of keys that will be asked for soon; threads start on it.
            current: whether a key may still be asked for; results of others are dropped.
        """
        self._coming = {known: future for known, future in self._coming.items() if current(known)}
        self._pool = self._pool or ThreadPoolExecutor(threads(), thread_name_prefix="ft-data")
        for later, its_work in upcoming.items():
            if later not in self._coming:
                self._coming[later] = self._pool.submit(its_work)
        ready = self._coming.get(key)
        return ready.result() if ready is not None else work()
