"""Shapes of examples: the size of an image, a clip or a sound, and arithmetic on it for plan, cache and estimate.

Torch-free. Sizes are in pixels, frames and samples. Text gives width × height, as image viewers do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, final

Medium = Literal["image", "video", "audio", "text"]


class Shape(ABC):
    """The size of an example as the model sees it. Examples of one shape form a bucket."""

    medium: ClassVar[Medium]

    @property
    @abstractmethod
    def elements(self) -> int:
        """Number of values in one channel."""

    @abstractmethod
    def latent(self, factor: int, time_factor: int = 1) -> tuple[int, ...]:
        """Size of the latent grid of a VAE that compresses sides by `factor` and time by `time_factor`.

        Video VAEs are causal: the first frame has a latent frame of its own (1 + (frames − 1) / time_factor).
        """

    @property
    @abstractmethod
    def order(self) -> tuple[float, ...]:
        """Sort key: the order in which buckets are listed."""

    @abstractmethod
    def plain(self) -> Any:
        """The shape as JSON values; `shape_of` reads it back."""

    def __lt__(self, other: Shape) -> bool:
        return self.order < other.order


class Frame(Shape):
    """A shape with a height and a width: an image, or each frame of a video."""

    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Pixels of one frame."""
        return self.height * self.width


@final
@dataclass(frozen=True)
class ImageShape(Frame):
    """An image, in pixels."""

    medium: ClassVar[Medium] = "image"
    height: int
    width: int

    @property
    def elements(self) -> int:
        """Pixels."""
        return self.pixels

    def latent(self, factor: int, time_factor: int = 1) -> tuple[int, ...]:
        """(height, width)."""
        return self.height // factor, self.width // factor

    @property
    def order(self) -> tuple[float, ...]:
        """By width, then height."""
        return self.width, self.height

    def plain(self) -> list[int]:
        """[width, height]."""
        return [self.width, self.height]

    def __str__(self) -> str:
        return f"{self.width}×{self.height}"


@final
@dataclass(frozen=True)
class VideoShape(Frame):
    """A clip: frames of height × width pixels, at `fps` frames per second (0: the file's own rate)."""

    medium: ClassVar[Medium] = "video"
    frames: int
    height: int
    width: int
    fps: float = 0.0

    @property
    def elements(self) -> int:
        """Pixels of all frames."""
        return self.frames * self.pixels

    def latent(self, factor: int, time_factor: int = 1) -> tuple[int, ...]:
        """(frames, height, width)."""
        return 1 + (self.frames - 1) // time_factor, self.height // factor, self.width // factor

    @property
    def order(self) -> tuple[float, ...]:
        """By width, height, frames, rate."""
        return self.width, self.height, self.frames, self.fps

    def plain(self) -> dict[str, Any]:
        """The fields by name."""
        return {"medium": self.medium} | asdict(self)

    def __str__(self) -> str:
        return f"{self.frames}×{self.width}×{self.height}"


@final
@dataclass(frozen=True)
class AudioShape(Shape):
    """A sound: `samples` per channel, at `rate` samples per second."""

    medium: ClassVar[Medium] = "audio"
    samples: int
    rate: int

    @property
    def elements(self) -> int:
        """Samples."""
        return self.samples

    def latent(self, factor: int, time_factor: int = 1) -> tuple[int, ...]:
        """(samples,); `factor` compresses time."""
        return (self.samples // factor,)

    @property
    def order(self) -> tuple[float, ...]:
        """By samples, then rate."""
        return self.samples, self.rate

    def plain(self) -> dict[str, Any]:
        """The fields by name."""
        return {"medium": self.medium} | asdict(self)

    def __str__(self) -> str:
        return f"{self.samples / self.rate:g} s"


SHAPES: dict[str, type[VideoShape] | type[AudioShape]] = {"video": VideoShape, "audio": AudioShape}


def shape_of(plain: Sequence[int] | Mapping[str, Any]) -> Shape:
    """The shape that `Shape.plain` wrote."""
    if isinstance(plain, Mapping):
        values = dict(plain)
        return SHAPES[values.pop("medium")](**values)
    width, height = plain
    return ImageShape(height, width)
