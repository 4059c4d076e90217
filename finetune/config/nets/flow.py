"""What the `net` sections of normalizing flows share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.nets import Section
from finetune.config.yaml_reader import number


@dataclass(frozen=True)
class Flow(Section):
    """What the sections of all normalizing flows hold."""

    scales: int = number(2, minimum=1)  # each further one halves the sides and lets half of the numbers go
    steps: int = number(8, minimum=1)  # of the flow at each scale
    width: int = number(64, minimum=4)  # channels of the nets inside the couplings
    blocks: int = number(1, minimum=0)  # residual blocks of those nets
    dropout: float = number(0.0, minimum=0, below=1)
    coupling: Literal["affine", "mixture"] = (
        "affine"  # what a coupling does to a number: scale and shift, or bend it by a mixture's cumulative
    )
    mixtures: int = number(8, minimum=1)  # of logistics a number, where couplings bend
    dequantization: Literal["uniform", "variational"] = (
        "uniform"  # noise that fills a level: even, or learned, which is dearer and tighter
    )
    margin: float = number(
        0.05, minimum=0, below=0.5
    )  # pixels are put through a logit, this far from its ends; 0: they are not

    @property
    def loss(self) -> str:
        return f"−log p in nats an image, by {self.dequantization} dequantization a bound"
