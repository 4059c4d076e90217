"""The order of the images: a function of (seed, step); every example equally often; one bucket a step."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.sampler import Order
from finetune.training.trainer import Trainer


def split(sizes: list[int]) -> list[list[int]]:
    """Buckets of the given sizes, over the examples 0, 1, 2 …"""
    ends = numpy.cumsum([0, *sizes]).tolist()
    return [list(range(start, end)) for start, end in itertools.pairwise(ends)]


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)
batches = st.integers(1, 9)
seeds = st.integers(0, 2**31)


@given(sizes, batches, seeds)
@settings(deadline=None)
def test_order_takes_a_batch_from_one_bucket_and_buckets_in_proportion(
    counts: list[int], batch: int, seed: int
) -> None:
    buckets, steps = split(counts), 60
    order = Order(buckets, batch, steps, seed)
    bucket_of = {example: number for number, bucket in enumerate(buckets) for example in bucket}
    taken = [0] * len(buckets)
    for step in range(steps):
        examples = order.batch(step)
        assert len(examples) == batch
        (bucket,) = {bucket_of[example] for example in examples}
        taken[bucket] += 1
        for number, count in enumerate(counts):  # at every step, not only at the end
            assert abs(taken[number] - (step + 1) * count / sum(counts)) < len(counts) + 1e-6


@given(sizes, batches, seeds)
@settings(deadline=None)
def test_order_within_a_bucket_repeats_no_example_before_a_full_pass(counts: list[int], batch: int, seed: int) -> None:
    buckets, steps = split(counts), 40
    order = Order(buckets, batch, steps, seed)
    drawn = [example for step in range(steps) for example in order.batch(step)]
    for bucket in buckets:
        stream = [example for example in drawn if example in set(bucket)]
        for start in range(0, len(stream), len(bucket)):
            one_pass = stream[start : start + len(bucket)]
            assert len(set(one_pass)) == len(
                one_pass
            )  # a full pass holds each example once; the last may be incomplete


def test_order_with_small_buckets_does_not_oversample_them() -> None:
    """With batch size 8, a bucket of one image fills a batch with copies, so it must be chosen rarely."""
    counts, batch = [1, 3, 100], 8
    passes = 40
    steps = passes * sum(counts) // batch
    drawn = Counter(example for step in range(steps) for example in Order(split(counts), batch, steps, 5).batch(step))
    for bucket in split(counts):
        mean = sum(drawn[example] for example in bucket) / len(bucket)
        assert abs(mean - passes) <= batch * len(counts) / len(bucket)


def test_order_with_repeats_shows_an_image_that_many_times() -> None:
    order = Order([[0, 0, 0, 1]], 1, 400, 0)
    assert Counter(example for step in range(400) for example in order.batch(step)) == {0: 300, 1: 100}


@given(sizes, seeds)
@settings(deadline=None, max_examples=30)
def test_order_is_the_same_for_batch_size_accumulation_and_processes(counts: list[int], seed: int) -> None:
    """All have a global batch of 4; the loop distributes its indices over processes and accumulated batches."""
    whole = [Order(split(counts), 4, 12, seed).batch(step) for step in range(12)]
    for batch, accumulation, processes in ((4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2)):
        orders = [Order(split(counts), batch * accumulation * processes, 12, seed) for _ in range(processes)]
        dealt = [
            batch_indices_of(batch, processes, process, micro)
            for micro in range(accumulation)
            for process in range(processes)
        ]
        assert sorted(itertools.chain(*dealt)) == [0, 1, 2, 3]
        for step in range(12):
            seen = {place: orders[n % processes].batch(step)[place] for n, own in enumerate(dealt) for place in own}
            assert [seen[place] for place in range(4)] == whole[step]


def batch_indices_of(batch: int, processes: int, process: int, micro: int) -> list[int]:
    """The training loop's own indices into the global batch, without a trainer."""
    plan = SimpleNamespace(recipe=SimpleNamespace(train=SimpleNamespace(batch_size=batch)))
    trainer: Any = SimpleNamespace(
        plan=plan, accelerator=SimpleNamespace(process_index=process, num_processes=processes)
    )
    return Trainer.batch_indices(trainer, micro)


@given(sizes, batches, seeds, st.integers(0, 49))
@settings(deadline=None, max_examples=50)
def test_order_after_resume_continues_the_unbroken_order(
    counts: list[int], batch: int, seed: int, resumed_at: int
) -> None:
    unbroken = Order(split(counts), batch, 50, seed)
    expected = [unbroken.batch(step) for step in range(50)]
    anew = Order(split(counts), batch, 50, seed)
    assert [anew.batch(step) for step in range(resumed_at, 50)] == expected[resumed_at:]
    longer = Order(split(counts), batch, 80, seed)  # a run that was lengthened
    assert [longer.batch(step) for step in range(50)] == expected


def test_order_differs_between_passes_and_seeds() -> None:
    order = Order([range(50)], 50, 3, 0)
    assert len({tuple(order.batch(step)) for step in range(3)}) == 3
    assert order.batch(0) != Order([range(50)], 50, 3, 1).batch(0)
    starts = {Order(split([50, 50]), 1, 1, seed).batch(0)[0] // 50 for seed in range(20)}
    assert starts == {0, 1}  # no bucket always comes first


def test_order_of_a_million_examples_and_steps_takes_seconds() -> None:
    start = time.process_time()
    order = Order(split([400_000, 350_000, 250_000]), 4, 1_000_000, 0)
    built = time.process_time() - start
    for step in range(0, 1_000_000, 1000):
        order.batch(step)
    assert built < 15, built
    assert time.process_time() - start < 40
