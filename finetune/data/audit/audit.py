"""The audit before a run: checks every image and caption, and reports which ones cannot be used for training.

Source folders are never written to. Threads read and decode each image once; the result is cached between runs. Torch
is not imported here.
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

CHUNK = 8  # images that a thread reads at once
OWN_SETTINGS = ("caption", "mask")  # roles that have recipe keys of their own


@dataclass(frozen=True)
class Audit:
    """The examples of all sources, and what is wrong or unusual about them.

    Attributes:
        images: the usable examples, including held-out ones.
        problems: images and captions that cannot be used.
        findings: unusual properties of usable examples.
        background: the CSS color behind transparent images.
    """

    images: Index
    problems: tuple[Problem, ...]
    findings: tuple[Finding, ...]
    background: str

    @property
    def training(self) -> Part:
        """The training examples."""
        return self.images.part(held_out=False)

    @property
    def held_out(self) -> Part:
        """The examples held out for validation."""
        return self.images.part(held_out=True)

    def crops(self) -> list[tuple[Crop, int, int]]:
        """(crop, training images with this crop, their examples per epoch: images × repeats) of each different crop."""
        trains, repeats = ~self.images.held_out, self.images.repeats
        by_crop = [(crop, places[trains[places]]) for crop, places in self.images.crops.items()]
        return [(crop, len(places), int(repeats[places].sum())) for crop, places in by_crop if len(places)]

    def bucket_counts(self) -> dict[Shape, int]:
        """Examples per epoch, by bucket."""
        counts: Counter[Shape] = Counter()
        for crop, _, examples in self.crops():
            counts[crop.shape] += examples
        return {shape: counts[shape] for shape in sorted(counts)}

    def digest(self) -> str:
        """SHA-256 over every example's bytes, crop, caption, repeats, weight and other assets, in order."""
        hasher = hashlib.sha256()
        for number, p in enumerate(self.images):
            hasher.update(
                (
                    ("\x1f" if number else "") + f"str:{p.digest} {p.crop.key} {p.repeats} {p.held_out} {p.caption}"
                ).encode()
            )
            mask = p.others["mask"].digest if "mask" in p.others else ""
            if (p.weight, mask) != (1, ""):
                hasher.update(f" {p.weight} {mask}".encode())
            for role, asset in p.others.items():
                if role != "mask":
                    hasher.update(f" {role} {asset.digest}".encode())
        return hasher.hexdigest()

    def raise_if_stopped(self) -> None:
        """Raise if there are problems that the recipe's settings make errors.

        Raises:
            UserError: for example a missing caption, an unreadable image or no usable image; it names the files.
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
                "no usable image is left to train on", where="data", remedy="see the table above for the reasons"
            )


def scan(data: Data, progress: Callable[[int, str], None] | None = None, family: FamilySpec | None = None) -> Audit:
    """Inspect every example of every source.

    Args:
        data: the recipe's section.
        progress: called for each image with (number of images before it, its name).
        family: sets the medium, and the required and optional roles; None: images with captions.

    Raises:
        UserError: a source does not exist or has no images, a metadata file cannot be read, the cache is inside a
            source, or a setting excludes every image.
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
        remedy = f"add NAME.mask.png next to NAME.jpg, {column}, or a folder of masks with the images' names"
        raise UserError("no image has a mask", where="data.masks", remedy=remedy)
    index.hold_out(data.held_out)
    return Audit(index, tuple(problems), findings.of(index), background)


def _choices(data: Data, medium: Medium) -> Sequence[Frame]:
    """The buckets."""
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
    """Yield every entry of every source, in order; threads read the targets."""

    def examined(chunk: list[tuple[Source, Entry | Problem]]) -> list[tuple[Source, Entry | Problem, Examined | None]]:
        return [(source, entry, examiner.read(entry)) for source, entry in chunk]

    listed = (
        (source, entry)
        for source in data.sources or (Source(data.path or ""),)
        for entry in _limited(entries(source, data, roles, medium), source.limit)
    )
    return itertools.chain.from_iterable(ahead(examined, iter(lambda: list(itertools.islice(listed, CHUNK)), [])))


def _limited(listed: Iterator[Entry | Problem], limit: int | None) -> Iterator[Entry | Problem]:
    """Yield at most `limit` entries, and the problems among them."""
    for entry in listed:
        if limit is not None and isinstance(entry, Entry):
            if limit == 0:
                return
            limit -= 1
        yield entry
