"""Line charts as inline SVG.

The SVG stretches with the page. Its labels are HTML elements positioned in percent, so they keep their size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from finetune.report.html import render

Points = Sequence[tuple[float, float]]
MAX_POINTS = 2000  # per line: the minimum and maximum of each stretch are kept, so no spike disappears
WINDOWS = 12  # a smoothed line averages over 1/12 of the run
LOG_SCALE_RATIO = 5.0  # the scale is logarithmic if a smooth line's maximum exceeds this many times its minimum
SIDE = 1000.0  # of the SVG's viewBox


@dataclass(frozen=True)
class Line:
    """One line of a chart; `style` is a class in `page.css`: raw, smooth, other or dots (a line with markers)."""

    points: Points
    style: str
    name: str = ""


@dataclass(frozen=True)
class Axis:
    """A range of values, linear or logarithmic."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """The position of `value` on the axis: 0 at `low`, 1 at `high`."""
        if self.logarithmic:
            return (math.log(max(value, 1e-300)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self, wanted: int = 4) -> list[float]:
        """About `wanted` round values within the range."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
                values = [
                    digit * 10.0**power
                    for power in powers
                    for digit in digits
                    if self.low <= digit * 10.0**power <= self.high
                ]
                if len(values) <= wanted + 2:
                    break
            return values
        raw = (self.high - self.low) / wanted
        unit = 10 ** math.floor(math.log10(raw))
        step = unit * min((1, 2, 2.5, 5, 10), key=lambda digit: abs(digit * unit - raw))
        return [
            number * step
            for number in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        ]


def smoothed(points: Points, average: Callable[[list[float]], float] = statistics.fmean) -> list[tuple[float, float]]:
    """The moving average of the values (with `statistics.median`, robust against single spikes)."""
    if not points:
        return []
    half = max(len(points) // (2 * WINDOWS), min(4, len(points) // 8))
    stride = math.ceil(2 * len(points) / MAX_POINTS) or 1
    result = []
    for center in {*range(0, len(points), stride), len(points) - 1}:
        # Symmetric at the start too: where a loss falls steeply, a window that only looks ahead shows it too low.
        reach = min(half, center)
        window = points[center - reach : center + reach + 1]
        result.append((points[center][0], average([y for _, y in window])))
    return sorted(result)


def thinned(points: Points, most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` of the points, in order, with the minimum and maximum of each stretch."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(2 * len(points) / most)
    result = []
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        ends = {min(part, key=lambda index: points[index][1]), max(part, key=lambda index: points[index][1])}
        result += [points[index] for index in sorted(ends)]
    return result


def value_axis(lines: Sequence[Line], from_zero: bool) -> Axis:
    """The vertical axis: logarithmic for a wide range of values. Single spikes of raw lines may exceed it."""
    every = sorted(y for line in lines for _, y in line.points)
    steady = [y for line in lines if line.style != "raw" for _, y in line.points] or every
    low, high = min(min(steady), every[len(every) // 100]), max(max(steady), every[-1 - len(every) // 50])
    if min(steady) > 0 and max(steady) / min(steady) > LOG_SCALE_RATIO and low > 0 and not from_zero:
        return Axis(low / 1.1, high * 1.1, logarithmic=True)
    margin = 0.06 * (high - low) or abs(high) * 0.5 or 1.0
    return Axis(0.0 if from_zero and low >= 0 else low - margin, high + margin)


def chart(
    title: str, lines: Sequence[Line], summary: str = "", from_zero: bool = False, last: float | None = None
) -> Markup:
    """A `<figure>` with the lines over training steps; empty if no line has points.

    Args:
        title: the figure's title.
        lines: what to plot.
        summary: text next to the title.
        from_zero: start the vertical axis at 0.
        last: the last step of the plan; the horizontal axis reaches at least this far.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup()
    steps = [x for line in lines for x, _ in line.points]
    horizontal, vertical = Axis(0, max(*steps, last or 1)), value_axis(lines, from_zero)
    return render(
        "chart.html.j2",
        title=title,
        summary=summary,
        side=f"{SIDE:g}",
        vertical=[(f"{100 * vertical.place(tick):.2f}", number(tick)) for tick in vertical.ticks()],
        horizontal=[(f"{100 * horizontal.place(tick):.2f}", number(tick)) for tick in horizontal.ticks()],
        lines=[_polyline(line, horizontal, vertical) for line in lines],
    )


def _polyline(line: Line, horizontal: Axis, vertical: Axis) -> dict[str, object]:
    points = [(SIDE * horizontal.place(x), SIDE * (1 - vertical.place(y))) for x, y in thinned(line.points)]
    # A zero-length path with round line caps is a dot that stays round however the SVG is stretched.
    dots = points if len(points) == 1 or line.style == "dots" else []
    return {
        "style": line.style,
        "name": line.name,
        "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points),
        "dots": [(f"{x:.1f}", f"{y:.1f}") for x, y in dots],
    }


def number(value: float) -> str:
    """Format a tick's label: 0.05, 1.5e-5, 400, 12k."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if abs(value) < 0.0001:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:g}"
