"""The `net` section of a cascade's second stage."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.fields import field
from finetune.config.nets.ddpm import Net as Ddpm
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="cascade",
    title="Cascaded diffusion",
    objective="noise",
    implementation="finetune.models.scratch.diffusion.cascade",
    tasks=("super-resolution",),
    paper="2106.15282",
)


@dataclass(frozen=True)
class Net(Ddpm):
    """Keys of the `net` section of Cascaded diffusion."""

    refines = True
    augmentation: float = field(
        0.5,
        "Training: largest noise on the small images (conditioning augmentation); 1 replaces them by noise.",
        effect="More tolerates errors of the stage before, and follows it less.",
        minimum=0,
        maximum=1,
    )
    sampling_augmentation: float = field(
        0.1,
        "Sampling: noise on the small images.",
        effect="More hides errors of the stage before.",
        minimum=0,
        maximum=1,
    )

    @property
    def loss(self) -> str:
        return f"{super().loss}, conditioned on small images with noise up to {self.augmentation:g}"
