"""PixArt-Σ in miniature."""

from __future__ import annotations

from typing import Any

from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from tests.helpers.tiny_pipelines import Tiny
from tests.helpers.tiny_pipelines.parts import t5, vae


def build(captions: tuple[str, ...]) -> Any:
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


TINY = Tiny(
    build,
    seed=664,
    lora=("adapter.targets=attention+mlp", "adapter.rslora=true"),
    full=("diffusion={min_snr_gamma: 5}",),
    checkpoint_nf4=True,
    arguments={"use_resolution_binning": False},
)
