"""What a source gives: images not yet looked at, and what it could not give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

REMEDIES = {
    "unreadable image": "repair or remove the file, or set data.unreadable_images: skip",
    "missing image": "put the file there or remove the line, or set data.unreadable_images: skip",
    "missing caption": "write a .txt file beside each image or a metadata.jsonl, or set data.missing_captions: empty (or skip)",
    "missing class": "move it into the folder of its class, or set data.classes: captions",
    "missing partner": "add the file or remove the image, or set data.unreadable_images: skip",
    "unreadable partner": "repair or remove the file, or set data.unreadable_images: skip",
    "unreadable mask": "repair the mask or remove it, or set data.unreadable_images: skip",
    "unreadable caption": "save the caption as UTF-8 text",
    "damaged shard": "make or download the shard again",
}


@dataclass(frozen=True)
class Entry:
    """An image not yet looked at. `read` gives its bytes, or raises OSError or Unreadable.

    `caption` is None where there is none, "" where it is empty. `file` is the file with these bytes and no others, if there
    is one; `content` the bytes themselves, where they are at hand already.
    """

    name: str
    caption: str | None
    read: Callable[[], bytes]
    file: str = ""
    content: bytes | None = field(default=None, repr=False)
    others: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)  # files of other roles, such as mask


@dataclass(frozen=True)
class Problem:
    """An image or a caption that is not used as it is, and why. `stops`: the recipe does not allow it."""

    name: str
    kind: str  # such as "unreadable image"; those that may stop a run stand in `REMEDIES`
    detail: str
    stops: bool
