"""The `net` section of StyleGAN2 and alias-free StyleGAN3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetune.config.fields import field, replaced
from finetune.config.nets.gan import Adversarial
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
    """Keys of the `net` section of StyleGAN2, alias-free StyleGAN3."""

    minibatch: Literal["none", "stddev", "discrimination"] = replaced(Adversarial, "minibatch", "stddev")
    width: int = field(
        32,
        "Channels at full size; doubled by each halving, at most 8 times the width.",
        unit="channels",
        effect="Wider is better and slower.",
        minimum=4,
        maximum=8192,
    )
    halvings: int = field(
        3, "How many times the sides are halved, down to the size the generator starts from.", minimum=1, maximum=12
    )
    style_dim: int = field(64, "Size of the style vector w, which modulates every layer.", minimum=1, maximum=65_536)
    mapping_layers: int = field(4, "Layers of the mapping network; the paper has 8.", minimum=1, maximum=100)
    style_mixing: float = field(
        0.9,
        "Share of images generated from two styles: one for the coarse layers, one for the fine.",
        minimum=0,
        maximum=1,
    )
    path_length: float = field(
        2.0,
        "Weight of path length regularization; 0: off.",
        effect="Equal steps in style become equal steps in the image.",
        minimum=0,
        maximum=1_000_000.0,
    )
    path_every: int = field(
        4,
        "Path length regularization is computed every n-th generator step and multiplied by n.",
        unit="steps",
        minimum=1,
        maximum=10_000,
    )
    alias_free: bool = field(
        False,
        "StyleGAN3's alias-free layers.",
        effect="Details move with objects instead of sticking to pixels; several times slower.",
    )
    margin: int = field(
        6, "Alias-free layers: pixels of margin around each feature map.", unit="pixels", minimum=1, maximum=1000
    )

    @property
    def loss(self) -> str:
        return super().loss + (
            f"; generator + {self.path_length:g} × path length every {self.path_every} steps"
            if self.path_length
            else ""
        )
