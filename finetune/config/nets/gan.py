"""What the `net` sections of GANs share: what is drawn from, what the two nets want, and what holds the critic back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.nets import Section
from finetune.config.yaml_reader import number


@dataclass(frozen=True)
class Adversarial(Section):
    """What the sections of all GANs hold."""

    latent: int = number(64, minimum=1)  # numbers that an image is drawn from
    objective: Literal["logistic", "hinge", "wasserstein", "relativistic"] = (
        "logistic"  # what critic and generator want of the critic's logits
    )
    discriminator_steps: int = number(1, minimum=1)  # of the critic for one of the generator
    gradient_penalty: float = number(
        0.0, minimum=0
    )  # holds the critic's slope between true and made images at 1 (WGAN-GP); 10 is usual
    r1: float = number(0.0, minimum=0)  # γ: flattens the critic at true images
    r2: float = number(0.0, minimum=0)  # γ: flattens it at made ones
    penalty_every: int = number(
        1, minimum=1
    )  # penalties are taken each so many steps, and then count as often: cheaper
    minibatch: Literal["none", "stddev", "discrimination"] = (
        "none"  # how an image's company is shown to the critic, against collapse
    )
    stddev_group: int = number(4, minimum=2)  # images over which stddev is taken
    unroll: int = number(
        0, minimum=0
    )  # steps of the critic that the generator looks ahead (arXiv:1611.02163): dear, against collapse
    unroll_lr: float = number(0.01, above=0)  # of those steps, which are plain descent
    ada_target: float = number(
        0.0, minimum=0, below=1
    )  # mean sign of the critic's logits at which augmentation holds it; 0: none. 0.6 is usual
    ada_images: int = number(50_000, minimum=1)  # that take augmentation from never to always: small sets need it soon

    @property
    def loss(self) -> str:
        """In a plan's words: the objective, and what holds the critic."""
        penalties = {
            "(‖∇D‖ − 1)²": self.gradient_penalty,
            "½‖∇D(true)‖²": self.r1,
            "½‖∇D(made)‖²": self.r2,
        }
        held = "".join(f" + {weight:g} × {name}" for name, weight in penalties.items() if weight)
        every = f" each {self.penalty_every} steps" if held and self.penalty_every > 1 else ""
        return f"{self.objective}, critic{held}{every}"
