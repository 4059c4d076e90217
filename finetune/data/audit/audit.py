"""The audit before a run: every image and caption of the sources, what trains, and what does not and why.

A folder is read, never written; each image is read and decoded once, by threads, and not again while the memo knows it.
Torch is not imported here.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from finetune.config.schema import Data, Source
from finetune.data.audit import duplicates
from finetune.data.audit.cache import Memo, stamp_of
from finetune.data.audit.index import ImageRecord, Index, Part
from finetune.data.audit.inspect import TRAITS, Look, look
from finetune.data.buckets import Crop, buckets, fit
from finetune.data.cache_dir import cache_folder
from finetune.data.media.image import Unreadable, canonical_color
from finetune.data.prefetch import ahead
from finetune.data.shape import ImageShape, Shape
from finetune.data.sources import entries, refuse_inside
from finetune.data.sources.entry import REMEDIES, Entry, Problem
from finetune.data.sources.masks import digest_of
from finetune.errors import UserError

__all__ = ["Audit", "Finding", "ImageRecord", "Problem", "scan"]

CHUNK = 8  # images that a thread looks at before it hands them over
TINY = 2.0  # an image enlarged by more is called tiny
EXTREME = 1 / 3  # one that loses more than this share of its area to the crop has an extreme aspect ratio
LONG_CAPTION = 1000  # characters: no text encoder in use reads so many
EXAMPLES = 20  # of a finding, with places


@dataclass(frozen=True)
class Finding:
    """Something odd about images that train all the same. `examples` are groups of places in `Audit.images`: of
    duplicates those that belong together, else one each."""

    kind: str
    detail: str
    count: int  # images, also those not among the examples
    examples: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Audit:
    """What a look at all the data found.

    Attributes:
        images: those that can train, held out or not.
        problems: what cannot be used, and why.
        findings: what is odd about images that train all the same.
        background: the CSS color that transparent images are laid over.
    """

    images: Index
    problems: tuple[Problem, ...]
    findings: tuple[Finding, ...]
    background: str

    @property
    def training(self) -> Part:
        """The images that train."""
        return self.images.part(held_out=False)

    @property
    def held_out(self) -> Part:
        """Those kept back, to validate on."""
        return self.images.part(held_out=True)

    def crops(self) -> list[tuple[Crop, int, int]]:
        """(crop, images that train and are cropped so, examples an epoch: images × repeats), each crop once."""
        trains, repeats = ~self.images.held_out, self.images.repeats
        found = [(crop, places[trains[places]]) for crop, places in self.images.crops.items()]
        return [(crop, len(places), int(repeats[places].sum())) for crop, places in found if len(places)]

    def bucket_counts(self) -> dict[Shape, int]:
        """Examples an epoch by bucket."""
        counts: Counter[Shape] = Counter()
        for crop, _, examples in self.crops():
            counts[crop.shape] += examples
        return {shape: counts[shape] for shape in sorted(counts)}

    def digest(self) -> str:
        """SHA-256 over every image's bytes, crop, caption, repeats, weight and mask, in their order."""
        found = hashlib.sha256()
        for number, p in enumerate(self.images):
            found.update(
                (
                    ("\x1f" if number else "") + f"str:{p.digest} {p.crop.key} {p.repeats} {p.held_out} {p.caption}"
                ).encode()
            )
            if (p.weight, p.mask_digest) != (1, ""):
                found.update(f" {p.weight} {p.mask_digest}".encode())
        return found.hexdigest()

    def raise_if_stopped(self) -> None:
        """Raise for the problems that the recipe does not allow, naming files.

        Raises:
            UserError: at a missing caption, an unreadable image or no image at all.
        """
        stopping = [problem for problem in self.problems if problem.stops]
        if stopping:
            kinds = Counter(problem.kind for problem in stopping)
            shown = "; ".join(f"{p.name}: {p.detail}" for p in stopping[:5]) + (
                f"; and {len(stopping) - 5} more" if len(stopping) > 5 else ""
            )
            counted = " and ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in kinds.items())
            raise UserError(f"the data has {counted}", where=shown, remedy="; ".join(REMEDIES[kind] for kind in kinds))
        if not self.training:
            raise UserError(
                "no image is left to train on", where="data", remedy="see the table above for why each was left out"
            )


def scan(data: Data, progress: Callable[[int, str], None] | None = None) -> Audit:
    """Look at every image of every source.

    Args:
        data: the recipe's section.
        progress: called for each image with (images seen before it, its name).

    Raises:
        UserError: a source that is not there or holds no image, a metadata file that cannot be read, a cache inside a
            source, or a setting that no image could satisfy.
    """
    background = canonical_color(data.background)
    choices = buckets(data.resolution, data.bucket_step, data.maximum_aspect, data.buckets)
    if not choices:
        raise UserError(
            f"no bucket has sides that are multiples of {data.bucket_step} and an area of at most {data.resolution}²",
            where="data.bucket_step",
            remedy=f"set data.bucket_step to at most {data.resolution}",
        )
    refuse_inside(cache_folder(data.cache), data, "data.cache")
    index, odd = Index(), _Oddities()
    problems: list[Problem] = []
    memo = Memo(cache_folder(data.cache), background)
    try:
        for source, found, seen in _looked_at(data, background, memo):
            if isinstance(found, Problem):
                problems.append(found)
                continue
            if progress is not None:
                progress(len(index), found.name)
            outcome = _image(found, seen, source, data, choices)
            if isinstance(outcome, Problem):
                problems.append(outcome)
                continue
            told = (["no caption"] if not found.caption else []) + (
                ["no mask"] if data.masks and found.mask is None else []
            )
            odd.note(len(index), outcome, seen, told)
            index.append(outcome)
    finally:
        memo.close()
    if data.masks and index and not any(image.mask for image in index):
        remedy = f'NAME.mask.png beside NAME.jpg, a column "{data.mask_column}" (data.mask_column), or masks of the images\' names in a folder'
        raise UserError("no image has a mask", where="data.masks", remedy=remedy)
    index.hold_out(data.held_out)
    return Audit(index, tuple(problems), odd.findings(index), background)


