"""Sana in miniature."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from tests.helpers.tiny_pipelines import Tiny
from tests.helpers.tiny_pipelines.parts import gemma


def build(captions: tuple[str, ...]) -> Any:
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


TINY = Tiny(
    build,
    seed=419,
    lora=("adapter.targets=attention+mlp",),
    full=("train.gradient_checkpointing=true",),
    checkpoint_nf4=False,
    arguments={"use_resolution_binning": False},
)
