"""The `net` section of latent diffusion, from scratch and without words."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets.ddpm import Net as Ddpm


@dataclass(frozen=True)
class Net(Ddpm):
    """As that of diffusion in pixel space, at the size of the latents."""

    @property
    def loss(self) -> str:
        return f"{super().loss}, of latents"
