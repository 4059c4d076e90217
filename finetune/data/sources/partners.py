"""Partners: files that belong to an example beside its target, such as the image that an editing model starts from.

Three layouts are read. `NAME.reference.png` beside `NAME.png`; folders `target/` and `reference/` with files of the same
names; and a column `reference` of a metadata file or data set. Several references are `reference`, `reference2`, ….
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from finetune.data.example import role_of
from finetune.data.sources.files import read_bytes

TARGETS = "target"  # the folder of targets, if roles lie in folders
NUMBERS = ("", *map(str, range(2, 10)))


class Partners:
    """Where the partners of one folder's targets lie.

    Args:
        roles: that the family reads besides target, caption and mask.
        top: the source's folder.
        suffixes: endings of files that can be partners.
    """

    def __init__(self, roles: Collection[str], top: Path, suffixes: Collection[str]) -> None:
        self._roles, self._top, self._suffixes = roles, top, sorted(suffixes)
        names = [role + number for role in roles for number in NUMBERS]
        self._folders = {name: top / name for name in names if (top / TARGETS).is_dir() and (top / name).is_dir()}
        self._used: set[Path] = set()

    def role(self, file: Path) -> str | None:
        """The role that a file has for another one; None: it is a target."""
        if not self._roles:
            return None
        for name, folder in self._folders.items():
            if file.is_relative_to(folder):
                return name
        return role_of(Path(file.stem).suffix.removeprefix("."), self._roles)

    def of(self, target: Path, beside: Collection[str]) -> dict[str, Callable[[], bytes]]:
        """What reads the partners of a target, by role; `beside` are the names of the files in its folder."""
        found: dict[str, Callable[[], bytes]] = {}
        for role, file in self._files(target, beside):
            self._used.add(file)
            found[role] = functools.partial(read_bytes, str(file))
        return found

    def _files(self, target: Path, beside: Collection[str]) -> Iterator[tuple[str, Path]]:
        for role in (role + number for role in self._roles for number in NUMBERS):
            for suffix in self._suffixes:
                if f"{target.stem}.{role}{suffix}" in beside:
                    yield role, target.with_name(f"{target.stem}.{role}{suffix}")
                    break
                if role in self._folders and target.is_relative_to(self._top / TARGETS):
                    file = self._folders[role] / target.relative_to(self._top / TARGETS).with_suffix(suffix)
                    if file.is_file():
                        yield role, file
                        break

    def unused(self, file: Path) -> bool:
        """Whether no target has asked for this partner (once all have)."""
        return file not in self._used


def lacking(found: Collection[str], required: Sequence[str]) -> str:
    """Which required roles an example lacks, for a message; "" if none."""
    return " and ".join(role for role in required if role not in found)
