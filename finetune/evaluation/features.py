"""Feature extractors for `ft eval`: emoji-net, which is bundled, or a DINOv2.

InceptionV3, whose distances are called FID, is not offered: its weights come with torchvision or in formats that can
execute code. DINOv2's features agree better with human judgment (Stein et al. 2023, arXiv:2306.04675). Every result is
labeled with the name of the network that it was computed with.
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

from finetune.data.decoding import to_tensor
from finetune.errors import UserError
from finetune.evaluation import emoji_net
from finetune.training.device import this_machine

EMOJI_NET = "emoji-net"
BATCH = 64


class Extractor(ABC):
    """A network whose features are compared.

    Attributes:
        name: how results are labeled.
        side: images are scaled to this many pixels squared.
    """

    name: str
    side: int

    @abstractmethod
    def extract(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, side, side] in [-1, 1] → features [B, D]."""

    @torch.no_grad()
    def features(self, images: Iterable[Image]) -> Tensor:
        """Features of RGB images of any size, [N, D] float32 on the CPU."""
        device, features, images = this_machine().device, [], iter(images)
        while batch := list(itertools.islice(images, BATCH)):
            pixels = torch.cat([self._scaled(to_tensor(numpy.asarray(image.convert("RGB")))) for image in batch])
            features.append(self.extract(pixels.to(device)).float().cpu())
        return torch.cat(features)

    def _scaled(self, pixels: Tensor) -> Tensor:
        """[3, H, W] → [1, 3, side, side], with antialiasing."""
        if pixels.shape[1:] == (self.side, self.side):
            return pixels[None]
        return functional.interpolate(pixels[None], (self.side, self.side), mode="bicubic", antialias=True).clamp(-1, 1)


@final
class EmojiNet(Extractor):
    """The bundled emoji-net; features [B, 128]."""

    name, side = EMOJI_NET, emoji_net.SIDE

    def __init__(self) -> None:
        self._net = emoji_net.shipped().to(this_machine().device)

    def extract(self, pixels: Tensor) -> Tensor:
        return self._net.features(pixels)


@final
class Dinov2(Extractor):
    """The class token of a DINOv2, loaded by transformers.

    Args:
        source: a folder or a name on the Hugging Face hub.

    Raises:
        UserError: there is no such model.
    """

    side = 224
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colors in [0, 1], as in its training

    def __init__(self, source: str) -> None:
        try:
            net = Dinov2Model.from_pretrained(source, use_safetensors=True)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, HFValidationError) as error:
            reason = str(error).strip().partition("\n")[0]
            remedy = f"use {EMOJI_NET}, a folder with a DINOv2, or a name on the hub such as facebook/dinov2-base"
            raise UserError(
                f"cannot load a DINOv2 from {source}: {reason}", where="--features", remedy=remedy
            ) from error
        self.name = f"DINOv2 ({Path(source).name})"
        self._net = net.to(this_machine().device).eval()

    def extract(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.MEAN, self.STD))
        features: Tensor = self._net(((pixels + 1) / 2 - mean) / std).pooler_output
        return features


def extractor(source: str = EMOJI_NET) -> Extractor:
    """Return emoji-net, or the DINOv2 in a folder or on the hub."""
    return EmojiNet() if source == EMOJI_NET else Dinov2(source)
