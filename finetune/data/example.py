"""`Example`: what one training example is made of, by role. `Asset`: one file of it.

Roles: `target` (what the model learns to generate), `caption`, `mask` (where the loss counts), `reference` (an image to
edit; several are `reference`, `reference2`, …), `control` (an image aligned with the target, as for ControlNet) and
`first_frame`. A family's record says which it needs and which it may use. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from finetune.data.buckets import Crop
from finetune.data.shape import Medium

ALIGNED = ("mask", "control", "first_frame")  # roles that show the target's own layout, and are cropped as it is


@dataclass(frozen=True)
class Asset:
    """One file, or a text, of an example.

    Attributes:
        medium: image, video, audio or text.
        digest: SHA-256 of its bytes, in hexadecimal.
        read: returns its bytes. A `functools.partial` of one function and plain values costs no memory, others do.
    """

    medium: Medium
    digest: str
    read: Callable[[], bytes] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Example:
    """One example of an audit.

    Attributes:
        name: of its target, for messages.
        caption: its text; "" where there is none.
        digest: SHA-256 of the target's bytes, in hexadecimal.
        crop: how the target fills its bucket.
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
    """The role that a word in a file's name, a folder or a column stands for: one of `roles`, or numbered from 2 on."""
    found = re.fullmatch(r"([a-z_]+?)([2-9]?)", word)
    return word if found is not None and found[1] in roles else None
