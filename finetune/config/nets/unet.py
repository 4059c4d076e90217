"""What the `net` sections of diffusion models in pixel space share."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets import Section
from finetune.config.samplers import SAMPLERS
from finetune.config.yaml_reader import number


@dataclass(frozen=True)
class UNet(Section):
    """What the sections of all diffusion families in pixel space hold."""

    samplers = tuple(name for name, sampler in SAMPLERS.items() if sampler.scratch)
    width: int = number(64, minimum=8)  # channels at the full size; a multiple of 4
    channel_multipliers: tuple[int, ...] = (
        1,
        2,
        2,
    )  # channels at each size, in widths; from one size to the next the sides are halved
    blocks: int = number(1, minimum=1)  # residual blocks at each size
    attention_levels: int = number(
        1, minimum=0
    )  # at so many sizes, the smallest first, every place also looks at all others
    dropout: float = number(0.0, minimum=0, below=1)
