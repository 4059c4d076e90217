"""Validation: every rule between a recipe's keys, in one table. Limits of single keys are in the schema. Torch-free.

`ft check`, `ft train` and `finetune.plan` run the same tables: `check` when a recipe is read, `check_machine` and
`notes` when it is planned for a machine.
"""

from __future__ import annotations

from collections.abc import Iterator

from finetune.adapters import kinds
from finetune.config import samplers
from finetune.config.machine import Machine
from finetune.config.rules import Context, Rule, machine, networks, sections, training, words
from finetune.config.schema import Precision, Recipe
from finetune.errors import UserError
from finetune.models import registry

RULES: tuple[Rule, ...] = (*sections.RULES, *training.RULES, *networks.RULES)
MACHINE_RULES: tuple[Rule, ...] = machine.RULES
NOTES: tuple[Rule, ...] = machine.NOTES


def check(recipe: Recipe, source: str = "") -> None:
    """Check everything that the recipe alone decides.

    Args:
        source: what errors call the recipe where a key has no line of its own.

    Raises:
        UserError: for the first rule that is broken.
    """
    error = next(broken(recipe), None)
    if error is not None:
        line = recipe.lines.get(error.where, source)
        raise UserError(error.problem, where=f"{line}, {error.where}" if line else error.where, remedy=error.remedy)


def broken(recipe: Recipe) -> Iterator[UserError]:
    """An error for each broken rule, with the key alone as its place."""
    try:
        registry.spec_of(recipe.model.family)
    except UserError as error:  # the other rules ask the family's record
        yield error
        return
    yield from _errors(RULES, Context(recipe))
    if recipe.adapter is not None:  # kinds and variants of adapters bring their rules with them
        for is_broken, problem, remedy in kinds.rules(recipe.adapter, recipe.model):
            if is_broken:
                yield UserError(problem, where="adapter", remedy=remedy)
    try:
        samplers.check(recipe.net, recipe.model.family, recipe.sample.sampler, recipe.sample.eta, "sample")
    except UserError as error:
        yield error


def check_machine(recipe: Recipe, known_machine: Machine, precision: Precision, steps: int) -> None:
    """Check what depends on the machine and the data: precision, number of processes, FSDP, length.

    Raises:
        UserError: for the first rule that is broken, with the key.
    """
    for error in _errors(MACHINE_RULES, Context(recipe, known_machine, precision, steps)):
        raise error


def notes(recipe: Recipe, known_machine: Machine, precision: Precision, steps: int) -> tuple[str, ...]:
    """Remarks on settings that have no effect on this machine, or that are hardly meant."""
    context = Context(recipe, known_machine, precision, steps)
    return tuple(words(rule.message, context) for rule in NOTES if rule.broken(context))


def _errors(rules: tuple[Rule, ...], context: Context) -> Iterator[UserError]:
    for rule in rules:
        if rule.broken(context):
            yield UserError(words(rule.message, context), where=rule.key, remedy=words(rule.fix, context))
