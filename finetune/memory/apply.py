"""Apply a recipe's memory options to a loaded pipeline: quantization, offloading, VAE tiling."""

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
    """Quantize the denoiser; call it before adapters are added.

    If samples will be generated, full weights are kept for them.
    """
    kind = recipe.model.quantize
    if kind is not None and not quantize(denoiser, kind, dtype, device, keep_whole=bool(recipe.sample.prompts)):
        problem = f"{type(denoiser).__name__} has no linear layer that is large enough to quantize"
        raise UserError(problem, where="model.quantize", remedy="remove it; it would save no memory")


def offload_base(denoiser: nn.Module, recipe: Recipe, device: torch.device) -> None:
    """Offload the denoiser's blocks; call it after adapters are added, which stay on the device."""
    if recipe.train.offload_blocks:
        offload_blocks(denoiser, device)


def fit_encoders(encoders: dict[str, nn.Module], section: Model, device: torch.device) -> None:
    """Place text encoders for encoding as `model.text_encoder_placement` says."""
    for encoder in encoders.values():
        if section.text_encoder_placement == "offload":
            offload_blocks(encoder, device)
        elif section.text_encoder_placement != "device":
            quantize(encoder, section.text_encoder_placement, next(p.dtype for p in encoder.parameters()), device)


def prepare_for_sampling(pipeline: Any, recipe: Recipe, device: torch.device) -> None:
    """Prepare a pipeline for inference: if its training needed memory options, its blocks are offloaded."""
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
    """Make the VAE encode and decode in tiles if the recipe says so. Images that fit in one tile do not change."""
    if not section.vae_tiling:
        return
    vae.enable_tiling()
    if hasattr(vae, "tile_latent_min_size"):  # AutoencoderKL's tiles have its training size, which would save nothing
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // 2 ** (len(vae.config.block_out_channels) - 1)
