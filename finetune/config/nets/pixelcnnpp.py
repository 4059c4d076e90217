"""The `net` section of PixelCNN++."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.fields import field
from finetune.config.nets.transformer import Stack
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
    """Keys of the `net` section of PixelCNN++."""

    distribution: Literal["categorical", "logistics"] = field(
        "logistics",
        "Distribution of a pixel.",
        choices={"categorical": "a probability for each level; grayscale only", "logistics": "a mixture of logistics"},
    )
    mixtures: int = field(10, "Logistic components per pixel, with `distribution: logistics`.", minimum=1, maximum=1000)
