"""WebDataset shards as a source: tar files in which an image and its caption share a name (`0001.jpg`, `0001.txt`).

Nothing is unpacked: the headers of a shard are read once, and each image is then read from its offset in the tar. So
images of shards on a disk or a mounted store are read in any order, each process reads only its own images, and no
shuffle buffer is needed. The layout is WebDataset's (https://github.com/webdataset/webdataset), read with the standard
library.
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
CAPTION_BYTES = 1 << 20  # larger caption files are rejected


@dataclass(frozen=True)
class _Member:
    name: str
    start: int
    size: int

    @property
    def key(self) -> str:
        """The name that all files of a sample share: the path up to the first dot of the file name."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def kind(self) -> str:
        """The rest of the name: `.png` of `a/0001.PNG`, `.seg.png` of `a/0001.seg.png`."""
        return self.name[len(self.key) :].lower()


def shards_of(path: Path) -> list[Path]:
    """The shards of a source: one .tar file, or all .tar files in a folder."""
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    return sorted(file for file in path.glob("*.tar") if file.is_file() and not file.name.startswith("."))


def images_in(shard: Path, image_suffixes: set[str]) -> int:
    """The number of images in a shard, judged by their suffixes."""
    return sum(isinstance(member, _Member) and member.kind in image_suffixes for member in _members(shard, "", False))


def samples(
    shard: Path, name: str, data: Data, image_suffixes: set[str], roles: Collection[str] = ()
) -> Iterator[Entry | Problem]:
    """Yield the images of one shard with their captions and partners (`NAME.reference.png`).

    Args:
        name: of the shard, for messages.
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
                detail = f'files "{member.kind}" in shards are not read'
                yield Problem(f"{name}/{member.name}", "unused file", detail, False)
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
    """Yield the entries of one sample, whose files are `group`."""
    images = [member for member in group if member.kind in image_suffixes]
    captions = {member.kind: member for member in group if member.kind in CAPTIONS}
    others = {
        role: functools.partial(_read, str(shard), member.start, member.size)
        for member in group
        if (role := _role(member.kind, {MARK[1:], *roles})) is not None
    }
    for member in images:
        place = f"{name}/{member.name}"
        folder = member.name.rpartition("/")[0]
        if data.classes == "folders" and not folder:
            yield Problem(place, "missing class", "not in a class folder", True)
            continue
        by_folder = Caption(folder.rpartition("/")[2]) if data.classes == "folders" else None
        caption = by_folder or _caption(shard, captions, data.caption_column)
        if caption.problem:
            yield Problem(place, "unreadable caption", caption.problem, True)
        else:
            read = functools.partial(_read, str(shard), member.start, member.size)
            yield Entry(place, caption.text, read, others=others)
    if not images:
        for member in captions.values():
            yield Problem(f"{name}/{member.name}", "unused caption", "no image has this name", False)


def _role(kind: str, roles: Collection[str]) -> str | None:
    """The role in a file's kind: `.reference.png` → reference."""
    word, dot, _ = kind.removeprefix(".").partition(".")
    return role_of(word, roles) if dot else None


def _caption(shard: Path, captions: dict[str, _Member], column: str) -> Caption:
    """The caption of a sample: its `.txt`, else `column` of its `.json`."""
    member = captions.get(".txt") or captions.get(".json")
    if member is None:
        return Caption(None)
    if member.size > CAPTION_BYTES:
        return Caption(None, f"{member.name} has {member.size:,} bytes; captions are limited to {CAPTION_BYTES:,}")
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
    """Read `size` bytes of a file from `start`.

    Raises:
        Unreadable: the file has become shorter.
    """
    with open(shard, "rb") as file:
        file.seek(start)
        content = file.read(size)
    if len(content) < size:
        raise Unreadable("the shard ends before the end of this file")
    return content


def _members(shard: Path, name: str, strict: bool) -> Iterator[_Member | Problem]:
    """Yield every file of a shard, and a problem for truncated files and special members; stop where it is damaged."""
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r:", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else the archive keeps every member in memory
                member_name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                if member.isdir() or member_name.rpartition("/")[2].startswith("."):
                    continue
                if not member.isreg() or member.sparse is not None:
                    yield Problem(
                        f"{name}/{member_name}",
                        "unreadable image",
                        "links and other special members of a shard are not read",
                        strict,
                    )
                elif member.offset_data + member.size > size:
                    yield Problem(
                        f"{name}/{member_name}",
                        "damaged shard",
                        "the shard ends within this file",
                        strict,
                    )
                    return
                else:
                    yield _Member(member_name, member.offset_data, member.size)
            end = archive.offset
        if _read(str(shard), end, min(BLOCK, max(0, size - end))) != bytes(BLOCK):
            detail = f"truncated or damaged after byte {end}; files after it cannot be read"
            yield Problem(name, "damaged shard", detail, strict)
    except (tarfile.TarError, Unreadable, ValueError, OverflowError) as error:
        yield Problem(name, "damaged shard", f"not a tar file, or damaged: {error}", strict)
    except OSError as error:
        yield Problem(name, "damaged shard", f"cannot be read: {error.strerror or error}", strict)
