"""Latent diffusion (Rombach et al. 2022, arXiv:2112.10752), unconditional or class-conditional; for captions, see `sd`.

`model.vae` names the run of the autoencoder, which is frozen and saved with the model. Mean latents are normalized per
channel to mean 0 and standard deviation 1, measured over the run's own images.
"""

from __future__ import annotations

from typing import Any, final

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from finetune.config import nets
from finetune.config.nets.latent_diffusion import Net
from finetune.config.schema import Diffusion
from finetune.data.audit.audit import Audit
from finetune.errors import UserError
from finetune.models.base import Model
from finetune.models.objectives.noise_paths import VariancePreserving
from finetune.models.pretrained import loading
from finetune.models.scratch.base import PixelModel, Space, initialize, space_of
from finetune.models.scratch.blocks import halved
from finetune.models.scratch.diffusion.base import Canvas, DiffusionModel
from finetune.planning import Plan

MEASURED = 256  # images over which mean and standard deviation of the latents are measured


@final
class Latents(nn.Module):
    """Pixels in [-1, 1] ↔ normalized latents: (the autoencoder's latents − `mean`) / `deviation`."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        for name, start in (("mean", 0.0), ("deviation", 1.0)):
            self.register_buffer(name, torch.full((vae.config.latent_channels, 1, 1), start))

    def encode(self, pixels: Tensor) -> Tensor:
        result: Tensor = (self.vae.encode(pixels).latent_dist.mode() - self.mean) / self.deviation
        return result

    def decode(self, latents: Tensor) -> Tensor:
        result: Tensor = self.vae.decode(latents * self.deviation + self.mean).sample
        return result

    def measure(self, pixels: Tensor) -> None:
        """Set `mean` and `deviation` from images."""
        raw = self.encode(pixels) * self.deviation + self.mean
        self.mean.copy_(raw.mean((0, 2, 3)).view_as(self.mean))
        self.deviation.copy_(raw.std((0, 2, 3)).view_as(self.mean))


@final
class LatentCanvas(Canvas):
    """Normalized latents, which have no bounds to clamp to."""

    def __init__(self, space: Space, latents: Latents) -> None:
        config = latents.vae.config
        if config.in_channels != space.channels:
            raise UserError(
                f"the autoencoder has {config.in_channels} input channels, but the images have {space.channels}",
                where="data.grayscale",
                remedy=f"set data.grayscale: {'true' if config.in_channels == 1 else 'false'}",
            )
        sides = halved(
            space.height,
            space.width,
            len(config.block_out_channels) - 1,
            "model.vae",
            "use an autoencoder with fewer downsampling steps",
        )
        self.shape = (config.latent_channels, *sides)
        self._space, self._latents = space, latents

    @torch.no_grad()
    def encode(self, levels: Tensor) -> Tensor:
        return self._latents.encode(self._space.scaled(levels))

    @torch.no_grad()
    def decode(self, numbers: Tensor) -> Tensor:
        return self._space.quantized(self._latents.decode(numbers))

    def clamp(self, numbers: Tensor) -> Tensor:
        return numbers


@final
class LatentDiffusion(DiffusionModel):
    """A denoiser of latents, together with the frozen autoencoder."""

    def __init__(self, space: Space, section: Net, vae: AutoencoderKL, loss: Diffusion | None = None) -> None:
        self._latents = Latents(vae.float())
        path = VariancePreserving(section.timesteps, section.schedule, section.prediction, loss)
        super().__init__(
            space, section, path, section.variance, canvas=LatentCanvas(space, self._latents), first=self._latents
        )

    @torch.no_grad()
    def start(self) -> None:
        self._latents.measure(self.space.scaled(self.examples(MEASURED)["pixels"]))

    def parts(self) -> dict[str, Any]:
        config = self._latents.vae.config
        return {"first": {key: value for key, value in config.items() if not key.startswith("_")}}


def build(plan: Plan, audit: Audit) -> Model:
    """Build the model on the autoencoder that `model.vae` names.

    Raises:
        UserError: there is no autoencoder, or it does not fit.
    """
    space, recipe = space_of(plan, audit), plan.recipe
    if recipe.model.vae is None:
        raise UserError(
            "latent diffusion needs an autoencoder",
            where="model.vae",
            remedy="train scratch/emoji-vae first and set model.vae to its folder",
        )
    vae = loading.open_vae(recipe.model.vae)
    return initialize(plan, audit, lambda: LatentDiffusion(space, recipe.net, vae, recipe.diffusion))


def restore(space: Space, section: nets.Section, config: dict[str, Any]) -> PixelModel:
    """Build the model of a saved configuration."""
    assert isinstance(section, Net)
    return LatentDiffusion(space, section, AutoencoderKL(**config["first"]))
