"""Helpers that read and atomically write files."""

from __future__ import annotations

import contextlib
import os
import secrets
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path


def read_bytes(path: str) -> bytes:
    """The bytes of a file."""
    return Path(path).read_bytes()


def place_of(names: Sequence[str], name: str) -> int | None:
    """The index of `name` in the sorted `names`, or None; needs no set in memory."""
    place = bisect_left(names, name)
    return place if place < len(names) and names[place] == name else None


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` is inside `folder` after following all links. (`Path.resolve` raises on circular links.)"""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def write_aside(path: Path, content: bytes) -> None:
    """Write `path` atomically: write a temporary file in the same folder, sync it and rename it."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(aside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def try_to_create(folder: Path) -> None:
    """Create a folder with its parents, and remove what was not there before.

    Raises:
        OSError: it cannot be created.
    """
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in created:  # the deepest first
        with contextlib.suppress(OSError):  # another process has begun to use it
            place.rmdir()
