"""Masks: gray images that weight the loss, from white (1) to black (0). A mask is cropped like its image.

Masks of a folder of images are next to the images, in a second folder, or listed in a metadata file. Shards and
datasets contain their masks.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.media.image import Unreadable, apply, decode
from finetune.data.sources.files import place_of, read_bytes
from finetune.errors import UserError
from finetune.paths import embedded

if TYPE_CHECKING:
    import numpy

    from finetune.data.example import Example

BESIDE = "beside"  # the setting for NAME.mask.png next to NAME.jpg
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
MARK = ".mask"
UNEQUAL = 0.02  # largest relative difference of aspect ratios: a mask may have another size than its image


class Masks:
    """Finds the masks of the images in one folder.

    Args:
        setting: `data.masks`: None, "beside", or a folder in which each mask has the name of its image.
        folder: the folder of the images.

    Raises:
        UserError: the folder of masks does not exist.
    """

    def __init__(self, setting: str | None, folder: Path) -> None:
        self._folder, self._beside = folder, setting == BESIDE
        self._elsewhere = None if setting in (None, BESIDE) else Path(embedded(setting or "")).expanduser()
        if self._elsewhere is not None and not self._elsewhere.is_dir():
            remedy = f"give a folder, or `{BESIDE}` for NAME{MARK}.png next to each image"
            raise UserError(f'there is no folder of masks "{setting}"', where="data.masks", remedy=remedy)

    def has(self, file: Path) -> bool:
        """Whether a file is a mask, and not an image to train on."""
        return (self._beside and file.stem.endswith(MARK)) or (
            self._elsewhere is not None and file.is_relative_to(self._elsewhere)
        )

    def of(self, image: Path, beside: Sequence[str]) -> Callable[[], bytes] | None:
        """A function that reads the image's mask; None if it has no mask.

        Args:
            beside: the names of the files in the image's folder, sorted.
        """
        for suffix in SUFFIXES:
            if self._elsewhere is not None:
                file = self._elsewhere / image.relative_to(self._folder).with_suffix(suffix)
                if file.is_file():
                    return functools.partial(read_bytes, str(file))
            elif self._beside and place_of(beside, name := f"{image.stem}{MARK}{suffix}") is not None:
                return functools.partial(read_bytes, str(image.with_name(name)))
        return None


def refuse_folder(setting: str | None) -> None:
    """Raise if `data.masks` is a folder: images of shards and datasets have no path by which to find their masks."""
    if setting not in (None, BESIDE):
        remedy = f"set data.masks: {BESIDE}, for NAME{MARK}.png in shards and the column data.mask_column of datasets"
        raise UserError("a folder of masks needs a folder of images", where="data.masks", remedy=remedy)


def digest_of(mask: Callable[[], bytes], size: tuple[int, int]) -> str:
    """SHA-256 of a mask, whose aspect ratio must match the image's `size` (width, height).

    Raises:
        Unreadable: it does not match, or the mask is not an image.
    """
    content = _read(mask)
    width, height = decode(content, "black").size
    if abs(width * size[1] / (height * size[0]) - 1) > UNEQUAL:
        raise Unreadable(
            f"its mask is {width}×{height}, but the image {size[0]}×{size[1]}: the aspect ratios must be equal"
        )
    return hashlib.sha256(content).hexdigest()


def read(image: Example, mirrored: bool) -> numpy.ndarray:
    """The mask of an example, cropped like its image: [H, W] float32 in [0, 1].

    Raises:
        UserError: the mask has changed since the audit.
    """
    import numpy

    try:
        content = _read(image.others["mask"].read)
    except Unreadable as error:
        raise UserError(f"{error}", where=image.name, remedy="restore the file and start again") from error
    if hashlib.sha256(content).hexdigest() != image.others["mask"].digest:
        raise UserError(
            "its mask has changed since the run began",
            where=image.name,
            remedy="start the run again to use the new mask",
        )
    cropped = apply(decode(content, "black"), replace(image.crop, mirrored=mirrored)).convert("L")
    return numpy.asarray(cropped, dtype=numpy.float32) / 255


def _read(mask: Callable[[], bytes]) -> bytes:
    try:
        return mask()
    except (OSError, Unreadable) as error:
        raise Unreadable(f"its mask cannot be read ({getattr(error, 'strerror', None) or error})") from error
