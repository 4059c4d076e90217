"""The examples of each step: a function of (seed, step) alone, equal after resuming and for any number of processes.

A global batch (batch size × accumulation × processes) has one size in pixels, so it comes from one bucket. Each bucket
is an endless stream of shuffled passes over its own examples. Each step takes the bucket that is furthest behind its
share, so that after any number of steps each bucket was taken in proportion to its examples. No example is dropped or
used more often than others, however small its bucket: a batch may span two passes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy

from finetune.rng import mix


class Order:
    """The order of examples in a run.

    Args:
        buckets: the example indices of each bucket (an image with 3 repeats occurs 3 times).
        global_batch: examples per step.
        steps: steps of the run.
    """

    def __init__(
        self, buckets: Sequence[Sequence[int] | numpy.ndarray], global_batch: int, steps: int, seed: int
    ) -> None:
        self._buckets = [numpy.asarray(bucket) for bucket in buckets if len(bucket)]
        self._global_batch, self._seed = global_batch, seed
        self._bucket_of_step, self._turn_of_step = _schedule([len(b) for b in self._buckets], steps, seed)
        self._pass = functools.lru_cache(maxsize=2 * len(self._buckets))(self._shuffled)

    def batch(self, step: int) -> list[int]:
        """The examples of `step`, one for each position of the global batch."""
        bucket = int(self._bucket_of_step[step])
        size = len(self._buckets[bucket])
        start = int(self._turn_of_step[step]) * self._global_batch
        return [
            int(self._pass(bucket, place // size)[place % size]) for place in range(start, start + self._global_batch)
        ]

    def _shuffled(self, bucket: int, number: int) -> numpy.ndarray:
        generator = numpy.random.Generator(numpy.random.Philox(key=mix(self._seed, "order", bucket, number)))
        return generator.permutation(self._buckets[bucket])


def _schedule(sizes: list[int], steps: int, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The bucket of each step, and how many earlier steps took that bucket."""
    if len(sizes) == 1:
        return numpy.zeros(steps, numpy.int32), numpy.arange(steps, dtype=numpy.int64)
    share = numpy.asarray(sizes, float) / sum(sizes)
    # Debts start at random, so that large buckets do not always come first.
    debt = numpy.random.Generator(numpy.random.Philox(key=mix(seed, "buckets"))).random(len(sizes))
    bucket_of_step = numpy.empty(steps, numpy.int32)
    turn_of_step = numpy.empty(steps, numpy.int64)
    taken = [0] * len(sizes)
    for step in range(steps):
        debt += share
        bucket = int(debt.argmax())
        debt[bucket] -= 1
        bucket_of_step[step], turn_of_step[step] = bucket, taken[bucket]
        taken[bucket] += 1
    return bucket_of_step, turn_of_step
