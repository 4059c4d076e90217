"""Partners: the files of an example besides its target, such as the image that an editing model starts from.

Three layouts are supported: `NAME.reference.png` next to `NAME.png`; folders `target/` and `reference/` with files of
the same names; and a column `reference` of a dataset. Several references are named `reference`, `reference2`, ….
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
    """Finds the partners of the targets in one source folder.

    Args:
        roles: the roles that the family reads besides target, caption and mask.
        top: the source folder.
        suffixes: the suffixes that partners can have.
    """

    def __init__(self, roles: Collection[str], top: Path, suffixes: Collection[str]) -> None:
        self._roles, self._top, self._suffixes = roles, top, sorted(suffixes)
        names = [role + number for role in roles for number in NUMBERS]
        self._folders = {name: top / name for name in names if (top / TARGETS).is_dir() and (top / name).is_dir()}
        self._used: set[Path] = set()

    def role(self, file: Path) -> str | None:
        """The role of a file that is a partner; None if it is a target."""
        if not self._roles:
            return None
        for name, folder in self._folders.items():
            if file.is_relative_to(folder):
                return name
        return role_of(Path(file.stem).suffix.removeprefix("."), self._roles)

    def of(self, target: Path, beside: Collection[str]) -> dict[str, Callable[[], bytes]]:
        """Functions that read the partners of a target, by role.

        Args:
            beside: the names of the files in the target's folder.
        """
        readers: dict[str, Callable[[], bytes]] = {}
        for role, file in self._files(target, beside):
            self._used.add(file)
            readers[role] = functools.partial(read_bytes, str(file))
        return readers

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
        """Whether this partner belongs to no target. Call it after `of` was called for every target."""
        return file not in self._used


def lacking(present: Collection[str], required: Sequence[str]) -> str:
    """The required roles that are not in `present`, joined for a message; "" if all are."""
    return " and ".join(role for role in required if role not in present)
