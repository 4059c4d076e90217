"""Aspect-ratio buckets: which size an image trains at, and how it is cropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, order=True)
class Bucket:
    """A training size in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}×{self.height}"


@dataclass(frozen=True)
class Crop:
    """How an upright image of `original` (width, height) fills a bucket: scale to `scaled`, then cut at (left, top)."""

    original: tuple[int, int]
    scaled: tuple[int, int]
    left: int
    top: int
    bucket: Bucket
    mirrored: bool = False

    @property
    def upscaled(self) -> bool:
        """Whether the image has fewer pixels than its bucket."""
        return self.scaled[0] > self.original[0]

    @property
    def share_lost(self) -> float:
        """Share of the image's area that the crop cuts away."""
        return 1 - (self.bucket.width * self.bucket.height) / (self.scaled[0] * self.scaled[1])


def buckets(resolution: int, step: int, maximum_aspect: float, several: bool) -> list[Bucket]:
    """All sizes whose sides are multiples of `step`, whose area is at most resolution², none thinner than `maximum_aspect`.

    Of each width the tallest is kept, so an image loses little. One square bucket if not `several`.
    """
    if not several:
        return [Bucket(resolution, resolution)]
    square = resolution // step * step
    found = {Bucket(square, square)} if square else set()
    for width in range(step, int(resolution * math.sqrt(maximum_aspect)) + 1, step):
        height = resolution * resolution // width // step * step
        if height and max(width, height) / min(width, height) <= maximum_aspect:
            found |= {Bucket(width, height), Bucket(height, width)}
    return sorted(found)


def fit(size: tuple[int, int], choices: list[Bucket]) -> Crop:
    """The center crop of the bucket nearest in aspect ratio (as a ratio of ratios; the larger area wins a tie)."""
    width, height = size
    aspect = math.log(width / height)
    bucket = min(choices, key=lambda b: (round(abs(math.log(b.width / b.height) - aspect), 9), -b.width * b.height))
    scale = max(bucket.width / width, bucket.height / height)
    scaled = (max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale)))
    return Crop(size, scaled, (scaled[0] - bucket.width) // 2, (scaled[1] - bucket.height) // 2, bucket)
