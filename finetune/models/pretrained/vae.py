"""Encode images as latents, scaled as the denoiser reads them, for each class of VAE."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from finetune.data.batch import Batch
from finetune.models.pretrained.packing import patchify


class Latents(ABC):
    """Encodes images with one class of VAE. A subclass registers itself for its class.

    Args:
        vae: of the pipeline.
    """

    vae_class: ClassVar[str]  # in diffusers
    by_class: ClassVar[dict[str, type[Latents]]] = {}
    factor: int  # image pixels per latent pixel, along one side

    def __init_subclass__(cls) -> None:
        Latents.by_class[cls.vae_class] = cls

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @abstractmethod
    def encode(self, pixels: Tensor) -> Batch:
        """[1, 3, H, W] in [-1, 1] → posterior of the scaled latents: `mean` [1, C, h, w], maybe `deviation`."""


class Gaussian(Latents):
    """AutoencoderKL: one shift and one scale for all channels."""

    vae_class = "AutoencoderKL"

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._shift, self._scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor

    def encode(self, pixels: Tensor) -> Batch:
        posterior = self.vae.encode(pixels).latent_dist
        return {"mean": (posterior.mean - self._shift) * self._scale, "deviation": posterior.std * self._scale}


class Patched(Latents):
    """AutoencoderKLFlux2: 2×2 latent pixels become channels, which are normalized by the statistics of a batch norm."""

    vae_class = "AutoencoderKLFlux2"

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.factor = 2 * 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, pixels: Tensor) -> Batch:
        posterior = self.vae.encode(pixels).latent_dist
        mean = self.vae.bn.running_mean.view(1, -1, 1, 1)
        deviation = (self.vae.bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps).sqrt()
        return {"mean": (patchify(posterior.mean) - mean) / deviation, "deviation": patchify(posterior.std) / deviation}


class OneFrame(Latents):
    """AutoencoderKLQwenImage: a video VAE that encodes one frame; each channel has its own mean and deviation."""

    vae_class = "AutoencoderKLQwenImage"

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
    """AutoencoderDC: deterministic, one scale for all channels."""

    vae_class = "AutoencoderDC"

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.factor = 2 ** (len(vae.config.encoder_block_out_channels) - 1)

    def encode(self, pixels: Tensor) -> Batch:
        return {"mean": self.vae.encode(pixels).latent * self.vae.config.scaling_factor}


def latents_of(vae: Any) -> Latents:
    """The `Latents` of a VAE, by its class.

    Raises:
        KeyError: no family here has a VAE of this class.
    """
    return Latents.by_class[type(vae).__name__](vae)


@contextlib.contextmanager
def decoded_exactly(vae: Any) -> Iterator[None]:
    """Within, the VAE decodes in its own dtype, as it encodes: whatever the dtype of the latents and of autocast."""
    decode = vae.decode

    def exact(latents: Tensor, *arguments: Any, **named: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *arguments, **named)

    vae.decode = exact
    try:
        yield
    finally:
        vae.decode = decode
