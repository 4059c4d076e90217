"""What one look at a picture tells: its size, what is odd about it, and a fingerprint that near duplicates share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.data.media.image import Unreadable, open_picture, upright

if TYPE_CHECKING:
    from PIL import Image as PillowImage

VERSION = 1  # counts up when the same bytes would be described otherwise than before

# What is odd and trains all the same → what becomes of it.
TRAITS = {
    "animated": "the first frame trains",
    "CMYK": "converted to RGB, without its colour profile",
    "more than 8 bits": "scaled to 8 bits a channel",
    "palette": "its palette's colours train",
    "transparent": "lies over data.background",
    "rotated by EXIF": "turned upright",
}
GRID = 9  # cells along a side of the fingerprint's thumbnail
STEP = 4  # grey levels that neighbouring cells must differ by: less is noise
HASH_BYTES, COLOUR_BYTES = 16, 12
FINGERPRINT_BYTES = HASH_BYTES + COLOUR_BYTES


@dataclass(frozen=True)
class Look:
    """`size` is (width, height) of the upright picture, `traits` are of `TRAITS`."""

    size: tuple[int, int]
    traits: tuple[str, ...]
    fingerprint: bytes


def look(content: bytes, background: str) -> Look:
    """Decode a picture and describe it.

    Raises:
        Unreadable: as `decode`.
    """
    picture = open_picture(content)
    try:
        traits = _traits(picture, content)
    except Exception as error:  # Pillow's readers raise many kinds of errors on damaged files
        raise Unreadable(f"damaged or truncated ({error})") from error
    seen = upright(picture, background)
    return Look(seen.size, traits, fingerprint(seen))


def _traits(picture: PillowImage.Image, content: bytes) -> tuple[str, ...]:
    found = []
    if getattr(picture, "is_animated", False):
        found.append("animated")
        picture.seek(0)
    if picture.mode in ("CMYK", "YCCK"):
        found.append("CMYK")
    if picture.mode == "F" or picture.mode.startswith("I") or _stored_bits(picture, content) > 8:
        found.append("more than 8 bits")
    if picture.mode == "P":
        found.append("palette")
    if picture.has_transparency_data and picture.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        found.append("transparent")
    if picture.getexif().get(0x0112, 1) in range(2, 9):
        found.append("rotated by EXIF")
    return tuple(name for name in TRAITS if name in found)


def _stored_bits(picture: PillowImage.Image, content: bytes) -> int:
    """Bits a channel in the file; Pillow hands over 16-bit colours with 8 and does not say so."""
    if picture.format == "PNG":
        return content[24]  # IHDR's bit depth (PNG 3rd edition, 11.2.1)
    if picture.format == "TIFF":
        bits = getattr(picture, "tag_v2", {}).get(258, 8)  # BitsPerSample (TIFF 6.0)
        return max(bits) if isinstance(bits, tuple) else int(bits)
    return 8


def fingerprint(picture: PillowImage.Image) -> bytes:
    """28 bytes of an RGB picture that change little when it is scaled or saved again.

    The first 16 are a difference hash: whether each cell of a 9×9 grey thumbnail is darker than its right and than its
    lower neighbour (8×8 of each). Their order is scattered, so that each 16 bits, by which duplicates are looked up,
    come from all over the picture. The other 12 are the mean colours of its quarters.
    """
    import numpy
    from PIL import Image

    # Overlapping cells: sizes that nine does not divide matter little.
    cells = numpy.asarray(picture.resize((GRID, GRID), Image.Resampling.BILINEAR), dtype=numpy.int32)
    grey = cells @ numpy.array([299, 587, 114], numpy.int32) // 1000
    rises = numpy.stack([grey[:-1, 1:] - grey[:-1, :-1], grey[1:, :-1] - grey[:-1, :-1]]) > STEP
    scattered = rises.flatten()[numpy.arange(128) * 37 % 128]  # 37 is odd: a permutation
    halves = (slice(GRID // 2), slice(-(GRID // 2), None))
    quarters = [cells[rows, columns].mean((0, 1)) for rows in halves for columns in halves]
    return numpy.packbits(scattered).tobytes() + numpy.concatenate(quarters).astype(numpy.uint8).tobytes()
