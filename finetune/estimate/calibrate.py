"""How fast this machine's CPU runs what a training step is made of, measured in two seconds with torch."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterator

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.estimate.cpu import Calibration, Curve, cpu_name
from finetune.estimate.trace import Recorder

SECONDS = 2.0  # that all of it takes, about
FEWEST = 3  # times that each is run, however long it takes
MATMULS = (64, 256, 512)  # sides
CONVOLUTIONS = ((8, 16, 16), (8, 16, 64), (8, 64, 16), (4, 128, 32))  # pictures, channels, side: thin ones and thick ones
ATTENTIONS = ((8, 64, 32), (16, 256, 32), (8, 512, 64))  # heads of all pictures, length, width
ELEMENTS = (1, 16, 64, 128, 256)  # sides of 4 × 16 channels
CACHES = 24 << 20  # bytes: more than a core's own caches and its share of the common one
CHAIN = 4  # layers of a transformer so tiny that it shows what Python and autograd cost

Measured = Iterator[tuple[float, float]]  # amount, seconds


def calibrate(seconds: float = SECONDS) -> Calibration:
    """Measure this machine with the threads that torch has now.

    Args:
        seconds: about how long it may take.
    """
    each = seconds / (len(MATMULS) + 2 * len(CONVOLUTIONS) + 2 * len(ATTENTIONS) + len(ELEMENTS) * len(ELEMENTWISE) + 2)
    other = _curve(_elements(each))
    kernel = other.points[0][1]
    forward, backward = _chain(each)
    return Calibration(
        name=cpu_name(),
        threads=torch.get_num_threads(),
        date=datetime.date.today().isoformat(),
        matmul=_curve(_matmuls(each)),
        conv=_curve(_convolutions(each)),
        attention=_curve(_attentions(each)),
        other=other,
        launch=max(0.0, forward - kernel),
        launch_engine=max(0.0, backward - kernel),
        held=psutil.Process().memory_info().rss,
    )


def _curve(measured: Measured) -> Curve:
    """Through the means of what was measured of each amount, made to rise."""
    found: dict[float, list[float]] = {}
    for amount, seconds in measured:
        found.setdefault(amount, []).append(seconds)
    points: list[tuple[float, float]] = []
    for amount in sorted(found):
        points.append((amount, max(statistics.mean(found[amount]), points[-1][1] if points else 0.0)))
    return Curve(tuple(points))


def _typical(run: Callable[[], object], seconds: float, cold: bool = True) -> float:
    """Seconds of one run: the median of as many as `seconds` hold, after one that warms up.

    It is the processor's time, shared out to the threads: what else the machine does meanwhile does not count.

    Args:
        cold: whether the caches hold something else when a run begins, as they do in a step, whose tensors are many times their size.
    """
    run()
    other = torch.zeros(CACHES // 4) if cold else None
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < FEWEST or time.perf_counter() < end:
        if other is not None:
            other.add_(1.0)
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return statistics.median(taken) / torch.get_num_threads()


def _matmuls(each: float) -> Measured:
    for side in MATMULS:
        left, right = torch.randn(side, side), torch.randn(side, side)
        yield 2.0 * side**3, _typical(lambda left=left, right=right: left @ right, each)  # type: ignore[misc]


def _convolutions(each: float) -> Measured:
    """3 × 3, forward, and backward, which does twice as much."""
    for pictures, channels, side in CONVOLUTIONS:
        layer = nn.Conv2d(channels, channels, 3, padding=1)
        values = torch.randn(pictures, channels, side, side, requires_grad=True)
        flops = 2.0 * pictures * side**2 * channels**2 * 9
        yield from _both(flops, 2 * flops, lambda layer=layer, values=values: layer(values), [values, *layer.parameters()], each)  # type: ignore[misc]


def _attentions(each: float) -> Measured:
    """Forward, and backward, which computes the scores again: 2.5 times as much."""
    for heads, length, width in ATTENTIONS:
        values = torch.randn(1, heads, length, width, requires_grad=True)
        flops = 4.0 * heads * length**2 * width
        yield from _both(flops, 2.5 * flops, lambda values=values: _attended(values), [values], each)  # type: ignore[misc]


def _attended(values: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(values, values, values)


def _both(flops: float, flops_backward: float, run: Callable[[], Tensor], leaves: list[Tensor], each: float) -> Measured:
    out = run()
    gradient = torch.randn_like(out)
    yield flops, _typical(run, each)
    yield flops_backward, _typical(lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True), each)


ELEMENTWISE: tuple[tuple[float, Callable[[Tensor], Tensor]], ...] = (  # values moved for each value, and what does so
    (3, lambda values: values + values),
    (2, functional.silu),
    (2, lambda values: functional.group_norm(values, 8)),
    (2, lambda values: values.contiguous(memory_format=torch.channels_last)),
)


def _elements(each: float) -> Measured:
    """What is neither product nor attention: a sum, an activation, a norm and a change of layout stand for all."""
    for side in ELEMENTS:
        values = torch.randn(4, 16, side, side)
        for moved, run in ELEMENTWISE:
            seconds = _typical(lambda run=run, values=values: run(values), each, cold=side > 1)  # type: ignore[misc]
            yield 2.0 * values.nbytes, seconds * 2 / moved


def _chain(each: float) -> tuple[float, float]:
    """Seconds an operator of a net whose kernels take no time: forward, and backward."""
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
    forward = _typical(lambda: net(values), each, cold=False)
    backward = _typical(lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True), each, cold=False)
    return forward / counts[0], backward / counts[1]
