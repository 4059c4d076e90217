"""The audit before a run: every picture and caption of the sources, what trains, and what does not and why.

A folder is read, never written; each picture is read and decoded once. Torch is not imported here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from finetune.data.pictures import Bucket, Crop, Unreadable, buckets, canonical_colour, decode, fit
from finetune.data.sources import REMEDIES, Entry, Problem, entries
from finetune.errors import UserError
from finetune.recipe import Data, Source

__all__ = ["Audit", "Picture", "Problem", "scan"]


@dataclass(frozen=True)
class Picture:
    """One picture that trains. `read` gives the file's bytes; `digest` is their SHA-256."""

    name: str
    caption: str
    digest: str
    crop: Crop
    repeats: int
    held_out: bool
    read: Callable[[], bytes] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Audit:
    pictures: tuple[Picture, ...]
    problems: tuple[Problem, ...]
    background: str

    @property
    def training(self) -> tuple[Picture, ...]:
        return tuple(p for p in self.pictures if not p.held_out)

    @property
    def held_out(self) -> tuple[Picture, ...]:
        return tuple(p for p in self.pictures if p.held_out)

    def bucket_counts(self) -> dict[Bucket, int]:
        """Examples an epoch (pictures × repeats) by bucket."""
        counts: Counter[Bucket] = Counter()
        for picture in self.training:
            counts[picture.crop.bucket] += picture.repeats
        return dict(sorted(counts.items()))

    def raise_if_stopped(self) -> None:
        """Raise for the problems that the recipe does not allow, naming files.

        Raises:
            UserError: at a missing caption, an unreadable picture or no picture at all.
        """
        stopping = [problem for problem in self.problems if problem.stops]
        if stopping:
            kinds = Counter(problem.kind for problem in stopping)
            shown = "; ".join(f"{p.name}: {p.detail}" for p in stopping[:5]) + (f"; and {len(stopping) - 5} more" if len(stopping) > 5 else "")
            counted = " and ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in kinds.items())
            raise UserError(f"the data has {counted}", where=shown, remedy="; ".join(REMEDIES[kind] for kind in kinds))
        if not self.training:
            raise UserError("no picture is left to train on", where="data", remedy="see the table above for why each was left out")


def scan(data: Data, progress: Callable[[int, str], None] | None = None) -> Audit:
    """Look at every picture of every source.

    Args:
        data: the recipe's section.
        progress: called for each picture with (pictures seen before it, its name).

    Raises:
        UserError: a source that is not there or holds no picture, a metadata file that cannot be read, or a setting
            that no picture could satisfy.
    """
    background = canonical_colour(data.background)
    choices = buckets(data.resolution, data.bucket_step, data.maximum_aspect, data.buckets)
    if not choices:
        raise UserError(
            f"no bucket has sides that are multiples of {data.bucket_step} and an area of at most {data.resolution}²",
            where="data.bucket_step",
            remedy=f"set data.bucket_step to at most {data.resolution}",
        )
    pictures: list[Picture] = []
    problems: list[Problem] = []
    seen = 0
    for source in data.sources or (Source(data.path or ""),):
        for found in entries(source, data):
            if isinstance(found, Problem):
                problems.append(found)
                continue
            if progress is not None:
                progress(seen, found.name)
            seen += 1
            outcome = _examine(found, source, data, background, choices)
            if isinstance(outcome, Picture):
                pictures.append(outcome)
                if found.caption is None:
                    alone = "an empty caption" if not source.prefix else f'only "{source.prefix}" for a caption'
                    problems.append(Problem(found.name, "missing caption", f"trains with {alone}", stops=False))
            else:
                problems.append(outcome)
    return Audit(_hold_out(pictures, data.held_out), tuple(problems), background)


def _examine(entry: Entry, source: Source, data: Data, background: str, choices: list[Bucket]) -> Picture | Problem:
    if entry.caption is None and data.missing_captions != "empty":
        return Problem(entry.name, "missing caption", "no caption was found, so it does not train", stops=data.missing_captions == "stop")
    try:
        content = entry.read()
        size = decode(content, background).size
    except (Unreadable, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Problem(entry.name, "unreadable picture", reason, stops=data.unreadable_pictures == "stop")
    # The prefix is part of the caption wherever that is read: encoded, counted in tokens, dropped with it.
    caption = f"{source.prefix} {entry.caption or ''}".strip()
    return Picture(entry.name, caption, hashlib.sha256(content).hexdigest(), fit(size, choices), source.repeats, False, entry.read)


def _hold_out(pictures: list[Picture], share: float) -> tuple[Picture, ...]:
    """Mark the share of pictures with the smallest digests: the same ones whatever their names and order.

    At least one is held out and one trains. Copies of one picture stay on one side.
    """
    digests = sorted({picture.digest for picture in pictures})
    count = min(max(1, round(share * len(digests))), len(digests) - 1) if share else 0
    chosen = set(digests[:count])
    return tuple(replace(picture, held_out=picture.digest in chosen) for picture in pictures)
