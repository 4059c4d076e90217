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
from finetune.models import registry


class Section(ABC):
    """What every family's `Net` says of itself besides its keys.

    Attributes:
        samplers: ways to draw that the family has to choose from; none: it draws in one way.
        sampler: the one that it takes where none is named.
        refines: whether it makes another run's small images large, `model.base_run`'s.
    """

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
    return [name for name in registry.specs() if section(name) is not None]


def section(family: str) -> type[Section] | None:
    """The `Net` of a family, or None if it has none."""
    module = registry.modules().get(registry.slug_of(family))
    found: type[Section] | None = getattr(importlib.import_module(module), "Net", None) if module else None
    return found


S = TypeVar("S", bound=Section)


def from_config(declared: type[S], values: dict[str, Any], name: str) -> S:
    """Read a section from the `config.json` of a saved model, whose keys may have old names; `name` is the file in errors."""
    node = renamed.current_section("net", yaml_reader.of_plain(values, name), quiet=True)
    section: S = yaml_reader.build(declared, node, "net")
    return section
