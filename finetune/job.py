"""A run put together: recipe → audit → plan → model → data → trainer, and what is written at its end.

The three entry scripts, `ft train` and `finetune.train` all stand on these functions.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from finetune.data.dataset import Dataset
from finetune.data.scan import Audit, scan
from finetune.engine.loop import Trainer, averaged
from finetune.engine.machine import this_machine
from finetune.engine.progress import Progress
from finetune.engine.run import Run
from finetune.engine.samples import draw_samples
from finetune.errors import UserError, did_you_mean
from finetune.models.turn import Model
from finetune.planning import Plan, make_plan
from finetune.recipe import Recipe
from finetune.report import tables

_ACCELERATE_NAMES = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}


@dataclass
class Job:
    plan: Plan
    audit: Audit
    model: Model
    data: Dataset
    run: Run
    accelerator: Accelerator
    trainer: Trainer


def family(recipe: Recipe) -> ModuleType:
    """The module in `finetune/models/` that `model.family` names."""
    folder = Path(__file__).resolve().parent / "models"
    known = [path.stem for path in folder.glob("*.py") if "\ndef build(" in path.read_text(encoding="utf-8")]
    if recipe.model.family not in known:
        raise UserError(f'there is no model family "{recipe.model.family}"', where="model.family", remedy=did_you_mean(recipe.model.family, known))
    return importlib.import_module(f"finetune.models.{recipe.model.family}")


def audit_and_plan(recipe: Recipe, quiet: bool = False) -> tuple[Audit, Plan]:
    """Look at the data and resolve every number; prints both tables.

    Raises:
        UserError: for data that the recipe does not allow.
    """
    looking = Progress("looking at pictures", enabled=not quiet)
    audit = scan(recipe.data, lambda done, name: looking.show(done, done + 1, name))
    looking.end()
    if not quiet:
        print(tables.data(audit))
    audit.raise_if_stopped()
    plan = make_plan(recipe, audit, this_machine())
    if not quiet:
        print(tables.plan(plan))
    return audit, plan


def prepare(recipe: Recipe, resume: bool = False) -> Job:
    """Everything up to the first step: audited, planned, built, encoded, on the device.

    Raises:
        UserError: for whatever cannot work, before anything is computed or written.
    """
    family(recipe)
    main = Accelerator().is_main_process if _launched() else True
    audit, plan = audit_and_plan(recipe, quiet=not main)
    run = Run(plan, resume)
    accelerator = Accelerator(
        mixed_precision=_ACCELERATE_NAMES[plan.precision],
        cpu=plan.machine.device == "cpu",
        log_with=list(recipe.output.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(run.folder), logging_dir=str(run.folder / "trackers")),
    )
    model = family(recipe).build(plan, audit)
    if accelerator.is_main_process:
        run.create()
    data = Dataset(plan, audit, model.encoders())
    encoding = Progress("encoding", enabled=accelerator.is_main_process)
    with accelerator.main_process_first():  # the others then find everything in the cache
        data.encode(lambda what, done, total: encoding.show(done, total, what))
    encoding.end()
    if recipe.output.trackers:
        accelerator.init_trackers("finetune", config={"recipe": recipe.name})
    trainer = Trainer(plan, model, data, run, accelerator, observe=lambda done: draw_samples(plan, model, run.folder, done))
    return Job(plan, audit, model, data, run, accelerator, trainer)


def finish(job: Job) -> list[Path]:
    """Write the artefact (with averaged weights where the run keeps them) into the run's folder; returns the files."""
    files: list[Path] = []
    if job.accelerator.is_main_process:
        with averaged(job.trainer):
            files = job.model.save(job.run.folder / "final")
        for file in files:
            print(f"written: {file}")
    job.accelerator.wait_for_everyone()
    job.accelerator.end_training()
    return files


def _launched() -> bool:
    import os

    return int(os.environ.get("WORLD_SIZE", "1")) > 1
