"""Aspect-ratio buckets: the shape that an image or clip is trained at, and how it is cropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.data.shape import Frame, ImageShape, VideoShape


@dataclass(frozen=True)
class Crop:
    """How an image of size `original` is fitted to a shape: scaled to `scaled`, then cropped at (left, top).

    Sizes are (width, height) of the upright image.
    """

    original: tuple[int, int]
    scaled: tuple[int, int]
    left: int
    top: int
    shape: Frame
    mirrored: bool = False

    @property
    def key(self) -> str:
        """The crop as text, in cache keys and data digests. Do not change it: existing caches and runs depend on it."""
        s = self.shape
        shape = f"Bucket(width={s.width}, height={s.height})" if isinstance(s, ImageShape) else repr(s)
        return (
            f"Crop(original={self.original}, scaled={self.scaled}, left={self.left}, top={self.top}, bucket={shape}, "
            f"mirrored={self.mirrored})"
        )

    @property
    def upscaled(self) -> bool:
        """Whether the image is smaller than its bucket."""
        return self.scaled[0] > self.original[0]

    @property
    def share_lost(self) -> float:
        """Share of the image's area that is cropped away."""
        return 1 - self.shape.pixels / (self.scaled[0] * self.scaled[1])


def buckets(resolution: int, step: int, maximum_aspect: float, several: bool) -> list[ImageShape]:
    """All sizes with sides that are multiples of `step`, an area of at most resolution² and at most `maximum_aspect`.

    Only the tallest bucket of each width is kept, so that crops lose little. Without `several`, one square bucket.
    """
    if not several:
        return [ImageShape(resolution, resolution)]
    square = resolution // step * step
    shapes = {ImageShape(square, square)} if square else set()
    for width in range(step, int(resolution * math.sqrt(maximum_aspect)) + 1, step):
        height = resolution * resolution // width // step * step
        if height and max(width, height) / min(width, height) <= maximum_aspect:
            shapes |= {ImageShape(height, width), ImageShape(width, height)}
    return sorted(shapes)


def clips(sizes: Sequence[ImageShape], frames: int, fps: float) -> list[VideoShape]:
    """Shapes of clips with these sizes."""
    return [VideoShape(frames, size.height, size.width, fps) for size in sizes]


def fit(size: tuple[int, int], choices: Sequence[Frame]) -> Crop:
    """The center crop to the bucket with the nearest aspect ratio, on a log scale; ties go to the larger area."""
    width, height = size
    aspect = math.log(width / height)
    bucket = min(choices, key=lambda b: (round(abs(math.log(b.width / b.height) - aspect), 9), -b.width * b.height))
    scale = max(bucket.width / width, bucket.height / height)
    scaled = (max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale)))
    return Crop(size, scaled, (scaled[0] - bucket.width) // 2, (scaled[1] - bucket.height) // 2, bucket)


def mirrored(crop: Crop, mirror: bool) -> Crop:
    """The crop, mirrored if `mirror`."""
    return replace(crop, mirrored=mirror)
