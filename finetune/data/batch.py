"""`Batch` and `Encoder`: what the data side passes to a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Batch = dict[str, Tensor]

# The contents of an example by role, decoded and cropped: images [3, H, W], clips [3, F, H, W] and sounds [C, S] as
# float32 in [-1, 1], captions as text.
Inputs = Mapping[str, Tensor | str]


@dataclass(frozen=True)
class Part:
    """Tensors that an encoder computes from some roles of an example. They are cached together.

    Attributes:
        roles: the roles that are read, such as ("target",).
        key: everything that the tensors depend on besides the contents of the roles: weights, precision.
    """

    roles: tuple[str, ...]
    key: str


class Encoder(ABC):
    """Turns examples into the tensors that a train step reads; runs once, is cached, then released.

    Attributes:
        mask_factor: image pixels along one side of a position that has a loss; None: the family has no use for masks.
        cached: False if the tensors are as large as the files, so that a cache would gain nothing.
    """

    mask_factor: int | None = None
    cached: bool = True

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """What is encoded and cached on its own. A role that no part reads is not decoded."""

    @abstractmethod
    def encode(self, inputs: Inputs) -> Batch:
        """Encode the given roles of one example (those of one part, or all) as named tensors without a batch dimension."""

    def caption_tokens(self, caption: str) -> tuple[int, int] | None:
        """(tokens of the caption, most that are read), or None where captions are not read."""
        return None

    def tokens(self, caption: str) -> list[str]:
        """The caption's tokens as text, for people; none where captions are not read as tokens."""
        return []

    @abstractmethod
    def release(self) -> None:
        """Free what only encoding needs."""


class ImageTextEncoder(Encoder):
    """An encoder of images with captions, each encoded without the other.

    Attributes:
        image_key: everything that an image's tensors depend on besides its pixels.
        caption_key: likewise for captions; "" where captions are not read.
    """

    image_key: str
    caption_key: str

    @property
    def parts(self) -> tuple[Part, ...]:
        """The image, and its caption where captions are read."""
        captions = (Part(("caption",), self.caption_key),) if self.caption_key else ()
        return Part(("target",), self.image_key), *captions

    def encode(self, inputs: Inputs) -> Batch:
        """Encode the image, the caption, or both."""
        found: Batch = {}
        if isinstance(pixels := inputs.get("target"), Tensor):
            found |= self.encode_image(pixels)
        if isinstance(caption := inputs.get("caption"), str):
            found |= self.encode_caption(caption)
        return found

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Batch:
        """One image, [3, H, W] float32 in [-1, 1] → named tensors without a batch dimension."""

    @abstractmethod
    def encode_caption(self, caption: str) -> Batch:
        """One caption → named tensors without a batch dimension."""


def stack(examples: Sequence[Batch]) -> Batch:
    """Join examples along a new first dimension.

    Tensors of several lengths are padded with zeros to the longest; `NAME.lengths`, [B] int64, holds their lengths.
    """
    found: Batch = {}
    for key in examples[0]:
        tensors = [example[key] for example in examples]
        lengths = [len(tensor) if tensor.dim() else 1 for tensor in tensors]
        if len(set(lengths)) > 1:
            found[f"{key}.lengths"] = torch.tensor(lengths)
            found[key] = pad_sequence(tensors, batch_first=True)
        else:
            found[key] = torch.stack(tensors)
    return found
