"""Inspection of one image: its size, unusual traits, and a fingerprint that is similar for near duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.data.media.image import Unreadable, open_image, upright

if TYPE_CHECKING:
    from PIL import Image as PillowImage

VERSION = 2  # increase it when the inspection of unchanged bytes changes

# Unusual trait → what is done with such images.
TRAITS = {
    "animated": "only the first frame is used",
    "CMYK": "converted to RGB without its color profile",
    "more than 8 bits": "scaled to 8 bits per channel",
    "palette": "converted to RGB",
    "transparent": "placed on data.background",
    "rotated by EXIF": "turned upright",
}
GRID = 9  # cells along a side of the fingerprint's thumbnail
STEP = 4  # gray levels by which neighboring cells must differ; less is noise
HASH_BYTES, COLOR_BYTES = 16, 12
FINGERPRINT_BYTES = HASH_BYTES + COLOR_BYTES


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`.

    Attributes:
        size: (width, height) of the upright image.
        traits: keys of `TRAITS`.
        fingerprint: see `fingerprint`.
    """

    size: tuple[int, int]
    traits: tuple[str, ...]
    fingerprint: bytes


def inspect(content: bytes, background: str) -> Inspection:
    """Decode an image and describe it.

    Raises:
        Unreadable: the image cannot be decoded.
    """
    image = open_image(content)
    try:
        traits = _traits(image, content)
    except Exception as error:  # Pillow's readers raise many kinds of errors on damaged files
        raise Unreadable(f"damaged or truncated ({error})") from error
    decoded = upright(image, background)
    return Inspection(decoded.size, traits, fingerprint(decoded))


def _traits(image: PillowImage.Image, content: bytes) -> tuple[str, ...]:
    traits = []
    if getattr(image, "is_animated", False):
        traits.append("animated")
        image.seek(0)
    if image.mode in ("CMYK", "YCCK"):
        traits.append("CMYK")
    if image.mode == "F" or image.mode.startswith("I") or _stored_bits(image, content) > 8:
        traits.append("more than 8 bits")
    if image.mode == "P":
        traits.append("palette")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        traits.append("transparent")
    if image.getexif().get(0x0112, 1) in range(2, 9):
        traits.append("rotated by EXIF")
    return tuple(name for name in TRAITS if name in traits)


def _stored_bits(image: PillowImage.Image, content: bytes) -> int:
    """Bits per channel in the file; Pillow silently reduces 16-bit colors to 8 bits."""
    if image.format == "PNG":
        return content[24]  # IHDR's bit depth (PNG 3rd edition, 11.2.1)
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(258, 8)  # BitsPerSample (TIFF 6.0)
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 8


def fingerprint(image: PillowImage.Image) -> bytes:
    """28 bytes of an RGB image that change little when it is scaled or saved again.

    The first 16 are a difference hash: whether each cell of a 9×9 gray thumbnail is darker than its right and its lower
    neighbor (8×8 bits each). The bits are permuted, so that each band of 16 bits, by which duplicates are looked up,
    covers the whole image. The other 12 are the mean colors of its quadrants.
    """
    import numpy
    from PIL import Image

    # Cells overlap, so that sizes not divisible by nine matter little.
    cells = numpy.asarray(image.resize((GRID, GRID), Image.Resampling.BILINEAR), dtype=numpy.int32)
    gray = cells @ numpy.array([299, 587, 114], numpy.int32) // 1000
    rises = numpy.stack([gray[:-1, 1:] - gray[:-1, :-1], gray[1:, :-1] - gray[:-1, :-1]]) > STEP
    scattered = rises.flatten()[numpy.arange(128) * 37 % 128]  # 37 is odd: a permutation
    halves = (slice(GRID // 2), slice(-(GRID // 2), None))
    quarters = [cells[rows, columns].mean((0, 1)) for rows in halves for columns in halves]
    return numpy.packbits(scattered).tobytes() + numpy.concatenate(quarters).astype(numpy.uint8).tobytes()
