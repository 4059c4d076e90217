"""The flow families' (and PixArt-Σ's) real classes, built small as whole pipelines: what `tiny.pipeline` writes to disk."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from finetune.models.vocabulary import learn_tokenizer

VAE: dict[str, Any] = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
CLIP: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16}
LETTERS = string.ascii_letters + string.digits + string.punctuation


def vae() -> AutoencoderKL:
    """32×32 pictures ↔ 8×8 latents, shifted and scaled."""
    return AutoencoderKL(**VAE, scaling_factor=0.8, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)


def clip(captions: tuple[str, ...], projection: int = 0) -> tuple[Any, Any]:
    """A CLIP tokenizer and its text encoder, with a projection or without."""
    tokenizer = learn_tokenizer(captions, 540, 16)
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPTextConfig(**CLIP, **tokens, projection_dim=projection or 32)
    return tokenizer, CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5(width: int) -> tuple[Any, Any]:
    """A T5 tokenizer that knows letters, and its encoder."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu")
    return tokenizer, T5EncoderModel(config)


def sd3(captions: tuple[str, ...]) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    (one, first), (two, second), (three, third) = clip(captions, 24), clip(captions, 24), t5(64)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=48,
        pos_embed_max_size=12,
        dual_attention_layers=[0],
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(), first, one, second, two, third, three)


def flux(captions: tuple[str, ...]) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    (one, first), (two, second) = clip(captions), t5(32)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=[4, 6, 6],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return FluxPipeline(scheduler, vae(), first, one, second, two, transformer)


BUILDS: dict[str, Callable[[tuple[str, ...]], Any]] = {"sd3": sd3, "flux": flux}


def save(name: str, captions: tuple[str, ...], folder: Any) -> None:
    """Write the pipeline of family `name`, its weights random and the same each time."""
    torch.manual_seed(sum(map(ord, name)))
    pipeline = BUILDS[name](captions)
    # diffusers starts last layers and gates at zero, from where a first step moves little: as after some training here.
    for parameter in pipeline.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(folder)
