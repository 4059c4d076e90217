"""The `net` section of flow matching in pixel space."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets.unet import UNet
from finetune.config.yaml_reader import number
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="flow-matching",
    title="Flow matching (rectified flow)",
    implementation="finetune.models.scratch.diffusion.flow_matching",
    aliases=("rectifiedflow",),
    tasks=("unconditional", "class-conditional"),
    paper="2210.02747",
)


@dataclass(frozen=True)
class Net(UNet):
    sampler = "euler"
    shift: float = number(1.0, above=0)  # above 1 more noise is seen, in training and in drawing: for large images

    @property
    def loss(self) -> str:
        return "squared error in the velocity ε − x₀"
