"""The `net` section of a GAN of plain convolutions: DCGAN, WGAN-GP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.nets.gan import Adversarial
from finetune.config.yaml_reader import number
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="dcgan",
    title="DCGAN, WGAN-GP",
    implementation="finetune.models.scratch.gan.dcgan",
    kind="GAN",
    tasks=("unconditional", "class-conditional"),
    paper="1511.06434",
)


@dataclass(frozen=True)
class Net(Adversarial):
    width: int = number(32, minimum=4)  # channels at full size; twice as many after each halving, eight times at most
    halvings: int = number(3, minimum=1)  # times that the sides are halved, down to where the generator begins
    generator_norm: Literal["batch", "pixel", "none"] = "batch"  # pixel: by each pixel's own length (arXiv:1710.10196)
    discriminator_norm: Literal["batch", "spectral", "none"] = (
        "batch"  # spectral: no layer stretches more than once (arXiv:1802.05957)
    )
    grow_steps: int = number(
        0, minimum=0
    )  # progressive growing: so many steps at a size, and as many to blend in the next; 0: full size at once
