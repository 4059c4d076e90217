"""The `net` section of a transformer over the codes of a VQ-VAE."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.fields import field
from finetune.config.nets import Section
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
    """Keys of the `net` section of Transformer over VQ-VAE codes."""

    width: int = field(
        96, "Embedding size.", unit="channels", effect="Wider is better and slower.", minimum=4, maximum=65_536
    )
    layers: int = field(4, "Transformer layers.", minimum=1, maximum=1000)
    heads: int = field(4, "Attention heads; the width is divided evenly among them.", minimum=1, maximum=1024)
    dropout: float = field(0.1, "Dropout.", minimum=0, below=1)

    @property
    def loss(self) -> str:
        return "−log p of the codes in nats per image"
