"""The `net` section of ImageGPT."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets import Section
from finetune.config.yaml_reader import number
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="imagegpt",
    title="ImageGPT",
    implementation="finetune.models.scratch.autoregressive.imagegpt",
    kind="autoregressive",
    tasks=("unconditional", "class-conditional"),
)


@dataclass(frozen=True)
class Net(Section):
    width: int = number(96, minimum=4)
    layers: int = number(4, minimum=1)
    heads: int = number(4, minimum=1)  # they share the width evenly
    dropout: float = number(0.1, minimum=0, below=1)
    palette: int = number(
        0, minimum=0, maximum=4096
    )  # colors found in the data, one token a pixel; 0: a token a channel, and an exact likelihood

    @property
    def loss(self) -> str:
        return f"−log p in nats an image, of {f'{self.palette} colors' if self.palette else 'its levels'}"
