"""Rebuild a run's model with the weights of a checkpoint, to export it or to generate samples.

Also used where the trainer's own networks are sharded and cannot do that.
"""

from __future__ import annotations

from pathlib import Path

import torch

from finetune.adapters.formats.metadata import stamp
from finetune.data.audit.audit import Audit
from finetune.errors import UserError
from finetune.export.model_card import write_card
from finetune.models import registry
from finetune.models.base import Model
from finetune.planning import Plan
from finetune.training.checkpoint import Checkpoint
from finetune.training.optimizers import average


def build(plan: Plan, audit: Audit) -> Model:
    """Build the model of the plan's family, as before the first step, on the CPU."""
    return registry.build(plan, audit)


@torch.no_grad()
def rebuilt(plan: Plan, audit: Audit, found: Checkpoint | None) -> Model:
    """Build the model in evaluation mode with the weights of a checkpoint: the averaged ones, if the run averages.

    Args:
        found: the checkpoint; None: before the first step.

    Raises:
        UserError: the checkpoint has other weights.
    """
    model = build(plan, audit)
    tensors = model.state()
    if found is not None and tensors.keys() != found.weights.keys():
        raise UserError(
            "the checkpoint has other weights than this recipe trains",
            where=plan.folder,
            remedy="use the recipe of the run that wrote it",
        )
    for train_step in model.train_steps():
        if found is not None:
            for name, tensor in tensors.items():
                tensor.copy_(found.averages.get(name, found.weights[name]))
            average(plan.recipe.optimizer, train_step.parameters(), found.optimizers[train_step.name])
        train_step.net.eval()
    return model


def write(plan: Plan, audit: Audit, found: Checkpoint, run: Path, folder: Path) -> list[Path]:
    """Write the result of a checkpoint into `folder`; returns its files."""
    return write_of(rebuilt(plan, audit, found), plan, found.step, run, folder)


def write_of(model: Model, plan: Plan, steps: int, run: Path, folder: Path) -> list[Path]:
    """Write the result of a model after `steps` steps, with its model card, into `folder`; returns its files."""
    files = model.save(folder)
    stamp(folder, plan, steps)
    write_card(folder, run, plan, steps)
    return files
