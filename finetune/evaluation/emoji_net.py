"""emoji-net, the small bundled network whose features `ft eval` compares by default.

`tools/build_emoji_net.py` trained it on the bundled emoji at 32 pixels to recognize which emoji an image shows in which
font, and how it was corrupted. Its distances compare runs with one another. They are not comparable with published FID
values, which use InceptionV3.
"""

from __future__ import annotations

from itertools import pairwise
from typing import final

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from finetune.paths import ASSETS

SIDE = 32
WEIGHTS = ASSETS / "emoji-net" / "model.safetensors"


@final
class EmojiNet(nn.Module):
    """A convolutional network: pixels [B, 3, side, side] in [-1, 1] → unit-length embedding of the content [B, 128]."""

    WIDTHS = (3, 32, 64, 96, 128)

    def __init__(self, side: int = SIDE) -> None:
        super().__init__()
        blocks = [
            layer
            for before, after in pairwise(self.WIDTHS)
            for convolution in (nn.Conv2d(before, after, 3, 2, 1), nn.Conv2d(after, after, 3, 1, 1))
            for layer in (convolution, nn.GroupNorm(8, after), nn.SiLU())
        ]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(self.WIDTHS[-1] * (side // 16) ** 2, 128))

    def forward(self, pixels: Tensor) -> Tensor:
        return functional.normalize(self.head(self.body(pixels)), dim=1)

    def features(self, pixels: Tensor) -> Tensor:
        """The output of the last convolution averaged over the image, [B, 128]."""
        features: Tensor = self.body(pixels).mean((2, 3))
        return features


def shipped() -> EmojiNet:
    """Load the bundled weights, in float32."""
    net = EmojiNet()
    net.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return net.eval().requires_grad_(False)
