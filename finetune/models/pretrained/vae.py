"""Images as latents, by the class of the VAE: what its pipeline decodes, scaled as its denoiser reads it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finetune.data.batch import Batch


class Latents(ABC):
    """Args:
    vae: of the pipeline.
    """

    factor: int  # image pixels a latent pixel, along one side

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @abstractmethod
    def encode(self, pixels: Tensor) -> Batch:
        """[1, 3, H, W] in [-1, 1] → the posterior of the scaled latents: `mean` [1, C, h, w], and `deviation` where there is one."""


class Gaussian(Latents):
    """AutoencoderKL: shifted and scaled by one number each."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._shift, self._scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor

    def encode(self, pixels: Tensor) -> Batch:
        posterior = self.vae.encode(pixels).latent_dist
        return {"mean": (posterior.mean - self._shift) * self._scale, "deviation": posterior.std * self._scale}


class Patched(Latents):
    """AutoencoderKLFlux2: 2×2 latent pixels become channels, which are normalized by the statistics of a batch norm."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.factor = 2 * 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, pixels: Tensor) -> Batch:
        posterior = self.vae.encode(pixels).latent_dist
        mean = self.vae.bn.running_mean.view(1, -1, 1, 1)
        deviation = (self.vae.bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps).sqrt()
        return {"mean": (patchify(posterior.mean) - mean) / deviation, "deviation": patchify(posterior.std) / deviation}


class OneFrame(Latents):
    """AutoencoderKLQwenImage: a video VAE given one frame, its channels normalized each by its own numbers."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.factor = 2 ** len(vae.config.temperal_downsample)

    def encode(self, pixels: Tensor) -> Batch:
        posterior = self.vae.encode(pixels[:, :, None]).latent_dist
        mean, deviation = (
            torch.tensor(self.vae.config[key], device=pixels.device).view(1, -1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        return {"mean": (posterior.mean[:, :, 0] - mean) / deviation, "deviation": posterior.std[:, :, 0] / deviation}


class Deterministic(Latents):
    """AutoencoderDC: no posterior, scaled by one number."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.factor = 2 ** (len(vae.config.encoder_block_out_channels) - 1)

    def encode(self, pixels: Tensor) -> Batch:
        return {"mean": self.vae.encode(pixels).latent * self.vae.config.scaling_factor}


BY_CLASS: dict[str, type[Latents]] = {
    "AutoencoderKL": Gaussian,
    "AutoencoderKLFlux2": Patched,
    "AutoencoderKLQwenImage": OneFrame,
    "AutoencoderDC": Deterministic,
}


def latents_of(vae: Any) -> Latents:
    """The conventions of `vae`'s class.

    Raises:
        KeyError: a class that no family here has.
    """
    return BY_CLASS[type(vae).__name__](vae)


def patchify(latents: Tensor) -> Tensor:
    """[B, C, h, w] → [B, 4C, h/2, w/2]: 2×2 pixels become channels, ordered by channel, row, column."""
    batch, channels, height, width = latents.shape
    split = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(batch, 4 * channels, height // 2, width // 2)


def unpatchify(patches: Tensor) -> Tensor:
    """The inverse of `patchify`."""
    batch, channels, height, width = patches.shape
    split = patches.reshape(batch, channels // 4, 2, 2, height, width)
    return split.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels // 4, 2 * height, 2 * width)


def sequence(grid: Tensor) -> Tensor:
    """[B, C, h, w] → [B, h·w, C], row by row."""
    return grid.flatten(2).transpose(1, 2)


def grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `sequence`."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)


@contextlib.contextmanager
def decoded_exactly(vae: Any) -> Iterator[None]:
    """Within, the VAE decodes in its own dtype whatever the latents' and autocast's: as images are encoded."""
    decode = vae.decode

    def exact(latents: Tensor, *arguments: Any, **named: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *arguments, **named)

    vae.decode = exact
    try:
        yield
    finally:
        vae.decode = decode
