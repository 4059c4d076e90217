"""Z-Image in miniature."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from tests.helpers.tiny_pipelines import Tiny
from tests.helpers.tiny_pipelines.parts import qwen_config, qwen_tokenizer, vae


def build(captions: tuple[str, ...]) -> Any:
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


TINY = Tiny(
    build,
    seed=732,
    lora=("adapter.targets=attention+mlp", "train.gradient_checkpointing=true"),
    full=(),
    checkpoint_nf4=False,
)
