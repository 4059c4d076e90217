"""The artifact of one of a run's checkpoints, as the run's end would have written it."""

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
    """The checkpoint with the least validation loss, or the one after so many steps.

    Args:
        asked: `best`, or a number of steps.

    Raises:
        UserError: there is none.
    """
    option = "--checkpoint"
    if asked == BEST:
        found = checkpoint.best(run / "checkpoints")
        if found is None:
            remedy = "give the steps of a checkpoint; with data.held_out, a run validates"
            raise UserError("no checkpoint of this run was validated: none is the best", where=option, remedy=remedy)
        return found
    if not asked.isdecimal():
        raise UserError(
            f'"{asked}" is no checkpoint',
            where=option,
            remedy=f"write {option} {BEST}, or the steps taken, such as {option} 500",
        )
    return checkpoint.kept(run, [int(asked)], option)[0]


def write_artefact(run: Path, path: Path, folder: Path) -> None:
    """Write what the checkpoint at `path` holds into `folder`. The run's images are looked at, for their captions and classes.

    Raises:
        UserError: the images are not those that the run saw, the base is gone, or the checkpoint is damaged.
    """
    plan, found = load_plan(run), checkpoint.load_whole(path)
    audit = scan(class_images.with_class(plan.recipe), family=spec_of(plan.recipe.model.family))
    if audit.digest() != plan.data.digest:
        raise UserError(
            "the images or captions have changed since this run was started",
            where="data",
            remedy="put them back as they were",
        )
    from_checkpoint.write(dataclasses.replace(plan, machine=this_machine()), audit, found, run, folder)
