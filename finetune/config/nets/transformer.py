"""Keys that the `net` sections of causal convolutional networks share."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.fields import field
from finetune.config.nets import Section


@dataclass(frozen=True)
class Stack(Section):
    """Keys of PixelCNN++ over pixels and over codes."""

    width: int = field(48, "Channels.", unit="channels", effect="Wider is better and slower.", minimum=4, maximum=8192)
    blocks: int = field(6, "Gated residual blocks on the way down, and as many on the way up.", minimum=1, maximum=1000)
    dilation: int = field(
        1,
        "Dilation of every second block's convolution.",
        effect="Larger sees farther at the same cost.",
        minimum=1,
        maximum=1000,
    )
    dropout: float = field(0.1, "Dropout in the residual blocks.", minimum=0, below=1)

    @property
    def loss(self) -> str:
        return "exact −log p in nats per image"
