"""FLUX.2 klein in miniature."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.helpers.tiny_pipelines import Tiny
from tests.helpers.tiny_pipelines.parts import VAE, qwen_config, qwen_tokenizer


def build(captions: tuple[str, ...]) -> Any:
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


TINY = Tiny(
    build,
    seed=497,
    lora=("adapter.targets=attention+mlp", "adapter.dora=true"),
    full=("train.gradient_checkpointing=true",),
    checkpoint_nf4=True,
    negative=False,  # its negative prompt is always empty
)
