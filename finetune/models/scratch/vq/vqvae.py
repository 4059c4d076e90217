"""The vector-quantized autoencoder (van den Oord et al. 2017, arXiv:1711.00937), and VQ-GAN's critic (Esser et al. 2021).

An image becomes a grid of codes out of a book. The loss of an image, all terms summed over its elements, is
−log p(x|e) + |sg(z) − e|² + β |z − sg(e)|²: β on the encoder's side (equation 3; taming-transformers' first releases had it on
the other). With a critic, hinge losses on patches, weighted so that its gradient and the reconstruction's are alike at the
decoder's last layer (arXiv:2012.09841, equations 5–7; without LPIPS, whose weights are not to be had offline).

The quantizer is written by hand: vector-quantize-pytorch moves its book inside the forward pass by averages, draws from the
global generator when it moves dead codes, has a straight-through gradient that is no identity unless told so, and takes 5 s to import.
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
SHOWN = 16  # images in a grid's row
STARTING_IMAGES = 256  # whose codes the book starts with


def perplexity(indices: Tensor, codes: int) -> Tensor:
    """e to the entropy of how often each code is used: `codes` if all alike, 1 if one alone."""
    shares = torch.bincount(indices.flatten(), minlength=codes).float() / indices.numel()
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy.exp()


@final
class Quantizer(nn.Module):
    """The book. A code that no vector of `revive_after` training steps fell to is moved onto the vector that fits worst."""

    idle: Tensor
    usage: Tensor

    def __init__(self, codes: int, width: int, revive_after: int) -> None:
        super().__init__()
        self.book = nn.Parameter(torch.randn(codes, width))
        self.register_buffer("idle", torch.zeros(codes))  # steps since a code was used
        self.register_buffer("usage", torch.ones(codes))  # how often it was, of late
        self._revive_after = revive_after

    def indices(self, latent: Tensor) -> Tensor:
        """[B, D, h, w] → the nearest code of each place, [B, h, w] int64."""
        flat = latent.detach().movedim(1, -1).flatten(0, -2).float()
        return torch.cdist(flat, self.book.detach()).argmin(1).view(len(latent), *latent.shape[2:])

    def vectors(self, indices: Tensor) -> Tensor:
        """[B, h, w] → [B, D, h, w]."""
        return functional.embedding(indices, self.book).movedim(-1, 1)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, D, h, w] → (the nearest codes, [B, D, h, w], whose gradient is the latent's as it is; |sg z − e|² and |z − sg e|², [B] each)."""
        if self.training:
            self._keep_alive(gathered(latent.detach().movedim(1, -1).flatten(0, -2).float()))
        nearest = self.vectors(self.indices(latent))
        to_book = (latent.detach() - nearest).square().flatten(1).sum(1)
        to_latent = (
            (latent - nearest.detach()).square().flatten(1).sum(1)
        )  # before the straight-through, which has no distance left
        return nearest.detach() + (latent - latent.detach()), to_book, to_latent

    @torch.no_grad()
    def _keep_alive(self, vectors: Tensor) -> None:
        """Count the codes that the vectors [N, D] of all processes fall to, and move the dead."""
        distance, nearest = torch.cdist(vectors, self.book).min(1)
        used = torch.zeros_like(self.usage).index_add_(0, nearest, torch.ones_like(distance))
        self.usage.mul_(0.99).add_(used, alpha=0.01)
        self.idle.add_(1).masked_fill_(used > 0, 0)
        dead = self.idle >= self._revive_after
        worst = vectors[distance.argsort(descending=True)[torch.arange(len(dead), device=dead.device) % len(vectors)]]
        # The n-th dead code takes the n-th worst.
        taken = worst[(dead.cumsum(0) - 1).clamp(min=0)]
        self.book.copy_(torch.where(dead[:, None], taken, self.book))
        self.idle.masked_fill_(dead, 0)


