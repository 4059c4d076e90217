"""The `net` section of a cascade's second stage."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets.ddpm import Net as Ddpm
from finetune.config.yaml_reader import number
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="cascade",
    title="Cascaded diffusion",
    implementation="finetune.models.scratch.diffusion.cascade",
    tasks=("super-resolution",),
    paper="2106.15282",
)


@dataclass(frozen=True)
class Net(Ddpm):
    refines = True
    augmentation: float = number(
        0.5, minimum=0, maximum=1
    )  # most noise on small images in training; 1: nothing else is left
    sampling_augmentation: float = number(
        0.1, minimum=0, maximum=1
    )  # noise on them in drawing: more forgives the first stage more

    @property
    def loss(self) -> str:
        return f"{super().loss}, beside small images with noise up to {self.augmentation:g}"
