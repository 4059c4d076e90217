"""The vector-quantized autoencoder (van den Oord et al. 2017, arXiv:1711.00937), or VQ-GAN with a discriminator.

An image becomes a grid of codes from a codebook. The loss of an image, with all terms summed over its elements, is −log
p(x|e) + |sg(z) − e|² + β |z − sg(e)|², with β on the encoder's side (equation 3; the first releases of
taming-transformers had it on the other). With a discriminator (Esser et al. 2021), a hinge loss on patches is added,
weighted so that its gradient matches the reconstruction's at the decoder's last layer (arXiv:2012.09841, equations 5–7;
without LPIPS, whose weights need a download).

The quantizer is implemented here because vector-quantize-pytorch updates its codebook inside the forward pass, uses the
global random generator when it replaces dead codes, has a straight-through gradient that is not the identity by
default, and takes 5 s to import.
"""

from __future__ import annotations

import math
from typing import final

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from finetune.config.nets.vqvae import Net
from finetune.data.batch import Batch
from finetune.models.base import SampleRequest, TrainStep, detached_forward, gathered
from finetune.models.scratch.base import PixelModel, Space, build_from_scratch, levels_and_classes
from finetune.models.scratch.blocks import downsampling, halved, upsampling
from finetune.models.scratch.distributions import PixelDistribution, pixel_distribution
from finetune.rng import Draw

build = build_from_scratch
SHOWN = 16  # images per row of a grid
STARTING_IMAGES = 256  # that initialize the codebook


def perplexity(indices: Tensor, codes: int) -> Tensor:
    """The perplexity of code usage: `codes` if all are used equally, 1 if only one is used."""
    shares = torch.bincount(indices.flatten(), minlength=codes).float() / indices.numel()
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy.exp()


@final
class Quantizer(nn.Module):
    """The codebook; a code unused for `revive_after` training steps is moved to the worst-fitting vector.

    Attribute names are stored in checkpoints.
    """

    idle: Tensor
    usage: Tensor

    def __init__(self, codes: int, width: int, revive_after: int) -> None:
        super().__init__()
        self.book = nn.Parameter(torch.randn(codes, width))
        self.register_buffer("idle", torch.zeros(codes))  # steps since each code was used
        self.register_buffer("usage", torch.ones(codes))  # running mean of the usage
        self._revive_after = revive_after

    def indices(self, latent: Tensor) -> Tensor:
        """The nearest code of each latent [B, D, h, w], [B, h, w] int64."""
        flat = latent.detach().movedim(1, -1).flatten(0, -2).float()
        return torch.cdist(flat, self.book.detach()).argmin(1).view(len(latent), *latent.shape[2:])

    def vectors(self, indices: Tensor) -> Tensor:
        """Vectors [B, D, h, w] of codes [B, h, w]."""
        return functional.embedding(indices, self.book).movedim(-1, 1)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize latents [B, D, h, w] with a straight-through gradient; also |sg z − e|² and |z − sg e|² [B]."""
        if self.training:
            self._keep_alive(gathered(latent.detach().movedim(1, -1).flatten(0, -2).float()))
        nearest = self.vectors(self.indices(latent))
        to_book = (latent.detach() - nearest).square().flatten(1).sum(1)
        to_latent = (latent - nearest.detach()).square().flatten(1).sum(1)  # before the straight-through estimator
        return nearest.detach() + (latent - latent.detach()), to_book, to_latent

    @torch.no_grad()
    def _keep_alive(self, vectors: Tensor) -> None:
        """Update the usage of codes by vectors [N, D] of all processes, and replace dead codes."""
        distance, nearest = torch.cdist(vectors, self.book).min(1)
        used = torch.zeros_like(self.usage).index_add_(0, nearest, torch.ones_like(distance))
        self.usage.mul_(0.99).add_(used, alpha=0.01)
        self.idle.add_(1).masked_fill_(used > 0, 0)
        dead = self.idle >= self._revive_after
        worst = vectors[distance.argsort(descending=True)[torch.arange(len(dead), device=dead.device) % len(vectors)]]
        # The n-th dead code gets the n-th worst vector.
        taken = worst[(dead.cumsum(0) - 1).clamp(min=0)]
        self.book.copy_(torch.where(dead[:, None], taken, self.book))
        self.idle.masked_fill_(dead, 0)


@final
class VqAutoencoder(nn.Module):
    """Levels [B, C, H, W] → codes [B, h, w] → parameters of p(x|codes)."""

    def __init__(self, space: Space, section: Net, distribution: PixelDistribution) -> None:
        super().__init__()
        self._space, self.grid = space, halved(space.height, space.width, section.halvings)
        widths = [section.width] + [2 * section.width] * section.halvings
        self.encoder = nn.Sequential(
            *downsampling(space.channels, widths, section.blocks, section.dropout),
            nn.Conv2d(widths[-1], section.code_dim, 1),
        )
        self.quantiser = Quantizer(section.codebook_size, section.code_dim, section.revive_after)
        self.read = nn.Conv2d(section.code_dim, widths[-1], 1)
        self.decoder = nn.Sequential(*upsampling(widths, distribution.parameters, section.blocks, section.dropout))

    def latent(self, levels: Tensor) -> Tensor:
        """Latents [B, D, h, w], normalized to length √D (Yu et al. 2022, arXiv:2110.04627, §3.2).

        Without normalization, latents can grow faster than the codebook follows, until one code is nearest to all.
        """
        result: Tensor = self.encoder(self._space.scaled(levels))
        return functional.normalize(result, dim=1).mul(math.sqrt(result.shape[1]))

    def codes(self, levels: Tensor) -> Tensor:
        """The codes of images, [B, h, w] int64."""
        return self.quantiser.indices(self.latent(levels))

    def decode(self, vectors: Tensor) -> Tensor:
        """Vectors [B, D, h, w] → parameters [B, P, H, W]."""
        result: Tensor = self.decoder(self.read(vectors))
        return result

    def forward(self, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Parameters [B, P, H, W], |sg z − e|² [B] and |z − sg e|² [B]."""
        vectors, to_book, to_latent = self.quantiser(self.latent(levels))
        return self.decode(vectors), to_book, to_latent


