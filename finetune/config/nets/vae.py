"""The `net` section of the variational autoencoder in pixel space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.nets import Section
from finetune.config.yaml_reader import number
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="beta-vae",
    title="VAE, β-VAE",
    implementation="finetune.models.scratch.vae.vae",
    aliases=("betavae",),
    kind="VAE",
    tasks=("unconditional", "class-conditional"),
    paper="1312.6114",
)


@dataclass(frozen=True)
class Net(Section):
    latent: int = number(32, minimum=1)  # numbers that an image is put into
    width: int = number(64, minimum=4)  # channels; twice as many from the first halving on
    halvings: int = number(2, minimum=1)  # times that the sides are halved before the latent is read off
    blocks: int = number(1, minimum=1)  # residual blocks at each size
    dropout: float = number(0.0, minimum=0, below=1)
    beta: float = number(1.0, minimum=0)  # weight of the KL: 1 is the bound on log p(x), more disentangles and blurs
    particles: int = number(1, minimum=1)  # latents an image in training: more than 1 is the importance-weighted bound
    distribution: Literal["categorical", "logistics"] = (
        "logistics"  # p(x|z): free for each level, or mixtures of logistics
    )
    mixtures: int = number(5, minimum=1)  # of logistics a pixel

    @property
    def loss(self) -> str:
        bound = f"IWAE bound of {self.particles} particles" if self.particles > 1 else "ELBO"
        weighted = "" if self.beta == 1 else f", KL × {self.beta:g}"
        return f"−{bound} in nats an image{weighted}"
