"""The `net` section of StyleGAN2, and of its alias-free successor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.nets.gan import Adversarial
from finetune.config.yaml_reader import number
from finetune.models.spec import FamilySpec

SPEC = FamilySpec(
    slug="stylegan2",
    title="StyleGAN2, alias-free StyleGAN3",
    implementation="finetune.models.scratch.gan.stylegan2",
    kind="GAN",
    tasks=("unconditional", "class-conditional"),
    paper="1912.04958",
)


@dataclass(frozen=True)
class Net(Adversarial):
    minibatch: Literal["none", "stddev", "discrimination"] = "stddev"
    width: int = number(32, minimum=4)  # channels at full size; twice as many after each halving, eight times at most
    halvings: int = number(3, minimum=1)  # times that the sides are halved, down to where the generator begins
    style_dim: int = number(64, minimum=1)  # numbers of a style, which every layer is modulated by
    mapping_layers: int = number(4, minimum=1)  # layers that make a latent a style; the paper has 8
    style_mixing: float = number(
        0.9, minimum=0, maximum=1
    )  # share of images made by two styles, one for the coarse layers, one for the fine
    path_length: float = number(
        2.0, minimum=0
    )  # weight of the penalty that makes equal steps in style equal steps in the image; 0: none
    path_every: int = number(4, minimum=1)  # it is taken each so many steps of the generator, and then counts as often
    alias_free: bool = (
        False  # StyleGAN3's layers: what moves, moves as a whole and does not stick to the pixels; several times dearer
    )
    margin: int = number(6, minimum=1)  # alias-free: places around each map, in which borders do not show

    @property
    def loss(self) -> str:
        return super().loss + (
            f"; generator + {self.path_length:g} × path length each {self.path_every} steps" if self.path_length else ""
        )
