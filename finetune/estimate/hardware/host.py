"""Host memory (RAM) of a run: weights and text encoders pass through it before they move to the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from finetune.config.schema import Recipe
from finetune.estimate.constants import GIB
from finetune.estimate.profiles import Profile, Variant

PROCESS = 3 * GIB  # Python, torch, CUDA's libraries and the loader's buffers
LOADED = 2  # bytes per weight that loads in bfloat16
FLOAT32 = 4

# What other trainers publish, and where; they load the same weights.
PUBLISHED = {
    "sd15": ("25 GB for 8 GB GPUs", "diffusers, examples/dreambooth"),
    "sdxl": ("15-20 GB when GPU memory is short", "kohya_ss issue 1730"),
    "sd35-medium": ("50 GB", "SimpleTuner quickstart"),
    "flux1-dev": ("50 GB to quantize, 32 GB failed", "SimpleTuner quickstart; fluxgym issue 417"),
    "flux2-klein-4b": ("32 GB", "SimpleTuner quickstart"),
    "qwen-image": ("64 GB with offloading", "musubi-tuner docs"),
    "z-image": ("32-48 GB", "SimpleTuner quickstart"),
    "sana-1600m": ("50 GB", "SimpleTuner quickstart"),
    "lumina2": ("20-30 GB at the start, 32 GB advised", "SimpleTuner quickstart"),
}


@final
@dataclass(frozen=True)
class HostMemory:
    """Host memory in bytes, and what other trainers publish for the base ("" if nothing)."""

    needed: int
    published: str = ""


def host_memory_of(profile: Profile, variant: Variant, recipe: Recipe) -> HostMemory:
    """The host memory that a run needs while it loads: denoiser, text encoders and VAE at once, as a pipeline loads.

    Blocks of offloaded weights stay there. A network from scratch starts on its device.
    """
    if recipe.method == "scratch":
        return HostMemory(PROCESS)
    denoiser = max(
        (one.weights for one in profile.variants if one.weights and not one.settings.get("model.quantize")),
        default=LOADED * profile.parameters["denoiser"],
    )
    if recipe.method == "full":
        denoiser = FLOAT32 * profile.parameters["denoiser"]
    rest = profile.parameters.get("text encoders", 0) * LOADED + profile.parameters.get("vae", 0) * FLOAT32
    published = "{1}: {0}".format(*PUBLISHED[profile.name]) if profile.name in PUBLISHED else ""
    return HostMemory(int(max(denoiser + rest, variant.waiting) + PROCESS), published)
