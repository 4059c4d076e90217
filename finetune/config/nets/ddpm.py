"""The `net` section of denoising diffusion in pixel space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from finetune.config.nets.unet import UNet
from finetune.config.yaml_reader import number
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="ddpm",
    title="DDPM",
    implementation="finetune.models.scratch.diffusion.ddpm",
    tasks=("unconditional", "class-conditional"),
    paper="2006.11239",
)

Prediction = Literal["epsilon", "sample", "v_prediction"]


@dataclass(frozen=True)
class Net(UNet):
    sampler = "ddim"
    wording: ClassVar[dict[str, str]] = {
        "epsilon": "the noise ε",
        "sample": "the image x₀",
        "v_prediction": "the velocity v",
    }
    timesteps: int = number(1000, minimum=25)  # that noise is added in
    schedule: Literal["linear", "cosine"] = "linear"  # of the noise; cosine destroys small images less early
    prediction: Prediction = "epsilon"  # what the net says: the noise, the image, or v, which is a mixture of both
    variance: Literal["large", "small"] = "large"  # of DDPM's steps: β, or the posterior's

    @property
    def loss(self) -> str:
        return f"squared error in {self.wording[self.prediction]}, {self.timesteps} steps of a {self.schedule} schedule"
