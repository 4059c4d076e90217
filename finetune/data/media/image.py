"""Images: decode a file as the model sees it (upright, RGB, scaled and cropped), and show an image."""

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

# Images with a longer side are rejected: no resolution of a recipe needs them. Pillow's own guard against decompression
# bombs raises at 179 million pixels.
MAXIMUM_SIDE_PIXELS = 16_384
# Threads decode concurrently, but only one at a time decodes an image larger than this, which takes up to a gigabyte.
LARGE_PIXELS = 1 << 25
_ONE_LARGE = threading.Lock()
# Formats that `decode` opens, detected by content, not by suffix. Other readers of Pillow start programs (EPS), or read
# no images.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class Unreadable(Exception):
    """A file that cannot be decoded; the message gives the reason."""


def decode(content: bytes, background: str) -> PillowImage.Image:
    """Decode an image (of an animation, the first frame) as upright RGB, with transparent pixels on `background`.

    Raises:
        Unreadable: the file is empty, not an image, damaged, truncated or too large (detected before decoding).
    """
    return upright(open_image(content), background)


def upright(image: PillowImage.Image, background: str) -> PillowImage.Image:
    """Decode an opened image; see `decode`."""
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
        except Unreadable:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged files
            raise Unreadable(f"damaged or truncated ({error})") from error


def open_image(content: bytes) -> PillowImage.Image:
    """Open an image without decoding it.

    Raises:
        Unreadable: the file is empty, not an image, or too large.
    """
    from PIL import Image

    # Pillow warns about oddities that it handles. Filtered for the whole process: threads share the warning filters.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if not content:
        raise Unreadable("the file is empty")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise Unreadable(f"the image has more than {limit:.0f} million pixels: scale it down") from error
    except Exception as error:
        raise Unreadable("not a supported image format; supported: " + ", ".join(FORMATS)) from error
    if max(image.size) > MAXIMUM_SIDE_PIXELS:
        width, height = image.size
        raise Unreadable(f"{width}×{height} pixels: a side is longer than {MAXIMUM_SIDE_PIXELS}: scale it down")
    return image


def _eight_bits(image: PillowImage.Image) -> PillowImage.Image:
    """Scale a gray image of 16 or 32 bits or floats to 8 bits; Pillow's own conversion clips at 255 instead.

    Integers are assumed to have 16 bits unless a value is higher; floats to be in [0, 1], or in [0, 255] if a value is
    above 1.

    Raises:
        Unreadable: a value is NaN or infinite.
    """
    import numpy
    from PIL import Image

    values = numpy.asarray(image, dtype=numpy.float64)
    if wrong := int((~numpy.isfinite(values)).sum()):
        raise Unreadable(f"{wrong:,} of its {values.size:,} values are NaN or infinite")
    choices = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    highest = next((choice for choice in choices if values.max() <= choice), values.max())
    gray = Image.fromarray((values / highest * 255).round().clip(0, 255).astype(numpy.uint8))
    transparent = image.info.get("transparency")  # the value of transparent pixels
    if isinstance(transparent, int):
        gray.putalpha(Image.fromarray(((values != transparent) * 255).astype(numpy.uint8)))
    return gray


def canonical_color(color: str) -> str:
    """Normalize a CSS color: `white`, `#fff`, `rgb(255, 255, 255)` → `#ffffff`.

    Raises:
        UserError: it is not a CSS color, or not opaque.
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
    """Scale, crop and mirror an RGB image to the size of its bucket."""
    from PIL import Image, ImageOps

    (width, height), bucket = image.size, crop.shape
    right, bottom = crop.left + bucket.width, crop.top + bucket.height
    if image.size == crop.scaled:
        image = image.crop((crop.left, crop.top, right, bottom))
    else:
        # Scale only the cropped region: a long thin strip would take gigabytes if scaled as a whole.
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
        image.save(buffer, "WEBP", lossless=True, method=2)  # four times faster than the default, and no larger
    else:
        image.thumbnail((side, side))
        image.save(buffer, "WEBP", quality=88)
    return data_uri("image/webp", buffer.getvalue())
