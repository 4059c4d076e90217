"""The `net` section of a PixelCNN over the codes of a VQ-VAE."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.fields import field
from finetune.config.nets.transformer import Stack
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="vq-pixelcnn",
    title="PixelCNN++ over VQ-VAE codes",
    implementation="finetune.models.scratch.vq.vq_pixelcnn",
    aliases=("vqpixelcnn",),
    kind="autoregressive",
    tasks=("unconditional", "class-conditional"),
    paper="1711.00937",
)


@dataclass(frozen=True)
class Net(Stack):
    """Keys of the `net` section of PixelCNN++ over VQ-VAE codes."""

    embedding_dim: int = field(16, "Size of a code's embedding.", minimum=1, maximum=65_536)

    @property
    def loss(self) -> str:
        return "−log p of the codes in nats per image"
