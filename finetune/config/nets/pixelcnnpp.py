"""The `net` section of PixelCNN++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.nets.transformer import Stack
from finetune.config.yaml_reader import number
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="pixelcnn++",
    title="PixelCNN++",
    implementation="finetune.models.scratch.autoregressive.pixelcnnpp",
    aliases=("pixelcnnpp",),
    kind="autoregressive",
    tasks=("unconditional", "class-conditional"),
    paper="1701.05517",
)


@dataclass(frozen=True)
class Net(Stack):
    distribution: Literal["categorical", "logistics"] = (
        "logistics"  # a probability for each level of a gray, or mixtures of logistics
    )
    mixtures: int = number(10, minimum=1)  # of logistics a pixel
