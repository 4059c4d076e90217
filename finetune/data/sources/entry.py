"""`Entry` and `Problem`: what a source yields, before any image is decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

REMEDIES = {
    "unreadable image": "repair or remove the file, or set data.unreadable_images: skip",
    "missing image": "add the file or remove the line, or set data.unreadable_images: skip",
    "missing caption": "add a .txt file next to each image or a metadata.jsonl, "
    "or set data.missing_captions: empty (or skip)",
    "missing class": "move the image into the folder of its class, or set data.classes: captions",
    "missing partner": "add the file or remove the image, or set data.unreadable_images: skip",
    "unreadable partner": "repair or remove the file, or set data.unreadable_images: skip",
    "unreadable mask": "repair the mask or remove it, or set data.unreadable_images: skip",
    "unreadable caption": "save the caption as UTF-8 text",
    "damaged shard": "create or download the shard again",
}


@dataclass(frozen=True)
class Entry:
    """An image that has not been read yet.

    Attributes:
        name: its name in messages.
        caption: None if it has none, "" if the caption is empty.
        read: returns its bytes, or raises OSError or Unreadable.
        file: the file that holds exactly these bytes, else "".
        content: its bytes, if the source has already read them.
        others: what reads the files of its other roles, such as "mask".
    """

    name: str
    caption: str | None
    read: Callable[[], bytes]
    file: str = ""
    content: bytes | None = field(default=None, repr=False)
    others: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """An image or a caption that cannot be used.

    Attributes:
        name: of the file, for messages.
        kind: such as "unreadable image"; every kind that can stop a run has an entry in `REMEDIES`.
        detail: the reason.
        stops: whether the recipe's settings make this an error.
    """

    name: str
    kind: str
    detail: str
    stops: bool
