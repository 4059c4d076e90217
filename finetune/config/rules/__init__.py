"""`Rule`: one check of a recipe. The tables of rules are in this package's modules. Torch-free.

To add a rule, add a `Rule` to the module of its topic. `finetune.config.validation` applies it in `ft check`,
`ft train` and `finetune.plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from finetune.models import registry

if TYPE_CHECKING:
    from finetune.config.machine import Machine
    from finetune.config.schema import (
        Adapter,
        Data,
        Diffusion,
        Flow,
        Model,
        Optimizer,
        Precision,
        Recipe,
        Sample,
        Train,
    )
    from finetune.models.spec import FamilySpec


@final
@dataclass(frozen=True)
class Context:
    """What a rule may look at: the recipe's sections, the family's record, and the machine once it is known."""

    recipe: Recipe
    known_machine: Machine | None = None
    known_precision: Precision | None = None  # of the activations, resolved for the machine
    steps: int = 0  # resolved length of the run; 0 while the data is unknown

    @property
    def method(self) -> str:
        return self.recipe.method

    @property
    def model(self) -> Model:
        return self.recipe.model

    @property
    def data(self) -> Data:
        return self.recipe.data

    @property
    def train(self) -> Train:
        return self.recipe.train

    @property
    def optimizer(self) -> Optimizer:
        return self.recipe.optimizer

    @property
    def sample(self) -> Sample:
        return self.recipe.sample

    @property
    def adapter(self) -> Adapter | None:
        return self.recipe.adapter

    @property
    def diffusion(self) -> Diffusion | None:
        return self.recipe.diffusion

    @property
    def flow(self) -> Flow | None:
        return self.recipe.flow

    @property
    def net(self) -> Any:
        """The family's own section; None if it has none."""
        return self.recipe.net

    @property
    def spec(self) -> FamilySpec:
        return registry.spec_of(self.model.family)

    @property
    def machine(self) -> Machine:
        assert self.known_machine is not None, "a rule about the machine runs when it is known"
        return self.known_machine

    @property
    def warmup_share(self) -> float:
        """Of the run."""
        return self.optimizer.warmup_steps / max(1, self.steps)

    @property
    def precision(self) -> Precision:
        assert self.known_precision is not None, "a rule about the precision runs when it is known"
        return self.known_precision


Words = str | Callable[[Context], str]


@final
@dataclass(frozen=True)
class Rule:
    """One thing that a recipe may not say, or (in `notes`) that is worth a remark.

    Attributes:
        name: unique, for tests and search.
        key: the key that the error points at; its line in the file is added.
        broken: whether the rule is broken.
        message: what is wrong: a template over `Context`, such as `{model.quantize}`, or a function.
        fix: the edit that fixes it, likewise.
    """

    name: str
    key: str
    broken: Callable[[Context], bool]
    message: Words
    fix: Words = ""


def words(text: Words, context: Context) -> str:
    """A message or fix with the recipe's values filled in."""
    if not isinstance(text, str):
        return text(context)
    return text.format_map(_Names(context))


class _Names(dict[str, Any]):
    """The names of a template: attributes of the context."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self._context = context

    def __missing__(self, name: str) -> Any:
        return getattr(self._context, name)
