"""A run put together: recipe → audit → plan → model → data → trainer, and what is written at its end.

The three entry scripts, `ft train`, `ft check` and the Python API all stand on these functions.
"""

from __future__ import annotations

import importlib.util
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from safetensors import SafetensorError

from finetune import terminal
from finetune.config.loader import located
from finetune.config.schema import Recipe
from finetune.data.audit.audit import Audit, scan
from finetune.data.dataset import Dataset
from finetune.data.sources import refuse_inside
from finetune.distributed import is_main_process
from finetune.errors import UserError
from finetune.estimate.hardware.calibrate import calibrate
from finetune.estimate.hardware.cpu import calibration, discard, keep, keep_freed_memory
from finetune.estimate.monitor import Expected, does_not_fit, expect, rows
from finetune.evaluation.collapse_monitor import CollapseMonitor
from finetune.export import from_checkpoint
from finetune.inference import class_images
from finetune.models.base import Model
from finetune.models.pretrained import check
from finetune.models.scratch.base import PixelModel
from finetune.planning import Plan, make_plan
from finetune.report import model_summary, tables
from finetune.terminal import Progress
from finetune.training import checkpoint, fsdp
from finetune.training.checkpoint import publish
from finetune.training.device import forget_peak, memory_left, memory_live, memory_peak, this_machine
from finetune.training.failures import memory_explained
from finetune.training.pace import Pace
from finetune.training.run_folder import Run
from finetune.training.samples import draw_samples
from finetune.training.trainer import Trainer

_ACCELERATE_NAMES = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}


@dataclass
class Job:
    """A run whose first step could be taken now."""

    plan: Plan
    audit: Audit
    model: Model
    data: Dataset
    run: Run
    accelerator: Accelerator
    trainer: Trainer


def audit_and_plan(recipe: Recipe, quiet: bool = False) -> tuple[Audit, Plan]:
    """Look at the data and resolve every number; prints both tables.

    Raises:
        UserError: for a model that cannot be there, or data that the recipe does not allow.
    """
    with located(recipe):
        return _audit_and_plan(recipe, quiet)


def _audit_and_plan(recipe: Recipe, quiet: bool) -> tuple[Audit, Plan]:
    check.check(recipe)
    for tracker in recipe.output.trackers:  # Accelerate leaves out what is not installed, and does not say so
        if importlib.util.find_spec(tracker) is None:
            raise UserError(
                f"{tracker} is not installed",
                where="output.trackers",
                remedy=f"pip install {tracker}, or remove it there",
            )
    looking = Progress("looking at images", enabled=not quiet)
    audit = _by_one(
        lambda: scan(class_images.with_class(recipe), lambda done, name: looking.show(done, done + 1, name))
    )
    looking.end()
    if not quiet:
        print(tables.data(audit))
    audit.raise_if_stopped()
    to_draw = recipe.prior.images if recipe.prior is not None and class_images.missing(recipe) else 0
    plan = make_plan(recipe, audit, this_machine(), to_draw)
    refuse_inside(Path(plan.folder), recipe.data, "output.folder")
    if not quiet:
        print(tables.plan(plan))
    return audit, plan


def _by_one(work: Callable[[], Audit]) -> Audit:
    """What `work` gives in the main process, in every process of the run: the others wait, and read neither folder nor stream."""
    machine = this_machine()
    if machine.processes == 1:
        return work()
    # The exchange between processes, which `Accelerator` will take over. On GPUs, those that wait would give up after ten minutes.
    PartialState(cpu=machine.device == "cpu", timeout=timedelta(days=7))
    found: list[Audit] = broadcast_object_list([work() if is_main_process() else None])
    return found[0]


def foretell(plan: Plan, force: bool = False, quiet: bool = False) -> Expected:
    """What the estimate says of the plan, printed in one line.

    Raises:
        UserError: the run does not fit into the GPU, and is not forced.
    """
    expected = expect(plan)
    if not quiet:
        print(expected.line)
    if expected.forecast is not None and not expected.forecast.fits and not force:
        raise does_not_fit(expected.forecast)
    return expected


def _measure() -> None:
    """Calibrate the CPU: three seconds, once on this machine. While that is busy, the run goes on without."""
    try:
        keep(calibrate())
    except UserError as error:
        print(f"{error.problem}; the estimate takes it to be as fast, core for core, as the one that ft was written on")


