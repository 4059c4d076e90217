"""The `net` section of R3GAN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.fields import field, replaced
from finetune.config.nets.gan import Adversarial
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="r3gan",
    title="R3GAN",
    implementation="finetune.models.scratch.gan.r3gan",
    kind="GAN",
    tasks=("unconditional", "class-conditional"),
    paper="2501.05441",
)


@dataclass(frozen=True)
class Net(Adversarial):
    """Keys of the `net` section of R3GAN."""

    objective: Literal["logistic", "hinge", "wasserstein", "relativistic"] = replaced(
        Adversarial, "objective", "relativistic"
    )
    width: int = field(
        32,
        "Channels at full size; doubled by each halving, at most 8 times the width.",
        unit="channels",
        effect="Wider is better and slower.",
        minimum=4,
        maximum=8192,
    )
    halvings: int = field(
        3, "How many times the sides are halved, down to the size the generator starts from.", minimum=1, maximum=12
    )
    blocks: int = field(2, "Residual blocks at each size.", minimum=1, maximum=1000)
    expansion: int = field(2, "Channels inside a block, as a multiple of those outside.", minimum=1, maximum=100)
    group_width: int = field(
        16,
        "Largest number of channels in a group of a block's grouped convolution.",
        unit="channels",
        minimum=1,
        maximum=8192,
    )
