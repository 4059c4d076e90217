"""The `net` section of flow matching in pixel space."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.fields import field
from finetune.config.nets.unet import UNet
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="flow-matching",
    title="Flow matching (rectified flow)",
    objective="flow",
    implementation="finetune.models.scratch.diffusion.flow_matching",
    aliases=("rectifiedflow",),
    tasks=("unconditional", "class-conditional"),
    paper="2210.02747",
)


@dataclass(frozen=True)
class Net(UNet):
    """Keys of the `net` section of Flow matching (rectified flow)."""

    sampler = "euler"
    shift: float = field(
        1.0,
        "Shift of the noise levels, in training and in sampling.",
        effect="Above 1 sees noisier levels: for larger images.",
        above=0,
        maximum=1000.0,
    )

    @property
    def loss(self) -> str:
        return "mean squared error of the velocity ε − x₀"
