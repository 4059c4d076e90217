"""Keys that the `net` sections of GANs share: latent, adversarial loss and regularization of the discriminator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.fields import MAX_COUNT, field
from finetune.config.nets import Section


@dataclass(frozen=True)
class Adversarial(Section):
    """Keys of all GANs."""

    latent: int = field(64, "Size of the latent vector.", minimum=1, maximum=65_536)
    objective: Literal["logistic", "hinge", "wasserstein", "relativistic"] = field(
        "logistic",
        "Adversarial loss on the discriminator's logits.",
        choices={
            "logistic": "non-saturating logistic (Goodfellow et al. 2014)",
            "hinge": "hinge (arXiv:1705.02894)",
            "wasserstein": "Wasserstein distance (arXiv:1701.07875); the discriminator is then a critic",
            "relativistic": "relativistic pairing, with r1 and r2 (arXiv:2501.05441)",
        },
    )
    discriminator_steps: int = field(
        1, "Discriminator steps for each generator step.", unit="steps", minimum=1, maximum=10_000
    )
    gradient_penalty: float = field(
        0.0,
        "WGAN-GP (arXiv:1704.00028): weight of the penalty that keeps the critic's gradient norm at 1 between real and "
        "generated images.",
        effect="10 is usual with `objective: wasserstein`; 0 is off.",
        minimum=0,
        maximum=1_000_000.0,
    )
    r1: float = field(
        0.0,
        "γ of R1, the penalty on the discriminator's gradient at real images (arXiv:1801.04406); 0: off.",
        effect="Larger is more stable and less sharp.",
        minimum=0,
        maximum=1_000_000.0,
    )
    r2: float = field(
        0.0,
        "γ of R2, the penalty on the discriminator's gradient at generated images; 0: off.",
        minimum=0,
        maximum=1_000_000.0,
    )
    penalty_every: int = field(
        1,
        "Lazy regularization: penalties are computed every n-th step and multiplied by n.",
        unit="steps",
        effect="Larger is faster.",
        minimum=1,
        maximum=10_000,
    )
    minibatch: Literal["none", "stddev", "discrimination"] = field(
        "none",
        "Batch statistics given to the discriminator, against mode collapse.",
        choices={
            "none": "none",
            "stddev": "standard deviation over a group of images (arXiv:1710.10196)",
            "discrimination": "distances to the batch's other images (arXiv:1606.03498)",
        },
    )
    stddev_group: int = field(
        4, "Images per group of `minibatch: stddev`; divides the batch.", unit="images", minimum=2, maximum=16_384
    )
    unroll: int = field(
        0,
        "Unrolled GAN (arXiv:1611.02163): discriminator steps the generator looks ahead; 0: off.",
        unit="steps",
        effect="Works against mode collapse; each costs a discriminator step.",
        minimum=0,
        maximum=1000,
    )
    unroll_lr: float = field(0.01, "Learning rate of the unrolled steps (plain SGD).", above=0, maximum=1000.0)
    ada_target: float = field(
        0.0,
        "Adaptive augmentation (arXiv:2006.06676): target for the mean sign of the discriminator's logits; 0: off.",
        effect="Keeps the discriminator from overfitting small datasets; 0.6 is usual.",
        minimum=0,
        below=1,
    )
    ada_images: int = field(
        50_000,
        "Adaptive augmentation: images over which its probability can go from 0 to 1.",
        unit="images",
        effect="Smaller adapts faster: for small datasets.",
        minimum=1,
        maximum=MAX_COUNT,
    )

    @property
    def loss(self) -> str:
        """The objective and its regularization, for the plan's table."""
        penalties = {
            "(‖∇D‖ − 1)²": self.gradient_penalty,
            "½‖∇D(real)‖²": self.r1,
            "½‖∇D(fake)‖²": self.r2,
        }
        penalty = "".join(f" + {weight:g} × {name}" for name, weight in penalties.items() if weight)
        every = f" every {self.penalty_every} steps" if penalty and self.penalty_every > 1 else ""
        discriminator = "critic" if self.objective == "wasserstein" else "discriminator"
        return f"{self.objective}, {discriminator}{penalty}{every}"
