"""Findings: unusual properties of examples that are used anyway, such as duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.audit import duplicates
from finetune.data.audit.index import Index
from finetune.data.audit.inspect import TRAITS, Inspection
from finetune.data.example import Example

TINY = 2.0  # images enlarged more than this are called tiny
EXTREME = 1 / 3  # images with a larger share of their area cropped away have an extreme aspect ratio
LONG_CAPTION = 1000  # characters; more than any text encoder in use reads
EXAMPLES = 20  # examples listed for each finding
DETAILS = TRAITS | {
    "tiny": f"enlarged more than {TINY:g} times",
    "extreme aspect ratio": "more than a third is cropped away",
    "long caption": f"more than {LONG_CAPTION} characters; the model truncates it",
    "no caption": "trained with an empty caption, or only the prefix of its source",
    "no mask": "the loss covers the whole image",
}


@dataclass(frozen=True)
class Finding:
    """Something unusual about images that are used anyway.

    Attributes:
        count: number of all affected images, including those not in `examples`.
        examples: groups of indices into `Audit.images`: duplicates of each other, else groups of one.
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
        """Record `kinds` and whatever else is unusual about the example at `place` in the index."""
        self._fingerprints += inspection.fingerprint
        crop = example.crop
        traits = [trait for trait in inspection.traits if trait != "animated" or example.medium == "image"]
        all_kinds = [*kinds, *traits]
        all_kinds += ["tiny"] if crop.scaled[0] > TINY * crop.original[0] else []
        all_kinds += ["extreme aspect ratio"] if crop.share_lost > EXTREME else []
        all_kinds += ["long caption"] if len(example.caption) > LONG_CAPTION else []
        for kind in all_kinds:
            self._counts[kind] += 1
            if self._counts[kind] <= EXAMPLES:
                self._examples.setdefault(kind, []).append((place,))

    def of(self, index: Index) -> tuple[Finding, ...]:
        """All findings by kind, then exact and near duplicates among the images of `index`."""
        findings = [
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
                findings.append(Finding(kind, detail, sum(map(len, several)), examples))
        return tuple(findings)
