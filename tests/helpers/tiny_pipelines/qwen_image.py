"""Qwen-Image in miniature."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.helpers.tiny_pipelines import Tiny
from tests.helpers.tiny_pipelines.parts import qwen_config, qwen_tokenizer


def build(captions: tuple[str, ...]) -> Any:
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


TINY = Tiny(
    build,
    seed=1053,
    lora=("adapter.targets=attention+mlp", "adapter.alpha=2"),
    full=(),
    checkpoint_nf4=True,
    idle=(
        "blocks.1.attn.add_q_proj.",
        "blocks.1.attn.norm_added_q.",
        "blocks.1.attn.to_add_out.",
        "blocks.1.txt_mlp.",
    ),
    guidance="true_cfg_scale",
)
