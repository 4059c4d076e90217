"""What the `net` sections of nets of causal convolutions share."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets import Section
from finetune.config.yaml_reader import number


@dataclass(frozen=True)
class Stack(Section):
    """What the sections of PixelCNN++ and of its kin over codes hold."""

    width: int = number(48, minimum=4)  # channels
    blocks: int = number(6, minimum=1)  # gated blocks on the way down, and as many on the way up
    dilation: int = number(
        1, minimum=1
    )  # every second block reads so many pixels apart: larger sees farther at the same cost
    dropout: float = number(0.1, minimum=0, below=1)

    @property
    def loss(self) -> str:
        return "−log p in nats an image, exact"
