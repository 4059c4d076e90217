"""The `net` section of EDM in pixel space."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.nets.unet import UNet
from finetune.config.yaml_reader import number
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="edm",
    title="EDM",
    implementation="finetune.models.scratch.diffusion.edm",
    tasks=("unconditional", "class-conditional"),
    paper="2206.00364",
)


@dataclass(frozen=True)
class Net(UNet):
    sampler = "heun"
    log_sigma_mean: float = number(-1.2)  # of ln σ in training
    log_sigma_std: float = number(1.2, above=0)  # of ln σ in training
    sigma_data: float = number(0.5, above=0)  # standard deviation of the pixels, which lie in [-1, 1]
    sigma_min: float = number(0.002, above=0)  # σ of the last step but one in drawing
    sigma_max: float = number(80.0, above=0)  # σ that drawing starts from
    rho: float = number(7.0, above=0)  # larger steps more finely at low noise

    @property
    def loss(self) -> str:
        return "squared error in x₀, weighed and preconditioned to be 1 at every noise level before training"
