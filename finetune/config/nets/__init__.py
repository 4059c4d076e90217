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
