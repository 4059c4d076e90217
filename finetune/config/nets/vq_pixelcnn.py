"""The `net` section of a PixelCNN over a first stage's codes."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets.transformer import Stack
from finetune.config.yaml_reader import number


@dataclass(frozen=True)
class Net(Stack):
    kind = "autoregressive"
    embedding_dim: int = number(16, minimum=1)  # numbers that a code is read as

    @property
    def loss(self) -> str:
        return "−log p of the codes in nats an image"
