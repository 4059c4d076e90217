"""What a recipe's `net` section says, family by family: a frozen dataclass `Net` in the module named as the family's in `models/`.

The loader finds it by `model.family`. A family that is built from another library's classes has none: its arguments are
`model.build`. Torch is not imported here.
"""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

from finetune.config import renamed, yaml_reader
from finetune.errors import UserError, did_you_mean

_MODULES = {  # family → its module in this package
    "betavae": "vae",
    "cascade": "cascade",
    "dcgan": "dcgan",
    "ddpm": "ddpm",
    "edm": "edm",
    "glow": "glow",
    "imagegpt": "imagegpt",
    "latentdiffusion": "latent_diffusion",
    "pixelcnnpp": "pixelcnnpp",
    "r3gan": "r3gan",
    "realnvp": "realnvp",
    "rectifiedflow": "flow_matching",
    "stylegan2": "stylegan2",
    "vqpixelcnn": "vq_pixelcnn",
    "vqtransformer": "vq_transformer",
    "vqvae": "vqvae",
}


class Section(ABC):
    """What every family's `Net` says of itself besides its keys.

    Attributes:
        kind: of model: VAE, GAN, flow, autoregressive or diffusion, by which `ft estimate --goal` chooses.
        samplers: ways to draw that the family has to choose from; none: it draws in one way.
        sampler: the one that it takes where none is named.
        refines: whether it makes another run's small images large, `model.base_run`'s.
    """

    kind: ClassVar[str]
    samplers: ClassVar[tuple[str, ...]] = ()
    sampler: ClassVar[str] = ""
    refines: ClassVar[bool] = False

    @property
    @abstractmethod
    def loss(self) -> str:
        """What is minimized, in words, for the table before a run."""


def check_sampler(section: object, family: str, sampler: str | None, eta: float, where: str) -> None:
    """Refuse a way to draw that a family has not.

    Args:
        section: the family's, None if it has none.
        sampler, eta: as `Sample` of the recipe.
        where: what an error calls the place that names them.

    Raises:
        UserError: no sampler is called so, the family draws in one way, or eta is given to another than DDIM.
    """
    known: tuple[str, ...] = getattr(section, "samplers", ())
    if sampler is not None and not known:
        raise UserError(f"family {family} has no samplers to choose from", where=where, remedy="remove it")
    if sampler is not None and sampler not in known:
        raise UserError(f'no sampler is called "{sampler}"', where=where, remedy=did_you_mean(sampler, known))
    if eta and (sampler or getattr(section, "sampler", "")) != "ddim":
        raise UserError(
            "eta is DDIM's: no other sampler reads it", where=where, remedy="set sample.sampler: ddim, or remove eta"
        )


@functools.cache
def families() -> list[str]:
    """The families that have a section of their own."""
    return sorted(_MODULES)


def kind(family: str) -> str:
    """What kind of model a family is; those without a section of their own are the VAE of latent diffusion, and denoisers."""
    found = section(family)
    return found.kind if found else "VAE" if family == "vae" else "diffusion"


def section(family: str) -> type[Section] | None:
    """The `Net` of a family, or None if it has none."""
    if family not in families():
        return None
    found: type[Section] = importlib.import_module(f"finetune.config.nets.{_MODULES[family]}").Net
    return found


S = TypeVar("S", bound=Section)


def from_config(declared: type[S], values: dict[str, Any], name: str) -> S:
    """Read a section from the `config.json` of a saved model, whose keys may have old names; `name` is the file in errors."""
    node = renamed.current_section("net", yaml_reader.of_plain(values, name), quiet=True)
    section: S = yaml_reader.build(declared, node, "net")
    return section
