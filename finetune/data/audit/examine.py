"""`Examiner`: turns the entries of sources into examples of the audit, or into problems."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from finetune.config.schema import Data, Source
from finetune.data.audit.cache import AuditCache, stamp_of
from finetune.data.audit.inspect import Inspection, inspect
from finetune.data.buckets import fit
from finetune.data.example import ALIGNED, Asset, Example, base_role
from finetune.data.media import video
from finetune.data.media.image import Unreadable
from finetune.data.shape import Frame, Medium, VideoShape
from finetune.data.sources.captions import with_trigger
from finetune.data.sources.entry import Entry, Problem
from finetune.data.sources.masks import UNEQUAL, digest_of
from finetune.data.sources.partners import lacking
from finetune.errors import UserError


@dataclass(frozen=True)
class Examined:
    """The digest of an entry's target, and its inspection or the reason why there is none."""

    digest: bytes
    outcome: Inspection | str


class Examiner:
    """Reads and checks the files of entries. Thread-safe.

    Args:
        data: the recipe's section.
        choices: the buckets.
        medium: of the targets.
        required: roles that each example must have besides its target.
    """

    def __init__(
        self,
        data: Data,
        background: str,
        choices: Sequence[Frame],
        cache: AuditCache,
        medium: Medium,
        required: tuple[str, ...],
    ) -> None:
        self._data, self._background, self._choices, self._cache = data, background, choices, cache
        self._medium, self._required = medium, required
        self._strict = data.unreadable_images == "stop"

    def read(self, entry: Entry | Problem) -> Examined | None:
        """Read and inspect the target of an entry; None if the entry cannot be used anyway."""
        if isinstance(entry, Problem) or (not entry.caption and self._data.missing_captions != "empty"):
            return None
        stamp = stamp_of(entry.file) if entry.file else None
        if (known := self._cache.find(stamp)) is not None:
            return Examined(*known)
        try:
            content = entry.read() if entry.content is None else entry.content
        except (Unreadable, OSError) as error:
            return Examined(b"", getattr(error, "strerror", None) or str(error))
        digest = hashlib.sha256(content).digest()
        outcome = self._inspect(content, digest)
        unchanged = stamp is not None and stamp == stamp_of(entry.file)
        self._cache.keep(stamp if unchanged else None, digest, outcome)
        return Examined(digest, outcome)

    def _inspect(self, content: bytes, digest: bytes) -> Inspection | str:
        if (known := self._cache.find_digest(digest)) is not None:
            return known
        try:
            return inspect(video.first_frame(content) if self._medium == "video" else content, self._background)
        except Unreadable as error:
            return str(error)

    def example(self, entry: Entry, examined: Examined | None, source: Source) -> Example | Problem:
        """The example, with its partners read and checked, or the problem with it."""
        if examined is None:
            reason = "it has no caption" if entry.caption is None else "its caption is empty"
            stops = self._data.missing_captions == "stop"
            return Problem(entry.name, "missing caption", f"{reason}, so it is not used", stops)
        outcome = examined.outcome
        if isinstance(outcome, str):
            return Problem(entry.name, "unreadable image", outcome, self._strict)
        if missing := lacking(entry.others.keys(), self._required):
            return Problem(entry.name, "missing partner", f"it has no {missing}", self._strict)
        if self._medium == "video" and (short := self._too_short(entry)):
            return Problem(entry.name, "unreadable image", short, self._strict)
        others, problem = self._partners(entry, outcome.size)
        if problem is not None:
            return problem
        return Example(
            name=entry.name,
            # The prefix is part of the caption everywhere: it is encoded, counted in tokens and dropped with it.
            caption=with_trigger(
                f"{source.prefix} {entry.caption or ''}".strip(), "" if source.generated else self._data.trigger
            ),
            digest=examined.digest.hex(),
            crop=fit(outcome.size, self._choices),
            repeats=source.repeats,
            held_out=False,
            weight=source.weight,
            read=entry.read,
            medium=self._medium,
            others=others,
        )

    def _too_short(self, entry: Entry) -> str:
        """Why the clip is shorter than the recipe's `data.frames`; "" if it is not."""
        shape = self._choices[0]
        assert isinstance(shape, VideoShape)
        try:
            video.check(entry.read(), shape.frames, shape.fps)
        except (Unreadable, OSError) as error:
            return str(error)
        return ""

    def _partners(self, entry: Entry, size: tuple[int, int]) -> tuple[Mapping[str, Asset], Problem | None]:
        """The assets of the other roles, each read and decoded once."""
        assets: dict[str, Asset] = {}
        for role, read in entry.others.items():
            try:
                digest = digest_of(read, size) if role == "mask" else self._partner(role, read, size)
            except (Unreadable, OSError) as error:
                kind = "unreadable mask" if role == "mask" else "unreadable partner"
                what = "" if role == "mask" else f"{role}: "
                return {}, Problem(entry.name, kind, f"{what}{error}", self._strict)
            assets[role] = Asset("image", digest, read)
        return assets, None

    def _partner(self, role: str, read: Callable[[], bytes], size: tuple[int, int]) -> str:
        content = read()
        digest = hashlib.sha256(content).digest()
        outcome = self._inspect(content, digest)
        self._cache.keep(None, digest, outcome)
        if isinstance(outcome, str):
            raise Unreadable(outcome)
        width, height = outcome.size
        if base_role(role) in ALIGNED and abs(width * size[1] / (height * size[0]) - 1) > UNEQUAL:
            raise Unreadable(
                f"{width}×{height}, but the target is {size[0]}×{size[1]}: the aspect ratios must be equal"
            )
        return digest.hex()


def refuse_medium(medium: Medium) -> None:
    """Check that training data of this medium is supported.

    Raises:
        UserError: it is not.
    """
    if medium not in ("image", "video"):
        raise UserError(
            f"training data of medium {medium} is not supported", where="model.family", remedy="choose another family"
        )
