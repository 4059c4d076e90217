"""What a recipe's `net` section says, family by family: a frozen dataclass `Net` in the module named as the family's in `models/`.

The loader finds it by `model.family`. A family that is built from another library's classes has none: its arguments are
`model.build`. Torch is not imported here.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar


class Section(ABC):
    """What every family's `Net` says of itself besides its keys.

    Attributes:
        kind: of model: VAE, GAN, flow, autoregressive or diffusion, by which `ft estimate --goal` chooses.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def loss(self) -> str:
        """What is minimised, in words, for the table before a run."""


def families() -> list[str]:
    """The families that have a section of their own."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def kind(family: str) -> str:
    """What kind of model a family is; those without a section of their own are the VAE of latent diffusion, and denoisers."""
    found = section(family)
    return found.kind if found else "VAE" if family == "vae" else "diffusion"


def section(family: str) -> type[Section] | None:
    """The `Net` of a family, or None if it has none."""
    if family not in families():
        return None
    found: type[Section] = importlib.import_module(f"finetune.nets.{family}").Net
    return found
