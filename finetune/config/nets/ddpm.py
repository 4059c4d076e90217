"""The `net` section of denoising diffusion in pixel space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from finetune.config.fields import field
from finetune.config.nets.unet import UNet
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="ddpm",
    title="DDPM",
    objective="noise",
    implementation="finetune.models.scratch.diffusion.ddpm",
    tasks=("unconditional", "class-conditional"),
    paper="2006.11239",
)

Prediction = Literal["epsilon", "sample", "v_prediction"]


@dataclass(frozen=True)
class Net(UNet):
    """Keys of the `net` section of DDPM."""

    sampler = "ddim"
    wording: ClassVar[dict[str, str]] = {
        "epsilon": "the noise ε",
        "sample": "the image x₀",
        "v_prediction": "the velocity v",
    }
    timesteps: int = field(1000, "Number of noise levels.", unit="steps", minimum=25, maximum=100_000)
    schedule: Literal["linear", "cosine"] = field(
        "linear",
        "Noise schedule.",
        choices={"linear": "β rises linearly", "cosine": "destroys small images more slowly (arXiv:2102.09672)"},
    )
    prediction: Prediction = field(
        "epsilon",
        "What the network predicts.",
        choices={"epsilon": "the noise ε", "sample": "the image x₀", "v_prediction": "v, a mixture of both"},
    )
    variance: Literal["large", "small"] = field(
        "large",
        "Variance of DDPM's reverse steps.",
        choices={"large": "β", "small": "the posterior's variance"},
    )

    @property
    def loss(self) -> str:
        predicted = self.wording[self.prediction]
        return f"mean squared error of {predicted}, {self.schedule} schedule with {self.timesteps} steps"
