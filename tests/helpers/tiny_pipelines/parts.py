"""Parts shared by several tiny pipelines: VAEs, tokenizers and text encoders, built small from their real classes."""

from __future__ import annotations

import string
from typing import Any

from diffusers import AutoencoderKL
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
    """A T5 tokenizer of letters, and its encoder."""
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


def gemma() -> tuple[Any, Any]:
    """A Gemma tokenizer of letters, and a Gemma 2 model."""
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
    """A tokenizer of bytes and a chat template."""
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