@final
class PatchDiscriminator(nn.Module):
    """PatchGAN discriminator (Isola et al. 2017): scaled images [B, C, H, W] → logits of patches [B, 1, h, w]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(
                nn.Conv2d(width, 2 * width, 4, 2, 1),
                nn.GroupNorm(1, 2 * width),
                nn.LeakyReLU(0.2),
                nn.Conv2d(2 * width, 1, 3, padding=1),
            ),
        )

    def forward(self, scaled: Tensor) -> Tensor:
        result: Tensor = self.net(scaled)
        return result


@final
class AutoencoderStep(TrainStep):
    """Trains the autoencoder: reconstruction, codebook and commitment (equation 3), optionally an adversarial loss."""

    name = "autoencoder"

    def __init__(
        self,
        net: VqAutoencoder,
        discriminator: PatchDiscriminator | None,
        section: Net,
        distribution: PixelDistribution,
    ) -> None:
        self.net, self._unwrapped, self._discriminator, self._section, self._distribution = (
            net,
            net,
            discriminator,
            section,
            distribution,
        )

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The loss in nats, [B] float32 (arXiv:1711.00937, eq. 3; adversarial term: arXiv:2012.09841, eq. 7)."""
        levels, _ = levels_and_classes(batch)
        parameters, to_book, to_latent = self.net(levels)
        reconstruction = -self._distribution.log_prob(parameters, levels).flatten(1).sum(1)
        result: Tensor = reconstruction + to_book + self._section.beta * to_latent
        if self._discriminator is None or not result.requires_grad:  # the validation loss excludes the adversarial term
            return result
        adversarial = -detached_forward(self._discriminator, self._distribution.expected(parameters)).flatten(1).mean(1)
        result = result + self._section.discriminator_weight * self._balance(reconstruction, adversarial) * adversarial
        return result.float()

    def _balance(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """The adaptive weight |∇ reconstruction| / |∇ adversarial| at the decoder's last layer (equation 7)."""
        last = list(self._unwrapped.decoder.parameters())[-2]
        first, second = (
            torch.autograd.grad(part.mean(), last, retain_graph=True)[0].norm()
            for part in (reconstruction, adversarial)
        )
        result: Tensor = first / (second + 1e-4)
        return result.clamp(max=1e4).detach()


@final
class DiscriminatorStep(TrainStep):
    """Trains the discriminator to tell images from reconstructions."""

    name = "critic"  # as in checkpoints and `metrics.jsonl` of earlier runs

    def __init__(
        self,
        discriminator: PatchDiscriminator,
        autoencoder: VqAutoencoder,
        space: Space,
        distribution: PixelDistribution,
    ) -> None:
        self.net, self._autoencoder, self._space, self._distribution = discriminator, autoencoder, space, distribution

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The hinge loss max(0, 1 − D(x)) + max(0, 1 + D(x̂)), averaged over patches, [B]."""
        levels, _ = levels_and_classes(batch)
        with torch.no_grad():
            net = self._autoencoder
            reconstructed = self._distribution.expected(net.decode(net.quantiser.vectors(net.codes(levels))))
        real, fake = self.net(torch.cat([self._space.scaled(levels), reconstructed])).flatten(1).chunk(2)
        return functional.relu(1 - real).mean(1) + functional.relu(1 + fake).mean(1)


@final
class VqVae(PixelModel):
    """A VQ-VAE, or a VQ-GAN if `net.discriminator_weight` is set."""

    def __init__(self, space: Space, section: Net) -> None:
        super().__init__(space, section)
        self._distribution = pixel_distribution(section.distribution, space, section.mixtures)
        self.net: VqAutoencoder = VqAutoencoder(space, section, self._distribution)
        discriminator = PatchDiscriminator(space.channels, section.width) if section.discriminator_weight else None
        self._steps: tuple[TrainStep, ...] = (AutoencoderStep(self.net, discriminator, section, self._distribution),)
        if discriminator is not None:
            self._steps += (DiscriminatorStep(discriminator, self.net, space, self._distribution),)

    def train_steps(self) -> tuple[TrainStep, ...]:
        return self._steps

    @torch.no_grad()
    def start(self) -> None:
        """Initialize the codebook with latents of training images: other codes would never be the nearest."""
        latent = self.net.latent(self.examples(STARTING_IMAGES)["pixels"])
        vectors, book = latent.movedim(1, -1).flatten(0, -2), self.net.quantiser.book
        book.copy_(
            vectors[torch.arange(len(book)) * max(1, len(vectors) // len(book)) % len(vectors)]
            + 1e-3 * torch.randn_like(book)
        )

    @torch.no_grad()
    def reconstruction_nats(self, levels: Tensor) -> Tensor:
        """−log p(x|codes), [B]; plus −log p(codes) of a second stage, it bounds −log p(x)."""
        parameters: Tensor = self.net(levels)[0]
        return -self._distribution.log_prob(parameters, levels).flatten(1).sum(1)

    @torch.no_grad()
    def decoded(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] → E[x|codes], levels [B, C, H, W]."""
        return self._distribution.mean(self.net.decode(self.net.quantiser.vectors(codes)))

    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        """Generate images from independent codes by their usage: the baseline for a second stage."""
        cumulative = (self.net.quantiser.usage / self.net.quantiser.usage.sum()).cumsum(0)[:-1].contiguous()
        return self.decoded(torch.searchsorted(cumulative, draw.uniform("codes", self.net.grid)))

    def diagnostic_images(self) -> dict[str, Image.Image]:
        levels = self.examples(SHOWN)["pixels"]
        return {"reconstruction": self.grid([levels, self.decoded(self.net.codes(levels))], SHOWN)}


def create(space: Space, section: Net) -> VqVae:
    return VqVae(space, section)
