"""Chroma in miniature."""

from __future__ import annotations

from typing import Any

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tests.helpers.tiny_pipelines import Tiny
from tests.helpers.tiny_pipelines.parts import t5, vae


def build(captions: tuple[str, ...]) -> Any:
    tokenizer, encoder = t5(32)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return ChromaPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae(), encoder, tokenizer, transformer)


TINY = Tiny(
    build,
    seed=1,
    lora=("adapter.targets=attention+mlp", "train.gradient_checkpointing=true"),
    full=("train.ema=0.8",),
    idle=("distilled_guidance_layer.",),
    bool_masks=True,
)
