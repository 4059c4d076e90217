"""The `net` sections of recipes: one module per family trained from scratch. Torch-free.

Each module has the family's record, `SPEC`, and the keys of its section, `Net`. The loader finds the section by
`model.family`. Families built from another library's classes have no section: their arguments are `model.build`.
"""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

from finetune.config import renamed, yaml_reader
from finetune.models import registry


class Section(ABC):
    """Base class of all `net` sections.

    Attributes:
        samplers: names of the family's samplers; empty if there is only one way to sample.
        sampler: the default sampler.
        refines: whether the model upsamples the images of another run, `model.base_run`.
    """

    samplers: ClassVar[tuple[str, ...]] = ()
    sampler: ClassVar[str] = ""
    refines: ClassVar[bool] = False

    @property
    @abstractmethod
    def loss(self) -> str:
        """A description of the loss, for the plan's table."""


@functools.cache
def families() -> list[str]:
    """Return the families that have a `net` section."""
    return [name for name in registry.specs() if section(name) is not None]


def section(family: str) -> type[Section] | None:
    """Return the `Net` class of a family, or None if it has none."""
    module = registry.modules().get(registry.slug_of(family))
    net: type[Section] | None = getattr(importlib.import_module(module), "Net", None) if module else None
    return net


S = TypeVar("S", bound=Section)


def from_config(declared: type[S], values: dict[str, Any], name: str) -> S:
    """Read a section from the `config.json` of a saved model, whose keys may have former names.

    Args:
        name: of the file, for errors.
    """
    node = renamed.current_section("net", yaml_reader.of_plain(values, name), quiet=True)
    section: S = yaml_reader.build(declared, node, "net")
    return section
