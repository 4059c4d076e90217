"""Keys that the `net` sections of diffusion models in pixel space share."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.fields import field
from finetune.config.nets import Section
from finetune.config.samplers import SAMPLERS


@dataclass(frozen=True)
class UNet(Section):
    """Keys of all diffusion families in pixel space."""

    samplers = tuple(name for name, sampler in SAMPLERS.items() if sampler.scratch)
    width: int = field(
        64,
        "Channels at full size; a multiple of 4.",
        unit="channels",
        effect="Wider is better and slower.",
        minimum=8,
        maximum=8192,
    )
    channel_multipliers: tuple[int, ...] = field(
        (1, 2, 2),
        "Channels at each size, as multiples of the width; the sides are halved from one size to the next.",
        minimum=1,
        maximum=1000,
    )
    blocks: int = field(1, "Residual blocks at each size.", minimum=1, maximum=1000)
    attention_levels: int = field(
        1,
        "Number of sizes with self-attention, the smallest first.",
        effect="More see the whole image, and cost more.",
        minimum=0,
        maximum=100,
    )
    dropout: float = field(0.0, "Dropout in the residual blocks.", minimum=0, below=1)
