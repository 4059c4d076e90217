"""The audit before a run: every image and caption of the sources, which ones train, and why others do not.

A folder is read, never written. Each image is read and decoded once, by threads, and not again while the audit's cache
has it. Torch is not imported here.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from finetune.config.schema import Data, Source
from finetune.data.audit.cache import AuditCache
from finetune.data.audit.examine import Examined, Examiner, refuse_medium
from finetune.data.audit.findings import Finding, Findings
from finetune.data.audit.index import Index, Part
from finetune.data.audit.inspect import Inspection
from finetune.data.buckets import Crop, buckets, clips
from finetune.data.cache_dir import cache_folder
from finetune.data.media.image import canonical_color
from finetune.data.prefetch import ahead
from finetune.data.shape import Frame, Medium, Shape
from finetune.data.sources import entries, refuse_inside
from finetune.data.sources.entry import REMEDIES, Entry, Problem
from finetune.errors import UserError
from finetune.models.spec import FamilySpec

__all__ = ["Audit", "Finding", "Problem", "scan"]

CHUNK = 8  # images that a thread reads before it hands them over
OWN_SETTINGS = ("caption", "mask")  # roles that the recipe's own keys find


@dataclass(frozen=True)
class Audit:
    """The examples of all sources, and what is wrong or unusual about them.

    Attributes:
        images: those that can train, held out or not.
        problems: what cannot be used, and why.
        findings: what is unusual about images that train anyway.
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
            mask = p.others["mask"].digest if "mask" in p.others else ""
            if (p.weight, mask) != (1, ""):
                found.update(f" {p.weight} {mask}".encode())
            for role, asset in p.others.items():
                if role != "mask":
                    found.update(f" {role} {asset.digest}".encode())
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


def scan(data: Data, progress: Callable[[int, str], None] | None = None, family: FamilySpec | None = None) -> Audit:
    """Inspect every example of every source.

    Args:
        data: the recipe's section.
        progress: called for each image with (images seen before it, its name).
        family: whose examples these are: its medium, and the roles that it needs and may use; None: captioned images.

    Raises:
        UserError: a source that does not exist or holds no image, a metadata file that cannot be read, a cache inside a
            source, or a setting that no image could satisfy.
    """
    background = canonical_color(data.background)
    medium: Medium = family.medium if family is not None else "image"
    required = family.required_roles if family is not None else ()
    roles = {role for role in (*required, *(family.optional_roles if family else ())) if role not in OWN_SETTINGS}
    refuse_medium(medium)
    choices = _choices(data, medium)
    refuse_inside(cache_folder(data.cache), data, "data.cache")
    index, findings = Index(), Findings()
    problems: list[Problem] = []
    cache = AuditCache(cache_folder(data.cache), background)
    examiner = Examiner(data, background, choices, cache, medium, required)
    try:
        for source, entry, examined in _examined(data, examiner, roles, medium):
            if isinstance(entry, Problem):
                problems.append(entry)
                continue
            if progress is not None:
                progress(len(index), entry.name)
            example = examiner.example(entry, examined, source)
            if isinstance(example, Problem):
                problems.append(example)
                continue
            assert examined is not None and isinstance(examined.outcome, Inspection)
            kinds = ["no caption"] if not entry.caption else []
            kinds += ["no mask"] if data.masks and "mask" not in entry.others else []
            findings.add(len(index), example, examined.outcome, kinds)
            index.append(example)
    finally:
        cache.close()
    if data.masks and index and not any("mask" in image.others for image in index):
        column = f'a column "{data.mask_column}" (data.mask_column)'
        remedy = f"NAME.mask.png beside NAME.jpg, {column}, or masks of the images' names in a folder"
        raise UserError("no image has a mask", where="data.masks", remedy=remedy)
    index.hold_out(data.held_out)
    return Audit(index, tuple(problems), findings.of(index), background)


def _choices(data: Data, medium: Medium) -> Sequence[Frame]:
    """The shapes that examples may train at."""
    sizes = buckets(data.resolution, data.bucket_step, data.maximum_aspect, data.buckets)
    if not sizes:
        raise UserError(
            f"no bucket has sides that are multiples of {data.bucket_step} and an area of at most {data.resolution}²",
            where="data.bucket_step",
            remedy=f"set data.bucket_step to at most {data.resolution}",
        )
    if medium == "video":
        return clips(sizes, data.frames, data.fps)
    if data.frames != 1:
        raise UserError("this family trains on images, not clips", where="data.frames", remedy="remove data.frames")
    return sizes


def _examined(
    data: Data, examiner: Examiner, roles: set[str], medium: Medium
) -> Iterator[tuple[Source, Entry | Problem, Examined | None]]:
    """Every entry of every source, in order, with its target read by threads."""

    def examined(chunk: list[tuple[Source, Entry | Problem]]) -> list[tuple[Source, Entry | Problem, Examined | None]]:
        return [(source, entry, examiner.read(entry)) for source, entry in chunk]

    found = (
        (source, entry)
        for source in data.sources or (Source(data.path or ""),)
        for entry in _limited(entries(source, data, roles, medium), source.limit)
    )
    return itertools.chain.from_iterable(ahead(examined, iter(lambda: list(itertools.islice(found, CHUNK)), [])))


def _limited(found: Iterator[Entry | Problem], limit: int | None) -> Iterator[Entry | Problem]:
    """Up to the entry that fills `limit`."""
    for entry in found:
        if limit is not None and isinstance(entry, Entry):
            if limit == 0:
                return
            limit -= 1
        yield entry