def _refuse_too_large(model: Model, plan: Plan) -> None:
    """A GPU's memory is estimated; of a machine's own, what training cannot do without is counted."""
    needed, there = sum(model_summary.of_what_trains(model, plan).values()), plan.machine.memory_bytes
    if plan.machine.device != "cuda" and needed > there:
        raise UserError(
            f"what trains takes {model_summary.gigabytes(needed)} before the first image, and this machine has {model_summary.gigabytes(there)}",
            where="method" if plan.recipe.method == "full" else "model",
            remedy="train a LoRA or a smaller model; or --force to train all the same",
        )


def prepare(recipe: Recipe, resume: bool = False, force: bool = False) -> Job:
    """Everything up to the first step: audited, planned, estimated, built, encoded, on the device.

    Args:
        force: train even what does not fit into memory.

    Raises:
        UserError: for whatever cannot work, before anything is computed or written.
    """
    with located(recipe):
        return _prepare(recipe, resume, force)


def _prepare(recipe: Recipe, resume: bool, force: bool) -> Job:
    audit, plan = _audit_and_plan(recipe, quiet=not is_main_process())
    if class_images.missing(recipe):
        if not resume:
            Run(plan, resume)  # what speaks against the run is said before an image is drawn
        foretell(plan, force, quiet=True)
        class_images.draw(recipe, is_main_process())
        audit, plan = _audit_and_plan(recipe, quiet=True)
    run = Run(plan, resume)
    if plan.machine.device == "cpu":
        keep_freed_memory()
        if plan.machine.processes == 1 and not calibration(plan.machine.threads).measured:
            _measure()
    expected = foretell(plan, force, quiet=not is_main_process())
    forget_peak()  # of what this process did before
    AcceleratorState._reset_state()  # else the precision of this process's first run would be that of all
    accelerator = Accelerator(
        mixed_precision=_ACCELERATE_NAMES[plan.precision],
        cpu=plan.machine.device == "cpu",
        log_with=list(recipe.output.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(run.folder), logging_dir=str(run.folder / "trackers")),
        fsdp_plugin=fsdp.plugin(plan.precision) if plan.machine.sharded else None,
    )
    if plan.machine.sharded:
        fsdp.check(accelerator)
    model = from_checkpoint.build(plan, audit)
    if not force:
        _refuse_too_large(model, plan)
    accelerator.wait_for_everyone()  # all have seen whether the folder was there before one makes it
    data = Dataset(plan, audit, model.encoder())
    too_long = data.long_captions()  # known only now that the tokenizers are
    if accelerator.is_main_process:
        shown = [
            {"name": p.name, "caption": p.caption, "tokens": data.encoder.tokens(p.caption)} for p in audit.training[:3]
        ]
        if too_long or shown[0]["tokens"]:
            rows = tables.caption_rows(shown) if shown[0]["tokens"] else []
            print(terminal.table("captions as the model reads them", rows + ([("cut", too_long)] if too_long else [])))
        run.create()
        run.write_json("data.json", tables.facts(audit))
    encoding = Progress("encoding", enabled=accelerator.is_main_process)
    tight = memory_explained(recipe, expected, lambda: memory_live(accelerator.device, {}))

    def encoded(what: str, done: int, total: int) -> None:
        encoding.show(done, total, what)
        run.status.progress(done, total)

    with run.status.phase("encoding"), tight:
        if accelerator.num_processes > 1:  # each a share; what others encoded is then in the cache
            data.encode(encoded, (accelerator.process_index, accelerator.num_processes))
            accelerator.wait_for_everyone()
        data.encode(encoded)
    encoding.end()
    if recipe.output.trackers:
        accelerator.init_trackers("finetune", config={"recipe": recipe.name})
    pace = Pace(expected, lambda: memory_left(accelerator.device))
    drawing = (lambda: _from_newest(plan, audit, run)) if plan.machine.sharded else lambda: model
    observe = (lambda done: draw_samples(plan, drawing, run.folder, done)) if recipe.sample.prompts else None
    watch = (
        CollapseMonitor(plan, model, run.folder)
        if recipe.sample.collapse_check_every and isinstance(model, PixelModel)
        else None
    )
    trainer = Trainer(plan, model, data, run, accelerator, observe, pace, watch)
    return Job(plan, audit, model, data, run, accelerator, trainer)


