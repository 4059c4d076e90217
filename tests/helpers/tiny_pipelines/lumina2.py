"""Lumina-Image 2.0 in miniature."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from tests.helpers.tiny_pipelines import Tiny
from tests.helpers.tiny_pipelines.parts import gemma, vae


def build(captions: tuple[str, ...]) -> Any:
    tokenizer, encoder = gemma()
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=48,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,  # three query heads per key-value head, as in the real model
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 16, 16),
        cap_feat_dim=32,
    )
    return Lumina2Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=6.0), vae(levels=4), encoder, tokenizer)


TINY = Tiny(
    build,
    seed=696,
    lora=("adapter.targets=all-linear", "adapter.rslora=true"),
    full=("flow={sampling: uniform}",),
    checkpoint_nf4=True,
)