@final
class VqAutoencoder(nn.Module):
    """Levels [B, C, H, W] → codes [B, h, w] → the parameters of p(x|codes)."""

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
        """[B, D, h, w], each place's vector of length √D (Yu et al. 2022, arXiv:2110.04627, §3.2).

        Vectors free to grow run away from a book that follows by small steps, until one code is nearest to all.
        """
        result: Tensor = self.encoder(self._space.scaled(levels))
        return functional.normalize(result, dim=1).mul(math.sqrt(result.shape[1]))

    def codes(self, levels: Tensor) -> Tensor:
        """[B, h, w] int64."""
        return self.quantiser.indices(self.latent(levels))

    def decode(self, vectors: Tensor) -> Tensor:
        """[B, D, h, w] → parameters [B, P, H, W]."""
        result: Tensor = self.decoder(self.read(vectors))
        return result

    def forward(self, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(parameters [B, P, H, W], |sg z − e|² [B], |z − sg e|² [B])."""
        vectors, to_book, to_latent = self.quantiser(self.latent(levels))
        return self.decode(vectors), to_book, to_latent


@final
class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): scaled images [B, C, H, W] → a logit for each patch, [B, 1, h, w]."""

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
    """Reconstruction, book and commitment (equation 3), and with a critic what that takes for true."""

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
        """[B] float32, nats: −log p + the codebook's two terms (arXiv:1711.00937, eq. 3), and a critic's share (arXiv:2012.09841, eq. 7)."""
        levels, _ = levels_and_classes(batch)
        parameters, to_book, to_latent = self.net(levels)
        reconstruction = -self._distribution.log_prob(parameters, levels).flatten(1).sum(1)
        result: Tensor = reconstruction + to_book + self._section.beta * to_latent
        if (
            self._discriminator is None or not result.requires_grad
        ):  # a validation leaves the critic out: it is another each time
            return result
        adversarial = -detached_forward(self._discriminator, self._distribution.expected(parameters)).flatten(1).mean(1)
        result = result + self._section.discriminator_weight * self._balance(reconstruction, adversarial) * adversarial
        return result.float()

    def _balance(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """|∇ reconstruction| ÷ |∇ fooled| at the decoder's last layer (equation 7), []."""
        last = list(self._unwrapped.decoder.parameters())[-2]
        first, second = (
            torch.autograd.grad(part.mean(), last, retain_graph=True)[0].norm()
            for part in (reconstruction, adversarial)
        )
        result: Tensor = first / (second + 1e-4)
        return result.clamp(max=1e4).detach()


@final
class DiscriminatorStep(TrainStep):
    name = "critic"

    def __init__(
        self,
        discriminator: PatchDiscriminator,
        autoencoder: VqAutoencoder,
        space: Space,
        distribution: PixelDistribution,
    ) -> None:
        self.net, self._autoencoder, self._space, self._distribution = discriminator, autoencoder, space, distribution

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Hinge: max(0, 1 − D(x)) + max(0, 1 + D(x̂)), the mean over patches."""
        levels, _ = levels_and_classes(batch)
        with torch.no_grad():
            net = self._autoencoder
            reconstructed = self._distribution.expected(net.decode(net.quantiser.vectors(net.codes(levels))))
        real, fake = self.net(torch.cat([self._space.scaled(levels), reconstructed])).flatten(1).chunk(2)
        return functional.relu(1 - real).mean(1) + functional.relu(1 + fake).mean(1)


@final
class VqVae(PixelModel):
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
        """Begin the book with latents of training images: codes anywhere else would never be nearest."""
        latent = self.net.latent(self.examples(STARTING_IMAGES)["pixels"])
        vectors, book = latent.movedim(1, -1).flatten(0, -2), self.net.quantiser.book
        book.copy_(
            vectors[torch.arange(len(book)) * max(1, len(vectors) // len(book)) % len(vectors)]
            + 1e-3 * torch.randn_like(book)
        )

    @torch.no_grad()
    def reconstruction_nats(self, levels: Tensor) -> Tensor:
        """−log p(x|its codes), [B]: with −log p(codes) of a second stage, a bound on −log p(x)."""
        parameters: Tensor = self.net(levels)[0]
        return -self._distribution.log_prob(parameters, levels).flatten(1).sum(1)

    @torch.no_grad()
    def decoded(self, codes: Tensor) -> Tensor:
        """codes [B, h, w] → E[x|codes], levels [B, C, H, W]."""
        return self._distribution.mean(self.net.decode(self.net.quantiser.vectors(codes)))

    def generate(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor:
        """Of codes drawn each by itself, as often as they are used: what a second stage is better than."""
        cumulative = (self.net.quantiser.usage / self.net.quantiser.usage.sum()).cumsum(0)[:-1].contiguous()
        return self.decoded(torch.searchsorted(cumulative, draw.uniform("codes", self.net.grid)))

    def diagnostic_images(self) -> dict[str, Image.Image]:
        levels = self.examples(SHOWN)["pixels"]
        return {"reconstruction": self.grid([levels, self.decoded(self.net.codes(levels))], SHOWN)}


def create(space: Space, section: Net) -> VqVae:
    return VqVae(space, section)
