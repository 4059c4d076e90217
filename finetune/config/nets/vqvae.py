"""The `net` section of the vector-quantized autoencoder, with or without VQ-GAN's discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.fields import MAX_COUNT, field
from finetune.config.nets import Section
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="vqvae",
    title="VQ-VAE, VQGAN",
    implementation="finetune.models.scratch.vq.vqvae",
    kind="VAE",
    tasks=("unconditional", "class-conditional"),
    paper="1711.00937",
)


@dataclass(frozen=True)
class Net(Section):
    """Keys of the `net` section of VQ-VAE, VQGAN."""

    width: int = field(
        64,
        "Channels at full size; doubled from the first halving on.",
        unit="channels",
        effect="Wider is better and slower.",
        minimum=4,
        maximum=8192,
    )
    halvings: int = field(
        2,
        "How many times the sides are halved; a code stands for a square of 2^halvings pixels.",
        minimum=1,
        maximum=12,
    )
    blocks: int = field(1, "Residual blocks at each size.", minimum=1, maximum=1000)
    dropout: float = field(0.0, "Dropout in the residual blocks.", minimum=0, below=1)
    codebook_size: int = field(256, "Number of codes.", unit="codes", minimum=2, maximum=1_000_000)
    code_dim: int = field(32, "Size of a code's vector.", minimum=1, maximum=65_536)
    beta: float = field(
        0.25,
        "Commitment weight: how strongly the encoder is held to its codes.",
        minimum=0,
        maximum=1_000_000.0,
    )
    revive_after: int = field(
        100,
        "A code unused for so many steps is moved to a poorly represented encoder output.",
        unit="steps",
        minimum=1,
        maximum=MAX_COUNT,
    )
    distribution: Literal["categorical", "logistics"] = field(
        "logistics",
        "Distribution of a pixel given the codes, p(x|codes).",
        choices={"categorical": "a probability for each level", "logistics": "a mixture of logistics"},
    )
    mixtures: int = field(1, "Logistic components per pixel, with `distribution: logistics`.", minimum=1, maximum=1000)
    discriminator_weight: float = field(
        0.0,
        "Weight of a patch discriminator's loss (VQ-GAN, arXiv:2012.09841); 0: no discriminator.",
        effect="Above 0, sharper images.",
        minimum=0,
        maximum=1_000_000.0,
    )

    @property
    def loss(self) -> str:
        weight = self.discriminator_weight
        adversarial = f" + {weight:g} × adversarial loss, scaled to equal gradients" if weight else ""
        return f"−log p(x|codes) in nats + |sg z − e|² + {self.beta:g} |z − sg e|²{adversarial}"
