"""What a recipe does to a loaded pipeline so that it takes less memory: quantized or waiting weights, a VAE that works in tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finetune.config.memory_options import TILE
from finetune.config.schema import Model, Recipe
from finetune.errors import UserError
from finetune.memory.offload import offload_blocks
from finetune.memory.quantization import quantize


def quantize_base(denoiser: nn.Module, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> None:
    """Before adapters are put on. Where samples will be drawn, the whole weights are kept for them."""
    kind = recipe.model.quantize
    if kind is not None and not quantize(denoiser, kind, dtype, device, keep_whole=bool(recipe.sample.prompts)):
        problem = f"{type(denoiser).__name__} has no linear layer large enough to quantize"
        raise UserError(problem, where="model.quantize", remedy="remove it: nothing would be saved")


def offload_base(denoiser: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """After adapters are put on: they stay on the device."""
    if recipe.train.offload_blocks:
        offload_blocks(denoiser, device)


def fit_encoders(encoders: dict[str, nn.Module], section: Model, device: torch.device) -> None:
    """Text encoders as they encode."""
    for encoder in encoders.values():
        if section.text_encoder_placement == "offload":
            offload_blocks(encoder, device)
        elif section.text_encoder_placement != "device":
            quantize(encoder, section.text_encoder_placement, next(p.dtype for p in encoder.parameters()), device)


def fit_drawing(pipeline: Any, recipe: Recipe, device: torch.device) -> None:
    """A pipeline that only draws: what was too large for the device in training is so again, and its blocks wait in host memory."""
    tile(pipeline.vae, recipe.model)
    large = (
        recipe.model.quantize is not None
        or recipe.train.offload_blocks
        or recipe.model.text_encoder_placement != "device"
    )
    if large and device.type == "cuda":  # a CPU has one memory
        nets = [net for name, net in pipeline.components.items() if isinstance(net, nn.Module) and name != "vae"]
        for net in nets:
            offload_blocks(net.requires_grad_(False), device)


def tile(vae: Any, section: Model) -> None:
    """Let the VAE encode and decode in tiles, where the recipe says so; images of one tile are as they were."""
    if not section.vae_tiling:
        return
    vae.enable_tiling()
    if hasattr(
        vae, "tile_latent_min_size"
    ):  # AutoencoderKL takes tiles of the size it was trained at, which saves nothing there
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // 2 ** (len(vae.config.block_out_channels) - 1)
