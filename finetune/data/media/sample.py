"""`Sample`: one generated image, clip or sound, with methods to save and show it."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from finetune.data.shape import Medium

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

EMPTY: Mapping[str, str] = {}


class Sample(ABC):
    """Something that a model generated.

    Attributes:
        suffix: suffix of the file that `save` writes.
    """

    medium: ClassVar[Medium]
    suffix: ClassVar[str]

    @abstractmethod
    def save(self, path: Path, about: Mapping[str, str] = EMPTY) -> None:
        """Write the file, with the generation settings `about` in it or in a .json file next to it."""

    @abstractmethod
    def thumbnail(self) -> PillowImage:
        """An RGB image that represents the sample in grids and reports."""

    @abstractmethod
    def player(self, side: int) -> dict[str, Any]:
        """The variables of the report's template.

        `source` is a data URI, of at most `side` × `side` pixels; `element` is the HTML element that shows it, img if
        absent; `small` turns off smoothing.
        """


def data_uri(kind: str, content: bytes) -> str:
    """A data URI, such as `data:audio/wav;base64,…`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def open_sample(path: Path) -> tuple[Sample, dict[str, str]]:
    """Read a file that `Sample.save` wrote; returns the sample and its generation settings."""
    from finetune.data.media import audio, image, video

    readers = {".png": image.open_sample, ".webp": video.open_sample, ".wav": audio.open_sample}
    return readers[path.suffix](path)


SUFFIXES = (".png", ".webp", ".wav")  # of files that `open_sample` reads
