"""One picture file → what the model sees: upright, RGB, over a background, scaled to cover its bucket and cropped."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image as PillowImage

# Pillow's own guard against decompression bombs warns at 89 million pixels and refuses at twice that; this is the
# side above which a "picture" is a mistake for training at any resolution the recipe allows.
MAXIMUM_SIDE_PIXELS = 16_384


class Unreadable(Exception):
    """A file that cannot become a picture; the message says why."""


def open_picture(content: bytes) -> PillowImage.Image:
    """Open without decoding, and refuse what is too large to be meant.

    Raises:
        Unreadable: not a picture, or a side above `MAXIMUM_SIDE_PIXELS`.
    """
    import warnings

    from PIL import Image

    if not content:
        raise Unreadable("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content))
    except Image.DecompressionBombError as error:
        raise Unreadable("more pixels than a picture for training can have") from error
    except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged files
        raise Unreadable("not a picture that Pillow can open") from error
    if max(picture.size) > MAXIMUM_SIDE_PIXELS:
        width, height = picture.size
        raise Unreadable(f"{width}×{height} pixels: a side of more than {MAXIMUM_SIDE_PIXELS} is taken for a mistake; scale it down")
    return picture


def upright_size(picture: PillowImage.Image) -> tuple[int, int]:
    """(width, height) once the EXIF orientation is applied; 5–8 lie on their side."""
    width, height = picture.size
    return (height, width) if picture.getexif().get(0x0112, 1) in (5, 6, 7, 8) else (width, height)


def decode(content: bytes, background: str) -> PillowImage.Image:
    """The whole picture as upright RGB; the first frame of an animation; transparency over `background`.

    Raises:
        Unreadable: damaged or truncated.
    """
    from PIL import Image, ImageOps

    picture = open_picture(content)
    try:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
            # 16-bit greys: Pillow's own conversion clips at 255, so scale first.
            highest = 65535.0 if picture.mode != "F" else max(1.0, float(picture.getextrema()[1]))  # type: ignore[arg-type]
            picture = picture.convert("F").point(lambda value: value * (255.0 / highest)).convert("L")
        if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
        return picture.convert("RGB")
    except Exception as error:
        raise Unreadable(f"damaged or truncated ({error})") from error


@dataclass(frozen=True, order=True)
class Bucket:
    """A training size in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}×{self.height}"


@dataclass(frozen=True)
class Crop:
    """How an upright picture of `original` (width, height) fills a bucket: scale to `scaled`, then cut at (left, top)."""

    original: tuple[int, int]
    scaled: tuple[int, int]
    left: int
    top: int
    bucket: Bucket
    mirrored: bool = False

    @property
    def upscaled(self) -> bool:
        return self.scaled[0] > self.original[0]

    @property
    def share_lost(self) -> float:
        """Share of the picture's area that the crop cuts away."""
        return 1 - (self.bucket.width * self.bucket.height) / (self.scaled[0] * self.scaled[1])


def buckets(resolution: int, step: int, maximum_aspect: float, several: bool) -> list[Bucket]:
    """All sizes whose sides are multiples of `step`, whose area is at most resolution², none thinner than `maximum_aspect`.

    Of each width the tallest is kept, so a picture loses little. One square bucket if not `several`.
    """
    if not several:
        return [Bucket(resolution, resolution)]
    found = {Bucket(resolution, resolution)} if resolution % step == 0 else set()
    for width in range(step, int(resolution * math.sqrt(maximum_aspect)) + 1, step):
        height = resolution * resolution // width // step * step
        if height and max(width, height) / min(width, height) <= maximum_aspect:
            found |= {Bucket(width, height), Bucket(height, width)}
    return sorted(found)


def fit(size: tuple[int, int], choices: list[Bucket]) -> Crop:
    """The centre crop of the bucket nearest in aspect ratio (as a ratio of ratios; the larger area wins a tie)."""
    width, height = size
    aspect = math.log(width / height)
    bucket = min(choices, key=lambda b: (round(abs(math.log(b.width / b.height) - aspect), 9), -b.width * b.height))
    scale = max(bucket.width / width, bucket.height / height)
    scaled = (max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale)))
    return Crop(size, scaled, (scaled[0] - bucket.width) // 2, (scaled[1] - bucket.height) // 2, bucket)


def apply(picture: PillowImage.Image, crop: Crop) -> PillowImage.Image:
    """The bucket-sized RGB picture that the model sees."""
    from PIL import Image, ImageOps

    if picture.size != crop.scaled:
        picture = picture.resize(crop.scaled, Image.Resampling.LANCZOS)
    picture = picture.crop((crop.left, crop.top, crop.left + crop.bucket.width, crop.top + crop.bucket.height))
    return ImageOps.mirror(picture) if crop.mirrored else picture
