"""The `net` section of ImageGPT."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.fields import field
from finetune.config.nets import Section
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
    """Keys of the `net` section of ImageGPT."""

    width: int = field(
        96, "Embedding size.", unit="channels", effect="Wider is better and slower.", minimum=4, maximum=65_536
    )
    layers: int = field(4, "Transformer layers.", minimum=1, maximum=1000)
    heads: int = field(4, "Attention heads; the width is divided evenly among them.", minimum=1, maximum=1024)
    dropout: float = field(0.1, "Dropout.", minimum=0, below=1)
    palette: int = field(
        0,
        "Colors of a palette computed from the data, with one token per pixel; 0: one token per channel, and an exact "
        "likelihood.",
        unit="colors",
        minimum=0,
        maximum=4096,
    )

    @property
    def loss(self) -> str:
        return f"−log p in nats per image, of {f'{self.palette} palette colors' if self.palette else 'pixel levels'}"
