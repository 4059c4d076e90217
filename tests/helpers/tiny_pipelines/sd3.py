"""Stable Diffusion 3 in miniature."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from tests.helpers.tiny_pipelines import Tiny
from tests.helpers.tiny_pipelines.parts import clip, t5, vae


def build(captions: tuple[str, ...]) -> Any:
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


TINY = Tiny(
    build,
    seed=266,
    lora=("adapter.alpha=6",),
    full=("train.gradient_checkpointing=true", "flow={sampling: mode, weighting: cosmap}"),
    checkpoint_nf4=True,
    idle=("blocks.1.attn.add_q_proj.", "blocks.1.attn.norm_added_q."),
)
