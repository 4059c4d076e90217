"""The `net` section of EDM in pixel space."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.fields import field
from finetune.config.nets.unet import UNet
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
    """Keys of the `net` section of EDM."""

    sampler = "heun"
    log_sigma_mean: float = field(-1.2, "Mean of ln σ in training (P_mean).", minimum=-100.0, maximum=100.0)
    log_sigma_std: float = field(1.2, "Standard deviation of ln σ in training (P_std).", above=0, maximum=100.0)
    sigma_data: float = field(
        0.5, "Standard deviation of the pixels, which lie in [-1, 1] (σ_data).", above=0, maximum=100.0
    )
    sigma_min: float = field(0.002, "Smallest σ of sampling above 0.", above=0, maximum=1000.0)
    sigma_max: float = field(80.0, "Largest σ of sampling, where it starts.", above=0, maximum=1_000_000.0)
    rho: float = field(
        7.0,
        "Exponent of the spacing of σ in sampling (ρ).",
        effect="Larger puts more steps at low noise.",
        above=0,
        maximum=1000.0,
    )

    @property
    def loss(self) -> str:
        return "mean squared error of x₀, weighted so that an untrained network has loss 1 at every noise level"
