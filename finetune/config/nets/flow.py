"""Keys that the `net` sections of normalizing flows share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.fields import field
from finetune.config.nets import Section


@dataclass(frozen=True)
class Flow(Section):
    """Keys of all normalizing flows."""

    scales: int = field(
        2, "Scales; each further one halves the sides and factors out half of the values.", minimum=1, maximum=100
    )
    steps: int = field(8, "Flow steps at each scale.", minimum=1, maximum=1000)
    width: int = field(
        64,
        "Channels of the networks in the couplings.",
        unit="channels",
        effect="Wider is better and slower.",
        minimum=4,
        maximum=8192,
    )
    blocks: int = field(1, "Residual blocks of the networks in the couplings.", minimum=0, maximum=1000)
    dropout: float = field(0.0, "Dropout in the networks in the couplings.", minimum=0, below=1)
    coupling: Literal["affine", "mixture"] = field(
        "affine",
        "What a coupling does to a value.",
        choices={"affine": "scales and shifts it", "mixture": "applies the CDF of a mixture of logistics (Flow++)"},
    )
    mixtures: int = field(8, "Logistic components per value, with `coupling: mixture`.", minimum=1, maximum=1000)
    dequantization: Literal["uniform", "variational"] = field(
        "uniform",
        "Noise that makes the levels continuous.",
        choices={"uniform": "uniform within a level", "variational": "learned: a tighter bound, slower (Flow++)"},
    )
    margin: float = field(
        0.05, "Margin of the logit that pixels pass through, at either end; 0: no logit.", minimum=0, below=0.5
    )

    @property
    def loss(self) -> str:
        return f"upper bound on −log p in nats per image, with {self.dequantization} dequantization"
