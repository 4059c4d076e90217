"""Fake inputs of each diffusers denoiser: latents, conditions and the other arguments of its forward pass.

Architectures with a family in `models/` are traced with the family's own step; these are for all others, and for
configuration files given by the user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from finetune.data.batch import Batch

Config = dict[str, Any]


def _velocity(predicted: Tensor, noise: Tensor, latents: Tensor) -> Tensor:
    """The flow-matching loss: the network predicts ε − x₀."""
    kept = predicted[:, : latents.shape[1]].float()  # the rest is a variance
    return (kept - (noise - latents).reshape(kept.shape)).square().flatten(1).mean(1)


@final
@dataclass(frozen=True)
class Inputs:
    """The inputs of a denoiser.

    Attributes:
        latents: one image's latents, without batch dimension.
        conditions: one image's conditions, by argument name.
        fixed: function of the batch size that returns the other arguments.
        names: argument names of the noisy latents and the timesteps ("" if there is none).
        loss: function of prediction, noise and latents that returns the loss per image, [B] float32.
        experts: number of experts, each of which gets an equal share of tokens (fake tensors have no values to route
            by).
        integers: the value of integers read from fake tensors, such as a caption's length.
    """

    latents: Tensor
    conditions: Batch = field(default_factory=dict)
    fixed: Callable[[int], dict[str, Any]] = lambda batch: {}
    names: tuple[str, str] = ("hidden_states", "timestep")
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = _velocity
    experts: int = 1
    integers: int = 1


# -- by class: (configuration, width, height) → inputs
# --------------------------------------------------------------------


def _flux(config: Any, width: int, height: int) -> Inputs:
    """Latents in 2 × 2 patches under an 8-fold VAE: [L, C]; position ids of three axes, FLUX.2's of four."""
    axes = 4 if config._class_name == "Flux2Transformer2DModel" else 3
    length = (width // 16) * (height // 16)
    conditions = {"encoder_hidden_states": torch.empty(config.tokens, config.joint_attention_dim)}
    if config._class_name == "FluxTransformer2DModel":
        conditions["pooled_projections"] = torch.empty(config.pooled_projection_dim)
    if config._class_name in ("FluxTransformer2DModel", "Flux2Transformer2DModel") and config.guidance_embeds:
        conditions["guidance"] = torch.empty(())
    if config._class_name == "ChromaTransformer2DModel":
        conditions["attention_mask"] = torch.empty(config.tokens + length)
    return Inputs(
        torch.empty(length, config.in_channels),
        conditions,
        lambda batch: {"img_ids": torch.empty(length, axes), "txt_ids": torch.empty(config.tokens, axes)},
    )


def _qwen(config: Any, width: int, height: int) -> Inputs:
    tall, wide = height // 16, width // 16
    return Inputs(
        torch.empty(tall * wide, config.in_channels),
        {"encoder_hidden_states": torch.empty(config.tokens, config.joint_attention_dim)},
        lambda batch: {"img_shapes": [[(1, tall, wide)]] * batch},
    )


def _krea(config: Any, width: int, height: int) -> Inputs:
    length = (width // 16) * (height // 16)
    return Inputs(
        torch.empty(length, config.in_channels),
        {"encoder_hidden_states": torch.empty(config.tokens, config.num_text_layers, config.text_hidden_dim)},
        lambda batch: {"position_ids": torch.empty(config.tokens + length, 3)},
    )


def _sd3(config: Any, width: int, height: int) -> Inputs:
    conditions = {"encoder_hidden_states": torch.empty(config.tokens, config.joint_attention_dim)}
    if config._class_name == "SD3Transformer2DModel":
        conditions["pooled_projections"] = torch.empty(config.pooled_projection_dim)
    return Inputs(torch.empty(config.in_channels, height // 8, width // 8), conditions)


def _lumina(config: Any, width: int, height: int) -> Inputs:
    """Lumina reads the length of each caption; captions are assumed to have full length."""
    conditions = {
        "encoder_hidden_states": torch.empty(config.tokens, config.cap_feat_dim),
        "encoder_attention_mask": torch.empty(config.tokens, dtype=torch.int64),
    }
    return Inputs(torch.empty(config.in_channels, height // 8, width // 8), conditions, integers=config.tokens)


def _pixart(config: Any, width: int, height: int) -> Inputs:
    conditions = {
        "encoder_hidden_states": torch.empty(config.tokens, config.caption_channels),
        "encoder_attention_mask": torch.empty(config.tokens),
    }
    return Inputs(
        torch.empty(config.in_channels, height // 8, width // 8),
        conditions,
        lambda batch: {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    )


def _sana(config: Any, width: int, height: int) -> Inputs:
    """Under DC-AE's 32-fold compression."""
    conditions = {
        "encoder_hidden_states": torch.empty(config.tokens, config.caption_channels),
        "encoder_attention_mask": torch.empty(config.tokens),
    }
    return Inputs(torch.empty(config.in_channels, height // 32, width // 32), conditions)


def _cogvideox(config: Any, width: int, height: int) -> Inputs:
    fixed: dict[str, Any] = {}
    if config.use_rotary_positional_embeddings:
        length = config.frames * (height // 16) * (width // 16)
        fixed = {
            "image_rotary_emb": (
                torch.empty(length, config.attention_head_dim),
                torch.empty(length, config.attention_head_dim),
            )
        }
    return Inputs(
        torch.empty(config.frames, config.in_channels, height // 8, width // 8),
        {"encoder_hidden_states": torch.empty(config.max_text_seq_length, config.text_embed_dim)},
        lambda batch: fixed,
    )


def _unet(config: Any, width: int, height: int) -> Inputs:
    """SDXL's UNets (`addition_embed_type`) have six size conditions and pooled text besides."""

    def fixed(batch: int) -> dict[str, Any]:
        if config.addition_embed_type != "text_time":
            return {}
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"added_cond_kwargs": {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, 6)}}

    conditions = {"encoder_hidden_states": torch.empty(config.tokens, config.cross_attention_dim)}
    return Inputs(
        torch.empty(config.in_channels, height // 8, width // 8), conditions, fixed, names=("sample", "timestep")
    )


def _kolors_or_unet(config: Any, width: int, height: int) -> Inputs:
    """Kolors projects its text encoder's width to that of cross-attention (`encoder_hid_dim`)."""
    inputs = _unet(config, width, height)
    if config.encoder_hid_dim:
        inputs.conditions["encoder_hidden_states"] = torch.empty(config.tokens, config.encoder_hid_dim)
    return inputs


def _controlnet(config: Any, width: int, height: int) -> Inputs:
    """A control image of three channels at full size conditions the frozen UNet."""
    inputs = _unet(config, width, height)
    inputs.conditions["controlnet_cond"] = torch.empty(config.conditioning_channels, height, width)
    return inputs


def _hidream(config: Any, width: int, height: int) -> Inputs:
    """Every layer of Llama's hidden states, T5's, and pooled CLIP's; tokens go to the experts in equal shares. Images
    are square.
    """
    llama, t5 = config.caption_channels
    conditions = {
        "encoder_hidden_states_llama3": torch.empty(max(config.llama_layers) + 1, config.tokens, llama),
        "encoder_hidden_states_t5": torch.empty(config.tokens, t5),
        "pooled_embeds": torch.empty(config.text_emb_dim),
    }
    latents = torch.empty(config.in_channels, height // 8, width // 8)
    return Inputs(latents, conditions, names=("hidden_states", "timesteps"), experts=config.num_routed_experts)


def _ltx(config: Any, width: int, height: int) -> Inputs:
    """Under a VAE that compresses 32-fold along sides."""
    tall, wide = height // 32, width // 32
    conditions = {
        "encoder_hidden_states": torch.empty(config.tokens, config.caption_channels),
        "encoder_attention_mask": torch.empty(config.tokens),
    }
    sizes = {"num_frames": config.frames, "height": tall, "width": wide}
    return Inputs(torch.empty(config.frames * tall * wide, config.in_channels), conditions, lambda batch: sizes)


def _amused(config: Any, width: int, height: int) -> Inputs:
    """Masked tokens of a VQ-GAN that compresses 16-fold (arXiv:2401.01808): the loss is the cross-entropy of what was
    masked.
    """
    conditions = {
        "encoder_hidden_states": torch.empty(config.tokens, config.encoder_hidden_size),
        "pooled_text_emb": torch.empty(config.cond_embed_dim),
        "micro_conds": torch.empty(5),
    }

    def loss(predicted: Tensor, noise: Tensor, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(predicted, tokens, reduction="none").flatten(1).mean(1)

    return Inputs(
        torch.empty(height // 16, width // 16, dtype=torch.int64), conditions, names=("input_ids", ""), loss=loss
    )


INPUTS: dict[str, Callable[[Any, int, int], Inputs]] = {
    "AuraFlowTransformer2DModel": _sd3,
    "ChromaTransformer2DModel": _flux,
    "CogVideoXTransformer3DModel": _cogvideox,
    "ControlNetModel": _controlnet,
    "Flux2Transformer2DModel": _flux,
    "FluxTransformer2DModel": _flux,
    "HiDreamImageTransformer2DModel": _hidream,
    "Krea2Transformer2DModel": _krea,
    "LTXVideoTransformer3DModel": _ltx,
    "LongCatImageTransformer2DModel": _flux,
    "Lumina2Transformer2DModel": _lumina,
    "PixArtTransformer2DModel": _pixart,
    "QwenImageTransformer2DModel": _qwen,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
    "UNet2DConditionModel": _kolors_or_unet,
    "UVit2DModel": _amused,
}
