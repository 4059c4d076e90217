"""The `net` section of R3GAN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.nets.gan import Adversarial
from finetune.config.yaml_reader import number
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
    objective: Literal["logistic", "hinge", "wasserstein", "relativistic"] = "relativistic"
    width: int = number(32, minimum=4)  # channels at full size; twice as many after each halving, eight times at most
    halvings: int = number(3, minimum=1)  # times that the sides are halved, down to where the generator begins
    blocks: int = number(2, minimum=1)  # residual blocks at each size
    expansion: int = number(2, minimum=1)  # channels inside a block, in multiples of those outside
    group_width: int = number(16, minimum=1)  # channels that the middle convolution of a block takes together, at most
