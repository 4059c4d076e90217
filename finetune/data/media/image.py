"""Images: decode a file into what the model sees (upright, RGB, scaled and cropped), and show one."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from finetune.data.buckets import Crop
from finetune.data.media.sample import EMPTY, Sample, data_uri
from finetune.errors import UserError

if TYPE_CHECKING:
    from PIL import Image as PillowImage

# A side above this is taken for a mistake: no resolution that a recipe allows needs it. Pillow's own guard against
# decompression bombs refuses at 179 million pixels.
MAXIMUM_SIDE_PIXELS = 16_384
# Threads decode side by side, but of images above this one at a time: each takes up to a gigabyte on its way.
LARGE_PIXELS = 1 << 25
_ONE_LARGE = threading.Lock()
# What `decode` opens, by content and not by a file's ending. Others of Pillow's readers start programs (EPS) or are no images.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class Unreadable(Exception):
    """A file that cannot become an image; the message says why."""


def decode(content: bytes, background: str) -> PillowImage.Image:
    """The whole image as upright RGB; the first frame of an animation; transparency over `background`.

    Raises:
        Unreadable: empty, no image, damaged, truncated, or too large to be meant (known before anything is decoded).
    """
    return upright(open_image(content), background)


def upright(image: PillowImage.Image, background: str) -> PillowImage.Image:
    """`decode` for an image that is open already."""
    from PIL import Image, ImageOps

    large = image.width * image.height > LARGE_PIXELS
    with _ONE_LARGE if large else contextlib.nullcontext():
        try:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode == "F" or image.mode.startswith("I"):
                image = _eight_bits(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
            return image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged files
            raise Unreadable(f"damaged or truncated ({error})") from error


def open_image(content: bytes) -> PillowImage.Image:
    """The image, not yet decoded.

    Raises:
        Unreadable: empty, no image, or too large to be meant.
    """
    from PIL import Image

    # Pillow warns about oddities that it reads well enough. For the whole process: threads share the filters.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if not content:
        raise Unreadable("the file is empty")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Unreadable(
            f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels are taken for a mistake: scale it down"
        ) from error
    except Exception as error:
        raise Unreadable("not an image that can be opened: " + ", ".join(FORMATS) + " can") from error
    if max(image.size) > MAXIMUM_SIDE_PIXELS:
        width, height = image.size
        raise Unreadable(
            f"{width}×{height} pixels: a side of more than {MAXIMUM_SIDE_PIXELS} is taken for a mistake: scale it down"
        )
    return image


def _eight_bits(image: PillowImage.Image) -> PillowImage.Image:
    """Gray of 16 or 32 bits or of floats, scaled to 8; Pillow's own conversion clips at 255 instead.

    Integers are of 16 bits unless a value is higher; floats lie in [0, 1], or in [0, 255] if a value is above 1.
    """
    import numpy
    from PIL import Image

    values = numpy.nan_to_num(numpy.asarray(image, dtype=numpy.float64))
    choices = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    highest = next((choice for choice in choices if values.max() <= choice), values.max())
    gray = Image.fromarray((values / highest * 255).round().clip(0, 255).astype(numpy.uint8))
    transparent = image.info.get("transparency")  # the one value that stands for "nothing here"
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(((values != transparent) * 255).astype(numpy.uint8)))
    return gray


def canonical_color(color: str) -> str:
    """`white`, `#fff`, `rgb(255, 255, 255)` → `#ffffff`.

    Raises:
        UserError: not a CSS color, or one that is itself transparent.
    """
    from PIL import ImageColor

    with contextlib.suppress(ValueError):
        red, green, blue, *alpha = ImageColor.getrgb(color)
        if max(red, green, blue) <= 255 and alpha in ([], [255]):
            return f"#{red:02x}{green:02x}{blue:02x}"
    raise UserError(
        f'"{color}" is not an opaque CSS color',
        where="data.background",
        remedy='write a name or a code: white, "#ffffff" (in quotes), rgb(255, 255, 255)',
    )


def apply(image: PillowImage.Image, crop: Crop) -> PillowImage.Image:
    """The bucket-sized RGB image that the model sees: scaled, cropped and mirrored as `crop` says."""
    from PIL import Image, ImageOps

    (width, height), bucket = image.size, crop.shape
    right, bottom = crop.left + bucket.width, crop.top + bucket.height
    if image.size == crop.scaled:
        image = image.crop((crop.left, crop.top, right, bottom))
    else:
        # Only what is kept is scaled: a long thin strip, scaled whole, would take gigabytes.
        across, down = width / crop.scaled[0], height / crop.scaled[1]
        box = (crop.left * across, crop.top * down, min(width, right * across), min(height, bottom * down))
        image = image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
    return ImageOps.mirror(image) if crop.mirrored else image


LOSSLESS_SIDE = 160  # pixels; images up to this size are embedded in pages losslessly


@final
class ImageSample(Sample):
    """A generated image, saved as PNG with text chunks."""

    medium = "image"
    suffix = ".png"

    def __init__(self, image: PillowImage.Image) -> None:
        self.image = image

    def save(self, path: Path, about: Mapping[str, str] = EMPTY) -> None:
        """Write a PNG; `about` becomes its text chunks."""
        from PIL.PngImagePlugin import PngInfo

        chunks = PngInfo()
        for key, value in about.items():
            chunks.add_itxt(key, value)
        self.image.save(path, "PNG", pnginfo=chunks)

    def thumbnail(self) -> PillowImage.Image:
        """The image itself."""
        return self.image.convert("RGB")

    def player(self, side: int) -> dict[str, Any]:
        """An `<img>`."""
        return {"source": embedded_webp(self.image, side), "small": max(self.image.size) <= LOSSLESS_SIDE}


def open_sample(path: Path) -> tuple[ImageSample, dict[str, str]]:
    """An image that `ImageSample.save` wrote, and its text chunks."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        about = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
        return ImageSample(image.convert("RGB")), about


def embedded_webp(image: PillowImage.Image, side: int) -> str:
    """Encode an image as a WebP data URI, lossless up to `LOSSLESS_SIDE`, else scaled to fit `side` × `side` pixels."""
    buffer = io.BytesIO()
    image = image.convert("RGB")
    if max(image.size) <= LOSSLESS_SIDE:
        image.save(buffer, "WEBP", lossless=True, method=2)  # a quarter of the default's time, and no larger
    else:
        image.thumbnail((side, side))
        image.save(buffer, "WEBP", quality=88)
    return data_uri("image/webp", buffer.getvalue())
