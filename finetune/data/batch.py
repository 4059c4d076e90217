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
        key: identifies everything else that the tensors depend on: weights, precision.
    """

    roles: tuple[str, ...]
    key: str


class Encoder(ABC):
    """Turns examples into the tensors that a train step reads; runs once, is cached, then released.

    Attributes:
        mask_factor: image pixels per loss position along one side; None if the family does not support masks.
        cached: False if the tensors are as large as the files, so that caching would not help.
    """

    mask_factor: int | None = None
    cached: bool = True

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """The parts that are encoded and cached separately. A role that no part reads is not decoded."""

    @abstractmethod
    def encode(self, inputs: Inputs) -> Batch:
        """Encode the given roles of one example as named tensors without a batch dimension.

        Args:
            inputs: the roles of one part, or of all parts.
        """

    def caption_tokens(self, caption: str) -> tuple[int, int] | None:
        """(tokens in the caption, maximum that the model reads); None if the model reads no captions."""
        return None

    def tokens(self, caption: str) -> list[str]:
        """The caption's tokens as readable text; empty if the model does not read captions as tokens."""
        return []

    @abstractmethod
    def release(self) -> None:
        """Free the memory that only encoding needs."""


class ImageTextEncoder(Encoder):
    """An encoder that encodes images and captions independently.

    Attributes:
        image_key: identifies everything besides the pixels that an image's tensors depend on.
        caption_key: the same for captions; "" if captions are not read.
    """

    image_key: str
    caption_key: str

    @property
    def parts(self) -> tuple[Part, ...]:
        """The image and, if captions are read, its caption."""
        captions = (Part(("caption",), self.caption_key),) if self.caption_key else ()
        return Part(("target",), self.image_key), *captions

    def encode(self, inputs: Inputs) -> Batch:
        """Encode the image, the caption, or both."""
        encoded: Batch = {}
        if isinstance(pixels := inputs.get("target"), Tensor):
            encoded |= self.encode_image(pixels)
        if isinstance(caption := inputs.get("caption"), str):
            encoded |= self.encode_caption(caption)
        return encoded

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Batch:
        """Encode one image, [3, H, W] float32 in [-1, 1], as named tensors without a batch dimension."""

    @abstractmethod
    def encode_caption(self, caption: str) -> Batch:
        """Encode one caption as named tensors without a batch dimension."""


def stack(examples: Sequence[Batch]) -> Batch:
    """Stack examples along a new first dimension.

    Tensors of different lengths are zero-padded to the longest; `NAME.lengths`, [B] int64, holds their lengths.
    """
    batch: Batch = {}
    for key in examples[0]:
        tensors = [example[key] for example in examples]
        lengths = [len(tensor) if tensor.dim() else 1 for tensor in tensors]
        if len(set(lengths)) > 1:
            batch[f"{key}.lengths"] = torch.tensor(lengths)
            batch[key] = pad_sequence(tensors, batch_first=True)
        else:
            batch[key] = torch.stack(tensors)
    return batch
