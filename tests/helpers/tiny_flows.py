"""The flow families' (and PixArt-Σ's) real classes, built small as whole pipelines: what `tiny.pipeline` writes to disk."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from finetune.models.pretrained.tokenizer import learn_tokenizer

VAE: dict[str, Any] = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
LETTERS = string.ascii_letters + string.digits + string.punctuation


def vae(levels: int = 3, **more: Any) -> AutoencoderKL:
    """32×32 images ↔ latents of a side 2 ** (levels − 1) times smaller, shifted and scaled."""
    depth = {
        "block_out_channels": [8, 16, 16, 16][:levels],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    plain = {"scaling_factor": 0.8, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}
    return AutoencoderKL(**VAE | depth | plain | more)


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
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
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
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(), first, one, second, two, third, three
    )


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


def gemma() -> tuple[Any, Any]:
    """A Gemma tokenizer that knows letters, and a Gemma 2."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS, "\n"]
    tokenizer = GemmaTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], model_max_length=2048
    )
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return tokenizer, Gemma2Model(config)


def qwen_tokenizer() -> Any:
    """Bytes, and what a conversation is written with."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    said = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    answer = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    tokenizer = Qwen2Tokenizer(vocab=letters | {"<|endoftext|>": 256}, merges=[], model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = said + answer
    return tokenizer


def qwen_config(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": 264,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }


def flux2(captions: tuple[str, ...]) -> Any:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    encoder = Qwen3ForCausalLM(Qwen3Config(**qwen_config(27)))  # the pipeline reads layers 9, 18 and 27
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )
    autoencoder = AutoencoderKLFlux2(**VAE, sample_size=32)
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return Flux2KleinPipeline(scheduler, autoencoder, encoder, qwen_tokenizer(), transformer)


def qwen_image(captions: tuple[str, ...]) -> Any:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    words = qwen_config(2) | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    del words["head_dim"]
    sight = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=words, vision_config=sight))
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[1.5, 0.7, 1.0, 1.2],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return QwenImagePipeline(scheduler, autoencoder, encoder, qwen_tokenizer(), transformer)


def z_image(captions: tuple[str, ...]) -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 16, 16],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return ZImagePipeline(scheduler, vae(), Qwen3Model(Qwen3Config(**qwen_config(2))), qwen_tokenizer(), transformer)


def lumina2(captions: tuple[str, ...]) -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer, encoder = gemma()
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=48,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,  # of queries, for one of keys and values: as many as the real one's
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 16, 16),
        cap_feat_dim=32,
    )
    return Lumina2Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=6.0), vae(levels=4), encoder, tokenizer)


def sana(captions: tuple[str, ...]) -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    tokenizer, encoder = gemma()
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=8,
    )
    levels = {f"{side}_block_out_channels": (8, 8, 8) for side in ("encoder", "decoder")}
    depth = {f"{side}_layers_per_block": (1, 1, 1) for side in ("encoder", "decoder")}
    plain: Any = {f"{side}_qkv_multiscales": ((), (), ()) for side in ("encoder", "decoder")}
    autoencoder = AutoencoderDC(latent_channels=4, attention_head_dim=4, **levels, **depth, **plain, scaling_factor=0.8)
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return SanaPipeline(tokenizer, encoder, autoencoder, transformer, scheduler)


def pixart(captions: tuple[str, ...]) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    tokenizer, encoder = t5(32)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=32,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    return PixArtSigmaPipeline(tokenizer, encoder, vae(shift_factor=None), transformer, scheduler)


BUILDS: dict[str, Callable[[tuple[str, ...]], Any]] = {
    "sd3": sd3,
    "flux1": flux,
    "flux2": flux2,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "lumina2": lumina2,
    "sana": sana,
    "pixart": pixart,
}


# Golden losses were computed with weights seeded by these earlier names.
SEEDS = {"flux1": "flux", "qwen-image": "qwen_image", "z-image": "z_image"}


def save(name: str, captions: tuple[str, ...], folder: Any) -> None:
    """Write the pipeline of family `name`, its weights random and the same each time."""
    torch.manual_seed(sum(map(ord, SEEDS.get(name, name))))
    pipeline = BUILDS[name](captions)
    # diffusers starts last layers and gates at zero, from where a first step moves little: as after some training here.
    for parameter in pipeline.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(folder)
