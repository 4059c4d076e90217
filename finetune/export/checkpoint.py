"""Export a checkpoint as if the run had ended there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from finetune.data.audit.audit import scan
from finetune.errors import UserError
from finetune.export import from_checkpoint
from finetune.inference import class_images
from finetune.models.registry import spec_of
from finetune.planning import load_plan
from finetune.training import checkpoint
from finetune.training.device import this_machine

BEST = "best"


def choose(run: Path, asked: str) -> Path:
    """The folder of the checkpoint with the lowest validation loss, or of the one at a step.

    Args:
        asked: `best`, or a number of steps.

    Raises:
        UserError: there is no such checkpoint.
    """
    option = "--checkpoint"
    if asked == BEST:
        found = checkpoint.best(run / "checkpoints")
        if found is None:
            remedy = "give the steps of a checkpoint, such as --checkpoint 500; with data.held_out, runs are validated"
            raise UserError("no checkpoint of this run has a validation loss", where=option, remedy=remedy)
        return found
    if not asked.isdecimal():
        raise UserError(
            f'"{asked}" is not a checkpoint',
            where=option,
            remedy=f"give {option} {BEST}, or a number of steps such as {option} 500",
        )
    return checkpoint.kept(run, [int(asked)], option)[0]


def write_artifact(run: Path, path: Path, folder: Path) -> None:
    """Write the result of the checkpoint at `path` into `folder`.

    The run's data is audited again for captions and classes.

    Raises:
        UserError: the data have changed since the run, the base is missing, or the checkpoint is damaged.
    """
    plan, found = load_plan(run), checkpoint.load_whole(path)
    audit = scan(class_images.with_class(plan.recipe), family=spec_of(plan.recipe.model.family))
    if audit.digest() != plan.data.digest:
        raise UserError(
            "the images or captions have changed since this run started",
            where="data",
            remedy="restore them",
        )
    from_checkpoint.write(dataclasses.replace(plan, machine=this_machine()), audit, found, run, folder)
