"""The `net` section of convolutional GANs: DCGAN, WGAN-GP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.fields import MAX_COUNT, field
from finetune.config.nets.gan import Adversarial
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
    """Keys of the `net` section of DCGAN, WGAN-GP."""

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
    generator_norm: Literal["batch", "pixel", "none"] = field(
        "batch",
        "Normalization in the generator.",
        choices={"batch": "batch normalization", "pixel": "each pixel's own norm (arXiv:1710.10196)", "none": "none"},
    )
    discriminator_norm: Literal["batch", "spectral", "none"] = field(
        "batch",
        "Normalization in the discriminator.",
        choices={
            "batch": "batch normalization",
            "spectral": "spectral normalization: each layer is 1-Lipschitz (arXiv:1802.05957)",
            "none": "none",
        },
    )
    grow_steps: int = field(
        0,
        "Progressive growing: steps at each size, and as many to fade in the next; 0: full size from the start.",
        unit="steps",
        minimum=0,
        maximum=MAX_COUNT,
    )