def finish(job: Job) -> Path:
    """Write the artifact (with averaged weights where the run keeps them) and the report; returns the run's folder."""
    with job.run.status.phase("writing"):
        if job.accelerator.is_main_process:
            _write(job)
        job.accelerator.wait_for_everyone()
    job.accelerator.end_training()
    job.run.status.finished()
    return job.run.folder


def _write(job: Job) -> None:
    folder = job.run.folder
    try:
        files, compared = _save(job), _compare(job)
    except (OSError, SafetensorError) as error:  # the second is what safetensors makes of a full disk
        remedy = "free some space and go on with --resume: no step is taken again"
        raise UserError(
            f"what was trained could not be written: {error}", where=str(folder / "final"), remedy=remedy
        ) from error
    places = [("adapter" if job.plan.recipe.adapter else "model", files[0] if len(files) == 1 else folder / "final")]
    report = _report(folder)
    if (folder / "before-after.png").is_file():
        places.append(("before and after", folder / "before-after.png"))
    if report is not None:
        places.append(("report", report))
    lines = ["took", *(f"  {name:<17} {text}" for name, text in compared)] if compared else []
    if wrong := job.trainer.pace.disproved():
        discard(wrong)
        lines.append(
            "so far off, this CPU's measurement is not believed any longer: the next run takes a new one, as does `ft estimate --calibrate`"
        )
    print("\n".join([*lines, "written", *(f"  {name:<17} {place}" for name, place in places)]))


def _save(job: Job) -> list[Path]:
    """Write `final/` whole or not at all: a kill leaves what was there before."""
    final, aside = job.run.folder / "final", job.run.folder / ".final.part"
    shutil.rmtree(aside, ignore_errors=True)
    if job.plan.machine.sharded:
        files = from_checkpoint.write_of(
            _from_newest(job.plan, job.audit, job.run), job.plan, job.plan.steps, job.run.folder, aside
        )
    else:
        with job.trainer.state.averaged():
            files = from_checkpoint.write_of(job.model, job.plan, job.plan.steps, job.run.folder, aside)
    publish(aside, final)
    return [final / file.relative_to(aside) for file in files]


def _from_newest(plan: Plan, audit: Audit, run: Run) -> Model:
    """The model built anew with the newest checkpoint's weights, on the device: what one process draws and writes where all share the weights.

    A checkpoint comes before every look and at the end. Where the device has no room for the whole net, the look fails, and is told.
    """
    model = from_checkpoint.rebuilt(plan, audit, checkpoint.newest(run.folder / "checkpoints")[0])
    model.encoder().release()  # it has read the prompts
    for train_step in model.train_steps():
        train_step.net.to(plan.machine.device)
    return model


def _compare(job: Job) -> list[tuple[str, str]]:
    """Write `estimate.json`, if this process took any step; returns the closing lines about it."""
    if not job.trainer.pace.seconds:
        return []
    found = job.trainer.pace.compared(memory_peak(job.accelerator.device))
    job.run.write_json("estimate.json", found)
    return [
        (name, f"{measured}, and {estimated} was estimated ({off})" if off else measured)
        for name, estimated, measured, off in rows(found)
    ]


def _report(folder: Path) -> Path | None:
    """The run's report; a failure is told, and costs no finished training."""
    try:
        from finetune.report.html_report import write_report

        return write_report(folder)
    except Exception:
        traceback.print_exc()
        print("the report could not be written (see above); the trained weights are not touched by this", flush=True)
        return None


def plan(recipe: Recipe) -> Plan:
    """Every number of the run that `recipe` describes, on this machine, after a look at all its images.

    Raises:
        UserError: for a recipe or data that cannot work.
    """
    return audit_and_plan(recipe, quiet=True)[1]


def train(recipe: Recipe, resume: bool = False, force: bool = False) -> Path:
    """Train by `recipe` in this process, as `ft train` does; returns the run's folder.

    Args:
        recipe: from `finetune.load_recipe`.
        resume: go on with the run in the recipe's folder, bit for bit.
        force: train even what does not fit into memory.

    Raises:
        UserError: for whatever cannot work, before anything is computed or written; or at a loss that is not finite.
    """
    job = prepare(recipe, resume, force)
    job.trainer.train()
    return finish(job)
