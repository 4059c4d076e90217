"""The `net` section of PixelCNN++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.nets.transformer import Stack
from finetune.config.yaml_reader import number


@dataclass(frozen=True)
class Net(Stack):
    kind = "autoregressive"
    distribution: Literal["categorical", "logistics"] = (
        "logistics"  # a probability for each level of a gray, or mixtures of logistics
    )
    mixtures: int = number(10, minimum=1)  # of logistics a pixel
