"""The `net` section of a transformer over a first stage's codes."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets import Section
from finetune.config.yaml_reader import number
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="vq-transformer",
    title="Transformer over VQ-VAE codes",
    implementation="finetune.models.scratch.vq.vq_transformer",
    aliases=("vqtransformer",),
    kind="autoregressive",
    tasks=("unconditional", "class-conditional"),
    paper="2012.09841",
)


@dataclass(frozen=True)
class Net(Section):
    width: int = number(96, minimum=4)
    layers: int = number(4, minimum=1)
    heads: int = number(4, minimum=1)  # they share the width evenly
    dropout: float = number(0.1, minimum=0, below=1)

    @property
    def loss(self) -> str:
        return "−log p of the codes in nats an image"
