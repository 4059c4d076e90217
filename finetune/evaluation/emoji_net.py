"""emoji-net: the small net by whose features `ft eval` compares images where no large one's weights are at hand.

It was trained by `tools/build_emoji_net.py` on the bundled emoji at 32 pixels, to tell which emoji an image shows, whoever drew it,
who drew it, and how it was damaged. Figures taken with it compare runs with one another, and with no published FID: that is InceptionV3's.
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
    """[B, 3, side, side] in [-1, 1] → unit embedding of what is drawn [B, 128]."""

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
        """What the last convolution finds, averaged over the image, [B, 128]."""
        found: Tensor = self.body(pixels).mean((2, 3))
        return found


def shipped() -> EmojiNet:
    """The net with the weights that come with the package, in float32."""
    net = EmojiNet()
    net.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return net.eval().requires_grad_(False)
