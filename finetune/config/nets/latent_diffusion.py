"""The `net` section of latent diffusion from scratch, without text conditions."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets.ddpm import Net as Ddpm
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="latent-diffusion",
    title="Latent diffusion without text",
    objective="noise",
    implementation="finetune.models.scratch.diffusion.latent_diffusion",
    aliases=("latentdiffusion",),
    tasks=("unconditional", "class-conditional"),
    paper="2112.10752",
)


@dataclass(frozen=True)
class Net(Ddpm):
    """Keys of the `net` section of Latent diffusion without text."""

    @property
    def loss(self) -> str:
        return f"{super().loss}, on latents"
