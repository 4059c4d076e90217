"""The `net` section of the variational autoencoder in pixel space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.fields import field
from finetune.config.nets import Section
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
    """Keys of the `net` section of VAE, β-VAE."""

    latent: int = field(32, "Size of the latent vector.", minimum=1, maximum=65_536)
    width: int = field(
        64,
        "Channels at full size; doubled from the first halving on.",
        unit="channels",
        effect="Wider is better and slower.",
        minimum=4,
        maximum=8192,
    )
    halvings: int = field(2, "How many times the sides are halved before the latent.", minimum=1, maximum=12)
    blocks: int = field(1, "Residual blocks at each size.", minimum=1, maximum=1000)
    dropout: float = field(0.0, "Dropout in the residual blocks.", minimum=0, below=1)
    beta: float = field(
        1.0,
        "Weight of the KL divergence; 1 gives the ELBO, a bound on log p(x).",
        effect="Higher disentangles and blurs.",
        minimum=0,
        maximum=1_000_000.0,
    )
    particles: int = field(
        1,
        "Latent samples per image in training; more than 1 gives the importance-weighted bound (arXiv:1509.00519).",
        minimum=1,
        maximum=10_000,
    )
    distribution: Literal["categorical", "logistics"] = field(
        "logistics",
        "Distribution of a pixel given the latent, p(x|z).",
        choices={"categorical": "a probability for each level", "logistics": "a mixture of logistics"},
    )
    mixtures: int = field(5, "Logistic components per pixel, with `distribution: logistics`.", minimum=1, maximum=1000)

    @property
    def loss(self) -> str:
        bound = f"IWAE bound of {self.particles} particles" if self.particles > 1 else "ELBO"
        weighted = "" if self.beta == 1 else f", KL × {self.beta:g}"
        return f"−{bound} in nats per image{weighted}"
