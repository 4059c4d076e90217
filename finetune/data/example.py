"""`Example`: the parts of one training example, by role. `Asset`: one of its files.

Roles: `target` (what the model learns to generate), `caption`, `mask` (where the loss counts), `reference` (an image to
edit; several are `reference`, `reference2`, …), `control` (an image aligned with the target, as for ControlNet) and
`first_frame`. The family's spec lists the required and the optional roles. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from finetune.data.buckets import Crop
from finetune.data.shape import Medium

ALIGNED = ("mask", "control", "first_frame")  # roles that are aligned with the target and get its crop


@dataclass(frozen=True)
class Asset:
    """One file or text of an example.

    Attributes:
        medium: image, video, audio or text.
        digest: SHA-256 of its bytes, in hexadecimal.
        read: returns its bytes. `Index` stores a `functools.partial` with plain arguments on disk, others in memory.
    """

    medium: Medium
    digest: str
    read: Callable[[], bytes] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Example:
    """One example of an audit.

    Attributes:
        name: of its target, for messages.
        caption: its text; "" if it has none.
        digest: SHA-256 of the target's bytes, in hexadecimal.
        crop: how the target is fitted to its bucket.
        weight: factor on its loss.
        medium: of the target.
        read: returns the target's bytes.
        others: assets of other roles than target and caption.
    """

    name: str
    caption: str
    digest: str
    crop: Crop
    repeats: int
    held_out: bool
    weight: float
    read: Callable[[], bytes] = field(repr=False, compare=False)
    medium: Medium = "image"
    others: Mapping[str, Asset] = field(default_factory=dict)

    @property
    def assets(self) -> dict[str, Asset]:
        """Every asset by role."""
        target = Asset(self.medium, self.digest, self.read)
        caption = Asset("text", "", partial(str.encode, self.caption))
        return {"target": target, "caption": caption, **self.others}


def base_role(role: str) -> str:
    """`reference2` → `reference`."""
    return role.rstrip("0123456789")


def role_of(word: str, roles: Collection[str]) -> str | None:
    """`word` if it names one of `roles`, with an optional number from 2 to 9 (`reference2`), else None.

    Args:
        word: part of a file name, or the name of a folder or column.
    """
    match = re.fullmatch(r"([a-z_]+?)([2-9]?)", word)
    return word if match is not None and match[1] in roles else None
