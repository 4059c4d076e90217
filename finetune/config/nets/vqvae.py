"""The `net` section of the vector-quantized autoencoder, with or without VQ-GAN's critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.nets import Section
from finetune.config.yaml_reader import number
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
    width: int = number(64, minimum=4)  # channels; twice as many from the first halving on
    halvings: int = number(2, minimum=1)  # a code stands for a square of 2^halvings pixels
    blocks: int = number(1, minimum=1)  # residual blocks at each size
    dropout: float = number(0.0, minimum=0, below=1)
    codebook_size: int = number(256, minimum=2)  # in the book
    code_dim: int = number(32, minimum=1)  # numbers of a code
    beta: float = number(0.25, minimum=0)  # how strongly the encoder is held to its codes
    revive_after: int = number(100, minimum=1)  # steps unused after which a code is moved to where one is missed
    distribution: Literal["categorical", "logistics"] = (
        "logistics"  # p(x|codes): free for each level, or mixtures of logistics
    )
    mixtures: int = number(1, minimum=1)  # of logistics a pixel
    discriminator_weight: float = number(
        0.0, minimum=0
    )  # weight of a critic that wants sharp images (VQ-GAN); 0: there is none

    @property
    def loss(self) -> str:
        critic = (
            f" + {self.discriminator_weight:g} × a critic's, scaled to equal gradients"
            if self.discriminator_weight
            else ""
        )
        return f"−log p(x|codes) in nats + |sg z − e|² + {self.beta:g} |z − sg e|²{critic}"
