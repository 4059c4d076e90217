"""The documentation as tests use it: pages, code blocks and the `ft` commands in them.

A block after the comment `<!-- not run: REASON -->` is not run. A block with `title="FILE"` is a file for later blocks.
"""

from __future__ import annotations

import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.helpers.commands import CHECKOUT
from tools.archive import bundled

DOCS = CHECKOUT / "docs"
EMOJI = ("rocket", "fire", "pizza", "bus", "strawberry", "hamburger")
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^(?P<indent> *)```(?P<language>\w+)(?: title=\"(?P<file>[^\"]+)\")?\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """One fenced code block; `reason` says why it is not run, else ""."""

    page: str
    line: int
    language: str
    text: str
    file: str
    reason: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python") and not self.reason and not self.file

    @property
    def commands(self) -> list[list[str]]:
        """The `ft …` lines of a shell block, split into words, comments removed."""
        if self.language != "sh":
            return []
        lines = [shlex.split(line, comments=True) for line in self.text.replace("\\\n", " ").splitlines()]
        return [line for line in lines if line and line[0] == "ft"]


def pages() -> list[str]:
    """README.md and every page below docs/, as paths from the checkout."""
    return ["README.md", *(path.relative_to(CHECKOUT).as_posix() for path in sorted(DOCS.rglob("*.md")))]


def blocks(page: str) -> list[Block]:
    """The code blocks of a page, in order."""
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, match.start()) + 1,
            match["language"],
            match["text"],
            match["file"] or "",
            match["reason"] or "",
        )
        for match in _BLOCK.finditer(text)
    ]


def sample_images(folder: Path) -> None:
    """Write a few emoji with captions into a new folder, as users have them."""
    folder.mkdir()
    for name in EMOJI:
        with Image.open(io.BytesIO(bundled("emoji/noto")[f"{name}.webp"].read())) as image:
            image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
