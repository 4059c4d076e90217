"""What a net sees in an image, by which images are compared: emoji-net, which comes with the package, or DINOv2.

InceptionV3, whose distances are called FID, cannot be had here: its weights come with torchvision or in formats that run code. DINOv2's
features agree better with people (Stein et al. 2023, arXiv:2306.04675). Every figure bears the name of the net it was taken with.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import final

import numpy
import torch
from huggingface_hub.errors import HFValidationError
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import Dinov2Model

from finetune.data.dataset import to_tensor
from finetune.errors import UserError
from finetune.evaluation import emoji_net
from finetune.training.device import this_machine

EMOJI_NET = "emoji-net"
AT_ONCE = 64


class Extractor(ABC):
    """`name` is what its figures are called after; images are scaled to `side` pixels."""

    name: str
    side: int

    @abstractmethod
    def see(self, pixels: Tensor) -> Tensor:
        """[B, 3, side, side] in [-1, 1] → features [B, D]."""

    @torch.no_grad()
    def features(self, images: Iterable[Image]) -> Tensor:
        """[N, D] float32 on the CPU, of RGB images of any sizes."""
        device, found, images = this_machine().device, [], iter(images)
        while batch := list(itertools.islice(images, AT_ONCE)):
            pixels = torch.cat([self._scaled(to_tensor(numpy.asarray(image.convert("RGB")))) for image in batch])
            found.append(self.see(pixels.to(device)).float().cpu())
        return torch.cat(found)

    def _scaled(self, pixels: Tensor) -> Tensor:
        """[3, H, W] → [1, 3, side, side]; smoothed where it shrinks."""
        if pixels.shape[1:] == (self.side, self.side):
            return pixels[None]
        return functional.interpolate(pixels[None], (self.side, self.side), mode="bicubic", antialias=True).clamp(-1, 1)


@final
class EmojiNet(Extractor):
    """Emoji-net's features, [B, 128] (`emojinet`); it comes with ft."""

    name, side = EMOJI_NET, emoji_net.SIDE

    def __init__(self) -> None:
        self._net = emoji_net.shipped().to(this_machine().device)

    def see(self, pixels: Tensor) -> Tensor:
        return self._net.features(pixels)


@final
class Dinov2(Extractor):
    """The class token of a DINOv2 of the hub or in a folder, by transformers.

    Raises:
        UserError: there is none.
    """

    side = 224
    MEAN, DEVIATION = (
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )  # of ImageNet's colors in [0, 1], as it was trained with

    def __init__(self, given: str) -> None:
        try:
            net = Dinov2Model.from_pretrained(given, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, HFValidationError) as error:
            said = str(error).strip().partition("\n")[0]
            remedy = f"give {EMOJI_NET}, a folder with a DINOv2, or its name on the hub, such as facebook/dinov2-base"
            raise UserError(
                f"{given} is no DINOv2 that can be opened: {said}", where="--features", remedy=remedy
            ) from error
        self.name = f"DINOv2 ({Path(given).name})"
        self._net = net.to(this_machine().device).eval()

    def see(self, pixels: Tensor) -> Tensor:
        mean, deviation = (
            torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.MEAN, self.DEVIATION)
        )
        found: Tensor = self._net(((pixels + 1) / 2 - mean) / deviation).pooler_output
        return found


def extractor(given: str = EMOJI_NET) -> Extractor:
    """By name, or a DINOv2 by its folder or name on the hub."""
    return EmojiNet() if given == EMOJI_NET else Dinov2(given)
