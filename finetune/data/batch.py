"""`Batch` and `Encoders`: what the data side passes to a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    pass


Batch = dict[str, Tensor]


class Encoders(ABC):
    """What turns images and captions into the tensors that the step reads; run once, cached, then released."""

    image_key: str  # all that an image's tensors depend on besides its pixels: weights, precision
    caption_key: str  # likewise for captions; "" where captions are not read
    mask_factor: int | None = (
        None  # image pixels, along one side, of a place that has a loss; none: masks mean nothing to the family
    )
    cached: bool = True  # False: the tensors are as large as the images, keeping them gains nothing

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Batch:
        """One image, [3, H, W] float32 in [-1, 1] → named tensors without a batch dimension."""

    @abstractmethod
    def encode_caption(self, caption: str) -> Batch:
        """One caption → named tensors without a batch dimension."""

    def caption_tokens(self, caption: str) -> tuple[int, int] | None:
        """(tokens of the caption, most that are read), or None where captions are not read."""
        return None

    def tokens(self, caption: str) -> list[str]:
        """The caption's tokens as text, for people; none where captions are not read as tokens."""
        return []

    @abstractmethod
    def release(self) -> None:
        """Free what only encoding needs."""


def stack(examples: Sequence[Batch]) -> Batch:
    """Join examples along a new first dimension.

    Tensors of several lengths are filled up with zeros to the longest, and `NAME.lengths`, [B] int64, says what they were.
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
