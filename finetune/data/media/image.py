"""One picture file → what the model sees: upright, RGB, over a background, scaled to cover its bucket and cropped."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from typing import TYPE_CHECKING

from finetune.data.buckets import Crop
from finetune.errors import UserError

if TYPE_CHECKING:
    from PIL import Image as PillowImage

# A side above this is taken for a mistake: no resolution that a recipe allows needs it. Pillow's own guard against
# decompression bombs refuses at 179 million pixels.
MAXIMUM_SIDE_PIXELS = 16_384
# Threads decode side by side, but of pictures above this one at a time: each takes up to a gigabyte on its way.
LARGE_PIXELS = 1 << 25
_ONE_LARGE = threading.Lock()
# What `decode` opens, by content and not by a file's ending. Others of Pillow's readers start programs (EPS) or are no pictures.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class Unreadable(Exception):
    """A file that cannot become a picture; the message says why."""


def decode(content: bytes, background: str) -> PillowImage.Image:
    """The whole picture as upright RGB; the first frame of an animation; transparency over `background`.

    Raises:
        Unreadable: empty, no picture, damaged, truncated, or too large to be meant (known before anything is decoded).
    """
    return upright(open_picture(content), background)


def upright(picture: PillowImage.Image, background: str) -> PillowImage.Image:
    """`decode` for a picture that is open already."""
    from PIL import Image, ImageOps

    large = picture.width * picture.height > LARGE_PIXELS
    with _ONE_LARGE if large else contextlib.nullcontext():
        try:
            picture.load()
            picture = ImageOps.exif_transpose(picture)
            if picture.mode == "F" or picture.mode.startswith("I"):
                picture = _eight_bits(picture)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
            return picture.convert("RGB")
        except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged files
            raise Unreadable(f"damaged or truncated ({error})") from error


def open_picture(content: bytes) -> PillowImage.Image:
    """The picture, not yet decoded.

    Raises:
        Unreadable: empty, no picture, or too large to be meant.
    """
    from PIL import Image

    # Pillow warns about oddities that it reads well enough. For the whole process: threads share the filters.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if not content:
        raise Unreadable("the file is empty")
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Unreadable(
            f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels are taken for a mistake: scale it down"
        ) from error
    except Exception as error:
        raise Unreadable("not a picture that can be opened: " + ", ".join(FORMATS) + " can") from error
    if max(picture.size) > MAXIMUM_SIDE_PIXELS:
        width, height = picture.size
        raise Unreadable(
            f"{width}×{height} pixels: a side of more than {MAXIMUM_SIDE_PIXELS} is taken for a mistake: scale it down"
        )
    return picture


def _eight_bits(picture: PillowImage.Image) -> PillowImage.Image:
    """Grey of 16 or 32 bits or of floats, scaled to 8; Pillow's own conversion clips at 255 instead.

    Integers are of 16 bits unless a value is higher; floats lie in [0, 1], or in [0, 255] if a value is above 1.
    """
    import numpy
    from PIL import Image

    values = numpy.nan_to_num(numpy.asarray(picture, dtype=numpy.float64))
    choices = (1.0, 255.0) if picture.mode == "F" else (65535.0,)
    highest = next((choice for choice in choices if values.max() <= choice), values.max())
    grey = Image.fromarray((values / highest * 255).round().clip(0, 255).astype(numpy.uint8))
    transparent = picture.info.get("transparency")  # the one value that stands for "nothing here"
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(((values != transparent) * 255).astype(numpy.uint8)))
    return grey


def canonical_color(colour: str) -> str:
    """`white`, `#fff`, `rgb(255, 255, 255)` → `#ffffff`.

    Raises:
        UserError: not a CSS colour, or one that is itself transparent.
    """
    from PIL import ImageColor

    with contextlib.suppress(ValueError):
        red, green, blue, *alpha = ImageColor.getrgb(colour)
        if max(red, green, blue) <= 255 and alpha in ([], [255]):
            return f"#{red:02x}{green:02x}{blue:02x}"
    raise UserError(
        f'"{colour}" is not an opaque CSS colour',
        where="data.background",
        remedy='write a name or a code: white, "#ffffff" (in quotes), rgb(255, 255, 255)',
    )


def apply(picture: PillowImage.Image, crop: Crop) -> PillowImage.Image:
    """The bucket-sized RGB picture that the model sees: scaled, cropped and mirrored as `crop` says."""
    from PIL import Image, ImageOps

    (width, height), bucket = picture.size, crop.bucket
    right, bottom = crop.left + bucket.width, crop.top + bucket.height
    if picture.size == crop.scaled:
        picture = picture.crop((crop.left, crop.top, right, bottom))
    else:
        # Only what is kept is scaled: a long thin strip, scaled whole, would take gigabytes.
        across, down = width / crop.scaled[0], height / crop.scaled[1]
        box = (crop.left * across, crop.top * down, min(width, right * across), min(height, bottom * down))
        picture = picture.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
    return ImageOps.mirror(picture) if crop.mirrored else picture
