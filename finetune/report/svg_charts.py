"""Line charts as inline SVG. The drawing stretches with the page; its labels are HTML placed in per cent, so they stay legible."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
MOST_POINTS = (
    2000  # a line keeps so many at most: the lowest and highest of each stretch, so that no spike goes missing
)
WINDOWS = 12  # a smoothed line averages over this fraction of the run
LOGARITHMIC_FROM = 5.0  # a steady line's highest value over its lowest, above which the scale is logarithmic
SIDE = 1000.0  # of the drawing's own square


@dataclass(frozen=True)
class Line:
    """`style` is a class of the page's style sheet: raw, smooth, or dots (drawn as points on a line)."""

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
        """Where `value` lies, 0 at `low` and 1 at `high`."""
        if self.logarithmic:
            return (math.log(max(value, 1e-300)) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self, wanted: int = 4) -> list[float]:
        """Round values within the range, about `wanted`."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
                found = [
                    digit * 10.0**power
                    for power in powers
                    for digit in digits
                    if self.low <= digit * 10.0**power <= self.high
                ]
                if len(found) <= wanted + 2:
                    break
            return found
        raw = (self.high - self.low) / wanted
        unit = 10 ** math.floor(math.log10(raw))
        step = unit * min((1, 2, 2.5, 5, 10), key=lambda digit: abs(digit * unit - raw))
        return [
            number * step
            for number in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        ]


def smoothed(points: Points, middle: Callable[[list[float]], float] = statistics.fmean) -> list[tuple[float, float]]:
    """The mean (or with `statistics.median`, which lone spikes don't move) of the values around each point."""
    half = max(len(points) // (2 * WINDOWS), min(4, len(points) // 8))
    found = []
    for centre in (
        {*range(0, len(points), math.ceil(2 * len(points) / MOST_POINTS) or 1), len(points) - 1} if points else ()
    ):
        reach = min(
            half, centre
        )  # at the start as far ahead as back: where a loss falls steeply, looking only ahead shows it too low
        window = points[centre - reach : centre + reach + 1]
        found.append((points[centre][0], middle([y for _, y in window])))
    return sorted(found)


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points in their order."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(2 * len(points) / most)
    found = []
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        ends = {min(part, key=lambda index: points[index][1]), max(part, key=lambda index: points[index][1])}
        found += [points[index] for index in sorted(ends)]
    return found


def value_axis(lines: Sequence[Line], from_zero: bool) -> Axis:
    """The range of the lines: logarithmic where it spans much; lone spikes of raw lines may stick out of it."""
    every = sorted(y for line in lines for _, y in line.points)
    steady = [y for line in lines if line.style != "raw" for _, y in line.points] or every
    low, high = min(min(steady), every[len(every) // 100]), max(max(steady), every[-1 - len(every) // 50])
    if min(steady) > 0 and max(steady) / min(steady) > LOGARITHMIC_FROM and low > 0 and not from_zero:
        return Axis(low / 1.1, high * 1.1, logarithmic=True)
    margin = 0.06 * (high - low) or abs(high) * 0.5 or 1.0
    return Axis(0.0 if from_zero and low >= 0 else low - margin, high + margin)


def chart(
    title: str, lines: Sequence[Line], summary: str = "", from_zero: bool = False, last: float | None = None
) -> str:
    """A figure with its lines over training steps; `last` is the last step of the plan."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    steps = [x for line in lines for x, _ in line.points]
    across, up = Axis(0, max(*steps, last or 1)), value_axis(lines, from_zero)
    parts = []
    for tick in up.ticks():
        place = f'style="bottom:{100 * up.place(tick):.2f}%"'
        parts.append(f'<i class="rule" {place}></i><span class="up" {place}>{number(tick)}</span>')
    for tick in across.ticks():
        parts.append(f'<span class="across" style="left:{100 * across.place(tick):.2f}%">{number(tick)}</span>')
    drawn = "".join(_drawn(line, across, up) for line in lines)
    keys = "".join(f'<span class="key {line.style}">{html.escape(line.name)}</span>' for line in lines if line.name)
    name, square = html.escape(title), f"0 0 {SIDE:g} {SIDE:g}"
    return (
        f'<figure class="chart"><figcaption><b>{name}</b> <span>{html.escape(summary)}</span>{keys}</figcaption><div class="plot">{"".join(parts)}'
        f'<svg viewBox="{square}" preserveAspectRatio="none" role="img" aria-label="{name}">{drawn}</svg></div></figure>'
    )


def _drawn(line: Line, across: Axis, up: Axis) -> str:
    points = [(SIDE * across.place(x), SIDE * (1 - up.place(y))) for x, y in thinned(line.points)]
    # A line of no length with round ends is a dot that stays round however the drawing is stretched.
    dotted = points if len(points) == 1 or line.style == "dots" else []
    dots = "".join(f'<path class="{line.style} dot" d="M{x:.1f} {y:.1f}h0"/>' for x, y in dotted)
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{line.style}" points="{joined}"/>{dots}'


def number(value: float) -> str:
    """Short and readable: 0.05, 1.5e-5, 400, 12k."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    if abs(value) < 0.0001:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:g}"