Seen = (
    tuple[bytes, Look | str] | None
)  # digest, and the look or why it cannot be one; None: not looked at, for want of a caption


def _looked_at(data: Data, background: str, memo: Memo) -> Iterator[tuple[Source, Entry | Problem, Seen]]:
    """Every entry of every source, in order, with what a look at it told."""

    def looked(chunk: list[tuple[Source, Entry | Problem]]) -> list[tuple[Source, Entry | Problem, Seen]]:
        return [(source, found, _seen(found, data, background, memo)) for source, found in chunk]

    found = (
        (source, entry)
        for source in data.sources or (Source(data.path or ""),)
        for entry in _limited(entries(source, data), source.limit)
    )
    return itertools.chain.from_iterable(ahead(looked, iter(lambda: list(itertools.islice(found, CHUNK)), [])))


def _limited(found: Iterator[Entry | Problem], limit: int | None) -> Iterator[Entry | Problem]:
    """Up to the entry that fills `limit`."""
    for entry in found:
        if limit is not None and isinstance(entry, Entry):
            if limit == 0:
                return
            limit -= 1
        yield entry


def _seen(entry: Entry | Problem, data: Data, background: str, memo: Memo) -> Seen:
    if isinstance(entry, Problem) or (not entry.caption and data.missing_captions != "empty"):
        return None
    stamp = stamp_of(entry.file) if entry.file else None
    if (remembered := memo.find(stamp)) is not None:
        return remembered
    outcome: Look | str | None
    try:
        content = entry.read() if entry.content is None else entry.content
    except (Unreadable, OSError) as error:
        return b"", (error.strerror if isinstance(error, OSError) and error.strerror else str(error))
    digest = hashlib.sha256(content).digest()
    if (outcome := memo.find_digest(digest)) is None:
        try:
            outcome = look(content, background)
        except Unreadable as error:
            outcome = str(error)
    memo.keep(stamp if stamp is not None and stamp == stamp_of(entry.file) else None, digest, outcome)
    return digest, outcome


def _image(entry: Entry, seen: Seen, source: Source, data: Data, choices: list[ImageShape]) -> ImageRecord | Problem:
    if seen is None:
        why = "no caption was found" if entry.caption is None else "its caption is empty"
        return Problem(
            entry.name, "missing caption", f"{why}, so it does not train", stops=data.missing_captions == "stop"
        )
    digest, outcome = seen
    if isinstance(outcome, str):
        return Problem(entry.name, "unreadable image", outcome, stops=data.unreadable_images == "stop")
    # The prefix is part of the caption wherever that is read: encoded, counted in tokens, dropped with it.
    caption = f"{source.prefix} {entry.caption or ''}".strip()
    mask = ""
    if entry.mask is not None:
        try:
            mask = digest_of(entry.mask, outcome.size)
        except Unreadable as error:
            return Problem(entry.name, "unreadable mask", str(error), stops=data.unreadable_images == "stop")
    crop = fit(outcome.size, choices)
    return ImageRecord(
        entry.name, caption, digest.hex(), crop, source.repeats, False, source.weight, mask, entry.mask, entry.read
    )


class _Oddities:
    """Collects findings, a few examples of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[tuple[int, ...]]] = {}
        self._fingerprints = bytearray()

    def note(self, place: int, image: ImageRecord, seen: Seen, told: list[str]) -> None:
        """Count what is odd about the image at `place` of the index, besides what is `told`."""
        assert seen is not None and isinstance(seen[1], Look)
        self._fingerprints += seen[1].fingerprint
        crop = image.crop
        kinds = [*told, *seen[1].traits, *(["tiny"] if crop.scaled[0] > TINY * crop.original[0] else [])]
        kinds += (["extreme aspect ratio"] if crop.share_lost > EXTREME else []) + (
            ["long caption"] if len(image.caption) > LONG_CAPTION else []
        )
        for kind in kinds:
            self._counts[kind] += 1
            if self._counts[kind] <= EXAMPLES:
                self._examples.setdefault(kind, []).append((place,))

    def findings(self, index: Index) -> tuple[Finding, ...]:
        """All that is odd, kind by kind, and which of the images in `index` are there twice or nearly."""
        details = TRAITS | {
            "tiny": f"enlarged more than {TINY:g} times",
            "extreme aspect ratio": "more than a third is cropped away",
            "long caption": f"more than {LONG_CAPTION} characters, of which the end will not be read",
            "no caption": "trains with an empty one, or with its source's prefix alone",
            "no mask": "its loss counts everywhere",
        }
        found = [
            Finding(kind, detail, self._counts[kind], tuple(self._examples[kind]))
            for kind, detail in details.items()
            if self._counts[kind]
        ]
        copies, alike = index.copies(), duplicates.near(self._fingerprints)
        same = list(duplicates.groups(copies))
        # A group whose images are all copies is no news.
        near = [group for group in duplicates.groups(alike) if len({int(copies[place]) for place in group}) > 1]
        for kind, detail, several in (
            ("exact duplicate", "the same file again", same),
            ("near duplicate", "nearly the same image", near),
        ):
            if several:
                examples = tuple(tuple(group[:EXAMPLES]) for group in several[:EXAMPLES])
                found.append(Finding(kind, detail, sum(map(len, several)), examples))
        return tuple(found)
