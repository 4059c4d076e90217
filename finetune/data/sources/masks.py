"""Masks: gray images that weight the loss, white fully and black not at all. They are cropped as their images are.

A folder's lie beside its images, in another folder, or where a metadata file says; a shard's and a data set's are in it.
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

BESIDE = "beside"  # the setting for NAME.mask.png beside NAME.jpg
SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
MARK = ".mask"
UNEQUAL = 0.02  # of aspect ratios: a mask need not be as large as its image, but must show the same


class Masks:
    """Where the masks of one folder's images lie.

    Args:
        setting: `data.masks`: none, `beside`, or a folder with a mask under each image's own name.
        folder: of the images.

    Raises:
        UserError: the folder of masks is not there.
    """

    def __init__(self, setting: str | None, folder: Path) -> None:
        self._folder, self._elsewhere = (
            folder,
            None if setting in (None, BESIDE) else Path(embedded(setting or "")).expanduser(),
        )
        self._beside = setting == BESIDE
        if self._elsewhere is not None and not self._elsewhere.is_dir():
            remedy = f"give a folder, or `{BESIDE}` for NAME{MARK}.png beside each image"
            raise UserError(f'there is no folder "{setting}" with masks', where="data.masks", remedy=remedy)

    def has(self, file: Path) -> bool:
        """Whether a file beside the images is a mask and no image."""
        return (self._beside and file.stem.endswith(MARK)) or (
            self._elsewhere is not None and file.is_relative_to(self._elsewhere)
        )

    def of(self, image: Path, beside: Sequence[str]) -> Callable[[], bytes] | None:
        """What reads the mask's file, none if there is none; `beside` are the names of the files in the image's folder, sorted."""
        for suffix in SUFFIXES:
            if self._elsewhere is not None:
                found = self._elsewhere / image.relative_to(self._folder).with_suffix(suffix)
                if found.is_file():
                    return functools.partial(read_bytes, str(found))
            elif self._beside and place_of(beside, name := f"{image.stem}{MARK}{suffix}") is not None:
                return functools.partial(read_bytes, str(image.with_name(name)))
        return None


def refuse_folder(setting: str | None) -> None:
    """Raise if masks are to lie in a folder: images of shards and data sets have no place by which to find them."""
    if setting not in (None, BESIDE):
        remedy = f"set data.masks: {BESIDE}, for NAME{MARK}.png in shards and the column data.mask_column of data sets"
        raise UserError("masks in a folder are for folders of images", where="data.masks", remedy=remedy)


def digest_of(mask: Callable[[], bytes], size: tuple[int, int]) -> str:
    """SHA-256 of a mask that fits an image of `size` (width, height).

    Raises:
        Unreadable: it does not, or is no image.
    """
    content = _read(mask)
    width, height = decode(content, "black").size
    if abs(width * size[1] / (height * size[0]) - 1) > UNEQUAL:
        raise Unreadable(f"its mask is {width}×{height}, and the image {size[0]}×{size[1]}: they must have one shape")
    return hashlib.sha256(content).hexdigest()


def read(image: Example, mirrored: bool) -> numpy.ndarray:
    """What of an image's mask lies over what the model sees, [H, W] float32 in [0, 1].

    Raises:
        UserError: it has changed since the audit.
    """
    import numpy

    try:
        content = _read(image.others["mask"].read)
    except Unreadable as error:
        raise UserError(f"{error} any more", where=image.name, remedy="put it back, and start again") from error
    if hashlib.sha256(content).hexdigest() != image.others["mask"].digest:
        raise UserError(
            "its mask has changed since the run began",
            where=image.name,
            remedy="start again; this run did not see the new one",
        )
    seen = apply(decode(content, "black"), replace(image.crop, mirrored=mirrored)).convert("L")
    return numpy.asarray(seen, dtype=numpy.float32) / 255


def _read(mask: Callable[[], bytes]) -> bytes:
    try:
        return mask()
    except (OSError, Unreadable) as error:
        raise Unreadable(f"its mask cannot be read ({getattr(error, 'strerror', None) or error})") from error
