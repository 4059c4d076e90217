"""The variational autoencoder in pixel space (Kingma & Welling 2014, arXiv:1312.6114) and β-VAE (Higgins et al. 2017).

q(z|x) = N(μ, σ²), p(z) = N(0, I), and p(x|z) is a distribution over levels. The loss of an image is −log p(x|z) + β ·
KL in nats, summed over pixels and latent dimensions. With several particles it is the importance-weighted bound (Burda
et al. 2016, arXiv:1509.00519, equation 8) instead.
"""

from __future__ import annotations

import math
from typing import final

import torch
from PIL import Image
from torch import Tensor, nn

from finetune.config.nets.vae import Net
from finetune.data.batch import Batch
from finetune.models.base import SampleRequest, TrainStep
from finetune.models.scratch.base import LikelihoodModel, Space, build_from_scratch, class_embedding, levels_and_classes
from finetune.models.scratch.blocks import downsampling, halved, upsampling
from finetune.models.scratch.distributions import PixelDistribution, pixel_distribution
from finetune.rng import Draw

build = build_from_scratch
SHOWN = 8  # images per row of a grid


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) of each dimension in nats, [B, latent] (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def log_normal(value: Tensor, mean: Tensor | float = 0.0, logvar: Tensor | float = 0.0) -> Tensor:
    """log N(value; mean, e^logvar), elementwise."""
    logvar = torch.as_tensor(logvar)
    return -0.5 * (math.log(2 * math.pi) + logvar + (value - mean).square() * (-logvar).exp())


@final
class Autoencoder(nn.Module):
    """The encoder q(z|x) and the decoder p(x|z), both optionally class-conditional."""

    def __init__(self, space: Space, section: Net, distribution: PixelDistribution) -> None:
        super().__init__()
        self._space, self._small = space, halved(space.height, space.width, section.halvings)
        widths = [section.width] + [2 * section.width] * section.halvings
        features = widths[-1] * self._small[0] * self._small[1]
        self.classes = class_embedding(space, section.latent)
        self.encoder = nn.Sequential(
            *downsampling(space.channels, widths, section.blocks, section.dropout), nn.Flatten()
        )
        self.read = nn.Linear(features + (section.latent if space.classes else 0), 2 * section.latent)
        self.write = nn.Linear(section.latent * (2 if space.classes else 1), features)
        self.decoder = nn.Sequential(*upsampling(widths, distribution.parameters, section.blocks, section.dropout))

    def _with_class(self, features: Tensor, classes: Tensor | None) -> Tensor:
        return features if self.classes is None else torch.cat([features, self.classes(classes)], 1)

    def encode(self, levels: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
        """μ and log σ² of q(z|x), [B, latent] each."""
        features = self.encoder(self._space.scaled(levels))
        mean, logvar = self.read(self._with_class(features, classes)).float().chunk(2, 1)
        return mean, logvar.clamp(-20, 20)

    def decode(self, latent: Tensor, classes: Tensor | None) -> Tensor:
        """Latents [B, latent] → parameters of p(x|z), [B, P, H, W]."""
        result: Tensor = self.decoder(self.write(self._with_class(latent, classes)).unflatten(1, (-1, *self._small)))
        return result

    def forward(self, levels: Tensor, classes: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """With noise [B, K, latent]: latents [B, K, latent], parameters of p(x|z) [B·K, P, H, W], μ, log σ²."""
        mean, logvar = self.encode(levels, classes)
        latent = mean[:, None] + (0.5 * logvar).exp()[:, None] * noise
        repeated = None if classes is None else classes.repeat_interleave(noise.shape[1])
        return latent, self.decode(latent.flatten(0, 1), repeated), mean, logvar


@final
class ElboStep(TrainStep):
    """Trains a VAE with the negative ELBO, or the importance-weighted bound."""

    name = "autoencoder"

    def __init__(self, net: Autoencoder, section: Net, distribution: PixelDistribution) -> None:
        self.net, self._section, self._distribution = net, section, distribution

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        noise = draw.normal("posterior", (self._section.particles, self._section.latent))
        reconstruction, kl, weights = self.terms(*levels_and_classes(batch), noise)
        if self._section.particles > 1:
            return -(weights.logsumexp(1) - math.log(weights.shape[1]))
        return -reconstruction[:, 0] + self._section.beta * kl.sum(1)

    def terms(self, levels: Tensor, classes: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(x|z) [B, K], KL by dimension [B, latent], log p(x, z)/q(z|x) [B, K] in nats; noise [B, K, latent]."""
        latent, parameters, mean, logvar = self.net(levels, classes, noise)
        repeated = levels.repeat_interleave(noise.shape[1], 0)
        reconstruction = (
            self._distribution.log_prob(parameters, repeated).flatten(1).sum(1).unflatten(0, noise.shape[:2])
        )
        log_q = log_normal(latent, mean[:, None], logvar[:, None]).sum(2)
        return reconstruction, gaussian_kl(mean, logvar), reconstruction + log_normal(latent).sum(2) - log_q


@final
class BetaVae(LikelihoodModel):
    """A (β-)VAE in pixel space, with a bound on the likelihood."""

    exact = False

    def __init__(self, space: Space, section: Net) -> None:
        super().__init__(space, section)
        self._distribution = pixel_distribution(section.distribution, space, section.mixtures)
        self.net: Autoencoder = Autoencoder(space, section, self._distribution)
        self._latent, self._step = section.latent, ElboStep(self.net, section, self._distribution)

    def train_steps(self) -> tuple[TrainStep, ...]:
        return (self._step,)

    @torch.no_grad()
    def nats(self, batch: Batch, draw: Draw, particles: int = 1) -> Tensor:
        """An upper bound on −log p(x) of each image, [B]: −ELBO, or with several particles the tighter −IWAE_K.

        It also serves as an anomaly score: unusual images have a high one.
        """
        weights = self._step.terms(*levels_and_classes(batch), draw.normal("posterior", (particles, self._latent)))[2]
        return math.log(particles) - weights.logsumexp(1)

    @torch.no_grad()
    def kl_by_dimension(self, batch: Batch) -> Tensor:
        """Mean KL of each latent dimension over the batch in nats, [latent]; near 0, a dimension is unused."""
        return gaussian_kl(*self.net.encode(*levels_and_classes(batch))).mean(0)

    @torch.no_grad()
    def decoded(self, latent: Tensor, classes: Tensor | None = None) -> Tensor:
        """E[x|z] rounded to levels [B, C, H, W]."""
        if classes is None and self.space.classes:
            classes = torch.full((len(latent),), len(self.space.classes), device=latent.device)
        return self._distribution.mean(self.net.decode(latent, classes))

    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        """E[x|z] for latents from the prior; sampling each pixel from p(x|z) would only add independent noise."""
        return self.decoded(draw.normal("latent", (self._latent,)), classes)

    @torch.no_grad()
    def reconstructions(self, batch: Batch) -> Tensor:
        """Reconstructions of images from their mean latents, levels [B, C, H, W]."""
        levels, classes = levels_and_classes(batch)
        return self.decoded(self.net.encode(levels, classes)[0], classes)

    @torch.no_grad()
    def interpolation(self, batch: Batch, steps: int) -> Tensor:
        """Linear interpolation between the mean latents of the batch's first two images: levels [steps, C, H, W]."""
        mean = self.net.encode(*levels_and_classes(batch))[0]
        return self.decoded(torch.lerp(mean[:1], mean[1:2], torch.linspace(0, 1, steps, device=mean.device)[:, None]))

    @torch.no_grad()
    def arithmetic(self, batch: Batch, have: Batch, lack: Batch) -> Tensor:
        """Latent arithmetic, z + mean z(have) − mean z(lack), for the batch's images: levels [B, C, H, W]."""
        mean, with_it, without = (self.net.encode(*levels_and_classes(one))[0] for one in (batch, have, lack))
        return self.decoded(mean + with_it.mean(0) - without.mean(0))

    def diagnostic_images(self) -> dict[str, Image.Image]:
        """Reconstructions, interpolations, and (with at least two classes) latent arithmetic between two classes."""
        batch = self.examples(2 * SHOWN)
        levels = batch["pixels"]
        result = {
            "reconstruction": self.grid([levels, self.reconstructions(batch)], 2 * SHOWN),
            "interpolation": self.grid(
                [self.interpolation({k: v[i : i + 2] for k, v in batch.items()}, SHOWN) for i in range(0, SHOWN, 2)],
                SHOWN,
            ),
        }
        by_class = self.examples_by_class()
        if len(by_class) >= 2:
            (one, lack), (other, have) = list(by_class.items())[:2]
            result[f"arithmetic {one} to {other}"] = self.grid(
                [lack["pixels"], self.arithmetic(lack, have, lack)], len(lack["pixels"])
            )
        return result


def create(space: Space, section: Net) -> BetaVae:
    return BetaVae(space, section)
