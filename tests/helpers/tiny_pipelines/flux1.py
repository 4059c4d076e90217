"""FLUX.1 in miniature."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tests.helpers.tiny_pipelines import Tiny
from tests.helpers.tiny_pipelines.parts import clip, t5, vae


def build(captions: tuple[str, ...]) -> Any:
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


TINY = Tiny(
    build,
    seed=447,
    lora=("adapter.targets=attention+mlp", "flow={guidance: 3.5}"),
    full=("train.ema=0.8",),
    checkpoint_nf4=False,
)
