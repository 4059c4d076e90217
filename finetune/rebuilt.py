"""A run's model built anew with the weights of one of its checkpoints: to write or to draw what the trainer's own nets, shared out, cannot."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from finetune.data.scan import Audit
from finetune.engine.checkpoint import Checkpoint
from finetune.engine.optim import average
from finetune.errors import UserError
from finetune.export.metadata import stamp
from finetune.models.turn import Model
from finetune.planning import Plan
from finetune.report.card import write_card


def build(plan: Plan, audit: Audit) -> Model:
    """The model of the plan's family, as it is before the first step, on the host."""
    found: Model = importlib.import_module(f"finetune.models.{plan.recipe.model.family}").build(plan, audit)
    return found


@torch.no_grad()
def rebuilt(plan: Plan, audit: Audit, found: Checkpoint | None) -> Model:
    """The model in evaluation mode, with the weights by which the run would be judged at a checkpoint: averaged, if it keeps averages.

    Args:
        found: none: before the first step.

    Raises:
        UserError: the checkpoint is of other weights.
    """
    model = build(plan, audit)
    tensors = model.state()
    if found is not None and tensors.keys() != found.weights.keys():
        raise UserError("the checkpoint holds other weights than this recipe trains", where=plan.folder, remedy="give the recipe of its run")
    for turn in model.turns():
        if found is not None:
            for name, tensor in tensors.items():
                tensor.copy_(found.averages.get(name, found.weights[name]))
            average(plan.recipe.optimizer, turn.parameters(), found.optimizers[turn.name])
        turn.net.eval()
    return model


def write(plan: Plan, audit: Audit, found: Checkpoint, run: Path, folder: Path) -> list[Path]:
    """Write the artefact of one checkpoint into `folder`; returns its files."""
    return write_of(rebuilt(plan, audit, found), plan, found.step, run, folder)


def write_of(model: Model, plan: Plan, steps: int, run: Path, folder: Path) -> list[Path]:
    """Write the artefact of a model after so many steps, with its card, into `folder`; returns its files."""
    files = model.save(folder)
    stamp(folder, plan, steps)
    write_card(folder, run, plan, steps)
    return files
