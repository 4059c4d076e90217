"""Findings: what is unusual about examples that train anyway, such as duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.audit import duplicates
from finetune.data.audit.index import Index
from finetune.data.audit.inspect import TRAITS, Inspection
from finetune.data.example import Example

TINY = 2.0  # an image enlarged by more is called tiny
EXTREME = 1 / 3  # one that loses more than this share of its area to the crop has an extreme aspect ratio
LONG_CAPTION = 1000  # characters: no text encoder in use reads so many
EXAMPLES = 20  # of a finding, with places
DETAILS = TRAITS | {
    "tiny": f"enlarged more than {TINY:g} times",
    "extreme aspect ratio": "more than a third is cropped away",
    "long caption": f"more than {LONG_CAPTION} characters, of which the end will not be read",
    "no caption": "trains with an empty one, or with its source's prefix alone",
    "no mask": "its loss counts everywhere",
}


@dataclass(frozen=True)
class Finding:
    """Something unusual about images that train anyway.

    Attributes:
        count: images, also those not among the examples.
        examples: groups of places in `Audit.images`: of duplicates those that belong together, else one each.
    """

    kind: str
    detail: str
    count: int
    examples: tuple[tuple[int, ...], ...]


class Findings:
    """Collects findings, with a few examples of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[tuple[int, ...]]] = {}
        self._fingerprints = bytearray()

    def add(self, place: int, example: Example, inspection: Inspection, kinds: Sequence[str]) -> None:
        """Count what is unusual about the example at `place` of the index, besides `kinds`."""
        self._fingerprints += inspection.fingerprint
        crop = example.crop
        traits = [trait for trait in inspection.traits if trait != "animated" or example.medium == "image"]
        found = [*kinds, *traits]
        found += ["tiny"] if crop.scaled[0] > TINY * crop.original[0] else []
        found += ["extreme aspect ratio"] if crop.share_lost > EXTREME else []
        found += ["long caption"] if len(example.caption) > LONG_CAPTION else []
        for kind in found:
            self._counts[kind] += 1
            if self._counts[kind] <= EXAMPLES:
                self._examples.setdefault(kind, []).append((place,))

    def of(self, index: Index) -> tuple[Finding, ...]:
        """All findings by kind, and which of the images in `index` are duplicates or nearly."""
        found = [
            Finding(kind, detail, self._counts[kind], tuple(self._examples[kind]))
            for kind, detail in DETAILS.items()
            if self._counts[kind]
        ]
        copies, alike = index.copies(), duplicates.near(self._fingerprints)
        same = list(duplicates.groups(copies))
        # A group of exact copies is listed once.
        near = [group for group in duplicates.groups(alike) if len({int(copies[place]) for place in group}) > 1]
        for kind, detail, several in (
            ("exact duplicate", "the same file again", same),
            ("near duplicate", "nearly the same image", near),
        ):
            if several:
                examples = tuple(tuple(group[:EXAMPLES]) for group in several[:EXAMPLES])
                found.append(Finding(kind, detail, sum(map(len, several)), examples))
        return tuple(found)
