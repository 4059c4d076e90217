"""The autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752): diffusers' AutoencoderKL.

A VAE (Kingma & Welling, arXiv:1312.6114) with a small KL weight: q(z|x) = N(μ, σ²), and the loss of an image is mean |x
− x̂| (or squared) + kl_weight · mean over latent elements of ½(μ² + σ² − 1 − log σ²), optionally with extra weights on
color and on coarse structure. As the terms are means, kl_weight is β of a β-VAE times (latent elements / image
elements), up to the likelihood's scale.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from finetune.config.schema import Autoencoder
from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch, Encoder, ImageTextEncoder
from finetune.data.decoding import to_tensor
from finetune.data.example import Example
from finetune.data.media.image import ImageSample, apply, decode
from finetune.data.media.sample import Sample
from finetune.models.base import Model, SampleRequest, TrainStep, check_sizes
from finetune.models.pretrained import loading
from finetune.planning import Plan
from finetune.rng import Draw, mix

SCALE_IMAGES = 512  # images over which the standard deviation of the latents is measured


class Reconstruction(nn.Module):
    """Pixels [B, 3, H, W] and noise [B, C, h, w] → reconstruction, mean, log-variance."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.mean, posterior.logvar


class VaeStep(TrainStep):
    """Trains an AutoencoderKL."""

    name = "autoencoder"

    def __init__(self, vae: AutoencoderKL, loss: Autoencoder) -> None:
        self.net = Reconstruction(vae)
        self._loss = loss
        self._channels, self._factor = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Reconstruction error (optionally also of averaged pixels) + kl_weight · KL, [B] float32."""
        pixels = batch["pixels"].float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        latent_shape = (self._channels, pixels.shape[2] // self._factor, pixels.shape[3] // self._factor)
        reconstruction, mean, logvar = self.net(pixels, draw.normal("posterior", latent_shape))
        difference = reconstruction.float() - pixels
        error = self._error(difference)
        if self._loss.coarse_weight:
            error = error + self._loss.coarse_weight * self._error(functional.avg_pool2d(difference, self._factor))
        mean, logvar = mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        result: Tensor = error + self._loss.kl_weight * kl.flatten(1).mean(1)
        return result

    def _error(self, difference: Tensor) -> Tensor:
        """The error of a difference [B, 3, H, W], [B].

        Most of an image's variance is along the gray axis, so color is learned late. `color_weight` increases the
        weight of the difference without its gray component.
        """
        color = difference - difference.mean(1, keepdim=True)
        of_all, of_color = (
            (d.abs() if self._loss.reconstruction == "l1" else d.square()).flatten(1).mean(1)
            for d in (difference, color)
        )
        return of_all + (self._loss.color_weight - 1) * of_color


class Pixels(ImageTextEncoder):
    """Encodes images as 8-bit pixels and ignores captions."""

    image_key, caption_key, cached = "pixels", "", False

    def encode_image(self, pixels: Tensor) -> Batch:
        return {"pixels": pixels.add(1).mul(127.5).round().to(torch.uint8)}

    def encode_caption(self, caption: str) -> Batch:
        return {}

    def release(self) -> None:
        """Do nothing: there is no model to release."""


class Vae(Model):
    """An AutoencoderKL trained from scratch."""

    def __init__(self, plan: Plan, audit: Audit) -> None:
        torch.manual_seed(plan.recipe.train.seed)
        build = loading.checked(AutoencoderKL, plan.recipe.model.build, "model.build")
        self.vae = AutoencoderKL(**build).to(memory_format=torch.channels_last)
        self._audit = audit
        check_sizes(plan, 2 ** (len(self.vae.config.block_out_channels) - 1))
        self._steps = (VaeStep(self.vae, plan.recipe.autoencoder or Autoencoder()),)

    def train_steps(self) -> tuple[TrainStep, ...]:
        return self._steps

    def encoder(self) -> Encoder:
        return Pixels()

    def _pixels(self, image: Example) -> Tensor:
        """The encoder's input for an image, [1, 3, H, W]."""
        pixels = numpy.asarray(apply(decode(image.read(), self._audit.background), image.crop))
        return to_tensor(pixels)[None].to(self.vae.device)

    @torch.no_grad()
    def sample(self, request: SampleRequest) -> list[Sample]:
        """For each seed, a training image above its reconstruction from the mean latent."""
        training = self._audit.training
        result: list[Sample] = []
        for seed in request.seeds:
            pixels = self._pixels(training[mix(seed, "sample") % len(training)])
            rebuilt = self.vae.decode(self.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
            pair = torch.cat([pixels, rebuilt], dim=2)[0].add(1).mul(127.5).round().to(torch.uint8)
            result.append(ImageSample(Image.fromarray(pair.permute(1, 2, 0).cpu().numpy())))
        return result

    @torch.no_grad()
    def save(self, folder: Path) -> list[Path]:
        """Write the AutoencoderKL with `scaling_factor` = 1 / the latents' measured standard deviation."""
        records = self._audit.training[:: max(1, len(self._audit.training) // SCALE_IMAGES)][:SCALE_IMAGES]
        latents = [self.vae.encode(self._pixels(image)).latent_dist.mode().flatten() for image in records]
        self.vae.register_to_config(scaling_factor=round(1 / float(torch.cat(latents).std()), 5))
        self.vae.save_pretrained(folder)
        return [folder / "config.json", folder / "diffusion_pytorch_model.safetensors"]


def build(plan: Plan, audit: Audit) -> Model:
    """Build the autoencoder with random weights from the run's seed."""
    return Vae(plan, audit)
