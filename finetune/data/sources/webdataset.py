"""WebDataset shards as a source: tar files in which an image and its caption share a name, such as `0001.jpg`, `0001.txt`.

Nothing is unpacked: a shard's headers are walked once, and an image is then read where it lies. So shards on any disk or
mounted store are drawn from in any order, each process reading only its own images, and no shuffle buffer is needed.
The layout is WebDataset's (https://github.com/webdataset/webdataset), read with the standard library.
"""

from __future__ import annotations

import functools
import json
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.config.schema import Data
from finetune.data.example import role_of
from finetune.data.media.image import Unreadable
from finetune.data.sources.captions import Caption, one_line
from finetune.data.sources.entry import Entry, Problem
from finetune.data.sources.masks import BESIDE, MARK, SUFFIXES

BLOCK = tarfile.BLOCKSIZE
CAPTIONS = {".txt", ".json"}
CAPTION_BYTES = 1 << 20  # a caption file above this is taken for a mistake


@dataclass(frozen=True)
class _Member:
    name: str
    start: int
    size: int

    @property
    def key(self) -> str:
        """What the files of one sample have in common: the path up to the first dot of the name."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def kind(self) -> str:
        """The rest of the name: `.png` of `a/0001.PNG`, `.seg.png` of `a/0001.seg.png`."""
        return self.name[len(self.key) :].lower()


def shards_of(path: Path) -> list[Path]:
    """The shards that a source names: one .tar file, or all those in a folder."""
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    return sorted(file for file in path.glob("*.tar") if file.is_file() and not file.name.startswith("."))


def images_in(shard: Path, image_suffixes: set[str]) -> int:
    """How many images a shard holds, by their names."""
    return sum(isinstance(member, _Member) and member.kind in image_suffixes for member in _members(shard, "", False))


def samples(
    shard: Path, name: str, data: Data, image_suffixes: set[str], roles: Collection[str] = ()
) -> Iterator[Entry | Problem]:
    """The images of one shard with their captions and partners (`NAME.reference.png`).

    Args:
        name: what messages call the shard.
        roles: of partners that the family reads.
    """
    strict = data.unreadable_images == "stop"
    by_folder = data.classes == "folders"
    captions = set() if by_folder else CAPTIONS
    read = image_suffixes | captions | ({MARK + suffix for suffix in SUFFIXES} if data.masks == BESIDE else set())
    group: list[_Member] = []
    others: set[str] = set()
    for member in _members(shard, name, strict):
        if isinstance(member, Problem):
            yield member
            continue
        if member.kind not in read and _role(member.kind, roles) is None:
            if by_folder and member.kind in CAPTIONS:
                continue
            if member.kind not in others:
                yield Problem(f"{name}/{member.name}", "unused file", f'"{member.kind}" in shards is not read', False)
            others.add(member.kind)
            continue
        if group and member.key != group[0].key:
            yield from _sample(shard, name, group, data, image_suffixes, roles)
            group = []
        group.append(member)
    yield from _sample(shard, name, group, data, image_suffixes, roles)


def _sample(
    shard: Path, name: str, group: list[_Member], data: Data, image_suffixes: set[str], roles: Collection[str]
) -> Iterator[Entry | Problem]:
    """The files of one sample, which lie side by side."""
    images = [member for member in group if member.kind in image_suffixes]
    words = {member.kind: member for member in group if member.kind in CAPTIONS}
    others = {
        role: functools.partial(_read, str(shard), member.start, member.size)
        for member in group
        if (role := _role(member.kind, {MARK[1:], *roles})) is not None
    }
    for member in images:
        place = f"{name}/{member.name}"
        folder = member.name.rpartition("/")[0]
        if data.classes == "folders" and not folder:
            yield Problem(place, "missing class", "lies in no folder of its class", True)
            continue
        by_folder = Caption(folder.rpartition("/")[2]) if data.classes == "folders" else None
        caption = by_folder or _caption(shard, words, data.caption_column)
        if caption.problem:
            yield Problem(place, "unreadable caption", caption.problem, True)
        else:
            read = functools.partial(_read, str(shard), member.start, member.size)
            yield Entry(place, caption.text, read, others=others)
    if not images:
        for member in words.values():
            yield Problem(f"{name}/{member.name}", "unused caption", "no image has its name", False)


def _role(kind: str, roles: Collection[str]) -> str | None:
    """The role that a file's kind names: `.reference.png` → reference."""
    word, dot, _ = kind.removeprefix(".").partition(".")
    return role_of(word, roles) if dot else None


def _caption(shard: Path, words: dict[str, _Member], column: str) -> Caption:
    """Of the `.txt` beside an image, else of the `column` of the `.json`."""
    member = words.get(".txt") or words.get(".json")
    if member is None:
        return Caption(None)
    if member.size > CAPTION_BYTES:
        return Caption(None, f"{member.name} has {member.size} bytes, which is taken for a mistake")
    try:
        text = _read(str(shard), member.start, member.size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Caption(None, f"{member.name} is not UTF-8 (byte {error.start})")
    except (OSError, Unreadable) as error:
        return Caption(None, f"{member.name} cannot be read: {error}")
    if member.kind == ".txt":
        return Caption(one_line(text))
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return Caption(None, f"{member.name} is not JSON")
    if not isinstance(row, dict) or not isinstance(row.get(column, ""), str):
        return Caption(None, f'"{column}" in {member.name} is not text')
    return Caption(one_line(row[column]) if column in row else None)


def _read(shard: str, start: int, size: int) -> bytes:
    """Some bytes of a file.

    Raises:
        Unreadable: the file has become shorter.
    """
    with open(shard, "rb") as file:
        file.seek(start)
        content = file.read(size)
    if len(content) < size:
        raise Unreadable("the shard ends within it")
    return content


def _members(shard: Path, name: str, strict: bool) -> Iterator[_Member | Problem]:
    """Every file of a shard. What is not whole or no plain file is named; what comes after damage cannot be found."""
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r:", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                member_name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                if member.isdir() or member_name.rpartition("/")[2].startswith("."):
                    continue
                if not member.isreg() or member.sparse is not None:
                    yield Problem(
                        f"{name}/{member_name}",
                        "unreadable image",
                        "a link or another special member of a shard is not read",
                        strict,
                    )
                elif member.offset_data + member.size > size:
                    yield Problem(
                        f"{name}/{member_name}",
                        "damaged shard",
                        "it is cut within this file, the last that is found",
                        strict,
                    )
                    return
                else:
                    yield _Member(member_name, member.offset_data, member.size)
            end = archive.offset
        if _read(str(shard), end, min(BLOCK, max(0, size - end))) != bytes(BLOCK):
            yield Problem(
                name, "damaged shard", f"it is cut or damaged after byte {end}: what may follow is not found", strict
            )
    except (tarfile.TarError, Unreadable, ValueError, OverflowError) as error:
        yield Problem(name, "damaged shard", f"not a tar file, or damaged: {error}", strict)
    except OSError as error:
        yield Problem(name, "damaged shard", f"it cannot be read: {error.strerror or error}", strict)
