"""Measure in three seconds how fast this machine's CPU runs the operators of a training step, with torch.

A busy machine is not measured: threads wait for each other, so one that waits for a core delays all of them. Kernels
with two threads next to another program took up to thirty times as long as alone.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, final

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.errors import UserError
from finetune.estimate.hardware.cpu import Calibration, Curve, keep_freed_memory
from finetune.estimate.tracing.recorder import Recorder
from finetune.system.cpu_info import cpu_name

SECONDS = 2.0  # approximate total time
FEWEST = 3  # runs of each kernel at least
PATIENCE = 1.0  # seconds of CPU time that other programs may take meanwhile
AWAY = 1e-4  # seconds off the CPU that invalidate a run: a time slice of another program is longer
MATMULS = (64, 256, 512)  # sides
CONVOLUTIONS = (
    (8, 16, 16),
    (8, 16, 64),
    (8, 64, 16),
    (4, 128, 32),
)  # images, channels, side
ATTENTIONS = ((8, 64, 32), (16, 256, 32), (8, 512, 64))  # heads of all images, length, width
ELEMENTS = (1, 16, 64, 128, 256, 384)  # sides of 4 × 16 channels; the last is so large that each tensor gets new pages
DRAWN = (16, 128)  # sides for dropout
BETWEEN = 200  # tensors between the write of one and its use, as between a forward and a backward pass
CACHES = 128 << 20  # bytes: more than a core's caches, its share of the last level, and the reach of its TLB
CHAIN = 4  # layers of a transformer so tiny that it measures the overhead of Python and autograd

Measured = Iterator[tuple[float, float]]  # amount, seconds


@final
class Clock:
    """Times kernels under the conditions of a step, by the CPU time of the calling thread, which computes or spins
    throughout.

    Args:
        seconds: approximate time for each kernel.
        patience: seconds of CPU time that other programs may take in total.
    """

    def __init__(self, seconds: float, patience: float) -> None:
        self._seconds, self._patience, self._others = seconds, patience, torch.zeros(CACHES // 4)
        self._start = _now()

    def typical(self, run: Callable[[], object], written: Tensor | None = None) -> float:
        """Seconds of one run: the median of as many runs as there is time for, after one to warm up.

        Runs interrupted by another program do not count; if all were, the shortest counts.

        Args:
            written: the output of the operator before a run. Everything else was used `BETWEEN` tensors of this size
                ago, as in a step, so caches no longer hold large tensors. None: no control of the caches.

        Raises:
            UserError: other programs took more CPU time than `patience`.
        """
        run()
        taken: list[tuple[float, float]] = []  # seconds on the CPU, and off it
        end = time.perf_counter() + self._seconds
        while len(taken) < FEWEST or time.perf_counter() < end:
            if written is not None:
                self._others[: BETWEEN * written.numel()].sum()
                written.sum()
            start = _now()
            run()
            taken.append(_since(*start))
            own, away = _since(*self._start)
            if away > self._patience:
                raise UserError(
                    f"the CPU is too busy to calibrate: other programs used it for {away:.1f} of {own + away:.1f} s",
                    remedy="close them, then run: ft estimate --calibrate",
                )
        alone = [own for own, away in taken if away < AWAY]
        return statistics.median(alone) if alone else min(taken)[0]


def _now() -> tuple[float, float]:
    """Wall time, and CPU time of this thread."""
    return time.perf_counter(), time.thread_time()


def _since(wall: float, own: float) -> tuple[float, float]:
    """CPU seconds of this thread since `_now`, and seconds off the CPU."""
    own = time.thread_time() - own
    return own, time.perf_counter() - wall - own


def calibrate(seconds: float = SECONDS, patience: float = PATIENCE) -> Calibration:
    """Measure this machine with torch's current number of threads.

    Args:
        seconds: approximate duration.
        patience: seconds of CPU time that other programs may take meanwhile.

    Raises:
        UserError: they took more.
    """
    keep_freed_memory()  # as training does
    each = seconds / (
        len(MATMULS) + 2 * len(CONVOLUTIONS) + 2 * len(ATTENTIONS) + len(ELEMENTS) * len(ELEMENTWISE) + len(DRAWN) + 2
    )
    clock = Clock(each, patience)
    curves: Any = {kind: _curve(measure(clock)) for kind, measure in MEASURED.items()}
    kernel = curves["other"].points[0][1]
    forward, backward = _chain(clock)
    del clock  # its memory does not count
    return Calibration(
        name=cpu_name(),
        threads=torch.get_num_threads(),
        date=datetime.date.today().isoformat(),
        **curves,
        launch=max(0.0, forward - kernel),
        launch_engine=max(0.0, backward - kernel),
        held=psutil.Process().memory_info().rss,
    )


def _curve(measured: Measured) -> Curve:
    """A curve through the mean of each amount, made monotonic."""
    found: dict[float, list[float]] = {}
    for amount, seconds in measured:
        found.setdefault(amount, []).append(seconds)
    points: list[tuple[float, float]] = []
    for amount in sorted(found):
        points.append((amount, max(statistics.mean(found[amount]), points[-1][1] if points else 0.0)))
    return Curve(tuple(points))


def _matmuls(clock: Clock) -> Measured:
    for side in MATMULS:
        left, right = torch.randn(side, side), torch.randn(side, side)
        yield 2.0 * side**3, clock.typical(lambda left=left, right=right: left @ right, left)  # type: ignore[misc]


def _convolutions(clock: Clock) -> Measured:
    """3 × 3 convolutions: forward, and backward, which has twice the FLOPs."""
    for images, channels, side in CONVOLUTIONS:
        layer: Any = nn.Conv2d(channels, channels, 3, padding=1)  # the memory format of models from scratch
        layer.to(memory_format=torch.channels_last)
        values = torch.randn(images, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
        flops = 2.0 * images * side**2 * channels**2 * 9
        yield from _both(
            clock,
            flops,
            2 * flops,
            lambda layer=layer, values=values: layer(values),  # type: ignore[misc]
            [values, *layer.parameters()],
        )


def _attentions(clock: Clock) -> Measured:
    """Attention: forward, and backward, which recomputes the scores: 2.5 times the FLOPs."""
    for heads, length, width in ATTENTIONS:
        values = torch.randn(1, heads, length, width, requires_grad=True)
        flops = 4.0 * heads * length**2 * width
        yield from _both(clock, flops, 2.5 * flops, lambda values=values: _attended(values), [values])  # type: ignore[misc]


def _attended(values: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(values, values, values)


def _both(
    clock: Clock, flops: float, flops_backward: float, run: Callable[[], Tensor], leaves: list[Tensor]
) -> Measured:
    out = run()
    gradient = torch.randn_like(out)
    yield flops, clock.typical(run, leaves[0].detach())
    yield flops_backward, clock.typical(lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True), gradient)


# (values moved per value, operator on a tensor just written and one written earlier).
ELEMENTWISE: tuple[tuple[float, Callable[[Tensor, Tensor], Tensor]], ...] = (
    (3, lambda values, kept: values + kept),
    (2, lambda values, _: functional.silu(values)),
    (3, torch.ops.aten.silu_backward),
    (2, lambda values, _: functional.group_norm(values, 8)),
    (2, lambda values, _: values.contiguous(memory_format=torch.channels_last)),
)


def _elements(clock: Clock) -> Measured:
    """Memory-bound operators: a sum, an activation and its gradient, a norm and a layout change represent all."""
    for side in ELEMENTS:
        values, kept = torch.randn(2, 4, 16, side, side)
        for moved, run in ELEMENTWISE:
            seconds = clock.typical(
                lambda run=run, values=values, kept=kept: run(values, kept),  # type: ignore[misc]
                values if side > 1 else None,
            )
            yield 2.0 * values.nbytes, seconds * 2 / moved


def _drawn(clock: Clock) -> Measured:
    """Dropout: drawing a mask."""
    for side in DRAWN:
        values = torch.empty(4, 16, side, side)
        yield values.nbytes, clock.typical(lambda values=values: values.bernoulli_(0.9), values)  # type: ignore[misc]


MEASURED: dict[str, Callable[[Clock], Measured]] = {
    "matmul": _matmuls,
    "conv": _convolutions,
    "attention": _attentions,
    "random": _drawn,
    "other": _elements,
}


def _chain(clock: Clock) -> tuple[float, float]:
    """Seconds per operator of a network with negligible kernels: forward, and backward."""
    net = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0) for _ in range(CHAIN)))
    values = torch.randn(4, 1, 8, requires_grad=True)
    leaves = [values, *net.parameters()]
    with Recorder() as recorder:
        recorder.section("forward")
        out = net(values)
        recorder.section("backward")
        torch.autograd.grad(out.sum(), leaves)
    counts = [len(section.operators) for section in recorder.sections]
    out = net(values)
    gradient = torch.ones_like(out)
    forward = clock.typical(lambda: net(values))
    backward = clock.typical(lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True))
    return forward / counts[0], backward / counts[1]
